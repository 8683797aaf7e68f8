"""Lists of messages, whoever wrote them, to Messages: roles, content, reasoning, tool calls, weights, order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from instil.conversation import ROLES, Conversation, Message, Role
from instil.data.row import Row, described
from instil.errors import nearest

ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight")
_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id", *_REASONING, *_WEIGHTS)
)


def asked(instruction: str, given: str) -> Message:
    """The user's message for an instruction and, where it is not empty, its input."""
    if not given.strip():
        return Message("user", instruction, fields={"instruction": instruction})
    content = f"{instruction}\n\n{given}" if instruction.strip() else given
    return Message("user", content, fields={"instruction": instruction, "input": given})


def gap(prefix: str, suffix: str) -> Message:
    """The user's message that asks for what stands between two texts."""
    return Message("user", prefix, fields={"prefix": prefix, "suffix": suffix})


_PARTS = (("instruction", "input", asked), ("prefix", "suffix", gap))


class Turn(NamedTuple):
    """A message, and the field of the row it was read from."""

    field: str
    message: Message


def read_messages(row: Row, field: str, value: Any) -> list[Turn] | None:
    """A list of messages, or one message alone, as turns.

    Args:
        row: Takes the problems.
        field: The column's name, for the problems.
        value: `[{"role", "content"}, ...]` or `[{"from", "value"}, ...]`.

    Returns:
        The turns; None where a message is so broken that its place in the order is unknown.
    """
    if isinstance(value, Mapping):
        turn = _read_message(row, field, value)
        return None if turn is None else [turn]
    if not isinstance(value, list):
        row.bad(field, f"must be a list of messages, and is {described(value)}")
        return None
    turns = [_read_message(row, f"{field}[{index}]", item) for index, item in enumerate(value)]
    found = [turn for turn in turns if turn is not None]
    return found if len(found) == len(turns) else None


_PLAIN_KEYS = {"role", "content"}


def _read_message(row: Row, field: str, item: Any) -> Turn | None:
    if isinstance(item, dict) and item.keys() == _PLAIN_KEYS:  # by far the most common, and quickly read
        role, content = item["role"], item["content"]
        if role in ("user", "assistant", "system") and isinstance(content, str) and content.strip():
            return Turn(field, Message(role, content))
    if not isinstance(item, Mapping):
        row.bad(field, f"must be a message with role and content, and is {described(item)}")
        return None
    named = _read_role(row, field, item)
    if named is None:
        return None
    role = ROLE_NAMES[named]
    known = len(row.problems)
    parts = _read_named_parts(row, field, item) if role == "user" else None
    fields = parts.fields if parts else {}
    for key in item.keys() - _KEYS - fields.keys():
        if item[key] is not None:
            row.unused.add(f"{field.rsplit('[', 1)[0]}[].{key}")
    if parts and _content_key(item) not in item:
        item = {**item, "content": parts.content}
    content, reasoning, calls = _read_content(row, field, item, named)
    if parts and content != parts.content:
        made = f"{' and '.join(fields)} make{'s' if len(fields) == 1 else ''}"
        row.bad(f"{field}.{_content_key(item)}", f"is not what {made}", "leave it out, or those")
    weight = _read_weight(row, field, item)
    message = Message(
        role,
        content,
        reasoning_content=reasoning,
        tool_calls=calls,
        name=_read_name(row, field, item, "name"),
        tool_call_id=_read_name(row, field, item, "tool_call_id"),
        weight=weight,
        fields=fields,
    )
    # An empty answer that is not trained does no harm; some histories hold one.
    if len(row.problems) == known and not content.strip() and not calls and weight != 0:
        if role == "assistant" and not row.empty_answers:
            row.bad(f"{field}.{_content_key(item)}", f"the answer is empty: {described(content)}")
        elif role == "user" and not any(map(str.strip, fields.values())):
            row.bad(f"{field}.{_content_key(item)}", f"the user's message is empty: {described(content)}")
    return Turn(field, message)


def _read_named_parts(row: Row, field: str, item: Mapping[str, Any]) -> Message | None:
    """A user's message whose parts have names, for templates that place them apart; None where they have none."""
    for first, second, made in _PARTS:
        if item.get(first) is not None:
            texts = [item[first], item.get(second) or ""]
            if all(row.is_text(f"{field}.{key}", text) for key, text in zip((first, second), texts, strict=True)):
                return made(*texts)
    return None


def _content_key(item: Mapping[str, Any]) -> str:
    return "value" if "value" in item and "content" not in item else "content"


def _read_role(row: Row, field: str, item: Mapping[str, Any]) -> str | None:
    key = "from" if "from" in item and "role" not in item else "role"
    if key not in item:
        row.bad(f"{field}.role", "is missing", "a message has role and content, or from and value")
        return None
    role = item[key]
    if isinstance(role, str) and role in ROLE_NAMES:
        return role
    remedy = nearest(role.strip().lower(), ROLE_NAMES) if isinstance(role, str) else f"known: {', '.join(ROLES)}"
    row.bad(f"{field}.{key}", f"no such role: {described(role)}", remedy)
    return None


def _read_content(
    row: Row, field: str, item: Mapping[str, Any], named: str
) -> tuple[str, str | None, tuple[Mapping[str, Any], ...]]:
    """Content, reasoning and tool calls, from the message's keys and the parts of its content."""
    key = _content_key(item)
    value = item.get(key)
    calls: list[Mapping[str, Any]] = []
    reasoning = _read_reasoning(row, field, item)
    if named == "function_call":
        return "", reasoning, tuple(read_tool_calls(row, f"{field}.{key}", value))
    if item.get("tool_calls") is not None:
        calls += read_tool_calls(row, f"{field}.tool_calls", item["tool_calls"])
    if item.get("function_call") is not None:
        calls += read_tool_calls(row, f"{field}.function_call", item["function_call"])
    content = ""
    if isinstance(value, str):
        content = value
    elif isinstance(value, list):
        content, thought, called = _read_parts(row, f"{field}.{key}", value)
        reasoning = (reasoning or "") + thought if thought else reasoning
        calls += called
    elif key not in item and not item.get("tool_calls") and not item.get("function_call"):
        row.bad(f"{field}.{key}", "is missing")
    elif value is None and not item.get("tool_calls") and not item.get("function_call"):
        row.bad(f"{field}.{key}", "is null, which only a message with tool_calls may be")
    elif value is not None:
        row.bad(f"{field}.{key}", f"must be a string or a list of parts, and is {described(value)}")
    if calls and ROLE_NAMES[named] != "assistant":
        row.bad(f"{field}.tool_calls", f"only an assistant calls tools, and this is {named}")
    return content, reasoning, tuple(calls)


def _read_reasoning(row: Row, field: str, item: Mapping[str, Any]) -> str | None:
    for key in _REASONING:
        value = item.get(key)
        if value is not None and row.is_text(f"{field}.{key}", value):
            return str(value)
    return None


def _read_parts(row: Row, field: str, parts: Sequence[Any]) -> tuple[str, str, list[Mapping[str, Any]]]:
    """Content in parts. Texts are set one after the other with nothing between, as chat templates do."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for index, part in enumerate(parts):
        place = f"{field}[{index}]"
        if not isinstance(part, Mapping):
            row.bad(place, f"must be a part with type and text, and is {described(part)}")
            continue
        kind = part.get("type")
        key = next((key for key in ("text", "value", "reasoning") if part.get(key) is not None), "text")
        value = part.get(key)
        if kind == "tool_call":
            calls += read_tool_calls(row, f"{place}.{key}", value)
        elif kind in ("text", "reasoning"):
            if row.is_text(f"{place}.{key}", value):
                (texts if kind == "text" else thoughts).append(str(value))
        elif isinstance(kind, str) and any(medium in kind for medium in ("image", "audio", "video", "file")):
            row.bad(f"{place}.type", f"{kind} is not supported: only text is trained", "leave such rows out")
        else:
            row.bad(f"{place}.type", f"no such part: {described(kind)}", "known: text, reasoning, tool_call")
    return "".join(texts), "".join(thoughts), calls


def _read_weight(row: Row, field: str, item: Mapping[str, Any]) -> float | None:
    for key in _WEIGHTS:
        value = item.get(key)
        if value is None:
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
        row.bad(f"{field}.{key}", f"must be a number from 0 up, and is {described(value)}", "0 leaves a message out")
    return None


def _read_name(row: Row, field: str, item: Mapping[str, Any], key: str) -> str | None:
    value = item.get(key)
    return value if value is not None and row.is_text(f"{field}.{key}", value) else None


def read_tool_calls(row: Row, field: str, value: Any) -> list[Mapping[str, Any]]:
    """Calls, in a list or alone, wrapped or bare, or their JSON text, as `Message.tool_calls` has them."""
    value = row.parsed(field, value)
    if isinstance(value, list):
        calls = [_read_call(row, f"{field}[{index}]", item) for index, item in enumerate(value)]
        return [call for call in calls if call is not None]
    call = _read_call(row, field, value)
    return [] if call is None else [call]


def _read_call(row: Row, field: str, item: Any) -> Mapping[str, Any] | None:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        row.bad(field, f"must be a call with name and arguments, and is {described(item)}")
        return None
    arguments = function.get("arguments")
    inside = f"{field}.function.arguments" if function is not item else f"{field}.arguments"
    if isinstance(arguments, str) and arguments.strip():
        before = len(row.problems)
        parsed = row.parsed(inside, arguments)
        if len(row.problems) > before:
            return None
        arguments = parsed
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        row.bad(inside, f"must be an object or the JSON text of one, and is {described(arguments)}")
        return None
    wrapped: dict[str, Any] = {"type": "function"}
    if isinstance(item.get("id"), str):
        wrapped["id"] = item["id"]
    return {**wrapped, "function": {"name": name, "arguments": arguments}}


def read_tools(row: Row, column: str) -> tuple[Mapping[str, Any], ...]:
    """The tools on offer, in a list or as its JSON text, each wrapped as a function."""
    if column not in row.values:
        return ()
    before = len(row.problems)
    value = row.structure(column)
    if value is None or value in ("", [], {}) or len(row.problems) > before:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        row.bad(column, f"must be a list of functions or its JSON text, and is {described(value)}")
        return ()
    tools: list[Mapping[str, Any]] = []
    for index, item in enumerate(value):
        item = row.parsed(f"{column}[{index}]", item)
        function = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            row.bad(f"{column}[{index}]", f"must be a function with its name, and is {described(item)}")
        else:
            tools.append(item if "function" in item else {"type": "function", "function": item})
    return tuple(tools)


def check_order(row: Row, turns: Sequence[Turn]) -> None:
    """Adds a problem for each turn that cannot follow the one before it."""
    before: Message | None = None
    for field, message in turns:
        reason = _disorder(before, message)
        if reason:
            place = field if "turn" in field else f"{field}.role"
            row.bad(place, f"turns out of order: {reason}", _ORDER_REMEDY.get(reason, ""))
        before = message


_ORDER_REMEDY = {
    "user follows user": "join the two into one message",
    "assistant follows assistant": "join the two into one message",
}


def _disorder(before: Message | None, message: Message) -> str:
    last = before.role if before else None
    opening = last in (None, "system", "developer")
    if message.role in ("system", "developer"):
        return "" if opening else f"{message.role} follows {last}, and belongs at the start"
    if message.role == "user":
        return "" if opening or last == "assistant" else f"user follows {last}"
    if message.role == "tool":
        called = before is not None and (last == "tool" or bool(before.tool_calls))
        return "" if called else f"tool follows {last or 'nothing'}, which called no tool"
    if opening:
        return "assistant comes first, before any user turn"
    return "" if last in ("user", "tool") else f"assistant follows {last}"


def conversation(row: Row, turns: Sequence[Turn], tools: tuple[Mapping[str, Any], ...]) -> Conversation:
    """The turns as a Conversation, their order checked."""
    check_order(row, turns)
    return Conversation(tuple(turn.message for turn in turns), tools)
