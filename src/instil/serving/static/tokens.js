// The tokens of an answer: what the model was given, and what it generated, with what it held likely.

import { json } from "./api.js";
import { byId, el } from "./dom.js";

const STEPS = [0.9, 0.5, 0.2, 0.05];

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value < 0.05 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};

/** A token's text with what cannot be seen made visible; the line break itself stays. */
function visible(token, bytes) {
  if (token.includes("\uFFFD") && bytes)
    return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  return token.replaceAll(" ", "·").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll("\n", "⏎\n") || "∅";
}

/** Control tokens are spelled like this, and bytes of a character almost so. */
const looksSpecial = (token) => /^(<(?!0x)[^<>\s]+>|\[[A-Z_]+\])$/.test(token);

/** A row of tokens: one stop for the Tab key, arrow keys within; what is under the pointer or focus goes to `show`. */
function row(entries, label, show) {
  const options = entries.map((entry, i) =>
    el(
      "span",
      {
        role: "option",
        tabIndex: i ? -1 : 0,
        className: entry.className,
        "aria-label": entry.label,
        onmouseenter: () => show(entry),
        onfocus: () => show(entry),
      },
      entry.text,
    ),
  );
  const move = (event) => {
    const at = options.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: options.length - 1 }[event.key];
    if (to === undefined || !options[to]) return;
    event.preventDefault();
    options[at].tabIndex = -1;
    options[to].tabIndex = 0;
    options[to].focus();
  };
  return el("div", { className: "tokens", role: "listbox", "aria-label": label, onkeydown: move }, options);
}

function given(reply) {
  return reply.tokens.map((id, i) => {
    const token = reply.token_strs[i];
    const special = looksSpecial(token);
    return {
      text: visible(token),
      className: special ? "special" : "",
      label: `${token.trim() || visible(token)}, token ${id}${special ? ", special" : ""}`,
      id,
      token,
    };
  });
}

function generated(tokens) {
  return tokens.map((entry) => {
    const probability = Math.exp(entry.logprob);
    const step = STEPS.findIndex((least) => probability >= least);
    return {
      text: visible(entry.token, entry.bytes),
      className: `p${step < 0 ? STEPS.length : step}${looksSpecial(entry.token) ? " special" : ""}`,
      label: `${entry.token.trim() || visible(entry.token)}, ${percent(entry.logprob)}`,
      ...entry,
    };
  });
}

/** The token in hand: its id, its probability, and what else was likely. */
function readout(entry) {
  const rows = (entry.likely ?? []).map((other) =>
    el(
      "tr",
      { className: other.token === entry.token ? "taken" : "" },
      el("td", {}, el("code", {}, visible(other.token, other.bytes))),
      el("td", {}, el("meter", { min: 0, max: 1, value: Math.exp(other.logprob), "aria-hidden": "true" })),
      el("td", { className: "number" }, percent(other.logprob)),
    ),
  );
  const facts = [
    entry.id === undefined ? null : `token ${entry.id}`,
    entry.logprob === undefined ? "given" : percent(entry.logprob),
  ];
  return [
    el("p", {}, el("code", {}, entry.text), ` ${facts.filter(Boolean).join(", ")}`),
    rows.length ? el("table", {}, el("caption", {}, "What the model held likely here"), el("tbody", {}, rows)) : null,
  ].filter(Boolean);
}

let asked = 0; // times: what is told of an earlier answer is late

/** Open the view on an answer and the messages that it answers. */
export async function showTokens(answer, messages) {
  const dialog = byId("tokens");
  const time = (asked += 1);
  const box = byId("tokens-readout");
  const show = (entry) => box.replaceChildren(...readout(entry));
  box.replaceChildren(el("p", { className: "soft" }, "Point at a token, or move with the arrow keys."));
  byId("tokens-generated").replaceChildren(
    el(
      "p",
      { className: "soft" },
      `${answer.tokens.length} tokens. The stronger the colour behind a token, the less likely it was.`,
    ),
    answer.tokens.length ? row(generated(answer.tokens), "What it generated", show) : "",
  );
  const part = byId("tokens-given");
  part.replaceChildren(el("p", { className: "soft" }, "…"));
  if (!dialog.open) dialog.showModal();
  try {
    const reply = await json("/tokenize", { model: answer.model, messages, return_token_strs: true });
    if (time !== asked) return;
    const same = answer.promptIds && JSON.stringify(answer.promptIds) === JSON.stringify(reply.tokens);
    const room = reply.max_model_len ? ` of ${reply.max_model_len}` : "";
    const proof = same
      ? "These are the ids that were served."
      : "What was served had other ids than this conversation has now.";
    part.replaceChildren(
      el("p", { className: "soft" }, `${reply.count}${room} tokens. ${answer.promptIds ? proof : ""}`),
      row(given(reply), "What the model sees", show),
    );
  } catch (error) {
    if (time !== asked) return;
    part.replaceChildren(el("p", { className: "error", role: "alert" }, error.message));
  }
}
