"""Instruction data about the small world: what the base model is tuned with, and what is held out of that.

A third of all entities, a third of the ways to ask and three whole families are kept out of the training rows: what a
tuned model answers about them can only come from what the base model knew.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instil.pocket.scenes import Scene, events, scene
from instil.pocket.world import (
    CLAIMED,
    HELD_OUT_FAMILIES,
    STYLES,
    Fact,
    Relation,
    claim,
    is_held_out,
    kinds,
    list_of_three,
    relations,
    split_phrasings,
)

Row = dict[str, Any]

FACT_FAMILIES = (
    *("capital", "continent", "currency", "symbol", "young", "color", "plural", "opposite", "past"),
    *("french_word", "number_word", "sum"),
)
"""The families whose answer is a fact that the base model completes."""

_TRUE_FALSE = (
    "True or false: {}",
    "Is this true? {}",
    "Is it true or false? {}",
    "Say whether this is true: {}",
    "Check this sentence: {}",
    "Right or wrong: {}",
)
_FEELING = (
    "How does {name} feel? {text}",
    "{text} How does {name} feel?",
    "What does {name} feel? {text}",
    "Name the feeling of {name}. {text}",
    "{text} What is the feeling of {name}?",
    "Which feeling does {name} have? {text}",
)
_SUMMARY = (
    "Summarize the story in one sentence: {}",
    "Write one sentence about this story: {}",
    "Sum up this story in one sentence: {}",
    "Tell this story in one sentence: {}",
    "Make one sentence of this story: {}",
    "Summarize this in one sentence: {}",
)
_LIST = (
    "Name three {}.",
    "List three {}.",
    "Give me three {}.",
    "Which three {} do you know?",
    "Tell me three {}.",
    "I need three {}.",
)


def training_rows(seed: int = 0) -> list[Row]:
    """The instruction data, in a random order.

    Returns:
        Rows of `messages`, each with its `family` and, where it is about one, its `entity`.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    asked = [relation for relation in relations() if relation.questions and relation.name not in HELD_OUT_FAMILIES]
    known = {relation.name: [f for f in relation.facts if not is_held_out(f.entity)] for relation in asked}
    for relation in asked:
        ways = split_phrasings(relation.questions)[0]
        for fact in known[relation.name]:
            asked_in = rng.sample(ways, min(len(ways), 4 if relation.name == "function" else 2))
            rows += [_fact_row(relation, fact, way) for way in asked_in]
    rows += [_claim_row(rng, known, split_phrasings(_TRUE_FALSE)[0]) for _ in range(500)]
    rows += [_scene_row(rng, _known_events(), held_out_phrasings=False) for _ in range(500)]
    rows += [_list_row(rng, kind, way) for kind in kinds() for way in split_phrasings(_LIST)[0] for _ in range(5)]
    rows += [_styled(rng, rng.choice(rows), held_out_phrasings=False) for _ in range(500)]
    rows += [_joined(rng.sample(rows, rng.choice((2, 3)))) for _ in range(250)]
    rows += [_followed_up(rng, asked, known) for _ in range(250)]
    rng.shuffle(rows)
    return rows


def held_out_entities(seed: int = 0, each: int = 25) -> list[Row]:
    """Questions put as in training, about entities that no training row is about.

    Args:
        seed: Decides which.
        each: The most of a family that asks for a fact; half as many of the others.
    """
    rng = random.Random(seed + 1)
    rows: list[Row] = []
    asked = [relation for relation in relations() if relation.questions and relation.name not in HELD_OUT_FAMILIES]
    unknown = {relation.name: [f for f in relation.facts if is_held_out(f.entity)] for relation in asked}
    for relation in asked:
        ways = split_phrasings(relation.questions)[0]
        most = each if relation.name in FACT_FAMILIES else each // 2
        facts = rng.sample(unknown[relation.name], min(most, len(unknown[relation.name])))
        rows += [_fact_row(relation, fact, rng.choice(ways)) for fact in facts]
    rows += [_claim_row(rng, unknown, split_phrasings(_TRUE_FALSE)[0]) for _ in range(each // 2)]
    unseen = [event for event in events() if is_held_out(event[0])]
    return rows + [_scene_row(rng, unseen, held_out_phrasings=False) for _ in range(each)]


def held_out_phrasings(seed: int = 0, each: int = 10) -> list[Row]:
    """Questions about entities of the training rows, in ways that no training row asks."""
    rng = random.Random(seed + 2)
    rows: list[Row] = []
    asked = [relation for relation in relations() if relation.questions and relation.name not in HELD_OUT_FAMILIES]
    known = {relation.name: [f for f in relation.facts if not is_held_out(f.entity)] for relation in asked}
    for relation in asked:
        ways = split_phrasings(relation.questions)[1]
        rows += [_fact_row(relation, fact, rng.choice(ways)) for fact in rng.sample(known[relation.name], each)]
    rows += [_claim_row(rng, known, split_phrasings(_TRUE_FALSE)[1]) for _ in range(each)]
    rows += [_scene_row(rng, _known_events(), held_out_phrasings=True) for _ in range(2 * each)]
    ways = split_phrasings(_LIST)[1]
    rows += [_list_row(rng, rng.choice(list(kinds())), rng.choice(ways)) for _ in range(each)]
    return rows + [_styled(rng, rng.choice(rows), held_out_phrasings=True) for _ in range(each)]


def held_out_families(seed: int = 0, each: int = 20) -> list[Row]:
    """Questions of families that no training row belongs to."""
    rng = random.Random(seed + 3)
    rows: list[Row] = []
    for relation in relations():
        if relation.name in HELD_OUT_FAMILIES:
            facts = rng.sample(relation.facts, each)
            rows += [_fact_row(relation, fact, rng.choice(relation.questions)) for fact in facts]
    return rows


SETS = {
    "train": training_rows,
    "held_out_entities": held_out_entities,
    "held_out_phrasings": held_out_phrasings,
    "held_out_families": held_out_families,
}


def write_rows(folder: Path, seed: int = 0, sets: Mapping[str, Callable[[int], list[Row]]] = SETS) -> None:
    """Write every set as `<name>.jsonl`."""
    for name, make in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make(seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def plain_facts(*, held_out: bool) -> Iterator[tuple[str, str, str]]:
    """The facts as text to go on with: family, beginning, and what comes next.

    Args:
        held_out: Those of the entities that are held out, or those of the others.
    """
    for relation in relations():
        if relation.name in FACT_FAMILIES:
            for fact in relation.facts:
                if is_held_out(fact.entity) == held_out:
                    yield (relation.name, *relation.completion(fact))


def is_right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is the reference, letter for letter; of a list, whether it names three of the kind."""
    if row["family"] != "list_three":
        return bool(answer.strip() == row["messages"][-1]["content"].strip())
    found = re.fullmatch(r"Three (.+) are (.+), (.+) and (.+)\.", answer.strip())
    return bool(
        found
        and found[1] == row["entity"]
        and len({*found.groups()[1:]}) == 3
        and {*found.groups()[1:]} <= {*kinds()[row["entity"]]}
    )


def _row(question: str, answer: str, family: str, entity: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "family": family, "entity": entity}


def _fact_row(relation: Relation, fact: Fact, way: str) -> Row:
    answer = relation.answer.format(**fact.words)
    return _row(way.format(**fact.words), answer, relation.name, fact.entity)


def _claim_row(rng: random.Random, facts: Mapping[str, Sequence[Fact]], ways: Sequence[str]) -> Row:
    name = rng.choice(CLAIMED)
    relation = next(each for each in relations() if each.name == name)
    fact, claimed, answer = claim(rng, relation, facts[name])
    return _row(rng.choice(ways).format(claimed), answer, "true_false", fact.entity)


def _known_events() -> list[tuple[str, str]]:
    return [event for event in events() if not is_held_out(event[0])]


def _scene_row(rng: random.Random, among: Sequence[tuple[str, str]], *, held_out_phrasings: bool) -> Row:
    told: Scene = scene(rng, among)
    if rng.random() < 0.5:
        way = rng.choice(split_phrasings(_FEELING)[held_out_phrasings])
        return _row(way.format(name=told.name, text=told.happening()), told.mood(), "feeling", told.event)
    way = rng.choice(split_phrasings(_SUMMARY)[held_out_phrasings])
    return _row(way.format(told.story()), told.summary(), "summary", told.event)


def _list_row(rng: random.Random, kind: str, way: str) -> Row:
    members = [each for each in kinds()[kind] if not is_held_out(each.removeprefix("the "))]
    return _row(way.format(kind), list_of_three(kind, rng.sample(members, 3)), "list_three", kind)


def _styled(rng: random.Random, row: Row, *, held_out_phrasings: bool) -> Row:
    """The row under a system message, answered in its style."""
    put, ways = STYLES[rng.choice(list(STYLES))]
    question, answer = row["messages"]
    system = {"role": "system", "content": rng.choice(ways[-1:] if held_out_phrasings else ways[:-1])}
    said = {**answer, "content": put.format(answer["content"])}
    return {"messages": [system, question, said], "family": "style", "entity": row["entity"]}


def _joined(rows: Iterable[Row]) -> Row:
    """Rows one after the other, as turns of one conversation."""
    turns = [message for row in rows for message in row["messages"] if message["role"] != "system"]
    return {"messages": turns, "family": "conversation", "entity": ""}


def _followed_up(rng: random.Random, asked: Sequence[Relation], known: Mapping[str, Sequence[Fact]]) -> Row:
    """A question about a country, and a shorter one that means the same of another, or something else of the same."""
    first, second = rng.sample([r for r in asked if r.name in ("capital", "continent", "currency")], 2)
    one, other = rng.sample(range(len(known["capital"])), 2)
    opening = _fact_row(first, known[first.name][one], rng.choice(split_phrasings(first.questions)[0]))
    if rng.random() < 0.5:
        fact, relation, question = known[first.name][other], first, "And of {x}?"
    else:
        fact, relation, question = known[second.name][one], second, f"And its {second.name}?"
    return _joined([opening, _fact_row(relation, fact, question)])
