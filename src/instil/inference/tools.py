"""Tool calls read back from an answer, in the format of the model's own chat template.

No format is known by a model's name. The template renders calls, and what it writes around them is read off; the format
counts as known only if other calls, rendered by the same template, are read back as they were.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from instil.conversation import Conversation, Message
from instil.data.strict_json import StrictDecoder, parse
from instil.errors import TemplateError
from instil.inference.session import frame
from instil.prompt import Renderer

_NAME = re.compile(r"[\w.-]+")  # of a function, where it stands outside of the JSON
_HEAD = 500
"""Characters in which a text shows that no call begins with it."""

_SAID = "zqSaidqz"
_USER = Message("user", "a")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function.

    Args:
        name: The function.
        arguments: By name, as plain JSON values.
        id: What the model itself named the call; None where its format has no place for that.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """The call as `Message.tool_calls` has it."""
        named = {} if self.id is None else {"id": self.id}
        return {"type": "function", **named, "function": {"name": self.name, "arguments": self.arguments}}


_PROBES = (
    ToolCall("zqFirstqz", {"zqWhereqz": "zqThereqz", "zqManyqz": 7}, "zqCallOne"),
    ToolCall("zqSecondqz", {"zqWhenqz": "zqThenqz"}, "zqCallTwo"),
)
_OTHERS = (
    ToolCall("look_up", {"q": 'a "b"\n\\ <c> é', "n": [1.5, True, None, {"k": {}}]}, "zqCall333"),
    ToolCall("zq.other-2", {}, "zqCall444"),
)
_TOOLS = tuple(
    {"type": "function", "function": {"name": call.name, "description": "a", "parameters": {"type": "object"}}}
    for call in (*_PROBES, *_OTHERS)
)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a template writes calls: the opening, a call, `between` and a call for each further one, the closing.

    White space in these texts and around them may differ.

    Args:
        opening: What stands before the first call. Where it is no more than brackets (Llama 3.1), only an answer that
            is calls of known functions as a whole is read as calls.
        between: What stands between two calls; None if an answer has a place for one.
        closing: What stands behind the last.
        middle: What stands between the function's name and the JSON object of its arguments; None if the name stands
            in the object.
        name_key: Where in the object the name stands.
        arguments_key: Where in the object the arguments stand, as an object or as JSON text.
        id_key: Where in the object the call's id stands, if it has a place for one.
        separator: White space between what is said before the calls and the opening.
        thinks: Whether the prompt opens `<think>`, so that an answer begins with reasoning.
        tokens: The special tokens among these texts. They must not be left out of an answer's text.
        stop: The token that ends an answer with calls.
    """

    opening: str
    between: str | None
    closing: str
    middle: str | None = None
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str | None = None
    separator: str = ""
    thinks: bool = False
    tokens: tuple[str, ...] = ()
    stop: str = ""

    def parse(self, text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
        """What an answer says before its calls, and the calls.

        Malformed JSON, a call cut off, or text behind the last call: then all is what it says, and there are no calls.

        Args:
            text: The answer whole, with `tokens` and without the stop token.
            names: The functions on offer.
        """
        body = self._body(text)
        found = None if body is None else self._begin(text, body)
        calls = self._calls(text, found.start()) if found else []
        if not found or not calls or (self.bare and any(call.name not in names for call in calls)):
            return text, []
        said = text[: found.start()]
        return said if body and not said[body:].strip() else said.removesuffix(self.separator), calls

    def certain(self, text: str, given: int) -> int:
        """The end of what an answer so far surely says before its calls, if it has any.

        Args:
            text: The answer so far.
            given: The end of what was certain before.
        """
        body = self._body(text)
        if body is None:
            return len(text)
        if self.bare:
            return max(given, body) if self._may_begin(text[body : body + _HEAD]) else len(text)
        at = text.find(self.opening[0], max(given, body))
        while at >= 0 and not self._may_begin(text[at : at + _HEAD]):
            at = text.find(self.opening[0], at + 1)
        sure = text[given:] if at < 0 else text[given:at]
        return given + len(sure.rstrip())  # the rest may separate it from a call

    def _calls(self, text: str, at: int) -> list[ToolCall]:
        """The calls that the text consists of from here to its end; none if it does not."""
        calls: list[ToolCall] = []
        marker: str | None = self.opening
        decoder = StrictDecoder()
        while marker is not None:
            begin = _past(text, at, marker)
            found = None if begin is None else self._call(text, begin, decoder)
            if found is None:
                return []
            calls.append(found[0])
            at = found[1]
            if _past(text, at, self.closing) == len(text):
                return calls
            marker = self.between
        return []

    def _call(self, text: str, at: int, decoder: StrictDecoder) -> tuple[ToolCall, int] | None:
        """The call that begins here, and where it ends."""
        named = _NAME.match(text, at) if self.middle is not None else None
        begin = _past(text, named.end(), self.middle or "") if named else at
        if begin is None or (self.middle is not None and named is None):
            return None
        try:
            value, end = decoder.decode_at(text, begin)
        except (ValueError, RecursionError):
            return None
        if decoder.faults or not isinstance(value, dict):
            return None
        if named:
            return ToolCall(named[0], value), end
        name, arguments = value.get(self.name_key), _object(value.get(self.arguments_key))
        own = value.get(self.id_key) if self.id_key else None
        if not isinstance(name, str) or arguments is None:
            return None
        return ToolCall(name, arguments, own if isinstance(own, str) else None), end

    def _body(self, text: str) -> int | None:
        """Where the reasoning that an answer begins with ends; None if it does not end."""
        if not self.thinks and not text.lstrip().startswith("<think>"):
            return 0
        at = text.find("</think>")
        return None if at < 0 else at + len("</think>")

    def _begin(self, text: str, body: int) -> re.Match[str] | None:
        """Where the first call begins, if one does."""
        name = "" if self.middle is None else rf"{_NAME.pattern}\s*{_loose(self.middle)}"
        begin = re.compile(rf"{_loose(self.opening)}\s*{name}\s*(?=\{{)")
        if not self.bare:
            return begin.search(text, body)
        spaces = len(text[body:]) - len(text[body:].lstrip())
        return begin.match(text, body + spaces)

    @property
    def bare(self) -> bool:
        """Whether the opening alone does not tell a call from what is said."""
        return not self.opening.strip("[{( \n")

    def _may_begin(self, text: str) -> bool:
        """Whether calls may begin with this text, whatever follows."""
        opened = re.compile(rf"{_loose(self.opening)}\s*").match(text)
        if opened is None:
            return _squeezed(self.opening).startswith(_squeezed(text))
        rest, then = text[opened.end() :], "{"
        if self.middle is not None:
            named = _NAME.match(rest)
            if named is None:
                return not rest
            rest, then = rest[named.end() :], _squeezed(self.middle) + "{"
        return then.startswith(_squeezed(rest)[: len(then)])


class CallStream:
    """The text of an answer as it comes, less what is or may be a call.

    Args:
        form: How the template writes calls.
        names: The functions on offer.
    """

    def __init__(self, form: CallFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._text = ""
        self._given = 0

    def push(self, piece: str) -> str:
        """Take a piece of the text; return what is certain now, perhaps nothing."""
        self._text += piece
        before, self._given = self._given, self._form.certain(self._text, self._given)
        return self._text[before : self._given]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of what the answer says, and its calls, when no piece comes any more."""
        said, calls = self._form.parse(self._text, self._names)
        return said[self._given :], calls


class _Written(NamedTuple):
    """A call in a rendering: where it stands, and how it is written."""

    start: int
    end: int
    middle: str | None
    keys: Mapping[str, str]


def call_format(renderer: Renderer) -> CallFormat | None:
    """How the template writes calls; None if not as JSON, or in a way that cannot be read back."""
    rendered = _rendered(renderer, _PROBES[:1])
    one = rendered and _written(rendered[0], 0, _PROBES[0])
    if not rendered or not one:
        return None
    text, stop = rendered
    opening, separator = _opening(renderer, text[: one.start])
    found = CallFormat(
        opening=opening,
        between=_between(renderer),
        closing=text[one.end :].strip(),
        middle=None if one.middle is None else one.middle.strip(),
        name_key=one.keys.get("name", "name"),
        arguments_key=one.keys.get("arguments", "arguments"),
        id_key=one.keys.get("id"),
        separator=separator,
        thinks=_rendered_prompt(renderer).rstrip().endswith("<think>"),
        stop=stop,
    )
    found = replace(found, tokens=_special(renderer, found))
    return found if _reads_back(found, renderer) else None


def _reads_back(form: CallFormat, renderer: Renderer) -> bool:
    """Whether other calls, alone and beside text, come back as they were."""
    if form.separator.strip() or (form.middle and _NAME.match(form.middle)):
        return False
    names = [call.name for call in _OTHERS]
    for calls in (_OTHERS[:1], _OTHERS[1:] if form.between is None else _OTHERS):
        wanted = [call if form.id_key else replace(call, id=None) for call in calls]
        for said in ("",) if form.bare else ("", _SAID):
            rendered = _rendered(renderer, calls, said)
            if rendered is None and said:
                continue  # it has no place for text beside a call
            if rendered is None or form.parse(rendered[0], names)[1] != wanted:
                return False
    return True


def _rendered(renderer: Renderer, calls: Sequence[ToolCall], said: str = "") -> tuple[str, str] | None:
    """An answer with calls, as the template renders it, and the stop token behind it; None if it refuses that."""
    wire = tuple(call.to_wire() for call in calls)
    for reasoning in (None, "a"):  # some open <think> for the model, and take no answer without reasoning
        answer = Message("assistant", said, reasoning, wire)
        with suppress(TemplateError):
            text = renderer.exchange(Conversation((_USER, answer), _TOOLS), 1).completion
            stop = next((token for token in renderer.stop_tokens if text.endswith(token)), "")
            return text.removesuffix(stop), stop
    return None


def _rendered_prompt(renderer: Renderer) -> str:
    return renderer.prompt(Conversation((_USER,), _TOOLS)).prompt


def _written(text: str, at: int, call: ToolCall) -> _Written | None:
    """The first place from here on where the call stands as JSON, or its arguments do, behind its name."""
    decoder = StrictDecoder()
    wanted = {"name": call.name, "arguments": call.arguments, "id": call.id}
    for brace in (found.start() for found in re.finditer(r"\{", text) if found.start() >= at):
        try:
            value, end = decoder.decode_at(text, brace)
        except (ValueError, RecursionError):
            continue
        if value == call.arguments:
            start = text.rfind(call.name, at, brace)
            return None if start < 0 else _Written(start, end, text[start + len(call.name) : brace], {})
        keys = {
            what: key for key, item in value.items() for what, own in wanted.items() if own in (item, _object(item))
        }
        if keys.keys() >= {"name", "arguments"}:
            return _Written(brace, end, None, keys)
    return None


def _between(renderer: Renderer) -> str | None:
    """What stands between two calls, if the template has a place for two."""
    rendered = _rendered(renderer, _PROBES)
    one = rendered and _written(rendered[0], 0, _PROBES[0])
    two = rendered and one and _written(rendered[0], one.end, _PROBES[1])
    return rendered[0][one.end : two.start].strip() if rendered and one and two else None


def _opening(renderer: Renderer, before: str) -> tuple[str, str]:
    """What opens the calls, and what stands between it and the text before them.

    Args:
        renderer: The template.
        before: What it puts before a call that stands alone.
    """
    rendered = _rendered(renderer, _PROBES[:1], _SAID)
    one = rendered and _written(rendered[0], 0, _PROBES[0])
    if not rendered or not one:  # no text beside calls: what stands before an answer is known of a plain one
        return before.removeprefix(frame(renderer)[0]).rpartition("</think>")[2].strip(), ""
    behind = rendered[0][: one.start].rpartition(_SAID)[2]
    opening = os.path.commonprefix([before[::-1], behind[::-1]])[::-1].strip()  # noqa: RUF071 (texts, not paths)
    return opening, behind[: behind.rindex(opening)]


def _special(renderer: Renderer, form: CallFormat) -> tuple[str, ...]:
    """The special tokens among the texts of a format."""
    added = renderer.tokenizer.backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    texts = (form.opening, form.middle or "", form.between or "", form.closing)
    return tuple(dict.fromkeys(name for text in texts for name in renderer.encoder.spelled(text) if name in special))


def _object(value: Any) -> dict[str, Any] | None:
    """Arguments given as an object or as its JSON text."""
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _past(text: str, at: int, marker: str) -> int | None:
    """The end of a marker and the white space around it, if it stands here."""
    found = re.compile(rf"\s*{_loose(marker)}\s*").match(text, at)
    return found.end() if found else None


@lru_cache
def _loose(marker: str) -> str:
    """A pattern of the marker with any white space where it has some."""
    return r"\s*".join(map(re.escape, marker.split()))


def _squeezed(text: str) -> str:
    return "".join(text.split())
