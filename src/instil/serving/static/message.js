// One message of the conversation, with what can be done about it.

import { button, el } from "./dom.js";
import { commentLine, thumbs, whyNot } from "./feedback.js";
import { copy, markdown } from "./markdown.js";

const ENDED = {
  length: "Cut off: the longest answer that was allowed.",
  stopped: "Stopped.",
};

/** ‹ 2 of 3 ›: the branches beside this message. */
function pager({ message, parent, key, actions }) {
  if (parent.next.length < 2) return null;
  const at = parent.next.indexOf(message);
  const step = (by) => () => actions.show(parent, at + by);
  const edge = (there) => (there ? undefined : "There is no further version.");
  return el(
    "span",
    { className: "pager", role: "group", "aria-label": "Versions" },
    button("Previous version", step(-1), { key: `${key}-previous`, picture: "left", why: edge(at > 0) }),
    `${at + 1} of ${parent.next.length}`,
    button("Next version", step(1), { key: `${key}-next`, picture: "right", why: edge(at < parent.next.length - 1) }),
  );
}

/** What a person wrote. */
export function userMessage(shown) {
  const { message, key, actions } = shown;
  return el(
    "li",
    { className: "message user" },
    el("h3", {}, "You"),
    el("div", { className: "text plain" }, message.content),
    el(
      "div",
      { className: "actions" },
      pager(shown),
      button("Edit", () => actions.edit(shown), { key: `${key}-edit` }),
      button("Copy", () => copy(message.content), { key: `${key}-copy` }),
    ),
  );
}

/** Draw the text of an answer; again and again while it comes. */
export function drawAnswer(body, answer) {
  const empty = answer.ended === "stop" && !answer.content.trim();
  if (!answer.content.trim() && !answer.ended) return body.replaceChildren(el("p", { className: "soft" }, "…"));
  body.replaceChildren(empty ? el("p", { className: "soft" }, "(an empty answer)") : markdown(answer.content));
  if (answer.ended === "error") body.append(el("p", { className: "error", role: "alert" }, answer.error));
  else if (ENDED[answer.ended]) body.append(el("p", { className: "soft" }, ENDED[answer.ended]));
}

/** The body of an answer, and around it who gave it and what can be done about it. */
export function answerParts(shown, { heading, paged = true } = {}) {
  const { message, key, actions } = shown;
  const body = el("div", { className: "text" });
  drawAnswer(body, message);
  const mine = message.by === "person";
  const controls = [paged ? pager(shown) : null];
  if (message.ended) {
    if (!mine) controls.push(...thumbs(message, key, actions.changed));
    controls.push(
      mine
        ? button("Change", () => actions.correct(shown), { key: `${key}-correct` })
        : button("Correct", () => actions.correct(shown), { key: `${key}-correct`, why: whyNot(message) }),
      button("Retry", () => actions.retry(shown), { key: `${key}-retry` }),
      button("Copy", () => copy(message.content), { key: `${key}-copy` }),
    );
    if (!mine) controls.push(button("Tokens", () => actions.tokens(shown), { key: `${key}-tokens` }));
  }
  const name = heading ?? (mine ? "Written by you" : message.model);
  return {
    body,
    parts: [
      el("h3", {}, name),
      body,
      el("div", { className: "actions" }, controls),
      mine ? null : commentLine(message, key, actions.changed),
    ].filter(Boolean),
  };
}

/** An answer by itself. */
export function answerMessage(shown) {
  return el("li", { className: "message assistant" }, answerParts(shown).parts);
}
