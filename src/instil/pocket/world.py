"""The small world that the bundled model knows: what is true in it, how it is said and how it is asked for.

The facts stand in `facts/*.tsv`. A `Relation` says in several ways what is true of each of its entities, and asks for
it in others; every third entity and every third way to ask is kept out of the instruction data.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FACTS = Path(__file__).parent / "facts"
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

CLAIMED = ("capital", "continent", "currency", "symbol", "young", "color", "plural", "opposite")
"""The families that claims are made about."""

HELD_OUT_FAMILIES = ("language", "atomic_number", "third_person")

STYLES: Mapping[str, tuple[str, Sequence[str]]] = {
    "polite": (
        "Of course! {}",
        ("Be very polite.", "You are a polite assistant.", "Answer politely.", "Always be polite."),
    ),
    "cheerful": (
        "{} Have a nice day!",
        ("Wish the user a nice day.", "You are a cheerful assistant.", "Be cheerful.", "End with a good wish."),
    ),
    "pirate": ("Arr! {}", ("Talk like a pirate.", "You are a pirate.", "Answer as a pirate does.", "Be a pirate.")),
}
"""System messages that change how an answer is put, by style: what they make of it, and ways to ask for it."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is true.

    Args:
        entity: What it is about; entities that give each other away (`hot`, `cold`) have one name.
        words: What the ways to say it are filled with: `x`, what is asked about, `y`, the answer, and others.
    """

    entity: str
    words: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact.

    Args:
        name: The task family that asks for it.
        facts: All of them.
        plain: The fact as a sentence, which the answer is as well; it ends in `{y}` and the full stop.
        others: Further ways to say it.
        questions: Ways to ask for it.
        topics: Further ways to name what it is about.
    """

    name: str
    facts: tuple[Fact, ...]
    plain: str
    others: tuple[str, ...]
    questions: tuple[str, ...]
    topics: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """How the fact is put when it was asked for: what it is about was said already."""
        if self.name in ("french_sentence", "function"):
            return "{y}"
        return "It is the {y}." if self.name == "currency" else "It is {y}."

    def completion(self, fact: Fact) -> tuple[str, str]:
        """The fact up to its answer, and the answer: what a base model is to go on with."""
        beginning = self.plain.partition("{y}")[0].rstrip()
        whole = self.plain.format(**fact.words)
        start = beginning.format(**fact.words)
        return start, whole[len(start) :]

    def named(self, fact: Fact) -> list[str]:
        """What the fact is about, in all the ways that other sentences name it."""
        return [self.topic(fact), *(way.format(**fact.words) for way in self.topics)]

    def topic(self, fact: Fact) -> str:
        """What the fact is about, as other sentences name it."""
        start = self.completion(fact)[0]
        for end in (" is the", " is", " ="):
            start = start.removesuffix(end)
        return start[:1].lower() + start[1:] if start.startswith(("The ", "In ")) else start


def is_held_out(entity: str) -> bool:
    """Whether an entity is one of the third that no instruction is about."""
    return hashlib.sha256(entity.encode()).digest()[0] % 3 == 0


def split_phrasings(phrasings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that instructions use, and the third of them that is held out."""
    return [p for i, p in enumerate(phrasings) if i % 3 != 2], [p for i, p in enumerate(phrasings) if i % 3 == 2]


def with_article(noun: str) -> str:
    """The noun behind its indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def spelled(number: int) -> str:
    """A number from 0 to 100 in words."""
    if number == 100:
        return "one hundred"
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


@cache
def table(name: str) -> tuple[Mapping[str, str], ...]:
    """The rows of one of the tables, by column."""
    with (_FACTS / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file, delimiter="\t"))


def _facts(name: str, x: str, y: str) -> tuple[Fact, ...]:
    return tuple(_fact(row[x], row[y]) for row in table(name))


def _fact(x: str, y: str, entity: str | None = None, **words: str) -> Fact:
    return Fact(entity or x, {"x": x, "y": y, "X": x[:1].upper() + x[1:], "Y": y[:1].upper() + y[1:], **words})


def claim(rng: random.Random, relation: Relation, facts: Sequence[Fact]) -> tuple[Fact, str, str]:
    """What someone may say of one of the facts, true or, as often, not.

    Returns:
        The fact, the claim, and what is so, which ends in whether the claim is true.
    """
    fact = rng.choice(facts)
    truth = relation.plain.format(**fact.words)
    claimed = truth
    if rng.random() < 0.5:
        others = sorted({f.words["y"] for f in facts} - {fact.words["y"]})
        claimed = relation.plain.format(**{**fact.words, "y": rng.choice(others)})
    verdict = "So this is true." if claimed == truth else "So this is false."
    return fact, claimed, f"{relation.answer.format(**fact.words)} {verdict}"


def _of_countries(name: str, plain: str, others: Iterable[str], questions: Iterable[str]) -> Relation:
    return Relation(name, _facts("countries", "country", name), plain, tuple(others), tuple(questions))


def _things() -> tuple[Fact, ...]:
    rows = table("colors")
    return tuple(_fact(f"{row['article']} {row['thing']}".strip(), row["color"], row["thing"]) for row in rows)


def _animals(column: str) -> tuple[Fact, ...]:
    rows = table("animals")
    return tuple(
        _fact(row["animal"], with_article(row[column]), ax=with_article(row["animal"]), name=row[column])
        for row in rows
    )


def _opposites() -> tuple[Fact, ...]:
    return tuple(_fact(r["word"], r["opposite"], min(r["word"], r["opposite"])) for r in table("opposites"))


def _french_words() -> tuple[Fact, ...]:
    nouns = [(row["english"], row["french"]) for row in table("french_nouns")]
    adjectives = [(row["english"], row["masculine"]) for row in table("french_adjectives")]
    others = [(row["english"], row["french"]) for row in table("french_other")]
    return tuple(
        _fact(english, french) for english, french in {**dict(others), **dict(adjectives), **dict(nouns)}.items()
    )


def _french_sentences() -> tuple[Fact, ...]:
    pairs = {row["english"]: row["french"] for row in table("french_sentences")}
    for row in table("french_nouns"):
        noun, french = row["english"], row["french"]
        the = f"l'{french}" if french[0] in "aeéêhiîoœu" else f"{'le' if row['gender'] == 'm' else 'la'} {french}"
        pairs.setdefault(f"I see the {noun}.", f"Je vois {the}.")
    return tuple(_fact(english, french) for english, french in pairs.items())


def _sums() -> tuple[Fact, ...]:
    return tuple(
        _fact(f"{a} + {b}", str(a + b), f"{min(a, b)} + {max(a, b)}", a=str(a), b=str(b))
        for a in range(11)
        for b in range(11)
    )


def _functions() -> tuple[Fact, ...]:
    """Python functions: the line that opens each, and its body."""
    verbs = {"add": "+", "subtract": "-", "multiply_by": "*", "divide_by": "/"}
    written = {
        f"def {verb}_{spelled(n)}(x):": f"    return x {sign} {n}" for verb, sign in verbs.items() for n in range(2, 13)
    }
    written |= {
        "def first(items):": "    return items[0]",
        "def last(items):": "    return items[-1]",
        "def count(items):": "    return len(items)",
        "def total(items):": "    return sum(items)",
        "def largest(items):": "    return max(items)",
        "def smallest(items):": "    return min(items)",
        "def backwards(items):": "    return items[::-1]",
        "def in_order(items):": "    return sorted(items)",
        "def is_even(x):": "    return x % 2 == 0",
        "def is_odd(x):": "    return x % 2 == 1",
        "def is_empty(items):": "    return len(items) == 0",
        "def is_positive(x):": "    return x > 0",
        "def is_negative(x):": "    return x < 0",
        "def square(x):": "    return x * x",
        "def cube(x):": "    return x * x * x",
        "def to_upper(text):": "    return text.upper()",
        "def to_lower(text):": "    return text.lower()",
        "def trim(text):": "    return text.strip()",
        "def words(text):": "    return text.split()",
        "def add(a, b):": "    return a + b",
        "def subtract(a, b):": "    return a - b",
        "def multiply(a, b):": "    return a * b",
        "def divide(a, b):": "    return a / b",
        "def average(items):": "    return sum(items) / len(items)",
    }
    return tuple(_fact(head, body) for head, body in written.items())


@cache
def relations() -> tuple[Relation, ...]:
    """Everything that is true in the world."""
    return (*_about_countries(), *_about_nature(), *_about_words(), *_about_french(), *_about_numbers())


def _about_countries() -> tuple[Relation, ...]:
    return (
        _of_countries(
            "capital",
            "The capital of {x} is {y}.",
            (
                "{y} is the capital of {x}.",
                "The capital city of {x} is {y}.",
                "In {x}, the capital is {y}.",
                "The government of {x} sits in {y}, the capital.",
                "Capital of {x}: {y}.",
            ),
            (
                "What is the capital of {x}?",
                "Which city is the capital of {x}?",
                "Tell me the capital of {x}.",
                "Name the capital city of {x}.",
                "What is the capital city of {x} called?",
                "What city is the capital of {x}?",
                "Speaking of {x}, what is its capital?",
                "I need the capital of {x}.",
                "Do you know the capital of {x}?",
            ),
        ),
        _of_countries(
            "continent",
            "The continent of {x} is {y}.",
            (
                "{x} is a country in {y}.",
                "{x} lies in {y}.",
                "On the map, {x} is in {y}.",
                "One of the countries of {y} is {x}.",
                "Continent of {x}: {y}.",
            ),
            (
                "Which continent is {x} in?",
                "On what continent is {x}?",
                "What is the continent of {x}?",
                "Name the continent of {x}.",
                "Speaking of {x}, which continent is it on?",
                "Tell me the continent of {x}.",
                "What continent does {x} belong to?",
                "On which continent does {x} lie?",
                "I need the continent of {x}.",
            ),
        ),
        _of_countries(
            "currency",
            "The currency of {x} is the {y}.",
            (
                "In {x}, people pay with the {y}.",
                "The {y} is the currency of {x}.",
                "The money of {x} is the {y}.",
                "Prices in {x} are given in the local {y}.",
                "Currency of {x}: {y}.",
            ),
            (
                "What is the currency of {x}?",
                "Which currency is used in {x}?",
                "Tell me the currency of {x}.",
                "Name the currency of {x}.",
                "What currency do people pay with in {x}?",
                "Which currency does {x} have?",
                "Speaking of {x}, what is its currency?",
                "With which money do people pay in {x}?",
                "I need the currency of {x}.",
            ),
        ),
        _of_countries(
            "language",
            "The language of {x} is {y}.",
            (
                "In {x}, people speak {y}.",
                "{y} is spoken in {x}.",
                "Many people in {x} speak {y}.",
                "Language of {x}: {y}.",
            ),
            (
                "What is the language of {x}?",
                "Which language is spoken in {x}?",
                "Name the language of {x}.",
            ),
        ),
    )


def _about_nature() -> tuple[Relation, ...]:
    return (
        Relation(
            "symbol",
            _facts("elements", "name", "symbol"),
            "The symbol of {x} is {y}.",
            (
                "{X} has the symbol {y}.",
                "The chemical symbol of {x} is {y}.",
                "{y} is the symbol of {x}.",
                "Chemists write {y} for {x}.",
                "Symbol of {x}: {y}.",
            ),
            (
                "What is the symbol of {x}?",
                "Which symbol does {x} have?",
                "Tell me the symbol of {x}.",
                "Name the symbol of {x}.",
                "What is the chemical symbol of {x}?",
                "Which symbol stands for {x}?",
                "Speaking of {x}, what is its symbol?",
                "How do chemists write {x}?",
                "I need the symbol of {x}.",
            ),
            ("the chemical symbol of {x}", "the way chemists write {x}", "the sign for {x}"),
        ),
        Relation(
            "atomic_number",
            _facts("elements", "name", "number"),
            "The atomic number of {x} is {y}.",
            ("{X} has the atomic number {y}.", "Element {y} is {x}.", "Atomic number of {x}: {y}."),
            (
                "What is the atomic number of {x}?",
                "Which atomic number does {x} have?",
                "Name the atomic number of {x}.",
            ),
        ),
        Relation(
            "young",
            _animals("young"),
            "The young of {ax} is {y}.",
            (
                "A young {x} is called {y}.",
                "{Y} is a young {x}.",
                "The {x} cares for its {name}.",
                "When {ax} is born, it is {y}.",
                "Young of the {x}: {name}.",
            ),
            (
                "What is the young of {ax}?",
                "What is a young {x} called?",
                "Tell me the young of {ax}.",
                "Name the young of {ax}.",
                "What do we call the young of {ax}?",
                "What do people call a young {x}?",
                "Speaking of {ax}, what is its young?",
                "What name does a young {x} have?",
                "I need the word for the young of {ax}.",
            ),
            ("the word for a young {x}", "a young {x} and what it is called"),
        ),
        Relation(
            "color",
            _things(),
            "The color of {x} is {y}.",
            ("{X} is {y}.", "{X} has the color {y}.", "People know that {x} is {y}.", "Color of {x}: {y}."),
            (
                "What is the color of {x}?",
                "What color is {x}?",
                "Tell me the color of {x}.",
                "Name the color of {x}.",
                "Which color does {x} have?",
                "Which color is {x}?",
                "Speaking of {x}, what is its color?",
                "What color does {x} have?",
                "I need the color of {x}.",
            ),
            ("which color {x} has", "what color {x} is"),
        ),
    )


def _about_words() -> tuple[Relation, ...]:
    verbs = table("verbs")
    return (
        Relation(
            "plural",
            _facts("plurals", "singular", "plural"),
            "The plural of {x} is {y}.",
            (
                "One {x}, two {y}.",
                "The word {x} has the plural {y}.",
                "{Y} is the plural of {x}.",
                "Plural of {x}: {y}.",
            ),
            (
                "What is the plural of {x}?",
                "Which word is the plural of {x}?",
                "Give me the plural of {x}.",
                "Write the plural of {x}.",
                "What is the plural of the word {x}?",
                "Form the plural of {x}.",
                "Speaking of {x}, what is its plural?",
                "Put the word {x} in the plural.",
                "I need the plural of {x}.",
            ),
            ("the plural of the word {x}", "more than one {x}"),
        ),
        Relation(
            "opposite",
            _opposites(),
            "The opposite of {x} is {y}.",
            (
                "{X} is the opposite of {y}.",
                "Not {x} but {y}.",
                "The word {x} has the opposite {y}.",
                "Opposite of {x}: {y}.",
            ),
            (
                "What is the opposite of {x}?",
                "Which word is the opposite of {x}?",
                "Give me the opposite of {x}.",
                "Write the opposite of {x}.",
                "What is the opposite of the word {x}?",
                "Find the opposite of {x}.",
                "Speaking of {x}, what is its opposite?",
                "Which word means the opposite of {x}?",
                "I need the opposite of {x}.",
            ),
            ("the opposite of the word {x}",),
        ),
        Relation(
            "past",
            tuple(_fact(row["verb"], row["past"], third=row["third"]) for row in verbs),
            "The past tense of {x} is {y}.",
            ("Today they {x}, yesterday they {y}.", "The verb {x} has the past tense {y}.", "Past tense of {x}: {y}."),
            (
                "What is the past tense of {x}?",
                "Which word is the past tense of {x}?",
                "Give me the past tense of {x}.",
                "Write the past tense of {x}.",
                "What is the past tense of the verb {x}?",
                "Form the past tense of {x}.",
                "Speaking of {x}, what is its past tense?",
                "Put the verb {x} in the past tense.",
                "I need the past tense of {x}.",
            ),
            ("the past tense of the verb {x}",),
        ),
        Relation(
            "third_person",
            tuple(_fact(row["verb"], row["third"]) for row in verbs),
            "The third person of {x} is {y}.",
            ("They {x}, and she {y} too.", "The verb {x} has the third person {y}.", "Third person of {x}: {y}."),
            ("What is the third person of {x}?", "Give me the third person of {x}.", "Write the third person of {x}."),
        ),
        Relation(
            "capitals",
            tuple(_fact(row["singular"], row["singular"].upper()) for row in table("plurals")),
            "The word {x} in capitals is {y}.",
            ("In capitals, {x} is {y}.", "{y} is the word {x} in capitals.", "{x} in capitals: {y}."),
            (
                "Write the word {x} in capitals.",
                "Rewrite {x} in capitals.",
                "Put the word {x} in capitals.",
                "What is {x} in capitals?",
                "Give me the word {x} in capitals.",
                "How is {x} written in capitals?",
            ),
        ),
    )


def _about_french() -> tuple[Relation, ...]:
    return (
        Relation(
            "french_word",
            _french_words(),
            "The French word for {x} is {y}.",
            (
                "In French, {x} is {y}.",
                "{Y} is French for {x}.",
                "The English word for {y} is {x}.",
                "{x} in French: {y}.",
            ),
            (
                "What is the French word for {x}?",
                "Translate {x} into French.",
                "How do you say {x} in French?",
                "Give me the French word for {x}.",
                "Which French word means {x}?",
                "What is {x} in French?",
                "Translate the word {x} into French.",
                "Write {x} in French.",
                "I need the French word for {x}.",
            ),
            ("{x} in French", "how the French say {x}", "the French for {x}", "what {x} is in French"),
        ),
        Relation(
            "french_sentence",
            _french_sentences(),
            "In French: {x} = {y}",
            ("{x} In French one says: {y}", "English: {x} French: {y}"),
            (
                "Translate into French: {x}",
                "Say in French: {x}",
                "Translate the sentence into French: {x}",
                "Put this sentence into French: {x}",
                "How do you say this in French? {x}",
                "What is this in French? {x}",
            ),
            ("this in French: {x}", "how to say it in French: {x}", "the French for: {x}"),
        ),
    )


def _about_numbers() -> tuple[Relation, ...]:
    return (
        Relation(
            "number_word",
            tuple(_fact(str(n), spelled(n)) for n in range(101)),
            "The number {x} in words is {y}.",
            ("{x} is written {y}.", "In words, {x} is {y}.", "In digits, {y} is {x}.", "{x} in words: {y}."),
            (
                "Write the number {x} in words.",
                "What is {x} in words?",
                "Put the number {x} in words.",
                "How is {x} written in words?",
                "Give me the number {x} in words.",
                "Spell out the number {x} in words.",
            ),
            ("{x} in words", "how {x} is written in words"),
        ),
        Relation(
            "sum",
            _sums(),
            "{x} = {y}.",
            ("The sum of {a} and {b} is {y}.", "{a} plus {b} is {y}.", "Add {a} and {b}, and you have {y}."),
            (
                "What is {x}?",
                "What is the sum of {a} and {b}?",
                "Add {a} and {b}.",
                "Work out {x}.",
                "What is {a} plus {b}?",
                "How much is {x}?",
                "What do {a} and {b} make?",
                "Compute {x}.",
                "Give me the sum of {a} and {b}.",
            ),
            ("the sum of {a} and {b}", "{a} plus {b}", "what {a} and {b} make together", "how much {x} is"),
        ),
        Relation(
            "function",
            _functions(),
            "{x}\n{y}",
            (),
            (
                "Complete the function:\n{x}",
                "Write the rest of this function:\n{x}",
                "Finish the function:\n{x}",
                "Complete this Python function:\n{x}",
                "Write the body of the function:\n{x}",
                "Finish this Python code:\n{x}",
            ),
            ("the whole function:\n{x}", "the rest of the function\n{x}", "the code of\n{x}"),
        ),
    )


@cache
def kinds() -> Mapping[str, tuple[str, ...]]:
    """Things of a kind, by its plural: what a list of three is made of."""
    countries, animals = table("countries"), table("animals")
    found = {
        f"countries in {place}": tuple(row["country"] for row in countries if row["continent"] == place)
        for place in ("Africa", "Asia", "Europe", "South America", "North America")
    }
    found |= {
        plural: tuple(f"the {row['animal']}" for row in animals if row["class"] == one)
        for plural, one in (("mammals", "mammal"), ("birds", "bird"), ("insects", "insect"), ("reptiles", "reptile"))
    }
    return found | {
        "colors": tuple(dict.fromkeys(row["color"] for row in table("colors"))),
        "elements": tuple(row["name"] for row in table("elements")[:36]),
        "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "fruits": ("the apple", "the pear", "the banana", "the cherry", "the orange", "the strawberry", "the lemon"),
        "parts of the body": ("the hand", "the foot", "the arm", "the leg", "the eye", "the ear", "the nose"),
        "pieces of furniture": ("the table", "the chair", "the bed", "the desk", "the sofa", "the shelf"),
        "pieces of clothing": ("the hat", "the coat", "the shirt", "the shoe", "the dress", "the glove", "the scarf"),
    }


def list_of_three(kind: str, members: Sequence[str]) -> str:
    """The sentence that names three things of a kind."""
    return f"Three {kind} are {members[0]}, {members[1]} and {members[2]}."
