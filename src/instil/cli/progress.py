"""A run as it goes, on standard error: what was resolved, then a bar in a terminal and lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from instil.training.events import Evaluation, Resolved, Step, chosen_fell

_GIB = 1 << 30


class Progress:
    """A watcher that shows a run. `with` ends the bar, however the run ends.

    Args:
        console: Where to show it; standard error if None.
        seconds: Time between two lines where there is no terminal.
        settings: Whether to show what was resolved first.
    """

    def __init__(self, console: Console | None = None, seconds: float = 10.0, *, settings: bool = True) -> None:
        self._settings = settings
        self._console = console or Console(stderr=True, highlight=False)
        self._seconds = seconds
        self._steps = 0
        self._said_at = 0.0
        self._prepared_at = time.monotonic()
        self._evaluation: Evaluation | None = None
        self._bar: Live | None = None
        self._history: list[Step] = []
        self._warned = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._heard():
            if self._bar is not None:
                self._bar.stop()

    def preparing(self, what: str, done: int, of: int) -> None:
        """Say how far it is, if the last line is some time ago."""
        now = time.monotonic()
        if now - self._prepared_at >= self._seconds:
            self._prepared_at = now
            with self._heard():
                self._print(f"{what}: {done:,} of {of:,} batches")

    def started(self, resolved: Resolved) -> None:
        """Show what was resolved; begin the bar."""
        with self._heard():
            self._start(resolved)

    def stepped(self, step: Step) -> None:
        """Move the bar on, or say a line if the last one is some time ago."""
        with self._heard():
            self._step(step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Say the loss on held-out rows, and the metric."""
        self._evaluation = evaluation
        best = ", the best so far" if evaluation.best else ""
        with self._heard():
            self._print(f"step {evaluation.step:,}: held-out loss {_measured(evaluation)}{best}")

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Fall silent where no one hears any more: a run is worth more than what is said of it."""
        try:
            yield
        except (OSError, SystemExit):  # the latter is rich's answer to a broken pipe
            self._console = Console(quiet=True)
            self._bar = None

    def _start(self, resolved: Resolved) -> None:
        if self._settings:
            show_resolved(resolved, self._console)
        self._steps = resolved.steps
        if self._console.is_terminal:
            self._bar = Live(self._drawn(0, ""), console=self._console)
            self._bar.start()

    def _step(self, step: Step) -> None:
        self._history.append(step)
        if not self._warned and (fell := chosen_fell(self._history)):
            self._warned = True
            self._print(f"note: step {step.step:,}: {fell}")
        left = f"{timedelta(seconds=round(step.seconds / step.step * max(0, self._steps - step.step)))} left"
        if self._bar is not None:
            self._bar.update(self._drawn(step.step, left, self._said(step)))
            if step.step == self._steps:
                self._bar.stop()  # what is written next may show a bar of its own
        elif step.step in (1, self._steps) or step.seconds - self._said_at >= self._seconds:
            self._said_at = step.seconds
            self._print(f"step {step.step:,}/{self._steps:,}  {self._said(step)}  {left}")

    def _said(self, step: Step) -> str:
        trained = step.tokens_per_second * step.trained_tokens / max(1, step.tokens)
        parts = [
            f"loss {step.loss:.4f}",
            compared(step.measures),
            f"held out {_measured(self._evaluation)}" if self._evaluation is not None else "",
            f"lr {step.learning_rate:.2e}",
            f"{step.tokens_per_second:,.0f} tokens/s, {trained:,.0f} trained",
            _memory(),
        ]
        return "  ".join(part for part in parts if part)

    def _drawn(self, step: int, left: str, said: str = "") -> Group:
        """The bar with a line of figures below, so that a narrow terminal holds both."""
        row = Table.grid(padding=(0, 1))
        row.add_row(f"{step:,}/{self._steps:,}", ProgressBar(self._steps, step, width=30), left)
        return Group(row, Text(said))

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def show_resolved(resolved: Resolved, console: Console) -> None:
    """Print what a run does as a table of names and values."""
    values = resolved.to_json()
    width = max(map(len, values))
    for name, value in values.items():
        line = Text(name.replace("_", " ").ljust(width), "bold").append(f"  {_shown(value)}", "default")
        console.print(line, soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _measured(evaluation: Evaluation) -> str:
    """The loss, and what else is measured."""
    metric = "" if evaluation.value is None else f"{evaluation.metric} {evaluation.value:.4f}"
    return ", ".join(filter(None, [f"{evaluation.eval_loss:.4f}", metric, compared(evaluation.measures)]))


def compared(measures: Mapping[str, float]) -> str:
    """How answers that are compared stand; "" where none are, and no margin where all are good or all bad."""
    accuracy, margin = (measures.get(name, math.nan) for name in ("reward_accuracy", "reward_margin"))
    said = [
        "" if math.isnan(accuracy) else f"accuracy {accuracy:.1%}",
        "" if math.isnan(margin) else f"margin {margin:.4f}",
    ]
    return ", ".join(filter(None, said))


def _memory() -> str:
    """The most memory that the process has held, and the accelerator; "" where the system does not say."""
    said = []
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said.append(f"{peak * (1 if sys.platform == 'darwin' else 1024) / _GIB:.1f} GiB")
    torch: Any = sys.modules.get("torch")  # whoever trains has loaded it; it is not loaded to look
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        said.append(f"{torch.cuda.max_memory_allocated() / _GIB:.1f} GiB on the GPU")
    return ", ".join(said)
