// The page of the runs: which are chosen, what of them is shown, and asking again while one of them goes on.

import { byId, el } from "./dom.js";
import { get, hasKey, KeyWanted, NoAnswer, useKey } from "./runs-api.js";
import { count, fill, number } from "./runs-dom.js";
import { filter, showEvaluations, showList } from "./runs-list.js";
import { mark, plot } from "./runs-plot.js";
import { measuresOf, showFacts, showSettings, showValues, valueAt } from "./runs-tables.js";

const WHILE_RUNNING = 2000; // milliseconds
const OTHERWISE = 15000; // for one that begins

let runs = null; // as the server lists them; null before it did
const chosen = new Map(); // by id: a number, free when it was chosen, which decides how it looks
let details = []; // of those that are chosen: what the server tells, and the same smoothed
let drawn = null; // the plot
let curves = [];
let waiting;
let asked = 0; // times: what an earlier time gives is late

/** Ask the server; show what has changed; ask again after a while. */
async function refresh() {
  clearTimeout(waiting);
  const time = (asked += 1);
  let pause = OTHERWISE;
  try {
    const listing = await get("/api/runs");
    if (runs === null) chooseFirst(listing.runs);
    const found = await Promise.all([...chosen.keys()].map(ask));
    if (time !== asked) return;
    const changed = listing.runs !== runs;
    runs = listing.runs;
    if (changed) {
      showEvaluations(listing.evaluations);
      list();
    }
    show(found.filter((each) => each.plain !== null));
    const running = runs.filter((run) => run.state === "running").length;
    if (running) pause = WHILE_RUNNING;
    tell(running ? `${running} running` : "");
  } catch (error) {
    if (time !== asked) return;
    if (error instanceof KeyWanted) {
      askKey();
      return;
    }
    if (!(error instanceof NoAnswer)) throw error;
    tell(error.message);
  }
  if (!document.hidden) waiting = setTimeout(refresh, pause);
}

/** What is known of a run, in full. */
async function ask(id) {
  const path = `/api/runs/${id}`;
  const span = byId("smooth").value;
  const [plain, smoothed] = await Promise.all([get(path), span === "0" ? null : get(`${path}?smooth=${span}`)]);
  return { plain, smoothed };
}

function tell(text) {
  if (byId("state").textContent !== text) byId("state").textContent = text;
}

/** At first: those that the address names; else those that run, else the last. */
function chooseFirst(found) {
  const ids = new Set(found.map((run) => run.id));
  const named = location.hash
    .slice(1)
    .split(",")
    .filter((id) => ids.has(id));
  const running = found.filter((run) => run.state === "running").map((run) => run.id);
  const first = named.length ? named : running.length ? running.slice(-6) : found.slice(-1).map((run) => run.id);
  first.forEach((id) => chosen.set(id, chosen.size));
}

function choose(id, isChosen) {
  if (isChosen) {
    const taken = new Set(chosen.values());
    let n = 0;
    while (taken.has(n)) n += 1;
    chosen.set(id, n);
  } else chosen.delete(id);
  history.replaceState(null, "", `#${[...chosen.keys()].join(",")}`);
  list();
  refresh();
}

function list() {
  showList(runs, chosen, (id) => (chosen.has(id) ? mark(chosen.get(id)) : null), choose);
}

/** Show the chosen runs, if anything of them is new. */
function show(found) {
  const same =
    found.length === details.length &&
    found.every((each, i) => each.plain === details[i].plain && each.smoothed === details[i].smoothed);
  if (same) return;
  details = found;
  const any = details.length > 0;
  byId("choose").hidden = any;
  for (const id of ["curves", "facts-part", "settings-part"]) byId(id).hidden = !any;
  if (!any) return;
  const plain = details.map((each) => each.plain);
  offer(measuresOf(plain));
  showFacts(plain);
  showSettings(plain);
  redraw();
}

/** Fill the list of what can be shown, and leave what is chosen there. */
function offer(measures) {
  const select = byId("measure");
  const keys = [...measures.keys()];
  if (keys.join() === [...select.options].map((option) => option.value).join()) return;
  const before = select.value;
  select.replaceChildren(...keys.map((key) => el("option", { value: key }, measures.get(key).text)));
  select.value = measures.has(before) ? before : "loss";
}

/** Draw the curves anew. */
function redraw() {
  const plain = details.map((each) => each.plain);
  const measure = measuresOf(plain).get(byId("measure").value);
  const atEnd = drawn === null || Number(byId("at").value) === drawn.right;
  curves = details.map(({ plain: run, smoothed }) => ({
    n: chosen.get(run.id) ?? 0,
    name: run.name,
    line: measure.line(smoothed ?? run),
    raw: smoothed ? measure.line(run) : null,
    marks: measure.marks(run),
  }));
  drawn = plot(byId("plot"), curves, { log: byId("log").checked, title: measure.text, onStep: point });
  byId("at-part").hidden = drawn === null;
  if (drawn) {
    Object.assign(byId("at"), { min: drawn.left, max: drawn.right });
    point(atEnd ? drawn.right : Number(byId("at").value));
  } else byId("readout").replaceChildren();
  byId("remarks").textContent = remarks(plain).join(" ");
  if (byId("values-part").open) showValues(curves);
}

/** Point at a step: the cursor in the plot, and the values there. */
function point(step) {
  const at = byId("at");
  at.value = step;
  drawn.show(Number(at.value));
  const rows = curves.map((curve) => {
    const values = [curve.line, ...(curve.raw ? [curve.raw] : []), curve.marks].map((points) =>
      number(valueAt(points, step)),
    );
    return [el("span", { className: "of" }, mark(curve.n), curve.name), ...values];
  });
  const smoothed = curves.some((curve) => curve.raw);
  fill(
    byId("readout"),
    [`At step ${count(step)}`, ...(smoothed ? ["Smoothed", "Training"] : ["Training"]), "Held out, last"],
    rows,
  );
  at.setAttribute(
    "aria-valuetext",
    `Step ${count(step)}: ${curves.map((curve) => `${curve.name} ${number(valueAt(curve.line, step) ?? valueAt(curve.marks, step))}`).join(", ")}`,
  );
}

/** What is to be known of the drawing. */
function remarks(plain) {
  const measure = byId("measure").value;
  const found = [];
  if (measure === "loss") {
    const pairs = plain.some((run) => Object.keys(run.measures).length);
    found.push(`In nats${pairs ? "" : " a token"}.`);
  }
  if (curves.some((curve) => curve.marks.length)) found.push("Hollow marks: on held-out rows.");
  const without = curves.filter((curve) => !curve.line.length && !curve.marks.length);
  if (without.length) found.push(`Not measured: ${without.map((curve) => curve.name).join(", ")}.`);
  const name = measure.split(":").at(-1);
  plain.forEach(({ thinned }, i) => {
    for (const [of, points] of [
      [thinned[name], curves[i].line],
      [thinned[`eval_${name}`], curves[i].marks],
    ]) {
      if (of)
        found.push(
          `${curves[i].name}: ${count(points.length)} of ${count(of)} points are shown, the highest and the lowest among them.`,
        );
    }
  });
  if (drawn?.hidden) found.push(`${count(drawn.hidden)} points of 0 or less have no place on a log scale.`);
  return found;
}

function askKey() {
  const dialog = byId("key");
  byId("key-wrong").hidden = !hasKey();
  dialog.showModal();
  dialog.onclose = () => {
    const given = new FormData(dialog.querySelector("form")).get("key");
    if (!given) return tell("The server wants its key: load the page again to give it.");
    useKey(given);
    return refresh();
  };
}

byId("measure").addEventListener("change", redraw);
byId("log").addEventListener("change", redraw);
byId("smooth").addEventListener("change", refresh);
byId("filter").addEventListener("input", filter);
byId("at").addEventListener("input", () => point(Number(byId("at").value)));
byId("values-part").addEventListener("toggle", () => byId("values-part").open && showValues(curves));
document.addEventListener("visibilitychange", () => !document.hidden && refresh());
let width = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === width) return;
  width = contentRect.width;
  if (details.length) redraw();
}).observe(byId("plot"));

refresh();
