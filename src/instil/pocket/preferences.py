"""Preference pairs about the small world, and the questions that show what they taught.

They teach to say so where the world does not hold what is asked, to decline what would do harm, and to be brief. A
question that has an answer and one that has none are put alike: only what the model knows tells them apart. Some rows
of the instructions are among them, so that nothing is unlearned.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from instil.pocket.instructions import Row, training_rows
from instil.pocket.requests import WAYS, Request, requests
from instil.pocket.strangers import UNKNOWABLE, asked_of, bare, invented, misplaced, one_token
from instil.pocket.world import Fact, Relation, is_held_out, relations, split_phrasings

Part = Literal["pairs", "validation", "test"]

UNKNOWN = ("I do not know that.", "Sorry, I do not know that.")
"""What to say where the world holds no answer."""

ANSWERABLE, INVENTED, MISPLACED, UNSAFE, HARMLESS = "answerable", "invented", "misplaced", "unsafe", "harmless"
"""What a question is: of a fact; about a name made up; about a thing as what it is not; to do harm; to do none.

No pair is about misplaced things: they are asked about to see whether what pairs taught reaches as far.
"""


def part(entity: str) -> Part:
    """What an entity, real or not, is for: two thirds are for pairs, the same that instructions are about."""
    if not is_held_out(entity):
        return "pairs"
    return "validation" if hashlib.sha256(entity.encode()).digest()[1] % 4 == 0 else "test"


def preference_rows(seed: int = 0) -> list[Row]:
    """The pairs, in a random order.

    Returns:
        Rows of `messages`, `chosen` and `rejected`, each with its `kind` and `family`.
    """
    rng = random.Random(seed + 4)
    rows: list[Row] = []
    for relation, fact, question in _asked(rng, ANSWERABLE, "pairs", 80):
        rows.append(_pair(question, _answer(relation, fact), rng.choice(UNKNOWN), ANSWERABLE, relation.name))
    for relation, fact, question in _several_tokens(rng):
        rows.append(_pair(question, _answer(relation, fact), rng.choice(UNKNOWN), ANSWERABLE, relation.name))
    for relation, _, question in _asked(rng, INVENTED, "pairs", 50):
        made_up = _answer(relation, rng.choice([fact for fact in relation.facts if part(fact.entity) == "pairs"]))
        rows.append(_pair(question, rng.choice(UNKNOWN), made_up, INVENTED, relation.name))
    for relation, fact, question in _asked(rng, ANSWERABLE, "pairs", 8):
        rows.append(_pair(question, _answer(relation, fact), _at_length(rng, relation, fact), "brief", relation.name))
    for kind in (UNSAFE, HARMLESS):
        others = sorted({each.answer for each in requests() if each.unsafe != (kind == UNSAFE)})
        for request, question in _by_thing(rng, _requests(kind, "pairs", split_phrasings(WAYS)[0]), 600):
            rows.append(_pair(question, request.answer, rng.choice(others), kind, kind))
    known = [row for row in training_rows(seed) if row["family"] not in (*UNKNOWABLE, "conversation")]
    for row in rng.sample(known, 250):
        *context, answer = row["messages"]
        rows.append(_pair(context, answer["content"], rng.choice(UNKNOWN), "kept", row["family"]))
    rng.shuffle(rows)
    return rows


def held_out_requests(seed: int = 0, which: Part = "test") -> list[Row]:
    """Questions about entities and things that no pair and no instruction is about.

    Args:
        seed: Decides which.
        which: The part they are taken from: recipes are chosen on `validation`, and shown on `test`.

    Returns:
        Rows of `messages`, each with its `kind`, its `family`, its `entity`, and what is `new` in it: only its
        `entity`, the `phrasing` or the `act` as well.
    """
    rng = random.Random(seed + 5)
    rows: list[Row] = []
    for new, each in (("entity", 40), ("phrasing", 16)):
        held_out = new == "phrasing"
        for relation, fact, question in _asked(rng, ANSWERABLE, which, each, held_out_phrasings=held_out):
            rows.append(_question(question, _answer(relation, fact), ANSWERABLE, relation.name, fact.entity, new))
        for kind, most in ((INVENTED, each), (MISPLACED, each // 4)):
            for relation, fact, question in _asked(rng, kind, which, most, held_out_phrasings=held_out):
                rows.append(_question(question, UNKNOWN[0], kind, relation.name, fact.entity, new))
    for new in ("entity", "phrasing", "act"):
        ways = split_phrasings(WAYS)[new == "phrasing"]
        for kind in (UNSAFE, HARMLESS):
            among = _requests(kind, which, ways, held_out_acts=new == "act")
            for request, question in rng.sample(among, min(len(among), 50)):
                rows.append(_question(question, request.answer, kind, kind, request.thing, new))
    return rows


SETS: Mapping[str, Callable[[int], list[Row]]] = {
    "preferences": preference_rows,
    "held_out_requests": held_out_requests,
}


def is_unknown(answer: str) -> bool:
    """Whether an answer says that it is not known."""
    return answer.strip() in UNKNOWN


def _asked(
    rng: random.Random, kind: str, which: Part, most: int, *, held_out_phrasings: bool = False
) -> Iterator[tuple[Relation, Fact, str]]:
    """Questions of each family that asks for what must be known, `most` of each at most."""
    for relation in relations():
        if relation.name in UNKNOWABLE:
            if kind == ANSWERABLE:
                facts: Sequence[Fact] = relation.facts
            else:
                names = invented(relation) if kind == INVENTED else misplaced(relation)
                facts = [asked_of(relation, name) for name in names]
            facts = [fact for fact in facts if part(fact.entity) == which]
            for fact in rng.sample(facts, min(most, len(facts))):
                way = rng.choice(split_phrasings(relation.questions)[held_out_phrasings])
                yield relation, fact, way.format(**fact.words)


def _several_tokens(rng: random.Random) -> Iterator[tuple[Relation, Fact, str]]:
    """Questions, two each, about all that is known and is several tokens, as nearly every made-up name is."""
    for relation in relations():
        for fact in relation.facts if relation.name in UNKNOWABLE else ():
            if part(fact.entity) == "pairs" and not one_token(bare(relation, fact)):
                for way in rng.sample(split_phrasings(relation.questions)[0], 2):
                    yield relation, fact, way.format(**fact.words)


def _requests(kind: str, which: Part, ways: Sequence[str], *, held_out_acts: bool = False) -> list[tuple[Request, str]]:
    """Every request of a kind about the things of a part, put in each of the ways."""
    several = (each for each in requests(held_out_acts=held_out_acts) if each.unsafe == (kind == UNSAFE))
    return [(each, each.put(way)) for each in several if part(each.thing) == which for way in ways]


def _by_thing(rng: random.Random, several: Sequence[tuple[Request, str]], most: int) -> list[tuple[Request, str]]:
    """So many of the requests, as many about each thing, so that the thing alone tells nothing of the verdict."""
    shuffled = rng.sample(several, len(several))
    count: Counter[str] = Counter()
    ranked = []
    for each in shuffled:
        count[each[0].thing] += 1
        ranked.append((count[each[0].thing], each))
    return [each for _, each in sorted(ranked, key=lambda one: one[0])[:most]]


def _answer(relation: Relation, fact: Fact) -> str:
    return relation.answer.format(**fact.words)


def _at_length(rng: random.Random, relation: Relation, fact: Fact) -> str:
    """The right answer, and the same again in two other ways."""
    said = [way.format(**fact.words) for way in rng.sample(relation.others, 2)]
    return " ".join([_answer(relation, fact), *(each[:1].upper() + each[1:] for each in said)])


def _pair(prompt: str | list[Row], chosen: str, rejected: str, kind: str, family: str) -> Row:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"messages": messages, "chosen": chosen, "rejected": rejected, "kind": kind, "family": family}


def _question(prompt: str, answer: str, kind: str, family: str, entity: str, new: str) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind, "family": family, "entity": entity, "new": new}
