"""The report: one page, with nothing beside it, that says what was measured and shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from instil.evaluation.statistics import Share


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of the base model beside that of the tuned one.

    Args:
        name: What was measured.
        base: The share before.
        tuned: The share after.
        detail: Whether it is a part of the figure above it.
    """

    name: str
    base: Share
    tuned: Share
    detail: bool = False


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A prompt with its answers: the reference, that of the base model and that of the tuned one."""

    prompt: str
    reference: str
    base: str
    tuned: str
    right: bool


@dataclass(frozen=True, slots=True)
class Page:
    """What a report holds.

    Args:
        title: Its heading.
        summary: A sentence or two below that.
        about: Model, data, template, decoding and the like, by name.
        compared: The figures.
        curve: An SVG of the loss; "" for none.
        answers: Prompts with their answers.
        trained: The body of a page of `instil inspect`: tokens with what is trained marked; "" for none.
        commands: What to do next: a comment and a command each.
        warnings: What deserves a look.
    """

    title: str
    summary: str
    about: Mapping[str, Any]
    compared: Sequence[Compared]
    curve: str = ""
    answers: Sequence[SideBySide] = ()
    trained: str = ""
    commands: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default=())


def to_html(page: Page) -> str:
    """The page as HTML that asks for nothing from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("instil.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    drawing = re.sub(r"^.*?(?=<svg)", "", page.curve, flags=re.DOTALL)
    return environment.from_string(source).render(page=page, curve=drawing)
