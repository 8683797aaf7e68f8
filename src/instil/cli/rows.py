"""Rows of data as `instil inspect` and `instil score` choose, read and show them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field, field_validator, model_validator

from instil.conversation import Record, Source
from instil.data import Records, read
from instil.data.options import DataOptions
from instil.errors import RowProblem, UsageError
from instil.prompt.options import PromptOptions

_DEFAULT_ROWS = {"text": "1:3", "html": "1:100", "json": "1:"}
_CHUNK = 64
_PAGE_START = b"<!doctype html>"

Numbered = tuple[int, Record | list[RowProblem]]


class RowOptions(PromptOptions, DataOptions):
    """Which rows are shown, and in what way."""

    row: int | None = Field(default=None, ge=1, description="The row to show, counted from 1.")
    rows: str | None = Field(default=None, description="The rows to show, as A:B, both counted from 1 and shown.")
    html: Path | None = Field(default=None, description="Write the rows to a page of its own instead.")
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = Field(
        default=False, description="Print a JSON object for each row, or for the summary."
    )
    summary: Annotated[bool, Parameter(negative=())] = Field(
        default=False, description="Count over the whole data set instead of showing rows."
    )

    @field_validator("rows")
    @classmethod
    def _is_a_range(cls, value: str | None) -> str | None:
        if value is not None:
            first, colon, last = value.partition(":")
            if not colon or not (first or "1").isdecimal() or not (last or "1").isdecimal():
                raise ValueError("write A:B, two numbers counted from 1 (either may be left out)")
            if int(first or 1) < 1 or (last and int(last) < int(first or 1)):
                raise ValueError("rows are counted from 1, and the last may not stand before the first")
        return value

    @model_validator(mode="after")
    def _rows_fit_together(self) -> RowOptions:
        if self.row is not None and self.rows is not None:
            raise UsageError("--row and --rows exclude each other", "Use --rows A:B for several rows.")
        if self.summary and (self.row is not None or self.rows is not None or self.html is not None):
            raise UsageError("--summary counts all rows", "Leave --row, --rows and --html out.")
        if self.html is not None and self.as_json:
            raise UsageError("--html and --json exclude each other", "Leave one out.")
        if self.rejects is not None and not self.summary and self.selected()[1] is not None:
            raise UsageError("--rejects needs all rows", "Use --json or --summary, or show all rows with --rows 1:.")
        if self.html is not None:
            check_page(self.html, self.rejects)
        return self

    def selected(self) -> tuple[int, int | None]:
        """The first and the last row to show; None for the end of the data."""
        if self.row is not None:
            return self.row, self.row
        way = "json" if self.as_json else "html" if self.html else "text"
        first, _, last = (self.rows or _DEFAULT_ROWS[way]).partition(":")
        return int(first or 1), int(last) if last else None

    def prompt_options(self) -> PromptOptions:
        """Those of the options that say how conversations become exchanges."""
        return PromptOptions.model_construct(**{name: getattr(self, name) for name in PromptOptions.model_fields})

    def read(self) -> Records:
        """The rows, as a stream."""
        return read(
            self.data,
            format=self.format,
            columns=self.columns,
            objective=self.objective,
            on_bad_row=self.on_bad_row,
            rejects=self.rejects,
        )


def encoded(records: Records, encoder: Any, first: int, last: int | None) -> Iterator[Any]:
    """The rows from `first` to `last` as they are encoded, rejected ones among them."""
    from instil.prompt import EncodedRecord

    found = 0
    chunk: list[Record] = []
    for number, row in _numbered(records):
        if number < first:
            continue
        if last is not None and number > last:
            break
        found += 1
        if isinstance(row, Record):
            chunk.append(row)
            if len(chunk) < _CHUNK and (last is None or number < last):
                continue
        yield from encoder.encode(chunk)
        chunk = []
        if not isinstance(row, Record):
            path, _, line = row[0].source.rpartition(":")
            stub = Record(Source(path, int(line)), "unread", "conversation", ())
            yield EncodedRecord(stub, (), "rejected", str("; ".join(map(_without_source, row))), tuple(row))
    yield from encoder.encode(chunk)
    if not found and (first, last) != (1, None):
        rows = f"is no row {first}" if first == last else f"are no rows {first}:{'' if last is None else last}"
        raise UsageError(f"there {rows}: the data has {records.report.rows:,} rows", "Rows are counted from 1.")


def _numbered(records: Records) -> Iterator[Numbered]:
    """Each row with its number: a record, or what is wrong with it."""
    number = told = 0

    def bad() -> Iterator[Numbered]:
        nonlocal number, told
        problems, told = records.report.problems[told:], len(records.report.problems)
        for _, same in groupby(problems, key=lambda problem: problem.source):
            number += 1
            yield number, list(same)

    for record in records:
        yield from bad()
        number += 1
        yield number, record
    yield from bad()


def refuse_bad(records: Records, encoder: Any, first: int, last: int | None) -> None:
    """Raise for bad rows, all of those to be shown, before anything is."""
    problems: list[RowProblem] = []
    if last is None:
        for chunk, unread in records.shared(0, 1, _CHUNK):
            problems += [*unread, *(problem for row in encoder.encode(chunk) for problem in row.problems)]
    else:
        problems += (problem for row in encoded(records, encoder, first, last) for problem in row.problems)
    if problems:
        raise records.unusable(problems)


def noting(rows: Iterable[Any], problems: list[RowProblem]) -> Iterator[Any]:
    """The rows, with what is wrong with them noted on the way."""
    for row in rows:
        problems += row.problems
        yield row


def _without_source(problem: RowProblem) -> str:
    return str(problem).removeprefix(f"{problem.source}: ")


def check_page(path: Path, rejects: Path | None = None) -> None:
    """Refuse a place where no page can be, or where something else would be lost: data, a template, a tokenizer."""
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"--html {path}: is no file", "Name a file, as in page.html.")
    if not path.parent.is_dir():
        raise UsageError(f"--html {path}: the folder {path.parent} does not exist", "Name a file in one that does.")
    if rejects is not None and os.path.realpath(path) == os.path.realpath(rejects):
        raise UsageError(f"--html {path}: --rejects names the same file", "Name another file.")
    try:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            start = file.read(len(_PAGE_START))
            if start and start.lower() != _PAGE_START:
                raise UsageError(f"--html {path}: the file is there and is no page", "Name a new file.")
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(draft, target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _unwritable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--html {path}: cannot be written: {reason}", "Name a file in a folder that takes it.")
