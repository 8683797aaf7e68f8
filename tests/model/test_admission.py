"""Models that read trees rightly are admitted, others refused, with the reason; and those train as exactly."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from instil.model.admission import tiny_model
from instil.model.forward import TreeModel

from .forests import KINDS, VOCABULARY, Float64, branching, check_same, forest_of, gradients, random_model, separately
from .forests import shaken as shake


def of_class(kind, changes=None):
    """A random model of a subclass of Llama."""
    config = random_model("llama").config
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(kind(config)).double().eval()


def admitted(model):
    """Why it is not; "" if it is."""
    return TreeModel(model).one_by_one


class ByRows(nn.Module):  # transformers lets no model choose its attention whose file has an `Attention(nn.Module)`
    """Attention that is causal by rows, and knows of no interface."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **others):
        inner, size = self.inner, hidden_states.shape[1]
        projections = (inner.q_proj, inner.k_proj, inner.v_proj)
        query, key, value = (
            each(hidden_states).view(1, size, -1, inner.head_dim).transpose(1, 2) for each in projections
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (each.repeat_interleave(inner.num_key_value_groups, 1) for each in (key, value))
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
        weights = (query @ key.mT * inner.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        return inner.o_proj((weights @ value).transpose(1, 2).reshape(1, size, -1)), None


class LlamaOfRows(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = ByRows(layer.self_attn)


class TalkativeAttention(modeling_llama.LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, slopes=torch.ones(1), **kwargs)


class TalkativeLlama(LlamaForCausalLM):
    """Hands its attention what would matter if it were heard."""

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = TalkativeAttention(config, number)


class LlamaOfRowPositions(LlamaForCausalLM):
    """Counts positions itself, whatever it is told."""

    def __init__(self, config):
        super().__init__(config)
        own = self.model.rotary_emb.forward
        self.model.rotary_emb.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None])


class LlamaOfScaledLogits(LlamaForCausalLM):
    """Does with its logits what no configuration says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.5 * out.logits
        return out


class LlamaOfCappedLogits(LlamaForCausalLM):
    """Caps its logits, as a configuration says in other words than those known."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class LlamaOfNeighbours(LlamaForCausalLM):
    """Looks at the row before, as a convolution or a recurrent state does."""

    def __init__(self, config):
        super().__init__(config)

        def mix(module, given, out):
            return out + 0.5 * torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)

        self.model.embed_tokens.register_forward_hook(mix)


class LlamaThatFails(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)

        def fail(module, arguments, given):
            if given.get("layout") is not None:
                raise ValueError("no trees,\nplease")

        self.model.register_forward_pre_hook(fail, with_kwargs=True)


class LlamaThatCannotBeMadeSmall(LlamaForCausalLM):
    def __init__(self, config):
        if config.vocab_size > VOCABULARY:
            raise RuntimeError("its vocabulary is part of it")
        super().__init__(config)


REFUSED = {
    LlamaOfRows: "on a tree its ",
    TalkativeLlama: "it hands its attention what is not known here: slopes",
    LlamaOfRowPositions: "on a tree its ",
    LlamaOfScaledLogits: "on a tree its loss is off by ",
    LlamaOfCappedLogits: "on a tree its ",
    LlamaOfNeighbours: "on a tree its ",
    LlamaThatFails: "it fails on a tree: no trees,",
    LlamaThatCannotBeMadeSmall: "no small model of its kind could be made to try it on: its vocabulary is part of it",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_model_is_refused_with_the_reason(kind):
    reason = admitted(of_class(kind))
    assert reason.startswith(REFUSED[kind])
    assert "\n" not in reason


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_model_reads_path_by_path_exactly(kind):
    records, reader = branching(), TreeModel(of_class(kind))
    assert reader.one_by_one
    assert reader.base.config._attn_implementation == "eager"  # as it came
    forest = forest_of(records)
    with Float64():
        losses = reader.losses(forest)
        (losses @ torch.from_numpy(forest.target_weights).to(losses)).backward()
        check_same((losses.detach(), gradients(reader.model)), separately(of_class(kind), records), 1e-10)


def mamba():
    return shake(
        MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))
    )


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: random_model("bloom"), "on a tree its "),
        (mamba, "no small model of its kind could be made"),
    ],
    ids=["bloom", "mamba"],
)
def test_models_whose_attention_is_their_own_are_refused_and_exact(made, reason):
    records, model = branching(), made().double().eval()
    reader = TreeModel(model)
    assert reader.one_by_one.startswith(reason)
    with torch.no_grad(), Float64():
        losses = reader.losses(forest_of(records))
    with Float64():
        expected, _ = separately(model, records)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"bloom"}))
def test_models_that_read_trees_are_admitted(kind):
    assert admitted(random_model(kind, torch.float32)) == ""


def test_admission_leaves_the_model_and_the_dice_alone():
    model = random_model("gemma2", torch.float32)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    configured = model.config.to_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert admitted(model) == ""
    assert torch.equal(torch.rand(3), expected)
    assert model.config.to_dict() == configured
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


def test_the_small_model_is_of_the_same_kind():
    model = random_model(
        "gemma2", torch.bfloat16, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"]
    )
    tiny = tiny_model(model)
    assert type(tiny) is type(model)
    assert all(each.dtype == torch.float64 for each in tiny.parameters())
    assert set(tiny.config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny.config.attn_logit_softcapping == model.config.attn_logit_softcapping
    assert tiny.config.head_dim == model.config.head_dim
    assert tiny.config.num_key_value_heads < tiny.config.num_attention_heads
    assert model.config.num_hidden_layers == 6
