"""Judgements to rows that `instil.read` reads: good answers, answers labelled good or bad, better answers and worse.

Each row is read as training will read it before it is given out, and what is left out is counted with the reason.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from instil.conversation import Conversation, Message, Source
from instil.data.row import Row
from instil.data.shapes import build
from instil.serving.feedback.store import Store
from instil.serving.feedback.values import Given, Interaction, Judgement
from instil.serving.feedback.verdicts import Answer, Verdicts, compared

Kind = Literal["supervised", "preference", "labelled"]

COMPLETION = "of /v1/completions, which holds no conversation"
CUT_OFF = "cut off, stopped or empty"
DUPLICATE = "there already"
DISPUTED = "rated both up and down"
CONTRADICTED = "judged both ways"
CORRECTED = "rated up, but corrected"
SAME = "with the same answer twice"
NO_MODEL = "written by a person, of no model"


@dataclass(slots=True)
class Export:
    """What an export gives.

    Args:
        rows: Each as plain JSON values.
        used: How many answers or pairs are in them, by why they are there.
        left_out: How many are not, by the reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def export(
    store: Store,
    kind: Kind,
    *,
    model: str | None = None,
    since: datetime | None = None,
    pairs_from_ratings: bool = False,
) -> Export:
    """Rows to train on, the oldest first.

    Args:
        store: Where they were recorded.
        kind: `supervised`: conversations of which the answers that were rated up, corrected or written by a person are
            trained, each once, in the longest conversation that holds it. `labelled`: the answers that were rated, up
            as good, down as bad. `preference`: the better of two answers and the worse, corrections and what they
            correct.
        model: Only what was made of this model's answers.
        since: Only what was made of answers from this time on.
        pairs_from_ratings: Whether an answer that was rated up is better than one to the same conversation that was
            rated down.
    """
    judgements = store.judgements()
    interactions = {each.id: each for each in store.interactions(judged=True)}
    known = {None, *interactions}
    there = [each for each in judgements if {each.interaction, each.rejected} <= known]
    kept = _Kept(Verdicts.of(there), interactions, model, since)  # some may have been deleted meanwhile
    if kind == "supervised":
        return _supervised(kept)
    return _labelled(kept) if kind == "labelled" else _preferences(kept, pairs_from_ratings)


@dataclass(slots=True)
class _Kept:
    """What is exported from, and what becomes of it."""

    verdicts: Verdicts
    interactions: Mapping[str, Interaction]
    model: str | None = None
    since: datetime | None = None
    found: Export = field(default_factory=Export)

    def given(self, answer: Answer) -> tuple[Interaction, Given]:
        interaction = self.interactions[answer[0]]
        return interaction, interaction.answers[answer[1]]

    def asked_for(self, *interactions: Interaction) -> bool:
        """Whether one of them is of the model and the time that are asked for; those of no chat are counted."""
        chosen = any(
            (self.model in (None, each.model)) and (self.since is None or each.time >= self.since)
            for each in interactions
        )
        chat = all(each.kind == "chat" for each in interactions)
        if chosen and not chat:
            self.found.left_out[COMPLETION] += 1
        return chosen and chat

    def whole(self, *answers: Given) -> bool:
        """Whether the model ended them and said something; if not, it is counted."""
        found = all(each.whole and (each.content.strip() or each.tool_calls) for each in answers)
        self.found.left_out[CUT_OFF] += not found
        return found

    def read(self, shape: str, values: Mapping[str, Any]) -> tuple[Conversation, ...]:
        """The conversations that training will read in a row; none, and it is counted, where it will refuse the row."""
        row = Row(Source("feedback", 1), {name: value for name, value in values.items() if value})
        record = build(row, shape, "preference" if shape == "preference" else "supervised")
        if record is None:
            self.found.left_out[f"refused by training: {row.problems[0].reason}"] += 1
            return ()
        return record.conversations

    def ending_in(self, interaction: Interaction, answer: Mapping[str, Any]) -> Conversation | None:
        """The conversation that an answer ends."""
        found = self.read("messages", {"messages": [*interaction.messages, answer], "tools": list(interaction.tools)})
        return found[0] if found else None


def _supervised(kept: _Kept) -> Export:
    found, bad = kept.found, set(_rated_down(kept))
    candidates: list[_Good] = []
    trained: dict[str, dict[str, Any]] = {}
    for good in (*_approved(kept), *_written(kept)):
        new = False
        for turn in good.turns:
            key = _key(good.conversation, turn)
            if key in bad or key in trained:
                found.left_out[DISPUTED if key in bad else DUPLICATE] += 1
            else:
                trained[key] = good.provenance | {"message": turn}
                new = True
        candidates += [good] if new else []
    rows = []
    for good in sorted(candidates, key=lambda each: -len(each.conversation.messages)):
        keys = {turn: _key(good.conversation, turn) for turn in _answers(good.conversation)}
        turns = {turn: trained.pop(key) for turn, key in keys.items() if key in trained}
        if turns:  # of a conversation that went on, the longest row holds all that is good
            row = {"messages": _wire(good.conversation.messages, turns), **_tools(good.conversation)}
            rows.append((good.time, row | {"provenance": list(turns.values())}))
            found.used.update(each["why"] for each in turns.values())
    found.rows = [row for _, row in sorted(rows, key=lambda each: each[0])]
    return found


class _Good(NamedTuple):
    """A conversation, and which of its messages are good to train on."""

    time: datetime
    conversation: Conversation
    turns: Collection[int]
    provenance: dict[str, Any]


def _approved(kept: _Kept) -> Iterator[_Good]:
    """Corrections, and answers that were rated up and not corrected."""
    up = {answer: each for answer, each in kept.verdicts.ratings.items() if each.body["value"] == "up"}
    for answer, judgement in (up | kept.verdicts.corrections).items():
        interaction, given = kept.given(answer)
        corrected = judgement.kind == "correction"
        if kept.asked_for(interaction) and (corrected or kept.whole(given)):
            conversation = kept.ending_in(interaction, _correction(judgement) if corrected else given.to_wire())
            if conversation is not None:
                provenance = _provenance(judgement, "corrected" if corrected else "rated-up", answer, interaction)
                yield _Good(interaction.time, conversation, _answers(conversation)[-1:], provenance)


def _written(kept: _Kept) -> Iterator[_Good]:
    """Dialogues that a person wrote."""
    for each in kept.verdicts.dialogues:
        if kept.since is not None and each.time < kept.since:
            continue
        if kept.model is not None:
            kept.found.left_out[NO_MODEL] += 1
            continue
        for conversation in kept.read("messages", each.body):
            turns = [turn for turn in _answers(conversation) if conversation.messages[turn].weight != 0]
            yield _Good(each.time, conversation, turns, _provenance(each, "authored"))


def _rated_down(kept: _Kept) -> Iterator[str]:
    """The keys of what was rated down, whichever model said it and whenever."""
    everything = _Kept(kept.verdicts, kept.interactions)  # with counts of its own
    for answer, rating in kept.verdicts.ratings.items():
        interaction, given = kept.given(answer)
        if rating.body["value"] == "down":
            conversation = everything.ending_in(interaction, given.to_wire())
            if conversation is not None:
                yield _key(conversation, len(conversation.messages) - 1)


def _labelled(kept: _Kept) -> Export:
    found = kept.found
    rated: defaultdict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for answer, rating in kept.verdicts.ratings.items():
        interaction, given = kept.given(answer)
        if not kept.asked_for(interaction) or not kept.whole(given):
            continue
        if rating.body["value"] == "up" and answer in kept.verdicts.corrections:
            found.left_out[CORRECTED] += 1
            continue
        conversation = kept.ending_in(interaction, given.to_wire())
        if conversation is None:
            continue
        last, value = len(conversation.messages) - 1, rating.body["value"]
        row = {"messages": _wire(conversation.messages, (last,)), **_tools(conversation), "label": value == "up"}
        why = f"rated-{value}"
        values = rated[_key(conversation, last)]
        found.left_out[DUPLICATE] += value in values
        values.setdefault(value, row | {"provenance": [_provenance(rating, why, answer, interaction)]})
    for values in rated.values():
        if len(values) > 1:
            found.left_out[DISPUTED] += 1
        else:
            found.rows += values.values()
            found.used.update(f"rated-{value}" for value in values)
    return found


def _preferences(kept: _Kept, from_ratings: bool) -> Export:
    found = kept.found
    pairs: dict[tuple[str, str, str], tuple[str, dict[str, Any]]] = {}
    for pair in (*_compared(kept), *_corrected(kept), *(_contrasted(kept) if from_ratings else ())):
        prompt = {"prompt": list(pair.interaction.messages), "tools": list(pair.interaction.tools)}
        both = kept.read("preference", prompt | {"chosen": [pair.chosen], "rejected": [pair.rejected]})
        if not both:
            continue
        *context, chosen = both[0].messages
        rejected = both[1].messages[-1]
        key = (_key(both[0], len(context) - 1), _text(chosen), _text(rejected))
        if chosen == rejected or key in pairs:
            found.left_out[SAME if chosen == rejected else DUPLICATE] += 1
            continue
        row = {"prompt": _wire(context, ()), "chosen": [chosen.to_wire()], "rejected": [rejected.to_wire()]}
        pairs[key] = pair.why, row | _tools(both[0]) | {"provenance": pair.provenance}
    for (asked, chosen_text, rejected_text), (why, row) in pairs.items():
        if (asked, rejected_text, chosen_text) in pairs:
            found.left_out[CONTRADICTED] += 1
        else:
            found.rows.append(row)
            found.used[why] += 1
    return found


class _Pair(NamedTuple):
    """A better answer and a worse, as messages."""

    interaction: Interaction
    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]
    why: str
    provenance: list[dict[str, Any]]


def _compared(kept: _Kept) -> Iterator[_Pair]:
    for judgement in kept.verdicts.preferences.values():
        better, worse = compared(judgement)
        yield from _pair(kept, better, worse, "better-of-two", judgement, judgement)


def _corrected(kept: _Kept) -> Iterator[_Pair]:
    for answer, judgement in kept.verdicts.corrections.items():
        interaction, given = kept.given(answer)
        if kept.asked_for(interaction) and kept.whole(given):
            provenance = _provenance(judgement, "corrected", answer, interaction)
            both = [{"answer": name} | provenance for name in ("chosen", "rejected")]
            yield _Pair(interaction, _correction(judgement), given.to_wire(), "corrected", both)


def _contrasted(kept: _Kept) -> Iterator[_Pair]:
    """Answers to one conversation of which one was rated up, the other down."""
    up: defaultdict[str, list[Answer]] = defaultdict(list)
    down: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer, rating in kept.verdicts.ratings.items():
        interaction, _ = kept.given(answer)
        if rating.body["value"] == "up" and answer in kept.verdicts.corrections:
            continue  # the correction is better, and makes a pair of its own
        (up if rating.body["value"] == "up" else down)[_asked(interaction)].append(answer)
    for asked, good in up.items():
        for better in good:
            for worse in down[asked]:
                ratings = kept.verdicts.ratings
                yield from _pair(kept, better, worse, "up-and-down", ratings[better], ratings[worse])


def _pair(
    kept: _Kept, better: Answer, worse: Answer, why: str, of_better: Judgement, of_worse: Judgement
) -> Iterator[_Pair]:
    (interaction, chosen), (other, rejected) = kept.given(better), kept.given(worse)
    if kept.asked_for(interaction, other) and kept.whole(chosen, rejected):
        provenance = [
            {"answer": "chosen"} | _provenance(of_better, why, better, interaction),
            {"answer": "rejected"} | _provenance(of_worse, why, worse, other),
        ]
        yield _Pair(interaction, chosen.to_wire(), rejected.to_wire(), why, provenance)


# Messages.


def _answers(conversation: Conversation) -> list[int]:
    """The numbers of the assistant's messages."""
    return [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]


def _correction(judgement: Judgement) -> dict[str, Any]:
    return {"role": "assistant", "content": judgement.body["content"]}


def _wire(messages: Sequence[Message], trained: Collection[int]) -> list[dict[str, Any]]:
    """The messages, of the assistant's none trained but those."""
    return [
        message.to_data() | ({"weight": 0} if message.role == "assistant" and turn not in trained else {})
        for turn, message in enumerate(messages)
    ]


def _tools(conversation: Conversation) -> dict[str, Any]:
    return {"tools": list(conversation.tools)} if conversation.tools else {}


def _text(message: Message) -> str:
    return json.dumps(message.to_wire(), sort_keys=True)


def _key(conversation: Conversation, turn: int) -> str:
    """By which a conversation up to a message, that one included, is known again."""
    said = [message.to_wire() for message in conversation.messages[: turn + 1]]
    return json.dumps([list(conversation.tools), said], sort_keys=True)


def _asked(interaction: Interaction) -> str:
    return json.dumps([interaction.messages, interaction.tools], sort_keys=True)


def _provenance(
    judgement: Judgement, why: str, answer: Answer | None = None, interaction: Interaction | None = None
) -> dict[str, Any]:
    """Where a row comes from."""
    found: dict[str, Any] = {"why": why, "judgement": judgement.id, "judged": judgement.time.isoformat()}
    if answer is None or interaction is None:
        return found
    return found | {
        "interaction": interaction.id,
        "choice": answer[1],
        "time": interaction.time.isoformat(),
        "model": interaction.model,
        "model_hash": interaction.model_hash,
        "template": interaction.template,
        "template_hash": interaction.template_hash,
    }
