"""Conversations to exchanges as text: where the prompt ends, where the answer stops, whose text stands where.

`prompt = render(messages[:i], answer=True)` and `completion = render(messages[:i+1])` less that prompt, cut after the
stop token. Nothing is searched for by its spelling: what a message says is followed through the template by marks
that no text holds, and the rendering less the marks must be the rendering.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from instil.conversation import Conversation, Message
from instil.errors import TemplateError
from instil.prompt.template import ChatTemplate, template_warnings
from instil.prompt.tokenizer import Encoder, Piece, Tokenizer

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them free for a program's own use
_PLAIN_KEYS = {"role", "content"}
_PROBE = "zqProbeqz"
_THINK = re.compile(r"\s*(?:<think>)?(?P<inside>.*?)</think>", re.DOTALL)

Wire = dict[str, Any]
_USER: Wire = {"role": "user", "content": "a"}
_ANSWER: Wire = {"role": "assistant", "content": "a"}
_CALL: Wire = {"type": "function", "id": "a", "function": {"name": "a", "arguments": {"a": _PROBE}}}


@dataclass(frozen=True, slots=True)
class Span:
    """Text of a message in a rendering: characters `start` to `end` of message `message`."""

    message: int
    reasoning: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Rendering:
    """What a template rendered, where that only spells control tokens, and where the messages' text stands in it."""

    text: str
    plain_at: frozenset[int] = frozenset()
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class TextExchange:
    """An exchange before its tokens.

    Args:
        prompt: The rendering up to where the model answers.
        full: The prompt and the completion after it.
        plain_at: Where a control token is only spelled by a message, in characters of `full`.
        spans: Where the messages' text stands in `full`; empty unless it was asked for.
        first_plain: Whether the completion is a text of its own, not the continuation of its prompt (plain text
            behind BOS).
    """

    prompt: str
    full: str
    plain_at: frozenset[int] = frozenset()
    spans: tuple[Span, ...] = ()
    first_plain: bool = False

    @property
    def completion(self) -> str:
        """What the model is to answer."""
        return self.full[len(self.prompt) :]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a template ends one kind of answer.

    Args:
        stop: The token that ends it.
        tail: `inside`: what the rendering holds from the stop token on. `append`: what is put behind the rendering.
        where: Whether the template renders the stop token itself.
    """

    stop: str
    tail: str
    where: Literal["inside", "append"]


class Renderer:
    """Renders conversations with one template for one tokenizer.

    Args:
        template: The chat template.
        tokenizer: The tokenizer that it is bound to.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.warnings = template_warnings(template, tokenizer)
        self.encoder = Encoder(tokenizer, control_tokens(template, tokenizer))
        self.stop_tokens: dict[str, None] = {}
        self._endings: dict[tuple[Any, ...], Ending] = {}
        self._text_arguments: bool | None = None
        self._content_parts = self._takes_only_parts()
        self.structure = self._structure_tokens()
        self.markers = frozenset(t for t in self.encoder.controls if template.spells(t)) - self.structure

    def wire(self, conversation: Conversation) -> tuple[list[Wire], list[Wire]]:
        """The messages and tools as they are given to the template, in training as in serving."""
        return self._adapted([message.to_wire() for message in conversation.messages]), _tools(conversation)

    def prompt(self, conversation: Conversation, *, follow: bool = False) -> TextExchange:
        """The prompt that a conversation's messages make, with no completion."""
        messages, tools = [message.to_wire() for message in conversation.messages], _tools(conversation)
        prompt = self._render(messages, tools, self._spells(messages, tools), answer=True, follow=follow)
        return TextExchange(prompt.text, prompt.text, prompt.plain_at, prompt.spans)

    def exchange(self, conversation: Conversation, turn: int, *, follow: bool = False) -> TextExchange:
        """The exchange that trains one assistant turn.

        Args:
            conversation: The whole conversation.
            turn: The number of the assistant message.
            follow: Whether to find out where the messages' text stands.

        Raises:
            TemplateError: The template refuses the messages, the prompt is not a prefix of the rendering, a message
                cannot be followed, or the answer is left out.
        """
        messages, tools = [message.to_wire() for message in conversation.messages], _tools(conversation)
        spelled = self._spells(messages[: turn + 1], tools)
        before = self._render(messages[:turn], tools, spelled, answer=True, follow=follow)
        after = self._render(messages[: turn + 1], tools, spelled, answer=False, follow=follow)
        prompt = before.text
        if not after.text.startswith(prompt):
            after = self._reasoned(prompt, after, messages[turn], turn)
        if not after.text.startswith(prompt):
            raise _seam_error(prompt, after.text, messages[turn], self.template)
        full = self._ended(after.text, messages[: turn + 1], tools)
        if len(full) == len(prompt):
            raise TemplateError("the template leaves the answer out", "Choose another template, or mend this one.")
        _check_answer(full[len(prompt) :], messages[turn], self.template)
        plain_at = frozenset(at for at in after.plain_at if len(prompt) <= at < len(full))
        answer = tuple(span for span in after.spans if span.message == turn) if follow else ()
        return TextExchange(prompt, full, before.plain_at | plain_at, before.spans + answer)

    def document(self, message: Message) -> TextExchange:
        """Plain text, rendered by no template: behind BOS, if the tokenizer adds it, and before EOS."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        full = bos + message.content + eos
        if eos:
            self.stop_tokens[eos] = None
        spelled = {len(bos) + found.start() for found in self.encoder.pattern.finditer(message.content)}
        return TextExchange(
            bos, full, frozenset(spelled), (Span(0, False, len(bos), len(bos) + len(message.content)),), True
        )

    def _render(
        self, messages: Sequence[Wire], tools: Sequence[Wire], spelled: bool, *, answer: bool, follow: bool
    ) -> _Rendering:
        plain = self._call(messages, tools, answer=answer)
        spans = self._follow(messages, tools, plain, answer) if follow else ()
        if not spelled:
            return _Rendering(plain, frozenset(), spans)
        (mark,) = _unused(plain, 1)
        for breakable in (frozenset(self.encoder.controls), self.structure):
            broken = [self._broken_message(message, breakable, mark) for message in messages]
            broken_tools = [self._broken(tool, breakable, mark) for tool in tools]
            text = self._call(broken, broken_tools, answer=answer)
            if text.replace(mark, "") == plain:
                breaks = (found.start() for found in re.finditer(mark, text))
                return _Rendering(plain, frozenset(at - number - 1 for number, at in enumerate(breaks)), spans)
        raise TemplateError(
            "a message spells a control token, and the template reads that text rather than passing it on, "
            "so it cannot be kept plain",
            "Take the control token out of the message.",
        )

    def _follow(self, messages: Sequence[Wire], tools: Sequence[Wire], plain: str, answer: bool) -> tuple[Span, ...]:
        """Where each message's text stands in `plain`, which is the rendering without marks."""
        opening, closing, end = marks = _unused(plain, 3)
        text = self._call([_marked(message, i, marks) for i, message in enumerate(messages)], tools, answer=answer)
        mark = re.compile(f"([{opening}{closing}])([0-9]+){end}")
        spans, opened, removed = [], {}, 0
        for found in mark.finditer(text):
            at, code = found.start() - removed, int(found[2])
            removed += len(found[0])
            if found[1] == opening:
                opened[code] = at
            elif code in opened:
                number, reasoning = divmod(code, 2)
                spans.append(Span(number, bool(reasoning), opened.pop(code), at))
        if mark.sub("", text) != plain:
            raise TemplateError(
                "the template changes the text of a message, so it cannot be followed through the rendering",
                "Train the answer only (--prompt-weight 0, --train-reasoning), or choose another template.",
            )
        return tuple(spans)

    def _reasoned(self, prompt: str, whole: _Rendering, answer: Wire, number: int) -> _Rendering:
        """The rendering with the reasoning put back, where the prompt opens <think> and the template renders none of
        it (DeepSeek-R1): the model, served with this prompt, must think, close, and answer.
        """
        head = prompt.rstrip().removesuffix("<think>")
        reasoning, rest = _reasoning(answer).strip(), whole.text[len(head) :]
        opened = head != prompt.rstrip() and whole.text.startswith(head) and not rest.startswith("<think>")
        if not opened or not reasoning:
            return whole
        text = f"{prompt}{reasoning}\n</think>\n\n" + rest.lstrip("\n")
        start, moved = len(prompt), len(text) - len(whole.text)
        return _Rendering(
            text,
            frozenset(at + moved for at in whole.plain_at if at >= len(head))
            | {start + found.start() for found in self.encoder.pattern.finditer(reasoning)},
            (
                Span(number, True, start, start + len(reasoning)),
                *(replace(span, start=span.start + moved, end=span.end + moved) for span in whole.spans),
            ),
        )

    def _ended(self, whole: str, messages: Sequence[Wire], tools: Sequence[Wire]) -> str:
        """The rendering up to and including the stop token of its last message."""
        last = messages[-1]
        kind = (
            bool(last.get("content")),
            len(last.get("tool_calls", ())),
            last.get("reasoning_content") is not None,
            bool(tools),
        )
        ending = self._endings.get(kind)
        if ending is None or (ending.where == "inside" and not whole.endswith(ending.tail)):
            ending = self._endings[kind] = self._find_ending(messages, tools)
        self.stop_tokens[ending.stop] = None
        if ending.where == "append":
            return whole + ending.tail
        if not whole.endswith(ending.tail):
            raise TemplateError("the template ends this answer in a way that cannot be told apart from its text")
        return whole[: len(whole) - len(ending.tail) + len(ending.stop)]

    def _find_ending(self, messages: Sequence[Wire], tools: Sequence[Wire]) -> Ending:
        """Probe how the last message's kind ends: render it with a known text, last and with a turn after it.

        Where a template renders no stop token: the token of the next turn if that follows at once, else EOS.
        """
        *before, last = messages
        probe = [*before, _probe(last)]
        behind = _after_probe(self._call(probe, tools), last)
        try:
            in_history = _after_probe(self._call([*probe, _next_turn(last)], tools), last)
        except TemplateError:
            in_history = behind
        usual = self._find_ending([*before, _ANSWER], tools) if last.get("tool_calls") else None
        found = self._rendered_stop(behind, in_history, usual)
        if found:
            stop = found.text.strip()
            return Ending(stop, behind[behind.index(stop, found.start) :], "inside")
        rest = self.encoder.cut(in_history[len(behind) :]) if in_history.startswith(behind) else []
        head = rest[1:] if rest and rest[0].control is None and not rest[0].text.strip() else rest
        if head and head[0].control is not None:
            return Ending(
                head[0].text.strip(), in_history[len(behind) :][: head[0].start] + head[0].text.strip(), "append"
            )
        if not self.tokenizer.eos_token:
            raise TemplateError(
                "the template ends its answers in no special token, and the tokenizer has no EOS",
                "Choose a template that ends its answers (`instil templates`).",
            )
        return Ending(self.tokenizer.eos_token, self.tokenizer.eos_token, "append")

    def _rendered_stop(self, behind: str, in_history: str, usual: Ending | None) -> Piece | None:
        """The stop token in what follows a text as the last (`behind`) and in the history, if one is rendered.

        A call ends as a plain answer does (`usual`) if it can: what else closes it may be a marker of the call, and
        where a plain answer's end is not rendered it is none but that. Else it is the last control token that
        follows in both; where the last message ends otherwise than one in the history, the first that follows it.
        """
        if usual and usual.where == "append":
            return None
        after, common = (
            [piece for piece in self.encoder.cut(text) if piece.control is not None]
            for text in (behind, _common_prefix(behind, in_history))
        )
        as_usual = [piece for piece in after if usual and piece.text.strip() == usual.stop]
        return next(iter(as_usual[:1] + common[-1:] + after[:1]), None)

    def _structure_tokens(self) -> frozenset[str]:
        """The control tokens that build turns: around a system and a user message, opening the answer, ending it, BOS,
        EOS, …
        """
        names: set[str] = {value for value in self.tokenizer.special_tokens.values() if isinstance(value, str)}
        for messages in ([_USER], [{"role": "system", "content": "a"}, _USER]):
            try:
                asked, opened = (self.encoder.spelled(self._call(messages, answer=answer)) for answer in (False, True))
            except TemplateError:
                continue
            # Think markers are an answer's, also where the prompt opens one or a default system message explains them.
            names.update(name for name in asked + opened if "think" not in name)
        for answer in (_ANSWER, {**_ANSWER, "tool_calls": [_CALL]}):
            with suppress(TemplateError):
                names.add(self._find_ending([_USER, answer], ()).stop)
        return frozenset(names & self.encoder.controls.keys())

    def _spells(self, messages: Sequence[Wire], tools: Sequence[Wire]) -> bool:
        """Whether a message or tool spells a control token."""
        texts: list[str] = []
        for message in messages:
            texts += [message["content"]] if message.keys() == _PLAIN_KEYS else _texts(message)
        return bool(self.encoder.spelled("\0".join(texts + _texts(tools))))

    def _broken(self, node: Any, breakable: frozenset[str], mark: str) -> Any:
        """The texts of a message or tool with a mark in each control token that they spell."""

        def put(found: re.Match[str]) -> str:
            return found[0][0] + mark + found[0][1:] if found[0] in breakable else found[0]

        return _map_texts(node, lambda text: self.encoder.pattern.sub(put, text))

    def _broken_message(self, message: Wire, breakable: frozenset[str], mark: str) -> Wire:
        """The same for a message; the markers in what an assistant says are meant."""
        meant = {"content": self.markers} if message["role"] == "assistant" else {}
        return {
            key: value if key == "role" else self._broken(value, breakable - meant.get(key, frozenset()), mark)
            for key, value in message.items()
        }

    def _call(self, messages: Sequence[Wire], tools: Sequence[Wire] = (), *, answer: bool = False) -> str:
        return self.template.render(self._adapted(messages), tools, answer=answer)

    def _adapted(self, messages: Sequence[Wire]) -> list[Wire]:
        """The messages in the form that this template takes: where it knows no developer, `developer` is `system`;
        where it takes no text as content, the text is a part; where it takes no object, arguments are JSON text.
        """
        adapted = [dict(message) for message in messages]
        for message in adapted:
            if message["role"] == "developer" and not self.template.spells("developer"):
                message["role"] = "system"
            if message.get("tool_calls") and self._takes_text_arguments():
                message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if self._content_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return adapted

    def _takes_only_parts(self) -> bool:
        return not _renders(self.template, _PROBE) and _renders(self.template, [{"type": "text", "text": _PROBE}])

    def _takes_text_arguments(self) -> bool:
        """Whether a call's arguments must be given as JSON text (an object is tried first)."""
        if self._text_arguments is None:
            as_object, as_text = (
                _renders(self.template, "", tool_calls=[call]) for call in (_CALL, _with_text_arguments(_CALL))
            )
            self._text_arguments = as_text and not as_object
        return self._text_arguments


def _renders(template: ChatTemplate, content: Any, **call: Any) -> bool:
    """Whether the probe comes through in a user's content, or in an assistant's call."""
    user: Wire = {"role": "user", "content": "a" if call else content}
    try:
        text = template.render([user, {"role": "assistant", "content": content, **call}] if call else [user])
    except TemplateError:
        return False
    return _PROBE in text


def _tools(conversation: Conversation) -> list[Wire]:
    return [dict(tool) for tool in conversation.tools]


def control_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """The tokens that steer the model: all special ones, and the added ones that the template itself writes."""
    return [
        token.content
        for token in tokenizer.backend.get_added_tokens_decoder().values()
        if token.special or (template.spells(token.content) and not token.content.replace(" ", "").isalnum())
    ]


def _texts(node: Any) -> list[str]:
    """Every text that messages or tools hold; the keys too, for a call's arguments are named by the data."""
    texts, pending = [], [node]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict | Mapping):  # a dict is known as such much faster than as a Mapping
            pending += item
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return texts


def _map_texts(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {_map_texts(key, change): _map_texts(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_map_texts(item, change) for item in node]
    return node


def _unused(text: str, count: int) -> list[str]:
    """Characters to mark text with: any that the rendering does not hold."""
    free = [mark for mark in _NONCHARACTERS if mark not in text][:count]
    if len(free) < count:
        raise TemplateError(
            "the text holds nearly all of Unicode's noncharacters U+FDD0 to U+FDEF, so none is left to mark it with",
            "Take them out: they are no text.",
        )
    return free


def _with_marked_texts(call: Mapping[str, Any], mark: Callable[[str], str]) -> Wire:
    """The call with marks around its function's name and the texts among its arguments; the keys stay."""

    def inside(node: Any) -> Any:
        if isinstance(node, str):
            return mark(node)
        if isinstance(node, Mapping):
            return {key: inside(value) for key, value in node.items()}
        return [inside(item) for item in node] if isinstance(node, list | tuple) else node

    function = call["function"]
    changed = {"name": mark(function["name"]), "arguments": inside(function["arguments"])}
    return {**call, "function": {**function, **changed}}


def _marked(message: Wire, number: int, marks: Sequence[str]) -> Wire:
    """The message with a mark on either side of its texts, inside the white space that a template may trim. A mark's
    number is twice that of the message, plus one for its reasoning.
    """
    opening, closing, end = marks

    def mark(text: str, code: int) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        return f"{text[:at]}{opening}{code}{end}{core}{closing}{code}{end}{text[at + len(core) :]}"

    marked = dict(message)
    for key, value in message.items():
        if key == "reasoning_content":
            marked[key] = mark(value, 2 * number + 1)
        elif key == "tool_calls":
            marked[key] = [_with_marked_texts(call, lambda text: mark(text, 2 * number)) for call in value]
        elif isinstance(value, str) and key not in ("role", "name", "tool_call_id"):
            marked[key] = mark(value, 2 * number)
    thought = _THINK.match(message["content"]) if message["role"] == "assistant" else None
    if thought:
        inside = mark(thought["inside"], 2 * number + 1)
        answer = mark(message["content"][thought.end() :], 2 * number)
        marked["content"] = message["content"][: thought.start("inside")] + inside + "</think>" + answer
    return marked


def _probe(message: Wire) -> Wire:
    """The message with known texts: at the end of its content, if it has any, and as the arguments of its last call."""
    content = message["content"].rstrip()
    if not message.get("tool_calls"):
        return {**message, "content": content + _PROBE}
    *calls, last = message["tool_calls"]
    return {
        **message,
        "content": content and content + _PROBE,
        "tool_calls": [*calls, {**last, "function": {**last["function"], "arguments": {"probe": _PROBE}}}],
    }


def _next_turn(message: Wire) -> Wire:
    """What may come after an assistant's message: the tool's answer to its last call, or a user."""
    if not message.get("tool_calls"):
        return {"role": "user", "content": "a"}
    call = message["tool_calls"][-1]
    turn = {"role": "tool", "content": "a", "name": call["function"]["name"]}
    return {**turn, "tool_call_id": call["id"]} if "id" in call else turn


def _after_probe(text: str, message: Wire) -> str:
    """What follows the last of the texts that `_probe` put into the message."""
    calls = bool(message.get("tool_calls"))
    if text.count(_PROBE) < 1 + (calls and bool(message["content"].strip())):
        raise TemplateError(
            "the template leaves out the tool call, or the text beside it"
            if calls
            else "the template leaves the answer out",
            "Choose a template that renders it, or put the call into the content.",
        )
    return text.rpartition(_PROBE)[2]


def _with_text_arguments(call: Mapping[str, Any]) -> Wire:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _check_answer(completion: str, message: Wire, template: ChatTemplate) -> None:
    """An answer that the template drops would be trained away in silence."""
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in completion:
            raise TemplateError(
                f"the template {template.name!r} leaves out the call of {call['function']['name']!r}",
                "Choose a template that renders tool calls, or put the call into the content.",
            )
    content = message["content"].rpartition("</think>")[2].strip()
    if content and content not in completion:
        raise TemplateError(
            f"the template {template.name!r} leaves out or changes the answer's content",
            "Choose another template, or give the answer in the parts that this one renders.",
        )


def _reasoning(message: Wire) -> str:
    """What the assistant thought, given apart or at the head of the content."""
    thought = _THINK.match(message["content"])
    return message.get("reasoning_content") or (thought["inside"] if thought else "")


def _common_prefix(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071 (texts, not paths)


def _seam_error(prompt: str, whole: str, answer: Wire, template: ChatTemplate) -> TemplateError:
    """The error of a prompt that is no prefix of the rendering: both texts where they part, and what would mend it."""
    at = len(_common_prefix(prompt, whole))
    shown = max(0, at - 30)
    remedy = "The template renders this turn otherwise than it prompts for it: choose another, or mend it."
    opened, switch = prompt[max(0, at - 10) :], template.spells("enable_thinking")
    if "</think>" in opened and _reasoning(answer):
        remedy = "This template closes <think> before the model answers: leave the reasoning out"
        remedy += ", or set --template-args enable_thinking=true." if switch else "."
    elif "<think>" in opened and not _reasoning(answer):
        remedy = "This template opens <think> for the model: give the answer's `reasoning_content`"
        remedy += ", or set --template-args enable_thinking=false." if switch else "."
    return TemplateError(
        f"the serving prompt is not a prefix of the rendering: the prompt goes on {prompt[shown : at + 40]!r}, "
        f"the rendering {whole[shown : at + 40]!r}",
        remedy,
    )
