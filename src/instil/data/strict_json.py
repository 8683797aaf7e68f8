"""JSON as its standard has it: no NaN, no key twice, no half of a surrogate pair."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# Aliases can make a small value unfold into more than any memory holds.
MAX_VALUES = 1_000_000
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictDecoder:
    """Decodes JSON values and collects what the standard forbids in `faults`, so that reading can go on behind it."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str) -> Any:
        """The one value that `text` holds.

        Raises:
            ValueError: It is not JSON. What else is wrong stands in `faults`.
            RecursionError: It is nested too deeply.
        """
        self.faults.clear()
        value = self._decoder.decode(text)
        self._check_surrogates(value, text, 0, len(text))
        return value

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; raises as `decode` does."""
        self.faults.clear()
        value, end = self._decoder.raw_decode(text, start)
        self._check_surrogates(value, text, start, end)
        return value, end

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.faults.append(f"the key {twice[:60]!r} stands twice in one object")
        return values

    def _constant(self, name: str) -> None:
        self.faults.append(f"{name} is not JSON")

    def _float(self, digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            self.faults.append(f"the number {digits[:30]} is too large")
        return number

    def _check_surrogates(self, value: Any, text: str, start: int, end: int) -> None:
        # A pair of escapes is one character; only the parsed value shows whether a half stands alone.
        if text.find("\\u", start, end) >= 0 and _SURROGATE_ESCAPE.search(text, start, end):
            half = lone_surrogate(value)
            if half:
                self.faults.append(f"\\u{ord(half):04x} is half of a surrogate pair and no character")


def lone_surrogate(value: Any) -> str:
    """The first character anywhere in `value` that no UTF-8 text can hold, or ""."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        return str(error.object)[error.start]
    return ""


def fault(value: Any) -> str:
    """What JSON could not hold in a value that came from elsewhere, or ""."""
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            return f"unfolds into more than {MAX_VALUES:,} values"
        if isinstance(item, Mapping):
            odd = next((key for key in item if not isinstance(key, str)), None)
            if odd is not None:
                return f"a column's name must be a string, and is {odd!r}; quote it"
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, float) and not math.isfinite(item):
            return f"the number {item} is not finite"
    half = lone_surrogate(value)
    return f"\\u{ord(half):04x} is half of a surrogate pair and no character" if half else ""


def explain(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, in words, with the column where a decoder said one."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "holds a number of too many digits"
    if ends_early(error):
        return f"malformed JSON: it ends early, at column {error.colno} ({_lowered(error.msg)})"
    return f"malformed JSON at column {error.colno}: {_lowered(error.msg)}"


def ends_early(error: json.JSONDecodeError) -> bool:
    """Whether the text stops before its value does."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is not strict JSON; the message says why.
    """
    decoder = StrictDecoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(explain(error)) from None
    if decoder.faults:
        raise ValueError(decoder.faults[0])
    return value


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
