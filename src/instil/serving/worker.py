"""The thread that generates: requests join a running batch when they come, and leave it when their client does."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal, NamedTuple

from instil.inference.batch import Batch, Job
from instil.inference.engine import Engine
from instil.inference.sampling import Drawn
from instil.serving.guard import log


class Heard(NamedTuple):
    """What is new in an answer.

    Args:
        job: The answer.
        text: What it adds to the text.
        token: The token that was drawn; None where none was asked for.
        ended: Whether the answer has ended with it.
    """

    job: Job
    text: str
    token: Drawn | None
    ended: bool


class FullError(Exception):
    """As many answers as may wait are waiting already."""


class FailedError(Exception):
    """The model failed while it generated."""


class Stream:
    """What comes of the answers to one request, as it comes. Leaving it breaks off those that have not ended."""

    def __init__(self, worker: Worker, model: str, jobs: Sequence[Job]) -> None:
        self._worker = worker
        self._model = model
        self._open = set(jobs)
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._heard: deque[Heard] = deque()  # the thread appends, the loop takes
        self._failed = False
        for job in jobs:
            job.hear = self._hear

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.leave(self._model, self._open)

    async def __aiter__(self) -> AsyncIterator[list[Heard]]:
        """All that is new, as often as there is something.

        Raises:
            FailedError: The model failed.
        """
        while self._open:
            await self._came.wait()
            self._came.clear()
            heard = []
            while self._heard:
                heard.append(self._heard.popleft())
            for each in heard:
                if each.ended:
                    self._open.discard(each.job)
                    self._worker.ended()
            if heard:
                yield heard
            if self._failed:
                raise FailedError

    def fail(self) -> None:
        """Say that nothing will come any more; from the thread."""
        self._failed = True
        self.wake()

    def wake(self) -> None:
        """Tell the loop that something came; from the thread."""
        with suppress(RuntimeError):  # the loop has ended, and the server with it
            self._loop.call_soon_threadsafe(self._came.set)

    def _hear(self, job: Job, piece: str) -> None:
        self._heard.append(Heard(job, piece, job.drawn[-1] if job.drawn else None, job.ended is not None))
        self._worker.woken.add(self)


class _Asked(NamedTuple):
    what: Literal["add", "leave", "stop"]
    model: str = ""
    jobs: Sequence[Job] = ()
    stream: Stream | None = None


class Worker:
    """Generates for several models in one thread, in turn.

    Args:
        engines: The models by name.
        rows: Most answers of each at once.
        waiting: Most answers that wait for their turn beside those.
        kept: Of each model, tokens of earlier answers that are kept for prompts that go on from them.
    """

    def __init__(self, engines: Mapping[str, Engine], rows: int, waiting: int, kept: int) -> None:
        self.capacity = rows + waiting
        self.open = 0
        """Answers that were asked for and have neither ended nor been left."""
        self.woken: set[Stream] = set()
        """Those whose client has something to hear since the last step."""
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        self._batches = {name: engine.batch(rows, kept=kept, models=len(engines)) for name, engine in engines.items()}
        self._streams: dict[Job, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="instil-generate", daemon=True)

    @property
    def active(self) -> int:
        """The answers that are being generated."""
        return sum(batch.active for batch in self._batches.values())

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way."""
        self._asked.put(_Asked("stop"))
        self._thread.join()

    def stream(self, model: str, jobs: Sequence[Job]) -> Stream:
        """Have answers generated.

        Raises:
            FullError: Too many are waiting.
        """
        if self.open + len(jobs) > self.capacity:
            raise FullError
        self.open += len(jobs)
        stream = Stream(self, model, jobs)
        self._asked.put(_Asked("add", model, jobs, stream))
        return stream

    def leave(self, model: str, jobs: set[Job]) -> None:
        """Break answers off."""
        if jobs:
            self.open -= len(jobs)
            self._asked.put(_Asked("leave", model, tuple(jobs)))

    def ended(self) -> None:
        """An answer has ended, and its client knows."""
        self.open -= 1

    def _run(self) -> None:
        while self._receive():
            for batch in self._batches.values():
                if batch.busy:
                    self._attempt(batch, batch.advance)
            for stream in self.woken:
                stream.wake()
            self.woken.clear()

    def _receive(self) -> bool:
        """Take in what was asked since the last step; wait for it where there is nothing to go on with."""
        wait = not any(batch.busy for batch in self._batches.values())
        while True:
            try:
                asked = self._asked.get(block=wait)
            except Empty:
                return True
            wait = False
            if asked.what == "stop":
                return False
            batch = self._batches[asked.model]
            if asked.what == "add" and asked.stream is not None:
                self._streams |= dict.fromkeys(asked.jobs, asked.stream)
                self._attempt(batch, partial(batch.add, asked.jobs), asked.jobs)
            else:
                for job in asked.jobs:
                    self._streams.pop(job, None)
                    self._attempt(batch, partial(batch.leave, job))

    def _attempt(self, batch: Batch, act: Callable[[], list[Job] | None], new: Sequence[Job] = ()) -> None:
        """Do something with a batch; `new` are answers that it may not know yet."""
        try:
            for job in act() or ():
                self._streams.pop(job, None)
        except Exception as error:  # memory that ran out, most of all: those under way are lost, the server is not
            log(error)
            for job in (*batch.abandon(), *new):
                stream = self._streams.pop(job, None)
                if stream is not None:
                    stream.fail()
