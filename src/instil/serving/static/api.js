// The server's HTTP: JSON there and back, and the stream of an answer.

let key = sessionStorage.getItem("instil.key");
let askKey = async () => null;
let asking = null; // the key that is being asked for: once, however many requests want it

/** Say how to ask for the API key when the server wants one. */
export function onKeyWanted(ask) {
  askKey = ask;
}

/** The header that carries a key: whatever its letters, as UTF-8. */
export const bearer = (key) => `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;

/** What the server or the connection said went wrong. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function failure(response) {
  let message;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered ${response.status} ${response.statusText}.`;
  }
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} Try again in ${wait} s.` : message, response.status);
}

async function request(path, body, signal) {
  for (;;) {
    const headers = {};
    const used = key;
    if (used) headers.Authorization = bearer(used);
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached. Is `instil serve` still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (key !== used) continue; // another request was given one meanwhile
    asking ??= askKey(key !== null).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw await failure(response);
    key = given;
    sessionStorage.setItem("instil.key", key);
  }
}

/** The JSON that a GET, or with a body a POST, is answered with. */
export async function json(path, body) {
  return (await request(path, body)).json();
}

/** The data of each server-sent event, as text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/** The chunks of a chat completion. */
async function* chunks(body, signal) {
  const response = await request("/v1/chat/completions", { ...body, stream: true }, signal);
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection was lost in the middle of the answer.");
  }
  throw new ApiError("The answer broke off: the server closed the connection.");
}

/** What is worth keeping of a token and its probability; its bytes only where they are no text by themselves. */
const kept = ({ token, logprob, bytes }) => ({ token, logprob, ...(token.includes("\uFFFD") && { bytes }) });

/** Have an answer written into `answer`, piece by piece.
 *
 * `content`, `served` (the server's id), `promptIds` and `tokens` fill up as it comes; `ended` says how it ended: the server's
 * finish reason, `stopped` by the person here, or `error` with the reason in `error`.
 */
export async function generate(body, answer, { signal, onText = () => {} }) {
  try {
    for await (const chunk of chunks(body, signal)) {
      answer.served = chunk.id;
      if (chunk.prompt_token_ids) answer.promptIds = chunk.prompt_token_ids;
      for (const choice of chunk.choices) {
        const ids = choice.token_ids ?? [];
        (choice.logprobs?.content ?? []).forEach((entry, i) => {
          answer.tokens.push({ id: ids[i], ...kept(entry), likely: entry.top_logprobs.map(kept) });
        });
        if (choice.finish_reason) answer.ended = choice.finish_reason;
        if (choice.delta.content) {
          answer.content += choice.delta.content;
          onText(answer);
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") answer.ended = "stopped";
    else Object.assign(answer, { ended: "error", error: error.message });
  }
  return answer;
}
