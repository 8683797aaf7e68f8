// The list of the runs: a row each, kept in place while what it says changes, so that nothing loses the focus.

import { byId, el } from "./dom.js";
import { count, lastPart, number, time } from "./runs-dom.js";

const rows = new Map(); // by id

/** Show the runs, the one that began last on top.
 *
 * `marks` gives the drawing that stands for a chosen run, or null; `choose` is called with an id and whether it is chosen.
 */
export function showList(runs, chosen, marks, choose) {
  byId("list").hidden = runs.length === 0;
  byId("none").hidden = runs.length > 0;
  byId("filter-part").hidden = runs.length < 8;
  const body = byId("list").tBodies[0];
  const ids = new Set(runs.map((run) => run.id));
  for (const [id, row] of rows) {
    if (!ids.has(id)) {
      row.remove();
      rows.delete(id);
    }
  }
  [...runs].reverse().forEach((run, at) => {
    const row = rows.get(run.id) ?? newRow(run, choose);
    rows.set(run.id, row);
    update(row, run, chosen.has(run.id), marks(run.id));
    if (body.rows[at] !== row) body.insertBefore(row, body.rows[at] ?? null);
  });
  filter();
}

/** Show the reports that belong to no run. */
export function showEvaluations(evaluations) {
  byId("evaluations").hidden = evaluations.length === 0;
  byId("evaluations")
    .querySelector("ul")
    .replaceChildren(
      ...evaluations.flatMap(({ name, reports }) =>
        reports.map((report) => el("li", {}, link(report, `${name}/${report.name}`))),
      ),
    );
}

/** Leave those in the list whose name or data holds what is looked for. */
export function filter() {
  const wanted = byId("filter").value.toLowerCase();
  for (const row of rows.values()) row.hidden = !row.dataset.text.includes(wanted);
}

function newRow(run, choose) {
  const box = el("input", { type: "checkbox" });
  box.addEventListener("change", () => choose(run.id, box.checked));
  const name = el("th", { scope: "row" }, el("label", {}, box, el("span", { className: "mark" }), run.name));
  return el(
    "tr",
    {},
    name,
    ["", "number", "number", "number", "", "", "number", ""].map((className) => el("td", { className })),
  );
}

function update(row, run, isChosen, mark) {
  const text = JSON.stringify([run, isChosen]);
  if (row.dataset.told === text) return;
  row.dataset.told = text;
  row.dataset.text = `${run.name} ${run.data.join(" ")}`.toLowerCase();
  const [name, state, step, loss, heldOut, data, began, took, reports] = row.cells;
  name.querySelector("input").checked = isChosen;
  name.querySelector(".mark").replaceChildren(...(mark ? [mark] : []));
  state.replaceChildren(
    el("span", { className: `state ${run.state}` }, run.state),
    ...(run.reason ? [el("p", { className: "soft" }, run.reason)] : []),
  );
  const unreadable = run.state === "unreadable";
  const total = run.steps === null ? [] : [el("span", { className: "total" }, ` / ${count(run.steps)}`)];
  step.replaceChildren(...(unreadable ? [] : [count(run.step), ...total]));
  if (run.state === "running" && run.steps) {
    step.append(el("progress", { value: run.step, max: run.steps, "aria-label": `Steps of ${run.name}` }));
  }
  loss.textContent = run.step === 0 ? "" : number(run.loss);
  heldOut.textContent = run.best_eval_loss === null ? "" : number(run.best_eval_loss);
  data.textContent =
    run.data.slice(0, 2).map(lastPart).join(", ") + (run.data.length > 2 ? ` and ${run.data.length - 2} more` : "");
  began.textContent =
    run.started === null ? "" : new Date(run.started).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  took.textContent = time(run.seconds);
  reports.replaceChildren(
    ...run.reports.flatMap((report, i) => [...(i ? [", "] : []), link(report, shortName(report.name), run.name)]),
  );
}

const shortName = (name) => name.replace(/\/?report\.html$/, "") || "report";

function link(report, text, of) {
  const found = el("a", { href: report.href, target: "_blank", rel: "noopener noreferrer" }, text);
  if (of) found.setAttribute("aria-label", `${text} of ${of}`);
  return found;
}
