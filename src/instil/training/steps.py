"""Which rows each optimizer step trains: cut by their tokens as if nothing were shared, so sharing changes no step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from instil.packing import PackedBatch, TokenTree, deal, pack, plan
from instil.packing.packs import Sharing
from instil.packing.tree import Ints

_STEPS_AN_EPOCH = 32
_LEAST_TOKENS, _MOST_TOKENS = 2_048, 65_536
_DEALT = 8_192  # rows that begin alike come together up to so many tokens


@dataclass(frozen=True, slots=True)
class Steps:
    """The optimizer steps of a run over some rows.

    Args:
        trees: One for each row.
        tokens_per_step: About the most tokens of a step's rows, as if nothing were shared: steps are equal to within
            the longest row.
        tokens_per_batch: The most tokens of a micro-batch, each shared one once.
        share_prefixes: Whether rows that begin alike share their prefix.
        reason: What that was resolved from.
        seed: Decides the order.
        per_epoch: The steps of an epoch.
        records: (N,) the rows that are trained; None for all.
        processes: Those that share the micro-batches of a step, which are made small enough for all to have some.
    """

    trees: Sequence[TokenTree]
    tokens_per_step: int
    tokens_per_batch: int
    share_prefixes: Literal["on", "off"]
    reason: str
    seed: int
    per_epoch: int
    records: Ints | None = None
    processes: int = 1

    @classmethod
    def of(
        cls,
        trees: Sequence[TokenTree],
        tokens_per_step: int | None,
        tokens_per_batch: int,
        share_prefixes: Sharing,
        seed: int,
        records: Ints | None = None,
        processes: int = 1,
    ) -> Steps:
        """Resolve what is left open from the counts of the rows."""
        report = plan(trees, tokens_per_batch, seed=seed, share_prefixes=share_prefixes, records=records).report
        size = tokens_per_step or min(max(report.unshared // _STEPS_AN_EPOCH, _LEAST_TOKENS), _MOST_TOKENS)
        count = _count(_ends(trees, _order(trees, size, seed, 0, records)), size)
        return cls(trees, size, tokens_per_batch, report.share_prefixes, report.reason, seed, count, records, processes)

    def rows(self, epoch: int) -> list[Ints]:
        """The rows of each step of an epoch, all of them once."""
        order = _order(self.trees, self.tokens_per_step, self.seed, epoch, self.records)
        return np.split(order, _cuts(_ends(self.trees, order), self.per_epoch))

    def batches(self, rows: Ints, number: int) -> Sequence[PackedBatch]:
        """The micro-batches of one step.

        Args:
            rows: The step's rows.
            number: The step's, which with the seed decides how they are packed.
        """
        return pack(
            self.trees,
            self._budget(rows),
            seed=self.seed,
            epoch=number,
            share_prefixes=self.share_prefixes,
            records=rows,
        )

    def after(self, done: int) -> Iterator[tuple[int, Sequence[PackedBatch]]]:
        """Step after step, epoch after epoch, without end: the number of each, from 1, and its micro-batches.

        Args:
            done: The steps that were taken already.
        """
        for epoch in itertools.count(done // self.per_epoch):
            for number, rows in enumerate(self.rows(epoch), epoch * self.per_epoch):
                if number >= done:
                    yield number + 1, self.batches(rows, number)

    @property
    def tokens(self) -> int:
        """The tokens of an epoch, as if nothing were shared."""
        sizes = _unshared(self.trees)
        return int((sizes if self.records is None else sizes[self.records]).sum())

    def _budget(self, rows: Ints) -> int:
        """The most tokens of a micro-batch of a step, so that each process has about as much to do."""
        if self.processes == 1:
            return self.tokens_per_batch
        tokens, largest = int(_unshared(self.trees)[rows].sum()), int(sizes(self.trees)[rows].max())
        batches = self.processes * -(-tokens // (self.processes * self.tokens_per_batch))
        return min(self.tokens_per_batch, max(largest, tokens // batches + tokens // batches // 32))


def _order(trees: Sequence[TokenTree], tokens_per_step: int, seed: int, epoch: int, records: Ints | None) -> Ints:
    """The order of an epoch's rows; how they are split in micro-batches has no part in it."""
    longest = int(longest_paths(trees).max(initial=0))
    return deal(trees, max(longest, min(tokens_per_step, _DEALT)), seed=seed, epoch=epoch, records=records)


def _ends(trees: Sequence[TokenTree], order: Ints) -> Ints:
    """(N,) the tokens of the rows up to and including each, in an order, as if nothing were shared."""
    return np.cumsum(_unshared(trees)[order], dtype=np.int64)


def longest_paths(trees: Sequence[TokenTree]) -> Ints:
    """(N,) the longest path of each tree."""
    stored: Ints | None = getattr(trees, "longest", None)
    return np.array([tree.longest for tree in trees], np.int64) if stored is None else stored


def sizes(trees: Sequence[TokenTree]) -> Ints:
    """(N,) the tokens of each tree."""
    stored: Ints | None = getattr(trees, "sizes", None)
    return np.array([tree.size for tree in trees], np.int64) if stored is None else stored


def _unshared(trees: Sequence[TokenTree]) -> Ints:
    """(N,) the tokens of each tree's exchanges one by one."""
    stored: Ints | None = getattr(trees, "unshared", None)
    return np.array([tree.unshared for tree in trees], np.int64) if stored is None else stored


def _count(ends: Ints, size: int) -> int:
    """The fewest equal steps of which none is larger than `size`; a little more rather than many more."""
    least = min(max(1, -(-int(ends[-1]) // size)), len(ends))
    for count in range(least, min(least + least // 8 + 2, len(ends) + 1)):
        cuts = [0, *_cuts(ends, count), len(ends)]
        tokens = np.diff(np.concatenate(([0], ends))[cuts])
        if tokens.max() <= size:
            return count
    return least


def _cuts(ends: Ints, count: int) -> Ints:
    """(count - 1,) where rows are cut into `count` parts of about as many tokens, none of them empty."""
    least = np.arange(1, count)
    cuts = np.searchsorted(ends, least * (ends[-1] / count), side="right")
    cuts = np.maximum.accumulate(np.maximum(cuts, least) - least) + least  # each at least a row after the one before
    found: Ints = np.minimum(cuts, len(ends) - least[::-1])
    return found
