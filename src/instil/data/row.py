"""One row while it is read: what it holds, which columns were used, and everything wrong with it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from instil.conversation import Source
from instil.data.strict_json import parse
from instil.errors import RowProblem, nearest

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = 3
_short.maxlevel = 2


class Row:
    """A row's columns, and what was found while reading them.

    Args:
        source: Where the row stands.
        values: Its columns.

    `used` holds the columns that were read, `problems` all that is wrong, `notes` what is worth a word in the
    report, `unused` the keys below the columns that nothing reads (`messages[].id`). `empty_answers` is whether an
    answer may be empty.
    """

    __slots__ = ("empty_answers", "notes", "problems", "source", "unused", "used", "values")

    def __init__(self, source: Source, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values
        self.used: set[str] = set()
        self.problems: list[RowProblem] = []
        self.notes: set[str] = set()
        self.unused: set[str] = set()
        self.empty_answers = False

    def bad(self, field: str, reason: str, remedy: str = "") -> None:
        """Adds a problem; of each field the first, for what is said of it next follows from that."""
        if all(problem.field != field for problem in self.problems):
            self.problems.append(RowProblem(str(self.source), field, reason, remedy))

    def missing(self, column: str) -> None:
        """Adds the problem of a column that is not there, with the nearest one that is."""
        self.bad(column, "is missing", f"{nearest(column, self.values)} --columns {column}=<theirs> renames one")

    def has(self, column: str) -> bool:
        """Whether the column is there and not null."""
        return self.values.get(column) is not None

    def first(self, *columns: str) -> str:
        """The first of the columns that is not null, or the first that is there, or the first."""
        for column in columns:
            if self.values.get(column) is not None:
                return column
        return next((column for column in columns if column in self.values), columns[0])

    def text(self, column: str, *, empty: bool = False) -> str:
        """The column's text, which must be there; white space alone will do only where `empty` is allowed."""
        self.used.add(column)
        if column not in self.values:
            self.missing(column)
            return ""
        value = self.values[column]
        if not self.is_text(column, value):
            return ""
        if not empty and not value.strip():
            self.bad(column, "is empty")
        return str(value)

    def optional_text(self, column: str) -> str:
        """The column's text, or "" where it is missing or null."""
        if not self.has(column):
            return ""
        return self.text(column, empty=True)

    def is_text(self, field: str, value: Any) -> bool:
        """Whether `value` is a string; a problem if it is not."""
        if isinstance(value, str):
            return True
        self.bad(field, f"must be a string, and is {described(value)}")
        return False

    def structure(self, column: str) -> Any:
        """The column's value, parsed where it is the JSON text of a list or an object."""
        self.used.add(column)
        return self.parsed(column, self.values.get(column))

    def parsed(self, field: str, value: Any) -> Any:
        """`value`, parsed where it is the JSON text of a list or an object; None where that text is broken."""
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        try:
            return parse(value)
        except ValueError as error:
            self.bad(field, f"{error}, in {described(value)}")
            return None


def described(value: Any) -> str:
    """A value in words, shortened: its type and what it holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    for types, name in ((str, "the string"), ((int, float), "the number"), (Mapping, "the object"), (list, "the list")):
        if isinstance(value, types):
            return f"{name} {_short.repr(value)}"
    return f"{type(value).__name__} {_short.repr(value)}"
