"""Ctrl-C and SIGTERM while a run trains: the first asks it to save and to stop, the next ends it at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from instil.training.events import Evaluation, Resolved, Step

_APART = 1.0  # seconds: torchrun passes on what the terminal has sent already, so two at once are one


class Stopping:
    """Takes the signals from a run's first step to its end, as its watcher; `asked` says the number of the first."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._number = 0
        self._at = 0.0

    def asked(self) -> int:
        """The number of the signal that asked to stop; 0 as long as none did."""
        return self._number

    def __enter__(self) -> Stopping:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.getsignal(number)
        return self

    def started(self, resolved: Resolved) -> None:
        """Take the signals from now on: before, there is nothing to save."""
        for number in self._before:
            signal.signal(number, self._heed)

    def stepped(self, step: Step) -> None:
        """Nothing to do."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and now - self._at < _APART:
            return
        if self._number:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        self._number, self._at = number, now
        with contextlib.suppress(OSError, RuntimeError):  # the latter where it is written to just now
            sys.stderr.write("instil: finishing the step and saving; once more ends it at once\n")
