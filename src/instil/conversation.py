"""What a row of data becomes: conversations of messages, as frozen values, and their wire form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")

Kind = Literal["conversation", "preference", "labelled", "text", "prompt"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row stands: its file and its line (in `.parquet` and `.arrow`: its row), counted from 1.

    `column` counts characters from 1, and is 0 unless another row begins before this one on its line.
    """

    path: str
    line: int
    column: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}" if self.column else f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: Who speaks.
        content: The text, whole, whatever parts it came in.
        reasoning_content: What an assistant thought before it answered.
        tool_calls: An assistant's calls, each `{"type": "function", "id"?, "function": {"name", "arguments"}}`
            with the arguments as an object.
        name: The tool that a tool message comes from.
        tool_call_id: The call that a tool message answers.
        weight: The message's own weight in the loss; None leaves it to the configuration.
        fields: Named parts of the content that a template may place apart (`instruction` and `input`,
            `prefix` and `suffix`).
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """The message as chat templates and OpenAI's API take it, without the keys that are not set."""
        wire: dict[str, Any] = {"role": self.role, "content": self.content, **self.fields}
        if self.reasoning_content is not None:
            wire["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            wire["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            wire["name"] = self.name
        if self.tool_call_id is not None:
            wire["tool_call_id"] = self.tool_call_id
        return wire

    def to_data(self) -> dict[str, Any]:
        """The message as rows of data write it: `to_wire`, with its weight."""
        return self.to_wire() | ({} if self.weight is None else {"weight": self.weight})


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools on offer (each `{"type": "function", "function": {...}}`)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """The conversation as `{"messages": [...], "tools": [...]}`."""
        wire: dict[str, Any] = {"messages": [message.to_wire() for message in self.messages]}
        if self.tools:
            wire["tools"] = list(self.tools)
        return wire


@dataclass(frozen=True, slots=True)
class Record:
    """One row of data, read.

    Args:
        source: Where it stands.
        shape: The shape it was recognized by (`alpaca`, `messages`, …).
        kind: `conversation`: each conversation is trained (one row of Self-Instruct holds several).
            `preference`: whole conversations that share their prompt, the chosen one first, then the rejected.
            `labelled`: one conversation whose last answer is good or bad. `text`: one assistant message, rendered
            by no template. `prompt`: ends before the answer; for evaluation.
        conversations: One or more, as `kind` says.
        labels: One for each conversation: "" in supervised data, `chosen`, `rejected`, `good` or `bad`.
        later_turns: What the user says after each answer to come (`prompt` only).
        extra: The columns that the shape does not use, as they stood.
    """

    source: Source
    shape: str
    kind: Kind
    conversations: tuple[Conversation, ...]
    labels: tuple[str, ...] = ("",)
    later_turns: tuple[tuple[Message, ...], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
