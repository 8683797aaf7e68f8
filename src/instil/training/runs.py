"""Runs as their folders tell of them: found, read and never changed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from instil.errors import UsageError, nearest
from instil.training.events import Evaluation, Step
from instil.training.files import METRICS, RECORD, lock, plain
from instil.training.metrics import read_metrics

_STATES = ("running", "finished", "interrupted", "failed")
_SHOWN_ABOVE = ("data", "output")
_LIST = "List those there are with: instil runs DIR"


@dataclass(frozen=True, slots=True)
class Run:
    """A run, as far as it has come.

    Args:
        name: Its folder, as it was named or as it was found below the one named.
        state: running, finished, interrupted, failed; killed, if it says running and no process trains there; or
            unreadable.
        reason: Why it ended before its time, or why it cannot be read; None otherwise.
        started: When it was begun or resumed; None where an older record does not say.
        steps: The optimizer steps that it is to take; None if that is not known.
        data: The files and data sets that it trains on.
        history: Every step so far.
        evaluations: Every evaluation so far.
        record: All of `instil.json`.
    """

    name: str
    state: str
    reason: str | None = None
    started: datetime | None = None
    steps: int | None = None
    data: Sequence[str] = ()
    history: Sequence[Step] = ()
    evaluations: Sequence[Evaluation] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step taken; 0 before the first."""
        return self.history[-1].step if self.history else 0

    @property
    def loss(self) -> float | None:
        """The loss of the last step, in nats a token."""
        return self.history[-1].loss if self.history else None

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the lowest loss."""
        measured = [each for each in self.evaluations if math.isfinite(each.eval_loss)]
        return min(measured, key=lambda each: each.eval_loss, default=None)

    @property
    def seconds(self) -> float | None:
        """Of training so far, evaluations included."""
        ends = [each.seconds for each in self.history[-1:]] + [each.seconds for each in self.evaluations[-1:]]
        return max(ends, default=None)

    def summary(self) -> dict[str, Any]:
        """How it stands, as plain values, less its name."""
        return {
            "state": self.state,
            "reason": self.reason,
            "started": self.started.isoformat() if self.started else None,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "best_eval_loss": self.best.eval_loss if self.best else None,
            "data": list(self.data),
            "seconds": self.seconds,
        }

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults of this version, less those that are shown by themselves."""
        from instil.training.config import TrainConfig

        fields = TrainConfig.model_fields.items()
        defaults = {name: plain(each.get_default(call_default_factory=True)) for name, each in fields}
        chosen: Mapping[str, Any] = self.record["config"]
        return {
            name: value
            for name, value in chosen.items()
            if name not in _SHOWN_ABOVE and value != defaults.get(name) and value is not None
        }


def find_runs(directory: str | Path = ".") -> list[Run]:
    """The runs in a folder and below it, in the order in which they were begun; hidden folders are passed over.

    Raises:
        UsageError: It is no folder.
    """
    if not Path(directory).is_dir():
        raise UsageError(f"{directory}: is no folder", "Name one that holds runs.")
    found = [_read_if_possible(place) for place, files in walk(directory) if RECORD in files]
    return sorted(found, key=in_order)


def walk(directory: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each with the names of its files: none that is hidden, none that a run holds."""
    for place, folders, files in os.walk(directory):
        yield Path(place), files
        folders[:] = [] if RECORD in files else [name for name in folders if not name.startswith(".")]


def in_order(run: Run) -> tuple[datetime, str]:
    """What runs are sorted by: when they were begun."""
    return run.started or datetime.min.replace(tzinfo=UTC), run.name


def _read_if_possible(folder: Path) -> Run:
    try:
        return read_run(folder)
    except UsageError as error:
        return Run(str(folder), "unreadable", error.message.removeprefix(f"{folder}: "))


def read_run(folder: str | Path, read: Callable[[Path], tuple[list[Step], list[Evaluation]]] = read_metrics) -> Run:
    """The run of a folder.

    Args:
        folder: Where it is.
        read: Reads its metrics.

    Raises:
        UsageError: There is none, or its files cannot be read.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: holds no run (there is no {RECORD})", _near(folder)) from error
    except OSError as error:
        raise UsageError(f"{folder}: {RECORD} cannot be read: {error.strerror or error}", _LIST) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{folder}: {RECORD} is no JSON: {error}", _LIST) from error
    if not isinstance(record, dict):
        raise UsageError(f"{folder}: {RECORD} is no record of a run: it holds no object", _LIST)
    try:
        state, started = record.get("state", "finished"), record.get("started")
        if state not in _STATES:
            raise UsageError(f"{folder}: {RECORD}: state {state!r} is none that is known", "Is Instil up to date?")
        metrics = folder / METRICS
        history, evaluations = read(metrics) if metrics.exists() else ([], [])
        return Run(
            name=str(folder),
            state="killed" if state == "running" and is_free(folder) else state,
            reason=record.get("ended"),
            started=_time(started) if started is not None else None,
            steps=record["resolved"]["steps"] if record.get("resolved") else None,
            data=[str(each) for each in record["config"]["data"]],
            history=history,
            evaluations=evaluations,
            record=record,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder}: {RECORD} is no record of a run: {_fault(error)}", _LIST) from error


def is_free(folder: Path) -> bool:
    """Whether no process trains there: the one that does holds a lock on the folder."""
    with contextlib.suppress(OSError):  # it is held, or may not be looked at
        number = lock(folder, shared=True)
        if number is not None:  # else there are no locks, and the record is believed
            os.close(number)
            return True
    return False


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _near(folder: Path) -> str:
    """The run of the nearest name beside where one was looked for."""
    beside = folder.parent
    try:
        names = [str(each.parent) for each in beside.glob(f"*/{RECORD}")]
    except OSError:
        names = []
    return nearest(str(folder), names) if names else _LIST


def _fault(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
