"""`instil inspect`: what would be trained, token by token, or counted over the whole data set."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field, field_validator, model_validator

from instil.conversation import Record, Source
from instil.data import Records, read
from instil.data.options import DataOptions
from instil.errors import DataError, RowProblem, UsageError
from instil.packing.options import PackOptions
from instil.prompt.options import PromptOptions

_DEFAULT_ROWS = {"text": "1:3", "html": "1:100"}
_CHUNK = 64

Numbered = tuple[int, Record | list[RowProblem]]


class InspectOptions(PackOptions, PromptOptions, DataOptions):
    """Everything that `instil inspect` takes."""

    model: str | None = Field(default=None, description="Model whose tokenizer is used: a folder or a hub name.")
    tokenizer: str | None = Field(default=None, description="Tokenizer, in place of a model's.")
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
    def _fits_together(self) -> InspectOptions:
        if (self.model is None) == (self.tokenizer is None):
            raise UsageError("give the tokenizer with one of --model and --tokenizer", "For instance --tokenizer DIR.")
        if self.row is not None and self.rows is not None:
            raise UsageError("--row and --rows exclude each other", "Use --rows A:B for several rows.")
        if self.summary and (self.row is not None or self.rows is not None or self.html is not None):
            raise UsageError("--summary counts all rows", "Leave --row, --rows and --html out.")
        return self

    def selected(self) -> tuple[int, int | None] | None:
        """The first and last row to show; None for all."""
        if self.row is not None:
            return self.row, self.row
        chosen = self.rows or (None if self.as_json else _DEFAULT_ROWS["html" if self.html else "text"])
        if chosen is None:
            return None
        first, _, last = chosen.partition(":")
        return int(first or 1), int(last) if last else None


def inspect(*, options: Annotated[InspectOptions, Parameter(name="*")]) -> None:
    """Show the tokens of rows with what is trained marked, or count over the whole data set (--summary).

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    records = read(
        options.data,
        format=options.format,
        columns=options.columns,
        objective=options.objective,
        on_bad_row=options.on_bad_row,
        rejects=options.rejects,
    )
    if options.summary:
        _summarize(records, options)
    else:
        _show(records, options)


def _prompt_options(options: InspectOptions) -> PromptOptions:
    return PromptOptions(**{name: getattr(options, name) for name in PromptOptions.model_fields})


def _summarize(records: Records, options: InspectOptions) -> None:
    from instil.packing import cache_folder, pack, prepare

    prepared = prepare(
        records,
        options.model or options.tokenizer,
        _prompt_options(options),
        tokens_per_batch=options.tokens_per_batch,
        workers=options.workers,
        cache=cache_folder(options.cache_dir) if options.cache else None,
        count_roles=True,
    )
    packs = pack(prepared.trees, options.tokens_per_batch, seed=options.seed, share_prefixes=options.share_prefixes)
    described = prepared.describe(packs.report)
    if options.as_json:
        sys.stdout.write(json.dumps(described, ensure_ascii=False) + "\n")
        return
    from instil.cli.summary import show

    show(described)


def _show(records: Records, options: InspectOptions) -> None:
    from rich.console import Console

    from instil.prompt import RecordEncoder, load_renderer
    from instil.prompt.inspect import TokenText, to_html, to_json, to_text

    chosen = _prompt_options(options)
    renderer = load_renderer(options.model or options.tokenizer, chosen)
    limits = [limit for limit in (renderer.tokenizer.max_length, options.tokens_per_batch) if limit is not None]
    encoder = RecordEncoder(renderer, chosen, chosen.max_length or min(limits), options.objective)
    for warning in renderer.warnings:
        sys.stderr.write(f"instil: warning: {warning}\n")
    selected = options.selected()
    if selected is None and options.on_bad_row == "error":
        _check_all(records, encoder)
        selected = 1, None
    rows = _encoded(records, encoder, *(selected or (1, None)), strict=options.on_bad_row == "error")
    texts, control = TokenText(renderer.tokenizer), frozenset(renderer.encoder.controls.values())
    if options.html is not None:
        _write(options.html, to_html(rows, texts, control))
        sys.stderr.write(f"instil: wrote {options.html}\n")
    elif options.as_json:
        for row in rows:
            sys.stdout.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
    else:
        console = Console(highlight=False)
        for row in rows:
            console.print(to_text(row, texts, control), soft_wrap=True)
        if options.row is None and options.rows is None:
            console.print("The first rows; --rows A:B shows others, --summary counts all.", style="dim")


def _encoded(records: Records, encoder: Any, first: int, last: int | None, *, strict: bool) -> Iterator[Any]:
    """The rows from `first` to `last` as they are encoded, rejected ones among them unless `strict`."""
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
        yield from _checked(encoder.encode(chunk), strict)
        chunk = []
        if not isinstance(row, Record):
            path, _, line = row[0].source.rpartition(":")
            stub = Record(Source(path, int(line)), "", "conversation", ())
            yield EncodedRecord(stub, (), "rejected", str("; ".join(map(_without_source, row))), tuple(row))
    yield from _checked(encoder.encode(chunk), strict)
    if not found and (first, last) != (1, None):
        rows = f"row {first}" if first == last else f"rows {first}:{'' if last is None else last}"
        raise UsageError(f"there is no {rows}: the data has {records.report.rows:,} rows", "Rows are counted from 1.")


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


def _checked(rows: list[Any], strict: bool) -> list[Any]:
    problems = [problem for row in rows for problem in row.problems]
    if strict and problems:
        raise DataError("rows cannot be used", "Mend them, or show them with --on-bad-row skip.", problems)
    return rows


def _check_all(records: Records, encoder: Any) -> None:
    """Read and encode everything once, so that nothing is printed before every bad row is known."""
    problems: list[RowProblem] = []
    chunk: list[Record] = []
    unread: DataError | None = None
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == _CHUNK:
                problems += (problem for row in encoder.encode(chunk) for problem in row.problems)
                chunk = []
    except DataError as error:
        unread = error
    problems += (problem for row in encoder.encode(chunk) for problem in row.problems)
    if unread is not None or problems:
        every = [*(unread.problems if unread else ()), *problems]
        raise DataError(
            f"{len({each.source for each in every}):,} of {records.report.rows:,} rows cannot be used",
            "Mend them, or show them with --on-bad-row skip.",
            every,
        )


def _without_source(problem: RowProblem) -> str:
    return str(problem).removeprefix(f"{problem.source}: ")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UsageError(
            f"--html {path}: cannot be written: {error.strerror}", "Name a file in a folder that exists."
        ) from error
