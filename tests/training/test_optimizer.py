"""AdamW's groups by name, its update against torch's plain one, the learning rate against transformers' schedules."""

import math
import warnings

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from instil.training.optimizer import adamw, learning_rate

from .tiny import gpt2, llama

LLAMA_MATRICES = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}
LLAMA_OTHERS = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
    ),
}
GPT2_MATRICES = {
    f"transformer.h.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}
GPT2_OTHERS = {
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    *(
        f"transformer.h.{layer}.{norm}.{what}"
        for layer in range(2)
        for norm in ("ln_1", "ln_2")
        for what in ("weight", "bias")
    ),
    *(name.replace("weight", "bias") for name in GPT2_MATRICES),
}


def grouped(model, optimizer) -> tuple[set[str], set[str]]:
    """The names of what decays and of what does not."""
    names = {id(each): name for name, each in model.named_parameters()}
    found: dict[bool, list[str]] = {True: [], False: []}
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
        found[group["weight_decay"] > 0] += [names[id(each)] for each in group["params"]]
    assert len(found[True]) + len(found[False]) == len({*found[True], *found[False]}), "each once"
    return set(found[True]), set(found[False])


@pytest.mark.parametrize(
    ("model", "decays", "others"),
    [
        (llama(tied=True), LLAMA_MATRICES, LLAMA_OTHERS),
        (llama(), LLAMA_MATRICES | {"lm_head.weight"}, LLAMA_OTHERS),
        (gpt2(), GPT2_MATRICES, GPT2_OTHERS),
    ],
    ids=["llama, tied", "llama, untied", "gpt2"],
)
def test_matrices_decay_and_nothing_else(model, decays, others):
    assert grouped(model, adamw(model, 1e-3, 0.1)) == (decays, others)


def test_what_is_frozen_is_left_out():
    model = llama()
    for name, each in model.named_parameters():
        each.requires_grad = name.startswith("model.layers.1.")
    decays, others = grouped(model, adamw(model, 1e-3, 0.1))
    assert decays == {name for name in LLAMA_MATRICES if name.startswith("model.layers.1.")}
    assert others == {name for name in LLAMA_OTHERS if name.startswith("model.layers.1.")}


def test_rows_of_new_tokens_do_not_decay():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [60, 61]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        model = get_peft_model(llama(tied=True), config)
    decays, others = grouped(model, adamw(model, 1e-3, 0.1))
    layers = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert decays == {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
    assert others == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"}


def test_biases_of_experts_do_not_decay():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model = GptOssForCausalLM(config)
    decays, _ = grouped(model, adamw(model, 1e-3, 0.1))
    assert not [name for name in decays if "bias" in name]


def test_updates_are_those_of_plain_adamw():
    ours, plain = gpt2().double(), gpt2().double()
    optimizer = adamw(ours, 1e-2, 0.1)
    named = dict(plain.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [named[name] for name in sorted(GPT2_MATRICES)], "weight_decay": 0.1},
            {"params": [named[name] for name in sorted(GPT2_OTHERS)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=False,
        foreach=False,
    )
    for step in range(3):
        torch.manual_seed(step)
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_cosine_by_hand():
    found = [learning_rate(step, 6, 2, 3.0, "cosine") for step in range(1, 7)]
    rising, falling = [1.0, 2.0], [3 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 0.25, 0.5, 0.75)]
    assert found == pytest.approx([*rising, *falling])
    assert [learning_rate(step, 4, 0, 1.0, "linear") for step in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(step, 3, 1, 1.0, "constant") for step in range(1, 4)] == [0.5, 1.0, 1.0]
    assert learning_rate(1, 1, 0, 1.0, "cosine") == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (20, 0), (20, 1), (20, 5), (20, 19)])
def test_schedules_are_those_of_transformers_one_step_on(schedule, steps, warmup):
    # Theirs takes its first step with a rate of 0, and its last with one above 0: ours is theirs of one step more in
    # the warm-up and in all, without that first one.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    more = {} if schedule == "constant" else {"num_training_steps": steps + 1}
    make = {
        "cosine": get_cosine_schedule_with_warmup,
        "linear": get_linear_schedule_with_warmup,
        "constant": get_constant_schedule_with_warmup,
    }[schedule]
    scheduler = make(optimizer, num_warmup_steps=warmup + 1, **more)
    expected = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert [learning_rate(step, steps, warmup, 3e-4, schedule) for step in range(1, steps + 1)] == pytest.approx(
        expected
    )
