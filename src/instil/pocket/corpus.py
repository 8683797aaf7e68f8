"""The text that the bundled base model is trained on: sentences about the small world, from a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator

from instil.pocket.scenes import events, scene
from instil.pocket.world import Fact, Relation, kinds, list_of_three, relations, split_phrasings, with_article

_Said = list[tuple[Relation, Fact]]


def corpus(documents: int, seed: int = 0) -> Iterator[str]:
    """Documents of the small world, each of a few sentences, about one thing or several.

    No document answers a question, and no way of asking is used that the instruction data holds out.

    Args:
        documents: How many.
        seed: Decides all of them.
    """
    rng = random.Random(seed)
    facts: _Said = [(relation, fact) for relation in relations() for fact in relation.facts]
    profiles: defaultdict[str, _Said] = defaultdict(list)
    for relation, fact in facts:
        profiles[fact.words["x"]].append((relation, fact))
    about = [several for several in profiles.values() if len(several) > 2]
    shuffled: _Said = []

    def mixed(rng: random.Random) -> str:
        nonlocal shuffled
        size = rng.randint(2, 7)
        if len(shuffled) < size:  # each fact once before any is said again
            shuffled = rng.sample(facts, len(facts))
        said, shuffled = shuffled[:size], shuffled[size:]
        return " ".join(_said(rng, *each) for each in said)

    def profile(rng: random.Random) -> str:
        several = rng.choice(about)
        return " ".join(_said(rng, *each) for each in rng.sample(several, len(several)))

    def asked(rng: random.Random) -> str:
        questions = [_asked(rng, *each) for each in rng.sample(facts, 4)]
        return rng.choice(_ASKING) + " " + " ".join(filter(None, questions))

    makers: dict[Callable[[random.Random], str], float] = {
        mixed: 0.66,
        profile: 0.12,
        asked: 0.05,
        _story: 0.12,
        _list: 0.05,
    }
    for _ in range(documents):
        parts = rng.choices(list(makers), list(makers.values()), k=rng.choice((1, 1, 2, 4)))
        yield "\n".join(make(rng) for make in parts)


_ASKING = (
    "The teacher had many questions.",
    "The children wanted to know everything.",
    "These questions were in the book.",
    "Nobody knew what to say.",
)


def _said(rng: random.Random, relation: Relation, fact: Fact) -> str:
    """The fact in one of its ways, in two of five the plain one."""
    way = relation.plain if not relation.others or rng.random() < 0.4 else rng.choice(relation.others)
    said = way.format(**fact.words)
    return f"\n{said}\n" if relation.name == "function" else said[:1].upper() + said[1:]


def _asked(rng: random.Random, relation: Relation, fact: Fact) -> str:
    ways = split_phrasings(relation.questions)[0]
    return rng.choice(ways).format(**fact.words) if ways else ""


def _story(rng: random.Random) -> str:
    told = scene(rng, events())
    ending = rng.random()
    if ending < 0.3:
        return f"{told.happening()} {told.mood()}"
    return told.story() + (f" In short: {told.summary()}" if ending < 0.8 else "")


def _list(rng: random.Random) -> str:
    kind = rng.choice(list(kinds()))
    members = kinds()[kind]
    if rng.random() < 0.3 and members[0].startswith("the "):
        one = rng.choice(members).removeprefix("the ")
        return f"Among {kind} there is {with_article(one)}."
    return list_of_three(kind, rng.sample(members, 3))
