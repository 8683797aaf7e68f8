"""E-mail addresses, phone numbers and payment card numbers taken out of texts before they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import phonenumbers
from phonenumbers import Leniency, PhoneNumberMatcher

from instil.errors import UsageError, nearest

Span = tuple[int, int]

# Latin, Greek and Cyrillic: in scripts without spaces an address would have no beginning.
_LETTER = "A-Za-zÀ-ɏͰ-ԯ"
_BEFORE_AT = re.compile(rf"[{_LETTER}0-9._+'-]")
_AT_DOMAIN = re.compile(
    rf"(?:@|＠|%40)(?:[{_LETTER}0-9][{_LETTER}0-9-]{{0,62}}\.){{1,30}}"
    # A name with a call's parenthesis is code, `a@b.mean(0)`, but for the most common ends of addresses.
    rf"(?:xn--[A-Za-z0-9-]{{1,59}}|(?:com|org|net|edu|gov|info)(?=\()|[{_LETTER}]{{2,63}}(?![\w.]{{0,99}}\())"
)
_OF_CODE = ("this", "super")  # of an outer class, in Kotlin

_ZEROS = "０٠۰०"
_DIGITS = {ord(zero) + n: str(n) for zero in _ZEROS for n in range(10)}
# Where a number of a payment network begins; 1, 7, 8 and 9 are others' (times of day, ISBNs).
_CARD_BEGINS = re.compile(r"(?<![0-9A-Za-z])(?<!\d\.)(?:[3-6]\d\d\d|2[2-7]\d\d)")
_CARD_SHAPES = tuple(
    re.compile(shape.replace("~", "([ \u00a0-])", 1).replace("~", r"\1") + "(?![0-9A-Za-z])")
    for shape in (
        r"\d{4}~\d{4}~\d{4}~\d{4}~\d{3}",
        r"\d{4}~\d{4}~\d{4}~\d{4}",
        r"\d{4}~\d{6}~\d{4,5}",
        r"\d{4}~\d{3}~\d{3}~\d{3}",
        r"\d{13,19}",
    )
)

_BETWEEN = r"-‐-―−ー－/. \u00a0\u00ad\u200b\u2060\u3000()（）\[\]~～"
_RUN = re.compile(rf"[+＋(（\[]{{0,2}}\d(?:[{_BETWEEN}]{{0,4}}\d)*")
_GROUP = re.compile(r"[+＋(（\[]{0,2}\d+")
_FEWEST_DIGITS = 7
_MOST_GROUPS, _MOST_BESIDE = 8, 2
_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")  # of the internet
_DECIMAL = re.compile(r"\d+\.\d+")
_OF_32_BITS = ("2147483647", "2147483648")  # the greatest integer, and the least without its sign
_ISBN = re.compile(r"ISBN(?:-1[03])?:?\s?$", re.IGNORECASE)


class Redactor:
    """Puts `[email]`, `[phone]` and `[card]` in place of what they name.

    Args:
        region: The country (`US`, `DE`) whose phone numbers are found without a country code as well.

    Raises:
        UsageError: There is no such country.
    """

    def __init__(self, region: str = "US") -> None:
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise UsageError(
                f"--phone-region {region}: is no country code", nearest(region.upper(), phonenumbers.SUPPORTED_REGIONS)
            )
        self._region = region

    def text(self, text: str) -> str:
        """The text without them."""
        text = _replaced(text, _emails, "[email]")
        text = _replaced(text, _cards, "[card]")
        return _replaced(text, self._phones, "[phone]")

    def value(self, value: Any, *, numbers: bool = False) -> Any:
        """A JSON value, in all of whose texts they are replaced, names of keys included.

        Args:
            value: The value.
            numbers: Whether a whole number may be one of them, as in the arguments of a tool call.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(key): self._arguments(item) if key == "arguments" else self.value(item, numbers=numbers)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(item, numbers=numbers) for item in value]
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            found = self.text(str(value))
            return value if found == str(value) else found
        return value

    def _arguments(self, value: Any) -> Any:
        """The arguments of a call: an object, or its JSON text, which stays JSON, and stays as it is where it can."""
        if not isinstance(value, str):
            return self.value(value, numbers=True)
        try:
            held = json.loads(value)
        except (ValueError, RecursionError):
            return self.text(value)
        found = self.value(held, numbers=True)
        return value if found == held else json.dumps(found, ensure_ascii=False)

    def _phones(self, text: str) -> Iterator[Span]:
        for run in _RUN.finditer(text):
            if sum(each.isdecimal() for each in run[0]) >= _FEWEST_DIGITS:
                begin = max(run.start() - 1, 0)  # what stands before and behind says whether it is one
                found = list(self._numbers(text, begin, run.end() + 1))
                yield from found or self._among(text, list(_GROUP.finditer(text, *run.span())))

    def _among(self, text: str, groups: list[re.Match[str]]) -> Iterator[Span]:
        """The number that is all but one or two of the groups of digits, at the beginning or at the end: the matcher
        takes `415 555 2671 2 times` for a number that is too long.
        """
        if len(groups) > _MOST_GROUPS:
            return
        sides = range(_MOST_BESIDE + 1)
        for left, right in sorted(((left, right) for left in sides for right in sides), key=sum)[1:]:
            if left + right < len(groups):
                span = groups[left].start(), groups[len(groups) - 1 - right].end()
                if span in self._numbers(text, *span):
                    yield span
                    return

    def _numbers(self, text: str, begin: int, end: int) -> Iterator[Span]:
        """With a country code any number that is valid, without one such as are written as they are there."""
        part = text[begin:end]
        international = PhoneNumberMatcher(part, None, leniency=Leniency.VALID)
        national = PhoneNumberMatcher(part, self._region, leniency=Leniency.STRICT_GROUPING)
        last = 0
        for match in sorted([*international, *national], key=lambda each: each.start):
            span = begin + match.start, begin + match.end
            if match.start >= last and not _is_other(text, *span):
                last = match.end
                yield span


def _replaced(text: str, find: Callable[[str], Iterable[Span]], name: str) -> str:
    pieces, last = [], 0
    for begin, end in sorted(find(text)):
        pieces += [text[last:begin], name]
        last = end
    return "".join([*pieces, text[last:]])


def _emails(text: str) -> Iterator[Span]:
    last = 0
    for match in _AT_DOMAIN.finditer(text):
        begin = match.start()
        while begin > last and _BEFORE_AT.match(text[begin - 1]):
            begin -= 1
        while begin < match.start() and text[begin] in ".'-":
            begin += 1
        last = match.end()
        name = text[begin : match.start()]
        repository = name == "git" and re.match(r":\S", text[last : last + 2])
        if name and name not in _OF_CODE and not repository:
            yield begin, last


def _cards(text: str) -> Iterator[Span]:
    text, last = text.translate(_DIGITS), 0
    for start in _CARD_BEGINS.finditer(text):
        if start.start() < last:
            continue
        for shape in _CARD_SHAPES:
            match = shape.match(text, start.start())
            if match and _adds_up(match[0]):
                last = match.end()
                yield match.span()
                break


def _adds_up(number: str) -> bool:
    """Whether the last digit is the one that the others ask for (Luhn; ISO/IEC 7812-1)."""
    digits = [int(each) for each in reversed(number) if each.isdecimal()]
    doubled = (sum(divmod(2 * each, 10)) for each in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_other(text: str, begin: int, end: int) -> bool:
    """Whether what could be a phone number is another kind: an internet address, a decimal number, an ISBN, a
    limit of integers.
    """
    said = text[begin:end]
    if said.startswith(("+", "＋")):
        return False
    goes_on = re.match(r"\.\d", text[end : end + 2]) or re.search(r"\d\.$", text[max(begin - 2, 0) : begin])
    return bool(
        goes_on
        or said in _OF_32_BITS
        or _ADDRESS.fullmatch(said)
        or _DECIMAL.fullmatch(said)
        or _ISBN.search(text[max(begin - 10, 0) : begin])
    )
