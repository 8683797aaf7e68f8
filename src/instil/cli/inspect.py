"""`instil inspect`: what would be trained, token by token, or counted over the whole data set."""

from __future__ import annotations

import contextlib
import json
import os
import sys
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
from instil.packing.options import PackOptions
from instil.prompt.options import PromptOptions

_DEFAULT_ROWS = {"text": "1:3", "html": "1:100", "json": "1:"}
_CHUNK = 64
_PAGE_START = b"<!doctype html>"

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

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_empty(cls, value: Any) -> Any:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("is empty (a shell variable that is not set?)")
        return value

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
        if self.model is None and self.tokenizer is None:
            raise UsageError("--tokenizer: is missing, and so is --model", "Name the folder of one, or one on the hub.")
        if self.model is not None and self.tokenizer is not None:
            raise UsageError("--model and --tokenizer: both were given", "Give one: each names the tokenizer.")
        if self.row is not None and self.rows is not None:
            raise UsageError("--row and --rows exclude each other", "Use --rows A:B for several rows.")
        if self.summary and (self.row is not None or self.rows is not None or self.html is not None):
            raise UsageError("--summary counts all rows", "Leave --row, --rows and --html out.")
        if self.html is not None and self.as_json:
            raise UsageError("--html and --json exclude each other", "Leave one out.")
        if self.rejects is not None and not self.summary and self.selected()[1] is not None:
            raise UsageError("--rejects needs all rows", "Use --json or --summary, or show all rows with --rows 1:.")
        if self.html is not None:
            _check_page(self.html, self.rejects)
        return self

    def selected(self) -> tuple[int, int | None]:
        """The first and the last row to show; None for the end of the data."""
        if self.row is not None:
            return self.row, self.row
        way = "json" if self.as_json else "html" if self.html else "text"
        first, _, last = (self.rows or _DEFAULT_ROWS[way]).partition(":")
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
    return PromptOptions.model_construct(**{name: getattr(options, name) for name in PromptOptions.model_fields})


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
    renderer = load_renderer(options.model or options.tokenizer, chosen, text=options.objective == "pretrain")
    limits = [limit for limit in (renderer.tokenizer.max_length, options.tokens_per_batch) if limit is not None]
    encoder = RecordEncoder(renderer, chosen, chosen.max_length or min(limits), options.objective)
    for warning in renderer.warnings:
        sys.stderr.write(f"instil: warning: {warning}\n")
    first, last = options.selected()
    if options.on_bad_row == "error":
        _refuse_bad(records, encoder, first, last)
    rejected: list[RowProblem] = []
    rows = _noting(_encoded(records, encoder, first, last), rejected)
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
    if options.rejects is not None:
        records.reject(rejected)


def _encoded(records: Records, encoder: Any, first: int, last: int | None) -> Iterator[Any]:
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


def _refuse_bad(records: Records, encoder: Any, first: int, last: int | None) -> None:
    """Raise for bad rows, all of those to be shown, before anything is."""
    problems: list[RowProblem] = []
    if last is None:
        for chunk, unread in records.shared(0, 1, _CHUNK):
            problems += [*unread, *(problem for row in encoder.encode(chunk) for problem in row.problems)]
    else:
        problems += (problem for row in _encoded(records, encoder, first, last) for problem in row.problems)
    if problems:
        raise records.unusable(problems)


def _noting(rows: Iterable[Any], problems: list[RowProblem]) -> Iterator[Any]:
    """The rows, with what is wrong with them noted on the way."""
    for row in rows:
        problems += row.problems
        yield row


def _without_source(problem: RowProblem) -> str:
    return str(problem).removeprefix(f"{problem.source}: ")


def _check_page(path: Path, rejects: Path | None) -> None:
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


def _write(path: Path, text: str) -> None:
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
