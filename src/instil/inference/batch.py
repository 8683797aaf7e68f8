"""Answers that are generated together: they come and go between the steps of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from instil.inference.options import Sampling
from instil.inference.reading import Reader
from instil.inference.sampling import Drawn, Sampler, Told
from instil.inference.text import TextStream

Ended = Literal["stop", "stop-string", "length", "context"]

_PROMPT_TOKENS = 2048
"""Prompt tokens read in one go: enough to keep the processor busy, few enough to stay in its caches."""


@dataclass(eq=False, slots=True)
class Job:
    """An answer on its way.

    Args:
        ids: The prompt.
        sampling: How tokens are drawn, and when the answer ends.
        limit: Most tokens; 0 to read the prompt alone.
        full: Why it ends when it has them.
        stop_ids: The tokens that end it.
        stream: Its text.
        draws: A number in [0, 1) for each token.
        prompt: The number of the prompt.
        answer: The number of the answer.
        hear: Told of the text that is new, after each token, and when it has ended.
        top: How many of the likeliest tokens to tell of beside each one that is drawn.
        told_top: The same for the tokens of the prompt; None to tell nothing of them.
    """

    ids: Sequence[int]
    sampling: Sampling
    limit: int
    full: Ended
    stop_ids: Collection[int]
    stream: TextStream
    draws: Iterator[float]
    prompt: int = 0
    answer: int = 0
    hear: Hear | None = None
    top: int = 0
    told_top: int | None = None
    drawn: list[Drawn] = field(default_factory=list)
    """The tokens so far, the stop token included."""
    told: Told | None = None
    """Of the prompt, once it was read, if that was asked for."""
    reused: int = 0
    """Tokens of the prompt that were not read anew, for an earlier answer began alike."""
    ended: Ended | None = None
    """Why it has ended; None as long as it goes on."""

    @property
    def said(self) -> list[int]:
        """The tokens so far, without the stop token."""
        return [each.id for each in (self.drawn[:-1] if self.ended == "stop" else self.drawn)]

    def take(self, token: Drawn) -> None:
        """Add a token, which may end the answer."""
        self.drawn.append(token)
        piece = ""
        if token.id in self.stop_ids:
            self.ended = "stop"
        else:
            piece = self.stream.push(token.id)
            if self.stream.stopped:
                self.ended = "stop-string"
            elif len(self.drawn) == self.limit:
                self.ended = self.full
        self._tell(piece)

    def end_unsaid(self) -> None:
        """End with the prompt read, and no token asked for."""
        self.ended = self.full
        self._tell("")

    def _tell(self, piece: str) -> None:
        if self.ended is not None:
            piece += self.stream.finish()
            if self.stream.stopped:
                self.ended = "stop-string"
        if self.hear is not None:
            self.hear(self, piece)


Hear = Callable[[Job, str], object]


class Model(Protocol):
    """What a batch asks of an engine."""

    @property
    def fitting(self) -> int:
        """The tokens whose keys and values fit into the memory for them."""

    def alone(self, job: Job) -> bool:
        """Whether an answer must be read by itself."""

    def reader(self, rows: int, kept: int) -> Reader:
        """Reads answers side by side."""

    def reader_alone(self) -> Reader:
        """Reads one answer at a time."""

    attention: str

    def attend(self, side_by_side: bool) -> None:
        """Set the model's attention for answers side by side, or alone."""


class Batch:
    """Answers of one model that are being generated.

    Args:
        model: What generates.
        rows: Most answers at once.
        kept: Tokens of earlier answers and their prompts that are kept, for prompts that begin alike.
        models: How many of them share the memory, each in a batch of its own.
    """

    def __init__(self, model: Model, rows: int, kept: int, models: int = 1) -> None:
        self._model = model
        self._before = model.attention
        self._fitting = model.fitting // models - kept
        self._open: dict[bool, Callable[[], Reader]] = {
            False: lambda: model.reader(rows, kept),
            True: model.reader_alone,
        }
        self._lanes: dict[bool, _Lane] = {}  # side by side, and alone

    @property
    def busy(self) -> bool:
        """Whether there is an answer to go on with."""
        return any(lane.busy for lane in self._lanes.values())

    @property
    def active(self) -> int:
        """The answers that are being generated."""
        return sum(len(lane.active) for lane in tuple(self._lanes.values()))  # asked for by other threads

    def add(self, jobs: Iterable[Job]) -> None:
        """Answers to generate; they come in, in this order, where rows are free."""
        for job in jobs:
            alone = self._model.alone(job)
            if alone not in self._lanes:
                with torch.inference_mode():
                    self._model.attend(False)
                    self._lanes[alone] = _Lane(self._open[alone](), self._fitting)
            self._lanes[alone].waiting.append(job)

    def leave(self, job: Job) -> None:
        """Break an answer off, if it has not ended."""
        with torch.inference_mode():
            for lane in self._lanes.values():
                lane.leave(job)

    def advance(self) -> list[Job]:
        """One step: answers that wait are begun where there is room for them, else each gets one more token.

        Returns:
            The answers that have ended with it.
        """
        ended: list[Job] = []
        with torch.inference_mode():
            for alone, lane in self._lanes.items():
                if lane.busy:
                    self._model.attend(not alone)
                    ended += lane.advance()
        return ended

    def abandon(self) -> list[Job]:
        """Forget all answers, after an error; return those that had not ended."""
        left = [job for lane in self._lanes.values() for job in (*lane.active, *lane.waiting) if job.ended is None]
        self._lanes.clear()
        return left

    def close(self) -> None:
        """Give the model back as it was, and its memory."""
        self._lanes.clear()
        self._model.attention = self._before


class _Lane:
    """Answers that one reader reads."""

    def __init__(self, reader: Reader, fitting: int) -> None:
        self._reader = reader
        self._fitting = fitting
        self._sampler = Sampler(reader.rows)
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def leave(self, job: Job) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.active:
            self._drop(self.active.index(job))

    def advance(self) -> list[Job]:
        """Answers that have ended leave their row, waiting ones come in where enough rows are free."""
        free = self._reader.rows - len(self.active)
        joining = []
        if self.waiting and free >= min(len(self.waiting), max(1, self._reader.rows // 8)):
            joining = self._next(free)
        if not joining:
            return self._take(self._reader.step([job.drawn[-1].id for job in self.active]), 0)
        prompts = [job.ids for job in joining]
        told = {n: job.told_top for n, job in enumerate(joining) if job.told_top is not None}
        try:
            logits, found, reused = self._reader.join(prompts, told)
        except BaseException:
            self.waiting.extendleft(reversed(joining))  # as before: whoever asked is told, and nobody is forgotten
            raise
        for n, job in enumerate(joining):
            job.told, job.reused = found.get(n), reused[n]
        first = len(self.active)
        self._sampler.join(prompts, [job.sampling for job in joining], logits)
        self.active += joining
        return self._take(logits, first)

    def _take(self, logits: torch.Tensor, first: int) -> list[Job]:
        """The next token of the rows from `first` on; what has ended leaves."""
        rows = self.active[first:]
        drawn = self._sampler(logits, first, [next(job.draws) for job in rows], [job.top for job in rows])
        for job, token in zip(rows, drawn, strict=True):
            if job.limit:
                job.take(token)
            else:
                job.end_unsaid()
        for row in range(len(self.active) - 1, first - 1, -1):
            if self.active[row].ended is not None:
                self._drop(row)
        return [job for job in rows if job.ended is not None]

    def _drop(self, row: int) -> None:
        self._reader.drop(row)
        self._sampler.drop(row)
        self.active[row] = self.active[-1]
        self.active.pop()

    def _next(self, free: int) -> list[Job]:
        """Those of the waiting that come in next: as many as there are rows and memory for, and as their prompts are
        read in one go; one at least where nothing else is being generated.
        """
        found: list[Job] = []
        tokens = 0
        longest = max((len(job.ids) + job.limit for job in self.active), default=0)
        while self.waiting and len(found) < free:
            job = self.waiting[0]
            longest = max(longest, len(job.ids) + job.limit)
            rows = len(self.active) + len(found) + 1
            if rows > 1 and rows * longest > self._fitting:
                break
            new = 0 if found and job.ids is found[-1].ids else len(job.ids)
            if found and new and tokens + new > _PROMPT_TOKENS:
                break
            tokens += new
            found.append(self.waiting.popleft())
        return found
