"""A request being answered: what is said of it as the tokens come, whole or in pieces, and what is recorded of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import Request
from typing_extensions import override

from instil.inference.batch import Job
from instil.inference.sampling import Drawn
from instil.serving.answers import by_job, calls_to_json, chat_logprobs, completion_logprobs, finish_reason, usage
from instil.serving.feedback import Given, Interaction
from instil.serving.metrics import Metrics
from instil.serving.models import Asked, Said, ServedModel
from instil.serving.protocol import ChatRequest, CompletionRequest, Generation
from instil.serving.worker import Heard, Stream


class Answering:
    """A request being answered.

    Args:
        model: What generates.
        request: What was asked.
        asked: The same as the engine has it.
        http: The request of HTTP.
        metrics: What is counted.
        record: Keeps it, if that is wanted.
    """

    prefix: str
    kind: Literal["chat", "completion"]

    def __init__(
        self,
        model: ServedModel,
        request: Generation,
        asked: Asked,
        http: Request,
        metrics: Metrics,
        record: Callable[[Answering], Awaitable[None]],
    ) -> None:
        self.model, self.request, self.asked, self.http = model, request, asked, http
        self._metrics, self._keep = metrics, record
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._time = datetime.now(UTC)
        self.created = int(self._time.timestamp())
        self.index = {job: number for number, job in enumerate(asked.jobs)}
        self._begun = time.perf_counter()
        self._any = False
        # Of each answer what was heard: the thread that generates may be further.
        self.heard = dict.fromkeys(asked.jobs, 0)  # tokens
        self.ended: set[Job] = set()

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The answers when all are there."""
        async for heard in stream:
            for job, text, _, ended in self._news(heard):
                self.take(job, text, ended=ended)
        await self._done()
        choices = [self.choice(job) for job in self.asked.jobs]
        return {**self._head(self.kinds[0]), "choices": choices, "usage": usage(self.asked), **self._prompt_ids()}

    async def events(self, stream: Stream) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        """The answers as they come."""
        counted = self.request.stream_options is not None and self.request.stream_options.include_usage
        head = self._head(self.kinds[1]) | ({"usage": None} if counted else {})
        complete = False
        try:
            first = [{**head, "choices": [each]} for each in self.first()]
            if first:
                first[0] = {**first[0], **self._prompt_ids()}
                yield first
            async for heard in stream:
                yield [
                    {**head, "choices": [choice]}
                    for job, text, tokens, ended in self._news(heard)
                    for choice in self.delta(job, self.take(job, text, ended=ended), tokens, ended=ended)
                ]
            complete = True
        finally:
            if not complete:
                self._metrics.left.inc()
                await self._record()
        await self._done()
        if counted:
            yield [{**head, "choices": [], "usage": usage(self.asked)}]

    # What differs between the two.

    kinds: tuple[str, str]

    def take(self, job: Job, text: str, *, ended: bool) -> str:
        """Take text of an answer; return what is new of what it says."""
        raise NotImplementedError

    def choice(self, job: Job) -> dict[str, Any]:
        """An answer, whole."""
        raise NotImplementedError

    def first(self) -> list[dict[str, Any]]:
        """What is said before the first token."""
        raise NotImplementedError

    def delta(self, job: Job, text: str, tokens: Sequence[Any], *, ended: bool) -> list[dict[str, Any]]:
        """What is new of an answer."""
        raise NotImplementedError

    def interactions(self) -> list[Interaction]:
        """What is recorded of it."""
        raise NotImplementedError

    # Parts.

    def interaction(
        self, id: str, jobs: Sequence[Job], messages: Sequence[Any], answers: Sequence[Given]
    ) -> Interaction:
        """A prompt and its answers, as they are recorded."""
        template = self.model.chat.renderer.template.name if self.model.chat and self.kind == "chat" else None
        conversation = self.asked.conversation
        return Interaction(
            id=id,
            time=self._time,
            model=self.model.name,
            model_hash=self.model.weights_hash,
            template=template,
            template_hash=self.model.template_hash if template else None,
            kind=self.kind,
            messages=tuple(messages),
            tools=tuple(conversation.tools) if conversation else (),
            sampling=self.asked.sampling.to_json(),
            prompt_ids=tuple(jobs[0].ids),
            answers=tuple(answers),
            client="page" if self.http.headers.get("sec-fetch-site") == "same-origin" else "api",
        )

    def given(self, job: Job, text: str, calls: Sequence[Mapping[str, Any]] = ()) -> Given:
        """An answer as it is recorded."""
        ended = job.ended if job in self.ended else None
        ids = tuple(each.id for each in job.drawn[: self.heard[job]])
        return Given(text, tuple(calls), ended or "stopped", ids)

    def _news(self, heard: Sequence[Heard]) -> Iterator[tuple[Job, str, list[Drawn], bool]]:
        self._count(len(heard))
        for job, text, tokens, ended in by_job(heard):
            self.heard[job] += len(tokens)
            if ended:
                self.ended.add(job)
            yield job, text, tokens, ended

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.asked.jobs[0].ids)} if self.request.return_token_ids else {}

    def _count(self, tokens: int) -> None:
        self._metrics.answer_tokens.labels(self.model.name).inc(tokens)
        if not self._any:
            self._any = True
            self._metrics.first.observe(time.perf_counter() - self._begun)

    async def _done(self) -> None:
        self._metrics.whole.observe(time.perf_counter() - self._begun)
        await self._record()

    async def _record(self) -> None:
        await asyncio.shield(self._keep(self))

    def tokens_of(self, job: Job, tokens: Sequence[Any]) -> dict[str, Any]:
        """The ids of tokens, if they were asked for."""
        return {"token_ids": [each.id for each in tokens]} if self.request.return_token_ids else {}


class ChatAnswering(Answering):
    """A conversation being answered."""

    prefix = "chatcmpl"
    kind = "chat"
    kinds = ("chat.completion", "chat.completion.chunk")
    request: ChatRequest

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._said: dict[Job, Said] = {job: self.model.said(self.asked) for job in self.asked.jobs}

    @override
    def take(self, job: Job, text: str, *, ended: bool) -> str:
        said = self._said[job]
        new = said.push(text)
        return new + said.finish() if ended else new

    @override
    def choice(self, job: Job) -> dict[str, Any]:
        said = self._said[job]
        calls = self._calls(job)
        message: dict[str, Any] = {"role": "assistant", "content": said.text if said.text or not calls else None}
        return {
            "index": self.index[job],
            "message": message | ({"tool_calls": calls} if calls else {}),
            "finish_reason": finish_reason(job, said.tool_calls),
            "logprobs": chat_logprobs(self.model, job.drawn) if self.request.logprobs else None,
            **self.tokens_of(job, job.drawn),
        }

    @override
    def first(self) -> list[dict[str, Any]]:
        return [self._chunk(number, {"role": "assistant", "content": ""}) for number in self.index.values()]

    @override
    def delta(self, job: Job, text: str, tokens: Sequence[Any], *, ended: bool) -> list[dict[str, Any]]:
        number, said = self.index[job], self._said[job]
        logprobs = chat_logprobs(self.model, tokens) if self.request.logprobs else None
        more = {"logprobs": logprobs, **self.tokens_of(job, tokens)}
        chunks = (
            [self._chunk(number, {"content": text} if text else {}) | more] if text or len(more) > 1 or logprobs else []
        )
        if ended:
            calls = [{"index": at, **call} for at, call in enumerate(self._calls(job))]
            chunks += [self._chunk(number, {"tool_calls": calls})] if calls else []
            chunks.append(self._chunk(number, {}, finish_reason(job, said.tool_calls)))
        return chunks

    @override
    def interactions(self) -> list[Interaction]:
        conversation = self.asked.conversation
        assert conversation is not None
        answers = []
        for job in self.asked.jobs:
            said = self._said[job]
            if job not in self.ended:
                said.finish()
            answers.append(self.given(job, said.text, self._calls(job)))
        messages = [message.to_wire() for message in conversation.messages]
        return [self.interaction(self.id, self.asked.jobs, messages, answers)]

    def _calls(self, job: Job) -> list[dict[str, Any]]:
        return calls_to_json(self._said[job].tool_calls, f"{self.id[-8:]}{self.index[job]}")

    def _chunk(self, number: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}


class CompletionAnswering(Answering):
    """Texts being gone on with, or gaps being filled."""

    prefix = "cmpl"
    kind = "completion"
    kinds = ("text_completion", "text_completion")
    request: CompletionRequest

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._text: dict[Job, str] = dict.fromkeys(self.asked.jobs, "")
        self._shown = dict.fromkeys(self.asked.jobs, 0)  # characters whose tokens were told

    @override
    def take(self, job: Job, text: str, *, ended: bool) -> str:
        self._text[job] += text
        return text

    @override
    def choice(self, job: Job) -> dict[str, Any]:
        text = (self._prompt(job) if self.request.echo else "") + self._text[job]
        return self._choice(job, text, job.drawn, first=True, ended=True)

    @override
    def first(self) -> list[dict[str, Any]]:
        if not self.request.return_token_ids:
            return []
        return [self._choice(job, "", (), first=False, ended=False) for job in self.asked.jobs[:1]]

    @override
    def delta(self, job: Job, text: str, tokens: Sequence[Any], *, ended: bool) -> list[dict[str, Any]]:
        first = len(tokens) == self.heard[job]
        shown = (self._prompt(job) if first and self.request.echo else "") + text
        if not (shown or ended or self.request.return_token_ids or self.request.logprobs is not None):
            return []
        return [self._choice(job, shown, tokens, first=first, ended=ended)]

    @override
    def interactions(self) -> list[Interaction]:
        jobs: dict[int, list[Job]] = {}
        for job in self.asked.jobs:
            jobs.setdefault(job.prompt, []).append(job)
        found = []
        for number, own in jobs.items():
            id = self.id if number == 0 else f"{self.id}.{number}"
            answers = [self.given(job, self._text[job]) for job in own]
            found.append(self.interaction(id, own, [{"role": "user", "content": self._prompt(own[0])}], answers))
        return found

    def _prompt(self, job: Job) -> str:
        given = self.request.prompts[job.prompt]
        return given if isinstance(given, str) else self.model.text_of(given)

    def _choice(self, job: Job, text: str, tokens: Sequence[Any], *, first: bool, ended: bool) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None and (tokens or first):
            echo = first and bool(self.request.echo)
            logprobs = completion_logprobs(self.model, job, tokens, echo=echo, start=self._shown[job])
            self._shown[job] += sum(map(len, logprobs["tokens"]))
        return {
            "index": self.index[job],
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(job, ()) if ended else None,
            **self.tokens_of(job, tokens),
        }
