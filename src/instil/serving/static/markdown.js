// An answer's Markdown, as elements that can do nothing but be read.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { button, el, say } from "./dom.js";

const escaped = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.codePointAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // HTML that the model writes is shown as it wrote it.
    html: ({ text }) => escaped(text),
    // Nothing is loaded from elsewhere: an image becomes a link to it.
    image: ({ href, text }) => `<a href="${escaped(href)}">Image: ${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS:
    "a p br hr em strong del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** The elements of a Markdown text; of one that is nested too deeply to be parsed, the text as it is. */
export function markdown(text) {
  let html;
  try {
    html = marked.parse(text);
  } catch {
    return el("p", { className: "plain" }, text);
  }
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) scrolls(table, "Table");
  for (const block of fragment.querySelectorAll("pre")) scrolls(block, "Code").append(copyButton(block.textContent));
  return fragment;
}

/** Put what may be wider than the page into a box that scrolls by itself. */
function scrolls(element, label) {
  const box = document.createElement("div");
  box.className = `wide ${label.toLowerCase()}`;
  element.replaceWith(box);
  element.tabIndex = 0;
  if (element.tagName === "PRE") element.setAttribute("aria-label", label);
  box.append(element);
  return box;
}

function copyButton(text) {
  return button("Copy code", () => copy(text.replace(/\n$/, "")), { picture: "copy" });
}

/** Put a text on the clipboard, and say so. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page use the clipboard.");
  }
}
