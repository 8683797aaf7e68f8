"""The output folder while a run is under way: what it is, how it goes, and where it can go on from.

    instil.json      what the run was made of, and its state: running, finished, interrupted or failed
    run.yaml         its settings, as --config takes them
    metrics.jsonl    every step and evaluation, as they come
    checkpoints/     its newest states

The process that trains holds a lock on the folder: a run that says it is running and is not locked was killed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from instil.errors import Interrupted, TrainingError, UsageError
from instil.training.checkpoint import Checkpoint
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Resolved, Step
from instil.training.files import METRICS, RECORD, lock, write_json
from instil.training.metrics import to_line, write_metrics

SETTINGS, CHECKPOINTS = "run.yaml", "checkpoints"


class RunFolder:
    """Keeps the output folder up to date, as a watcher of the run; `with` holds the lock and writes down the end.

    Args:
        config: The run; `output` is its folder.
        record: What `instil.json` says of it, but for its state; what the run comes to is added.
    """

    def __init__(self, config: TrainConfig, record: Mapping[str, Any]) -> None:
        assert config.output is not None
        self.folder = Path(os.path.realpath(config.output))
        self._config = config
        self.record: dict[str, Any] = {**record, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        self._resume: Checkpoint | None = None
        self._lines: TextIO | None = None
        self._made = False
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {self.folder}: cannot be written: {error.strerror}", "Name another.") from error
        try:
            self._lock = lock(self.folder)
        except BlockingIOError as error:
            raise UsageError(
                f"--output {self.folder}: another process trains there", "Wait for it, or name a new folder."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            with contextlib.suppress(OSError):  # a full disk: what ended the run says so
                if error is not None:
                    stopped = not isinstance(error, Exception) or isinstance(error, Interrupted)
                    reason = str(error).split("\n")[0] or type(error).__name__
                    self._write("interrupted" if stopped else "failed", reason)
                self._lines.close()
        elif self._made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # nothing has begun
        if self._lock is not None:
            os.close(self._lock)

    def goes_on_from(self, checkpoint: Checkpoint) -> None:
        """The run was begun before: what was measured after the checkpoint is measured anew."""
        self._resume = checkpoint

    def started(self, resolved: Resolved) -> None:
        """Write down what the run is made of."""
        self.record["resolved"] = resolved.to_json()
        self._write("running", None)
        (self.folder / SETTINGS).write_text(self._config.to_yaml(), encoding="utf-8")
        steps, evaluations = (self._resume.steps, self._resume.evaluations) if self._resume else ((), ())
        write_metrics(self.folder / METRICS, steps, evaluations)
        self._lines = (self.folder / METRICS).open("a", encoding="utf-8", newline="\n")

    def stepped(self, step: Step) -> None:
        """Append a line."""
        self._append(step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append a line."""
        self._append(evaluation)

    def finish(self, record: Mapping[str, Any]) -> None:
        """The tuned model is there."""
        self.record.update(record)
        self._write("finished", None)

    def _append(self, event: Step | Evaluation) -> None:
        assert self._lines is not None
        try:
            self._lines.write(to_line(event))
            self._lines.flush()
        except OSError as error:
            raise TrainingError(
                f"{self.folder / METRICS}: cannot be written: {error.strerror}", "Make room and go on with --resume."
            ) from error

    def _write(self, state: str, reason: str | None) -> None:
        write_json(self.folder / RECORD, {**self.record, "state": state, "ended": reason})
