"""LoRA: what trains and what stays, bit for bit."""

import pytest
import torch

from instil.errors import ModelError
from instil.model.adapter import add_lora, trained_parameters
from instil.model.options import ModelOptions
from instil.model.tokens import reserve_tokens

from .conftest import KINDS, WORDS, fresh_tokenizer, logits_of, random_model

LORA = ModelOptions(adapter="lora", lora_rank=2)
IDS = torch.tensor([[5, WORDS, 7, WORDS + 1, 9, 10]])


def with_tokens(kind, options=LORA, seed=0):
    model = random_model(kind)
    growth = reserve_tokens(model, fresh_tokenizer(["<a>", "<b>"]), {"<a>": "the end of a turn"})
    return add_lora(model, options, growth.ids, seed=seed), growth


def train(model, steps=2):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    model.train()
    torch.manual_seed(0)  # GPT-2 has dropout
    for _ in range(steps):
        logits = model(IDS).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def rows_of(model):
    """The embedding and the head as the model computes with them, and the head's bias."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    width = base.config.hidden_size
    with torch.no_grad():
        bias = head(torch.zeros(1, width))[0]  # (V,)
        # one row of the identity at a time: the head applied to it, less the bias, is a column of its matrix
        matrix = (head(torch.eye(width)) - bias).T  # (V, D)
        embedding = base.get_input_embeddings()(torch.arange(len(matrix)))  # (V, D)
    return embedding, matrix, bias


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_additions_and_the_new_rows_train(kind):
    untouched = random_model(kind)
    reserve_tokens(untouched, fresh_tokenizer(["<a>", "<b>"]), {"<a>": "the end of a turn"})
    model, growth = with_tokens(kind)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(untouched, IDS), rtol=0, atol=1e-6)
    before = rows_of(model)
    frozen = {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}
    learned = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    train(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(not torch.equal(now[name], value) for name, value in learned.items())
    new = torch.zeros(growth.rows_after, dtype=torch.bool)
    new[list(growth.ids)] = True
    for old, after in zip(before[:2], rows_of(model)[:2], strict=True):
        assert torch.equal(old[~new], after[~new])
        assert (old[new] != after[new]).any(-1).all()
    bias = untouched.get_output_embeddings().bias
    assert torch.equal(rows_of(model)[2], torch.zeros(growth.rows_after) if bias is None else bias.detach())
    embedding, head, _ = rows_of(model)
    if untouched.config.tie_word_embeddings:
        torch.testing.assert_close(embedding, head, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"mixtral"}))
@pytest.mark.parametrize("changes", [{}, {"rslora": True, "lora_alpha": 3.0}, {"dora": True}])
def test_merged_equals_unmerged(kind, changes):
    model, _ = with_tokens(kind, LORA.model_copy(update=changes))
    train(model)
    expected = logits_of(model, IDS)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, IDS), expected, rtol=0, atol=1e-5)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == merged.config.tie_word_embeddings


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    def scale(**changes):
        model = add_lora(random_model("llama"), ModelOptions(lora_rank=16, **changes))
        return model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling["default"]

    assert scale() == 2.0
    assert scale(lora_alpha=4.0) == 0.25
    assert scale(rslora=True) == 8.0
    assert scale(rslora=True, lora_alpha=4.0) == 1.0


def test_the_counts_are_those_of_the_shapes():
    model = random_model("llama")
    every = sum(each.numel() for each in model.parameters())
    assert trained_parameters(model) == (every, every)
    # per layer: q, k, v, o (64 by 64) and gate, up, down (64 by 128), two of rank 2 on each
    added = 2 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert trained_parameters(add_lora(model, LORA)) == (added, every + added)
    rows = 2 * 2 * 64  # of two new tokens in embedding and head
    grown, growth = with_tokens("llama")
    assert trained_parameters(grown) == (added + rows, every + rows + added + rows)
    assert growth.grown


def test_targets_are_layers_by_name():
    model = add_lora(random_model("llama"), LORA.model_copy(update={"lora_targets": ["q_proj", "mlp.up_proj"]}))
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    layers = {name.split(".lora_")[0].split("layers.")[1] for name in trained}
    assert layers == {f"{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("llama", ["q_prj"], "Did you mean 'q_proj'?"),
        ("gpt2", ["c_atn"], "Did you mean 'c_attn'?"),
        ("gpt2", ["xyz"], "Known: all-linear, c_attn, c_fc, c_proj"),
        ("llama", ["lm_head"], "no linear layer below the head"),
        ("llama", ["embed_tokens"], "no linear layer below the head"),
        ("llama", ["all-linear", "q_proj"], "stands alone"),
    ],
)
def test_a_target_that_is_not_there(kind, targets, said):
    with pytest.raises(ModelError) as caught:
        add_lora(random_model(kind), LORA.model_copy(update={"lora_targets": targets}))
    assert said in str(caught.value)


def test_experts_take_no_dropout_and_no_dora():
    for changes in ({"dora": True}, {"lora_dropout": 0.1}):
        with pytest.raises(ModelError, match="MixtralForCausalLM cannot have this adapter") as caught:
            add_lora(random_model("mixtral"), LORA.model_copy(update=changes))
        assert "--lora-dropout" in str(caught.value)


def test_what_trains_is_float32_on_a_base_in_bf16():
    model = random_model("llama").to(torch.bfloat16)
    growth = reserve_tokens(model, fresh_tokenizer(["<a>"]), {})
    adapted = add_lora(model, LORA, growth.ids)
    assert {each.dtype for each in adapted.parameters() if each.requires_grad} == {torch.float32}
    assert {each.dtype for each in adapted.parameters() if not each.requires_grad} == {torch.bfloat16}


def test_a_kept_adapter_takes_no_other():
    model = add_lora(random_model("llama"), LORA)
    with pytest.raises(ModelError, match="--base-adapter merge"):
        add_lora(model, LORA)


def test_the_additions_follow_from_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    models = []
    for seed in (0, 0, 1):
        base = random_model("gpt2")
        torch.manual_seed(3)
        models.append(add_lora(base, LORA, seed=seed))
        assert torch.equal(torch.rand(2), expected)
    first, same, other = (dict(model.named_parameters()) for model in models)
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert all(torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name]) for name in drawn)
