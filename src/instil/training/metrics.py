"""The file of a run's measurements: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from instil.errors import UsageError
from instil.training.events import Evaluation, Step

_STEP = tuple(field.name for field in fields(Step) if field.name != "measures")
_EVALUATION = tuple(field.name for field in fields(Evaluation) if field.name != "measures")
_OF_THE_LOSS = tuple(name for name in _EVALUATION if name not in ("metric", "value"))
_HELD_OUT = "eval_"
"""What the name of a measure begins with where it was taken on held-out rows."""


def measured(event: Step | Evaluation) -> dict[str, float]:
    """What the objective measures beside its loss, by the names it has in the file."""
    held_out = _HELD_OUT if isinstance(event, Evaluation) else ""
    return {f"{held_out}{name}": value for name, value in event.measures.items()}


def to_line(event: Step | Evaluation) -> str:
    """One event as a line of strict JSON."""
    values = asdict(event)
    del values["measures"]
    if isinstance(event, Evaluation) and event.metric is None:
        values = {name: values[name] for name in _OF_THE_LOSS}
    return json.dumps({name: _finite(value) for name, value in (values | measured(event)).items()}) + "\n"


def write_metrics(path: Path, steps: Iterable[Step], evaluations: Iterable[Evaluation]) -> None:
    """Write a whole run at once, each evaluation behind the step it was measured after."""
    events: list[Step | Evaluation] = [*steps, *evaluations]
    events.sort(key=lambda event: (event.step, isinstance(event, Evaluation)))
    draft = path.with_name(f".{path.name}")
    draft.write_text("".join(map(to_line, events)), encoding="utf-8", newline="\n")
    os.replace(draft, path)


def read_metrics(path: str | Path) -> tuple[list[Step], list[Evaluation]]:
    """The steps and the evaluations of a `metrics.jsonl`; what was no finite number comes back as NaN.

    A last line that breaks off, as a killed run may leave it, is left out.

    Raises:
        UsageError: The file cannot be read, or a line is none of a run's.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: metrics cannot be read: {reason}", "Name the metrics.jsonl of a run.") from error
    steps: list[Step] = []
    evaluations: list[Evaluation] = []
    for number, line in enumerate(lines[:-1], 1):
        values = _object(line)
        names = tuple(values or ())
        if values is not None and names[: len(_STEP)] == _STEP:
            steps.append(Step(**_numbers(values, _STEP)))
        elif values is not None and names[: len(_EVALUATION)] == _EVALUATION:
            evaluations.append(Evaluation(**_numbers(values, _EVALUATION)))
        elif values is not None and names[: len(_OF_THE_LOSS)] == _OF_THE_LOSS:
            evaluations.append(Evaluation(**_numbers(values, _OF_THE_LOSS)))
        else:
            raise UsageError(f"{path}:{number}: no step and no evaluation: {line[:80]}", "Mend or leave out the line.")
    return steps, evaluations


def _object(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _numbers(values: dict[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """The fields of an event; what it has no field for was measured."""
    found = {name: math.nan if value is None else value for name, value in values.items()}
    measures = {name.removeprefix(_HELD_OUT): found.pop(name) for name in values if name not in own}
    return {**found, "measures": measures}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
