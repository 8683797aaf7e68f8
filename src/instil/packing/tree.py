"""Exchanges to token trees: what begins alike is held once, and a batch is a forest of such trees.

A forest is laid out depth first in one row of `T` tokens. Token `q` attends to token `k` if and only if
`k <= q < subtree_end[k]`: that one line is causality, isolation of packed rows and prefix sharing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from instil.errors import PackingError

if TYPE_CHECKING:
    from instil.prompt.exchange import Exchange

LABELS = ("", "chosen", "rejected", "good", "bad", "more", "other")
"""What an exchange is to an objective. `more`: a later turn of the answer that the exchange before it begins. `other`:
the answer of another row, behind this row's prompt.
"""

_KINDS: dict[str, type[np.generic]] = {"target_weights": np.float32, "exchange_reference": np.float64}
"""The arrays of a forest that hold no integers."""

Ints: TypeAlias = NDArray[np.int64]
Ids: TypeAlias = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """A forest of tokens and its targets: the tree of one record, or a whole batch.

    Every exchange is a path from a root: its prompt and completion less the last token, which nothing follows.
    Targets stand in the order of the exchanges, and within one in the order of its tokens; the last target of an
    exchange is always its last token, whatever its weight, so that the exchange can be read back.

    Args:
        input_ids: (T,) int64, the tokens, each shared one once.
        position_ids: (T,) int64, the depth in the tree, counted from 0.
        subtree_end: (T,) int64, the index after the last descendant.
        target_rows: (S,) int64, the row whose hidden state predicts the target.
        target_ids: (S,) int64, the token to predict.
        target_weights: (S,) float32, its weight in the loss.
        target_exchange: (S,) int64, ascending, the number of the exchange in this forest.
        exchange_prompt: (E,) int64, the tokens of the exchange's prompt.
        exchange_record: (E,) int64, the row of data that the exchange comes from.
        exchange_label: (E,) int64, its place in LABELS: what the objective is to make of it.
        exchange_reference: (E,) float64, the log-probability of its targets, each times its weight, under the model
            that training is to stay near, in nats; NaN where it is not known.
    """

    input_ids: Ints
    position_ids: Ints
    subtree_end: Ints
    target_rows: Ints
    target_ids: Ints
    target_weights: NDArray[np.float32]
    target_exchange: Ints
    exchange_prompt: Ints
    exchange_record: Ints
    exchange_label: Ints
    exchange_reference: NDArray[np.float64]

    @classmethod
    def from_exchanges(cls, exchanges: Sequence[Exchange], *, record: int = 0) -> TokenTree:
        """The tree of one record's exchanges, numbered as they are given.

        Every token of weight above 0 becomes a target, except a token that nothing precedes. Children stand in the
        order in which the exchanges bring them.

        Args:
            exchanges: What the record teaches.
            record: The index of the row of data.

        Raises:
            PackingError: An exchange has no completion, or fewer than two tokens in all.
        """
        flat = paths(exchanges, [record] * len(exchanges))
        return flat if len(exchanges) == 1 else merge([flat])

    @property
    def size(self) -> int:
        """T, the tokens laid out."""
        return len(self.input_ids)

    @property
    def exchanges(self) -> int:
        """E, the exchanges."""
        return len(self.exchange_prompt)

    @property
    def trained(self) -> int:
        """The targets of weight above 0, less those of other rows' answers."""
        own = self.exchange_label[self.target_exchange] != LABELS.index("other")
        return int(np.count_nonzero(self.target_weights[own]))

    @property
    def last_targets(self) -> Ints:
        """(E,) int64: the index among the targets of each exchange's last token."""
        return np.searchsorted(self.target_exchange, np.arange(self.exchanges), side="right") - 1

    @property
    def path_lengths(self) -> Ints:
        """(E,) int64: the input tokens of each exchange by itself."""
        return self.position_ids[self.target_rows[self.last_targets]] + 1

    @property
    def longest(self) -> int:
        """The tokens of the longest path; 0 without exchanges."""
        if self.exchanges == 1:
            return self.size
        return int(self.position_ids.max(initial=-1)) + 1

    @property
    def unshared(self) -> int:
        """The tokens that the exchanges would take one by one."""
        if self.exchanges == 1:
            return self.size
        return int(self.path_lengths.sum())

    @property
    def first_path(self) -> Ints:
        """(L,) int64: the ids from the first root to the first leaf."""
        if self.exchanges == 1:
            return self.input_ids
        leaves = self.subtree_end == np.arange(1, self.size + 1)  # (T,)
        return self.input_ids[: int(leaves.argmax()) + 1 if self.size else 0]

    def path(self, row: int) -> Ints:
        """(L,) int64: the rows that the token at `row` attends to, itself included."""
        return np.flatnonzero(self.subtree_end[: row + 1] > row)

    def select(self, exchanges: Ids) -> TokenTree:
        """The forest of some of the exchanges.

        Args:
            exchanges: (K,) the numbers to keep, ascending.
        """
        chosen = np.zeros(self.exchanges, np.bool_)
        chosen[exchanges] = True
        ends = np.zeros(self.size + 1, np.int64)
        ends[self.target_rows[self.last_targets][chosen] + 1] = 1
        ends = ends.cumsum()  # (T + 1,): chosen paths that end before each row
        kept = ends[self.subtree_end] > ends[:-1]  # (T,): a chosen path ends in the row's subtree
        before = np.concatenate(([0], kept.cumsum()))  # (T + 1,): kept rows before each row
        targets = chosen[self.target_exchange]
        return TokenTree(
            self.input_ids[kept],
            self.position_ids[kept],
            before[self.subtree_end[kept]],
            before[self.target_rows[targets]],
            self.target_ids[targets],
            self.target_weights[targets],
            (chosen.cumsum() - 1)[self.target_exchange[targets]],
            self.exchange_prompt[chosen],
            self.exchange_record[chosen],
            self.exchange_label[chosen],
            self.exchange_reference[chosen],
        )

    def of_record(self, record: int) -> TokenTree:
        """The same tree under another row of data."""
        return replace(self, exchange_record=np.full(self.exchanges, record))

    def with_reference(self, reference: NDArray[np.float64]) -> TokenTree:
        """The same tree with what a reference model makes of its exchanges.

        Args:
            reference: (E,), as `exchange_reference`.
        """
        return replace(self, exchange_reference=reference)


PackedBatch: TypeAlias = TokenTree
"""A batch is a forest like any other; the name says that its rows of data are packed together."""


class Expanded(NamedTuple):
    """One exchange read back from a forest.

    Args:
        record: The row of data.
        label: One of LABELS.
        prompt_ids: (P,) int64.
        prompt_weights: (P,) float32, 0 where the token is no target.
        completion_ids: (C,) int64.
        completion_weights: (C,) float32.
    """

    record: int
    label: str
    prompt_ids: Ints
    prompt_weights: NDArray[np.float32]
    completion_ids: Ints
    completion_weights: NDArray[np.float32]


def expand(batch: TokenTree) -> Iterator[Expanded]:
    """The exchanges of a forest, one by one: the inverse of building it, up to tokens that cannot be trained."""
    last = batch.last_targets  # (E,)
    starts = np.concatenate(([0], last + 1))  # (E + 1,): where each exchange's targets begin
    for number, prompt in enumerate(batch.exchange_prompt.tolist()):
        path = batch.path(int(batch.target_rows[last[number]]))  # (L,)
        ids = np.append(batch.input_ids[path], batch.target_ids[last[number]])  # (L + 1,)
        weights = np.zeros(len(ids), np.float32)
        targets = slice(starts[number], starts[number + 1])
        weights[batch.position_ids[batch.target_rows[targets]] + 1] = batch.target_weights[targets]
        record = int(batch.exchange_record[number])
        label = LABELS[int(batch.exchange_label[number])]
        yield Expanded(record, label, ids[:prompt], weights[:prompt], ids[prompt:], weights[prompt:])


def depths(subtree_end: Ints) -> Ints:
    """The depth of every row of a forest: the rows before it less those whose subtree has ended.

    Args:
        subtree_end: (T,) int64.

    Returns:
        (T,) int64, counted from 0.
    """
    size = len(subtree_end)
    ended: Ints = np.bincount(subtree_end, minlength=size).cumsum()[:size]
    return np.arange(size) - ended


def paths(exchanges: Sequence[Exchange], records: Sequence[int]) -> TokenTree:
    """The forest of exchanges in which nothing is shared: each is a path by itself.

    Args:
        exchanges: (E,) what the records teach.
        records: (E,) the row of data that each comes from.

    Raises:
        PackingError: An exchange has no completion, or fewer than two tokens in all.
    """
    for number, exchange in enumerate(exchanges):
        if not len(exchange.completion_ids) or len(exchange) < 2:
            raise PackingError(
                f"exchange {number} of record {records[number]} has {len(exchange.prompt_ids)} prompt tokens and "
                f"{len(exchange.completion_ids)} completion tokens: no token of a completion can be predicted from "
                "one before it",
                "Drop the row, or give it a prompt and an answer.",
            )
    ids = _join([part for each in exchanges for part in (each.prompt_ids, each.completion_ids)])  # (T + E,)
    weights = _join([part for each in exchanges for part in (each.prompt_weights, each.completion_weights)], np.float32)
    lengths = np.array([len(exchange) for exchange in exchanges], np.int64)
    last = np.cumsum(lengths) - 1  # (E,): only a target
    trained = weights > 0
    trained[last + 1 - lengths] = False  # nothing precedes it
    trained[last] = True
    targets = trained.nonzero()[0]  # (S,)
    exchange_of = np.repeat(np.arange(len(exchanges)), lengths)[targets]
    sizes = lengths - 1
    ends = np.cumsum(sizes)
    return TokenTree(
        np.delete(ids, last),
        np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes),
        np.repeat(ends, sizes),
        targets - 1 - exchange_of,  # the last token of each exchange before is no row
        ids[targets],
        weights[targets],
        exchange_of,
        np.array([len(exchange.prompt_ids) for exchange in exchanges], np.int64),
        np.array(records, np.int64),
        np.array([LABELS.index(exchange.label) for exchange in exchanges], np.int64),
        np.full(len(exchanges), np.nan),
    )


def concatenate(trees: Sequence[TokenTree]) -> TokenTree:
    """One forest of all trees, nothing shared between them; exchanges are numbered on from tree to tree.

    Trees may be stored in narrower integers; the forest is int64.
    """
    sizes = [tree.size for tree in trees]
    targets = [len(tree.target_rows) for tree in trees]
    exchanges = [tree.exchanges for tree in trees]
    joined: dict[str, Any] = {
        field.name: _join([getattr(tree, field.name) for tree in trees], _KINDS.get(field.name, np.int64))
        for field in fields(TokenTree)
    }
    joined["subtree_end"] += np.repeat(_starts(sizes), sizes)
    joined["target_rows"] += np.repeat(_starts(sizes), targets)
    joined["target_exchange"] += np.repeat(_starts(exchanges), targets)
    return TokenTree(**joined)


def merge(trees: Sequence[TokenTree]) -> TokenTree:
    """One forest of all trees in which paths that begin alike share their prefix.

    Targets and their order are those of `concatenate`; only the rows that they stand at are shared.
    """
    flat = concatenate(trees)
    if flat.size == 0:
        return flat
    # A row whose subtree ends with its predecessor's is the predecessor's only child: one edge.
    starts = np.flatnonzero(np.diff(flat.subtree_end, prepend=-1))  # (N,)
    stops = np.append(starts[1:], flat.size)
    root = _Node(np.empty(0, np.int64), None)
    above: list[tuple[int, _Node]] = [(flat.size, root)]
    edges: list[tuple[_Node, int]] = []
    for start, stop, end in zip(starts.tolist(), stops.tolist(), flat.subtree_end[starts].tolist(), strict=True):
        while above[-1][0] <= start:
            above.pop()
        node = above[-1][1].insert(flat.input_ids[start:stop])
        above.append((end, node))
        edges.append((node, stop - start))
    input_ids, subtree_end = _lay_out(root)
    moved = np.concatenate([node.rows(length) for node, length in edges])  # (T before,): the row of each after
    return replace(
        flat,
        input_ids=input_ids,
        position_ids=depths(subtree_end),
        subtree_end=subtree_end,
        target_rows=moved[flat.target_rows],
    )


class _Node:
    """A node of a radix tree under construction: the tokens of the edge that leads to it, and its children."""

    __slots__ = ("children", "end", "parent", "start", "tokens")

    def __init__(self, tokens: Ids, parent: _Node | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.start = 0
        self.end = 0

    def insert(self, tokens: Ids) -> _Node:
        """Walk `tokens` down from this node, adding what is missing; the node in which they end."""
        node = self
        while len(tokens):
            child = node.children.get(int(tokens[0]))
            if child is None:
                child = node.children[int(tokens[0])] = _Node(tokens, node)
                return child
            shared = _common_prefix(child.tokens, tokens)
            node = child if shared == len(child.tokens) else child.split(shared)
            tokens = tokens[shared:]
        return node

    def split(self, at: int) -> _Node:
        """Cut the edge; the new upper node takes its first `at` tokens.

        The lower part stays this object, so whoever holds it as the end of a path still does.
        """
        assert self.parent is not None
        upper = _Node(self.tokens[:at], self.parent)
        self.parent.children[int(self.tokens[0])] = upper
        self.tokens, self.parent = self.tokens[at:], upper
        upper.children[int(self.tokens[0])] = self
        return upper

    def rows(self, length: int) -> Ints:
        """(length,) int64: the rows of the last `length` tokens on the way to this node."""
        node, pieces = self, []
        while length:
            assert node.parent is not None
            pieces.append(np.arange(node.start, node.start + len(node.tokens)))
            length -= len(node.tokens)
            node = node.parent
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces[::-1])


def _common_prefix(one: Ids, other: Ids) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def _lay_out(root: _Node) -> tuple[Ints, Ints]:
    """Number the rows of a radix tree depth first; its `input_ids` and `subtree_end`, both (T,)."""
    nodes, pending, row = [], [root], 0
    while pending:
        node = pending.pop()
        node.start = row
        row += len(node.tokens)
        nodes.append(node)
        pending.extend(reversed(node.children.values()))
    for node in reversed(nodes):
        last = next(reversed(node.children.values()), None)
        node.end = last.end if last else node.start + len(node.tokens)
    lengths = [len(node.tokens) for node in nodes]
    return _join([node.tokens for node in nodes]), np.repeat(np.array([node.end for node in nodes]), lengths)


def _starts(lengths: Iterable[int]) -> Ints:
    return np.cumsum([0, *lengths])[:-1]


def _join(arrays: Sequence[NDArray[Any]], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
    return np.concatenate(arrays, dtype=dtype, casting="same_kind") if arrays else np.empty(0, dtype)
