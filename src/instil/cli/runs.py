"""`instil runs`: what was trained here, what is being trained, and how one run went."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from instil.cli.curve import draw
from instil.training.events import best_of, lately
from instil.training.files import plain
from instil.training.runs import Run, find_runs, read_run

AsJson = Annotated[bool, Parameter(name="--json", negative=())]

_COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow"}  # all else: red
_CURVE = 80  # columns at most

runs = App(name="runs")


@runs.default
def list_runs(directory: Path = Path("."), /, *, as_json: AsJson = False) -> None:
    """List the runs below a folder, or show one of them: instil runs show RUN.

    Args:
        directory: Where to look.
        as_json: Print a JSON array with an object for each run.
    """
    found = find_runs(directory)
    if as_json:
        _write([{"run": run.name, **run.summary()} for run in found])
        return
    console = _console()
    if not found:
        console.print(Text(f"{directory}: there are no runs below it (no folder with an instil.json)"), soft_wrap=True)
        return
    table = Table("Run", Column("State", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("Step", "Loss", "Held out"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Data")
    table.add_column("Time", justify="right", no_wrap=True)
    for run in found:
        table.add_row(
            Text(run.name, overflow="fold"),
            _state(run.state),
            _steps(run),
            _number(run.loss),
            _number(run.best.eval_loss if run.best else None),
            Text(_data(run), overflow="fold"),
            _time(run.seconds),
        )
    console.print(table)
    for run in found:
        if run.state == "unreadable":
            console.print(Text(f"{run.name}: {run.reason}", "red"), soft_wrap=True)
    console.print("Show one with: instil runs show RUN")


@runs.command
def show(run: Path, /, *, as_json: AsJson = False) -> None:
    """Show one run: how it stands, its loss, the settings that are not the default, the versions.

    Args:
        run: Its folder.
        as_json: Print all of it as a JSON object.
    """
    found = read_run(run)
    if as_json:
        facts = {"run": found.name, **found.summary(), "changed": found.changed()}
        _write({**facts, "record": found.record, **_series(found)})
        return
    console = _console()
    console.print(Text(found.name, "bold"), _state(found.state))
    _print_grid(console, _facts(found))
    _print_curve(console, found)
    _print_section(console, "Settings that are not the default", found.changed())
    _print_section(console, "Resolved", found.record.get("resolved") or {})
    _print_section(console, "Versions", found.record.get("versions") or {})


def _facts(run: Run) -> dict[str, str]:
    """How a run stands, by what is known of it."""
    record, best = run.record, run.best
    outcome = record.get("outcome") or {}
    weights = outcome.get("best_step")
    kept = run.step if weights is None else weights
    facts = {
        "ended": run.reason,
        "began": f"{run.started.astimezone():%Y-%m-%d %H:%M:%S %Z}" if run.started else None,
        "time": _time(run.seconds),
        "step": _steps(run),
        "loss": f"{_number(run.history[0].loss)} to {_number(run.loss)}" if run.history else None,
        "held-out loss": (
            f"{_number(run.evaluations[0].eval_loss)} to {_number(run.evaluations[-1].eval_loss)}, "
            f"at best {_number(best.eval_loss)} after step {best.step:,}"
            if best
            else None
        ),
        **_metric(run),
        **_measures(run),
        "weights": f"those of step {kept:,}" if outcome else None,
        "stopped early": "yes" if outcome.get("stopped_early") else None,
        "base model": record.get("base_model"),
        "data": ", ".join(run.data),
        "notes": "; ".join(record.get("notes") or []),
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _metric(run: Run) -> dict[str, str]:
    """How the metric stands that decides which weights are the best, where it is not the loss."""
    first, best = next(iter(run.evaluations), None), best_of(run.evaluations)
    if first is None or first.metric is None:
        return {}
    said = f"{_number(first.value)} to {_number(run.evaluations[-1].value)}"
    said += f", at best {_number(best.value)} after step {best.step:,}" if best else ""
    return {f"held-out {first.metric}": said}


def _measures(run: Run) -> dict[str, str]:
    """What the objective measures beside its loss: over the last steps, and on held-out rows."""
    held_out = run.evaluations[-1].measures if run.evaluations else {}
    several = {"over the last steps": lately(run.history), "held out": held_out}
    return {
        when: ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in measures.items())
        for when, measures in several.items()
        if measures
    }


def _series(run: Run) -> dict[str, Any]:
    return {
        "losses": [[each.step, each.loss] for each in run.history],
        "eval_losses": [[each.step, each.eval_loss] for each in run.evaluations],
        "eval_metrics": [[each.step, each.metric, each.value] for each in run.evaluations if each.metric],
        "measures": [[each.step, each.measures] for each in run.history if each.measures],
        "eval_measures": [[each.step, each.measures] for each in run.evaluations if each.measures],
    }


def _print_curve(console: Console, run: Run) -> None:
    line = [(float(each.step), each.loss) for each in run.history]
    marks = [(float(each.step), each.eval_loss) for each in run.evaluations]
    drawn = draw(line, marks, width=min(console.width, _CURVE))
    if drawn:
        unit = "nats" if any(each.measures for each in run.history) else "nats a token"
        legend = f"Loss in {unit}, by step" + (": the line is the training's, o held out" if marks else "")
        console.print(Text(f"\n{legend}", "bold"), soft_wrap=True)
        console.print(Text("\n".join(drawn)), soft_wrap=True)


def _print_section(console: Console, title: str, values: Mapping[str, Any]) -> None:
    if values:
        console.print(Text(f"\n{title}", "bold"))
        _print_grid(console, {name: _shown(value) for name, value in values.items()})


def _print_grid(console: Console, values: Mapping[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(Text(f"  {name}"), Text(value, overflow="fold"))
    console.print(grid)


def _console() -> Console:
    """The terminal; where there is none, no line is broken, for other programs read them."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def _state(state: str) -> Text:
    return Text(state, _COLOURS.get(state, "red"))


def _steps(run: Run) -> str:
    return f"{run.step:,}" + (f"/{run.steps:,}" if run.steps is not None else "") if run.record else ""


def _data(run: Run) -> str:
    names = [Path(each).name or each for each in run.data]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "no number"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
