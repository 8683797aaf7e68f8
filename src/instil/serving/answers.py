"""Answers as clients get them: whole or as they come, until the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from instil.inference.batch import Job
from instil.inference.sampling import Drawn
from instil.inference.tools import ToolCall
from instil.serving.models import Asked, ServedModel
from instil.serving.protocol import ApiError
from instil.serving.worker import FailedError, Heard, Stream

T = TypeVar("T")

_STUCK = 60.0  # seconds in which a client must take what was sent
_LEAST = -9999.0  # of the logarithm of a probability, as JSON knows no infinity
_REASONS = {"stop": "stop", "stop-string": "stop", "length": "length", "context": "length"}
FAILED = ApiError(500, "the model failed", code="internal_error")


class LeftError(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work that is broken off when the client leaves.

    Raises:
        LeftError: It has left.
    """
    return await _until_gone(request.receive, work)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise LeftError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class Events(Response):
    """Server-sent events, until the client leaves or takes nothing any more.

    Args:
        events: The JSON values, each an event.
        stream: What they are made of; left at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Sequence[Mapping[str, Any]]], stream: Stream) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for events in self._events:
                    await _put(send, events)
            except FailedError:
                await _put(send, [FAILED.to_json()])
            except ApiError as error:
                await _put(send, [error.to_json()])
            except TimeoutError:
                raise LeftError from None
            await _send(send, b"data: [DONE]\n\n", more=False)

        async with self._stream:
            try:
                await _until_gone(receive, write())
            except (LeftError, OSError):
                pass
            finally:
                await self._events.aclose()  # type: ignore[attr-defined]


async def _put(send: Send, events: Sequence[Mapping[str, Any]]) -> None:
    lines = (f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n" for event in events)
    await _send(send, "".join(lines).encode(), more=True)


async def _send(send: Send, body: bytes, *, more: bool) -> None:
    await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": more}), _STUCK)


def by_job(heard: Sequence[Heard]) -> Iterator[tuple[Job, str, list[Drawn], bool]]:
    """What is new, of each answer together: its text, its tokens, whether it has ended."""
    found: dict[Job, tuple[list[str], list[Drawn], bool]] = {}
    for each in heard:
        texts, tokens, _ = found.get(each.job, ([], [], False))
        texts.append(each.text)
        tokens += [each.token] if each.token is not None else []
        found[each.job] = texts, tokens, each.ended
    for job, (texts, tokens, ended) in found.items():
        yield job, "".join(texts), tokens, ended


def finish_reason(job: Job, calls: Sequence[ToolCall]) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if calls else _REASONS[job.ended or "stop"]


def calls_to_json(calls: Sequence[ToolCall], prefix: str) -> list[dict[str, Any]]:
    """Calls as OpenAI's API writes them: with ids, the arguments as JSON text.

    Args:
        calls: The calls.
        prefix: What no other answer's calls have in their ids, which are of nine signs, as Mistral's templates want.
    """
    return [
        {
            "id": call.id or f"{prefix}{number}"[-9:],
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for number, call in enumerate(calls)
    ]


def usage(asked: Asked) -> dict[str, Any]:
    """The tokens of a request; a prompt with several answers counts once."""
    firsts = {job.prompt: job for job in reversed(asked.jobs)}.values()
    prompt, answer = sum(len(job.ids) for job in firsts), sum(len(job.drawn) for job in asked.jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in firsts)},
    }


def chat_logprobs(model: ServedModel, tokens: Sequence[Drawn]) -> dict[str, Any]:
    """The probabilities of tokens, as the chat API tells them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = model.token_text(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(model.token_text.raw(token))}

    return {"content": [entry(t.id, t.logprob) | {"top_logprobs": [entry(*each) for each in t.top]} for t in tokens]}


def completion_logprobs(
    model: ServedModel, job: Job, tokens: Sequence[Drawn], *, echo: bool, start: int
) -> dict[str, Any]:
    """The probabilities of tokens, as the completions API tells them.

    Args:
        model: Whose.
        job: The answer.
        tokens: Those to tell of.
        echo: Whether those of the prompt come before them.
        start: The characters before them.
    """
    text = model.token_text
    entries: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = []
    if echo and job.told is not None:
        entries += [(job.ids[0], None, ())]
        entries += zip(job.ids[1:], job.told.logprobs, job.told.top, strict=True)
    entries += [(each.id, each.logprob, each.top) for each in tokens]
    tops: list[dict[str, float] | None] = []
    offsets = []
    for token, logprob, top in entries:
        own: dict[str, float] = {}
        for each, value in top if logprob is None else [*top, (token, logprob)]:
            own[text(each)] = max(value, own.get(text(each), _LEAST))
        tops.append(own if logprob is not None else None)
        offsets.append(start)
        start += len(text(token))
    return {
        "tokens": [text(token) for token, _, _ in entries],
        "token_logprobs": [None if logprob is None else max(logprob, _LEAST) for _, logprob, _ in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
