// A whole training dialogue, written by a person turn by turn; the model proposes drafts.

import { generate } from "./api.js";
import { ask, byId, button, download, el, redraw, say } from "./dom.js";
import { author, isRecording } from "./feedback.js";
import { sampling } from "./settings.js";

const fresh = () => ({
  user: "",
  about: "",
  assistant: "",
  system: "",
  turns: [{ role: "user", content: "" }],
  saved: false,
});

let dialogue = fresh();
let running = null; // the draft that is being written

const name = (role) => dialogue[role].trim() || (role === "user" ? "User" : "Assistant");

/** The dialogue as it is kept in this browser. */
function kept() {
  const found = { ...fresh(), ...JSON.parse(localStorage.getItem("instil.dialogue") ?? "{}") };
  found.turns.forEach((turn) => delete turn.drafting); // a reload ends a draft
  return found;
}

/** Wire the view to the page. */
export function startAuthoring() {
  dialogue = kept();
  addEventListener("storage", ({ key }) => {
    if (key !== "instil.dialogue" || running) return;
    dialogue = kept(); // it was written on in another tab
    draw();
  });
  for (const field of ["user", "about", "assistant", "system"]) {
    byId(`write-${field}`).oninput = () => {
      dialogue[field] = byId(`write-${field}`).value;
      changed();
      if (field === "user" || field === "assistant") draw();
    };
  }
  byId("write-save").onclick = saveDialogue;
  byId("write-download").onclick = () => {
    const row = JSON.stringify({ messages: messages() });
    download("dialogue.jsonl", `${row}\n`, "application/jsonl");
  };
  byId("write-new").onclick = async () => {
    const unsaved = !dialogue.saved && dialogue.turns.some(({ content }) => content);
    if (unsaved && (await ask(byId("discarding"))) === null) return;
    stopDraft();
    dialogue = {
      ...fresh(),
      user: dialogue.user,
      about: dialogue.about,
      assistant: dialogue.assistant,
      system: dialogue.system,
    };
    changed();
    draw();
  };
  draw();
}

/** End the draft that is being written; what came stays. */
export function stopDraft() {
  running?.abort();
}

/** What the dialogue is saved as. */
function messages(turns = dialogue.turns) {
  const system = dialogue.system.trim() ? [{ role: "system", content: dialogue.system }] : [];
  return [...system, ...turns.map(({ role, content }) => ({ role, content }))];
}

/** Why the dialogue cannot be saved yet, or undefined. */
function missing() {
  const empty = dialogue.turns.findIndex(({ content }) => !content.trim());
  if (empty >= 0) return `Turn ${empty + 1} is empty.`;
  const twice = dialogue.turns.findIndex(({ role }, i) => role !== (i % 2 ? "assistant" : "user"));
  if (twice >= 0) return `Turn ${twice + 1} should be ${name(twice % 2 ? "assistant" : "user")}'s.`;
  if (dialogue.turns.length < 2 || dialogue.turns.at(-1).role !== "assistant")
    return `The last turn should be ${name("assistant")}'s.`;
  return undefined;
}

function changed() {
  dialogue.saved = false;
  localStorage.setItem("instil.dialogue", JSON.stringify(dialogue));
  state();
}

/** What can be done with the dialogue as it is, and why not. */
function state() {
  const why = missing();
  const off = "This server keeps nothing (it was started without --record): download the dialogue instead.";
  byId("write-save").disabled = Boolean(why) || !isRecording() || dialogue.saved;
  byId("write-download").disabled = Boolean(why);
  byId("write-state").textContent = dialogue.saved
    ? "Saved for training."
    : (why ?? (isRecording() ? "Ready to be saved." : off));
}

function draw() {
  for (const field of ["user", "about", "assistant", "system"]) byId(`write-${field}`).value = dialogue[field];
  const last = dialogue.turns.at(-1);
  const next = last?.role === "user" ? "assistant" : "user";
  redraw(byId("turns"), dialogue.turns.map(turnItem), byId("write-next"));
  byId("write-next").textContent = `Add ${name(next)}'s turn`;
  byId("write-next").onclick = () => {
    dialogue.turns.push({ role: next, content: "" });
    changed();
    draw();
    byId("turns").lastElementChild.querySelector("textarea").focus();
  };
  state();
}

function turnItem(turn, i) {
  const id = `turn-${i}`;
  const area = el("textarea", { id, rows: 2, value: turn.content, disabled: turn.drafting ?? false });
  area.dataset.key = id;
  area.oninput = () => {
    turn.content = area.value;
    changed();
  };
  const propose = turn.drafting
    ? button("Stop", stopDraft, { key: `${id}-propose` })
    : button("Propose", () => draft(turn, i), { key: `${id}-propose` });
  const undo = () => {
    Object.assign(turn, { content: turn.before, before: undefined });
    changed();
    draw();
  };
  const remove = () => {
    if (turn.drafting) stopDraft();
    dialogue.turns.splice(i, 1);
    changed();
    draw();
  };
  return el(
    "li",
    { className: `turn ${turn.role}` },
    el("label", { htmlFor: id }, `${i + 1}. ${name(turn.role)}`),
    area,
    el(
      "div",
      { className: "actions" },
      propose,
      turn.before && !turn.drafting ? button("Take back the draft", undo, { key: `${id}-undo` }) : null,
      dialogue.turns.length > 1 ? button("Remove", remove, { key: `${id}-remove` }) : null,
      turn.error ? el("span", { className: "error", role: "alert" }, turn.error) : null,
    ),
  );
}

/** What the model is asked for: the assistant's turn as it will be served; the user's with the two sides exchanged. */
function asked(role, before) {
  if (role === "assistant") return messages(before);
  const other = { user: "assistant", assistant: "user" };
  const who = `You are ${name("user")}${dialogue.about.trim() ? `: ${dialogue.about.trim()}` : "."}`;
  const task = `You talk to ${name("assistant")}. Write what ${name("user")} says next, and nothing else.`;
  const turned = before.map(({ role, content }) => ({ role: other[role], content }));
  const start =
    turned[0]?.role === "user" ? [] : [{ role: "user", content: `Begin the conversation with ${name("assistant")}.` }];
  return [{ role: "system", content: `${who}\n${task}` }, ...start, ...turned];
}

/** Have the model write a turn, to be changed as one likes. What stood there stays if nothing is proposed, else it can be
 * had again. */
async function draft(turn, i) {
  if (running) return say("Another draft is being written.");
  const controller = (running = new AbortController());
  Object.assign(turn, { drafting: true, error: null });
  draw();
  const answer = { content: "", tokens: [], ended: null };
  const body = {
    model: byId("model").value,
    messages: asked(turn.role, dialogue.turns.slice(0, i)),
    ...sampling(),
    store: false,
  };
  const onText = () => {
    const area = byId(`turn-${dialogue.turns.indexOf(turn)}`);
    if (area) area.value = answer.content;
  };
  await generate(body, answer, { signal: controller.signal, onText });
  running = null;
  const content = answer.content.trim() || turn.content;
  const before = content === turn.content ? turn.before : turn.content;
  Object.assign(turn, { drafting: undefined, error: answer.error, content, before });
  changed();
  draw();
  say(answer.error ?? (answer.content.trim() ? "A draft was written." : "The model proposed nothing."));
}

async function saveDialogue() {
  const sent = messages();
  if (!(await author(sent))) return;
  changed();
  dialogue.saved = JSON.stringify(messages()) === JSON.stringify(sent); // or it was written on meanwhile
  localStorage.setItem("instil.dialogue", JSON.stringify(dialogue));
  state();
}
