"""Token trees on disk: a few flat arrays, written as the trees come and mapped into memory when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from instil.errors import PackingError
from instil.packing.tree import Ids, Ints, TokenTree, depths

_FIELDS: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "subtree_end": np.int32,
    "target_rows": np.int32,
    "target_ids": np.int32,
    "target_weights": np.float32,
    "target_exchange": np.int32,
    "exchange_prompt": np.int32,
    "exchange_label": np.int8,
}
_COUNTS: dict[str, type[np.generic]] = {
    "sizes": np.int32,  # (N,) tokens of each tree
    "targets": np.int32,  # (N,) its targets
    "exchanges": np.int32,  # (N,) its exchanges
    "longest": np.int32,  # (N,) its longest path
    "unshared": np.int64,  # (N,) its exchanges' tokens one by one
}
_ROWS: dict[str, type[np.generic]] = {
    "file": np.int32,  # (N,) the number of the file that the tree's row stands in
    "line": np.int64,  # (N,) its line there
    "column": np.int64,  # (N,) its column, where several rows stand on a line, or 0
    "hash": np.uint64,  # (N,) of all its tokens: rows that are alike have the same
    "lengths": np.int32,  # (exchanges,) prompt and completion of each exchange together
}
_KINDS = _FIELDS | _COUNTS | _ROWS
Columns = dict[str, NDArray[Any]]


def columns(forest: TokenTree, rows: Columns) -> Columns:
    """The arrays that hold the trees of a forest.

    Args:
        forest: A tree for each row of data, in order: `exchange_record` counts them from 0.
        rows: `file`, `line`, `column`, `hash` and `lengths` of the rows.
    """
    exchanges = np.bincount(forest.exchange_record)  # (N,)
    first = np.cumsum(exchanges) - exchanges  # (N,)
    paths = forest.target_rows[forest.last_targets]  # (E,): where each exchange ends; a tree's last row ends one
    ends = _over(np.maximum, paths, first) + 1  # (N,)
    sizes = np.diff(ends, prepend=0)
    starts = ends - sizes
    tree_of = forest.exchange_record[forest.target_exchange]  # (S,)
    found = {
        "input_ids": forest.input_ids,
        "subtree_end": forest.subtree_end - np.repeat(starts, sizes),
        "target_rows": forest.target_rows - starts[tree_of],
        "target_ids": forest.target_ids,
        "target_weights": forest.target_weights,
        "target_exchange": forest.target_exchange - first[tree_of],
        "exchange_prompt": forest.exchange_prompt,
        "exchange_label": forest.exchange_label,
        "sizes": sizes,
        "targets": np.bincount(tree_of),
        "exchanges": exchanges,
        "longest": _over(np.maximum, forest.position_ids, starts) + 1,
        "unshared": _over(np.add, forest.path_lengths, first),
        **rows,
    }
    return {name: found[name].astype(kind, copy=False) for name, kind in _KINDS.items()}


def _over(operation: np.ufunc, values: Ints, starts: Ints) -> Ints:
    """(N,) the values of each tree as one, from each start to the next."""
    return operation.reduceat(values, starts) if len(starts) else starts


def write(folder: Path, chunks: Iterable[Columns]) -> None:
    """Append chunk after chunk to the arrays' files in a folder."""
    with ExitStack() as opened:
        files = {name: opened.enter_context((folder / f"{name}.bin").open("wb")) for name in _KINDS}
        for chunk in chunks:
            for name, file in files.items():
                _append(file, chunk[name])
    (folder / "arrays.json").write_text(json.dumps({name: np.dtype(kind).str for name, kind in _KINDS.items()}))


def _append(file: BinaryIO, array: NDArray[Any]) -> None:
    try:
        file.write(array.tobytes())
        file.flush()
    except OSError as error:
        raise PackingError(
            f"{Path(file.name).parent.parent}: the encoded data does not fit there: {error.strerror}",
            "Free some space, or choose another folder with --cache-dir, $INSTIL_CACHE or $TMPDIR.",
        ) from error


class StoredTrees(Sequence[TokenTree]):
    """The trees in a folder, one for each row of data that has something to train. A `TreeStore`.

    Args:
        folder: Where `write` put them.
        files: The files of the data, by number.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.files = tuple(files)
        kinds: dict[str, str] = json.loads((folder / "arrays.json").read_text())
        self._arrays: Columns = {name: _mapped(folder / f"{name}.bin", kind) for name, kind in kinds.items()}
        self.sizes: Ids = self._arrays["sizes"]
        self.longest: Ids = self._arrays["longest"]
        self.unshared: Ids = self._arrays["unshared"]
        self._starts = {name: _starts(self._arrays[name]) for name in ("sizes", "targets", "exchanges")}
        self._reference: NDArray[np.float64] = np.full(self._starts["exchanges"][-1], np.nan)

    @property
    def lengths(self) -> Ids:
        """(exchanges,) int32: prompt and completion of each exchange together."""
        return self._arrays["lengths"]

    @property
    def exchanges(self) -> Ids:
        """(N,) int32: the exchanges of each tree."""
        return self._arrays["exchanges"]

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """(N,) uint64: rows with the same tokens have the same."""
        return self._arrays["hash"]

    @property
    def labels(self) -> NDArray[np.int8]:
        """(exchanges,) int8: the place of each exchange's label in LABELS."""
        return self._arrays["exchange_label"]

    @property
    def highest_id(self) -> int:
        """The highest id of any token."""
        return int(self._arrays["input_ids"].max(initial=0))

    @property
    def weight(self) -> float:
        """The sum of the weights of all targets."""
        return float(self._arrays["target_weights"].sum(dtype=float))

    def with_reference(self, reference: NDArray[np.float64]) -> StoredTrees:
        """The same trees, with what a reference model makes of their exchanges.

        Args:
            reference: (exchanges,) as `TokenTree.exchange_reference`, those of the rows in order.
        """
        other = copy(self)
        other._reference = reference
        return other

    def name(self, index: int) -> str:
        """Where the row of a tree stands, as `file:line`."""
        file, line, column = (int(self._arrays[name][index]) for name in ("file", "line", "column"))
        return f"{self.files[file]}:{line}" + (f":{column}" if column else "")

    def first_ids(self, index: int, start: int, stop: int) -> Ids:
        """The ids from `start` to `stop` of a tree's first path, fewer if it is shorter."""
        begin, end = self._starts["sizes"][index : index + 2]
        if self._arrays["exchanges"][index] == 1:
            return self._arrays["input_ids"][begin + start : min(begin + stop, end)]
        return self[index].first_path[start:stop]

    def first_windows(self, indices: Ints, starts: Ints, width: int) -> NDArray[np.int32]:
        """(M, width): `first_ids` of many trees at once, from each start on; -1 beyond the end."""
        ids = self._arrays["input_ids"]
        begins = self._starts["sizes"][indices] + starts
        left = np.clip(self._first_paths[indices] - starts, 0, width)
        found = np.full((len(indices), width), -1, np.int32)
        inside = begins + width <= len(ids)
        if inside.any():
            found[inside] = np.lib.stride_tricks.sliding_window_view(ids, width)[begins[inside]]
        for row in np.flatnonzero(~inside):
            found[row, : left[row]] = ids[begins[row] : begins[row] + left[row]]
        short = left < width
        found[short] = np.where(np.arange(width) < left[short, None], found[short], -1)
        return found

    @cached_property
    def _first_paths(self) -> Ints:
        """(N,) the length of each tree's first path."""
        lengths = self.sizes.astype(np.int64)
        for index in np.flatnonzero(self._arrays["exchanges"] > 1).tolist():
            ends = self._arrays["subtree_end"][slice(*self._starts["sizes"][index : index + 2])]
            lengths[index] = (ends == np.arange(1, len(ends) + 1)).argmax() + 1
        return lengths

    def concatenated(self, rows: Ints) -> TokenTree:
        """What `concatenate` makes of the trees of some rows, read in one go."""
        tokens, sizes = _gathered(self._starts["sizes"], rows)
        targets, target_counts = _gathered(self._starts["targets"], rows)
        exchanges, exchange_counts = _gathered(self._starts["exchanges"], rows)
        first_token, first_exchange = np.cumsum(sizes) - sizes, np.cumsum(exchange_counts) - exchange_counts
        arrays = self._arrays
        ends = arrays["subtree_end"][tokens] + np.repeat(first_token, sizes)
        return TokenTree(
            arrays["input_ids"][tokens].astype(np.int64),
            depths(ends),
            ends,
            arrays["target_rows"][targets] + np.repeat(first_token, target_counts),
            arrays["target_ids"][targets].astype(np.int64),
            arrays["target_weights"][targets],
            arrays["target_exchange"][targets] + np.repeat(first_exchange, target_counts),
            arrays["exchange_prompt"][exchanges].astype(np.int64),
            np.repeat(rows, exchange_counts),
            arrays["exchange_label"][exchanges].astype(np.int64),
            self._reference[exchanges],
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenTree]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | list[TokenTree]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        tokens, targets, exchanges = (
            slice(self._starts[name][index], self._starts[name][index + 1])
            for name in ("sizes", "targets", "exchanges")
        )
        ends = self._arrays["subtree_end"][tokens]
        return TokenTree(
            self._arrays["input_ids"][tokens],
            depths(ends),
            ends,
            self._arrays["target_rows"][targets],
            self._arrays["target_ids"][targets],
            self._arrays["target_weights"][targets],
            self._arrays["target_exchange"][targets],
            self._arrays["exchange_prompt"][exchanges],
            np.full(exchanges.stop - exchanges.start, index),
            self._arrays["exchange_label"][exchanges],
            self._reference[exchanges],
        )


def _gathered(starts: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Where the elements of some rows stand in a flat array, row after row, and how many each row has."""
    counts = starts[rows + 1] - starts[rows]
    before = np.cumsum(counts) - counts
    return np.repeat(starts[rows] - before, counts) + np.arange(int(counts.sum())), counts


def _mapped(path: Path, kind: str) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.empty(0, np.dtype(kind))
    return np.memmap(path, np.dtype(kind), "r").view(np.ndarray)  # still mapped; slices of a memmap are slow


def _starts(counts: NDArray[Any]) -> Ints:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
