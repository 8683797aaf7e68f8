"""Records to exchanges of token ids, with the weight of each token in the loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from instil.conversation import ROLES, Conversation, Message, Record
from instil.errors import InstilError, RowProblem, TemplateError
from instil.prompt.exchange import Boundary, Exchange
from instil.prompt.options import PromptOptions
from instil.prompt.render import Renderer, Span, TextExchange
from instil.prompt.tokenizer import Cut, Encoder

Status = Literal["kept", "cut", "dropped", "rejected"]

_APART = "the prompts of chosen and rejected were not cut alike, or the first turn of one has weight 0"


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A row's exchanges, and what became of it on the way.

    Args:
        record: The row as it was read.
        exchanges: In the order of its answers.
        status: `kept` whole; `cut` (in part too long); `dropped` (nothing to train is left); `rejected` (a bad row).
        reason: Why, unless it was kept.
        problems: What is wrong with a rejected row.
        spelled: The control tokens that its messages spell and that were encoded as plain text.
        rewritten: Whether a later prompt does not begin with the earlier prompt and its completion.
        notes: What the template left out in silence.
        role_tokens: Tokens by whose text they are (`template` for what it adds), when they were asked for.
        role_trained: Those of them that are trained.
    """

    record: Record
    exchanges: tuple[Exchange, ...] = ()
    status: Status = "kept"
    reason: str = ""
    problems: tuple[RowProblem, ...] = ()
    spelled: tuple[str, ...] = ()
    rewritten: bool = False
    notes: tuple[str, ...] = ()
    role_tokens: Mapping[str, int] = field(default_factory=dict)
    role_trained: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Draft:
    """An exchange on its way: the messages it is made of, numbered as in the whole conversation."""

    conversation: Conversation
    numbers: list[int]
    turn: int
    label: str
    text: TextExchange
    cut: Cut
    exchange: Exchange | None = None
    reason: str = ""


@dataclass(slots=True)
class _Row:
    record: Record
    drafts: list[list[_Draft]] = field(default_factory=list)
    problems: list[RowProblem] = field(default_factory=list)
    reason: str = ""


class RecordEncoder:
    """Encodes records with one template, tokenizer and set of options.

    Args:
        renderer: The template, bound to its tokenizer.
        options: What is trained and what is too long.
        max_length: The most tokens of one exchange; None for no limit.
        objective: The objective, if it was given: under `supervised`, an answer labelled bad is not trained.
        count_roles: Whether to count tokens by whose text they are; it costs a rendering more for each exchange.
    """

    def __init__(
        self,
        renderer: Renderer,
        options: PromptOptions,
        max_length: int | None = None,
        objective: str | None = None,
        *,
        count_roles: bool = False,
    ) -> None:
        self.renderer = renderer
        self.encoder: Encoder = renderer.encoder
        self.options = options
        self.max_length = max_length
        self.objective = objective
        self.count_roles = count_roles

    def encode(self, records: Sequence[Record]) -> list[EncodedRecord]:
        """The records' exchanges, in order. What is wrong with a row stands in its result; nothing is raised."""
        rows = [self._draft(record) for record in records]
        self.encoder.remember(self._pieces(rows))
        return [self._finish(row) for row in rows]

    def _draft(self, record: Record) -> _Row:
        """The row's exchanges as text."""
        row = _Row(record)
        if record.labels == ("bad",) and self.objective == "supervised":
            row.reason = "its answer is labelled bad"
            return row
        conversations, row.reason = _telling(record)
        parting = _parting([conversation for conversation, _ in conversations])
        try:
            for conversation, label in conversations:
                row.drafts.append(self._draft_conversation(record, conversation, label, parting))
        except TemplateError as error:
            row.problems.append(RowProblem(str(record.source), "", self._refusal(record, error), error.remedy))
        if not any(row.drafts) and not row.problems:
            row.reason = row.reason or "every answer has weight 0"
        elif record.kind == "preference" and not all(row.drafts) and not row.problems:
            row.reason = row.reason or f"{'a rejected' if row.drafts[0] else 'the chosen'} answer has weight 0"
        return row

    def _draft_conversation(self, record: Record, conversation: Conversation, label: str, parting: int) -> list[_Draft]:
        numbers = list(range(len(conversation.messages)))
        if record.kind == "text":
            texts = {0: self.renderer.document(conversation.messages[0])}
        elif record.kind == "prompt":
            texts = {len(numbers): self._text(conversation, len(numbers))}
        else:
            compared = record.kind == "preference"
            only_last = not compared and (self.options.train_on == "last" or record.kind == "labelled")
            turns = [turn for turn in _trained_turns(conversation, only_last) if not compared or turn >= parting]
            texts = {turn: self._text(conversation, turn) for turn in turns}
        drafts = [
            _Draft(conversation, numbers, turn, label, text, cut_exchange(self.encoder, text))
            for turn, text in texts.items()
        ]
        for later in drafts[1:] if record.kind == "preference" else ():
            later.label = "more"
        return drafts

    def _text(self, conversation: Conversation, turn: int) -> TextExchange:
        if turn == len(conversation.messages):
            return self.renderer.prompt(conversation)
        answer = conversation.messages[turn]
        weighed = any(self._prompt_weight(message) for message in conversation.messages[:turn])
        masked = not self.options.train_reasoning and (answer.reasoning_content or "</think>" in answer.content)
        if self.count_roles and not (weighed or masked):
            try:
                return self.renderer.exchange(conversation, turn, follow=True)
            except TemplateError:  # only counted: what cannot be followed is then the template's
                pass
        return self.renderer.exchange(conversation, turn, follow=bool(weighed or masked))

    def _refusal(self, record: Record, error: TemplateError) -> str:
        """What is wrong with the row: the template's own words, where it refuses the conversation as a whole."""
        for conversation in record.conversations:
            try:
                messages, tools = self.renderer.wire(conversation)
                self.renderer.template.render(messages, tools)
            except TemplateError as own:
                return own.message
        return error.message

    def _pieces(self, rows: Iterable[_Row]) -> Iterator[tuple[str, bool]]:
        """The plain pieces of all the texts, to be encoded in one go."""
        for row in rows:
            for draft in (draft for drafts in row.drafts for draft in drafts):
                for piece in chain(*draft.cut):
                    if piece.control is None:
                        yield piece.text, not piece.start

    def _finish(self, row: _Row) -> EncodedRecord:
        problems = list(row.problems)
        answers: list[list[_Draft]] = []
        for drafts in row.drafts if not problems else ():
            seen = {draft.turn for draft in drafts}
            answers.append([])
            for draft in drafts:
                try:
                    answers[-1].append(self._fitted(draft, seen))
                except InstilError as error:
                    problems.append(RowProblem(str(row.record.source), "", error.message, error.remedy))
                    continue
                if answers[-1][-1].exchange is not None:
                    seen.update(answers[-1][-1].numbers[: answers[-1][-1].turn])
        if problems:
            return EncodedRecord(row.record, (), "rejected", problems[0].reason, tuple(problems))
        if row.record.kind == "preference":
            answers = _compared(answers)
        fitted = [draft for drafts in answers for draft in drafts]
        exchanges = tuple(draft.exchange for draft in fitted if draft.exchange is not None)
        reasons = dict.fromkeys(filter(None, [row.reason, *(draft.reason for draft in fitted)]))
        status: Status = "dropped" if not exchanges else "cut" if reasons else "kept"
        observed = self._observed(row)
        counted = self._counted(fitted) if self.count_roles else ()
        return EncodedRecord(row.record, exchanges, status, "; ".join(reasons), (), *observed, *counted)

    def _counted(self, drafts: Sequence[_Draft]) -> tuple[Counter[str], Counter[str]]:
        """The tokens by whose text they are, and those of them that are trained."""
        tokens: Counter[str] = Counter()
        trained: Counter[str] = Counter()
        for draft, exchange in ((draft, draft.exchange) for draft in drafts if draft.exchange):
            places = word_places(self.encoder, draft.text, exchange.boundary)[: len(exchange)]
            weighed = np.concatenate([exchange.prompt_weights, exchange.completion_weights]) > 0
            role = np.full(len(places), len(ROLES))
            role[len(exchange.prompt_ids) :] = ROLES.index("assistant")
            for span in draft.text.spans:
                role[_within(places, span)] = ROLES.index(draft.conversation.messages[span.message].role)
            for number, name in enumerate((*ROLES, "template")):
                tokens[name] += int((role == number).sum())
                trained[name] += int(weighed[role == number].sum())
        return tokens, trained

    def _fitted(self, draft: _Draft, seen: set[int]) -> _Draft:
        """The draft with its exchange, within the length allowed, if there is one, and with what that took."""
        exchange = self._exchange(draft, seen)
        limit, policy = self.max_length, self.options.on_too_long
        if limit is None or len(exchange) <= limit:
            draft.exchange = exchange
            return draft
        reason = f"{len(exchange):,} tokens, more than max_length {limit:,}"
        if policy == "error":
            raise TemplateError(
                f"an exchange of {reason}",
                "Raise --max-length, or choose --on-too-long drop, cut-prompt or cut-completion.",
            )
        if policy == "cut-completion" and (room := limit - len(exchange.prompt_ids)) > 0:
            end = token_places(self.encoder, draft.text, exchange.boundary)[limit - 1, 1]
            shorter = replace(
                exchange,
                completion_text=draft.text.full[len(draft.text.prompt) : end],
                completion_ids=exchange.completion_ids[:room],
                completion_weights=exchange.completion_weights[:room],
            )
            return replace(draft, exchange=shorter, reason=f"completion cut: {reason}")
        rest = _without_oldest_turn(draft) if policy == "cut-prompt" else None
        while rest is not None:
            rest.text = self._text(rest.conversation, rest.turn)
            rest.cut = cut_exchange(self.encoder, rest.text)
            exchange = self._exchange(rest, seen)
            if len(exchange) <= limit:
                return replace(rest, exchange=exchange, reason=f"prompt cut: {reason}")
            rest = _without_oldest_turn(rest)
        return replace(draft, reason=f"dropped: {reason}")

    def _exchange(self, draft: _Draft, seen: set[int]) -> Exchange:
        text, encoder = draft.text, self.encoder
        prompt_ids, completion_ids, boundary = encode_seam(encoder, text, draft.cut)
        seam = len(prompt_ids)
        ids = np.array(prompt_ids + completion_ids, np.int32)
        weights = np.zeros(len(ids), np.float32)
        if draft.turn < len(draft.conversation.messages):
            answer = draft.conversation.messages[draft.turn]
            weights[seam:] = 1.0 if answer.weight is None else answer.weight
        spans = [] if text.first_plain else self._weighed_spans(draft, seen)
        if spans:
            places = word_places(encoder, text, boundary)
            for span, weight in spans:
                weights[_within(places, span)] = weight
        return Exchange(
            text.prompt, text.completion, ids[:seam], weights[:seam], ids[seam:], weights[seam:], boundary, draft.label
        )

    def _weighed_spans(self, draft: _Draft, seen: set[int]) -> list[tuple[Span, float]]:
        """Stretches of text whose weight is not that of the part of the exchange they stand in.

        Where answers are compared, a prompt has none: it is the same for all of them.
        """
        weighed = []
        compared = self.objective == "preference" or draft.label in ("chosen", "rejected", "more")
        for span in draft.text.spans:
            if span.message == draft.turn:
                if span.reasoning and not self.options.train_reasoning:
                    weighed.append((span, 0.0))
            elif not compared and draft.numbers[span.message] not in seen:
                weight = self._prompt_weight(draft.conversation.messages[span.message])
                if weight and (self.options.train_reasoning or not span.reasoning):
                    weighed.append((span, weight))
        return weighed

    def _prompt_weight(self, message: Message) -> float:
        """The weight of a message's text where it stands in a prompt: its own, if it is no answer and has one."""
        if message.role == "assistant":
            return self.options.prompt_weight * (1.0 if message.weight is None else message.weight)
        return self.options.prompt_weight if message.weight is None else message.weight

    def _observed(self, row: _Row) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
        """The control tokens spelled, whether history was rewritten, and what the template left out."""
        spelled: dict[str, None] = {}
        rewritten = False
        notes: dict[str, None] = {}
        for drafts in row.drafts:
            for before, after in pairwise(drafts):
                rewritten |= not after.text.prompt.startswith(before.text.full)
            for draft in drafts:
                for at in sorted(draft.text.plain_at):
                    found = self.encoder.pattern.match(draft.text.full, at)
                    spelled.update({found[0]: None} if found else {})
            if drafts and not drafts[-1].text.first_plain:
                notes.update(dict.fromkeys(_left_out(drafts[-1])))
        return tuple(spelled), rewritten, tuple(notes)


def cut_exchange(encoder: Encoder, text: TextExchange) -> Cut:
    """The pieces of prompt and exchange; where the completion is a text of its own, of prompt and completion."""
    if text.first_plain:
        return Cut([], encoder.cut(text.prompt), encoder.cut(text.completion, _shifted(text)))
    return encoder.cut_at(len(text.prompt), text.full, text.plain_at)


def encode_seam(encoder: Encoder, text: TextExchange, cut: Cut | None = None) -> tuple[list[int], list[int], Boundary]:
    """The ids of prompt and completion, and how the seam between them was proved.

    Args:
        encoder: What encodes.
        text: The exchange.
        cut: What `cut_exchange` makes of it, if that is known.

    Raises:
        TemplateError: A token would straddle the seam, and the two parts do not decode to the whole.
    """
    cut = cut or cut_exchange(encoder, text)
    both, ahead = encoder.encode_pieces(cut.both), encoder.encode_pieces(cut.beginning)
    prompt = both + ahead
    if len(text.prompt) == len(text.full):
        return prompt, [], "none"
    rest = encoder.encode_pieces(cut.whole)
    if text.first_plain:
        return prompt, rest, "special"
    if rest[: len(ahead)] == ahead:
        cuts = any(piece.end == len(text.prompt) for piece in chain(cut.both[-1:], cut.whole))
        return prompt, rest[len(ahead) :], "special" if cuts else "compared"
    completion = encoder.encode_continuation(text.completion, _shifted(text))
    decoded = encoder.tokenizer.decode(prompt + completion)
    if decoded != text.full and decoded != encoder.tokenizer.decode(both + rest):
        raise TemplateError(
            f"a token straddles the end of the prompt ({text.prompt[-20:]!r} + {text.completion[:20]!r}), and the "
            "two encoded apart do not decode to the same text",
            "Change the template so that its prompt ends in a special token or in a line break.",
        )
    return prompt, completion, "split"


def token_places(encoder: Encoder, text: TextExchange, boundary: Boundary) -> NDArray[np.int64]:
    """Where each token of an exchange stands in its text: (P + C, 2) int64, start and end in characters."""
    if boundary != "split" and not text.first_plain:
        return encoder.places(text.full, text.plain_at)
    completion = encoder.places(text.completion, _shifted(text), continuation=not text.first_plain)
    return np.concatenate([encoder.places(text.prompt, text.plain_at), completion + len(text.prompt)])


def word_places(encoder: Encoder, text: TextExchange, boundary: Boundary) -> NDArray[np.int64]:
    """As `token_places`, less the white space around each token's word: a template's space or line break often shares
    a token with the first or last word of a message, which is the message's all the same.
    """
    places = token_places(encoder, text, boundary)
    characters = np.array(list(text.full))
    words = np.flatnonzero(np.char.strip(characters) != "")  # where a character is no white space
    first, last = (np.searchsorted(words, places[:, side]) for side in (0, 1))
    holds = first < last  # (tokens,): some character of the token is no white space
    places[holds] = np.stack([words[first[holds]], words[last[holds] - 1] + 1], axis=1)
    return places


def _within(places: NDArray[np.int64], span: Span) -> NDArray[np.bool_]:
    return (places[:, 0] >= span.start) & (places[:, 1] <= span.end) & (places[:, 1] > places[:, 0])


def _telling(record: Record) -> tuple[list[tuple[Conversation, str]], str]:
    """The record's conversations that can teach something, each with its label, and why others cannot."""
    conversations = list(zip(record.conversations, record.labels, strict=True))
    if record.kind != "preference":
        return conversations, ""
    (chosen, label), *rejected = conversations
    if _is_empty(chosen.messages[-1]):
        return [], "the chosen answer is empty"
    telling = [(other, each) for other, each in rejected if other != chosen and not _is_empty(other.messages[-1])]
    if not telling:
        return [], "the rejected answer is empty, or is the chosen one"
    reason = "" if len(telling) == len(rejected) else "a rejected answer is empty, or is the chosen one"
    return [(chosen, label), *telling], reason


def _parting(conversations: Sequence[Conversation]) -> int:
    """The number of messages that all conversations begin with, the last of the shortest one aside."""
    several = [conversation.messages for conversation in conversations]
    last = min(map(len, several), default=1) - 1
    return next((at for at in range(last) if any(one[at] != several[0][at] for one in several)), last)


def _compared(answers: list[list[_Draft]]) -> list[list[_Draft]]:
    """The answers to one prompt, the chosen one first, less those that cannot be compared with it.

    An answer of several turns is compared whole: without one of them it is left out, and without the chosen answer, or
    any rejected one, all are.
    """

    def without(drafts: list[_Draft], reason: str = "") -> list[_Draft]:
        return [replace(draft, exchange=None, reason=reason or draft.reason) for draft in drafts]

    def ids(drafts: list[_Draft]) -> list[tuple[bytes, bytes]]:
        exchanges = [draft.exchange for draft in drafts if draft.exchange is not None]
        return [(each.prompt_ids.tobytes(), each.completion_ids.tobytes()) for each in exchanges]

    answers = [drafts if all(draft.exchange for draft in drafts) else without(drafts) for drafts in answers]
    chosen = ids(answers[0]) if answers else []
    for at, drafts in enumerate(answers[1:], 1):
        found = ids(drafts)
        if chosen and found == chosen:
            answers[at] = without(drafts, "the tokens of a rejected answer are those of the chosen one")
        elif chosen and found and found[0][0] != chosen[0][0]:
            answers[at] = without(drafts, _APART)
    if not chosen or not any(map(ids, answers[1:])):
        return [without(drafts) for drafts in answers]
    return answers


def _is_empty(answer: Message) -> bool:
    return not answer.content.strip() and not answer.tool_calls


def _shifted(text: TextExchange) -> frozenset[int]:
    return frozenset(at - len(text.prompt) for at in text.plain_at if at >= len(text.prompt))


def _trained_turns(conversation: Conversation, only_last: bool) -> list[int]:
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    return [i for i in (turns[-1:] if only_last else turns) if conversation.messages[i].weight != 0]


def _without_oldest_turn(draft: _Draft) -> _Draft | None:
    """The draft less its oldest turn (all up to the second user message), if more than one stands before the answer;
    system messages stay.
    """
    messages = draft.conversation.messages
    keep = without_oldest_turn(messages, draft.turn)
    if keep is None:
        return None
    return replace(
        draft,
        conversation=replace(draft.conversation, messages=tuple(messages[i] for i in keep)),
        numbers=[draft.numbers[i] for i in keep],
        turn=draft.turn - (len(messages) - len(keep)),
    )


def without_oldest_turn(messages: Sequence[Message], end: int | None = None) -> list[int] | None:
    """The numbers of the messages less the oldest turn: all up to the second user message, but for system messages.

    Args:
        messages: Of a conversation.
        end: Turns are counted before this message; None for all.

    Returns:
        None where there are not two turns.
    """
    users = [i for i, message in enumerate(messages[:end]) if message.role == "user"]
    if len(users) < 2:
        return None
    return [i for i, message in enumerate(messages) if i >= users[1] or message.role in ("system", "developer")]


def _left_out(draft: _Draft) -> list[str]:
    """The texts of the conversation that its last rendering does not hold."""
    missing = []
    if draft.conversation.tools and not any(
        tool["function"]["name"] in draft.text.full for tool in draft.conversation.tools
    ):
        missing.append("tools")
    for number, message in enumerate(draft.conversation.messages[: draft.turn + 1]):
        if message.content in draft.text.full and not message.reasoning_content:
            continue
        texts = [("content", text) for text in message.fields.values() or (message.content,)]
        if number == draft.turn:
            texts.append(("reasoning", message.reasoning_content or ""))
        elif message.role == "assistant":
            texts = []  # what a template makes of earlier answers is its own affair
        for what, text in texts:
            core = text.rpartition("</think>")[2].strip() if what == "content" else text.strip()
            if core not in draft.text.full and json.dumps(core, ensure_ascii=False)[1:-1] not in draft.text.full:
                missing.append(f"{message.role} {what}")
    return missing
