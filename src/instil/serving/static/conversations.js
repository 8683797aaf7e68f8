// Conversations: a tree of messages each, kept in this browser (IndexedDB).
//
// A message holds the messages that followed it in `next`, and in `active` which of them is shown. An edited message and an
// answer given again are further branches, so nothing that was said is lost.

/** An identifier; `crypto.randomUUID` is there on secure addresses only. */
export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

export function newConversation() {
  return { id: newId(), title: "", system: "", keep: null, changed: Date.now(), next: [], active: 0 };
}

/** Add a message after `parent` (a message, or the conversation itself) and show it. */
export function add(parent, message) {
  const whole = { next: [], active: 0, ...message };
  parent.next.push(whole);
  parent.active = parent.next.length - 1;
  return whole;
}

/** Take a message out again. */
export function remove(parent, message) {
  parent.next = parent.next.filter((other) => other !== message);
  parent.active = Math.max(0, parent.next.length - 1);
}

/** The messages that are shown, each with its parent. */
export function path(conversation) {
  const found = [];
  for (let parent = conversation; parent.next.length; parent = found.at(-1).message) {
    found.push({ message: parent.next[parent.active], parent });
  }
  return found;
}

/** The messages that are shown, as the server takes them; up to `last`, where it is given. */
export function wire(conversation, last) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const { message } of path(conversation)) {
    messages.push({ role: message.role, content: message.content });
    if (message === last) break;
  }
  return messages;
}

export function title(conversation) {
  const first = conversation.next[conversation.active]?.content ?? "";
  return conversation.title || first.trim().split("\n")[0].slice(0, 60) || "New conversation";
}

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let database;

async function store(mode) {
  if (!database) {
    const opening = indexedDB.open("instil", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    database = await settled(opening);
  }
  return database.transaction("conversations", mode).objectStore("conversations");
}

/** The one that is kept under an identifier, if there is one. Answers that a reload broke off are stopped ones. */
export async function load(id) {
  const found = await settled((await store("readonly")).get(id));
  if (found) settle(found);
  return found;
}

function settle(parent) {
  for (const message of parent.next) {
    if (message.ended === null && !message.content) remove(parent, message);
    else if (message.ended === null) message.ended = "stopped";
    settle(message);
  }
}

/** All that are kept, the latest first. */
export async function all() {
  const found = await settled((await store("readonly")).getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

let queue = Promise.resolve(); // what is written is written in turn

const inTurn = (work) => (queue = queue.catch(() => {}).then(work));

/** Keep a conversation. Where another tab has gone on with it, this one is kept beside that, under an identifier of its own;
 * gives whether that was so.
 */
export const save = (conversation) => inTurn(() => write(conversation));

async function write(conversation) {
  const conversations = await store("readwrite");
  const before = await settled(conversations.get(conversation.id));
  const elsewhere = before !== undefined && before.changed !== conversation.changed;
  if (elsewhere) conversation.id = newId();
  const changed = Date.now();
  await settled(conversations.put({ ...conversation, changed }));
  conversation.changed = changed;
  return elsewhere;
}

export async function forget(conversation) {
  conversation.next = []; // nothing that comes late keeps it again
  await inTurn(async () => settled((await store("readwrite")).delete(conversation.id)));
}
