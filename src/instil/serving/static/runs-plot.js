// One plot of several curves, as a drawing of the page: axes, lines, marks, and a cursor at a step.

import { count, draw, number } from "./runs-dom.js";

const COLOURS = 6; // as many as runs.css has
const SHAPES = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-4 -4h8v8h-8z", "M0 -5l5 9h-10z", "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z", "M0 5l5 -9h-10z", "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z"];

/** The classes of the colour of the run that was chosen as the n-th, and its shape: no two of the first 36 have both. */
const look = (n) => ({ colour: `colour-${n % COLOURS}`, shape: SHAPES[(n + Math.floor(n / COLOURS)) % SHAPES.length] });

/** What stands for a run beside its name. */
export function mark(n) {
  const { colour, shape } = look(n);
  return draw("svg", { viewBox: "-9 -7 18 14", class: `key ${colour}`, "aria-hidden": "true" }, draw("path", { class: "line", d: "M-9 0h18" }), draw("path", { class: "mark", d: shape }));
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
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(Math.abs(value / distance) >= 10 ? 2 : 0);
  return Number(value.toFixed(Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(distance)))))).toLocaleString("en", { maximumFractionDigits: 6 });
}

/** Draw curves into a box.
 *
 * Each of `curves` has `n` (which it was chosen as), `name`, `line` and, where that is smoothed, what it was `raw`, and `marks`:
 * lists of [step, value], where null is no number. `onStep` is called with the step that is pointed at.
 */
export function plot(box, curves, { log, title, onStep }) {
  const width = Math.max(260, box.clientWidth);
  const height = width < 560 ? 240 : 340;
  const edge = { left: 58, right: 24, top: 10, bottom: 26 };
  const fits = ([, value]) => value !== null && (!log || value > 0);
  const points = curves.flatMap((curve) => [...curve.line, ...(curve.raw ?? []), ...curve.marks]);
  const shown = points.filter(fits);
  box.replaceChildren();
  if (shown.length === 0) {
    const none = document.createElement("p");
    none.className = "soft";
    none.textContent = "Nothing is measured yet.";
    box.append(none);
    return null;
  }
  let left = Infinity, right = -Infinity, low = Infinity, high = -Infinity;
  for (const [step, value] of shown) {
    left = Math.min(left, step);
    right = Math.max(right, step);
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) {
    low -= log ? low / 2 : Math.abs(low) / 10 || 1;
    high += log ? high : Math.abs(high) / 10 || 1;
  }
  if (left === right) right = left + 1;
  const scaled = log ? Math.log10 : (value) => value;
  const x = (step) => edge.left + ((step - left) / (right - left)) * (width - edge.left - edge.right);
  const y = (value) => edge.top + ((scaled(high) - scaled(value)) / (scaled(high) - scaled(low))) * (height - edge.top - edge.bottom);

  const markAt = ([step, value], name, shape) => draw("path", { class: name, d: shape, transform: `translate(${x(step)} ${y(value)})` });

  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "plot" });
  svg.append(draw("title", {}, `${title} of ${curves.map((curve) => curve.name).join(", ")} from step ${count(left)} to ${count(right)}, between ${number(low)} and ${number(high)}. The values stand in the table below.`));
  const ticks = log ? logTicks(low, high) : roundTicks(low, high, 5);
  for (const value of ticks) {
    svg.append(draw("path", { class: "grid", d: `M${edge.left} ${y(value)}H${width - edge.right}` }), draw("text", { x: edge.left - 8, y: y(value) + 4, class: "end" }, tickText(value, ticks)));
  }
  for (const step of roundTicks(left, right, width < 560 ? 4 : 8).filter(Number.isInteger)) {
    svg.append(draw("text", { x: x(step), y: height - 6, class: "middle" }, count(step)));
  }
  for (const { n, line, raw, marks } of curves) {
    const { colour, shape } = look(n);
    const group = draw("g", { class: colour });
    if (raw) group.append(draw("path", { class: "line faint", d: path(raw, x, y, fits) }));
    group.append(draw("path", { class: "line", d: path(line, x, y, fits) }));
    if (marks.length > 1) group.append(draw("path", { class: "line held-out", d: path(marks, x, y, fits) }));
    for (const point of marks.filter(fits)) group.append(markAt(point, "mark hollow", shape));
    const last = line.findLast(fits);
    if (last) group.append(markAt(last, "mark", shape));
    svg.append(group);
  }
  const cursor = draw("path", { class: "cursor" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const across = ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * width;
    const step = left + ((across - edge.left) / (width - edge.left - edge.right)) * (right - left);
    onStep(Math.round(Math.min(right, Math.max(left, step))));
  });
  box.append(svg);
  return {
    left,
    right,
    hidden: points.filter(([, value]) => value !== null).length - shown.length,
    show: (step) => cursor.setAttribute("d", `M${x(step)} ${edge.top}V${height - edge.bottom}`),
  };
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
