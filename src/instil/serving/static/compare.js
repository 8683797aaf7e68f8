// Two answers to the same message, side by side, and the choice between them.

import { button, el } from "./dom.js";
import { prefer, whyNot } from "./feedback.js";
import { answerParts } from "./message.js";

/** The two answers of the pair that a message belongs to, or null. */
export function pairOf(parent, message) {
  const pair = message.pair ? parent.next.filter((other) => other.pair === message.pair) : [];
  return pair.length === 2 ? pair : null;
}

/** Draw both; `bodies` maps each answer to the element that its text grows in. */
export function pairMessage(shown, pair) {
  const { parent, key, actions } = shown;
  const bodies = new Map();
  const columns = pair.map((answer, i) => {
    const side = `Answer ${"AB"[i]}`;
    const mine = { ...shown, message: answer, key: `${key}-${i}` };
    const heading = pair[0].model === pair[1].model ? side : `${side}: ${answer.model}`;
    const { body, parts } = answerParts(mine, { heading, paged: parent.next.length > 2 });
    bodies.set(answer, body);
    if (pair.every((one) => one.ended)) parts.push(choice(answer, pair[1 - i], mine));
    return el("section", { className: answer.preferred ? "preferred" : "", "aria-label": heading }, parts);
  });
  return { bodies, element: el("li", { className: "message assistant pair" }, columns) };

  function choice(answer, other, { key }) {
    const rated = !whyNot(answer) && !whyNot(other);
    const choose = async () => {
      if (rated && !(await prefer(answer, other))) return;
      answer.preferred = true;
      other.preferred = false;
      actions.show(parent, parent.next.indexOf(answer));
    };
    const offered = rated ? "This one is better" : "Go on with this one";
    return el(
      "p",
      { className: "choice" },
      button(answer.preferred ? "You chose this one" : offered, choose, {
        key: `${key}-better`,
        pressed: Boolean(answer.preferred),
        className: "choose",
      }),
    );
  }
}
