// The conversations kept in this browser: opened, renamed, deleted, exported.

import { current, keep, open, stop } from "./chat.js";
import { all, forget, load, title, wire } from "./conversations.js";
import { ask, byId, button, download, el, redraw } from "./dom.js";

/** Wire the list to the page and open what was open before. */
export async function startList() {
  byId("new").onclick = () => go();
  byId("list-toggle").onclick = () => showList(byId("list-toggle").getAttribute("aria-expanded") !== "true");
  byId("rename").onclick = async () => {
    const given = await ask(byId("renaming"), { title: title(current()) });
    if (given === null) return;
    current().title = given.title.trim();
    byId("title").textContent = title(current());
    await keep();
  };
  byId("delete").onclick = async () => {
    if ((await ask(byId("deleting"))) === null) return;
    await stop();
    await forget(current());
    go();
  };
  byId("export").onclick = () => {
    const whole = { title: title(current()), messages: wire(current()), conversation: current() };
    const name = title(current())
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .slice(0, 40);
    download(`${name}.json`, JSON.stringify(whole, null, 2), "application/json");
  };
  await open(await load(sessionStorage.getItem("instil.open") ?? "").catch(() => undefined));
  drawList();
}

/** Open the conversation with this identifier, or a new one. */
async function go(id) {
  if (id === undefined || id !== current().id) await open(id === undefined ? undefined : await load(id));
  showList(false);
  drawList();
  byId("message").focus();
}

/** On a narrow page the list lies over the rest. */
export function showList(shown) {
  byId("list-toggle").setAttribute("aria-expanded", String(shown));
  document.body.classList.toggle("listing", shown);
}

/** Draw the list anew. */
export async function drawList() {
  const kept = await all().catch(() => []);
  const items = kept.map((each) => {
    const item = button(title(each), () => go(each.id), { key: each.id });
    if (each.id === current().id) item.setAttribute("aria-current", "true");
    return el("li", {}, item);
  });
  redraw(byId("conversations"), items, byId("new"));
  byId("conversations-none").hidden = items.length > 0;
  const isKept = kept.some(({ id }) => id === current().id);
  byId("rename").disabled = byId("delete").disabled = !isKept;
  byId("export").disabled = !current().next.length;
}
