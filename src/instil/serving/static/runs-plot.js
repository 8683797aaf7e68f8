// One plot of several curves, as a drawing of the page: axes, lines, marks, and a cursor at a step.

import { el } from "./dom.js";
import { count, draw, number } from "./runs-dom.js";

const COLOURS = 6; // as many as runs.css has
const SHAPES = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
  "M-4 -4h8v8h-8z",
  "M0 -5l5 9h-10z",
  "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
  "M0 5l5 -9h-10z",
  "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
];

/** The classes of the colour of the run that was chosen as the n-th, and its shape: no two of the first 36 have both. */
const look = (n) => ({ colour: `colour-${n % COLOURS}`, shape: SHAPES[(n + Math.floor(n / COLOURS)) % SHAPES.length] });

/** What stands for a run beside its name. */
export function mark(n) {
  const { colour, shape } = look(n);
  return draw(
    "svg",
    { viewBox: "-9 -7 18 14", class: `key ${colour}`, "aria-hidden": "true" },
    draw("path", { class: "line", d: "M-9 0h18" }),
    draw("path", { class: "mark", d: shape }),
  );
}

/** Values from low to high at round distances, about `wanted` of them. */
function roundTicks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * unit).find((each) => each >= raw);
  const ticks = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at += 1) ticks.push(at * step);
  return ticks;
}

/** The powers of ten, and 2 and 5 times these where they are few. */
function logTicks(low, high) {
  const found = [];
  const several = Math.log10(high / low) < 3 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    found.push(...several.map((each) => each * 10 ** power));
  }
  const within = found.filter((each) => each >= low * 0.999 && each <= high * 1.001);
  return within.length > 1 ? within : roundTicks(low, high, 4);
}

function tickText(value, all) {
  const distance = all.length > 1 ? Math.abs(all[1] - all[0]) : Math.abs(value) || 1;
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3))
    return value.toExponential(Math.abs(value / distance) >= 10 ? 2 : 0);
  return Number(value.toFixed(Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(distance)))))).toLocaleString("en", {
    maximumFractionDigits: 6,
  });
}

/** From what is measured to places in a drawing; null where nothing is. */
function scales(points, width, height, log) {
  const edge = { left: 58, right: width - 24, top: 10, bottom: height - 26 };
  const fits = ([, value]) => value !== null && (!log || value > 0);
  const shown = points.filter(fits);
  if (shown.length === 0) return null;
  let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [step, value] of shown) {
    [left, right] = [Math.min(left, step), Math.max(right, step)];
    [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  const range = { left, right: Math.max(right, left + 1), low, high };
  if (low === high) {
    range.low -= log ? low / 2 : Math.abs(low) / 10 || 1;
    range.high += log ? high : Math.abs(high) / 10 || 1;
  }
  const scaled = log ? Math.log10 : (value) => value;
  const down = (value) => (scaled(range.high) - scaled(value)) / (scaled(range.high) - scaled(range.low));
  const across = (step) => (step - range.left) / (range.right - range.left);
  return {
    ...range,
    edge,
    fits,
    hidden: points.filter(([, value]) => value !== null).length - shown.length,
    x: (step) => edge.left + across(step) * (edge.right - edge.left),
    y: (value) => edge.top + down(value) * (edge.bottom - edge.top),
    stepAt: (x) => range.left + ((x - edge.left) / (edge.right - edge.left)) * (range.right - range.left),
  };
}

function axes({ edge, left, right, low, high, x, y }, log, height) {
  const values = log ? logTicks(low, high) : roundTicks(low, high, 5);
  const steps = roundTicks(left, right, edge.right < 560 ? 4 : 8).filter(Number.isInteger);
  return [
    ...values.map((value) => draw("path", { class: "grid", d: `M${edge.left} ${y(value)}H${edge.right}` })),
    ...values.map((value) =>
      draw("text", { class: "end", x: edge.left - 8, y: y(value) + 4 }, tickText(value, values)),
    ),
    ...steps.map((step) => draw("text", { class: "middle", x: x(step), y: height - 6 }, count(step))),
  ];
}

/** A run's line, ended by its shape, and its shape hollow at each of its marks. */
function curve({ n, line, raw, marks }, { fits, x, y }) {
  const { colour, shape } = look(n);
  const group = draw("g", { class: colour });
  const at = ([step, value]) => `translate(${x(step)} ${y(value)})`;
  if (raw) group.append(draw("path", { class: "line faint", d: path(raw, x, y, fits) }));
  group.append(draw("path", { class: "line", d: path(line, x, y, fits) }));
  if (marks.length > 1) group.append(draw("path", { class: "line held-out", d: path(marks, x, y, fits) }));
  group.append(
    ...marks.filter(fits).map((point) => draw("path", { class: "mark hollow", d: shape, transform: at(point) })),
  );
  const last = line.findLast(fits);
  if (last) group.append(draw("path", { class: "mark", d: shape, transform: at(last) }));
  return group;
}

/** Draw curves into a box.
 *
 * Each of `curves` has `n` (which it was chosen as), `name`, `line` and, where that is smoothed, what it was `raw`, and `marks`:
 * lists of [step, value], where null is no number. `onStep` is called with the step that is pointed at.
 *
 * Gives the first and the last step, how many points are `hidden` and what shows a cursor; null where nothing is measured.
 */
export function plot(box, curves, { log, title, onStep }) {
  const width = Math.max(260, box.clientWidth);
  const height = width < 560 ? 240 : 340;
  const points = curves.flatMap(({ line, raw, marks }) => [...line, ...(raw ?? []), ...marks]);
  const scale = scales(points, width, height, log);
  if (scale === null) {
    box.replaceChildren(el("p", { className: "soft" }, "Nothing is measured yet."));
    return null;
  }
  const { left, right, low, high, hidden, edge, x } = scale;
  const names = curves.map(({ name }) => name).join(", ");
  const about = `${title} of ${names} from step ${count(left)} to ${count(right)}, between ${number(low)} and ${number(high)}.`;
  const cursor = draw("path", { class: "cursor" });
  const svg = draw(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", class: "plot" },
    draw("title", {}, `${about} The values stand in the tables below.`),
    ...axes(scale, log, height),
    ...curves.map((each) => curve(each, scale)),
    cursor,
  );
  svg.addEventListener("pointermove", (event) => {
    const { left: begin, width: shown } = svg.getBoundingClientRect();
    const step = scale.stepAt(((event.clientX - begin) / shown) * width);
    onStep(Math.round(Math.min(right, Math.max(left, step))));
  });
  box.replaceChildren(svg);
  const show = (step) => cursor.setAttribute("d", `M${x(step)} ${edge.top}V${edge.bottom}`);
  return { left, right, hidden, show };
}

/** A line through the points; it breaks off where there is no number. */
function path(points, x, y, fits) {
  let drawn = "";
  let pen = "M";
  for (const point of points) {
    if (!fits(point)) {
      pen = "M";
      continue;
    }
    drawn += `${pen}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
    pen = "L";
  }
  return drawn;
}
