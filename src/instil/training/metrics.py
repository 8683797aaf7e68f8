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
    return GrowingMetrics().read(path)


class GrowingMetrics:
    """A `metrics.jsonl` that is read again and again: each time what was written to it since."""

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None  # which one was read
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._bytes = self._lines = 0
        self._steps: list[Step] = []
        self._evaluations: list[Evaluation] = []

    def read(self, path: str | Path) -> tuple[list[Step], list[Evaluation]]:
        """All that is in the file by now, as `read_metrics` gives it."""
        try:
            with Path(path).open("rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._bytes:  # written anew
                    self._file = found.st_dev, found.st_ino
                    self._begin_anew()
                file.seek(self._bytes)
                whole, end, _ = file.read().rpartition(b"\n")
            lines = whole.decode("utf-8").split("\n") if end else []
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{path}: metrics cannot be read: {reason}", "Name the metrics.jsonl of a run.") from error
        for line in lines:
            self._lines += 1
            event = _event(line)
            if event is None:
                self._file = None  # to begin anew
                raise UsageError(
                    f"{path}:{self._lines}: no step and no evaluation: {line[:80]}", "Mend or leave out the line."
                )
            if isinstance(event, Step):
                self._steps.append(event)
            else:
                self._evaluations.append(event)
        self._bytes += len(whole) + len(end)
        return list(self._steps), list(self._evaluations)


def _event(line: str) -> Step | Evaluation | None:
    """What a line tells of; None if that is no event."""
    values = _object(line)
    names = tuple(values or ())
    if values is None:
        return None
    if names[: len(_STEP)] == _STEP:
        return Step(**_numbers(values, _STEP))
    if names[: len(_EVALUATION)] == _EVALUATION:
        return Evaluation(**_numbers(values, _EVALUATION))
    if names[: len(_OF_THE_LOSS)] == _OF_THE_LOSS:
        return Evaluation(**_numbers(values, _OF_THE_LOSS))
    return None


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
