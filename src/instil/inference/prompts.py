"""Prompts out of a file: one a line, as text or as a JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from instil.data.strict_json import parse
from instil.errors import DataError, RowProblem

_SHAPE = 'one JSON object a line, as in {"prompt": "Once upon a time"}'


class Prompt(NamedTuple):
    """A text to go on with, and where it stands, for messages."""

    source: str
    text: str


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file; blank lines are none.

    Args:
        path: A `.txt` file has a prompt on each line; any other, and standard input (`-`), a JSON object with the
            field `prompt`.

    Raises:
        DataError: The file cannot be read, or rows of it, of which it names all.
    """
    name = "stdin" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "Name a file of prompts.") from error
    rows, problems = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        source = f"{name}:{number}"
        try:
            text = line.decode().removesuffix("\r")
            rows.append(Prompt(source, text if path.endswith(".txt") else _prompt(text)))
        except UnicodeDecodeError as error:
            problems.append(RowProblem(source, "", f"byte {error.start + 1} of the line is not UTF-8", "save it so"))
        except ValueError as error:
            problems.append(RowProblem(source, "", str(error), f"write {_SHAPE}"))
    if problems:
        raise DataError(f"{name}: has rows that are no prompts", problems=problems)
    if not rows:
        raise DataError(f"{name}: holds no prompt", f"Write {_SHAPE}, or a prompt on each line of a .txt file.")
    return rows


def _prompt(line: str) -> str:
    row = parse(line)
    if not isinstance(row, dict):
        raise ValueError(f"{line[:40]!r} is no object")
    if "prompt" not in row:
        raise ValueError(f"has no field 'prompt' (it has {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(row["prompt"], str):
        raise ValueError(f"its prompt is no text: {row['prompt']!r}")
    return row["prompt"]
