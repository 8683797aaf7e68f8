"""Words: where a tokenizer first splits a text by a pattern, each word is encoded once, however often it returns.

Byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, …) split a text by a regular expression and encode the words apart.
Their pattern is written for another engine and speaks of Unicode's classes. On printable ASCII, where most text lies,
it is put into Python's terms; whether the two agree is tried out against the tokenizer itself, and if they do not,
it is not used. All other text is left to the library.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_OTHER_THAN_ASCII = re.compile(r"[^\t\n\r -~]")
_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": ""}
_CLASS = re.compile(r"\\p\{(\w+)\}")
_SAME_ON_ASCII = {"NFC", "NFD", "NFKC", "NFKD"}
_KEEP_WHAT_MATCHES = {("Isolated", False), ("Removed", True)}
_MEMO_WORDS = 200_000


class Words:
    """The ids of plain text by its words.

    Args:
        pattern: What finds the words.
        encode: The ids of each of some words, as the library encodes them; None for a word that needs care.
        kept_apart: The added tokens that the library cuts out of a text before it splits it.
    """

    def __init__(
        self,
        pattern: re.Pattern[str],
        encode: Callable[[list[str]], Iterable[list[int] | None]],
        kept_apart: Iterable[str],
    ) -> None:
        self._find = pattern.findall
        self._encode = encode
        apart = "|".join(map(re.escape, kept_apart)) or r"(?!)"
        self._unfit = re.compile(f"{_OTHER_THAN_ASCII.pattern}|{apart}")
        self._memo: dict[str, list[int] | None] = {}

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of those texts that can be put together from words."""
        words = {text: self._find(text) for text in texts if not self._unfit.search(text)}
        if len(self._memo) > _MEMO_WORDS:
            self._memo.clear()
        new = [word for word in dict.fromkeys(chain.from_iterable(words.values())) if word not in self._memo]
        for word, ids in zip(new, self._encode(new), strict=True):
            self._memo[word] = ids if self._find(word) == [word] else None
        encoded = {}
        for text, found in words.items():
            parts = [ids for ids in map(self._memo.__getitem__, found) if ids is not None]
            if len(parts) == len(found) and sum(map(len, found)) == len(text):
                encoded[text] = list(chain.from_iterable(parts))
        return encoded


def word_pattern(backend: tokenizers.Tokenizer, state: Mapping[str, Any]) -> re.Pattern[str] | None:
    """What finds the words of printable ASCII text just as this tokenizer does; None if it splits text otherwise.

    Args:
        backend: The tokenizer.
        state: Its JSON form.
    """
    normalizer = state["normalizer"] or {"type": "Sequence", "normalizers": []}
    if any(each["type"] not in _SAME_ON_ASCII for each in normalizer.get("normalizers", [normalizer])):
        return None
    source = _source(state["pre_tokenizer"] or {})
    pattern = _compiled(source) if source else None
    return pattern if pattern and _agrees(pattern, backend.pre_tokenizer) else None


def _source(splitter: Mapping[str, Any]) -> str | None:
    """The pattern that a pre-tokenizer splits by, if that is all it does."""
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = parts
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits:
        return _GPT2 if last["use_regex"] else None
    (split, *more) = splits
    if more or last["use_regex"] or split.get("type") != "Split":
        return None
    return split["pattern"].get("Regex") if (split["behavior"], split["invert"]) in _KEEP_WHAT_MATCHES else None


def _compiled(source: str) -> re.Pattern[str] | None:
    """The pattern in Python's terms, for ASCII text; None if it cannot be put so."""
    parts, inside, at = [], False, 0
    while at < len(source):
        found = _CLASS.match(source, at)
        if found and found[1] not in _CLASSES:
            return None
        if found:
            members = _CLASSES[found[1]]
            parts.append(members if inside else f"[{members}]" if members else r"(?!)")
            at = found.end()
            continue
        length = 2 if source[at] == "\\" else 1
        inside = {"[": True, "]": False}.get(source[at], inside)
        parts.append(source[at : at + length])
        at += length
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of what other engines read otherwise
            pattern = re.compile("".join(parts))
    except (re.error, Warning):
        return None
    return None if pattern.groups else pattern


def _agrees(pattern: re.Pattern[str], splitter: Any) -> bool:
    """Whether the pattern finds the tokenizer's words in texts of all sorts of neighbours."""
    draw = random.Random(0)
    texts = ["".join(draw.choice(draw.choice(_SORTS)) for _ in range(draw.randint(1, 12))) for _ in range(500)]
    texts += [f"{head}'{tail}{rest}" for head in ("a", " ", "") for tail in _CONTRACTED for rest in ("", "a", " b")]
    return all(
        pattern.findall(text) == [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        for text in texts
    )


_SORTS = ("abc", "XYZ", "019", " ", "\n\r\t", "'", '.,-_!?/\\[]{}()<>#$%&*+=@^`|~:;"')
_CONTRACTED = ("s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "M", "lL", "D", "x")
