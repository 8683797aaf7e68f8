"""What models were asked and what they said: the items that every figure is computed from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from instil.data.strict_json import parse
from instil.errors import DataError, RowProblem
from instil.training.files import plain

Who = Literal["base", "tuned"]
Scores = dict[str, Any]

ITEMS = "items.jsonl"
TOO_LONG = "too-long"
"""How an answer ended that was never begun, for the prompt is longer than the model takes."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Args:
        text: What was said, without special tokens.
        ended: `stop`, `stop-string`; cut at the `length` asked for or as the `context` was full; or `too-long`.
        tokens: How many it has, the stop token not counted.
    """

    text: str
    ended: str
    tokens: int


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


def write_items(folder: Path, items: Iterable[Item]) -> None:
    """Write `items.jsonl`, an item a line, whole or not at all."""
    draft = folder / f".{ITEMS}"
    with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for item in items:
            values = {name: value for name, value in asdict(item).items() if value not in ("", [], {})}
            file.write(json.dumps(plain(values), ensure_ascii=False, allow_nan=False) + "\n")
    draft.replace(folder / ITEMS)


def read_items(folder: Path) -> list[Item]:
    """The items of a folder that `instil evaluate` wrote.

    Raises:
        DataError: There is no such file, or lines of it are no items; all of them are named.
    """
    path = folder / ITEMS
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}", "Name a folder that `instil evaluate` wrote.") from error
    items, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            items.append(_item(parse(line)))
        except (ValueError, TypeError, KeyError) as error:
            problems.append(RowProblem(f"{path}:{number}", "", f"is no item: {error}", "evaluate anew"))
    if problems or not items:
        raise DataError(f"{path}: has lines that are no items" if problems else f"{path}: is empty", problems=problems)
    return items


def _item(values: Any) -> Item:
    if not isinstance(values, Mapping):
        raise TypeError("it must be a JSON object")
    said = {who: [Said(**each) for each in several] for who, several in values.get("said", {}).items()}
    return Item(**{**values, "said": said})
