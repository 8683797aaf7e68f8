// Tables about the runs that are chosen: how they went, their settings, and their curves in numbers.

import { byId, el } from "./dom.js";
import { count, fill, number, time } from "./runs-dom.js";

const SHOWN = 40; // rows of the curves, at most
const words = (name) => name.replaceAll("_", " ");

/** What can be drawn of some runs: by key, the words for it and where it stands in a run's answer. */
export function measuresOf(runs) {
  const found = new Map([["loss", { text: "Loss", line: (run) => run.losses, marks: (run) => run.eval_losses }]]);
  const names = (part) => new Set(runs.flatMap((run) => Object.keys(run[part])));
  for (const name of names("eval_metrics")) {
    found.set(`metric:${name}`, {
      text: `Held-out ${words(name)}`,
      line: () => [],
      marks: (run) => run.eval_metrics[name] ?? [],
    });
  }
  for (const name of new Set([...names("measures"), ...names("eval_measures")])) {
    found.set(`measure:${name}`, {
      text: capital(words(name)),
      line: (run) => run.measures[name] ?? [],
      marks: (run) => run.eval_measures[name] ?? [],
    });
  }
  for (const [name, text] of [
    ["learning_rate", "Learning rate"],
    ["grad_norm", "Gradient norm"],
    ["tokens_per_second", "Tokens per second"],
  ]) {
    found.set(`optimizer:${name}`, { text, line: (run) => run.optimizer[name], marks: () => [] });
  }
  return found;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** The value of a curve at a step: that of the point before it, or of the step itself. */
export const valueAt = (points, step) => points.findLast((point) => point[0] <= step)?.[1];

/** The curves in numbers, at steps evenly spread. */
export function showValues(curves) {
  const steps = [...new Set(curves.flatMap((curve) => [...curve.line, ...curve.marks].map((point) => point[0])))].sort(
    (a, b) => a - b,
  );
  const every = Math.max(1, (steps.length - 1) / (SHOWN - 1));
  const spread = [];
  for (let at = 0; Math.round(at) < steps.length; at += every) spread.push(steps[Math.round(at)]);
  for (const curve of curves) spread.push(...curve.marks.slice(-SHOWN).map((point) => point[0]));
  const exact = (points, step) => number(points.find((point) => point[0] === step)?.[1]);
  const columns = curves.flatMap((curve) => [
    ...(curve.line.length ? [[curve.name, (step) => exact(curve.line, step)]] : []),
    ...(curve.marks.length ? [[`${curve.name}, held out`, (step) => exact(curve.marks, step)]] : []),
  ]);
  fill(
    byId("values"),
    ["Step", ...columns.map(([name]) => name)],
    [...new Set(spread)].sort((a, b) => a - b).map((step) => [count(step), ...columns.map(([, value]) => value(step))]),
  );
}

/** How the runs went, a column each. */
export function showFacts(runs) {
  byId("facts-name").textContent = runs.length === 1 ? "How it went" : "How they went";
  const ends = (points) => (points.length ? `${number(points[0][1])} to ${number(points.at(-1)[1])}` : "");
  const rows = [
    ["State", (run) => run.state],
    ["Why it ended", (run) => run.reason ?? ""],
    [
      "Steps",
      (run) => (run.record.config ? count(run.step) + (run.steps === null ? "" : ` of ${count(run.steps)}`) : ""),
    ],
    ["Time", (run) => time(run.seconds)],
    ["Loss, first to last", (run) => ends(run.losses)],
    ["Held-out loss, first to last", (run) => ends(run.eval_losses)],
    ["Held-out loss, best", best],
    ...[...new Set(runs.flatMap((run) => Object.keys(run.eval_metrics)))].map((name) => [
      `Held-out ${words(name)}`,
      (run) => ends(run.eval_metrics[name] ?? []),
    ]),
    ...[...new Set(runs.flatMap((run) => Object.keys(run.eval_measures)))].map((name) => [
      `Held-out ${words(name)}`,
      (run) => ends(run.eval_measures[name] ?? []),
    ]),
    ["Weights of step", (run) => (run.record.outcome ? count(run.record.outcome.best_step ?? run.step) : "")],
    ["Base model", (run) => run.record.base_model ?? ""],
    ["Data", (run) => run.data.join(", ")],
    ["Notes", (run) => (run.record.notes ?? []).join("; ")],
  ];
  fill(
    byId("facts"),
    ["", ...runs.map((run) => run.name)],
    rows.map(([name, value]) => [name, ...runs.map(value)]),
  );
}

function best(run) {
  const [step, loss] = run.eval_losses.reduce(
    (low, point) => (point[1] !== null && (low[1] === null || point[1] < low[1]) ? point : low),
    [0, null],
  );
  return loss === null ? "" : `${number(loss)} after step ${count(step)}`;
}

/** One run: its settings that are not the default. Several: the settings in which they differ. */
export function showSettings(runs) {
  const alone = runs.length === 1;
  byId("settings-name").textContent = alone ? "Settings that are not the default" : "Settings in which they differ";
  const parts = alone
    ? [["", (run) => run.changed]]
    : [
        ["", (run) => run.record.config],
        ["resolved: ", (run) => run.record.resolved],
        ["version of ", (run) => run.record.versions],
      ];
  const rows = parts.flatMap(([before, part]) =>
    [...new Set(runs.flatMap((run) => Object.keys(part(run) ?? {})))]
      .filter((name) => name !== "output" || before)
      .map((name) => [el("code", {}, before + name), ...runs.map((run) => shown(part(run)?.[name]))])
      .filter((row) => alone || new Set(row.slice(1)).size > 1),
  );
  byId("settings-part").hidden = !runs.some((run) => run.record.config);
  byId("settings-none").hidden = rows.length > 0;
  byId("settings-none").textContent = alone ? "All are the default." : "They differ in none.";
  byId("settings").hidden = rows.length === 0;
  fill(byId("settings"), ["Setting", ...runs.map((run) => run.name)], rows);
}

function shown(value) {
  if (value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}
