// What the server tells of the runs, asked again and again: what has not changed is not sent again.

import { bearer } from "./api.js";

let key = sessionStorage.getItem("instil.key");
const held = new Map(); // by path: the tag of what was sent, and what it was

/** The server wants a key, or another one. */
export class KeyWanted extends Error {}

/** The server cannot be reached, or cannot answer. */
export class NoAnswer extends Error {}

/** Use this key from now on, until the tab is closed. */
export function useKey(given) {
  key = given;
  sessionStorage.setItem("instil.key", given);
}

/** Whether a key was given before. */
export const hasKey = () => key !== null;

/** The JSON of a path: the very same value as before where nothing has changed; null where there is no such run. */
export async function get(path) {
  const before = held.get(path);
  const headers = {};
  if (key !== null) headers.Authorization = bearer(key);
  if (before) headers["If-None-Match"] = before.tag;
  let response;
  let value;
  try {
    response = await fetch(path, { headers, cache: "no-store" });
    if (response.status === 200) value = await response.json();
  } catch {
    throw new NoAnswer("The server cannot be reached; it is tried again.");
  }
  if (response.status === 304) return before.value;
  if (response.status === 401) throw new KeyWanted();
  if (response.status === 404) return null;
  if (!response.ok) throw new NoAnswer(`The server answered ${response.status}; it is asked again.`);
  held.set(path, { tag: response.headers.get("ETag"), value });
  return value;
}
