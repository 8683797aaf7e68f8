"""What data may be: files, folders, globs, standard input, the hub, rows in memory; each becomes a DataFile."""

from __future__ import annotations

import difflib
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from instil.data.files import KINDS, DataFile, HubRows, LocalFile, MemoryRows, kind_of
from instil.errors import DataError, RowProblem, UsageError

_HUB = re.compile(r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.\[\]%:-]+))?")


Data: TypeAlias = str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]]


def find(data: Data) -> list[DataFile]:
    """Every file that `data` names, in the order given; the files of a folder or glob sorted. Or rows in memory.

    Raises:
        UsageError: Rows that are no list of their own.
        DataError: Names that lead to nothing, all of them together.
    """
    if isinstance(data, Mapping):
        raise UsageError("the data is one mapping", "give a list of rows")
    names = [data] if isinstance(data, (str, Path)) else list(data) if isinstance(data, Iterator) else data
    if any(isinstance(item, Mapping) for item in names):
        # Only a list can be mixed; a dataset of `datasets` would be read through for nothing.
        if isinstance(names, Sequence) and any(isinstance(item, (str, Path)) for item in names):
            raise UsageError("the data holds rows and paths in one list", "give a list of rows or a list of paths")
        return [MemoryRows(names)]
    names = [str(name) for name in names]
    if not names:
        raise DataError("no data is given", "name a file, a folder, a glob, `-` or hf://owner/name")
    problems: list[RowProblem] = []
    found = [[] if name == "-" else _find_one(name, problems) for name in names]
    if problems:
        raise DataError("the data cannot be read", problems=problems)
    # Standard input is taken only once nothing else stands in the way.
    if "-" in names:
        found[names.index("-")] = [_spool_stdin()]
    return [file for files in found for file in files]


def _find_one(name: str, problems: list[RowProblem]) -> list[DataFile]:
    if name.startswith("hf://"):
        match = _HUB.fullmatch(name)
        if match is None:
            problems.append(RowProblem(name, "", "is no dataset of the hub", "write hf://owner/name or …:split"))
            return []
        return [HubRows(name, match["name"], match["split"] or "train")]
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_data(file, path))
        if not found:
            problems.append(RowProblem(name, "", "the folder holds no file of a known kind", _known_kinds()))
        return [LocalFile(str(file), file, kind_of(file) or "") for file in found]
    if path.exists():
        kind = kind_of(path)
        if kind is None:
            problems.append(RowProblem(name, "", f"files of the kind {path.suffix!r} are not known", _known_kinds()))
            return []
        return [LocalFile(name, path, kind)]
    if any(mark in name for mark in "*?["):
        found = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if _is_data(file, file.parent))
        if not found:
            problems.append(RowProblem(name, "", "no file of a known kind fits", _known_kinds()))
        return [LocalFile(str(file), file, kind_of(file) or "") for file in found]
    problems.append(RowProblem(name, "", "there is no such file or folder", _nearest_file(path)))
    return []


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and kind_of(file) is not None and file.is_file()


def _known_kinds() -> str:
    return f"known: {', '.join(KINDS)}, the text ones also with .gz or .zst"


def _nearest_file(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"the folder {path.parent} does not exist"
    close = difflib.get_close_matches(path.name, os.listdir(folder), n=1)
    return f"did you mean {str(folder / close[0])!r}?" if close else f"look into {str(folder)!r}"


def _spool_stdin() -> LocalFile:
    """Standard input, put into a temporary file, for it can be read once and rows are read again each epoch."""
    handle, name = tempfile.mkstemp(prefix="instil-stdin-")
    with os.fdopen(handle, "wb") as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
    return LocalFile("stdin", Path(name), "json", temporary=True)
