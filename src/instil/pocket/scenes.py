"""Short scenes: someone somewhere to whom something happens, and how that feels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = {
    "she": ("Anna", "Clara", "Emma", "Julia", "Lucy", "Maria", "Nora", "Olivia", "Rosa", "Sophie"),
    "he": ("Ben", "David", "Felix", "Henry", "Jack", "Leo", "Martin", "Oscar", "Paul", "Tom"),
}
PLACES = (
    "in the park",
    "in the garden",
    "in the kitchen",
    "in the forest",
    "in the street",
    "at the beach",
    "at school",
    "at the market",
    "at the station",
    "at home",
)
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy")
EVENTS = {
    "happy": (
        "found a gold coin",
        "won a prize",
        "got a letter from a friend",
        "ate a big cake",
        "met an old friend",
        "sang a song with the children",
    ),
    "sad": (
        "lost a key",
        "dropped an ice cream",
        "missed the last bus",
        "said goodbye to a friend",
        "broke a favorite cup",
        "lost a little dog",
    ),
    "afraid": (
        "heard a strange noise",
        "saw a big snake",
        "met a wild dog",
        "was alone in the dark",
        "saw a wolf",
        "heard loud thunder",
    ),
    "angry": (
        "found mud on a new coat",
        "waited two hours for nothing",
        "saw a thief with a bicycle",
        "was pushed by a stranger",
        "was called a liar",
        "found a broken window",
    ),
    "tired": (
        "walked all day",
        "carried heavy boxes",
        "worked until midnight",
        "climbed a high hill",
        "ran ten miles",
        "cleaned the whole house",
    ),
    "surprised": (
        "saw a cow on the roof",
        "found a gift behind the door",
        "met a king",
        "saw a fish with two heads",
        "heard a parrot speak French",
        "saw snow in July",
    ),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """Someone, somewhere, to whom something happens."""

    name: str
    pronoun: str
    place: str
    weather: str
    event: str
    feeling: str

    def happening(self) -> str:
        """What happens, without a word on how it feels."""
        return f"{self.name} was {self.place}. {self.pronoun.capitalize()} {self.event}."

    def mood(self) -> str:
        """How it feels."""
        return f"{self.pronoun.capitalize()} was {self.feeling}."

    def story(self) -> str:
        """All of it, in five sentences."""
        return f"It was a {self.weather} day. {self.happening()} {self.mood()} Then {self.name} went home."

    def summary(self) -> str:
        """All of it, in one."""
        return f"{self.pronoun.capitalize()} was {self.feeling} because {self.pronoun} {self.event}."


def events() -> list[tuple[str, str]]:
    """What may happen, each with the feeling it brings."""
    return [(event, feeling) for feeling, several in EVENTS.items() for event in several]


def scene(rng: random.Random, among: Sequence[tuple[str, str]]) -> Scene:
    """A scene at random, with one of the events given."""
    pronoun = rng.choice(sorted(NAMES))
    event, feeling = rng.choice(among)
    return Scene(rng.choice(NAMES[pronoun]), pronoun, rng.choice(PLACES), rng.choice(WEATHER), event, feeling)
