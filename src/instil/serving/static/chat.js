// The conversation that is open: sending, answering, stopping, editing, branches.

import { generate } from "./api.js";
import { add, newConversation, newId, path, remove, save, title, wire } from "./conversations.js";
import { pairMessage, pairOf } from "./compare.js";
import { announce, ask, byId, button, el, redraw, say } from "./dom.js";
import { correct, isKept, isRecording } from "./feedback.js";
import { answerMessage, drawAnswer, userMessage } from "./message.js";
import { isGreedy, sampling } from "./settings.js";
import { showTokens } from "./tokens.js";

let conversation = newConversation();
let running = null; // the answers that are being written: what stops them, and the promise of their end
let bodies = new Map(); // the element that shows each answer's text
let trouble = null; // why the last message has no answer
let models = [];
let onChange = () => {};

export const current = () => conversation;

/** Wire the view to the page; `changed` is called when a conversation was kept. */
export function startChat(about, changed) {
  models = about.models;
  onChange = changed;
  byId("model").replaceChildren(...models.map(({ id, role }) => el("option", { value: id }, `${id} (${role})`)));
  byId("answers").querySelector("[value=compare]").hidden = models.length < 2;
  byId("answers").onchange = () => {
    byId("model").disabled = byId("answers").value === "compare";
  };
  byId("composer").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  byId("message").oninput = () => {
    sessionStorage.setItem("instil.typed", byId("message").value);
  };
  byId("message").value = sessionStorage.getItem("instil.typed") ?? "";
  byId("stop").onclick = stop;
  byId("system").onchange = () => {
    conversation.system = byId("system").value;
    keep();
  };
  byId("keep").onchange = () => {
    conversation.keep = byId("keep").checked;
    keep();
  };
}

/** Show a conversation, or a new one; what is being written is stopped. */
export async function open(chosen = newConversation()) {
  while (running) await stop();
  conversation = chosen;
  trouble = null;
  sessionStorage.setItem("instil.open", conversation.id);
  draw();
  byId("system").value = conversation.system;
  byId("system-part").open = conversation.system !== "";
  byId("end").scrollIntoView({ block: "end" });
}

/** End the answers that are being written; what was said stays. */
export async function stop() {
  running?.controller.abort();
  await running?.done;
}

/** Keep a conversation in this browser. */
export async function keep(one = conversation) {
  if (!one.next.length) return;
  try {
    if (await save(one)) say("Another tab has gone on with this conversation: both are kept.");
    if (one === conversation) sessionStorage.setItem("instil.open", one.id);
  } catch {
    say("This browser keeps no conversations here: export this one if you need it.");
  }
  onChange();
}

/** What can be done in a conversation. When the server has answered, another one may be open. */
function actionsOf(one) {
  const changed = () => {
    if (one === conversation) {
      draw();
      follow();
    }
    keep(one);
  };
  const show = (parent, at) => {
    parent.active = at;
    changed();
  };
  return {
    show,
    changed,
    async edit({ message, parent }) {
      const given = await ask(byId("edit"), { content: message.content });
      if (given === null || !given.content.trim()) return;
      await answer(add(parent, { role: "user", content: given.content }));
    },
    retry: ({ message, parent }) => answer(parent, message.model),
    async correct({ message, parent }) {
      const mine = message.by === "person";
      const first = mine ? parent.next.find((other) => other.served === message.corrects) : message;
      const before = parent.next.find((other) => other.corrects === first.served);
      const content = await correct(first, before?.content ?? first.content);
      if (content === null) return;
      if (before) before.content = content;
      const written = {
        role: "assistant",
        by: "person",
        corrects: first.served,
        model: first.model,
        content,
        ended: "stop",
        tokens: [],
      };
      show(parent, parent.next.indexOf(before ?? add(parent, written)));
    },
    tokens: ({ message, parent }) => showTokens(message, wire(one, parent)),
  };
}

/** Draw the conversation. */
function draw() {
  bodies = new Map();
  const actions = actionsOf(conversation);
  const shown = path(conversation);
  const items = shown.map(({ message, parent }, i) => {
    const each = { message, parent, key: String(i), actions };
    if (message.role === "user") return userMessage(each);
    const pair = i === shown.length - 1 ? pairOf(parent, message) : null;
    if (pair) {
      const drawn = pairMessage(each, pair);
      drawn.bodies.forEach((body, answer) => bodies.set(answer, body));
      return drawn.element;
    }
    const item = answerMessage(each);
    bodies.set(message, item.querySelector(".text"));
    return item;
  });
  const last = shown.at(-1)?.message;
  if (last?.role === "user" && !running) {
    const again = button(trouble ? "Try again" : "Answer this", () => answer(last), {
      key: "again",
      className: "choose",
    });
    items.push(
      el(
        "li",
        { className: "message" },
        trouble ? el("p", { className: "error", role: "alert" }, trouble) : null,
        again,
      ),
    );
  }
  redraw(byId("messages"), items, byId("message"));
  byId("empty").hidden = items.length > 0;
  byId("title").textContent = title(conversation);
  byId("keep").checked = isKept(conversation);
  const pressed = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (pressed) byId(running ? "stop" : "send").focus(); // the one that was pressed is gone
  byId("messages").setAttribute("aria-busy", String(running !== null));
}

/** Send what is typed. It stays in its box until it stands in the conversation. */
async function send() {
  const box = byId("message");
  if (running || !box.value.trim()) return;
  const shown = path(conversation);
  const message = add(shown.at(-1)?.message ?? conversation, { role: "user", content: box.value });
  box.value = "";
  sessionStorage.removeItem("instil.typed");
  await answer(message);
}

/** Have `message` answered: once, twice, or by both models, as was chosen; `model` asks one of them alone. */
async function answer(message, model) {
  while (running) await stop(); // another may have been asked for while the last one ended
  const mode = model ? "once" : byId("answers").value;
  const one = models.some(({ id }) => id === model) ? model : byId("model").value;
  const asked = { once: [one], twice: [one, one], compare: models.map(({ id }) => id) }[mode];
  if (mode === "twice" && isGreedy()) say("At temperature 0 both answers are the same: set it in Settings.");
  const messages = wire(conversation, message);
  const pair = asked.length > 1 ? newId() : undefined;
  const kept = isKept(conversation);
  const answers = asked.map((id) =>
    add(message, { role: "assistant", content: "", model: id, tokens: [], ended: null, pair, kept }),
  );
  message.active = message.next.indexOf(answers[0]);
  trouble = null;
  const controller = new AbortController();
  running = { controller, done: write(answers, messages, controller.signal).then(() => finish(message, answers)) };
  draw();
  follow(true);
  keep();
}

/** Ask for the answers and show them as they come. */
function write(answers, messages, signal) {
  const chosen = sampling();
  let frame = 0;
  const onText = () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      for (const each of answers) if (bodies.has(each)) drawAnswer(bodies.get(each), each);
      follow();
    });
  };
  const asking = answers.map((each, i) => {
    const body = { model: each.model, messages, ...chosen, logprobs: true, top_logprobs: 5, return_token_ids: true };
    if (chosen.seed !== undefined) body.seed += i;
    if (isRecording()) body.store = each.kept;
    return generate(body, each, { signal, onText });
  });
  return Promise.all(asking).finally(() => cancelAnimationFrame(frame));
}

/** What came is kept; an answer of which nothing came is taken out, and its trouble told. */
async function finish(message, answers) {
  running = null;
  for (const each of answers) {
    if (each.content || each.ended === "stop" || each.ended === "length") continue;
    trouble = each.error ?? trouble;
    remove(message, each);
  }
  if (trouble && message.next.some((each) => answers.includes(each))) {
    say(trouble); // of two answers one came, and stands where the trouble would
    trouble = null;
  }
  draw();
  follow();
  const said = answers.filter(({ content }) => content);
  announce(said.map(({ model, content }) => `${model}: ${content}`).join("\n"));
  await keep();
}

/** Keep the end of the conversation in sight, unless the reader went up. */
function follow(always = false) {
  const page = byId("scroll");
  if (always || page.scrollHeight - page.scrollTop - page.clientHeight < 120) page.scrollTop = page.scrollHeight;
}
