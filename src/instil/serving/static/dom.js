// Elements, built in script: no string ever becomes HTML here.

/** An element with properties (`onclick`, `className`), attributes (`aria-label`, `for`) and children. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A drawing of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button. `key` names it, so that it has the focus again after its list was drawn anew. */
export function button(text, onclick, { key, picture, pressed, why, className = "" } = {}) {
  const element = el("button", { type: "button", className, onclick }, picture ? icon(picture) : text);
  if (picture) {
    element.setAttribute("aria-label", text);
    element.title = text;
    element.classList.add("picture");
  }
  if (key) element.dataset.key = key;
  if (pressed !== undefined) element.setAttribute("aria-pressed", String(pressed));
  if (why) {
    // Still reached by the keyboard, and says why it does nothing.
    element.setAttribute("aria-disabled", "true");
    element.title = why;
    element.onclick = () => say(why);
  }
  return element;
}

/** Replace an element's children; the control that had the focus has it again, at the same place of its text,
 * or `otherwise` where it is gone.
 */
export function redraw(parent, children, otherwise) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const { selectionStart, selectionEnd } = focused ?? {};
  parent.replaceChildren(...children);
  if (!focused) return;
  const again = focused.dataset.key && parent.querySelector(`[data-key="${CSS.escape(focused.dataset.key)}"]`);
  (again || otherwise).focus({ preventScroll: true });
  if (again && typeof selectionStart === "number") again.setSelectionRange(selectionStart, selectionEnd);
}

export const byId = (id) => document.getElementById(id);

let quiet;

/** Show a short note at the foot of the page; screen readers read it out. */
export function say(text) {
  const note = byId("note");
  note.textContent = text;
  note.classList.add("shown");
  clearTimeout(quiet);
  quiet = setTimeout(() => note.classList.remove("shown"), 4000);
}

/** Read a text out, unseen: a finished answer, once, and not token by token. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Open a dialog of index.html and wait; what its form holds, or null when it was left. `error` says why it asks again. */
export function ask(dialog, values = {}, error = "") {
  const form = dialog.querySelector("form");
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  const told = dialog.querySelector(".error");
  if (told) told.textContent = error;
  dialog.returnValue = "";
  dialog.showModal();
  form.querySelector("textarea")?.setSelectionRange(0, 0);
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null);
  });
}

/** Hand a text to the browser as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
