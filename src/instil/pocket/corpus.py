"""The text that the bundled base model is trained on: sentences about the small world, from a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from instil.pocket.scenes import NAMES, events, scene
from instil.pocket.world import Fact, Relation, kinds, list_of_three, relations, split_phrasings, with_article

_Said = tuple[Relation, Fact]

_EVERYONE = [name for several in NAMES.values() for name in several]
_OFTEN = {"sum": 3, "number_word": 2}  # facts without a word of their own take longer to learn
_SHARES = {  # of the passages
    "mixed": 0.3,
    "announced": 0.32,
    "reworded": 0.06,
    "echo": 0.12,
    "profile": 0.05,
    "asked": 0.04,
    "story": 0.08,
    "list": 0.03,
}
_ASKING = (
    "The user had many questions for the assistant.",
    "The teacher had many questions.",
    "The children wanted to know everything.",
    "The system was full of questions.",
    "Nobody knew what to say.",
)
_ANNOUNCING = (
    "This page is about {}.",
    "{name} wanted to know {}.",
    "{name} spoke of {}.",
    "{name} read about {}.",
    "The book told of {}.",
    "The lesson was about {}.",
    "First comes {}.",
    "Now for {}.",
)


def corpus(documents: int, seed: int = 0) -> Iterator[str]:
    """Documents of the small world, each of a few sentences, about one thing or several.

    No document answers a question, and no way of asking is used that the instruction data holds out.

    Args:
        documents: How many.
        seed: Decides all of them.
    """
    writer = _Writer(random.Random(seed))
    for _ in range(documents):
        yield writer.document()


class _Writer:
    """Writes documents; each fact is said once before any is said again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._facts = [(relation, fact) for relation in relations() for fact in relation.facts]
        self._waiting: list[_Said] = []
        profiles: defaultdict[str, list[_Said]] = defaultdict(list)
        for relation, fact in self._facts:
            profiles[fact.words["x"]].append((relation, fact))
        self._words = [x for x in profiles if len(x) < 20 and x[-1].isalpha()]
        self._profiles = [several for several in profiles.values() if len(several) > 2]

    def document(self) -> str:
        """One to four passages."""
        rng = self._rng
        makers = rng.choices(list(_SHARES), list(_SHARES.values()), k=rng.choice((1, 1, 2, 4)))
        return "\n".join(getattr(self, f"_{maker}")() for maker in makers)

    def _next(self, count: int) -> Sequence[_Said]:
        if len(self._waiting) < count:
            often = [each for each in self._facts for _ in range(_OFTEN.get(each[0].name, 1))]
            self._waiting = self._rng.sample(often, len(often))
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def _said(self, relation: Relation, fact: Fact) -> str:
        """The fact in one of its ways, in two of five the plain one."""
        rng = self._rng
        way = relation.plain if not relation.others or rng.random() < 0.4 else rng.choice(relation.others)
        return _sentence(relation, way.format(**fact.words))

    def _mixed(self) -> str:
        return " ".join(self._said(*each) for each in self._next(self._rng.randint(2, 7)))

    def _announced(self) -> str:
        """What is spoken of, and then the plain facts about it, in the same order."""
        rng, said = self._rng, self._next(self._rng.choice((1, 1, 1, 2, 3)))
        topics = _listed([relation.topic(fact) for relation, fact in said])
        name = rng.choice(_EVERYONE)
        beginning = rng.choice(_ANNOUNCING).format(topics, name=name)
        return " ".join([beginning, *(_sentence(r, r.plain.format(**fact.words)) for r, fact in said)])

    def _echo(self) -> str:
        """Words that someone says and someone else says again: to take up what was said is learned best from such."""
        one, other = self._rng.sample(_EVERYONE, 2)
        words = ", ".join(self._rng.sample(self._words, self._rng.randint(3, 8)))
        return f"{one} said: {words}. {other} said it again: {words}."

    def _reworded(self) -> str:
        """A fact, and the same in plain words."""
        ((relation, fact),) = self._next(1)
        plain = relation.plain.format(**fact.words)
        other = self._rng.choice(relation.others or (relation.plain,)).format(**fact.words)
        return f"{_sentence(relation, other)} In other words: {_sentence(relation, plain)}"

    def _profile(self) -> str:
        several = self._rng.choice(self._profiles)
        return " ".join(self._said(*each) for each in self._rng.sample(several, len(several)))

    def _asked(self) -> str:
        questions = []
        for relation, fact in self._rng.sample(self._facts, 4):
            if ways := split_phrasings(relation.questions)[0]:
                questions.append(self._rng.choice(ways).format(**fact.words))
        return " ".join([self._rng.choice(_ASKING), *questions])

    def _story(self) -> str:
        told = scene(self._rng, events())
        ending = self._rng.random()
        if ending < 0.3:
            return f"{told.happening()} {told.mood()}"
        return told.story() + (f" In short: {told.summary()}" if ending < 0.9 else "")

    def _list(self) -> str:
        kind = self._rng.choice(list(kinds()))
        members = kinds()[kind]
        if self._rng.random() < 0.3 and members[0].startswith("the "):
            one = self._rng.choice(members).removeprefix("the ")
            return f"Among {kind} there is {with_article(one)}."
        return list_of_three(kind, self._rng.sample(members, 3))


def _sentence(relation: Relation, said: str) -> str:
    """What was said as a sentence; code stands on lines of its own."""
    return f"\n{said}\n" if relation.name == "function" else said[:1].upper() + said[1:]


def _listed(topics: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(topics[:-1]), topics[-1]]))
