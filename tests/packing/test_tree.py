"""Trees held against a reference that knows only the attention rule: `k <= q < subtree_end[k]`."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.errors import PackingError
from instil.packing import TokenTree, concatenate, expand, merge
from instil.prompt.exchange import Exchange

Weighted = list[tuple[int, float]]


def exchange(prompt: Weighted, completion: Weighted) -> Exchange:
    return Exchange(
        prompt_text="",
        completion_text="",
        prompt_ids=np.array([token for token, _ in prompt], np.int32),
        prompt_weights=np.array([weight for _, weight in prompt], np.float32),
        completion_ids=np.array([token for token, _ in completion], np.int32),
        completion_weights=np.array([weight for _, weight in completion], np.float32),
        boundary="compared",
    )


def plain(prompt: list[int], completion: list[int]) -> Exchange:
    return exchange([(token, 0.0) for token in prompt], [(token, 1.0) for token in completion])


# Three tokens: paths collide, repeat and are prefixes of one another.
tokens = st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.25, 1.0]))
pairs = st.tuples(st.lists(tokens, max_size=6), st.lists(tokens, min_size=1, max_size=5)).filter(
    lambda pair: len(pair[0]) + len(pair[1]) > 1
)
rows = st.lists(pairs, min_size=1, max_size=5)
data = st.lists(rows, min_size=1, max_size=5)


def trees_of(rows: list[list[tuple[Weighted, Weighted]]]) -> list[TokenTree]:
    return [
        TokenTree.from_exchanges([exchange(*pair) for pair in pairs], record=record)
        for record, pairs in enumerate(rows)
    ]


def contexts(tree: TokenTree) -> list[list[int]]:
    """The rows that each row attends to."""
    end = tree.subtree_end.tolist()
    return [[k for k in range(len(end)) if k <= q < end[k]] for q in range(len(end))]


def entries(tree: TokenTree) -> list[tuple[int, tuple[int, ...], int, float]]:
    """What is trained: the exchange, the tokens before the target, the target and its weight."""
    seen, ids = contexts(tree), tree.input_ids.tolist()
    return [
        (number, tuple(ids[k] for k in seen[row]), target, weight)
        for row, target, weight, number in zip(
            tree.target_rows.tolist(),
            tree.target_ids.tolist(),
            tree.target_weights.tolist(),
            tree.target_exchange.tolist(),
            strict=True,
        )
    ]


def read_back(tree: TokenTree) -> list[tuple[int, Weighted, Weighted]]:
    """Each exchange's record, prompt and completion."""
    found = []
    for number, (prompt, record) in enumerate(
        zip(tree.exchange_prompt.tolist(), tree.exchange_record.tolist(), strict=True)
    ):
        mine = [(before, target, weight) for owner, before, target, weight in entries(tree) if owner == number]
        before, target, _ = max(mine, key=lambda entry: len(entry[0]))
        weights = {len(before): weight for before, _, weight in mine}
        assert len(weights) == len(mine), "a token is trained twice"
        sequence = [(token, weights.get(place, 0.0)) for place, token in enumerate([*before, target])]
        found.append((record, sequence[:prompt], sequence[prompt:]))
    return found


def taught(rows: list[list[tuple[Weighted, Weighted]]]) -> list[tuple[int, Weighted, Weighted]]:
    """What `read_back` must find: the first token of all cannot be predicted."""
    found = []
    for record, pairs in enumerate(rows):
        for prompt, completion in pairs:
            sequence = [*prompt, *completion]
            sequence[0] = (sequence[0][0], 0.0)
            found.append((record, sequence[: len(prompt)], sequence[len(prompt) :]))
    return found


def prefix_tree(rows: list[list[tuple[Weighted, Weighted]]]) -> list[tuple[int, ...]]:
    """The distinct prefixes of all paths, depth first, children in the order in which they first come."""
    root: dict = {}
    for pairs in rows:
        for prompt, completion in pairs:
            node = root
            for token, _ in [*prompt, *completion][:-1]:
                node = node.setdefault(token, {})

    def walk(node: dict, prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [each for token, child in node.items() for each in [(*prefix, token), *walk(child, (*prefix, token))]]

    return walk(root, ())


def check_form(tree: TokenTree) -> None:
    assert [array.dtype for array in (tree.input_ids, tree.position_ids, tree.subtree_end)] == [np.int64] * 3
    assert [array.dtype for array in (tree.target_rows, tree.target_ids, tree.target_exchange)] == [np.int64] * 3
    assert [array.dtype for array in (tree.exchange_prompt, tree.exchange_record)] == [np.int64] * 2
    assert tree.target_weights.dtype == np.float32
    assert tree.position_ids.tolist() == [len(seen) - 1 for seen in contexts(tree)]
    assert (np.diff(tree.target_exchange) >= 0).all()


@given(data)
def test_a_merged_forest_is_the_prefix_tree(rows):
    forest = merge(trees_of(rows))
    prefixes = prefix_tree(rows)
    assert forest.input_ids.tolist() == [prefix[-1] for prefix in prefixes]
    assert contexts(forest) == [
        [k for k, above in enumerate(prefixes) if prefix[: len(above)] == above] for prefix in prefixes
    ]
    check_form(forest)


@given(data)
def test_nothing_is_lost_nothing_twice(rows):
    trees = trees_of(rows)
    for forest in (merge(trees), concatenate(trees), merge([merge(trees[:2]), *trees[2:]])):
        check_form(forest)
        assert read_back(forest) == taught(rows)


@given(data)
def test_sharing_changes_no_target(rows):
    trees = trees_of(rows)
    alone, number = Counter(), 0
    for pairs in rows:
        for pair in pairs:
            single = TokenTree.from_exchanges([exchange(*pair)])
            alone.update((number, *entry[1:]) for entry in entries(single))
            number += 1
    assert Counter(entries(merge(trees))) == Counter(entries(concatenate(trees))) == alone


@given(data)
def test_concatenation_shares_nothing_across_trees(rows):
    trees = trees_of(rows)
    forest = concatenate(trees)
    assert forest.size == sum(len(prefix_tree([pairs])) for pairs in rows)
    bounds = np.cumsum([0, *(tree.size for tree in trees)])
    owner = np.searchsorted(bounds, np.arange(forest.size), side="right")
    assert all(owner[k] == owner[q] for q, seen in enumerate(contexts(forest)) for k in seen)


@given(data)
def test_expand_agrees_with_the_reference(rows):
    forest = merge(trees_of(rows))
    found = [
        (
            each.record,
            list(zip(each.prompt_ids.tolist(), each.prompt_weights.tolist(), strict=True)),
            list(zip(each.completion_ids.tolist(), each.completion_weights.tolist(), strict=True)),
        )
        for each in expand(forest)
    ]
    assert found == taught(rows)


@given(rows, st.data())
def test_select_is_the_tree_of_the_chosen(pairs, draw):
    chosen = sorted(draw.draw(st.sets(st.integers(0, len(pairs) - 1), min_size=1)))
    (tree,) = trees_of([pairs])
    part = tree.select(np.array(chosen))
    check_form(part)
    assert read_back(part) == taught([[pairs[number] for number in chosen]])
    assert part.size == len(prefix_tree([[pairs[number] for number in chosen]]))


@given(rows)
def test_counts(pairs):
    (tree,) = trees_of([pairs])
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in pairs]
    assert tree.path_lengths.tolist() == lengths
    assert (tree.longest, tree.unshared, tree.exchanges) == (max(lengths), sum(lengths), len(pairs))
    first = prefix_tree([pairs])
    depth = next((n for n, (one, two) in enumerate(pairwise(first), 1) if len(two) <= len(one)), len(first))
    assert tree.first_path.tolist() == list(first[depth - 1])


def test_a_small_tree_written_out():
    tree = TokenTree.from_exchanges(
        [plain([5, 6], [7, 8]), exchange([(5, 1.0), (6, 0.5)], [(9, 0.0), (4, 0.0)]), plain([5], [6, 7])], record=3
    )
    assert tree.input_ids.tolist() == [5, 6, 7, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 2]
    assert tree.subtree_end.tolist() == [4, 4, 3, 4]
    assert tree.target_rows.tolist() == [1, 2, 0, 3, 0, 1]
    assert tree.target_ids.tolist() == [7, 8, 6, 4, 6, 7]
    assert tree.target_weights.tolist() == [1.0, 1.0, 0.5, 0.0, 1.0, 1.0]
    assert tree.target_exchange.tolist() == [0, 0, 1, 1, 2, 2]
    assert tree.exchange_prompt.tolist() == [2, 2, 1]
    assert tree.exchange_record.tolist() == [3, 3, 3]


def test_a_long_conversation_is_held_once():
    conversation = np.arange(4000).tolist()
    exchanges = [plain(conversation[:start], conversation[start : start + 10]) for start in range(10, 4000, 10)]
    tree = TokenTree.from_exchanges(exchanges)
    assert tree.size == tree.longest == 3999
    assert tree.unshared == sum(range(19, 4000, 10))


@pytest.mark.parametrize(("prompt", "completion"), [([], [4]), ([4, 5], []), ([], [])])
def test_an_exchange_that_predicts_nothing_is_refused(prompt, completion):
    with pytest.raises(PackingError, match="exchange 1 of record 7 has") as error:
        TokenTree.from_exchanges([plain([1], [2]), plain(prompt, completion)], record=7)
    assert error.value.remedy


def test_nothing_at_all():
    for nothing in (TokenTree.from_exchanges([]), merge([]), concatenate([])):
        check_form(nothing)
        assert (nothing.size, nothing.exchanges, nothing.longest, nothing.unshared) == (0, 0, 0, 0)
        assert list(expand(nothing)) == []
