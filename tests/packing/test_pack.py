"""Plans and batches: every exchange exactly once, within the budget, full, mixed, and the same for one seed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.errors import PackingError
from instil.packing import TokenTree, TreeStore, deal, expand, pack, plan
from instil.packing.store import StoredTrees, columns, write
from instil.packing.tree import concatenate
from instil.prompt.exchange import Exchange


def exchange(prompt: Any, completion: Any, weight: float = 1.0) -> Exchange:
    return Exchange(
        prompt_text="",
        completion_text="",
        prompt_ids=np.asarray(prompt, np.int32),
        prompt_weights=np.full(len(prompt), weight / 2, np.float32),
        completion_ids=np.asarray(completion, np.int32),
        completion_weights=np.full(len(completion), weight, np.float32),
        boundary="compared",
    )


def taught(batches: Sequence[TokenTree]) -> Counter[tuple]:
    """Every exchange with its weights, counted."""
    return Counter(
        (each.record, each.label, *(tuple(part.tolist()) for part in each[2:]))
        for batch in batches
        for each in expand(batch)
    )


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
exchanges = st.builds(exchange, tokens, tokens, st.sampled_from([0.0, 0.5, 1.0]))
rows = st.lists(exchanges, min_size=1, max_size=6)
data = st.lists(rows, min_size=1, max_size=12)
sharing = st.sampled_from(["auto", "on", "off"])


def trees_of(data: list[list[Exchange]]) -> list[TokenTree]:
    return [TokenTree.from_exchanges(row, record=record) for record, row in enumerate(data)]


@given(data, sharing, st.integers(0, 30), st.integers(0, 3))
def test_every_exchange_once_and_within_the_budget(data, sharing, spare, seed):
    trees = trees_of(data)
    budget = max(tree.longest for tree in trees) + spare
    packs = pack(trees, budget, share_prefixes=sharing, seed=seed)
    batches = list(packs)
    assert taught(batches) == taught(trees)
    assert max(batch.size for batch in batches) <= budget
    assert len(packs) == packs.report.batches == len(batches)


@given(data, sharing, st.integers(0, 30))
def test_the_report_counts_what_is_built(data, sharing, spare):
    trees = trees_of([row[:1] for row in data])
    packs = pack(trees, max(tree.longest for tree in trees) + spare, share_prefixes=sharing)
    report, built = packs.report, sum(batch.size for batch in packs)
    assert report.tokens == built
    assert report.unshared == sum(tree.unshared for tree in trees)
    assert report.tokens + report.shared_within + report.shared_across == report.unshared
    assert report.fill == pytest.approx(built / (len(packs) * report.tokens_per_batch))


@given(data, st.integers(0, 30), st.data())
def test_any_rows_can_be_packed_by_themselves(data, spare, draw):
    trees = trees_of(data)
    budget = max(tree.longest for tree in trees) + spare
    order = deal(trees, budget, seed=1)
    assert sorted(order.tolist()) == list(range(len(trees)))
    cut = draw.draw(st.integers(0, len(trees)))
    for step in (order[:cut], order[cut:]):
        shared = pack(trees, budget, share_prefixes="on", records=step)
        single = pack(trees, budget, share_prefixes="off", records=step)
        assert taught(list(shared)) == taught(list(single)) == taught([trees[row] for row in step])


def short_trees(count: int, seed: int = 0, preamble: int = 0) -> list[TokenTree]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 32000, preamble)
    return trees_of(
        [
            [exchange(np.append(shared, rng.integers(0, 32000, length)), rng.integers(0, 32000, 20))]
            for length in rng.integers(10, 60, count)
        ]
    )


def test_a_seed_and_an_epoch_decide_everything():
    trees = short_trees(300)

    def drawn(**how: int) -> list[list[int]]:
        arranged = plan(trees, 500, share_prefixes="off", **how)
        return [[row for row, _ in arranged.batch(number)] for number in range(len(arranged))]

    assert drawn(seed=1, epoch=2) == drawn(seed=1, epoch=2)
    assert {frozenset(batch) for batch in drawn(seed=1)} & {frozenset(batch) for batch in drawn(seed=2)} == set()
    assert {frozenset(batch) for batch in drawn(epoch=1)} & {frozenset(batch) for batch in drawn(epoch=2)} == set()
    assert deal(trees, 500, seed=1).tolist() == deal(trees, 500, seed=1).tolist()
    assert deal(trees, 500, seed=1).tolist() != deal(trees, 500, seed=1, epoch=1).tolist()


def test_every_row_that_fits_no_batch_is_named():
    trees = trees_of([[exchange(range(size), [1, 2])] for size in (5, 60, 7, 90, 49, 50)])
    with pytest.raises(PackingError) as error:
        pack(trees, 50, name=lambda index: f"data.jsonl:{index + 1}")
    message = str(error.value)
    assert "3 rows of 6" in message
    assert [line.strip() for line in message.splitlines()[1:4]] == [
        "data.jsonl:2: 61 tokens",
        "data.jsonl:4: 91 tokens",
        "data.jsonl:6: 51 tokens",
    ]
    assert "tokens_per_batch to 91" in message
    assert "max_length to 50" in message
    assert len(pack(trees, 91)) > 0


def test_a_tree_too_large_is_split_by_exchanges():
    prompt = list(range(40))
    row = [exchange(prompt, [100 + answer] * 10) for answer in range(30)]
    trees = trees_of([row, [exchange([1, 2], [3])]])
    assert trees[0].size == 40 + 30 * 9
    arranged = plan(trees, 40 + 9 * 8, share_prefixes="off")
    parts = list(arranged.parts.values())
    assert sorted(np.concatenate(parts).tolist()) == list(range(30))
    assert sorted(len(part) for part in parts) == [6, 8, 8, 8]
    for share in ("on", "off"):
        assert taught(list(pack(trees, 40 + 9 * 8, share_prefixes=share))) == taught(trees)


def test_batches_read_as_a_sequence():
    trees = short_trees(100)
    packs = pack(trees, 500)
    assert taught(packs[:]) == taught(trees)
    assert packs[-1].input_ids.tolist() == packs[len(packs) - 1].input_ids.tolist()
    with pytest.raises(IndexError):
        packs[len(packs)]


def test_rows_stored_in_narrow_integers_become_wide_batches():
    def narrow(tree: TokenTree) -> TokenTree:
        return replace(tree, input_ids=tree.input_ids.astype(np.int32), target_ids=tree.target_ids.astype(np.int32))

    trees = short_trees(20, preamble=30)
    for share in ("on", "off"):
        packs = pack([narrow(tree) for tree in trees], 500, share_prefixes=share)
        assert taught(list(packs)) == taught(trees)
        assert {packs[0].input_ids.dtype, packs[0].target_ids.dtype} == {np.dtype(np.int64)}


def test_no_rows_no_batches():
    packs = pack([], 100)
    assert (len(packs), packs.report.tokens, packs.report.fill) == (0, 0, 0.0)
    assert len(pack(trees_of([[]]), 100)) == 0
    assert deal([], 100).tolist() == []


class Stored(Sequence[TokenTree]):
    """Rows of random tokens that exist only as lengths and a seed; counts the trees that are read."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.sizes = self.longest = self.unshared = lengths
        self.ids = np.random.default_rng(5).integers(0, 32000, int(lengths.max()) + len(lengths), np.int32)
        self.read = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def first_ids(self, index: int, start: int, stop: int) -> np.ndarray:
        return self.ids[index : index + int(self.sizes[index])][start:stop]

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        ids = self.ids[index : index + int(self.sizes[index]) + 1]
        return TokenTree.from_exchanges([exchange(ids[:4], ids[4:])])


class Rows(Sequence[TokenTree]):
    """Rows of one exchange that exist only as their ids; counts the times that ids are read."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.rows = rows
        self.sizes = self.longest = self.unshared = np.array([len(row) for row in rows])
        self.read = 0

    def __len__(self) -> int:
        return len(self.rows)

    def first_ids(self, index: int, start: int, stop: int) -> np.ndarray:
        self.read += 1
        return self.rows[index][start:stop]

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("planning reads no whole tree")


def lognormal(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(np.log(160), 0.7, count), 8, 8192).astype(np.int64)


@pytest.mark.parametrize("share", ["off", "auto"])
def test_a_hundred_thousand_rows_fill_their_batches(share):
    trees = Stored(lognormal(100_000))
    packs = pack(trees, 8192, share_prefixes=share)
    assert isinstance(trees, TreeStore)
    assert trees.read == 0
    assert packs.report.fill >= 0.995
    assert packs.report.share_prefixes == "off"
    assert sorted(packs.plan.records.tolist()) == list(range(100_000))
    assert packs[7].size <= 8192


def test_lengths_are_mixed_within_batches():
    lengths = lognormal(100_000)
    arranged = plan(Stored(lengths), 8192, share_prefixes="off")
    means = np.add.reduceat(lengths[arranged.records], arranged.offsets[:-1]) / np.diff(arranged.offsets)
    # What rows drawn at random would give is std / sqrt(rows); in decreasing order it is several times that.
    assert means.std() < 1.6 * lengths.std() / np.sqrt(100_000 / len(arranged))


def test_batches_come_in_random_order_where_rows_are_packed_by_length():
    lengths = np.random.default_rng(0).integers(34, 67, 2000)
    arranged = plan(Stored(lengths), 100, share_prefixes="off")
    longest = np.maximum.reduceat(lengths[arranged.records], arranged.offsets[:-1])
    # Pairs fill 100 only if the long are matched with the short.
    assert arranged.report.fill > 0.96
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


@pytest.mark.parametrize("sizes", [[60] * 50, [51] * 40 + [49] * 40, [100] * 10, [34] * 90, [70, 30] * 50])
def test_as_few_batches_as_can_be(sizes):
    trees = trees_of([[exchange(np.arange(size) + 1000 * row, [7])] for row, size in enumerate(sizes)])
    best = {60: 50, 51: 40, 100: 10, 34: 45, 70: 50}[sizes[0]]
    assert len(pack(trees, 100, share_prefixes="off")) == best


def tool_trees(lists: int, rows: int, trunk: int = 1000) -> tuple[list[TokenTree], np.ndarray]:
    """`lists` tool lists, each in `rows` rows of 100 tokens more, and the list of each; sorted, the lists ascend."""
    rng = np.random.default_rng(0)
    tools = [np.append(number, rng.integers(0, 32000, trunk - 1)) for number in range(lists)]
    owner = rng.permutation(np.repeat(np.arange(lists), rows))
    made = [[exchange(np.append(tools[n], rng.integers(0, 32000, 50)), rng.integers(0, 32000, 51))] for n in owner]
    return trees_of(made), owner


def test_tool_lists_are_found_and_shared():
    trees, owner = tool_trees(200, 20)
    packs = pack(trees, 8192)
    batches = list(packs)
    ideal = 200 * 19 * 1000
    assert packs.report.share_prefixes == "on"
    assert packs.report.shared_across >= 0.97 * ideal
    assert sum(batch.size for batch in batches) == packs.report.tokens
    assert max(batch.size for batch in batches) <= 8192
    # Dealt in blocks, the number of the list would rise with that of the batch.
    mean_list = [owner[batch.exchange_record].mean() for batch in batches]
    assert abs(np.corrcoef(mean_list, np.arange(len(batches)))[0, 1]) < 0.3


def test_a_large_group_is_dealt_out_in_full_batches():
    trees, owner = tool_trees(8, 400)
    packs = pack(trees, 8192, share_prefixes="on")
    lists = [set(owner[batch.exchange_record].tolist()) for batch in packs]
    # 71 rows of 100 tokens after a trunk of 1,000 fill a batch of 8,192.
    assert max(batch.exchanges for batch in packs) == 71
    assert packs.report.fill > 0.9
    assert all(len(set.union(*lists[start : start + 16])) >= 4 for start in range(len(lists) - 15))
    assert sum(one == two for one, two in pairwise(lists)) < len(lists) / 2


def test_a_dealt_order_keeps_groups_whole_and_mixes_them():
    trees, owner = tool_trees(40, 20)
    order = owner[deal(trees, 8192)]
    turns = int((np.diff(order) != 0).sum())
    assert turns == 39
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.4


def test_long_prompts_do_not_fill_the_steps_cut_from_a_dealt_order():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 32000, (20, 1000))
    owner = rng.permutation(np.repeat(np.arange(20), 1000))
    trees = Rows([np.append(prompts[n], rng.integers(0, 32000, 20)) for n in owner])
    order = deal(trees, 8192)
    steps = np.cumsum(trees.sizes[order]) // 262_144
    met = [len(set(owner[order[steps == step]])) for step in range(steps[-1])]
    assert np.mean(met) > 2
    assert np.mean(np.array(met) == 1) < 0.1


@pytest.mark.parametrize("length", [30, 100, 4096])
def test_duplicates_do_not_gather_in_one_batch(length):
    rng = np.random.default_rng(0)
    twin = rng.integers(0, 32000, length)
    trees = Rows([twin if row % 2 else rng.integers(0, 32000, rng.integers(40, 200)) for row in range(10_000)])
    arranged = plan(trees, 4096, share_prefixes="on")
    unshared = np.add.reduceat(trees.sizes[arranged.records], arranged.offsets[:-1])
    assert unshared.max() <= 17 * 4096
    assert arranged.report.shared_across > 0.9 * 5000 * length


def test_a_long_common_prefix_is_read_in_few_pieces():
    rng = np.random.default_rng(0)
    common = rng.integers(0, 32000, 6000)
    trees = Rows([np.append(common, rng.integers(0, 32000, 20)) for _ in range(500)])
    report = plan(trees, 8192).report
    assert trees.read < 15 * 500
    assert report.shared_across >= 6000 * (500 - report.batches)


def test_stored_trees_are_planned_like_those_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    common = rng.integers(0, 50, 300)
    made = []
    for _ in range(400):
        prompt = np.append(common[: rng.choice([0, 10, 40, 100, 300])], rng.integers(0, 2, rng.integers(1, 9)))
        made.append([exchange(prompt, rng.integers(0, 2, rng.integers(1, 6))) for _ in range(rng.integers(1, 4))])
    trees = trees_of(made)
    count = np.zeros(len(trees), np.int64)
    rows = {"file": count, "line": count, "column": count, "hash": count, "lengths": count}
    write(tmp_path, [columns(concatenate(trees), rows)])
    stored = StoredTrees(tmp_path, ["data"])
    for width in (7, 4000):
        for start in (0, 39, 310):
            windows = stored.first_windows(np.arange(400), np.full(400, start), width)
            for tree, window in zip(trees, windows, strict=True):
                assert window[window >= 0].tolist() == tree.first_path[start : start + width].tolist()
    assert deal(stored, 400).tolist() == deal(trees, 400).tolist()
    in_memory, on_disk = (plan(each, 400, share_prefixes="on") for each in (trees, stored))
    assert on_disk.records.tolist() == in_memory.records.tolist()
    assert on_disk.report == in_memory.report


def test_a_shared_preamble_and_tool_lists_within_it():
    rng = np.random.default_rng(1)
    preamble = rng.integers(0, 32000, 40)
    made = []
    for _ in range(20):
        tools = rng.integers(0, 32000, 500)
        made += [np.concatenate((preamble, tools, rng.integers(0, 32000, 80))) for _ in range(10)]
    made += [np.append(preamble, rng.integers(0, 32000, 120)) for _ in range(400)]
    trees = trees_of([[exchange(made[row], rng.integers(0, 32000, 20))] for row in rng.permutation(len(made))])
    report = pack(trees, 4096).report
    # The preamble once in a batch, each tool list once in all.
    assert report.shared_across >= 0.98 * (20 * 9 * 500 + 40 * (600 - report.batches))


def test_auto_follows_the_counts():
    random = pack(short_trees(400), 2000).report
    common = pack(short_trees(400, preamble=30), 2000).report
    assert (random.share_prefixes, random.shared_across) == ("off", 0)
    assert "0.0%" in random.reason
    assert common.share_prefixes == "on"
    assert common.shared_across >= 30 * (400 - common.batches)
    assert common.batches == -(-common.tokens // 2000)
    assert "of 33,888 tokens" in common.reason
    assert "share_prefixes: on" in str(common)


def test_shared_and_unshared_teach_the_same():
    trees, _ = tool_trees(6, 12, trunk=60)
    shared, single = (list(pack(trees, 600, share_prefixes=share)) for share in ("on", "off"))
    assert taught(shared) == taught(single)
    assert sum(batch.size for batch in shared) < 0.75 * sum(batch.size for batch in single)
