"""Steps: every row once an epoch, within the tokens of a step, even, and the same rows with and without sharing."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from instil.packing import expand
from instil.training.steps import Steps

from .tiny import exchange, trees_of

EPOCHS = 3

tokens = st.integers(0, 3)
prompts = st.lists(tokens, min_size=1, max_size=8)
answers = st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=3)
# Some rows begin alike, some have several answers, some are much longer than the rest.
rows_of_data = st.lists(
    st.builds(
        lambda system, prompt, answers, times: [exchange(system + prompt, answer * times, 0.5) for answer in answers],
        st.sampled_from([[], [1, 2, 3, 1, 2, 3, 1, 2]]),
        prompts,
        answers,
        st.sampled_from([1, 1, 1, 6]),
    ),
    min_size=1,
    max_size=30,
)
sharing = st.sampled_from(["auto", "on", "off"])


def sizes_of(rows) -> np.ndarray:
    """The tokens of each row as if nothing were shared: those of an exchange but its last, which is only predicted."""
    return np.array([sum(len(each.prompt_ids) + len(each.completion_ids) - 1 for each in row) for row in rows])


def longest_path(rows) -> int:
    return max(len(each.prompt_ids) + len(each.completion_ids) - 1 for row in rows for each in row)


def one_answer(lengths):
    """Rows of so many tokens each, of which nothing can be shared."""
    return [[exchange([number], [number] * length)] for number, length in enumerate(lengths)]


@given(rows_of_data, st.integers(2, 200), st.integers(0, 60), sharing, st.integers(0, 3))
def test_every_row_is_in_one_step_of_each_epoch(rows, size, spare, share, seed):
    steps = Steps.of(trees_of(rows), size, longest_path(rows) + spare, share, seed)
    for epoch in range(EPOCHS):
        found = steps.rows(epoch)
        assert len(found) == steps.per_epoch
        assert all(len(each) for each in found)
        assert sorted(np.concatenate(found).tolist()) == list(range(len(rows)))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([100, 5, 5, 5], 10),  # more steps by tokens than there are rows
        ([1] * 8 + [1000] + [1] * 8, 300),  # several cuts fall into one row
    ],
)
def test_rows_longer_than_a_step(lengths, size):
    steps = Steps.of(trees_of(one_answer(lengths)), size, 2000, "off", 0)
    for epoch in range(EPOCHS):
        found = steps.rows(epoch)
        assert len(found) == steps.per_epoch
        assert all(len(each) for each in found)
        assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))


@given(rows_of_data, st.integers(2, 200), st.integers(0, 60), st.integers(0, 3))
def test_steps_are_even(rows, size, spare, seed):
    sizes = sizes_of(rows)
    assume(size >= sizes.max())
    steps = Steps.of(trees_of(rows), size, longest_path(rows) + spare, "off", seed)
    mean = sizes.sum() / steps.per_epoch
    assert mean <= size
    for epoch in range(EPOCHS):
        for step in steps.rows(epoch):
            assert abs(sizes[step].sum() - mean) <= sizes.max()


@given(rows_of_data, st.integers(20, 200), st.integers(0, 60), st.integers(0, 3))
def test_sharing_changes_no_step(rows, size, spare, seed):
    assume(size >= sizes_of(rows).max())
    trees, budget = trees_of(rows), longest_path(rows) + spare
    on, off, auto = (Steps.of(trees, size, budget, share, seed) for share in ("on", "off", "auto"))
    assert (on.share_prefixes, off.share_prefixes) == ("on", "off")
    for epoch in range(EPOCHS):
        expected = [step.tolist() for step in off.rows(epoch)]
        assert [step.tolist() for step in on.rows(epoch)] == expected
        assert [step.tolist() for step in auto.rows(epoch)] == expected


@given(rows_of_data, st.integers(20, 200), st.integers(0, 60), sharing, st.integers(0, 3))
def test_micro_batches_hold_the_rows_of_their_step(rows, size, spare, share, seed):
    assume(size >= sizes_of(rows).max())
    budget = longest_path(rows) + spare
    steps = Steps.of(trees_of(rows), size, budget, share, seed)
    planned = [step for epoch in range(2) for step in steps.rows(epoch)]
    for number, (step, (numbered, batches)) in enumerate(
        zip(planned, islice(steps.after(0), len(planned)), strict=True), 1
    ):
        assert numbered == number
        found: Counter = Counter()
        for batch in batches:
            assert 0 < batch.size <= budget
            found.update((each.record, *(tuple(part.tolist()) for part in each[2:])) for each in expand(batch))
        expected: Counter = Counter()
        for record in step.tolist():
            for each in rows[record]:
                weights = each.prompt_weights.copy()
                weights[0] = 0.0  # nothing precedes it
                parts = each.prompt_ids, weights, each.completion_ids, each.completion_weights
                expected[record, *(tuple(part.tolist()) for part in parts)] += 1
        assert found == expected


def test_a_seed_and_an_epoch_decide_the_order():
    rng = np.random.default_rng(0)
    trees = trees_of(one_answer(rng.integers(5, 40, 200).tolist()))

    def drawn(seed: int, epoch: int) -> list[list[int]]:
        return [sorted(step.tolist()) for step in Steps.of(trees, 300, 100, "off", seed).rows(epoch)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({str(drawn(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def test_a_step_is_packed_otherwise_each_time():
    trees = trees_of(one_answer([9] * 60))
    steps = Steps.of(trees, 10_000, 100, "off", 0)
    (rows,) = steps.rows(0)

    def packed(number: int) -> list[list[int]]:
        return [sorted(batch.exchange_record.tolist()) for batch in steps.batches(rows, number)]

    assert packed(0) == packed(0)
    assert packed(0) != packed(1)


@pytest.mark.parametrize(
    ("rows", "length", "size"),
    [(100, 100, 2_048), (1_000, 100, 1_000 * 100 // 32), (200, 20_000, 65_536)],
)
def test_the_size_of_a_step_follows_from_the_tokens(rows, length, size):
    steps = Steps.of(trees_of(one_answer([length] * rows)), None, 20_000, "off", 0)
    assert steps.tokens_per_step == size
    assert steps.per_epoch == -(-rows // (size // length))


@given(rows_of_data, st.integers(20, 200), st.data())
def test_some_rows_are_stepped_through_as_all_are(rows, size, data):
    assume(size >= sizes_of(rows).max())
    some = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    chosen = np.array(sorted(some))
    steps = Steps.of(trees_of(rows), size, longest_path(rows), "on", 0, chosen)
    for epoch in range(EPOCHS):
        assert sorted(np.concatenate(steps.rows(epoch)).tolist()) == chosen.tolist()
