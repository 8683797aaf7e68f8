"""The head of a model over packed batches: cross-entropy, pieces of logits, order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from instil.model import forward
from instil.model.forward import TreeModel
from instil.objectives import supervised

from .forests import Float64, Sequence, branching, check_same, forest_of, gradients, logits_of, random_model, separately


@st.composite
def targets(draw):
    """Rows, vocabulary, and targets of which a row may have none or several, the same among them."""
    rows, words = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    entries = st.tuples(st.integers(0, rows - 1), st.integers(0, words - 1))
    chosen = draw(st.lists(entries, min_size=1, max_size=20))
    row_of, ids = (torch.tensor(each) for each in zip(*chosen, strict=True))
    return rows, words, row_of, ids


@given(targets(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_cross_entropy_is_that_of_torch(case, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "ROWS_AT_ONCE", 3)  # so that rows stand in several pieces
        rows, words, row_of, ids = case
        generator = torch.Generator().manual_seed(rows)
        logits = (torch.randn(rows, words, generator=generator, dtype=torch.float64) * 5).to(dtype)
        weights = torch.rand(len(ids), generator=generator, dtype=torch.float64) * 3
        given_ = logits.clone().requires_grad_()
        found = forward.cross_entropy(given_, row_of, ids)
        (found * weights.to(found)).sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    reference = logits.to(wide).requires_grad_()
    expected = cross_entropy(reference[row_of], ids, reduction="none")
    (expected * weights.to(wide)).sum().backward()
    assert found.dtype == expected.dtype == wide
    assert given_.grad.dtype == dtype
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **exact)
    rounding = exact if wide == dtype else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(given_.grad.to(wide), reference.grad, **rounding)


def test_cross_entropy_of_large_logits_does_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, 1.0]], requires_grad=True)
    found = forward.cross_entropy(logits, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, 2e4, 0.3132617]))
    expected = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.2689414, -0.2689414]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("at_once", [1, 48, 48 * 5, 48 * 17])
def test_logits_in_pieces_give_the_same(kind, at_once, monkeypatch):
    records, model = branching(), random_model(kind)
    forest = forest_of(records)
    reader = TreeModel(random_model(kind), one_by_one="")
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once)
    sizes = []
    reader.base.get_output_embeddings().register_forward_hook(lambda module, given, out: sizes.append(out.numel()))
    with Float64():
        losses = reader.losses(forest)
        (losses @ torch.from_numpy(forest.target_weights).to(losses)).backward()
        expected = separately(model, records)
    assert len(sizes) > 2
    assert max(sizes) <= max(at_once, 48)
    check_same((losses.detach(), gradients(reader.model)), expected, 1e-10)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt-projected"])
@pytest.mark.parametrize("biased", [False, True])
def test_head_and_loss_computed_together_give_the_same(kind, biased):
    records, made = branching(), []
    for _ in range(2):
        model = random_model(kind)
        if biased:
            head = model.get_output_embeddings()
            head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features, dtype=torch.float64))
        made.append(model)
    forest = forest_of(records)
    reader = TreeModel(made[0], one_by_one="", fused_head=True)
    reader.base.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head ran by itself"))
    with Float64():
        losses = reader.losses(forest)
        (losses @ torch.from_numpy(forest.target_weights).to(losses)).backward()
        expected = separately(made[1], records)
    check_same((losses.detach(), gradients(reader.model)), expected, 1e-10)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_head_that_does_more_than_multiply_computes_by_itself(kind):
    assert not TreeModel(random_model(kind), one_by_one="", fused_head=True).fused_head


def test_the_head_runs_once_for_each_row_and_on_no_other():
    forest = forest_of(branching())
    reader, shapes = TreeModel(random_model("llama"), one_by_one=""), []
    reader.base.get_output_embeddings().register_forward_hook(lambda module, given, out: shapes.append(out.shape))
    reader.losses(forest)
    rows = len(np.unique(forest.target_rows))
    assert rows < len(forest.target_rows)
    assert shapes == [(rows, 48)]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "opt-projected"])
def test_the_logits_are_the_models(kind):
    model = random_model(kind)
    reader = TreeModel(random_model(kind), one_by_one="")
    ids = torch.tensor([[5, 3, 8, 1, 9, 30]])
    with torch.no_grad(), Float64():
        found = reader.logits(model.base_model(input_ids=ids).last_hidden_state[0])
        expected = model(input_ids=ids).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "gpt-oss"])
def test_a_model_that_read_trees_still_reads_plain_batches(kind):
    """It generates with the attention that reads trees."""
    model, reader = random_model(kind), TreeModel(random_model(kind), one_by_one="")
    if kind == "gpt-oss":
        for each in (model, reader.base):
            each.set_experts_implementation("eager")
    with torch.no_grad():
        reader.losses(forest_of(branching()))
    ids = torch.tensor([[5, 3, 8, 1, 9, 30, 2, 2], [4, 8, 1, 9, 7, 0, 0, 0]])
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.no_grad(), Float64():
        found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (reader.base, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)


def test_losses_stand_in_the_order_of_targets_whatever_is_read_in_one_go():
    """LongRoPE: short and long paths are read apart; path by path: in any order."""
    sequences = [Sequence([*range(1, 1 + n)], [1.0] * n, 1) for n in (20, 5, 16, 9)]
    sequences += [Sequence([7, *range(1, 1 + n)], [0.5] * (n + 1), 1) for n in (4, 18)]
    records = [[each] for each in sequences]
    model = random_model("phi3-longrope")
    for reason in ("", "as asked"):
        reader = TreeModel(random_model("phi3-longrope"), one_by_one=reason)
        forest = forest_of(records, shared=not reason)
        with torch.no_grad(), Float64():
            losses = reader.losses(forest)
            for number, sequence in enumerate(sequences):
                logits = logits_of(model, sequence)
                expected = cross_entropy(logits, torch.tensor(sequence.ids[1:]), reduction="none")
                torch.testing.assert_close(losses[forest.target_exchange == number], expected, rtol=1e-10, atol=0)


def test_a_loss_is_the_sum_of_weighted_losses():
    forest, reader = forest_of(branching()), TreeModel(random_model("llama"), one_by_one="")
    with torch.no_grad():
        losses = reader.losses(forest).tolist()
        total = float(supervised.loss(reader, forest)[0])
    weights = forest.target_weights.tolist()
    assert abs(total - sum(one * weight for one, weight in zip(losses, weights, strict=True))) < 1e-9 * total
    assert supervised.weight(forest) == sum(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_float32_at_least(dtype):
    for reader in (
        TreeModel(random_model("llama", dtype), one_by_one=""),
        TreeModel(random_model("llama", dtype), one_by_one="as asked"),
        TreeModel(random_model("llama", dtype), one_by_one="", bf16=True),
    ):
        losses = reader.losses(forest_of(branching()))
        assert losses.dtype == torch.float32
        assert torch.isfinite(losses).all()
