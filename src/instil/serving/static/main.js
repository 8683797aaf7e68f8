// The page: what the server is, the views, the keys.

import { json, onKeyWanted } from "./api.js";
import { startAuthoring, stopDraft } from "./authoring.js";
import { startChat, stop } from "./chat.js";
import { ask, byId } from "./dom.js";
import { startFeedback } from "./feedback.js";
import { drawList, showList, startList } from "./list.js";
import { startSettings } from "./settings.js";

/** The view that the address names: `#write` or the chat. */
function showView() {
  const writing = location.hash === "#write";
  byId("chat").hidden = writing;
  byId("write").hidden = !writing;
  document.title = writing ? "Write a dialogue · Instil" : "Chat · Instil";
  for (const [id, here] of [
    ["to-chat", !writing],
    ["to-write", writing],
  ]) {
    if (here) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  showList(false);
}

/** Light or dark, the other of what is seen now. */
function turnTheme() {
  const root = document.documentElement;
  const dark =
    getComputedStyle(root).colorScheme === "dark" ||
    (root.dataset.theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("instil.theme", root.dataset.theme);
}

function keys(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    stop();
    stopDraft();
    showList(false);
  }
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target.id === "message") {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
}

async function start() {
  onKeyWanted(async (wrong) => {
    const given = await ask(byId("key"), { key: "" }, wrong ? "The server does not take this key." : "");
    return given?.key ?? null;
  });
  for (const close of document.querySelectorAll("dialog .close")) close.onclick = () => close.closest("dialog").close();
  byId("theme").onclick = turnTheme;
  addEventListener("keydown", keys);
  addEventListener("hashchange", showView);
  showView();
  let about;
  try {
    about = await json("/api/about");
  } catch (error) {
    byId("start-why").textContent = error.message;
    byId("start-again").onclick = () => location.reload();
    byId("start").showModal();
    return;
  }
  byId("runs").hidden = !about.runs;
  byId("version").textContent = `Instil ${about.version}`;
  startFeedback(about);
  startSettings(about);
  startChat(about, drawList);
  startAuthoring();
  await startList();
  document.body.classList.add("ready");
  byId("message").focus();
}

start();
