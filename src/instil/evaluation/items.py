"""What models were asked and what they said: the items that every figure is computed from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from instil.data.strict_json import parse
from instil.errors import DataError, RowProblem
from instil.training.files import plain, write_json

T = TypeVar("T")
Who = Literal["base", "tuned"]
Scores = dict[str, Any]

ITEMS, EVALUATION = "items.jsonl", "evaluation.json"
TOO_LONG = "too-long"
"""How an answer ended that was never begun, for the prompt is longer than the model takes."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Args:
        text: What was said, without special tokens.
        ended: `stop`, `stop-string`; cut at the `length` asked for or as the `context` was full; or `too-long`.
        tokens: How many it has, the stop token not counted.
        dropped_turns: How many of the oldest turns were left out of its prompt, so that it fits.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    text: str
    ended: str
    tokens: int
    dropped_turns: int = 0


@dataclass(slots=True)
class Item:
    """One thing that models were asked, with what they said and what that is worth.

    Args:
        suite: The suite it is of.
        id: Its name there: `file:line`, or what the file calls it.
        family: The task it belongs to; "" for none.
        messages: The conversation up to the answer, as plain messages; empty where nothing is generated.
        tools: The tools on offer.
        later_turns: What is said after each answer, before the next.
        wanted: What the suite scores by: references, instructions, a label.
        said: The answers of each model, one to each turn.
        scores: What they are worth, by name: plain JSON values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    suite: str
    id: str
    family: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    later_turns: list[list[dict[str, Any]]] = field(default_factory=list)
    wanted: dict[str, Any] = field(default_factory=dict)
    said: dict[Who, list[Said]] = field(default_factory=dict)
    scores: dict[Who, Scores] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The last thing that was said before the answer."""
        return str(self.messages[-1]["content"]) if self.messages else ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was evaluated and how: with the items, all that figures and report are made of.

    Args:
        about: Models, data, decoding and the like, by name, for people.
        judge: The model that judges answers; "" for none.
        criteria: What it rates the answers to a person's own records by.
        trained: The body of a page of `instil inspect`: tokens with what is trained marked; "" for none.
        harness: What `instil.evaluation.lm_eval.run` found, by model.
    """

    about: dict[str, Any] = field(default_factory=dict)
    judge: str = ""
    criteria: list[str] = field(default_factory=list)
    trained: str = ""
    harness: dict[str, Any] = field(default_factory=dict)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`, whole or not at all."""
    write_json(folder / EVALUATION, asdict(evaluation))


def read_evaluation(folder: Path) -> Evaluation | None:
    """What was evaluated; None where the folder does not say.

    Raises:
        DataError: The file cannot be read.
    """
    path = folder / EVALUATION
    if not path.exists():
        return None
    try:
        return TypeAdapter(Evaluation).validate_python(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}", "Remove it, or evaluate anew.") from error


def spaced(several: Sequence[T], most: int) -> list[T]:
    """As many of them, evenly spaced, in their order; all where there are no more."""
    count = min(len(several), most)
    return [several[number * len(several) // count] for number in range(count)]


def write_items(folder: Path, items: Iterable[Item]) -> None:
    """Write `items.jsonl`, an item a line, whole or not at all."""
    draft = folder / f".{ITEMS}"
    try:
        with draft.open("w", encoding="utf-8", errors="replace") as file:  # names of files that are no text
            for item in items:
                values = {name: value for name, value in asdict(item).items() if value not in ("", [], {})}
                file.write(json.dumps(plain(values), ensure_ascii=False, allow_nan=False) + "\n")
        draft.replace(folder / ITEMS)
    finally:
        draft.unlink(missing_ok=True)


def read_items(folder: Path) -> list[Item]:
    """The items of a folder that `instil evaluate` wrote; none where it asked nothing but tasks of the harness.

    Raises:
        DataError: There is no such file, or lines of it are no items; all of them are named.
    """
    path = folder / ITEMS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path}: cannot be read: {_reason(error)}"
        raise DataError(what, "Name a folder that `instil evaluate` wrote.") from error
    items: list[Item] = []
    problems: list[RowProblem] = []
    reader = TypeAdapter(Item)
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            parse(line)  # stricter than what comes
            items.append(reader.validate_json(line))
        except ValidationError as error:
            problems += (
                RowProblem(f"{path}:{number}", ".".join(map(str, each["loc"])), _plainly(each), "set it back")
                for each in error.errors()
            )
        except ValueError as error:
            problems.append(RowProblem(f"{path}:{number}", "", f"is no item: {error}", "set it back"))
    if problems:
        raise DataError(f"{path}: has lines that are no items", problems=problems)
    return items


def _plainly(error: ErrorDetails) -> str:
    said = {"missing": "is missing", "unexpected_keyword_argument": "there is no such field"}
    return said.get(error["type"]) or f"{error['msg']}, and is {str(error['input'])[:40]!r}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
