"""What is kept: an interaction with a model, and what a person made of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

JUDGEMENT = "feedback-"
"""What the ids of judgements begin with."""

JudgementKind = Literal["rating", "correction", "preference", "dialogue"]


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that a model gave.

    Args:
        content: Its text.
        tool_calls: Its calls, as OpenAI's API writes them.
        ended: `stop`, `stop-string`, `length` or `context`, as the engine says, or `stopped` by whoever asked.
        token_ids: Its tokens as they were generated; None where they are not kept.
    """

    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    ended: str = "stop"
    token_ids: tuple[int, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether the model ended it."""
        return self.ended in ("stop", "stop-string")

    def to_wire(self) -> dict[str, Any]:
        """The answer as an assistant's message."""
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return {"role": "assistant", "content": self.content, **calls}


@dataclass(frozen=True, slots=True)
class Interaction:
    """What a model was asked, and what it answered.

    Args:
        id: The id that the client was told.
        time: When it was asked.
        model: The name that the model is served under.
        model_hash: That of its weights.
        template: The name of its chat template; None where none was used.
        template_hash: That of the template's text.
        kind: Through the chat template, or a text gone on with.
        messages: What was answered, as OpenAI's API writes it.
        tools: The tools on offer.
        sampling: How the answers were drawn.
        prompt_ids: The tokens that the model was given; None where they are not kept.
        answers: By the numbers of their choices.
        client: The page, or another client of the API.
        redacted: Whether something was taken out of it; its tokens, which would tell it, are not kept then.
    """

    id: str
    time: datetime
    model: str
    model_hash: str
    template: str | None
    template_hash: str | None
    kind: Literal["chat", "completion"]
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    sampling: Mapping[str, Any]
    prompt_ids: tuple[int, ...] | None
    answers: tuple[Given, ...]
    client: Literal["page", "api"] = "api"
    redacted: bool = False


@dataclass(frozen=True, slots=True)
class Overview:
    """Of an interaction what is counted: its id, its time, its model, and how many answers it has."""

    id: str
    time: datetime
    model: str
    answers: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a person made of an answer, or wrote.

    Args:
        number: It is later than those of lower numbers.
        time: When.
        kind: What it is.
        interaction, choice: The answer it is about: of a preference the better one; None in a dialogue.
        rejected, rejected_choice: The worse answer of a preference.
        body: `value` (`up`, `down`, null) and `comment` of a rating, `content` of a correction, `messages` and `tools`
            of a dialogue.
        redacted: Whether something was taken out of it.
    """

    number: int
    time: datetime
    kind: JudgementKind
    interaction: str | None
    choice: int | None
    rejected: str | None
    rejected_choice: int | None
    body: Mapping[str, Any] = field(default_factory=dict)
    redacted: bool = False

    @property
    def id(self) -> str:
        """The id by which it can be deleted."""
        return f"{JUDGEMENT}{self.number}"


@dataclass(frozen=True, slots=True)
class Deleted:
    """How many interactions and judgements were deleted."""

    interactions: int
    judgements: int
