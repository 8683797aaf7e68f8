"""Token trees to packed batches: which rows share a batch, planned from counts and first prompts alone.

1. Rows are sorted by the ids they begin with; neighbours then show every shared prefix.
2. Rows whose prefix is worth sharing form groups, and each group is cut into pieces of at most one batch.
3. Pieces are best-fit packed into batches, and the batches come in random order.
4. A batch is built when it is asked for: its trees, merged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from instil.errors import PackingError
from instil.packing.tree import Ids, Ints, PackedBatch, TokenTree, concatenate, merge

Sharing = Literal["auto", "on", "off"]
Name = Callable[[int], str]

WORTH_SHARING = 0.1
"""The part of the tokens that sharing across rows must save for `auto` to turn it on: plain paths attend faster."""

WORTH_GROUPING = 0.02
"""The part of its tokens that a group must save; below it the rows are better dealt out one by one."""

TRUNK_PART = 32
"""A piece holds this many times its trunk: a trunk of about 3 % costs little, and small pieces mix better."""

HELD_BACK = 0.1
"""The shortest part of the rows, which is packed last, into the gaps that the others leave."""

FEWER_BATCHES = 0.005
"""The part of the batches that packing in decreasing order must save to be preferred to random order."""

MOST_UNSHARED = 16
"""A piece holds at most this many times the budget in unshared tokens: a piece is met in one optimizer step, and a long
prompt or many duplicates, which take next to no room, must not fill whole steps. Tool lists of 1,000 tokens with
exchanges of 100 unshare to 9.5 times the batch of 8,192 that they fill."""

SORT_WIDTH = 32
"""The ids that rows are sorted by at a time; the ids after them are read only where these are equal."""

SORT_IDS = 1 << 24
"""The ids held at once while rows are sorted: with more rows than fit at `SORT_WIDTH` ids each, the width shrinks."""

READ_WIDTH = 1024
"""The most ids of a row read at once while a common prefix is followed: as many may be read in vain."""

READ_IDS = 1 << 18
"""The ids read at once: they stay in the processor's cache."""


@runtime_checkable
class TreeStore(Protocol):
    """What a stored collection of trees may offer besides `len` and `[]`, so that planning reads no whole tree."""

    @property
    def sizes(self) -> Ids:
        """(N,) the tokens of each tree."""

    @property
    def longest(self) -> Ids:
        """(N,) the longest path of each tree."""

    @property
    def unshared(self) -> Ids:
        """(N,) the tokens of each tree's exchanges one by one."""

    def first_ids(self, index: int, start: int, stop: int) -> Ids:
        """The ids from `start` to `stop` of a tree's first path (`TokenTree.first_path`), fewer if it is shorter."""


@runtime_checkable
class _BulkStore(Protocol):
    """What a `TreeStore` may offer besides, so that many rows are read in one call."""

    def first_windows(self, indices: Ints, starts: Ints, width: int) -> NDArray[np.int32]:
        """(M, width): the ids of `first_ids` from each start on, -1 beyond the end."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a plan comes to, in tokens.

    Args:
        batches: The number of batches.
        tokens_per_batch: The budget of each.
        tokens: Laid out in all batches, counted from the first path of each row: where rows that share have several
            branches, the batches may come out a little smaller.
        unshared: The exchanges' tokens one by one; `tokens + shared_within + shared_across`.
        shared_within: Saved because exchanges of one row share their prefix.
        shared_across: Saved because rows in one batch share their prefix.
        share_prefixes: Whether rows share, as resolved.
        reason: The counts that it was resolved from.
    """

    batches: int
    tokens_per_batch: int
    tokens: int
    unshared: int
    shared_within: int
    shared_across: int
    share_prefixes: Literal["on", "off"]
    reason: str

    @property
    def fill(self) -> float:
        """The part of the budget that holds tokens, in [0, 1]."""
        return self.tokens / (self.batches * self.tokens_per_batch) if self.batches else 0.0

    def __str__(self) -> str:
        return (
            f"{self.batches:,} batches of {self.tokens_per_batch:,} tokens, {self.fill:.2%} filled: "
            f"{self.tokens:,} tokens laid out of {self.unshared:,}; {self.shared_within:,} shared within rows, "
            f"{self.shared_across:,} across rows (share_prefixes: {self.share_prefixes}; {self.reason})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which rows stand in which batch.

    Args:
        records: (N,) int64, the rows of data, batch after batch.
        offsets: (B + 1,) int64, where each batch begins in `records`.
        parts: For a row too large for one batch, by its place in `records`: the exchanges meant there, ascending.
        report: The counts.
    """

    records: Ints
    offsets: Ints
    parts: dict[int, Ints]
    report: Report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, number: int) -> Ints:
        """(K,) the rows of one batch."""
        return self.records[self.offsets[number] : self.offsets[number + 1]]

    def batch(self, number: int) -> list[tuple[int, Ints | None]]:
        """The rows of one batch, each with the exchanges that stand there (None: all of them)."""
        places = range(int(self.offsets[number]), int(self.offsets[number + 1]))
        return [(int(self.records[place]), self.parts.get(place)) for place in places]


@dataclass(frozen=True, slots=True)
class Packs(Sequence[PackedBatch]):
    """The batches of a plan, each built when it is asked for.

    Args:
        trees: The rows' token trees.
        plan: Which of them stand in which batch.
    """

    trees: Sequence[TokenTree]
    plan: Plan

    @property
    def report(self) -> Report:
        """What the plan comes to."""
        return self.plan.report

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, number: int) -> PackedBatch: ...
    @overload
    def __getitem__(self, number: slice) -> list[PackedBatch]: ...
    def __getitem__(self, number: int | slice) -> PackedBatch | list[PackedBatch]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        together = getattr(self.trees, "concatenated", None)
        if together is not None and self.report.share_prefixes == "off" and not self.plan.parts:
            batch: PackedBatch = together(self.plan.rows(range(len(self))[number]))
            return batch
        rows = []
        for record, part in self.plan.batch(range(len(self))[number]):
            tree = self.trees[record].of_record(record)
            rows.append(tree if part is None else tree.select(part))
        return merge(rows) if self.report.share_prefixes == "on" else concatenate(rows)


def pack(
    trees: Sequence[TokenTree],
    tokens_per_batch: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    share_prefixes: Sharing = "auto",
    records: Ids | None = None,
    name: Name | None = None,
) -> Packs:
    """Pack rows into batches of at most `tokens_per_batch` tokens, each exchange into exactly one.

    Args:
        trees: One tree for each row of data; a `TreeStore` is planned without reading whole trees.
        tokens_per_batch: The most tokens laid out in a batch.
        seed: With `epoch`, decides everything random.
        epoch: Counted from 0; each packs the rows anew.
        share_prefixes: Whether rows that begin alike share their prefix. `auto`: if it saves 10 % of the tokens.
        records: (N,) the indices of the rows to pack, without repeats; None for all.
        name: What to call a row in an error, by its index; None for the trees' own name, or else the index.

    Raises:
        PackingError: Rows whose longest exchange does not fit a batch, all of them named.
    """
    arranged = plan(
        trees,
        tokens_per_batch,
        seed=seed,
        epoch=epoch,
        share_prefixes=share_prefixes,
        records=records,
        name=name,
    )
    return Packs(trees, arranged)


def plan(
    trees: Sequence[TokenTree],
    tokens_per_batch: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    share_prefixes: Sharing = "auto",
    records: Ids | None = None,
    name: Name | None = None,
) -> Plan:
    """What `pack` builds batches from; the arguments and errors are those of `pack`."""
    items = _Items.of(trees, records, tokens_per_batch, _naming(trees, name))
    rng = np.random.default_rng((seed, epoch))
    alike = None if share_prefixes == "off" else _Alike.of(items)
    pieces = _Pieces.one_by_one(items.sizes) if alike is None else _Pieces.of(items, alike, tokens_per_batch, rng)
    resolved, reason = _resolve(share_prefixes, items, pieces, tokens_per_batch)
    if resolved == "off":
        alike, pieces = None, _Pieces.one_by_one(items.sizes)
    bins = _fill(pieces.sizes - pieces.common, tokens_per_batch - pieces.common, rng, pieces.apart)
    batches = int(bins.max(initial=-1)) + 1
    batch = rng.permutation(batches)[bins][pieces.number]  # (N,): the batch of each item
    across = alike.saved(batch) if alike else 0
    tokens = int(items.sizes.sum())
    shuffled = rng.permutation(len(batch))
    order = shuffled[np.argsort(batch[shuffled], kind="stable")]
    unshared = int(items.unshared.sum())
    return Plan(
        items.records[order],
        np.cumsum(np.bincount(batch + 1, minlength=batches + 1)),
        {place: items.parts[item] for place, item in enumerate(order.tolist()) if item in items.parts}
        if items.parts
        else {},
        Report(batches, tokens_per_batch, tokens - across, unshared, unshared - tokens, across, resolved, reason),
    )


def deal(
    trees: Sequence[TokenTree],
    tokens_per_batch: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    records: Ids | None = None,
    name: Name | None = None,
) -> Ints:
    """The order in which an epoch's rows are best met, whether or not they will share their prefixes.

    Rows whose common prefix is worth sharing come together, up to a batch of them and `MOST_UNSHARED` batches' tokens
    unshared, and such pieces and single rows come in random order. Steps cut from this order by unshared tokens hold
    the same rows with sharing and without; each is then packed by itself with `pack(..., records=step)`. Arguments and
    errors are those of `pack`.

    Returns:
        (N,) int64, the indices of the rows.
    """
    items = _Items.of(trees, records, tokens_per_batch, _naming(trees, name))
    rng = np.random.default_rng((seed, epoch))
    pieces = _Pieces.of(items, _Alike.of(items), tokens_per_batch, rng)
    place = rng.permutation(len(pieces.sizes))[pieces.number]
    shuffled = rng.permutation(len(place))
    dealt = items.records[shuffled[np.argsort(place[shuffled], kind="stable")]]
    # A row too large for a batch is several items; it is met where the first of them is.
    return dealt[np.sort(np.unique(dealt, return_index=True)[1])]


def refuse_long(trees: Sequence[TokenTree], tokens_per_batch: int, *, name: Name | None = None) -> None:
    """Raise the error of `pack` if a row's longest exchange does not fit a batch."""
    rows = np.arange(len(trees))
    _refuse_long(rows, _measure(trees, rows)[1], tokens_per_batch, _naming(trees, name))


def _naming(trees: Sequence[TokenTree], name: Name | None) -> Name:
    own: Name = getattr(trees, "name", str)
    return name or own


def _resolve(share_prefixes: Sharing, items: _Items, pieces: _Pieces, budget: int) -> tuple[Literal["on", "off"], str]:
    if share_prefixes != "auto":
        return share_prefixes, "as configured"
    tokens = int(items.sizes.sum())
    copies = len(pieces.sizes) - -(-int(pieces.sizes.sum()) // budget)
    saved = tokens - int(pieces.sizes.sum()) + pieces.common * max(0, copies)
    part = saved / tokens if tokens else 0.0
    reason = f"it saves about {saved:,} of {tokens:,} tokens, {part:.1%}; on from {WORTH_SHARING:.0%}"
    return "on" if part >= WORTH_SHARING else "off", reason


@dataclass(frozen=True, slots=True)
class _Items:
    """What is packed: a row, or a part of one that is too large."""

    records: Ints  # (N,)
    sizes: Ints  # (N,)
    unshared: Ints  # (N,)
    parts: dict[int, Ints]
    windows: Callable[[Ints, Ints, int], NDArray[np.int32]]  # as `_BulkStore.first_windows`

    @classmethod
    def of(cls, trees: Sequence[TokenTree], records: Ids | None, budget: int, name: Name) -> _Items:
        rows = np.arange(len(trees)) if records is None else np.asarray(records, np.int64)
        sizes, longest, unshared = _measure(trees, rows)
        _refuse_long(rows, longest, budget, name)
        whole = (sizes > 0) & (sizes <= budget)
        numbers, counts, alone = (of_row[whole].tolist() for of_row in (rows, sizes, unshared))
        parts: dict[int, Ints] = {}
        heads: dict[int, Ints] = {}
        for record in rows[sizes > budget].tolist():
            for part, size, single in _split(trees[record], budget):
                parts[len(numbers)] = part
                heads[len(numbers)] = trees[record].select(part).first_path
                numbers.append(record)
                counts.append(size)
                alone.append(single)
        records = np.array(numbers, np.int64)
        store = trees if isinstance(trees, TreeStore) else None
        bulk = trees if isinstance(trees, _BulkStore) else None

        def first_ids(item: int, start: int, stop: int) -> Ids:
            if item in heads:
                return heads[item][start:stop]
            return store.first_ids(numbers[item], start, stop) if store else trees[numbers[item]].first_path[start:stop]

        def windows(those: Ints, starts: Ints, width: int) -> NDArray[np.int32]:
            if bulk and those.max(initial=-1) < len(numbers) - len(heads):
                return bulk.first_windows(records[those], starts, width)
            found = np.full((len(those), width), -1, np.int32)
            for row, item, start in zip(found, those.tolist(), starts.tolist(), strict=True):
                ids = first_ids(item, start, start + width)
                row[: len(ids)] = ids
            return found

        return cls(records, np.array(counts, np.int64), np.array(alone, np.int64), parts, windows)


def _measure(trees: Sequence[TokenTree], rows: Ints) -> tuple[Ints, Ints, Ints]:
    """The size, longest path and unshared tokens of some rows, each (N,) int64."""
    if isinstance(trees, TreeStore):
        sizes, longest, unshared = (np.asarray(all_of)[rows] for all_of in (trees.sizes, trees.longest, trees.unshared))
        return sizes.astype(np.int64), longest.astype(np.int64), unshared.astype(np.int64)
    counts = np.empty((3, len(rows)), np.int64)
    for place, row in enumerate(rows.tolist()):
        tree = trees[row]
        counts[:, place] = tree.size if tree.exchanges == 1 else (tree.size, tree.longest, tree.unshared)
    return counts[0], counts[1], counts[2]


def _refuse_long(rows: Ints, longest: Ints, budget: int, name: Name) -> None:
    over = np.flatnonzero(longest > budget)
    if not len(over):
        return
    found = [f"\n  {name(int(rows[at]))}: {int(longest[at]):,} tokens" for at in over]
    raise PackingError(
        f"{len(found):,} {'row' if len(found) == 1 else 'rows'} of {len(rows):,} cannot be packed: "
        f"the longest exchange exceeds the {budget:,} tokens of a batch{''.join(found)}",
        f"Raise tokens_per_batch to {int(longest.max()):,} or more, or lower max_length to {budget:,} or less.",
    )


def _split(tree: TokenTree, budget: int) -> list[tuple[Ints, int, int]]:
    """Cut a tree into parts within the budget: the exchanges of each, ascending, its tokens and its unshared tokens.

    Exchanges are taken in the order of the layout: what one shares with any before it, it shares with the last.
    """
    ends = tree.target_rows[tree.last_targets]  # (E,)
    held = np.zeros(tree.size, np.bool_)
    parts: list[tuple[list[int], int, int]] = []
    for exchange in np.argsort(ends, kind="stable").tolist():
        path = tree.path(int(ends[exchange]))
        added = int(np.count_nonzero(~held[path]))
        if parts and parts[-1][1] + added <= budget:
            part, size, unshared = parts.pop()
            parts.append(([*part, exchange], size + added, unshared + len(path)))
        else:
            parts.append(([exchange], len(path), len(path)))
        held[path] = True
    return [(np.sort(np.array(part, np.int64)), size, unshared) for part, size, unshared in parts]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Items sorted by the ids they begin with, and what neighbours share."""

    order: Ints  # (N,)
    shared: Ints  # (N - 1,): the common prefix of each item and the next, in tokens

    @classmethod
    def of(cls, items: _Items) -> _Alike:
        return cls(*_sort(items))

    def saved(self, batch: Ints) -> int:
        """The tokens that items in one batch share, as laid out by `merge`.

        A prefix tree holds the tokens of its sorted rows less the common prefix of each with the next. That of two
        rows apart is the least between them, read from a sparse table (Bender and Farach-Colton, 2000).

        Args:
            batch: (N,) the batch of each item.
        """
        if len(batch) < 2:
            return 0
        by_batch = np.argsort(batch[self.order], kind="stable")  # (N,): places in `order`
        same = np.diff(batch[self.order][by_batch]) == 0
        left, right = by_batch[:-1][same], by_batch[1:][same]
        power = np.frexp(right - left)[1] - 1  # floor(log2)
        total, least = 0, self.shared
        for level in range(int(power.max(initial=-1)) + 1):
            here = power == level
            total += int(np.minimum(least[left[here]], least[right[here] - (1 << level)]).sum())
            least = np.minimum(least[: -(1 << level)], least[1 << level :])
        return total


def _sort(items: _Items) -> tuple[Ints, Ints]:
    """Sort items by the ids they begin with.

    All runs of equals are sorted on by their next few ids at a time; what a run has in common is passed over first.

    Returns:
        The items in order, (N,), and the common prefix of each with the next, (N - 1,).
    """
    order = np.arange(len(items.sizes))
    shared = np.zeros(max(0, len(order) - 1), np.int64)
    places = order.copy()  # (A,) ascending: those of the items that agree with a neighbour as far as has been read
    run = depth = np.zeros(len(order), np.int64)  # (A,): the neighbours that agree, and up to where
    while len(places):
        width = max(1, min(SORT_WIDTH, SORT_IDS // len(places)))
        keys = np.empty((len(places), 1 + width), ">u4")  # big-endian, so that bytes compare as ids do; 0 is the end
        keys[:, 0] = run
        for some in _blocks(len(places), width):
            keys[some, 1:] = items.windows(order[places[some]], depth[some], width) + 1
        ranks = np.argsort(keys.view(f"S{4 * (1 + width)}")[:, 0], kind="stable")
        order[places] = order[places][ranks]
        keys = keys[ranks]
        same = run[1:] == run[:-1]
        agreed = _agreed(keys[:-1, 1:], keys[1:, 1:], 0)
        del keys
        shared[places[:-1][same]] = (depth[:-1] + agreed)[same]
        equal = same & (agreed == width)
        tied = np.append(equal, False) | np.append(False, equal)
        run = np.cumsum(np.append(True, ~equal))[tied]
        places = places[tied]
        depth = depth[tied] + width
        _follow(items, order[places], run, depth)
        within = places[:-1][run[1:] == run[:-1]]
        shared[within] = depth[:-1][run[1:] == run[:-1]]
    return order, shared


def _follow(items: _Items, those: Ints, run: Ints, depth: Ints) -> None:
    """Raise the depth of each run to where its items part.

    Args:
        items: All items.
        those: (A,) the items of the runs.
        run: (A,) ascending, the run of each.
        depth: (A,) up to where its run is known to agree; raised in place.
    """
    width = 2 * SORT_WIDTH
    going = np.arange(len(those))
    while len(going):
        here, starts = those[going], depth[going]
        agreed = np.full(len(going), width)
        for some in _blocks(len(going), width):
            # Each block begins with the last item of the one before it.
            some = slice(max(0, some.start - 1), some.stop)
            ids = items.windows(here[some], starts[some], width)
            agreed[some][:-1] = _agreed(ids[:-1], ids[1:], -1)
        new = np.diff(run[going], prepend=-1, append=-1) != 0
        agreed[new[1:]] = width  # the last of a run has no next
        firsts = np.flatnonzero(new[:-1])
        least = np.repeat(np.minimum.reduceat(agreed, firsts), np.diff(firsts, append=len(going)))
        depth[going] += least
        going = going[least == width]
        width = min(2 * width, READ_WIDTH)


def _blocks(count: int, width: int) -> list[slice]:
    step = max(1, READ_IDS // width)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _agreed(one: NDArray[Any], other: NDArray[Any], end: int) -> Ints:
    """(M,): how many ids two rows begin with that are the same and not the end."""
    differs = one != other
    differs |= one == end
    first = differs.argmax(axis=1)
    found: Ints = np.where(differs[np.arange(len(first)), first], first, one.shape[1])
    return found


@dataclass(slots=True)
class _Interval:
    """Neighbours in sorted order that share a prefix: an interval of the tree of common prefixes."""

    prefix: int
    first: int
    saved: int = 0
    groups: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)
    loose_tokens: int = 0
    loose_unshared: int = 0

    def absorb(self, child: _Interval) -> None:
        self.saved += child.saved
        self.loose_tokens += child.loose_tokens
        self.loose_unshared += child.loose_unshared
        # The shorter list is the one that is copied, so that deep nesting stays cheap.
        if len(self.groups) < len(child.groups):
            self.groups, child.groups = child.groups, self.groups
        if len(self.loose) < len(child.loose):
            self.loose, child.loose = child.loose, self.loose
        self.groups += child.groups
        self.loose += child.loose


def _groups(sizes: Ints, unshared: Ints, shared: Ints, budget: int, most: int) -> list[tuple[int, Sequence[int]]]:
    """The groups of sorted items that save most: for each its prefix and its places in the order.

    From the longest prefixes up, the items under one either form one group, or keep the groups found among them and
    put the rest together. The intervals are those of an enhanced suffix array (Abouelhoda, Kurtz and Ohlebusch, 2004).

    Args:
        sizes: (N,) tokens, in sorted order.
        unshared: (N,) tokens of the exchanges one by one.
        shared: (N - 1,) the common prefix of each with the next.
        budget: The tokens of a batch.
        most: The unshared tokens of a piece.
    """
    before, before_unshared = (np.cumsum(np.append(0, counts)).tolist() for counts in (sizes, unshared))

    def saving(prefix: int, count: int, tokens: int, single: int) -> int:
        room = max(1, min(budget - prefix, TRUNK_PART * prefix))
        pieces = max(1, -(-(tokens - prefix * count) // room), -(-single // most))
        saved = prefix * (count - pieces)
        return saved if saved > WORTH_GROUPING * tokens else 0

    def close(interval: _Interval, stop: int) -> None:
        first = interval.first
        tokens, single = before[stop] - before[first], before_unshared[stop] - before_unshared[first]
        together = saving(interval.prefix, stop - first, tokens, single)
        rest = saving(interval.prefix, len(interval.loose), interval.loose_tokens, interval.loose_unshared)
        if together and together >= interval.saved + rest:
            interval.saved, interval.groups = together, [(interval.prefix, range(first, stop))]
        elif rest:
            interval.saved += rest
            interval.groups.append((interval.prefix, interval.loose))
        else:
            return
        interval.loose, interval.loose_tokens, interval.loose_unshared = [], 0, 0

    open_: list[_Interval] = [_Interval(0, 0)]
    counts = zip(sizes.tolist(), unshared.tolist(), [*shared.tolist(), 0], strict=True)
    for place, (size, single, prefix) in enumerate(counts):
        if prefix > open_[-1].prefix:
            open_.append(_Interval(prefix, place))
        open_[-1].loose.append(place)
        open_[-1].loose_tokens += size
        open_[-1].loose_unshared += single
        while open_[-1].prefix > prefix:
            closed = open_.pop()
            close(closed, place + 1)
            if open_[-1].prefix < prefix:
                open_.append(_Interval(prefix, closed.first))
            open_[-1].absorb(closed)
    return open_[0].groups


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Items put together because they share a prefix; most often one item each.

    `common` is the prefix that all items share: a batch holds it once, so it counts once against the budget.
    """

    number: Ints  # (N,): the piece of each item
    sizes: Ints  # (M,): tokens laid out
    apart: Ints  # (M,): pieces of the same number keep to different batches, those of -1 go anywhere
    common: int

    @classmethod
    def one_by_one(cls, sizes: Ints) -> _Pieces:
        return cls(np.arange(len(sizes)), sizes, np.full(len(sizes), -1), 0)

    @classmethod
    def of(cls, items: _Items, alike: _Alike, budget: int, rng: np.random.Generator) -> _Pieces:
        if len(items.sizes) < 2:
            return cls.one_by_one(items.sizes)
        common, most = int(alike.shared.min()), MOST_UNSHARED * budget
        sizes, budget = items.sizes - common, budget - common
        net = sizes.copy()
        number = np.full(len(sizes), -1)
        prefixes: list[int] = []
        family: list[int] = []
        found = _groups(sizes[alike.order], items.unshared[alike.order], alike.shared - common, budget, most)
        for which, (prefix, places) in enumerate(found):
            group = alike.order[np.asarray(places)]
            net[group] -= prefix
            room = max(1, min(budget - prefix, max(TRUNK_PART * prefix, int(net[group].max()))))
            # Both bounds as one: each item takes the larger of its parts of them, in parts of room * most.
            taken = np.maximum(net[group] * most, np.minimum(items.unshared[group], most) * room)
            bins = _fill(taken, room * most, rng)
            number[group] = len(prefixes) + bins
            pieces = int(bins.max()) + 1
            prefixes += [prefix] * pieces
            family += [which] * pieces
        alone = np.flatnonzero(number < 0)
        number[alone] = len(prefixes) + np.arange(len(alone))
        count = len(prefixes) + len(alone)
        laid_out, unshared = (np.bincount(number, each, count).astype(np.int64) for each in (net, items.unshared))
        laid_out[: len(prefixes)] += np.array(prefixes, np.int64)
        apart = np.full(count, -1)
        apart[: len(prefixes)] = np.where(unshared[: len(prefixes)] > most // 2, family, -1)
        return cls(number, laid_out + common, apart, common)


def _fill(sizes: Ints, capacity: int, rng: np.random.Generator, apart: Ints | None = None) -> Ints:
    """Pack sizes into as few bins as a good heuristic needs; the bin of each, (N,) int64.

    Those with the same number in `apart`, unless it is -1, come into different bins.

    Best fit in decreasing order would put rows of one length together. In random order, the shortest last, it fills
    the bins as well for most data and mixes the lengths; decreasing order is taken where it needs clearly fewer bins.
    """
    shuffled = rng.permutation(len(sizes))
    decreasing = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    cut = len(sizes) - int(HELD_BACK * len(sizes))
    held_back = np.zeros(len(sizes), np.bool_)
    held_back[decreasing[cut:]] = True
    mixed = np.concatenate((shuffled[~held_back[shuffled]], decreasing[cut:]))
    apart = np.full(len(sizes), -1) if apart is None else apart
    random, ordered = (_best_fit(sizes, order, capacity, apart) for order in (mixed, decreasing))
    most = (1 + FEWER_BATCHES) * (ordered.max(initial=-1) + 1)
    return random if random.max(initial=-1) + 1 <= most else ordered


def _best_fit(sizes: Ints, order: NDArray[np.intp], capacity: int, apart: Ints) -> Ints:
    """Put each size, in `order`, into the fullest bin that has room for it; the bin of each, (N,) int64.

    Best fit as analysed by Johnson et al. (1974). Bins of equal space stand in one stack, so that an item costs one
    search among the distinct spaces.
    """
    bins = np.empty(len(sizes), np.int64)
    spaces: list[int] = []
    stacks: dict[int, list[int]] = {}
    held: set[tuple[int, int]] = set()
    count = 0
    for item, size, family in zip(order.tolist(), sizes[order].tolist(), apart[order].tolist(), strict=True):
        at = bisect_left(spaces, size)
        while held and at < len(spaces) and (stacks[spaces[at]][-1], family) in held:
            at += 1
        if at == len(spaces):
            chosen, space = count, capacity
            count += 1
        else:
            space = spaces[at]
            chosen = stacks[space].pop()
            if not stacks[space]:
                del spaces[at], stacks[space]
        bins[item] = chosen
        if family >= 0:
            held.add((chosen, family))
        space -= size
        if space not in stacks:
            insort(spaces, space)
            stacks[space] = []
        stacks[space].append(chosen)
    return bins
