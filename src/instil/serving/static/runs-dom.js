// Drawings, tables, and numbers as people read them.

import { el } from "./dom.js";

/** An element of a drawing. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A table: a head of column names, and rows whose first cell names them. Empty rows are left out. */
export function fill(table, head, rows) {
  const cells = (row) => row.map((value, i) => (i ? el("td", {}, value) : el("th", { scope: "row" }, value)));
  table.replaceChildren(
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        head.map((name) => el("th", { scope: "col" }, name)),
      ),
    ),
    el(
      "tbody",
      {},
      rows.filter((row) => row.slice(1).some((value) => value !== "")).map((row) => el("tr", {}, cells(row))),
    ),
  );
}

/** A measured number; what is none is said to be none. */
export function number(value) {
  if (value === undefined) return "";
  if (value === null) return "no number";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(4);
}

export const count = (value) => value.toLocaleString("en");

/** Seconds as hours, minutes and seconds. */
export function time(seconds) {
  if (seconds === null) return "";
  const whole = Math.round(seconds);
  const two = (value) => String(value).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

/** The last part of a path. */
export const lastPart = (path) => path.split("/").filter(Boolean).at(-1) ?? path;
