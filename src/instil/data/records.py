"""Data of any known kind and shape to Records, one at a time, with an account of everything met on the way."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast

from instil.conversation import Record
from instil.data.files import DataFile, LocalFile, Note, PendingRow, RawRow
from instil.data.row import Row, described
from instil.data.shapes import (
    COMPARING,
    OBJECTIVES,
    SHAPES,
    Objective,
    build,
    check_format,
    known_columns,
    may_be_labelled,
    missing_columns,
    recognize,
    unknown_shape,
)
from instil.data.sources import Data, find
from instil.errors import DataError, RowProblem, UsageError, nearest

OnBadRow = Literal["error", "skip"]
PEEK_ROWS = 100
KEPT_PROBLEMS = 1000


@dataclass(slots=True)
class Report:
    """What was met while reading. Filled as the records are iterated.

    Args:
        rows: Rows met, good and bad.
        records: Rows that became records.
        rejected: Rows that did not.
        shapes: Records of each shape.
        files: Records of each shape in each file.
        unused_columns: Columns that no shape used, and in how many records; `messages[].id` for a message's key.
        problems: Everything wrong with the rejected rows; of those that `shared` skips, the first KEPT_PROBLEMS.
        notes: What is worth knowing and no error, and how often.
    """

    rows: int = 0
    records: int = 0
    rejected: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    unused_columns: Counter[str] = field(default_factory=Counter)
    problems: list[RowProblem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def note(self, text: str) -> None:
        """Counts a note."""
        self.notes[text] += 1

    def to_json(self) -> dict[str, Any]:
        """The counts, without the problems, as plain JSON values; `from_json` takes them back."""
        counts = {name: getattr(self, name) for name in ("rows", "records", "rejected")}
        named = {name: dict(getattr(self, name)) for name in ("shapes", "unused_columns", "notes")}
        return {**counts, **named, "files": {path: dict(shapes) for path, shapes in self.files.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        return cls(
            value["rows"],
            value["records"],
            value["rejected"],
            Counter(value["shapes"]),
            {path: Counter(shapes) for path, shapes in value["files"].items()},
            Counter(value["unused_columns"]),
            notes=Counter(value["notes"]),
        )

    def merge(self, other: Report) -> None:
        """Adds what was met in other rows of the same data."""
        self.rows += other.rows
        self.records += other.records
        self.rejected += other.rejected
        self.shapes.update(other.shapes)
        self.unused_columns.update(other.unused_columns)
        self.problems += other.problems
        self.notes.update(other.notes)
        for path, counts in other.files.items():
            self.files.setdefault(path, Counter()).update(counts)


def read(
    data: Data,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    objective: str | None = None,
    on_bad_row: str = "error",
    rejects: str | Path | None = None,
) -> Records:
    """Reads rows of any known shape as Records.

    Args:
        data: A file, a folder, a glob, `-` for standard input, `hf://owner/name:split`, or a list of these; or a list
            of rows, each a mapping.
        format: The shape of every row; None recognizes each by its columns.
        columns: Columns to rename before anything else: the name a shape knows to the name in the data.
        objective: What the records are for (`supervised`, `preference`, `pretrain`; `dpo` and its kin are
            `preference`): decides where a row has two
            readings.
        on_bad_row: `error` reads to the end and then raises with every bad row, yielding nothing behind the first;
            `skip` leaves bad rows out.
        rejects: A JSONL file that takes each skipped row whole with its problems, written when all is read.

    Returns:
        The records, which can be iterated again and again.

    Raises:
        UsageError: An argument that cannot be.
        DataError: Data that does not exist, holds no rows, or none of a known shape.
    """
    check_format(format)
    if objective is not None and objective not in (*OBJECTIVES, *COMPARING):
        raise UsageError(
            f"--objective {objective}: there is no such objective of data",
            nearest(objective, (*OBJECTIVES, *COMPARING)),
        )
    purpose = cast("Objective | None", "preference" if objective in COMPARING else objective)
    if on_bad_row not in ("error", "skip"):
        raise UsageError(f"--on-bad-row {on_bad_row}: there is no such way", nearest(on_bad_row, ("error", "skip")))
    for name in columns or {}:
        if name not in known_columns():
            raise UsageError(f"--columns {name}=…: no shape has a column {name!r}", nearest(name, known_columns()))
    plan = _Plan(format, dict(columns or {}), purpose)
    return Records(find(data), plan, cast(OnBadRow, on_bad_row), _rejects_path(rejects, on_bad_row))


def _rejects_path(rejects: str | Path | None, on_bad_row: str) -> Path | None:
    if rejects is None:
        return None
    if on_bad_row != "skip":
        raise UsageError(
            f"--rejects {rejects}: rows are rejected only where bad ones are skipped", "add --on-bad-row skip"
        )
    path = Path(rejects)
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise UsageError(f"--rejects {rejects}: {reason}", "name a file in a folder that exists")
    return path


@dataclass(frozen=True, slots=True)
class _Plan:
    """How rows are to be understood."""

    format: str | None
    columns: Mapping[str, str]
    objective: Objective | None

    def renamed(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with its columns under the names that shapes know."""
        if not self.columns:
            return values
        present = {ours: theirs for ours, theirs in self.columns.items() if theirs in values}
        gone = set(present) | set(present.values())
        kept = {name: value for name, value in values.items() if name not in gone}
        return {ours: values[theirs] for ours, theirs in present.items()} | kept

    def shape_of(self, values: Mapping[str, Any]) -> str | None:
        """The shape of a row by itself, or None."""
        if self.format is not None:
            return None if missing_columns(values, self.format) else self.format
        return recognize(values, self.objective)


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the first rows of a file are like: the shapes with answers among them, and every column."""

    answered: tuple[str, ...]
    columns: frozenset[str]
    problem: RowProblem | None = None


def _survey(file: DataFile, plan: _Plan) -> _Survey:
    """Looks at the first rows of a file, and on until one has a known shape."""
    shapes: Counter[str] = Counter()
    columns: set[str] = set()
    strange: Mapping[str, Any] | None = None
    met = 0
    with closing(cast(Any, file.rows(lambda text: None))) as rows:
        for met, pending in enumerate(rows, 1):
            raw = pending.read()
            if raw.values is not None:
                columns |= raw.values.keys()
                values = plan.renamed(raw.values)
                shape = plan.shape_of(values)
                if shape is None:
                    strange = values if strange is None else strange
                else:
                    shapes[shape] += 1
            if met >= PEEK_ROWS and (shapes or strange is None):
                break
    problem = None
    if not met:
        problem = RowProblem(file.path, "", "holds no rows", "leave the file out")
    elif not shapes and strange is not None:
        problem = _strange_file(file, strange, plan, alone=met == 1)
    answered = tuple(shape for shape, _ in shapes.most_common() if shape != "prompt")
    return _Survey(answered, frozenset(columns), problem)


def _strange_file(file: DataFile, values: Mapping[str, Any], plan: _Plan, alone: bool) -> RowProblem:
    """The problem of a file in which no row has a known shape; `values` is its first row, perhaps its only one."""
    inside = [
        name
        for name, value in values.items()
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    ]
    if alone and len(inside) == 1 and plan.format is None and isinstance(file, LocalFile):
        remedy = f"its rows may stand in {inside[0]!r}: `jq -c '.{inside[0]}[]' {file.path}` takes them out"
        return RowProblem(file.path, "", f"no row has a known shape; the first: {unknown_shape(values)[0]}", remedy)
    if plan.format is None:
        reason, remedy = unknown_shape(values)
        return RowProblem(file.path, "", f"no row has a known shape; the first: {reason}", remedy)
    lacking = missing_columns(values, plan.format)
    reason = f"no row has what --format {plan.format} needs; the first lacks {', '.join(map(repr, lacking))}"
    remedy = f"{nearest(lacking[0], values)} --columns {lacking[0]}=<theirs> renames one"
    return RowProblem(file.path, "", reason, remedy)


class Records:
    """The records of some data: iterable, from the start each time, in constant memory.

    Attributes:
        report: What was met in the iteration under way, or in the last one.
        objective: What the records are for, if it was given.
        on_bad_row: `error` or `skip`.
        rejects: The file that takes skipped rows.
    """

    def __init__(self, files: Sequence[DataFile], plan: _Plan, on_bad_row: OnBadRow, rejects: Path | None) -> None:
        for file in files:
            if isinstance(file, LocalFile) and file.temporary:
                weakref.finalize(self, _remove, file.file)
        self.report = Report()
        self.objective = plan.objective
        self._plan = plan
        self.on_bad_row = on_bad_row
        self.rejects = rejects
        _check_rejects(rejects, files)
        self._files = [(file, _survey(file, plan)) for file in files]
        problems = [survey.problem for _, survey in self._files if survey.problem]
        if problems:
            raise DataError("the data cannot be read", problems=problems)
        seen = frozenset[str]().union(*(survey.columns for _, survey in self._files))
        for ours, theirs in plan.columns.items():
            if seen and theirs not in seen:
                raise UsageError(f"--columns {ours}={theirs}: no row has a column {theirs!r}", nearest(theirs, seen))

    def __iter__(self) -> Iterator[Record]:
        report = self.report = Report()
        with _Rejects(self.rejects) as rejects:
            for raw, survey in self._rows(report.note):
                record = self._take(report, raw.read(), survey, rejects)
                if record is not None and (self.on_bad_row == "skip" or not report.problems):
                    yield record
        if report.problems and self.on_bad_row != "skip":
            raise self.unusable(report.problems)

    def shared(self, number: int, of: int, size: int) -> Iterator[tuple[list[Record], list[RowProblem]]]:
        """Every `of`-th chunk of `size` rows from chunk `number` on: its records, and what is wrong with its rows.

        So several processes read the same data, each its share of the rows. Nothing is raised for bad rows, and none
        are written to the rejects file; `report` tells of the rows of the share.
        """
        report = self.report = Report()
        records: list[Record] = []
        met = told = 0

        def found() -> list[RowProblem]:
            nonlocal told
            problems = report.problems[told:]
            if self.on_bad_row == "skip":
                del report.problems[KEPT_PROBLEMS:]
            told = len(report.problems)
            return problems

        for met, (raw, survey) in enumerate(self._rows(report.note if number == 0 else lambda text: None), 1):
            if (met - 1) // size % of == number:
                record = self._take(report, raw.read(), survey, None)
                if record is not None and (self.on_bad_row == "skip" or not report.problems):
                    records.append(record)
                if met % size == 0:
                    yield records, found()
                    records = []
        if met % size and (met - 1) // size % of == number:
            yield records, found()

    def unusable(self, problems: Sequence[RowProblem]) -> DataError:
        """The error of bad rows, all of them."""
        return DataError(
            f"{len({problem.source for problem in problems}):,} of {self.report.rows:,} rows cannot be used",
            "Mend them, or leave them out with --on-bad-row skip (--rejects keeps them in a file).",
            problems,
        )

    def _rows(self, note: Note) -> Iterator[tuple[RawRow | PendingRow, _Survey]]:
        for file, survey in self._files:
            with closing(cast(Any, file.rows(note))) as rows:
                for raw in rows:
                    yield raw, survey

    def _take(self, report: Report, raw: RawRow, survey: _Survey, rejects: _Rejects | None) -> Record | None:
        """The row's record, if it is a good row; counted either way."""
        report.rows += 1
        counts = report.files.setdefault(raw.source.path, Counter())
        row, record = self._read_row(raw, survey)
        if record is not None:
            _count(report, counts, row, record)
            return record
        report.rejected += 1
        report.problems += row.problems
        if rejects is not None:
            rejects.write(raw, row.problems)
        return None

    def check(self) -> Report:
        """Reads everything and keeps nothing but the report.

        Raises:
            DataError: Bad rows, all of them, unless they are skipped.
        """
        for _ in self:
            pass
        return self.report

    def reject(self, problems: Sequence[RowProblem]) -> None:
        """Write the rejects file anew, with rows in it that a later stage could not use.

        Args:
            problems: What is wrong with them; their sources say which they are. What is wrong with rows that cannot
                be read need not be among them.
        """
        later: dict[str, list[RowProblem]] = {}
        for problem in problems:
            later.setdefault(problem.source, []).append(problem)
        if self.rejects is None:
            return
        with _Rejects(self.rejects) as rejects:
            for pending, survey in self._rows(lambda text: None):
                raw = pending.read()
                row, record = self._read_row(raw, survey)
                found = later.get(str(raw.source)) if record is not None else row.problems
                if found:
                    rejects.write(raw, found)

    @property
    def paths(self) -> list[str]:
        """The files of the data, as the user named them."""
        return [file.path for file, _ in self._files]

    @property
    def bytes_on_disk(self) -> int | None:
        """The size of the files; None where rows come from elsewhere."""
        files = [file for file, _ in self._files if isinstance(file, LocalFile)]
        return sum(file.file.stat().st_size for file in files) if len(files) == len(self._files) else None

    def fingerprint(self) -> str | None:
        """What decides the records, as a hash: the bytes of the files and how they are read; None without bytes."""
        digest = hashlib.sha256(repr((self._plan, self.on_bad_row)).encode())
        for file, _ in self._files:
            if not isinstance(file, LocalFile):
                return None
            digest.update(f"\0{file.path}\0".encode(errors="surrogateescape"))
            with file.file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def _read_row(self, raw: RawRow, survey: _Survey) -> tuple[Row, Record | None]:
        if raw.values is None:
            row = Row(raw.source, {})
            row.bad("", raw.reason, raw.remedy)
            return row, None
        row = Row(raw.source, self._plan.renamed(raw.values))
        for ours, theirs in self._plan.columns.items():
            if theirs not in raw.values:
                row.bad(theirs, f"is missing, which stands for {ours!r}", nearest(theirs, raw.values))
        if row.problems:
            return row, None
        shape = self._plan.format or _shape_among(row.values, survey, self._plan.objective)
        if shape is None:
            row.bad("", *unknown_shape(row.values))
            return row, None
        return row, build(row, shape, self._plan.objective)


def _shape_among(values: Mapping[str, Any], survey: _Survey, objective: Objective | None) -> str | None:
    """The row's shape. In a file that has answers, a row without one is of the file's shape, and lacks its answer.

    So too with verdicts: where rows have them, a row whose label says nothing is no row to learn from.
    """
    shape = recognize(values, objective)
    if "labelled" in survey.answered and may_be_labelled(values, shape):
        return "labelled"
    if shape not in (None, "prompt") or not survey.answered:
        return shape
    fitting = {
        name: sum(any(column in values for column in group) for group in SHAPES[name].needs) for name in survey.answered
    }
    best = max(fitting, key=fitting.__getitem__)
    return best if shape == "prompt" or fitting[best] else None


def _count(report: Report, counts: Counter[str], row: Row, record: Record) -> None:
    report.records += 1
    report.shapes[record.shape] += 1
    counts[record.shape] += 1
    if record.extra or row.unused:
        report.unused_columns.update(record.extra.keys() | row.unused)
    for note in row.notes:
        report.note(note)


def _check_rejects(rejects: Path | None, files: Sequence[DataFile]) -> None:
    for file in files:
        if rejects is not None and isinstance(file, LocalFile) and file.file.resolve() == rejects.resolve():
            raise UsageError(f"--rejects {rejects}: the file is part of the data", "name another file")


class _Rejects:
    """Takes rejected rows into a file that appears whole, once all is read; or nowhere, without a path."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._draft = Path()
        self._file: IO[str] | None = None

    def __enter__(self) -> _Rejects:
        if self._path is not None:
            self._draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            self._file = open(self._draft, "w", encoding="utf-8", newline="\n")
        return self

    def write(self, raw: RawRow, problems: Sequence[RowProblem]) -> None:
        """Adds a row with its problems."""
        if self._file is None:
            return
        said = [{"field": each.field, "reason": each.reason, "remedy": each.remedy} for each in problems]
        row = raw.raw if raw.values is None else raw.values
        if isinstance(row, bytes):
            row = {"base64": base64.b64encode(row).decode()}
        entry = {"source": str(raw.source), "problems": said, "row": row}
        try:
            line = json.dumps(entry, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):  # YAML's aliases let a row hold itself
            entry["row"] = described(row)
            line = json.dumps(entry, ensure_ascii=False)
        try:
            self._file.write(line + "\n")
        except UnicodeEncodeError:
            self._file.write(json.dumps(entry, default=str) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None or self._path is None:
            return
        self._file.close()
        if error is None:
            os.replace(self._draft, self._path)
        else:
            _remove(self._draft)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
