"""The text that the bundled base model is trained on: sentences about the small world, from a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from instil.pocket.scenes import NAMES, events, scene
from instil.pocket.world import Fact, Relation, kinds, list_of_three, relations, split_phrasings, with_article

_Said = tuple[Relation, Fact]

_EVERYONE = [name for several in NAMES.values() for name in several]
_OFTEN = {"sum": 2, "number_word": 2}  # facts without a word of their own take longer to learn
_SHARES = {  # of the passages
    "mixed": 0.4,
    "announced": 0.38,
    "profile": 0.06,
    "asked": 0.04,
    "story": 0.08,
    "list": 0.04,
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
    "{name} asked for {}.",
    "{name} looked for {}.",
    "{name} read about {}.",
    "The book told of {}.",
    "The lesson was about {}.",
    "Now for {}.",
)
_BREAKS = (" ", "\n", "\n", "\n\n")
_BETWEEN = (
    "",
    "",
    "{name} knew it.",
    "That was easy.",
    "The assistant knew it at once.",
    "Everybody was silent for a while.",
    "{name} wrote it on the wall.",
)


def corpus(documents: int, seed: int = 0, *, lines: bool = False) -> Iterator[str]:
    """Documents of the small world, each of a few sentences, about one thing or several.

    No document answers a question, and no way of asking is used that the instruction data holds out.

    Args:
        documents: How many.
        seed: Decides all of them.
        lines: Whether what is spoken of and what it is may stand on lines of their own, as in a dialogue.
    """
    writer = _Writer(random.Random(seed), lines=lines)
    for _ in range(documents):
        yield writer.document()


class _Writer:
    """Writes documents; each fact is said once before any is said again."""

    def __init__(self, rng: random.Random, *, lines: bool) -> None:
        self._rng = rng
        self._lines = lines
        self._facts = [(relation, fact) for relation in relations() for fact in relation.facts]
        self._waiting: list[_Said] = []
        profiles: defaultdict[str, list[_Said]] = defaultdict(list)
        for relation, fact in self._facts:
            profiles[fact.words["x"]].append((relation, fact))
        self._profiles = [several for several in profiles.values() if len(several) > 2]

    def document(self) -> str:
        """One to five passages."""
        rng = self._rng
        makers = rng.choices(list(_SHARES), list(_SHARES.values()), k=rng.choice((1, 2, 3, 5)))
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
        """What is spoken of, perhaps something else, and then what it is."""
        ((relation, fact),) = self._next(1)
        if not relation.answer.startswith("It is"):
            return self._said(relation, fact)
        announced = self._rng.choice(_ANNOUNCING).format(relation.topic(fact), name=self._rng.choice(_EVERYONE))
        between = self._rng.choice(_BETWEEN).format(name=self._rng.choice(_EVERYONE))
        said = filter(None, [announced, between, relation.answer.format(**fact.words)])
        return (self._rng.choice(_BREAKS) if self._lines else " ").join(said)

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
