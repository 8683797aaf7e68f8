"""A model behind an OpenAI-compatible endpoint: asked once, its replies kept in a folder, within a budget."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instil.errors import UsageError
from instil.training.files import write_json

if TYPE_CHECKING:
    from openai import OpenAI

Messages = Sequence[Mapping[str, str]]
"""A conversation as the endpoint takes it: `{"role": ..., "content": ...}` each."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the endpoint said.

    Args:
        text: The message.
        finish: Why it ended: `stop`; `length` where it was cut short.
        tokens: What the endpoint counted for prompt and reply together; None where it counts none.
    """

    text: str
    finish: str
    tokens: int | None


@dataclass(slots=True)
class Budget:
    """How much may be asked, all calls that share the budget taken together. What is kept already costs nothing.

    Args:
        requests: Most requests; None for any number. 0 asks nothing, and says how many there would be.
        tokens: No request begins once replies and prompts have taken so many tokens; None for any number. Those on
            their way by then are still paid.

    `asked` and `used` are the requests and the tokens so far.
    """

    requests: int | None = None
    tokens: int | None = None
    asked: int = 0
    used: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self) -> bool:
        """Take one request, if there is one left."""
        with self._lock:
            if self.requests is not None and self.asked >= self.requests:
                return False
            if self.tokens is not None and self.used >= self.tokens:
                return False
            self.asked += 1
            return True

    def pay(self, tokens: int | None) -> None:
        """Take the tokens of a reply."""
        if tokens is None and self.tokens is not None:
            raise _Failure("it does not count tokens, and the budget is in tokens", "Give a budget in requests.")
        with self._lock:
            self.used += tokens or 0

    def __str__(self) -> str:
        limits = [(self.requests, "requests"), (self.tokens, "tokens")]
        return " and ".join(f"{limit:,} {name}" for limit, name in limits if limit is not None)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Each reply is kept in a file of its own as soon as it is there, under a hash of what was asked (model, messages and
    sampling, not the address). Whatever breaks a run off, the next one asks only what is missing.

    Args:
        base_url: The address, up to and with its `/v1`.
        model: The name the endpoint knows the model by.
        cache: The folder that keeps the replies. It is made when the first is there.
        api_key_env: The environment variable that holds the key; "" where none is needed.
        temperature: Of sampling; None leaves it to the endpoint.
        max_tokens: Most tokens of a reply; None leaves it to the endpoint.
        extra: What else to send with each request, such as `{"seed": 1}`.
        timeout: Seconds to wait for a reply.
        retries: How often a request is repeated that was refused for haste (429), failed at the endpoint (500 and
            above), got no reply in time or could not be sent; with growing waits, or as long as `Retry-After` says.
        workers: Requests on their way at once.
        budget: How much may be asked.
        progress: Told how many replies are there and how many there will be: before the first request, which states
            what is still to ask, and after each.

    Raises:
        UsageError: An argument that cannot be.
    """

    base_url: str
    model: str
    cache: Path
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 3
    workers: int = 8
    budget: Budget = field(default_factory=Budget)
    progress: Callable[[int, int], None] = field(default=lambda done, total: None, repr=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"base_url {self.base_url!r} is no address", "Write it as http://host:port/v1.")
        if not self.model:
            raise UsageError("model is empty", "Name the model as the endpoint knows it.")
        for name, least in (("retries", 0), ("workers", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} {value} cannot be", f"Give at least {least}.")
        if self.timeout <= 0:
            raise UsageError(f"timeout {self.timeout} cannot be", "Give the seconds to wait, more than 0.")
        if taken := sorted({"model", "messages", "n", "stream"} & set(self.extra)):
            raise UsageError(f"extra holds {taken[0]!r}, which is not for the caller to set", "Leave it out.")

    def check(self) -> None:
        """See that there is a key, a place for the replies, and what sends requests. Nothing is asked.

        Raises:
            UsageError: There is not.
        """
        if self.cache.exists() and not self.cache.is_dir():
            raise UsageError(f"{self.cache}: is no folder, and cannot keep the judge's replies", "Name another one.")
        self._client().close()

    def complete(self, messages: Messages) -> Reply:
        """The reply to one conversation; raises as `complete_all` does."""
        return self.complete_all([messages])[0]

    def complete_all(self, conversations: Sequence[Messages]) -> list[Reply]:
        """The reply to each conversation, in order; what is kept is not asked again, what is the same is asked once.

        Raises:
            UsageError: The endpoint failed, the budget was spent, or the folder cannot be used. Every reply that came
                is kept.
        """
        asked = [self._request(messages) for messages in conversations]
        places = [self._place(request) for request in asked]
        requests = dict(zip(places, asked, strict=True))
        replies = {place: reply for place in requests if (reply := self._kept(place))}
        self.progress(len(replies), len(requests))
        if len(replies) < len(requests):
            failures = self._ask(requests, replies)
            left = len(requests) - len(replies)
            if failures:
                worst = max(failures, key=lambda failure: failure.stops)
                alike = dict.fromkeys(each.what for each in failures if each.stops == worst.stops)
                raise UsageError(
                    f"{self.base_url}: {'; '.join(alike)} ({left:,} of {len(requests):,} replies are missing)",
                    f"{worst.remedy} Then run it again: what came is kept in {self.cache}, only the rest is asked.",
                )
            if left:
                raise UsageError(
                    f"the budget of {self.budget} is spent: {left:,} of {len(requests):,} replies are missing",
                    f"Run it again with a larger one: what came is kept in {self.cache}, only the rest is asked.",
                )
        return [replies[place] for place in places]

    def _ask(self, requests: Mapping[Path, dict[str, Any]], replies: dict[Path, Reply]) -> list[_Failure]:
        """Ask what is missing and put it into `replies`; what failed. Where all would fail alike, it stops."""
        lock, stop = threading.Lock(), threading.Event()
        failures: list[_Failure] = []

        def ask(place: Path) -> None:
            if stop.is_set() or not self.budget.take():
                return
            try:
                reply = self._send(client, requests[place])
                self._keep(place, requests[place], reply)
                self.budget.pay(reply.tokens)
                with lock:
                    replies[place] = reply
                    self.progress(len(replies), len(requests))
            except _Failure as failure:
                failures.append(failure)
                if failure.stops:
                    stop.set()

        missing = [place for place in requests if place not in replies]
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.cache}: cannot be made a folder: {error}", "Name another one.") from error
        with self._client() as client, ThreadPoolExecutor(self.workers) as pool:
            try:
                list(pool.map(ask, missing))
            finally:
                stop.set()  # those on their way are waited for, and kept
        return failures

    def _send(self, client: OpenAI, request: Mapping[str, Any]) -> Reply:
        import openai

        messages = request["messages"]
        about = f"the message that begins {messages[-1]['content'][:120]!r}"
        rest = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            answer: Any = client.chat.completions.create(model=self.model, messages=messages, extra_body=rest)
        except (openai.OpenAIError, ValueError) as error:
            raise self._failure(error, client.api_key, about) from error
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            raise _Failure(f"what came is no chat completion: {str(answer)[:80]!r}", _ADDRESS)
        try:
            message = choices[0].message if choices else None
            said = message and (message.refusal if message.content is None else message.content)
            finish = (choices[0].finish_reason if choices else None) or ""
            tokens = answer.usage.total_tokens if answer.usage else None
            right = isinstance(said, str | None) and isinstance(finish, str) and isinstance(tokens, int | None)
        except AttributeError:  # the library takes whatever comes
            right = False
        if not right:
            raise _Failure(f"what came is no chat completion: {str(answer)[:80]!r}", _ADDRESS)
        if said is None:
            raise _Failure(f"an empty reply came to {about}", "Leave that item out if it happens again.", stops=False)
        return Reply(said, finish, tokens)

    def _failure(self, error: Exception, key: str, about: str) -> _Failure:
        """What an error of the library means for the message it is about, and what to do."""
        import openai

        said = str(error).replace(key, "***")[:300]
        tried = f"with up to {self.retries} repetitions"
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return _Failure(f"the key is refused: {said}", f"See what {self.api_key_env or 'the key'} holds.")
            case openai.NotFoundError():
                return _Failure(f"it does not know the model {self.model!r} or the address: {said}", _ADDRESS)
            case openai.RateLimitError():
                return _Failure(f"it still refuses for haste, {tried}: {said}", "Wait, or ask with fewer workers.")
            case openai.InternalServerError():
                return _Failure(f"it still fails, {tried}: {said}", "See what the endpoint's own log says.")
            case openai.APITimeoutError():
                what = f"no reply within {self.timeout:g} s, {tried}"
                return _Failure(what, "Give a longer timeout, or ask with fewer workers.")
            case openai.APIConnectionError():
                reason = error.__cause__ or error
                return _Failure(f"it cannot be reached: {reason}", "See that it runs, and that base_url is right.")
            case openai.APIStatusError():
                return _Failure(f"{about} is refused: {said}", "Mend that, or leave the item out.", stops=False)
        return _Failure(f"what came cannot be read: {said}", _ADDRESS)

    def _request(self, messages: Messages) -> dict[str, Any]:
        """What is sent."""
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {"model": self.model, "messages": [dict(each) for each in messages], **given, **self.extra}

    def _place(self, request: Mapping[str, Any]) -> Path:
        """The file that keeps the reply."""
        return self.cache / f"{hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()}.json"

    def _keep(self, place: Path, request: Mapping[str, Any], reply: Reply) -> None:
        try:
            write_json(place, {"request": request, "reply": asdict(reply)})
        except OSError as error:
            raise _Failure(f"its reply cannot be kept: {error}", "Make room, or name another folder.") from error

    def _kept(self, place: Path) -> Reply | None:
        try:
            return Reply(**json.loads(place.read_text(encoding="utf-8"))["reply"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{place}: a reply that was kept cannot be read: {error}", "Delete the file.") from error

    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise UsageError("a judge needs the package 'openai'", "pip install openai") from error
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else "none"
        if not key:
            remedy = "Set it, or name none where the endpoint needs no key: api_key_env='', --judge-key-env ''."
            what = f"the environment variable {self.api_key_env}, which is to hold the key, is not set"
            raise UsageError(what, remedy)
        return OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.retries)


_ADDRESS = "See that base_url and model are right; an OpenAI-compatible address often ends in /v1."


class _Failure(Exception):  # noqa: N818 (told on as a UsageError)
    """What went wrong with a request, what to do about it, and whether all others would fail alike."""

    def __init__(self, what: str, remedy: str, stops: bool = True) -> None:
        super().__init__(what)
        self.what, self.remedy, self.stops = what, remedy, stops
