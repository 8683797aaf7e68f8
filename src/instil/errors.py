"""Every error a user can meet. Each says the value, where it stands, why it cannot be, and the remedy.

InstilError             anything below; the command prints it without a traceback and exits with 2
├── UsageError          a flag, a configuration key or an argument
├── DataError           rows that cannot be read or used; carries all of them
├── TokenizerError      a tokenizer that cannot be loaded or lacks what is needed
├── TemplateError       a chat template, or a conversation it does not fit
├── PackingError        rows that fit no batch
├── ModelError          a model or an adapter that cannot be loaded, tuned or saved
├── TrainingError       a run that cannot be started or carried on
└── Interrupted         a run that was asked to stop, and has saved its state
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class InstilError(Exception):
    """An error with its remedy.

    Args:
        message: What is wrong: the value, its place and the cause.
        remedy: What the user can do about it, as a sentence.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class UsageError(InstilError):
    """A flag, a configuration key or an argument that cannot be."""


class TokenizerError(InstilError):
    """A tokenizer that cannot be loaded or lacks what is needed."""


class TemplateError(InstilError):
    """A chat template that cannot be used, or a conversation that it does not fit."""


class PackingError(InstilError):
    """Rows that fit no batch."""


class ModelError(InstilError):
    """A model or an adapter that cannot be loaded, tuned or saved."""


class TrainingError(InstilError):
    """A run that cannot be started or carried on."""


class Interrupted(InstilError):  # noqa: N818 (no mistake, as KeyboardInterrupt is none)
    """A run that was asked to stop, and has saved its state.

    Args:
        step: The last step it took.
        signal: The number of the signal that asked; 0 where another process was asked.
        saved: The checkpoint that holds its state; None if none are written.
    """

    def __init__(self, step: int, signal: int, saved: Path | None) -> None:
        kept = f"its state is in {saved}" if saved else "its state is not kept (--keep-checkpoints 0)"
        super().__init__(f"stopped after step {step:,}: {kept}", "Go on with --resume." if saved else "")
        self.exit_code = 128 + (signal or 15)


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One thing wrong with one row.

    Args:
        source: Where the row stands, as `file:line`.
        field: The field at fault (`messages[2].role`), or "" for the row as a whole.
        reason: Why it cannot be, with the value.
        remedy: What to do about it.
    """

    source: str
    field: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.source}: {self.field}: " if self.field else f"{self.source}: "
        return place + self.reason + (f" ({self.remedy})" if self.remedy else "")


class DataError(InstilError):
    """Data that cannot be read or used. `problems` holds every bad row, not the first."""

    shown = 100

    def __init__(self, message: str, remedy: str = "", problems: Sequence[RowProblem] = ()) -> None:
        super().__init__(message, remedy)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems[: self.shown])]
        if len(self.problems) > self.shown:
            lines.append(f"  ... and {len(self.problems) - self.shown:,} more")
        if self.remedy:
            lines.append(f"  {self.remedy}")
        return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a mistyped name: the nearest right one, or the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
