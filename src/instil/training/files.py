"""The files of a run, whole or not there: strict JSON, digests, locks, and a disk that holds what it was given."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none, and so no locks
    fcntl = None  # type: ignore[assignment]

RECORD, METRICS, MANIFEST = "instil.json", "metrics.jsonl", "manifest.json"


def write_json(path: Path, value: Any) -> None:
    """Write a value as strict JSON, whole or not at all."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # JSON escapes half a pair alike
        sync_one(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: what is no finite number is null, what is unknown is its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Have the disk hold all of a folder before its name appears."""
    for path in [*folder.rglob("*"), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """Have the disk hold a file or the names in a folder."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a folder, until the number returned is closed; None where the system knows no locks.

    Args:
        folder: That of a run: the process that trains there holds its lock.
        shared: Whether others may do so as well.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if fcntl is not None:
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return number
        except OSError as error:
            os.close(number)
            if isinstance(error, BlockingIOError):  # any other: a file system without locks
                raise
    return None


def seal(folder: Path) -> None:
    """Put all of a folder on the disk, and last a manifest of the hash and the size of each file."""
    sync(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    held = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
    write_json(folder / MANIFEST, held)
    sync_one(folder)


def broken(folder: Path) -> str:
    """What is wrong with a folder that was sealed, by the name of the file; "" if it is whole."""
    try:
        held: dict[str, list[Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in held.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size:,} bytes, not {size:,}"
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return ""
