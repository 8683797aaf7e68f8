"""The tokenizer: loaded without torch, cut at control tokens, each stretch of plain text encoded once.

A fast tokenizer cuts its added tokens out of a text before anything else and encodes the stretches between them
independently. `Tokenizer` makes that explicit: it cuts the text itself, so it knows which stretch came from whom, can
keep text that merely spells a control token plain, and encodes a stretch that returns only once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from instil.errors import TokenizerError
from instil.prompt.words import Words, word_pattern

_ANCHOR = "\U0010fffdinstil\U0010fffd"  # cut out of the text like any added token, so what follows is no longer first
_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_SPACES = re.compile(f"[{_SPACE}]*")  # what a token with lstrip or rstrip swallows; Python's own strip takes more
_NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
_NO_LIMIT = 1e9  # tokenizers that know no limit state an enormous one

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Places = NDArray[np.int64]


class Piece(NamedTuple):
    """A stretch of text between two cuts: a control token with its id, or plain text (`control` is None)."""

    text: str
    start: int
    end: int
    control: int | None


class Cut(NamedTuple):
    """A text and its beginning up to a seam, both cut into pieces."""

    both: list[Piece]  # how both begin
    beginning: list[Piece]  # how the beginning goes on
    whole: list[Piece]  # how the whole text goes on


class Tokenizer:
    """A fast tokenizer and the tokens that steer it.

    Args:
        backend: The tokenizer of the `tokenizers` library.
        special_tokens: What a chat template may name (`bos_token`, `eos_token`, …).
        chat_template: The tokenizer's own template; None if it has none.
        tool_template: Its template for conversations with tools, where that is another one.
        max_length: The most tokens that the model beside it takes, or else the tokenizer's own limit; None if neither
            states one.
        name: Where it came from, for messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, Any],
        chat_template: str | None = None,
        max_length: int | None = None,
        name: str = "tokenizer",
        tool_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.tool_template = tool_template
        self.max_length = max_length
        self.name = name
        self.added: tuple[str, ...] = ()
        self.template_arguments: Mapping[str, Any] = {}
        """What its own template was given when the model beside it was tuned, and is given from then on."""

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token(self) -> str | None:
        """The end-of-sequence token, if there is one."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, exactly when the tokenizer itself adds it to one."""
        bos = self.special_tokens.get("bos_token")
        if bos is None:
            return None
        ids = self.backend.encode("a", add_special_tokens=True).ids
        return bos if ids and ids[0] == self.backend.token_to_id(bos) else None

    def add_special_tokens(self, tokens: Iterable[str]) -> None:
        """Reserve an id, never split, for each token that has none. Those added are listed in `added`."""
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        new = [token for token in tokens if token not in known]
        self.backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in new])
        self.added += tuple(new)

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of token ids, special tokens included, white space as it is."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        """What decides how it encodes, as JSON text: the tokenizer itself and its named special tokens."""
        return str(self.backend.to_str()) + json.dumps(self.special_tokens, sort_keys=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or from the hub, without torch, as transformers' `AutoTokenizer` would.

    Raises:
        TokenizerError: There is none, or it is of a kind that cannot be cut exactly.
    """
    import transformers

    folder = Path(path)
    _check_folder(folder, str(path))
    try:
        named = _read_config(folder / "tokenizer_config.json").get("tokenizer_class") or ""
        loader: Any = getattr(transformers, str(named), None)
        if not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedTokenizerFast)):
            loader = transformers.PreTrainedTokenizerFast
        if issubclass(loader, transformers.LlamaTokenizer) and _is_byte_level(folder):  # as DeepSeek's are named
            loader = transformers.PreTrainedTokenizerFast
        loaded = loader.from_pretrained(str(path))
        found = _taken_over(loaded, _fast_backend(loaded, str(path)), str(path))
        template = _read_config(folder / "instil.json").get("template")
        found.template_arguments = dict(template.get("arguments") or {}) if isinstance(template, dict) else {}
        return found
    except TokenizerError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "Mend or replace its files." if folder.is_dir() else "Give a folder, or a hub name that you can reach."
        raise TokenizerError(f"{path}: the tokenizer cannot be loaded: {cause}", remedy) from error


def _is_byte_level(folder: Path) -> bool:
    splitter = _read_config(folder / "tokenizer.json").get("pre_tokenizer")
    return _mentions(splitter, "ByteLevel")


def _check_folder(folder: Path, path: str) -> None:
    """Refuse what can be no tokenizer before the hub is asked for it."""
    if folder.is_file():
        raise TokenizerError(f"{path}: a file, not a tokenizer's folder", "Give the folder that holds tokenizer.json.")
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise TokenizerError(
            f"{folder}: no tokenizer.json in this folder (it holds {found})",
            "Give the folder of a model or tokenizer in Hugging Face format.",
        )
    if not folder.is_dir() and (not _HUB_NAME.fullmatch(path) or ("/" in path and folder.parent.is_dir())):
        raise TokenizerError(f"{path}: no such folder", "Check the path.")


def _read_config(path: Path) -> dict[str, Any]:
    """A JSON object beside a tokenizer; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not JSON: {error}", "Mend or replace the file.") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: must be a JSON object", "Mend or replace the file.")
    return config


def from_transformers(loaded: Any, name: str = "") -> Tokenizer:
    """A tokenizer of transformers, which stays as it is; it must be a fast one (`backend_tokenizer`)."""
    backend = tokenizers.Tokenizer.from_str(_fast_backend(loaded, name).to_str())
    return _taken_over(loaded, backend, name or str(loaded.name_or_path))


def _fast_backend(loaded: Any, name: str) -> tokenizers.Tokenizer:
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(
            f"{name or type(loaded).__name__}: not a fast tokenizer (it has no tokenizer.json)",
            "Convert it with `AutoTokenizer.from_pretrained(…).save_pretrained(…)` in an environment that can.",
        )
    return backend


def _taken_over(loaded: Any, backend: tokenizers.Tokenizer, name: str) -> Tokenizer:
    template: Any = loaded.chat_template
    tool_template = None
    if isinstance(template, dict):
        template, tool_template = template.get("default"), template.get("tool_use")
    if not isinstance(template, str | None):
        raise TokenizerError(f"{name}: its chat_template is no text: {template!r}", "Mend or replace its files.")
    limit: Any = _model_limit(Path(name)) or loaded.model_max_length
    known_limit = int(limit) if isinstance(limit, int | float) and limit < _NO_LIMIT else None
    return Tokenizer(backend, dict(loaded.special_tokens_map), template, known_limit, name, tool_template)


def _model_limit(folder: Path) -> int | None:
    """The most positions that the model in this folder takes, read from its `config.json`, if there is one."""
    config = _read_config(folder / "config.json")
    inner = config.get("text_config")
    read: dict[str, Any] = inner if isinstance(inner, dict) else config
    limits = (read.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


class Encoder:
    """Encodes rendered text piece by piece; equal to the tokenizer on the whole text.

    Args:
        tokenizer: The tokenizer, with every token the template needs already reserved.
        control_tokens: The tokens to cut at: those that steer the model, never mere vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        state = json.loads(tokenizer.backend.to_str())
        added = {token["content"]: token for token in state["added_tokens"]}
        self.controls: dict[str, int] = {
            name: added[name]["id"]
            for name in control_tokens
            if name in added and _exact_cut(added[name], tokenizer.backend, state)
        }
        self.pattern = _cut_pattern(added, self.controls)
        self._swallows = {name: (added[name]["lstrip"], added[name]["rstrip"]) for name in self.controls}
        self._plain = _plain_tokenizer(tokenizer.backend, state, self.controls)
        without = _without_dummy_prefix(state)
        self._continuing = (
            self._plain if without == state else _plain_tokenizer(tokenizer.backend, without, self.controls)
        )
        self._first_differs = _first_differs(state)
        never = {*self.controls.values(), self._plain.token_to_id(_ANCHOR)}
        self._steering = frozenset(never) - {_unknown(state["model"], tokenizer.backend)}
        self._memo: dict[tuple[str, bool], list[int]] = {}
        pattern = word_pattern(self._plain, state)
        self._words = pattern and Words(pattern, self._encode_words, added.keys() - self.controls.keys())

    def cut(self, text: str, plain_at: frozenset[int] = frozenset(), start: int = 0) -> list[Piece]:
        """The text cut at its control tokens, in order and without gaps.

        Args:
            text: What the template rendered.
            plain_at: Where a control token is only spelled, in characters: no cut there.
            start: Where to begin: the end of a control token.
        """
        pieces: list[Piece] = []
        at, found = start, self.pattern.search(text, start)
        while found:
            name, (start, end) = found[0], found.span()
            if start not in plain_at and name in self.controls:
                left, right = self._swallows[name]
                if left:
                    start = at + len(text[at:start].rstrip(_SPACE))
                if right and (spaces := _SPACES.match(text, end)):
                    end = spaces.end()
                if start > at:
                    pieces.append(Piece(text[at:start], at, start, None))
                pieces.append(Piece(text[start:end], start, end, self.controls[name]))
                at = end
            found = self.pattern.search(text, end)
        if at < len(text):
            pieces.append(Piece(text[at:], at, len(text), None))
        return pieces

    def cut_at(self, seam: int, text: str, plain_at: frozenset[int] = frozenset()) -> Cut:
        """What `cut` makes of a text and of its beginning up to the seam: cut once, as far as they go together.

        They part at the last control token before the seam: what stands up to there is cut alike in both.
        """
        pieces = self.cut(text, plain_at)
        alike = len(pieces)
        while alike and (pieces[alike - 1].end > seam or pieces[alike - 1].control is None):
            alike -= 1
        start = pieces[alike - 1].end if alike else 0
        return Cut(pieces[:alike], self.cut(text[:seam], plain_at, start), pieces[alike:])

    def remember(self, pieces: Iterable[tuple[str, bool]]) -> None:
        """Encode plain pieces, given as (text, whether it begins the text), in one batch of the library.

        What was remembered before and is not among them is forgotten.
        """
        keys = dict.fromkeys(map(self._key, pieces))
        self._memo = {key: self._memo[key] for key in keys if key in self._memo}
        if self._words:
            texts = [text for text, first in keys if (text, first) not in self._memo]
            self._memo |= {(text, True): ids for text, ids in self._words.encode(texts).items()}
        new = [key for key in keys if key not in self._memo]
        encodings = self._plain.encode_batch_fast(
            [text if first else _ANCHOR + text for text, first in new], add_special_tokens=False
        )
        for (text, first), encoding in zip(new, encodings, strict=True):
            ids = encoding.ids if first else encoding.ids[1:]
            self._memo[text, first] = ids if self._steering.isdisjoint(ids) else self._tokens(text, first=first)[0]

    def _encode_words(self, words: list[str]) -> Iterator[list[int] | None]:
        for encoding in self._plain.encode_batch_fast(words, add_special_tokens=False):
            yield encoding.ids if self._steering.isdisjoint(encoding.ids) else None

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """The ids of a plain piece. The list is shared: do not change it."""
        return self._memo.get(self._key((text, first))) or self._tokens(text, first=first)[0]

    def encode(self, text: str, plain_at: frozenset[int] = frozenset()) -> list[int]:
        """The ids of a whole text, cut as `cut` does."""
        return self.encode_pieces(self.cut(text, plain_at))

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of the pieces of a text."""
        ids: list[int] = []
        for piece in pieces:
            if piece.control is not None:
                ids.append(piece.control)
            else:
                ids += self.encode_plain(piece.text, first=not piece.start)
        return ids

    def encode_continuation(self, text: str, plain_at: frozenset[int] = frozenset()) -> list[int]:
        """The ids of a text that goes on after other text: no dummy prefix is put before it."""
        ids: list[int] = []
        for piece in self.cut(text, plain_at):
            if piece.control is not None:
                ids.append(piece.control)
            elif piece.start:
                ids += self.encode_plain(piece.text, first=False)
            else:
                ids += self._tokens(piece.text, continued=True)[0]
        return ids

    def places(self, text: str, plain_at: frozenset[int] = frozenset(), *, continuation: bool = False) -> Places:
        """Where each token of a whole text stands in it: (tokens, 2) int64, start and end in characters."""
        places = [np.empty((0, 2), np.int64)]
        for piece in self.cut(text, plain_at):
            if piece.control is not None:
                places.append(np.array([[piece.start, piece.end]]))
                continue
            begins = not piece.start
            tokens = self._tokens(piece.text, first=begins, continued=begins and continuation)
            places.append(np.asarray(tokens[1], np.int64).reshape(-1, 2) + piece.start)
        return np.concatenate(places)

    def spelled(self, text: str) -> list[str]:
        """The control tokens whose spelling stands in the text, in order."""
        return [found for found in self.pattern.findall(text) if found in self.controls]

    def _key(self, piece: tuple[str, bool]) -> tuple[str, bool]:
        return piece if self._first_differs else (piece[0], True)

    def _tokens(
        self, text: str, *, first: bool = False, continued: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of plain text and where each stands in it.

        Where the vocabulary itself holds a control token and makes it of plain text, that text is broken in two.
        """
        backend = self._continuing if continued else self._plain
        ahead = "" if first and not continued else _ANCHOR
        encoding = backend.encode(ahead + text, add_special_tokens=False)
        ids = encoding.ids[bool(ahead) :]
        places = [(start - len(ahead), end - len(ahead)) for start, end in encoding.offsets[bool(ahead) :]]
        breaks = [
            at + 1 for number, (at, end) in zip(ids, places, strict=True) if number in self._steering and end > at + 1
        ]
        if not breaks:
            return ids, places
        ids, places = [], []
        for at, end in pairwise([0, *breaks, len(text)]):
            part, part_places = self._tokens(text[at:end], first=first, continued=continued or at > 0)
            ids += part
            places += [(at + start, at + stop) for start, stop in part_places]
        return ids, places


def _cut_pattern(added: Mapping[str, Mapping[str, Any]], controls: Mapping[str, int]) -> re.Pattern[str]:
    """All added tokens that are looked for in raw text, the longest first."""
    names = (name for name, token in added.items() if name in controls or not token["normalized"])
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _exact_cut(token: Mapping[str, Any], backend: tokenizers.Tokenizer, state: Mapping[str, Any]) -> bool:
    """Whether the library cuts at this token wherever its characters stand, and encodes what is left apart."""
    if token["single_word"] or not token["content"].strip():
        return False
    if not token["normalized"] or state["normalizer"] is None:
        return True
    normalizer: Any = backend.normalizer
    moved = _mentions(state["normalizer"], "Prepend") or _mentions(state["normalizer"], "Strip")
    return not moved and normalizer.normalize_str(token["content"]) == token["content"]


def _plain_tokenizer(
    backend: tokenizers.Tokenizer, state: Mapping[str, Any], controls: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The tokenizer as it encodes plain text: blind to the control tokens, to BOS and to truncation.

    The model is shared, since a large vocabulary takes long to build; should its added tokens not find their ids again
    that way, all is built anew.
    """
    added = [{**token, "special": token["content"] in controls} for token in state["added_tokens"]]
    changed = {**state, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    shell = tokenizers.Tokenizer.from_str(json.dumps({**changed, "added_tokens": [], "model": _NO_MODEL}))
    plain = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(shell, part) is not None:
            setattr(plain, part, getattr(shell, part))
    for token in sorted(added, key=lambda token: token["id"]):
        flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        add = plain.add_special_tokens if token["special"] else plain.add_tokens
        add([tokenizers.AddedToken(token["content"], **flags)])
    if any(plain.token_to_id(token["content"]) != token["id"] for token in added):
        plain = tokenizers.Tokenizer.from_str(json.dumps(changed))
    plain.add_tokens([tokenizers.AddedToken(_ANCHOR, normalized=False, special=False)])
    plain.encode_special_tokens = True
    return plain


def _without_dummy_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's state with nothing that puts a space before a text.

    Where white space is thrown away before the words are marked (T5), the mark is no dummy and stays.
    """
    if _mentions(state["pre_tokenizer"], "WhitespaceSplit"):
        return dict(state)

    def change(node: Any) -> Any:
        if isinstance(node, list):
            return [change(item) for item in node if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(node, dict):
            return node
        node = {key: change(value) for key, value in node.items()}
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
        if node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    normalizer = state["normalizer"]
    if normalizer and normalizer.get("type") == "Prepend":
        normalizer = None
    return {**state, "normalizer": change(normalizer), "pre_tokenizer": change(state["pre_tokenizer"])}


def _unknown(model: Mapping[str, Any], backend: tokenizers.Tokenizer) -> int | None:
    """The id of what the vocabulary does not know: a special token that plain text is allowed to be."""
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else backend.token_to_id(name)


def _first_differs(state: Mapping[str, Any]) -> bool:
    """Whether text is encoded otherwise at the very beginning than after a control token."""
    return _mentions(state["pre_tokenizer"], "first")


def _mentions(node: Any, value: str) -> bool:
    if isinstance(node, dict):
        return any(_mentions(item, value) for item in node.values())
    if isinstance(node, list):
        return any(_mentions(item, value) for item in node)
    return bool(node == value)
