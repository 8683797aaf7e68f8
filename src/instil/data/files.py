"""Files to rows: every kind of file as a stream of RawRows, each with its place, in constant memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import zstandard

from instil.conversation import Source
from instil.data.json_text import JsonText
from instil.data.row import described
from instil.data.strict_json import StrictDecoder, ends_early, explain, fault
from instil.errors import DataError

Note = Callable[[str], None]
BOM = b"\xef\xbb\xbf"
BATCH_ROWS = 1000
MAX_CELL = 2**27
MAX_LINE = 2**28


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as a file holds it.

    Args:
        source: Where it begins.
        values: Its columns; None where it cannot be read.
        raw: What stands there when it cannot be read: text, bytes that are no text, or a value.
        reason: Why it cannot be read.
        remedy: What to do about it.
    """

    source: Source
    values: Mapping[str, Any] | None
    raw: Any = None
    reason: str = ""
    remedy: str = ""

    def read(self) -> RawRow:
        """The row itself: it is read already."""
        return self


class PendingRow(NamedTuple):
    """A line that is parsed only when it is read: a process that leaves it to another one need not."""

    source: Source
    line: bytes
    offset: int
    decoder: StrictDecoder

    def read(self) -> RawRow:
        """The row that stands in the line."""
        return _json_line(self.decoder, self.source, self.line, self.offset)


class DataFile(Protocol):
    """Something that rows can be read from, again and again."""

    @property
    def path(self) -> str:
        """Its name, as the user gave it."""

    def rows(self, note: Note) -> Iterator[RawRow | PendingRow]:
        """Its rows in order; `note` takes what deserves a word in the report."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on disk.

    Args:
        path: Its name, as the user gave it.
        file: Where it is.
        kind: One of KINDS.
        temporary: Whether it goes when its reader goes.
    """

    path: str
    file: Path
    kind: str
    temporary: bool = False

    def rows(self, note: Note) -> Iterator[RawRow | PendingRow]:
        """Its rows; a file that breaks off yields what stands before, then one row that cannot be read."""
        line = 0
        try:
            with closing(_READERS[self.kind](self, note)) as rows:
                for row in rows:
                    line = row.source.line
                    yield row
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            yield RawRow(Source(self.path, line + 1), None, None, f"the file cannot be read on from here: {error}")

    def open(self) -> BinaryIO:
        """The file's bytes, decompressed."""
        with open(self.file, "rb") as stream:
            magic = stream.read(4)
        if magic[:2] == b"\x1f\x8b":
            return gzip.open(self.file, "rb")  # type: ignore[return-value]
        if magic == b"\x28\xb5\x2f\xfd":
            return io.BufferedReader(_ZstdReader(self.file), 1 << 16)
        return open(self.file, "rb")


class _ZstdReader(io.RawIOBase):
    """A .zst file, one frame or several; unlike zstandard's own reader it tells a file that was cut short."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                compressed = self._frame.unused_data or self._file.read(1 << 16)
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                compressed = self._file.read(1 << 16)
            if not compressed:
                if self._begun:
                    raise EOFError("the compressed file was cut short")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(compressed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Places:
    """The places of a file's rows; the column tells apart those that begin on one line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._line = 0

    def source(self, line: int, column: int) -> Source:
        """The place of the next row."""
        before, self._line = self._line, line
        return Source(self._path, line, column if line == before else 0)


# JSON.


def _read_jsonl(file: LocalFile, note: Note) -> Iterator[RawRow | PendingRow]:
    decoder = StrictDecoder()
    offset = 0
    with file.open() as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
            start, offset = offset, offset + len(line)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                sample = line[:2000].decode(errors="replace")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(1 << 20)
                    offset += len(line)
                yield RawRow(Source(file.path, number), None, sample, f"is a line of {MAX_LINE:,} bytes or more")
                continue
            if number == 1 and line.startswith(BOM):
                note(f"{file.path} begins with a byte order mark")
                line, start = line[3:], 3
            if not line.isspace() and line:
                yield PendingRow(Source(file.path, number), line, start, decoder)


def _json_line(decoder: StrictDecoder, source: Source, line: bytes, offset: int) -> RawRow:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return RawRow(source, None, line, *_not_utf8(line[error.start], offset + error.start))
    text = text.rstrip("\r\n")
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        remedy = "an array of rows belongs into a .json file" if source.line == 1 and text.startswith("[") else ""
        if isinstance(error, json.JSONDecodeError) and ends_early(error):
            remedy = remedy or "the row was cut short: write it anew"
        elif isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            remedy = "one line holds one row"
        return RawRow(source, None, text, explain(error), remedy)
    return _json_row(source, value, decoder.faults, text)


def _json_row(source: Source, value: Any, faults: list[str], text: str) -> RawRow:
    if faults:
        return RawRow(source, None, text, "; ".join(faults))
    return _object_row(source, value)


def _object_row(source: Source, value: Any) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(source, None, value, f"a row must be an object, and this is {described(value)}")
    return RawRow(source, value)


def _not_utf8(byte: int, offset: int) -> tuple[str, str]:
    return f"byte 0x{byte:02x} at offset {offset} of the file is not UTF-8", "save the file as UTF-8"


def _read_json(file: LocalFile, note: Note) -> Iterator[RawRow | PendingRow]:
    """An array of rows; or rows one after the other, on a line each or over several."""
    with file.open() as stream:
        text = JsonText(stream)
        first = text.peek()
        by_line = first != "[" and not text.spans_lines()
        if not by_line:
            if text.marked:
                note(f"{file.path} begins with a byte order mark")
            places = _Places(file.path)
            yield from _json_array(text, places) if first == "[" else _json_values(text, places)
    if by_line:
        yield from _read_jsonl(file, note)


def _json_array(text: JsonText, places: _Places) -> Iterator[RawRow]:
    text.move(1)
    while True:
        if text.peek() == "]":
            break
        row = _json_element(text, places, "the rest of the array")
        if row is None:
            source = places.source(text.line, text.column)
            yield RawRow(source, None, None, "the array is not closed: the file was cut short")
            return
        yield row
        if text.broken:
            return
        after = text.peek()
        if after == ",":
            text.move(1)
            if text.peek() == "]":
                yield _misplaced(text, places, "a row must follow a comma")
        elif after and after != "]":
            yield _misplaced(text, places, "expected a comma or ] after a row; the rest of the array cannot be read")
            return
    text.move(1)
    if text.peek():
        yield _misplaced(text, places, "text follows the array and cannot be read")


def _misplaced(text: JsonText, places: _Places, reason: str) -> RawRow:
    source = places.source(text.line, text.column)
    return RawRow(source, None, text.sample(), f"malformed JSON at column {text.column}: {reason}")


def _json_values(text: JsonText, places: _Places) -> Iterator[RawRow]:
    while not text.broken:
        row = _json_element(text, places, "the rest of the file")
        if row is None:
            return
        yield row


def _json_element(text: JsonText, places: _Places, rest: str) -> RawRow | None:
    """The row that begins here, None at the end of the file."""
    if not text.peek():
        return None
    source = places.source(text.line, text.column)
    try:
        value, raw, damage = text.value()
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and ends_early(error):
            return RawRow(source, None, text.sample(), "malformed JSON: the file ends in the middle of this row")
        reason = explain(error)
        if isinstance(error, json.JSONDecodeError):
            line, column = text.place(error.pos)
            reason = f"malformed JSON at line {line}, column {column}: {error.msg[:1].lower()}{error.msg[1:]}"
        return RawRow(source, None, text.sample(), f"{reason}; {rest} cannot be read")
    if damage is not None:
        return RawRow(source, None, raw.encode("utf-8", "surrogateescape"), *_not_utf8(*damage))
    return _json_row(source, value, text.faults, raw)


# Tables as text.


def _read_csv(file: LocalFile, note: Note) -> Iterator[RawRow]:
    # The module's own limit, 128 KiB, is shorter than many an answer.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    with file.open() as stream:
        lines = _Lines(stream)
        reader = csv.reader(lines, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            lines.taken.clear()
            first = lines.count + 1
            source = Source(file.path, first)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(source, None, lines.raw(), f"malformed {file.kind.upper()}: {error}", "quote the cell")
                continue
            if lines.damage:
                yield RawRow(source, None, lines.raw(), *_not_utf8(*lines.damage.pop()))
                lines.damage.clear()
            elif header is None and cells:
                header = cells
                if lines.marked:
                    note(f"{file.path} begins with a byte order mark")
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    yield RawRow(source, None, lines.raw(), f"the column {twice[0]!r} stands twice in the header")
                    return
            elif header is not None and len(cells) != len(header):
                if cells:
                    reason = f"has {len(cells)} cells, and the header has {len(header)} columns"
                    yield RawRow(source, None, lines.raw(), reason, "quote cells that hold the separator")
            elif header is not None:
                yield RawRow(source, dict(zip(header, cells, strict=True)))


class _Lines:
    """The lines of a stream as text. Keeps those of the record under way, and the first byte that is not UTF-8."""

    def __init__(self, stream: BinaryIO) -> None:
        self.count = 0
        self.taken: list[bytes] = []
        self.damage: list[tuple[int, int]] = []
        self.marked = False
        self._stream = stream
        self._offset = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.count += 1
        start, self._offset = self._offset, self._offset + len(line)
        if self.count == 1 and line.startswith(BOM):
            self.marked, line, start = True, line[3:], 3
        self.taken.append(line)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.damage.append((line[error.start], start + error.start))
            return line.decode(errors="surrogateescape")

    def raw(self) -> str | bytes:
        """The lines of the record under way."""
        raw = b"".join(self.taken)
        return raw if self.damage else raw.decode(errors="replace")


# Tables in columns.


def _read_parquet(file: LocalFile, note: Note) -> Iterator[RawRow]:
    from pyarrow import parquet

    with _arrow_errors(), parquet.ParquetFile(file.file) as table:
        yield from _table_rows(file.path, table.iter_batches(batch_size=BATCH_ROWS))


def _read_arrow(file: LocalFile, note: Note) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import ipc

    with _arrow_errors(), pyarrow.memory_map(str(file.file)) as stream:
        in_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        with ipc.open_file(stream) if in_file else ipc.open_stream(stream) as table:
            batches = (table.get_batch(index) for index in range(table.num_record_batches)) if in_file else table
            yield from _table_rows(file.path, batches)


def _table_rows(path: str, batches: Iterable[Any]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in _table_values(batch.slice(start, BATCH_ROWS)):
                number += 1
                source = Source(path, number)
                if isinstance(values, ValueError):
                    yield RawRow(source, None, None, f"a cell cannot be read: {values}")
                else:
                    yield RawRow(source, values)


def _table_values(batch: Any) -> list[Any]:
    """The rows of a batch; in place of a row that Python cannot hold (strings that are not UTF-8), its error."""
    try:
        return list(batch.to_pylist())
    except ValueError as error:
        if batch.num_rows == 1:
            return [error]
        return [values for index in range(batch.num_rows) for values in _table_values(batch.slice(index, 1))]


@contextmanager
def _arrow_errors() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _read_yaml(file: LocalFile, note: Note) -> Iterator[RawRow]:
    from instil.data.yaml_text import read_values

    with file.open() as stream:
        if stream.read(3) == BOM:
            note(f"{file.path} begins with a byte order mark")
    places = _Places(file.path)
    with file.open() as stream:
        for line, column, value, reason in read_values(stream):
            source = places.source(line, column)
            yield RawRow(source, None, value, reason) if reason else _object_row(source, value)


# Not on disk.


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """Rows in memory.

    Args:
        values: The rows, which can be iterated again and again.
        path: What stands for a file in their places.
    """

    values: Iterable[Any]
    path: str = "rows"

    def rows(self, note: Note) -> Iterator[RawRow | PendingRow]:
        """The rows; the line of a row is its number."""
        for number, values in enumerate(self.values, 1):
            source = Source(self.path, number)
            reason = fault(values)
            if reason:
                yield RawRow(source, None, repr(values), reason)
            else:
                yield _object_row(source, dict(values) if isinstance(values, Mapping) else values)


@dataclass(frozen=True, slots=True)
class HubRows:
    """A split of a dataset of the hub, streamed.

    Args:
        path: `hf://owner/name:split`, as the user gave it.
        name: `owner/name`.
        split: The split.
    """

    path: str
    name: str
    split: str

    def rows(self, note: Note) -> Iterator[RawRow | PendingRow]:
        """Its rows; the line of a row is its number.

        Raises:
            DataError: `datasets` is not installed, or the dataset cannot be loaded.
        """
        try:
            from datasets import load_dataset
        except ImportError:
            raise DataError(f"{self.path}: needs the package `datasets`", "pip install 'instil[hf]'") from None
        try:
            stream = load_dataset(self.name, split=self.split, streaming=True)
            for number, values in enumerate(stream, 1):
                yield RawRow(Source(self.path, number), values)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.path}: cannot be loaded: {error}", "check the name, the split and access") from None


_READERS: dict[str, Callable[[LocalFile, Note], Any]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "yaml": _read_yaml,
}

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".yaml": "yaml",
    ".yml": "yaml",
}
KINDS = tuple(_SUFFIXES)


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, or None."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        kind = _SUFFIXES.get(os.path.splitext(path.stem)[1].lower())
        return None if kind in ("parquet", "arrow") else kind
    return _SUFFIXES.get(suffix)
