// What a person thinks of an answer, sent to the server, which keeps it for training.

import { json } from "./api.js";
import { ask, button, byId, el, say } from "./dom.js";

let recording = { on: false };
const typed = new WeakMap(); // by answer: a reason that is not sent yet; the messages are drawn anew while it is typed

/** Keep what the server records, and say it beside the switch. */
export function startFeedback(about) {
  recording = about.recording;
  const parts = [];
  if (recording.on) {
    parts.push(recording.redacted ? "E-mail addresses, phone and card numbers are taken out." : "Kept as written.");
    if (recording.retention_days) parts.push(`Deleted after ${recording.retention_days} days.`);
  } else parts.push("This server keeps nothing: it was started without --record.");
  byId("keep-note").textContent = parts.join(" ");
  byId("keep").disabled = !recording.on;
}

export const isRecording = () => recording.on;

/** Whether a conversation is kept: as its switch says, or what the server does when nothing is said. */
export const isKept = (conversation) => recording.on && (conversation.keep ?? recording.consent === "all");

/** Why an answer can have no feedback, or undefined where it can. */
export function whyNot(answer) {
  if (!recording.on) return "This server keeps nothing, so answers cannot be rated: it was started without --record.";
  if (!answer.kept) return "This answer was not kept. Let the conversation be kept for training, and ask again.";
  if (answer.ended === "error") return "This answer broke off.";
  return undefined;
}

/** Send one piece of feedback; whether the server has it. */
async function send(body, done) {
  try {
    await json("/api/feedback", body);
  } catch (error) {
    say(error.message);
    return false;
  }
  say(done);
  return true;
}

/** Thumbs up and down; pressed again they are withdrawn. `changed` is called when the server has it. */
export function thumbs(answer, key, changed) {
  const why = whyNot(answer);
  const rate = (value) => async () => {
    const now = answer.rating === value ? null : value;
    const said = now ? (now === "up" ? "Rated good." : "Rated bad.") : "Rating withdrawn.";
    if (await send({ kind: "rating", id: answer.served, choice: 0, value: now }, said)) {
      answer.rating = now;
      answer.comment = null;
      changed();
    }
  };
  return ["up", "down"].map((value) =>
    button(value === "up" ? "Good answer" : "Bad answer", rate(value), {
      key: `${key}-${value}`,
      picture: value,
      pressed: answer.rating === value,
      why,
    }),
  );
}

/** A line in which to say why an answer was rated as it was. */
export function commentLine(answer, key, changed) {
  if (!answer.rating || whyNot(answer)) return null;
  if (answer.comment) return el("p", { className: "soft said" }, `Your reason: ${answer.comment}`);
  const field = el("input", { type: "text", name: "comment", placeholder: "Why? (optional)", "aria-label": "Why" });
  field.dataset.key = `${key}-comment`;
  field.value = typed.get(answer) ?? "";
  field.oninput = () => typed.set(answer, field.value);
  const submit = async (event) => {
    event.preventDefault();
    const comment = field.value.trim();
    if (!comment) return;
    if (await send({ kind: "rating", id: answer.served, choice: 0, value: answer.rating, comment }, "Reason kept.")) {
      answer.comment = comment;
      typed.delete(answer);
      changed();
    }
  };
  return el("form", { className: "comment", onsubmit: submit }, field, el("button", { type: "submit" }, "Send"));
}

/** Say that one of two answers to the same conversation is better. */
export const prefer = (chosen, rejected) =>
  send(
    { kind: "preference", chosen: { id: chosen.served, choice: 0 }, rejected: { id: rejected.served, choice: 0 } },
    "Your choice was kept.",
  );

/** Have the person write the answer that should have been given; the text when the server has it, else null. */
export async function correct(answer, written) {
  for (let content = written, error = ""; ;) {
    const given = await ask(byId("correction"), { content }, error);
    if (given === null) return null;
    content = given.content;
    try {
      await json("/api/feedback", { kind: "correction", id: answer.served, choice: 0, content });
    } catch (refused) {
      error = refused.message;
      continue;
    }
    say("Your answer was kept.");
    return content;
  }
}

/** Save a dialogue that a person wrote. */
export const author = (messages) => send({ kind: "dialogue", messages }, "The dialogue was kept for training.");
