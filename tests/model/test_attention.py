"""Attention over random forests, held against one dense mask made of the rule itself."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

from instil.model import attention
from instil.model.attention import Layout, attend
from instil.packing import merge

from .forests import Sequence, forest_of, forests, tree_of

CPU = torch.device("cpu")


def sees(forest, window=None):
    """(T, T): whether the token of a row attends to that of a column."""
    ends, size = forest.subtree_end.tolist(), forest.size
    depth = [sum(k <= q < ends[k] for k in range(size)) - 1 for q in range(size)]
    rule = [
        [k <= q < ends[k] and (window is None or depth[q] - depth[k] < window) for k in range(size)]
        for q in range(size)
    ]
    return torch.tensor(rule)


def densely(query, key, value, seen, scale, softcap=None, sinks=None):
    """Attention as its definition says, head by head, with (T, T) scores."""
    found = []
    for head in range(query.shape[1]):
        of = head * key.shape[1] // query.shape[1]
        scores = query[0, head] @ key[0, of].T * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.where(seen, scores.exp(), 0)
        total = weights.sum(-1) + (0 if sinks is None else sinks[head].exp())
        found.append(weights / total[:, None] @ value[0, of])
    return torch.stack(found, 1)[None]  # (1, T, H, E)


def drawn(forest, heads, key_heads, width, value_width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (key_heads, width), (key_heads, value_width)]
    made = [torch.randn(1, h, forest.size, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    return [each.to(dtype).requires_grad_() for each in made]


class Layer(torch.nn.Module):
    """What the function is handed, and does not look at."""


def both(forest, inputs, sinks=None, window=None, softcap=None, scaling=None):
    """The output and the gradients of queries, keys, values (and sinks) by the function, and by definition."""
    result = []
    generator = torch.Generator().manual_seed(1)
    back = torch.randn(1, forest.size, inputs[0].shape[1], inputs[2].shape[3], generator=generator, dtype=torch.float64)
    for dense in (False, True):
        dtype = torch.float64 if dense else inputs[0].dtype
        parts = [each.detach().to(dtype).requires_grad_() for each in inputs]
        s_aux = None if sinks is None else sinks.detach().to(dtype).requires_grad_()
        if dense:
            scale = parts[0].shape[-1] ** -0.5 if scaling is None else scaling
            out = densely(*parts, sees(forest, window), scale, softcap, s_aux)
        else:
            more = {"sliding_window": window, "softcap": softcap, "scaling": scaling, "s_aux": s_aux}
            out, weights = attend(Layer(), *parts, None, layout=Layout(forest, CPU), **more)
            assert weights is None
        out.backward(back.to(dtype))
        result.append([out.detach(), *(each.grad for each in [*parts, *([] if sinks is None else [s_aux])])])
    return result


@given(forests(), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), st.sampled_from([None, 0.3, 1.0]), st.data())
def test_attention_is_the_rule(records, heads, scaling, data):
    forest = forest_of(records, shared=data.draw(st.sampled_from([True, True, False])))
    window = data.draw(st.none() | st.integers(1, 20))
    softcap = data.draw(st.sampled_from([None, None, 0.5, 3.0]))
    sinks = torch.linspace(-2, 3, heads[0], dtype=torch.float64) if data.draw(st.booleans()) else None
    value_width = data.draw(st.sampled_from([8, 8, 5]))
    inputs = drawn(forest, *heads, 8, value_width)
    found, expected = both(forest, inputs, sinks, window, softcap, scaling)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@given(forests(), st.sampled_from([(2, 2), (4, 1)]), st.data())
def test_the_kernels_road_is_the_rule(records, heads, data):
    """Without what kernels do not know, the same by blocks."""
    forest = forest_of(records)
    window = data.draw(st.sampled_from([None, forest.longest, 1000]))
    found, expected = both(forest, drawn(forest, *heads, 8, 8), window=window)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@given(forests(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, 4]))
def test_attention_in_less_precision_is_near_the_rule(records, dtype, window):
    forest = forest_of(records)
    found, expected = both(forest, drawn(forest, 4, 2, 8, 8, dtype), window=window)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * max(1, float(other.norm()))


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 0.7}, {"window": 300, "softcap": 2.0}])
def test_long_chains_are_the_rule(options, monkeypatch):
    """Longer than what is computed at once, in kernels and by definition."""
    monkeypatch.setattr(attention, "_ROWS_AT_ONCE", 50)
    forest = long_forest()
    found, expected = both(forest, drawn(forest, 2, 1, 8, 8), **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def long_forest():
    draw = np.random.default_rng(0)
    trunk, limb = draw.integers(0, 9, 170).tolist(), draw.integers(0, 9, 61).tolist()
    ends = [trunk, trunk + limb, trunk + limb, trunk[:90], []]
    paths = [
        [*start, *draw.integers(0, 9, count).tolist()] for start, count in zip(ends, (31, 130, 2, 70, 140), strict=True)
    ]
    return merge([tree_of([Sequence(ids, [1.0] * len(ids), 1)]) for ids in paths])


def test_gradients_of_a_prefix_are_summed_in_float32():
    """What remains of so many branches is the rounding of the sum, and not that of each addition."""
    paths = [[1, 2, 3, 4 + number, 5] for number in range(600)]
    forest = merge([tree_of([Sequence(ids, [1.0] * len(ids), 1)]) for ids in paths])
    parts = drawn(forest, 1, 1, 8, 8, torch.bfloat16)
    out, _ = attend(Layer(), *parts, None, layout=Layout(forest, CPU))
    out[:, 3:].sum().backward()
    truth = [each.detach().double().requires_grad_() for each in parts]
    densely(*truth, sees(forest), 8**-0.5)[:, 3:].sum().backward()
    for found, expected in zip(parts[1:], truth[1:], strict=True):
        prefix = expected.grad[:, :, :3]
        assert (found.grad[:, :, :3].double() - prefix).norm() < 0.004 * prefix.norm()


def test_dropout_hides_weights_and_keeps_their_mean():
    forest = forest_of([[Sequence([1, 2, 3, 4], [1.0] * 4, 1)], [Sequence([1, 2, 5, 6, 7], [1.0] * 5, 1)]])
    copies = 20_000
    inputs = [each.expand(1, copies, -1, -1) for each in drawn(forest, 1, 1, 4, 4)]
    torch.manual_seed(0)
    out, _ = attend(Layer(), *inputs, None, dropout=0.3, layout=Layout(forest, CPU))
    plain, _ = attend(Layer(), *inputs, None, layout=Layout(forest, CPU))
    expected = plain[0, :, 0]
    assert (out - plain).abs().mean() > 0.1
    # The root sees itself alone: nothing, or what makes up for it.
    hidden = (out[0, 0].abs().sum(-1) == 0).double().mean()
    assert abs(float(hidden) - 0.3) < 0.02
    standard_error = out[0].std(1) / copies**0.5  # (T, E)
    assert ((out[0].mean(1) - expected).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("window", [None, 3])
def test_branches_share_the_dropout_of_their_prefix(window):
    prefix = [1, 2, 3, 4, 5]
    answers = [[6, 7, 8], [9, 10], [11, 12, 13, 14], [15, 16]]
    outs = []
    for count in (2, 4):
        forest = forest_of([[Sequence(prefix + each, [1.0] * (5 + len(each)), 5) for each in answers[:count]]])
        torch.manual_seed(3)
        inputs = [
            each.detach()[:, :, :5] for each in drawn(forest_of([[Sequence([*prefix, 0], [1.0] * 6, 5)]]), 2, 2, 4, 4)
        ]
        rows = [torch.cat([each, torch.randn(1, 2, forest.size - 5, 4, dtype=each.dtype)], 2) for each in inputs]
        torch.manual_seed(0)
        out, _ = attend(Layer(), *rows, None, dropout=0.5, sliding_window=window, layout=Layout(forest, CPU))
        outs.append(out[:, :5])
    assert torch.equal(*outs)


def test_dropout_shows_in_no_model_that_evaluates():
    forest = long_forest()
    inputs = drawn(forest, 2, 2, 4, 4)
    one, other = (attend(Layer(), *inputs, None, dropout=0.0, layout=Layout(forest, CPU))[0] for _ in range(2))
    assert torch.equal(one, other)


def test_without_a_layout_attention_is_that_of_transformers():
    query, key, value = (torch.randn(2, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    layer = Layer()
    layer.is_causal = True
    out, _ = attend(layer, query, key, value, None, scaling=0.3)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    expected = torch.softmax((query @ key.mT * 0.3).masked_fill(~causal, -torch.inf), -1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-10, atol=1e-12)


def test_an_argument_that_is_not_known_is_noted():
    forest = long_forest()
    attention.unknown_arguments.clear()
    inputs = drawn(forest, 2, 2, 4, 4)
    known = {"use_cache": False, "position_ids": torch.zeros(1), "sliding_window": None, "never_given": None}
    attend(Layer(), *inputs, None, layout=Layout(forest, CPU), **known)
    assert attention.unknown_arguments == set()
    attend(Layer(), *inputs, torch.zeros(1), layout=Layout(forest, CPU), alibi=torch.zeros(1))
    assert attention.unknown_arguments == {"attention_mask", "alibi"}
    attention.unknown_arguments.clear()


@given(forests(), st.none() | st.integers(1, 12))
def test_the_layout_of_a_forest(records, window):
    forest = forest_of(records)
    layout, seen = Layout(forest, CPU), sees(forest)
    assert layout.depth.tolist() == [int(row.sum()) - 1 for row in seen]
    assert [row for start, stop, _ in layout.chains for row in range(start, stop)] == list(range(forest.size))
    for (start, stop, end), path in zip(layout.chains, layout.paths, strict=True):
        assert path.tolist() == seen[stop - 1].nonzero()[:, 0].tolist()
        assert seen[start:end, start].all()
        assert not seen[end:, start].any()
        assert seen[stop:end, start:stop].all()
    if layout.plain:
        assert layout.starts.tolist() == [0, *(stop for _, stop, _ in layout.chains)]
        assert layout.longest == max(stop - start for start, stop, _ in layout.chains)


@given(forests(), st.none() | st.integers(1, 12))
def test_the_rule_of_flex_attention_is_the_rule(records, window):
    forest = forest_of(records)
    mask = attention._block_mask(Layout(forest, CPU), window)
    found = create_mask(mask.mask_mod, 1, 1, forest.size, forest.size, device="cpu")
    assert torch.equal(found[0, 0], sees(forest, window))


@pytest.mark.parametrize("window", [None, 40])
def test_the_blocks_of_flex_attention_hold_what_is_seen(window):
    forest = long_forest()
    layout = Layout(forest, CPU)
    mask = attention._block_mask(layout, window)
    assert attention._block_mask(layout, window) is mask
    assert attention._block_mask(layout, 7) is not mask
    size = 128
    assert forest.size > 3 * size
    blocks = -(-forest.size // size)
    seen = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    seen[: forest.size, : forest.size] = sees(forest, window)
    tiles = seen.view(blocks, size, blocks, size)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    for row, (number, columns) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        assert tiles[row][:, columns[:number]].all()


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.5}])
def test_the_road_of_trees_on_cuda_is_the_rule(options, monkeypatch):
    """As far as it goes here: FlexAttention, not compiled."""
    monkeypatch.setattr(attention, "_flex", lambda: flex_attention)
    forest = long_forest()
    inputs = [each.detach() for each in drawn(forest, 4, 2, 16, 16)]
    chosen = {"window": None, "softcap": None, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        found = attention._on_cuda(*inputs, Layout(forest, CPU), 0.3, **chosen)
    expected = densely(*inputs, sees(forest, chosen["window"]), 0.3, chosen["softcap"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
