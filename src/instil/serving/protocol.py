"""What clients send and get: OpenAI's requests and errors, as pydantic models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, RootModel, StrictBool, model_validator

from instil.errors import nearest
from instil.inference.options import SamplingOptions

_MOST_ANSWERS = 64
_MOST_TOP = 20
_MOST_MESSAGES = 2048
_MOST_TOOLS = 512
_MOST_STOPS = 16

Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=500)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
# Lists end at their first mistake: a body may hold a million of them.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=_MOST_TOOLS)]


class ApiError(Exception):
    """An error as a client gets it.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do about it.
        param: The field of the request at fault.
        code: OpenAI's code for it.
        retry_after: Seconds after which it is worth another try.
    """

    _TYPES: ClassVar[Mapping[int, str]] = {
        401: "authentication_error",
        403: "permission_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "server_error",
    }

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message, self.param, self.code = message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def to_json(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = self._TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """The body of a request: by names that are known. What a client asks for is done or refused, never passed over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name in value:
                if name not in cls.model_fields:
                    short = str(name)[:100]
                    raise ValueError(f"{short!r} is no field of this request: {nearest(short, cls.model_fields)}")
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half a surrogate pair, and is not UTF-8") from None
        except ValueError:
            raise ValueError("a number is not finite, which JSON does not have") from None
        return value


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = Field(default=False, description="Tell the number of tokens at the end.")
    include_obfuscation: bool = Field(default=False, description="Taken and without effect.")


class Generation(Body):
    """What all requests for answers have in common; what is unset is as the model's `generation_config.json` says."""

    model: str | None = Field(default=None, description="Which of the models; the tuned one by default.")
    temperature: float | None = Field(default=None, ge=0.0, le=100.0, description="0 takes the likeliest token.")
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, description="As OpenAI's; 0 takes the likeliest token.")
    top_k: int | None = Field(default=None, ge=-1, le=10**9, description="Draw among this many; 0 or -1: among all.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=1e6)
    max_tokens: int | None = Field(default=None, ge=0, description="Most tokens of an answer.")
    stop: StopText | Annotated[list[StopText | None], Field(fail_fast=True, max_length=_MOST_STOPS)] | None = Field(
        default=None, description="Texts before which an answer ends."
    )
    n: int | None = Field(default=None, ge=1, le=_MOST_ANSWERS, description="Answers to each prompt.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="The same seed, the same answers.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(default=False, description="Tell the tokens of the prompt and of the answers.")
    store: StrictBool | None = Field(
        default=None, description="Whether this may be recorded, where the server records."
    )
    user: str | None = Field(default=None, description="Taken and without effect.")
    presence_penalty: float | None = Field(default=None, description="0 alone.")
    frequency_penalty: float | None = Field(default=None, description="0 alone.")
    logit_bias: dict[str, float] | None = Field(default=None, description="None alone.")

    @model_validator(mode="after")
    def _can_be_done(self) -> Generation:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name}: is not supported: leave it out, or see repetition_penalty")
        return self

    @property
    def asked_for(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The texts before which an answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [each for each in given if each is not None]

    def sampling(self, tokens: int, seed: int) -> SamplingOptions:
        """How answers are drawn.

        Args:
            tokens: Most tokens of an answer.
            seed: Where the request names none.
        """
        return SamplingOptions(
            temperature=0.0 if self.top_p == 0.0 else self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p or None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed if self.seed is None else self.seed % 2**64,
            answers=self.n or 1,
            max_new_tokens=max(tokens, 1),
            stop=self.stops,
        )


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Messages = Field(description="The conversation, its last turn to be answered.")
    tools: Tools | None = Field(default=None, description="Functions that the model may call.")
    tool_choice: str | dict[str, Any] | None = Field(default=None, description="auto or none.")
    parallel_tool_calls: bool | None = Field(default=None, description="true alone.")
    max_completion_tokens: int | None = Field(default=None, ge=0, description="Most tokens of an answer.")
    logprobs: bool | None = Field(default=None, description="Tell the probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=_MOST_TOP, description="And of so many of the likeliest.")
    response_format: dict[str, Any] | None = Field(default=None, description='{"type": "text"} alone.')
    metadata: dict[str, str] | None = Field(default=None, description="Taken and without effect.")
    service_tier: str | None = Field(default=None, description="Taken and without effect.")
    safety_identifier: str | None = Field(default=None, description="Taken and without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Taken and without effect.")

    @model_validator(mode="after")
    def _is_supported(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens: differ, and mean the same: give one")
        if self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice: must be auto or none")
        if self.parallel_tool_calls is False:
            raise ValueError("parallel_tool_calls: false is not supported")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError('response_format: must be {"type": "text"}')
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(description="Text, the ids of its tokens, or a list of either. What spells a control token is text.")
    suffix: str | None = Field(default=None, description="What follows the gap that is to be filled.")
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(
        default=None, ge=0, le=_MOST_TOP, description="Tell of so many of the likeliest tokens."
    )
    best_of: int | None = Field(default=None, ge=1, description="n alone.")

    @model_validator(mode="after")
    def _is_supported(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: other than n is not supported")
        if self.echo and self.suffix is not None:
            raise ValueError("echo: does not go with suffix")
        return self

    @property
    def asked_for(self) -> int:
        """How many answers are asked for."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [each for each in self.prompt if not isinstance(each, int)]
        return (
            several if len(several) == len(self.prompt) else [[each for each in self.prompt if isinstance(each, int)]]
        )


class TokenizeRequest(Body):
    """`POST /tokenize`: a conversation as the model is given it, or a text as its tokenizer reads it."""

    model: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    prompt: str | None = None
    add_special_tokens: bool = Field(default=True, description="BOS before a text, where the tokenizer adds it.")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give messages or prompt, one of them")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


class Keeper(Protocol):
    """What keeps judgements: each returns its id when it is on disk."""

    def rate(self, interaction: str, choice: int, value: Literal["up", "down"] | None, comment: str | None) -> str:
        """That an answer is good or bad."""

    def correct(self, interaction: str, choice: int, content: str) -> str:
        """What an answer should have been."""

    def prefer(self, chosen: tuple[str, int], rejected: tuple[str, int]) -> str:
        """That one answer is better than another."""

    def author(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """A dialogue that a person wrote."""


class Rating(Body):
    """That an answer is good or bad; the last word counts."""

    kind: Literal["rating"]
    id: Text
    choice: int = Field(default=0, ge=0)
    value: Literal["up", "down"] | None = Field(description="null takes back what was said.")
    comment: str | None = None

    def keep(self, store: Keeper) -> str:
        """Keep it."""
        return store.rate(self.id, self.choice, self.value, self.comment)


class Correction(Body):
    """The answer that a model should have given."""

    kind: Literal["correction"]
    id: Text
    choice: int = Field(default=0, ge=0)
    content: Text

    def keep(self, store: Keeper) -> str:
        """Keep it."""
        return store.correct(self.id, self.choice, self.content)


class AnswerName(Body):
    """One answer of a request."""

    id: Text
    choice: int = Field(default=0, ge=0)


class Preference(Body):
    """The better of two answers to the same conversation."""

    kind: Literal["preference"]
    chosen: AnswerName
    rejected: AnswerName

    def keep(self, store: Keeper) -> str:
        """Keep it."""
        return store.prefer((self.chosen.id, self.chosen.choice), (self.rejected.id, self.rejected.choice))


class Dialogue(Body):
    """A training dialogue that a person wrote."""

    kind: Literal["dialogue"]
    messages: Messages
    tools: Tools | None = None

    def keep(self, store: Keeper) -> str:
        """Keep it."""
        return store.author(self.messages, self.tools or ())


class Feedback(RootModel[Annotated[Rating | Correction | Preference | Dialogue, Field(discriminator="kind")]]):
    """`POST /api/feedback`: what a person makes of an answer, or wrote."""


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail
