"""What the small world does not hold: names that are made up, and things asked about as what they are not."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

from tokenizers import Tokenizer

from instil.pocket import model_folder
from instil.pocket.corpus import corpus
from instil.pocket.scenes import NAMES
from instil.pocket.world import Fact, Relation, relations, table, with_article

UNKNOWABLE = ("capital", "continent", "currency", "symbol", "young", "color", "french_word", "opposite")
"""The families whose answer must be known: that of a made-up name cannot be worked out, as its plural can."""

_INVENTED = 240  # names of a kind
_FRAGMENTS = 0.15  # the share of these that are one token, as long as there are such
_CONTEXT = 2
_FRAGMENT = re.compile(r"Ġ([A-Za-z][a-z]{3,})")
_BEGINNING, _END = "^" * _CONTEXT, "$"
_KINDS = {
    "countries": ("capital", "continent", "currency"),
    "elements": ("symbol",),
    "animals": ("young",),
    "things": ("color",),
    "words": ("french_word", "opposite"),
}
_OBJECTS = (
    *("aircraft", "loaf", "knife", "shelf", "roof", "box", "bus", "glass", "dress", "dish", "brush", "watch"),
    *("church", "bench", "sandwich", "piano", "photo", "radio", "key", "door", "window", "wall", "floor", "table"),
    *("chair", "bed", "room", "garden", "book", "pencil", "letter", "number", "school", "car", "train", "boat"),
    *("ship", "street", "bridge", "mountain", "island", "cloud", "cake", "cookie", "spoon", "fork", "cup"),
    *("bottle", "hat", "shirt", "shoe", "coat", "desk", "sofa", "scarf", "glove"),
)
_MISPLACED: Mapping[str, Sequence[str]] = {
    "capital": ("people", "days", "elements", "animals"),
    "continent": ("people", "days", "elements", "objects"),
    "currency": ("people", "days", "elements", "animals"),
    "symbol": ("countries", "animals", "objects"),
    "young": ("elements", "objects"),
    "color": ("countries", "days"),
    "french_word": ("animals", "elements"),
    "opposite": ("elements", "animals", "objects"),
}


def invented(relation: Relation) -> tuple[str, ...]:
    """Names that could be those of the relation's entities, and stand in no text of the base model.

    They are spelled as the real ones are: each letter follows the two before it as in one of these, and the lengths
    are theirs. Most real names are one token each, which a name that no text has cannot be; but for pieces of words
    that the tokenizer has all the same: some of the names are such pieces.
    """
    kind = next(kind for kind, several in _KINDS.items() if relation.name in several)
    return _invented()[kind]


def misplaced(relation: Relation) -> list[str]:
    """Things that the world holds, and no answer for: no country called helium, no symbol of a chair."""
    real = {bare(relation, fact) for fact in relation.facts}
    return [thing for kind in _MISPLACED[relation.name] for thing in _things()[kind] if thing not in real]


def asked_of(relation: Relation, name: str) -> Fact:
    """What the relation's questions are filled with to ask about a name that it does not hold; there is no answer."""
    put = with_article(name) if relation.name == "color" and name[:1].islower() else name
    return Fact(name, {"x": put, "X": put[:1].upper() + put[1:], "ax": with_article(name), "y": ""})


def one_token(name: str) -> bool:
    """Whether the bundled model reads a name as one token."""
    return len(_tokenizer().encode(f" {name}").ids) == 1


def bare(relation: Relation, fact: Fact) -> str:
    """The name of what a fact is about, without an article."""
    return fact.entity if relation.name == "color" else fact.words["x"]


@cache
def _invented() -> Mapping[str, tuple[str, ...]]:
    rng = random.Random(0)
    by_name = {relation.name: relation for relation in relations()}
    fragments = _fragments()
    found: dict[str, dict[str, None]] = {}
    for kind, several in _KINDS.items():
        real = [bare(by_name[name], fact) for name in several for fact in by_name[name].facts]
        spelling = _Spelling(real)
        names: dict[str, None] = {}
        while len(names) < _INVENTED:
            alike = rng.choice(real)
            pieces = fragments[alike[:1].isupper()]
            name = (
                pieces.pop()
                if one_token(alike) and pieces and rng.random() < _FRAGMENTS
                else spelling.name(len(alike), rng)
            )
            if not (_words(name) & _world_words() or any(name in several for several in found.values())):
                names[name] = None
        found[kind] = names
    return {kind: tuple(names) for kind, names in found.items()}


class _Spelling:
    """How names are spelled: which letter follows which."""

    def __init__(self, names: Sequence[str]) -> None:
        self._next: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            text = _BEGINNING + name + _END
            for at in range(_CONTEXT, len(text)):
                self._next[text[at - _CONTEXT : at]].append(text[at])

    def name(self, length: int, rng: random.Random) -> str:
        """A name of so many letters."""
        while True:
            text = _BEGINNING
            while not text.endswith(_END) and len(text) <= _CONTEXT + length:
                text += rng.choice(self._next[text[-_CONTEXT:]])
            if len(text) == _CONTEXT + length + 1 and text.endswith(_END):
                return text.removeprefix(_BEGINNING).removesuffix(_END)


@cache
def _world_words() -> frozenset[str]:
    """Every word of the facts, of the ways to say them, and what else the base model was trained on."""
    said = [text for r in relations() for text in (r.plain, *r.others, *r.questions, *r.topics)]
    said += [word for r in relations() for fact in r.facts for word in (fact.entity, *fact.words.values())]
    said += [*corpus(1500), *corpus(1500, pages=True)]
    return frozenset(word for text in said for word in _words(text))


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"\w+", text)}


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def _fragments() -> tuple[list[str], list[str]]:
    """Tokens that begin a word and are none, small ones and such with a capital, in an order of their own."""
    found = (_FRAGMENT.fullmatch(token) for token in sorted(_tokenizer().get_vocab()))
    pieces = [piece[1] for piece in found if piece and piece[1].lower() not in _world_words()]
    random.Random(0).shuffle(pieces)
    return [piece for piece in pieces if piece[0].islower()], [piece for piece in pieces if piece[0].isupper()]


@cache
def _things() -> Mapping[str, tuple[str, ...]]:
    """Things of the world that are asked about as what they are not, by kind."""
    return {
        "people": tuple(name for names in NAMES.values() for name in names),
        "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "countries": tuple(row["country"] for row in table("countries")),
        "elements": tuple(row["name"] for row in table("elements")),
        "animals": tuple(row["animal"] for row in table("animals")),
        "objects": _OBJECTS,
    }
