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
from typing import Literal, Protocol, overload, runtime_checkable

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

FIRST_WIDTH = 32
"""The ids compared at first when rows are sorted; the ids after them are read only where these are equal."""

SORT_IDS = 1 << 25
"""The ids held at once while rows are sorted."""


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
    bins = _fill(pieces.sizes - pieces.common, tokens_per_batch - pieces.common, rng)
    batches = int(bins.max(initial=-1)) + 1
    batch = rng.permutation(batches)[bins][pieces.number]  # (N,): the batch of each item
    across = alike.saved(batch) if alike else 0
    tokens = int(items.sizes.sum())
    shuffled = rng.permutation(len(batch))
    order = shuffled[np.argsort(batch[shuffled], kind="stable")]
    within = items.unshared - tokens
    return Plan(
        items.records[order],
        np.cumsum(np.bincount(batch + 1, minlength=batches + 1)),
        {place: items.parts[item] for place, item in enumerate(order.tolist()) if item in items.parts}
        if items.parts
        else {},
        Report(batches, tokens_per_batch, tokens - across, items.unshared, within, across, resolved, reason),
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

    Rows whose common prefix is worth sharing come together, up to a batch of them, and such pieces and single rows
    come in random order. Steps cut from this order by unshared tokens hold the same rows with sharing and without;
    each is then packed by itself with `pack(..., records=step)`. Arguments and errors are those of `pack`.

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
    parts: dict[int, Ints]
    unshared: int
    first_ids: Callable[[int, int, int], Ids]

    @classmethod
    def of(cls, trees: Sequence[TokenTree], records: Ids | None, budget: int, name: Name) -> _Items:
        rows = np.arange(len(trees)) if records is None else np.asarray(records, np.int64)
        sizes, longest, unshared = _measure(trees, rows)
        _refuse_long(rows, longest, budget, name)
        whole = (sizes > 0) & (sizes <= budget)
        numbers, counts = rows[whole].tolist(), sizes[whole].tolist()
        parts: dict[int, Ints] = {}
        heads: dict[int, Ints] = {}
        for record in rows[sizes > budget].tolist():
            for part, size in _split(trees[record], budget):
                parts[len(numbers)] = part
                heads[len(numbers)] = trees[record].select(part).first_path
                numbers.append(record)
                counts.append(size)
        store = trees if isinstance(trees, TreeStore) else None

        def first_ids(item: int, start: int, stop: int) -> Ids:
            if item in heads:
                return heads[item][start:stop]
            return store.first_ids(numbers[item], start, stop) if store else trees[numbers[item]].first_path[start:stop]

        return cls(np.array(numbers, np.int64), np.array(counts, np.int64), parts, int(unshared.sum()), first_ids)


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


def _split(tree: TokenTree, budget: int) -> list[tuple[Ints, int]]:
    """Cut a tree into parts within the budget: the exchanges of each, ascending, and its tokens.

    Exchanges are taken in the order of the layout: what one shares with any before it, it shares with the last.
    """
    ends = tree.target_rows[tree.last_targets]  # (E,)
    held = np.zeros(tree.size, np.bool_)
    parts: list[tuple[list[int], int]] = []
    for exchange in np.argsort(ends, kind="stable").tolist():
        path = tree.path(int(ends[exchange]))
        added = int(np.count_nonzero(~held[path]))
        if parts and parts[-1][1] + added <= budget:
            part, size = parts.pop()
            parts.append(([*part, exchange], size + added))
        else:
            parts.append(([exchange], len(path)))
        held[path] = True
    return [(np.sort(np.array(part, np.int64)), size) for part, size in parts]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Items sorted by the ids they begin with, and what neighbours share."""

    order: Ints  # (N,)
    shared: Ints  # (N - 1,): the common prefix of each item and the next, in tokens

    @classmethod
    def of(cls, items: _Items) -> _Alike:
        return cls(*_sort(items.first_ids, np.arange(len(items.sizes)), 0, FIRST_WIDTH))

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


def _sort(first_ids: Callable[[int, int, int], Ids], items: Ints, start: int, width: int) -> tuple[Ints, Ints]:
    """Sort items that agree up to `start` by the ids from there on, `width` at a time.

    Returns:
        The items in order, (N,), and the common prefix of each with the next, (N - 1,).
    """
    width = min(width, max(FIRST_WIDTH, SORT_IDS // max(1, len(items))))
    heads = [first_ids(item, start, start + width) for item in items.tolist()]
    keys = np.zeros((len(items), width), ">u4")  # big-endian, so that bytes compare as ids do; 0 is the end
    if heads:
        keys[np.arange(width) < np.array([len(head) for head in heads])[:, None]] = np.concatenate(heads) + 1
    order = np.argsort(keys.view(f"S{4 * width}")[:, 0], kind="stable")
    items, keys = items[order], keys[order]
    differs = keys[1:] != keys[:-1]
    differs |= keys[1:] == 0
    first = differs.argmax(axis=1)  # (N - 1,)
    equal = ~differs[np.arange(len(first)), first]
    shared = start + np.where(equal, width, first)
    del heads, keys, differs
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        run = slice(begin, end + 1)
        items[run], shared[begin:end] = _sort(first_ids, items[run], start + width, 2 * width)
    return items, shared


@dataclass(slots=True)
class _Interval:
    """Neighbours in sorted order that share a prefix: an interval of the tree of common prefixes."""

    prefix: int
    first: int
    saved: int = 0
    groups: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)
    loose_tokens: int = 0

    def absorb(self, child: _Interval) -> None:
        self.saved += child.saved
        self.loose_tokens += child.loose_tokens
        # The shorter list is the one that is copied, so that deep nesting stays cheap.
        if len(self.groups) < len(child.groups):
            self.groups, child.groups = child.groups, self.groups
        if len(self.loose) < len(child.loose):
            self.loose, child.loose = child.loose, self.loose
        self.groups += child.groups
        self.loose += child.loose


def _groups(sizes: Ints, shared: Ints, budget: int) -> list[tuple[int, Sequence[int]]]:
    """The groups of sorted items that save most: for each its prefix and its places in the order.

    From the longest prefixes up, the items under one either form one group, or keep the groups found among them and
    put the rest together. The intervals are those of an enhanced suffix array (Abouelhoda, Kurtz and Ohlebusch, 2004).

    Args:
        sizes: (N,) tokens, in sorted order.
        shared: (N - 1,) the common prefix of each with the next.
        budget: The tokens of a batch.
    """
    before = np.cumsum(np.concatenate(([0], sizes))).tolist()

    def saving(prefix: int, count: int, tokens: int) -> int:
        room = max(1, min(budget - prefix, TRUNK_PART * prefix))
        pieces = max(1, -(-(tokens - prefix * count) // room))
        saved = prefix * (count - pieces)
        return saved if saved > WORTH_GROUPING * tokens else 0

    def close(interval: _Interval, stop: int) -> None:
        together = saving(interval.prefix, stop - interval.first, before[stop] - before[interval.first])
        rest = saving(interval.prefix, len(interval.loose), interval.loose_tokens)
        if together and together >= interval.saved + rest:
            interval.saved, interval.groups = together, [(interval.prefix, range(interval.first, stop))]
        elif rest:
            interval.saved += rest
            interval.groups.append((interval.prefix, interval.loose))
        else:
            return
        interval.loose, interval.loose_tokens = [], 0

    open_: list[_Interval] = [_Interval(0, 0)]
    for place, (size, prefix) in enumerate(zip(sizes.tolist(), [*shared.tolist(), 0], strict=True)):
        if prefix > open_[-1].prefix:
            open_.append(_Interval(prefix, place))
        open_[-1].loose.append(place)
        open_[-1].loose_tokens += size
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
    common: int

    @classmethod
    def one_by_one(cls, sizes: Ints) -> _Pieces:
        return cls(np.arange(len(sizes)), sizes, 0)

    @classmethod
    def of(cls, items: _Items, alike: _Alike, budget: int, rng: np.random.Generator) -> _Pieces:
        if len(items.sizes) < 2:
            return cls.one_by_one(items.sizes)
        common = int(alike.shared.min())
        sizes, budget = items.sizes - common, budget - common
        net = sizes.copy()
        number = np.full(len(sizes), -1)
        prefixes: list[int] = []
        for prefix, places in _groups(sizes[alike.order], alike.shared - common, budget):
            group = alike.order[np.asarray(places)]
            net[group] -= prefix
            room = min(budget - prefix, max(TRUNK_PART * prefix, int(net[group].max())))
            bins = _fill(net[group], room, rng)
            number[group] = len(prefixes) + bins
            prefixes += [prefix] * (int(bins.max()) + 1)
        alone = np.flatnonzero(number < 0)
        number[alone] = len(prefixes) + np.arange(len(alone))
        laid_out = np.bincount(number, net, len(prefixes) + len(alone)).astype(np.int64)
        laid_out[: len(prefixes)] += np.array(prefixes, np.int64)
        return cls(number, laid_out + common, common)


def _fill(sizes: Ints, capacity: int, rng: np.random.Generator) -> Ints:
    """Pack sizes into as few bins as a good heuristic needs; the bin of each, (N,) int64.

    Best fit in decreasing order would put rows of one length together. In random order, the shortest last, it fills
    the bins as well for most data and mixes the lengths; decreasing order is taken where it needs clearly fewer bins.
    """
    shuffled = rng.permutation(len(sizes))
    decreasing = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    cut = len(sizes) - int(HELD_BACK * len(sizes))
    held_back = np.zeros(len(sizes), np.bool_)
    held_back[decreasing[cut:]] = True
    mixed = np.concatenate((shuffled[~held_back[shuffled]], decreasing[cut:]))
    random, ordered = _best_fit(sizes, mixed, capacity), _best_fit(sizes, decreasing, capacity)
    most = (1 + FEWER_BATCHES) * (ordered.max(initial=-1) + 1)
    return random if random.max(initial=-1) + 1 <= most else ordered


def _best_fit(sizes: Ints, order: NDArray[np.intp], capacity: int) -> Ints:
    """Put each size, in `order`, into the fullest bin that has room for it; the bin of each, (N,) int64.

    Best fit as analysed by Johnson et al. (1974). Bins of equal space stand in one stack, so that an item costs one
    search among the distinct spaces.
    """
    bins = np.empty(len(sizes), np.int64)
    spaces: list[int] = []
    stacks: dict[int, list[int]] = {}
    count = 0
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(spaces, size)
        if at == len(spaces):
            chosen, space = count, capacity
            count += 1
        else:
            space = spaces[at]
            chosen = stacks[space].pop()
            if not stacks[space]:
                del spaces[at], stacks[space]
        bins[item] = chosen
        space -= size
        if space not in stacks:
            insort(spaces, space)
            stacks[space] = []
        stacks[space].append(chosen)
    return bins
