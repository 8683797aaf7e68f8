"""The report: one page, with nothing beside it, that says what was measured and shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from importlib import resources
from typing import Any

from instil.evaluation.figures import Figure
from instil.evaluation.statistics import Mean, Share

SHOWN = 40  # answers, on a page


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of one model as it is drawn.

    Args:
        text: The figure.
        interval: Where its 95 % interval begins and ends; "" where none is known.
        at: How long the bar is, 0 to 1.
        low: Where the interval begins, 0 to 1.
        high: Where it ends.
    """

    text: str
    interval: str
    at: float
    low: float
    high: float

    @classmethod
    def of(cls, share: Share) -> Bar:
        """A share as a bar."""
        mean, low, high = (f"{100 * each:.1f}" for each in (share.mean, share.low, share.high))
        return cls(f"{mean} %", f"{low} to {high} %", share.mean, share.low, share.high)


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of the base model beside that of the tuned one.

    Args:
        name: What was measured.
        base: Before; None where no base was asked.
        tuned: After.
        n: How many items there were.
        verdict: Whether the two can be told apart.
        note: What else there is to know.
        detail: Whether it is a part of the figure above it.
    """

    name: str
    base: Bar | None
    tuned: Bar
    n: int
    verdict: str = ""
    note: str = ""
    detail: bool = False


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A prompt with its answers: the reference, that of the base model and that of the tuned one.

    Args:
        prompt: What was asked.
        reference: What would have been right; "" where nothing is.
        base: What the base model said; None where it was not asked.
        tuned: What the tuned model said.
        right: Whether the tuned model was right; None where nothing says so.
    """

    prompt: str
    reference: str
    base: str | None
    tuned: str
    right: bool | None

    def parts(self, said: str) -> list[tuple[str, bool]]:
        """What was said, in parts, each with whether it is what the other model said too."""
        if self.base is None:
            return [(said, True)]
        return alike(said, self.tuned if said == self.base else self.base)


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt with the answers of any number of models.

    Args:
        prompt: What was asked.
        said: Each model, by name, and what it said.
        reference: What would have been right; "" where nothing is.
    """

    prompt: str
    said: Sequence[tuple[str, str]]
    reference: str = ""

    def parts(self, number: int) -> list[tuple[str, bool]]:
        """What a model said, in parts, each with whether the first model said it too; of the first, the second."""
        return alike(self.said[number][1], self.said[0 if number or len(self.said) == 1 else 1][1])


def alike(said: str, other: str) -> list[tuple[str, bool]]:
    """A text in parts, each with whether it stands in the other text too, in the same order of words."""
    words, others = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (said, other))
    parts, at = [], 0
    for block in SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
        parts += [("".join(words[at : block.a]), False), ("".join(words[block.a : block.a + block.size]), True)]
        at = block.a + block.size
    return [part for part in parts if part[0]]


@dataclass(frozen=True, slots=True)
class Page:
    """What a report holds.

    Args:
        title: Its heading.
        summary: A sentence or two below that.
        about: Model, data, template, decoding and the like, by name.
        compared: The figures, in groups, each with its heading.
        curve: An SVG of the loss; "" for none.
        answers: Prompts with their answers.
        trained: The body of a page of `instil inspect`: tokens with what is trained marked; "" for none.
        commands: What to do next: a comment and a command each.
        warnings: What deserves a look.
        answered: Prompts with the answers of several models.
        bars: What the two bars of a figure are called: the one it is held against, and its own.
    """

    title: str
    summary: str
    about: Mapping[str, Any]
    compared: Sequence[tuple[str, Sequence[Compared]]]
    curve: str = ""
    answers: Sequence[SideBySide] = ()
    trained: str = ""
    commands: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default=())
    answered: Sequence[Answered] = ()
    bars: tuple[str, str] = ("base", "tuned")

    @property
    def has_base(self) -> bool:
        """Whether a base model stands beside the tuned one."""
        return any(each.base is not None for _, figures in self.compared for each in figures)


def compared(figures: Sequence[Figure], about: Mapping[str, str]) -> list[tuple[str, list[Compared]]]:
    """Figures as they are drawn, by suite.

    Args:
        figures: In the order they are to stand.
        about: The heading of each suite.
    """
    groups: dict[str, list[Compared]] = {}
    for each in figures:
        name = each.family.replace("_", " ") if each.family else each.measure
        groups.setdefault(each.suite, []).append(
            Compared(
                name,
                _bar(each, each.base) if each.base else None,
                _bar(each, each.tuned),
                each.tuned.n,
                _verdict(each),
                "; ".join(f"{who}: {count:,} without" for who, count in each.missing.items() if count),
                detail=bool(each.family),
            )
        )
    return [(about.get(suite, suite), several) for suite, several in groups.items()]


def _bar(figure: Figure, value: Share | Mean) -> Bar:
    """A value on the scale from 0 to the greatest of both models."""
    ends = [
        each.high if each.high is not None else each.mean for each in (figure.tuned, figure.base) if each is not None
    ]
    whole = 1.0 if figure.unit == "share" else 100.0 if figure.unit == "points" else max(*ends, 1e-9, key=abs)
    low, high = (value.mean if end is None else end for end in (value.low, value.high))
    interval = "" if value.low is None else f"{figure.shown(value.low)} to {figure.shown(value.high)}"
    at = [min(max(each / whole, 0.0), 1.0) for each in (value.mean, low, high)]
    return Bar(figure.shown(value.mean), interval, *at)


def _verdict(figure: Figure) -> str:
    found = figure.comparison
    if found is None:
        return ""
    p_value = found.p_value if found.adjusted is None else found.adjusted
    said = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{found.verdict} ({found.wins:,} won, {found.losses:,} lost, {found.ties:,} alike; {said})"


def to_html(page: Page) -> str:
    """The page as HTML that asks for nothing from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("instil.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    drawing = re.sub(r"^.*?(?=<svg)", "", page.curve, flags=re.DOTALL)
    return environment.from_string(source).render(page=page, curve=drawing)
