"""The server: OpenAI's API over the models, the page, and what people make of answers."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from instil import __version__
from instil.data.strict_json import explain
from instil.errors import InstilError, nearest
from instil.inference.batch import Job
from instil.serving.answers import (
    Events,
    LeftError,
    by_job,
    calls_to_json,
    chat_logprobs,
    completion_logprobs,
    finish_reason,
    unless_gone,
    usage,
)
from instil.serving.feedback import Given, Interaction, NotRecordedError, Store, StoreError
from instil.serving.metrics import Metrics
from instil.serving.models import Asked, Said, ServedModel
from instil.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Feedback,
    Generation,
    TokenizeRequest,
)
from instil.serving.worker import FailedError, FullError, Stream, Worker

T = TypeVar("T")

_CODES = {
    400: "The request cannot be done.",
    401: "The API key is missing or wrong.",
    403: "It comes from another origin, or names another host.",
    404: "There is no such thing.",
    405: "There is no such method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting.",
    500: "The server failed.",
    503: "The server is ending.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": text} for code, text in _CODES.items()
}
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
        return await self._answer(_Chat(self, model, request, asked, http))

    async def complete(self, request: CompletionRequest, http: Request) -> Response:
        """Texts gone on with, or gaps filled."""
        model = self._named(request.model)
        self._check_number(request)
        asked = await self._encoded(lambda: model.asked_completion(request))
        return await self._answer(_Completion(self, model, request, asked, http))

    async def _answer(self, answering: _Answering) -> Response:
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

    def _stream(self, answering: _Answering) -> Stream:
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
            raise ApiError(404, f"{error} (only what was recorded can be rated: store: true)", "id") from error
        except StoreError as error:
            _tell(error)
            raise ApiError(503, "it could not be kept", code="not_kept") from error
        except InstilError as error:
            raise ApiError(400, str(error)) from error

    async def record(self, answering: _Answering) -> None:
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


class _Answering:
    """A request being answered.

    Args:
        server: Who answers.
        model: What generates.
        request: What was asked.
        asked: The same as the engine has it.
        http: The request of HTTP.
    """

    prefix: str
    kind: Literal["chat", "completion"]

    def __init__(self, server: Server, model: ServedModel, request: Generation, asked: Asked, http: Request) -> None:
        self.server, self.model, self.request, self.asked, self.http = server, model, request, asked, http
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.index = {job: number for number, job in enumerate(asked.jobs)}
        self._begun = time.perf_counter()
        self._any = False

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The answers when all are there."""
        async for heard in stream:
            self._count(len(heard))
            for job, text, _, ended in by_job(heard):
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
                self._count(len(heard))
                yield [
                    {**head, "choices": [choice]}
                    for job, text, tokens, ended in by_job(heard)
                    for choice in self.delta(job, self.take(job, text, ended=ended), tokens, ended=ended)
                ]
            complete = True
        finally:
            if not complete:
                self.server.metrics.left.inc()
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
            time=datetime.fromtimestamp(self.created, UTC),
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

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.asked.jobs[0].ids)} if self.request.return_token_ids else {}

    def _count(self, tokens: int) -> None:
        self.server.metrics.answer_tokens.labels(self.model.name).inc(tokens)
        if not self._any:
            self._any = True
            self.server.metrics.first.observe(time.perf_counter() - self._begun)

    async def _done(self) -> None:
        self.server.metrics.whole.observe(time.perf_counter() - self._begun)
        await self._record()

    async def _record(self) -> None:
        await asyncio.shield(self.server.record(self))

    def tokens_of(self, job: Job, tokens: Sequence[Any]) -> dict[str, Any]:
        """The ids of tokens, if they were asked for."""
        return {"token_ids": [each.id for each in tokens]} if self.request.return_token_ids else {}


class _Chat(_Answering):
    prefix = "chatcmpl"
    kind = "chat"
    kinds = ("chat.completion", "chat.completion.chunk")
    request: ChatRequest

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._said: dict[Job, Said] = {job: self.model.said(self.asked) for job in self.asked.jobs}

    def take(self, job: Job, text: str, *, ended: bool) -> str:
        said = self._said[job]
        new = said.push(text)
        return new + said.finish() if ended else new

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

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk(number, {"role": "assistant", "content": ""}) for number in self.index.values()]

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

    def interactions(self) -> list[Interaction]:
        conversation = self.asked.conversation
        assert conversation is not None
        answers = []
        for job in self.asked.jobs:
            said = self._said[job]
            if job.ended is None:
                said.finish()
            ids = tuple(each.id for each in job.drawn)
            answers.append(Given(said.text, tuple(self._calls(job)), job.ended or "stopped", ids))
        messages = [message.to_wire() for message in conversation.messages]
        return [self.interaction(self.id, self.asked.jobs, messages, answers)]

    def _calls(self, job: Job) -> list[dict[str, Any]]:
        return calls_to_json(self._said[job].tool_calls, f"{self.id[-8:]}{self.index[job]}")

    def _chunk(self, number: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}


class _Completion(_Answering):
    prefix = "cmpl"
    kind = "completion"
    kinds = ("text_completion", "text_completion")
    request: CompletionRequest

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._text: dict[Job, str] = dict.fromkeys(self.asked.jobs, "")
        self._shown = dict.fromkeys(self.asked.jobs, 0)  # characters whose tokens were told

    def take(self, job: Job, text: str, *, ended: bool) -> str:
        self._text[job] += text
        return text

    def choice(self, job: Job) -> dict[str, Any]:
        text = (self._prompt(job) if self.request.echo else "") + self._text[job]
        return self._choice(job, text, job.drawn, first=True, ended=True)

    def first(self) -> list[dict[str, Any]]:
        if not self.request.return_token_ids:
            return []
        return [self._choice(job, "", (), first=False, ended=False) for job in self.asked.jobs[:1]]

    def delta(self, job: Job, text: str, tokens: Sequence[Any], *, ended: bool) -> list[dict[str, Any]]:
        first = len(tokens) == len(job.drawn) or not job.drawn
        shown = (self._prompt(job) if first and self.request.echo else "") + text
        if not (shown or ended or self.request.return_token_ids or self.request.logprobs is not None):
            return []
        return [self._choice(job, shown, tokens, first=first, ended=ended)]

    def interactions(self) -> list[Interaction]:
        jobs: dict[int, list[Job]] = {}
        for job in self.asked.jobs:
            jobs.setdefault(job.prompt, []).append(job)
        found = []
        for number, own in jobs.items():
            id = self.id if number == 0 else f"{self.id}.{number}"
            answers = [
                Given(self._text[job], (), job.ended or "stopped", tuple(each.id for each in job.drawn)) for job in own
            ]
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


def application(server: Server, more: Sequence[APIRouter] = ()) -> FastAPI:
    """The server over HTTP.

    Args:
        server: What answers.
        more: What else it answers: the page of training runs.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="Instil", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=_ERRORS
    )
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _told_invalid)
    app.add_exception_handler(HTTPException, _told_http)

    for path, method, act in (
        ("/health", "GET", server.health),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{model:path}", "GET", server.model),
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/completions", "POST", server.complete),
        ("/tokenize", "POST", server.tokenize),
        ("/detokenize", "POST", server.detokenize),
        ("/tokenizer_info", "GET", server.tokenizer_info),
        ("/metrics", "GET", server.prometheus),
        ("/api/about", "GET", server.about),
        ("/api/feedback", "POST", server.feedback),
    ):
        app.add_api_route(path, act, methods=[method], response_model=None)
    for router in more:
        app.include_router(router)
    pages = resources.files("instil.serving") / "static"
    app.mount("/static", StaticFiles(directory=str(pages)), "static")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response((pages / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    return app


def _tell(error: StoreError) -> None:
    sys.stderr.write(f"instil: not kept: {error}\n")


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _told_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(each) for each in first["loc"] if each != "body"]
    field = place[0] if place and first["type"] != "json_invalid" else None
    what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "json_invalid":
        what = "the body is not JSON"
    elif not place and first["type"] == "missing":
        what = "there is no body"
    elif not place and first["type"].startswith(("model_", "dict_")):
        if isinstance(first["input"], bytes):  # not read, for it says that it is something else
            return await _told(request, ApiError(415, "the body must be JSON: send Content-Type: application/json"))
        what = "the body must be an object"
    return await _told(request, ApiError(400, f"{'.'.join(place)}: {what}" if field else what, field))


async def _told_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # met while the body was read
        return await _told(request, error.__cause__)
    if isinstance(error.__cause__, (ValueError, RecursionError)):
        broken = "is not UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else explain(error.__cause__)
        return await _told(request, ApiError(400, f"the body cannot be read: {broken}"))
    code = "unknown_url" if error.status_code == 404 else None
    own = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(own.to_json(), own.status, error.headers)
