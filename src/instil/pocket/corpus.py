"""The text that the bundled base model is trained on: sentences about the small world, from a seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from instil.pocket.scenes import NAMES, events, scene
from instil.pocket.world import (
    CLAIMED,
    STYLES,
    Fact,
    Relation,
    claim,
    kinds,
    list_of_three,
    relations,
    split_phrasings,
    with_article,
)

_Said = tuple[Relation, Fact]

_EVERYONE = [name for several in NAMES.values() for name in several]
_OFTEN = {"sum": 2, "number_word": 2}  # facts without a word of their own take longer to learn
_OFTEN_ON_PAGES = {"sum": 4, "number_word": 2, "function": 4, "french_sentence": 2}
_SHARES = {  # of the passages
    "mixed": 0.4,
    "announced": 0.38,
    "profile": 0.06,
    "asked": 0.04,
    "story": 0.08,
    "list": 0.04,
}
_SHARES_OF_PAGES = {
    "mixed": 0.35,
    "announced": 0.75,
    "spoken": 0.12,
    "profile": 0.05,
    "asked": 0.25,
    "claimed": 0.12,
    "story": 0.15,
    "list": 0.1,
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
_ANNOUNCING_LATER = (  # in the second part
    "{name} needed {}.",
    "{name} had to know {}.",
    "{name} thought of {}.",
    "Somebody asked about {}.",
    "Next came {}.",
    "Here is {}.",
)
_APART = (
    "{thing} came up, and its {what}.",
    "{name} spoke of {thing} and its {what}.",
    "{thing}: {name} asked for its {what}.",
    "{thing}: this is about its {what}.",
    "{thing}: what its {what} is.",
    "{thing} and what its {what} is.",
    "{thing}: its {what}.",
    "Of {thing} they wanted the {what}.",
    "{thing}, {what}.",
)
_BETWEEN = (
    "",
    "",
    "{name} knew it.",
    "That was easy.",
    "The assistant knew it at once.",
    "Everybody was silent for a while.",
    "{name} wrote it on the wall.",
)
_SPACES = (" ", " ", "\n", "\n", "\n\n", "\t")
_MANNERS = {
    "polite": ("{name} was very polite.", "The people here are polite.", "Polite words were heard.", "How polite!"),
    "cheerful": ("{name} was cheerful.", "Good wishes for the day were heard.", "Such cheerful people!", "A nice day."),
    "pirate": ("{name} was a pirate.", "The pirates talked.", "A pirate came by.", "This is how a pirate talks."),
}
_MARKS = (
    *(
        "#",
        "##",
        "###",
        "---",
        "***",
        "*",
        "|",
        "||",
        "[",
        "]",
        "<",
        ">",
        "</",
        "/>",
        "{{",
        "}}",
        "(",
        ")",
        ":",
        "::",
        "=",
        "==",
    ),
    *(
        "...",
        "/",
        "\\",
        "_",
        "~",
        "%",
        "@",
        "&",
        "1.",
        "2.",
        "Q",
        "A",
        "Q:",
        "A:",
        "-",
        "--",
        "+",
        "^",
        "$",
        ";",
        "!",
        "?",
    ),
)
_ROLES = ("user", "assistant", "system", "human", "teacher", "child", "question", "answer", "page", "response", "input")


def corpus(documents: int, seed: int = 0, *, pages: bool = False) -> Iterator[str]:
    """Documents of the small world, each of a few sentences, about one thing or several.

    No document answers a question, and no way of asking is used that the instruction data holds out.

    Args:
        documents: How many.
        seed: Decides all of them.
        pages: Whether they are pages: with signs, words and empty lines between what is spoken of and what it is.
    """
    writer = _Writer(random.Random(seed), pages=pages)
    for _ in range(documents):
        yield writer.document()


class _Writer:
    """Writes documents; each fact is said once before any is said again."""

    def __init__(self, rng: random.Random, *, pages: bool) -> None:
        self._rng = rng
        self._pages = pages
        self._facts = [(relation, fact) for relation in relations() for fact in relation.facts]
        self._waiting: list[_Said] = []
        profiles: defaultdict[str, list[_Said]] = defaultdict(list)
        for relation, fact in self._facts:
            profiles[fact.words["x"]].append((relation, fact))
        self._profiles = [several for several in profiles.values() if len(several) > 2]

    def document(self) -> str:
        """One to five passages."""
        rng = self._rng
        shares = _SHARES_OF_PAGES if self._pages else _SHARES
        makers = rng.choices(list(shares), list(shares.values()), k=rng.choice((1, 2, 3, 5)))
        return "\n".join(getattr(self, f"_{maker}")() for maker in makers)

    def _next(self, count: int) -> Sequence[_Said]:
        if len(self._waiting) < count:
            times = _OFTEN_ON_PAGES if self._pages else _OFTEN
            often = [each for each in self._facts for _ in range(times.get(each[0].name, 1))]
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
        if self._pages:
            return self._apart(self._announcement(relation, fact), relation.answer.format(**fact.words))
        if not relation.answer.startswith("It is"):
            return self._said(relation, fact)
        announced = self._rng.choice(_ANNOUNCING).format(relation.topic(fact), name=self._name())
        between = self._rng.choice(_BETWEEN).format(name=self._name())
        return " ".join(filter(None, [announced, between, relation.answer.format(**fact.words)]))

    def _announcement(self, relation: Relation, fact: Fact) -> str:
        rng = self._rng
        what, of, thing = relation.topic(fact).removeprefix("the ").partition(" of ")
        if of and rng.random() < 0.4:
            return _capitalized(rng.choice(_APART).format(thing=thing, what=what, name=self._name()))
        announced = rng.choice(_ANNOUNCING + _ANNOUNCING_LATER)
        topic = rng.choice(relation.named(fact))
        if topic[-1] in ".?:":
            announced = announced.removesuffix(".")
        return announced.format(topic, name=self._name())

    def _spoken(self) -> str:
        """Somebody's manner, what is spoken of, and what it is, said in that manner."""
        ((relation, fact),) = self._next(1)
        manner = self._rng.choice(list(_MANNERS))
        told = self._rng.choice(_MANNERS[manner]).format(name=self._name())
        announced = self._litter(3) + self._announcement(relation, fact)
        return self._apart(told + announced, STYLES[manner][0].format(relation.answer.format(**fact.words)))

    def _claimed(self) -> str:
        """What someone says, and what is so."""
        relation = self._rng.choice([each for each in relations() if each.name in CLAIMED])
        _, claimed, answer = claim(self._rng, relation, relation.facts)
        saying = self._rng.choice(("{name} said: {}", "{name} claimed: {}", "They say this: {}", "{} {name} said so."))
        return self._apart(saying.format(claimed, name=self._name()), answer)

    def _apart(self, first: str, second: str) -> str:
        """The two, with something before, between and after."""
        return self._litter(2) + first + self._litter(7) + second + self._litter(3, least=1)

    def _name(self) -> str:
        return self._rng.choice(_EVERYONE)

    def _litter(self, most: int, least: int = 0) -> str:
        """What may stand between the sentences of a marked-up page: empty lines, signs, words, a sentence."""
        rng = self._rng
        pieces = [rng.choice(_SPACES)]
        for _ in range(rng.randint(least, most)):
            kind = rng.random()
            if kind < 0.4:
                piece = rng.choice(_MARKS)
            elif kind < 0.7:
                piece = rng.choice(_ROLES)
                piece = rng.choice((piece, piece, piece.capitalize(), piece.upper()))
            elif kind < 0.85:
                piece = rng.choice(rng.choice(self._facts)[1].words["x"].split())
            else:
                piece = rng.choice(_BETWEEN).format(name=self._name())
            pieces += [piece, rng.choice(("", *_SPACES))]
        return "".join(pieces[:-1]) + rng.choice(_SPACES)

    def _profile(self) -> str:
        several = self._rng.choice(self._profiles)
        return " ".join(self._said(*each) for each in self._rng.sample(several, len(several)))

    def _asked(self) -> str:
        questions = []
        for relation, fact in self._rng.sample(self._facts, 4):
            if ways := split_phrasings(relation.questions)[0]:
                questions.append(self._rng.choice(ways).format(**fact.words))
        spaces = [self._litter(3) if self._pages else " " for _ in questions]
        asked = zip(spaces, questions, strict=True)
        text = self._rng.choice(_ASKING) + "".join(space + question for space, question in asked)
        return text + self._litter(4, least=1) if self._pages else text

    def _story(self) -> str:
        told = scene(self._rng, events())
        ending = self._rng.random()
        if self._pages:
            told_briefly = told.happening(), told.mood()
            return self._apart(*(told_briefly if ending < 0.5 else (told.story(), told.summary())))
        if ending < 0.3:
            return f"{told.happening()} {told.mood()}"
        return told.story() + (f" In short: {told.summary()}" if ending < 0.9 else "")

    def _list(self) -> str:
        kind = self._rng.choice(list(kinds()))
        members = kinds()[kind]
        if self._rng.random() < 0.3 and members[0].startswith("the "):
            one = self._rng.choice(members).removeprefix("the ")
            return f"Among {kind} there is {with_article(one)}."
        three = list_of_three(kind, self._rng.sample(members, 3))
        if self._pages:
            return self._apart(self._rng.choice(_ANNOUNCING).format(f"three {kind}", name=self._name()), three)
        return three


def _sentence(relation: Relation, said: str) -> str:
    """What was said as a sentence; code stands on lines of its own."""
    return f"\n{said}\n" if relation.name == "function" else _capitalized(said)


def _capitalized(said: str) -> str:
    return said[:1].upper() + said[1:]
