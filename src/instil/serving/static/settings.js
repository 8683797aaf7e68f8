// How answers are drawn: what is set here goes with each request, the rest is the model's own.

import { byId } from "./dom.js";

const FIELDS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

let defaults = {};

/** Fill the settings dialog: the model's own values show where nothing is set. */
export function startSettings(about) {
  defaults = about.sampling;
  const form = byId("settings").querySelector("form");
  const kept = JSON.parse(localStorage.getItem("instil.sampling") ?? "{}");
  form.elements.max_tokens.max = about.limits.max_new_tokens;
  for (const name of FIELDS) {
    const field = form.elements[name];
    field.value = kept[name] ?? "";
    field.placeholder = defaults[name] ?? { max_tokens: about.limits.max_new_tokens, seed: "any" }[name] ?? "off";
  }
  form.addEventListener("change", () => {
    const values = FIELDS.filter((name) => form.elements[name].value !== "" && form.elements[name].checkValidity());
    localStorage.setItem(
      "instil.sampling",
      JSON.stringify(Object.fromEntries(values.map((name) => [name, form.elements[name].value]))),
    );
    mark();
  });
  byId("settings-own").onclick = () => {
    for (const name of FIELDS) form.elements[name].value = "";
    form.dispatchEvent(new Event("change"));
  };
  byId("settings-open").onclick = () => byId("settings").showModal();
  mark();
}

/** The button says when something is set. */
function mark() {
  const count = Object.keys(sampling()).length;
  byId("settings-open").textContent = count ? `Settings (${count})` : "Settings";
}

/** The fields of a request. */
export function sampling() {
  const kept = JSON.parse(localStorage.getItem("instil.sampling") ?? "{}");
  return Object.fromEntries(Object.entries(kept).map(([name, value]) => [name, Number(value)]));
}

/** Whether the same conversation is always answered alike. */
export function isGreedy() {
  return (sampling().temperature ?? defaults.temperature) === 0;
}
