"""Conversations to exchanges as text: where the prompt ends, where the answer stops, whose text stands where.

`prompt = render(messages[:i], answer=True)` and `completion = render(messages[:i+1])` less that prompt, cut after the
stop token. Nothing is searched for by its spelling: what a message says is followed through the template by marks
that no text holds, and the rendering less the marks must be the rendering.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from instil.conversation import Conversation, Message
from instil.errors import TemplateError
from instil.prompt.template import ChatTemplate
from instil.prompt.tokenizer import Encoder, Tokenizer

# Unicode's noncharacters and the far end of its private use: no text is meant to hold them.
_BREAK = "\ufdd0"
_OPEN, _CLOSE = 0xF0000, 0x100000  # plus twice the number of the message, plus one for its reasoning
_MARK = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fff0]")
_PROBE = "zqProbeqz"
_THINK = re.compile(r"\s*<think>(?P<inside>.*?)</think>", re.DOTALL)

Wire = dict[str, Any]
_PLAIN: list[Wire] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]


@dataclass(frozen=True, slots=True)
class Span:
    """Text of a message in a rendering: characters `start` to `end` of message `message`."""

    message: int
    reasoning: bool
    start: int
    end: int


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
        text, plain_at, spans = self._render(messages, tools, answer=True, follow=follow)
        return TextExchange(text, text, plain_at, spans)

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
        prompt, prompt_plain, prompt_spans = self._render(messages[:turn], tools, answer=True, follow=follow)
        whole, plain_at, spans = self._render(messages[: turn + 1], tools, answer=False, follow=follow)
        if not whole.startswith(prompt):
            whole = _reasoned(prompt, whole, messages[turn])
        if not whole.startswith(prompt):
            raise _seam_error(prompt, whole, messages[turn], self.template)
        full = self._ended(whole, messages[: turn + 1], tools)
        if len(full) == len(prompt):
            raise TemplateError("the template leaves the answer out", "Choose another template, or mend this one.")
        _check_answer(full[len(prompt) :], messages[turn], self.template)
        answer = tuple(span for span in spans if span.message == turn)
        return TextExchange(prompt, full, _outside(plain_at, prompt, full) | prompt_plain, prompt_spans + answer)

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
        self, messages: Sequence[Wire], tools: Sequence[Wire], *, answer: bool, follow: bool
    ) -> tuple[str, frozenset[int], tuple[Span, ...]]:
        """The rendering, where it only spells control tokens, and where the messages' text stands."""
        plain = self._call(messages, tools, answer=answer)
        if not any(map(self._spelled, _texts([*messages, *tools]))):
            return plain, frozenset(), self._follow(messages, tools, plain, answer) if follow else ()
        for breakable in (self.encoder.controls.keys(), self.structure):
            broken = [_map_texts(message, self._breaker(message, breakable)) for message in messages]
            broken_tools = [_map_texts(tool, self._breaker({"role": "system"}, breakable)) for tool in tools]
            text = self._call(broken, broken_tools, answer=answer)
            if text.replace(_BREAK, "") == plain:
                breaks = [found.start() for found in re.finditer(_BREAK, text)]
                plain_at = frozenset(at - number - 1 for number, at in enumerate(breaks))
                spans = self._follow(messages, tools, plain, answer) if follow else ()
                return plain, plain_at, spans
        raise TemplateError(
            "a message spells a control token, and the template reads that text rather than passing it on, "
            "so it cannot be kept plain",
            "Take the control token out of the message.",
        )

    def _follow(self, messages: Sequence[Wire], tools: Sequence[Wire], plain: str, answer: bool) -> tuple[Span, ...]:
        """Where each message's text stands in `plain`, which is the rendering without marks."""
        marked = [_marked(message, number) for number, message in enumerate(messages)]
        text = self._call(marked, tools, answer=answer)
        spans, opened = [], {}
        for removed, found in enumerate(_MARK.finditer(text)):
            at, code = found.start() - removed, ord(found[0])
            if code < _CLOSE:
                opened[code - _OPEN] = at
            elif code - _CLOSE in opened:
                number, reasoning = divmod(code - _CLOSE, 2)
                spans.append(Span(number, bool(reasoning), opened.pop(code - _CLOSE), at))
        if _MARK.sub("", text) != plain:
            raise TemplateError(
                "the template changes the text of a message, so it cannot be followed through the rendering",
                "Train the answer only (--prompt-weight 0, --train-reasoning), or choose another template.",
            )
        return tuple(spans)

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

        The stop token is the last control token that follows the text in both; where a template ends the last
        message otherwise than one in the history, the first that follows it as the last; where it ends none, the
        token of the next turn if that follows at once, else EOS. (Where a plain answer's end is not rendered, what
        ends a call is a marker of the call.)
        """
        *before, last = messages
        probe = [*before, _probe(last)]
        behind = _after_probe(self._call(probe, tools))
        try:
            follower = _next_turn(last)
            in_history = _after_probe(self._call([*probe, follower], tools))
        except TemplateError:
            in_history = behind
        common = _common_prefix(behind, in_history)
        rendered = not last.get("tool_calls") or self._find_ending(_PLAIN, ()).where == "inside"
        for text, which in ((common, -1), (behind, 0)):
            stops = [piece for piece in self.encoder.cut(text) if piece.control is not None and rendered]
            if stops:
                stop = stops[which].text.strip()
                return Ending(stop, behind[behind.index(stop, stops[which].start) :], "inside")
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

    def _structure_tokens(self) -> frozenset[str]:
        """The control tokens that build turns: around a system and a user message, opening the answer, BOS, EOS, …"""
        user = {"role": "user", "content": "a"}
        names: set[str] = {value for value in self.tokenizer.special_tokens.values() if isinstance(value, str)}
        for messages in ([user], [{"role": "system", "content": "a"}, user]):
            try:
                text = self._call(messages)
                opened = self._call(messages, answer=True).removeprefix(text)
            except TemplateError:
                continue
            names.update(self.encoder.spelled(text))
            names.update(self.encoder.spelled(opened)[:1])
        return frozenset(names & self.encoder.controls.keys())

    def _spelled(self, text: str) -> bool:
        return bool(self.encoder.pattern.search(text)) and bool(self.encoder.spelled(text))

    def _breaker(self, message: Wire, breakable: Iterable[str]) -> Callable[[str], str]:
        names = frozenset(breakable) - (self.markers if message["role"] == "assistant" else frozenset())

        def put(found: re.Match[str]) -> str:
            return found[0][0] + _BREAK + found[0][1:] if found[0] in names else found[0]

        return lambda text: self.encoder.pattern.sub(put, text)

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
            call = {"type": "function", "id": "a", "function": {"name": "a", "arguments": {"a": _PROBE}}}
            as_object, as_text = (
                _renders(self.template, "", tool_calls=[one]) for one in (call, _with_text_arguments(call))
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
    """Every text that a message or tool holds, role names and keys aside."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, Mapping):
        return [text for key, value in node.items() if key != "role" for text in _texts(value)]
    if isinstance(node, list | tuple):
        return [text for item in node for text in _texts(item)]
    return []


def _map_texts(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {key: value if key == "role" else _map_texts(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_map_texts(item, change) for item in node]
    return node


def _marked(message: Wire, number: int) -> Wire:
    """The message with a mark on either side of its texts, inside the white space that a template may trim."""

    def mark(text: str, code: int) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        return text[:at] + chr(_OPEN + code) + core + chr(_CLOSE + code) + text[at + len(core) :]

    marked = dict(message)
    for key, value in message.items():
        if key == "reasoning_content":
            marked[key] = mark(value, 2 * number + 1)
        elif isinstance(value, str) and key not in ("role", "name", "tool_call_id"):
            marked[key] = mark(value, 2 * number)
    thought = _THINK.match(message["content"]) if message["role"] == "assistant" else None
    if thought:
        inside = mark(thought["inside"], 2 * number + 1)
        answer = mark(message["content"][thought.end() :], 2 * number)
        marked["content"] = message["content"][: thought.start("inside")] + inside + "</think>" + answer
    return marked


def _probe(message: Wire) -> Wire:
    """The message with its last text known: the last argument of its last call, or the end of its content."""
    if not message.get("tool_calls"):
        return {**message, "content": message["content"].rstrip() + _PROBE}
    *calls, last = message["tool_calls"]
    return {
        **message,
        "tool_calls": [*calls, {**last, "function": {**last["function"], "arguments": {"probe": _PROBE}}}],
    }


def _next_turn(message: Wire) -> Wire:
    """What may come after an assistant's message: the tool's answer to its last call, or a user."""
    if not message.get("tool_calls"):
        return {"role": "user", "content": "a"}
    call = message["tool_calls"][-1]
    turn = {"role": "tool", "content": "a", "name": call["function"]["name"]}
    return {**turn, "tool_call_id": call["id"]} if "id" in call else turn


def _after_probe(text: str) -> str:
    _, found, behind = text.rpartition(_PROBE)
    if not found:
        raise TemplateError(
            "the template leaves the answer out (it renders no tool calls, say)",
            "Choose a template that renders it, or put the call into the content.",
        )
    return behind


def _with_text_arguments(call: Mapping[str, Any]) -> Wire:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _outside(plain_at: frozenset[int], prompt: str, full: str) -> frozenset[int]:
    return frozenset(at for at in plain_at if len(prompt) <= at < len(full))


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


def _reasoned(prompt: str, whole: str, answer: Wire) -> str:
    """The rendering with the reasoning put back, where the prompt opens <think> and the template renders none of it
    (DeepSeek-R1): the model, served with this prompt, must think, close, and answer.
    """
    head = prompt.rstrip().removesuffix("<think>")
    reasoning = _reasoning(answer).strip()
    if head == prompt.rstrip() or not reasoning or not whole.startswith(head) or whole.startswith("<think>", len(head)):
        return whole
    return f"{prompt}{reasoning}\n</think>\n\n{whole[len(head) :]}"


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
