"""A stream of JSON values longer than memory: a window of text that moves along it."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from instil.data.strict_json import StrictDecoder

CHUNK_BYTES = 1 << 18
# A cut in the middle of a literal or an escape is noticed a few characters before the end of the window.
_NEAR_END = 16
_SPACE = re.compile(r"[ \t\r\n]*")
_UNDECODED = re.compile(r"[\udc80-\udcff]")


class JsonText:
    """A window on a stream of JSON.

    Args:
        stream: UTF-8 bytes; what is not UTF-8 is kept as it is and reported with the value that holds it.

    `line` and `column` are the place, from 1, at which the window stands; `marked` tells that the stream began with a
    byte order mark, `broken` that a value was not JSON and nothing behind it can be read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.line = 1
        self.column = 1
        self.position = 0
        self.marked = False
        self.broken = False
        self._stream = stream
        self._decoder = StrictDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._window = ""
        self._damaged = False
        self._bytes_before = 0

    @property
    def faults(self) -> list[str]:
        """What the standard forbids in the last value."""
        return self._decoder.faults

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end; the window then stands at it."""
        while True:
            found = _SPACE.match(self._window, self.position)
            assert found is not None
            self._to(found.end())
            if self.position < len(self._window):
                return self._window[self.position]
            if not self._more():
                return ""

    def move(self, characters: int) -> None:
        """Goes on by so many characters."""
        self._to(self.position + characters)

    def value(self) -> tuple[Any, str, tuple[int, int] | None]:
        """The value that begins here, its text, and the first byte in it that is not UTF-8 with its offset.

        Raises:
            ValueError: It is not JSON; `broken` is set.
            RecursionError: It is nested too deeply; `broken` is set.
        """
        value, end = self._decode()
        raw = self._window[self.position : end]
        damage = self._find_damage(end) if self._damaged else None
        self._to(end)
        return value, raw, damage

    def spans_lines(self) -> bool:
        """Whether the value that begins here is JSON and goes over several lines. The window stays."""
        if not self.peek():
            return False
        try:
            _, end = self._decode()
        except (ValueError, RecursionError):
            self.broken = False
            return False
        return "\n" in self._window[self.position : end]

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a position from here on."""
        line = self.line + self._window.count("\n", self.position, at)
        newline = self._window.rfind("\n", self.position, at)
        return line, at - newline if newline >= 0 else self.column + at - self.position

    def sample(self) -> str:
        """Some of the text from here on."""
        return self._window[self.position : self.position + 2000]

    def _decode(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = self._decoder.decode_at(self._window, self.position)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and self._may_be_cut(error) and self._more():
                    continue
                self.broken = True
                raise
            if end < len(self._window) or not self._more():
                return value, end

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - _NEAR_END

    def _more(self) -> bool:
        """Takes in at least as much again as the window still holds; False at the end of the stream."""
        chunk = self._stream.read(max(CHUNK_BYTES, len(self._window) - self.position))
        text = self._utf8.decode(chunk, final=not chunk)
        if not chunk and not text:
            return False
        if not self.marked and self._bytes_before == 0 and not self._window and text.startswith("\ufeff"):
            self.marked, self._bytes_before, text = True, 3, text[1:]
        self._damaged = self._damaged or (not text.isascii() and _UNDECODED.search(text) is not None)
        used = self._window[: self.position]
        self._bytes_before += len(used.encode("utf-8", "surrogateescape"))
        self._window, self.position = self._window[self.position :] + text, 0
        return True

    def _to(self, position: int) -> None:
        self.line, self.column = self.place(position)
        self.position = position

    def _find_damage(self, end: int) -> tuple[int, int] | None:
        found = _UNDECODED.search(self._window, self.position, end)
        if found is None:
            return None
        before = self._window[: found.start()].encode("utf-8", "surrogateescape")
        return ord(found.group()) - 0xDC00, self._bytes_before + len(before)
