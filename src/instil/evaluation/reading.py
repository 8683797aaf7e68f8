"""Rows of a file of questions, answers or prompts, all that is wrong with them named at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from instil.data.row import Row, described
from instil.data.sources import find
from instil.errors import DataError, RowProblem, nearest

T = TypeVar("T")


def read_rows(path: str | Path, build: Callable[[Row], T]) -> list[T]:
    """Every row of a file (JSON lines, JSON, CSV and the other kinds of data), in order.

    Args:
        path: The file.
        build: Makes of a row what is wanted, and notes what is wrong by `row.bad`.

    Raises:
        DataError: The file cannot be read, holds no row, or rows that are bad, of which it names all.
    """
    found: list[T] = []
    problems: list[RowProblem] = []
    for file in find(path):
        for pending in file.rows(lambda note: None):
            raw = pending.read()
            if raw.values is None:
                problems.append(RowProblem(str(raw.source), "", raw.reason, raw.remedy))
                continue
            row = Row(raw.source, raw.values)
            found.append(build(row))
            problems += row.problems
    if problems:
        raise DataError(f"{path}: has rows that cannot be used", problems=problems)
    if not found:
        raise DataError(f"{path}: holds no rows", "Name a file with a row for each item.")
    return found


def text(row: Row, column: str) -> str:
    """The text of a column, which must be there and hold more than white space."""
    if column not in row.values:
        row.bad(column, "is missing", nearest(column, row.values))
        return ""
    return row.text(column)


def new_id(row: Row, column: str, seen: dict[str, str]) -> str:
    """The name of a row, a string or a whole number, which no other row may have; `seen` holds those before it."""
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        if column in row.values:
            row.bad(column, f"must be a string or a whole number, and is {described(value)}")
        else:
            row.bad(column, "is missing", nearest(column, row.values))
        return ""
    name = str(value)
    if name in seen:
        row.bad(column, f"{name} stands at {seen[name]} already", "give each row a name of its own")
    seen.setdefault(name, str(row.source))
    return name


def texts(row: Row, field: str, value: object, *, empty: bool = False) -> tuple[str, ...]:
    """A list of one text or more; white space alone will do only where `empty` is allowed."""
    if not isinstance(value, list) or not value:
        row.bad(field, f"must be a list of texts, and is {described(value)}")
        return ()
    for number, item in enumerate(value):
        if row.is_text(f"{field}[{number}]", item) and not empty and not item.strip():
            row.bad(f"{field}[{number}]", "is empty")
    return tuple(map(str, value))
