"""Trees against separate sequences through the unmodified model: the same losses and the same gradients."""

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instil.model.forward import TreeModel
from instil.objectives import supervised
from instil.packing import concatenate

from .forests import (
    KINDS,
    VOCABULARY,
    Float64,
    Sequence,
    branching,
    check_same,
    forest_of,
    gradients,
    random_model,
    separately,
    tree_of,
)

PATH_BY_PATH = {"bloom"}
EXPERTS = {"gpt-oss", "mixtral"}  # whose products know no float64, unless each expert is computed by itself

FLOAT64 = 1e-10
ROUNDED = {
    # What each model itself rounds to float32 with `eager` attention, the reference; `Float64` keeps it from that.
    **dict.fromkeys(KINDS, 4e-6),  # the norms, the softmax of the attention
    "gpt-neox": 1e-6,  # the softmax
    "opt": 1e-6,  # the softmax
    "opt-projected": 1e-6,  # the softmax
    "gpt-bigcode": 1e-6,  # the softmax
    "starcoder2": 1e-6,  # the softmax
    "granite": 2e-6,
    "cohere": 2e-6,
    "gptj": 1e-6,  # the scores
    "bloom": 1e-6,  # the softmax
    "gpt2": FLOAT64,  # nothing
}


@cache
def reader_of(kind, **changes):
    return TreeModel(random_model(kind, **changes))


def by_trees(reader, batches):
    """The losses of all targets, and the gradients of their weighted sum."""
    reader.model.zero_grad()
    losses = []
    for batch in batches:
        supervised.loss(reader, batch)[0].backward()
        with torch.no_grad():
            losses.append(reader.losses(batch))
    return torch.cat(losses), gradients(reader.model)


def test_the_forest_of_these_tests_branches_in_every_way():
    records = branching()
    forest = forest_of(records)
    assert forest.unshared == sum(len(each.ids) - 1 for sequences in records for each in sequences)
    assert forest.size < forest.unshared / 2
    rows, counts = np.unique(forest.target_rows, return_counts=True)
    assert counts.max() >= 3
    at = forest.target_rows == rows[counts.argmax()]
    assert 1 < len(set(forest.target_ids[at].tolist())) < at.sum()  # other targets, and the same one twice
    assert len(set(forest.target_weights.tolist())) >= 5
    assert (forest.position_ids != np.arange(forest.size)).any()
    assert min(forest.path_lengths) < 12 < max(forest.path_lengths)  # both regimes of LongRoPE


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - EXPERTS))
def test_trees_equal_separate_sequences(kind):
    records, reader = branching(), reader_of(kind)
    assert bool(reader.one_by_one) == (kind in PATH_BY_PATH), reader.one_by_one
    with Float64():
        check_same(by_trees(reader, [forest_of(records)]), separately(random_model(kind), records), FLOAT64)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - EXPERTS))
def test_trees_equal_separate_sequences_where_models_round(kind):
    records = branching()
    found = by_trees(reader_of(kind), [forest_of(records)])
    check_same(found, separately(random_model(kind), records), ROUNDED[kind])


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_trees_of_experts_equal_separate_sequences_in_float32(kind):
    records, model = branching(), random_model(kind, torch.float32)
    reader = TreeModel(random_model(kind, torch.float32))
    assert not reader.one_by_one
    check_same(by_trees(reader, [forest_of(records)]), separately(model, records), 2e-5)


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_trees_of_experts_equal_separate_sequences(kind):
    records, model = branching(), random_model(kind)
    reader = TreeModel(random_model(kind), one_by_one="")
    for each in (model, reader.base):
        each.set_experts_implementation("eager")
    with Float64():
        check_same(by_trees(reader, [forest_of(records)]), separately(model, records), FLOAT64)


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mistral", "phi3-longrope", "qwen3"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_more_trees_equal_separate_sequences(kind, seed):
    records = branching(seed=seed)
    with Float64():
        found = by_trees(reader_of(kind), [forest_of(records)])
        check_same(found, separately(random_model(kind), records), FLOAT64)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_paths_packed_without_sharing_equal_separate_sequences(kind):
    records = branching()
    with Float64():
        found = by_trees(reader_of(kind), [forest_of(records, shared=False)])
        check_same(found, separately(random_model(kind), records), FLOAT64)


def test_a_path_in_both_regimes_of_longrope_equals_separate_sequences():
    """A turn that ends within the original context and the turn after it, beyond: one path, two rotations."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1, VOCABULARY, 20).tolist()
    records = [[Sequence(ids[:10], [0.0] * 5 + [1.0] * 5, 5), Sequence(ids, [0.0] * 15 + [1.0] * 5, 15)]]
    with Float64():
        expected = separately(random_model("phi3-longrope"), records)
        check_same(by_trees(reader_of("phi3-longrope"), [forest_of(records)]), expected, FLOAT64)


def test_dynamic_rope_follows_each_path_and_not_those_before():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    changes = {"max_position_embeddings": 12, "rope_parameters": rope}
    records = branching()
    reader = TreeModel(random_model("qwen3", **changes))
    with Float64():
        apart = [separately(random_model("qwen3", **changes), [[each]])[0] for r in records for each in r]
        for _ in range(2):  # the model remembers the longest path it met
            with torch.no_grad():
                torch.testing.assert_close(reader.losses(forest_of(records)), torch.cat(apart), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["llama", "phi3-longrope"])
def test_a_model_told_to_read_path_by_path_equals_separate_sequences(kind):
    records = branching()
    with Float64():
        found = by_trees(TreeModel(random_model(kind), one_by_one="as asked"), [forest_of(records)])
        check_same(found, separately(random_model(kind), records), FLOAT64)


@pytest.mark.prove
@given(data=st.data())
def test_any_micro_batches_give_the_same_step(data):
    records, reader = branching(), reader_of("gemma2")
    trees = [tree_of(sequences, number) for number, sequences in enumerate(records)]
    order = data.draw(st.permutations(range(len(trees))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(trees) - 1))))
    batches = [
        forest_of([records[each] for each in part])
        if data.draw(st.booleans())
        else concatenate([trees[i] for i in part])
        for part in np.split(np.array(order), cuts)
    ]
    with Float64():
        _, expected = whole_step()
        summed = sum(supervised.loss(reader, batch)[0].item() for batch in batches)
        _, grads = by_trees(reader, batches)
    assert sum(supervised.weight(batch) for batch in batches) == supervised.weight(forest_of(records))
    total, expected_grads = expected
    check_same((torch.tensor([summed]), grads), (torch.tensor([total]), expected_grads), FLOAT64)


@cache
def whole_step():
    records, model = branching(), random_model("gemma2")
    with Float64():
        losses, grads = separately(model, records)
    weights = [each.weights[at] for sequences in records for each in sequences for at in each.targets]
    return losses, (float(losses @ torch.tensor(weights, dtype=losses.dtype)), grads)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "phi3-longrope", "gpt2", "opt"])
def test_activation_checkpointing_changes_nothing(kind):
    records, model = branching(), random_model(kind, **without_dropout(kind))
    reader = TreeModel(random_model(kind, **without_dropout(kind)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # both have new names, which older versions do not know
        reader.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert reader.model.is_gradient_checkpointing
    reader.model.train()
    with torch.no_grad():
        losses = reader.losses(forest_of(records))
    found = by_trees(reader, [forest_of(records)])
    check_same(found, separately(model, records), ROUNDED[kind])  # what is computed again escapes `Float64`
    torch.testing.assert_close(found[0], losses, rtol=0, atol=0)


def without_dropout(kind):
    if kind == "gpt2":
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {"dropout": 0.0} if kind == "opt" else {}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3-longrope", "gpt2", "bloom"])
def test_adapters_read_trees_and_only_they_learn(kind):
    records, (expected, model) = branching(), (adapted(kind), adapted(kind))
    reader = TreeModel(model)
    assert bool(reader.one_by_one) == (kind in PATH_BY_PATH)
    with Float64():
        found = by_trees(reader, [forest_of(records)])
        check_same(found, separately(expected, records), FLOAT64)
    assert found[1]
    assert all("lora_" in name for name in found[1])
    assert len(found[1]) == sum("lora_" in name for name, _ in model.named_parameters())


def adapted(kind):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(random_model(kind), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins at 0, and then no gradient reaches the others
                torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def relative_error(grads, truth):
    off = sum(float((grads[name].double() - each).square().sum()) for name, each in truth.items())
    return (off / sum(float(each.square().sum()) for each in truth.values())) ** 0.5


class Autocast:
    """An unmodified model over float32 weights, its products in bf16."""

    def __init__(self, model):
        self.model, self.device = model, model.device
        self.zero_grad, self.named_parameters = model.zero_grad, model.named_parameters

    def __call__(self, **arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**arguments)


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [
        ("llama", 3),
        *(pytest.param(kind, 12, marks=pytest.mark.prove) for kind in ("gemma2", "gpt2", "mistral", "qwen3")),
    ],
)
def test_the_gradient_of_72_branches_in_bf16_is_as_near_the_truth_as_that_of_72_sequences(kind, seeds):
    """Rounding is chance: one prompt's gradient may be nearer either way, that of several is not."""
    errors = []
    reader = TreeModel(random_model(kind, torch.float32), bf16=True)
    for seed in range(seeds):
        records = branches_of_one_prompt(72, seed)
        with Float64():
            _, truth = separately(random_model(kind), records)
        _, apart = separately(Autocast(random_model(kind, torch.float32)), records)
        _, together = by_trees(reader, [forest_of(records)])
        assert all(each.dtype == torch.float32 for each in together.values())
        errors.append([relative_error(together, truth), relative_error(apart, truth)])
    tree, limit = np.sqrt(np.mean(np.square(errors), 0))
    assert 1e-3 < limit < 5e-2
    assert tree <= 1.1 * limit


def branches_of_one_prompt(count, seed):
    draw = np.random.default_rng(seed)
    prompt = draw.integers(1, VOCABULARY, 24).tolist()
    answers = [draw.integers(1, VOCABULARY, 6).tolist() for _ in range(count)]
    return [[Sequence([*prompt, *answer], [0.0] * 24 + [1.0] * 6, 24)] for answer in answers]
