"""The server: OpenAI's API over the models, the page, and what people make of answers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from instil import __version__
from instil.errors import InstilError, nearest
from instil.serving.answering import Answering, ChatAnswering, CompletionAnswering
from instil.serving.answers import (
    Events,
    LeftError,
    unless_gone,
    usage,
)
from instil.serving.feedback import NotRecordedError, Store, StoreError
from instil.serving.metrics import Metrics
from instil.serving.models import ServedModel
from instil.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Feedback,
    Generation,
    TokenizeRequest,
)
from instil.serving.worker import FailedError, FullError, Stream, Worker

T = TypeVar("T")

_RETRY_AFTER = 1  # seconds


@dataclass(frozen=True, slots=True)
class Recording:
    """What is recorded.

    Args:
        store: Where.
        consent: `each`: requests that say `store: true`; `all`: those that do not say `store: false`.
    """

    store: Store
    consent: Literal["each", "all"]

    def wants(self, request: Generation) -> bool:
        """Whether a request is to be recorded."""
        return request.store is True or (request.store is None and self.consent == "all")


class Server:
    """Models behind the API.

    Args:
        models: What is served, the tuned model first.
        worker: What generates.
        recording: Where requests are recorded; None if they are not.
        has_runs: Whether there is a page of training runs.
    """

    def __init__(
        self, models: Sequence[ServedModel], worker: Worker, recording: Recording | None, *, has_runs: bool = False
    ) -> None:
        self._models = {model.name: model for model in models}
        self._worker = worker
        self._recording = recording
        self._has_runs = has_runs
        self._created = int(time.time())
        self._encoding = ThreadPoolExecutor(1, "instil-encode")  # one: what renders and encodes keeps state
        self.metrics = Metrics(lambda: worker.active, lambda: worker.open)

    def close(self) -> None:
        """Let go of the thread that encodes."""
        self._encoding.shutdown()

    # What there is.

    def health(self) -> dict[str, str]:
        """That the server answers."""
        return {"status": "ok"}

    def models(self) -> dict[str, Any]:
        """The models, the tuned one first."""
        return {"object": "list", "data": [self._card(name) for name in self._models]}

    def model(self, model: str) -> dict[str, Any]:
        """One model."""
        return self._card(self._named(model).name)

    def about(self) -> dict[str, Any]:
        """What the page must know."""
        first = next(iter(self._models.values()))
        usual = first.engine.sampling(Generation().sampling(1, 0))
        recording = self._recording
        return {
            "version": __version__,
            "models": [
                {
                    "id": model.name,
                    "role": model.role,
                    "context": model.engine.context,
                    "template": model.chat.renderer.template.name if model.chat else None,
                    "tools": model.calls is not None,
                    "fill_in_the_middle": model.fills_gaps,
                }
                for model in self._models.values()
            ],
            "recording": {
                "on": recording is not None,
                "consent": recording.consent if recording else "each",
                "redacted": recording.store.redacts if recording else True,
                "retention_days": recording.store.retention_days if recording else None,
            },
            "runs": self._has_runs,
            "limits": {"max_new_tokens": first.most_tokens, "answers": self._worker.capacity},
            "sampling": {name: getattr(usual, name) for name in ("temperature", "top_p", "top_k", "min_p")},
        }

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer of the tuned model: its special tokens, and its chat template."""
        model = next(iter(self._models.values()))
        special = model.loaded.tokenizer.special_tokens
        named = {name: special.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = model.chat.renderer.template.text if model.chat else None
        limit = model.engine.context or None
        return {**named, "chat_template": template, "model_max_length": limit, "tokenizer_class": "Tokenizer"}

    def prometheus(self) -> Response:
        """What was counted."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """The very tokens that the model is given for a conversation, or those of a text as its tokenizer reads it."""
        model = self._named(request.model)

        def work() -> list[int]:
            if request.messages is not None:
                return list(model.chat_ids(model.conversation(request.messages, request.tools)))
            return model.text_ids(request.prompt or "", special=request.add_special_tokens)

        ids = await self._encoded(work)
        texts = {"token_strs": [model.token_text(each) for each in ids]} if request.return_token_strs else {}
        return {"tokens": ids, **texts, "count": len(ids), "max_model_len": model.engine.context}

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens."""
        model = self._named(request.model)
        model.check_ids(request.tokens, "tokens")
        return {"prompt": model.text_of(request.tokens)}

    # Answers.

    async def chat(self, request: ChatRequest, http: Request) -> Response:
        """An answer to a conversation, or several."""
        model = self._named(request.model)
        self._check_number(request)
        asked = await self._encoded(lambda: model.asked_chat(request))
        return await self._answer(ChatAnswering(model, request, asked, http, self.metrics, self.record))

    async def complete(self, request: CompletionRequest, http: Request) -> Response:
        """Texts gone on with, or gaps filled."""
        model = self._named(request.model)
        self._check_number(request)
        asked = await self._encoded(lambda: model.asked_completion(request))
        return await self._answer(CompletionAnswering(model, request, asked, http, self.metrics, self.record))

    async def _answer(self, answering: Answering) -> Response:
        """The response: as the answers come, or when they are there."""
        stream = self._stream(answering)
        self.metrics.prompt_tokens.labels(answering.model.name).inc(usage(answering.asked)["prompt_tokens"])
        if answering.request.stream:
            return Events(answering.events(stream), stream)
        try:
            async with stream:
                return JSONResponse(await unless_gone(answering.http, answering.whole(stream)))
        except LeftError:
            self.metrics.left.inc()
            return Response(status_code=499)
        except FailedError:
            raise ApiError(500, "the model failed", code="internal_error") from None

    def _check_number(self, request: Generation) -> None:
        number, most = request.asked_for, self._worker.capacity
        if number > most:
            raise ApiError(400, f"asks for {number:,} answers at once, and this server takes {most:,}", "n")

    def _stream(self, answering: Answering) -> Stream:
        try:
            return self._worker.stream(answering.model.name, answering.asked.jobs)
        except FullError:
            raise ApiError(
                429, "too many requests are waiting: try again", code="rate_limit_exceeded", retry_after=_RETRY_AFTER
            ) from None

    # What people make of them.

    async def feedback(self, request: Feedback) -> dict[str, str]:
        """Keep what a person makes of an answer, or wrote; it is on disk when this answers."""
        if self._recording is None:
            raise ApiError(400, "this server records nothing (--record DIR)", code="recording_off")
        store = self._recording.store
        try:
            return {"id": await asyncio.to_thread(request.root.keep, store)}
        except NotRecordedError as error:
            raise ApiError(404, str(error), "id") from error
        except StoreError as error:
            _tell(error)
            raise ApiError(503, "it could not be kept", code="not_kept") from error
        except InstilError as error:
            raise ApiError(400, str(error)) from error

    async def record(self, answering: Answering) -> None:
        """Keep a request and its answers, if that is wanted; it is on disk when this returns.

        Where it cannot be kept that is told on standard error, and the answers are given all the same.
        """
        if self._recording is None or not self._recording.wants(answering.request):
            return
        store = self._recording.store
        try:
            for interaction in answering.interactions():
                await asyncio.to_thread(store.record, interaction)
        except StoreError as error:
            _tell(error)

    # Parts.

    def _named(self, name: str | None) -> ServedModel:
        """A model by its name, the first where none is named."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r}: {nearest(name[:200], self._models)}",
                "model",
                "model_not_found",
            )
        return self._models[name]

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "instil"}

    async def _encoded(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)


def _tell(error: StoreError) -> None:
    sys.stderr.write(f"instil: not kept: {error}\n")
