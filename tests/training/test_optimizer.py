"""Groups by name, updates against torch's and transformers' plain ones, states there and back, the learning rate."""

import math
import sys
import warnings
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.optimization import Adafactor

from instil.errors import TrainingError, UsageError
from instil.training.loop import fit
from instil.training.optimizer import (
    begun_state,
    check_installed,
    learning_rate,
    make_optimizers,
    state_bytes,
    state_tensors,
    take_step,
)
from instil.training.options import OptimizerName, TrainOptions

from .tiny import furthest, gpt2, llama, make_rows, reader, trees_of, weights_of

NAMES = get_args(OptimizerName)

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


@pytest.fixture(autouse=True)
def uncompiled():
    """What torchao compiles, which takes a minute, computes the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def grouped(model, name="adamw") -> tuple[set[str], set[str]]:
    """The names of what decays and of what does not."""
    names = named(model)
    found: dict[bool, list[str]] = {True: [], False: []}
    for optimizer in make_optimizers(name, model, 1e-3, 0.1):
        for group in optimizer.param_groups:
            assert group["weight_decay"] in (0.0, 0.1)
            found[group["weight_decay"] > 0] += [names[each] for each in group["params"]]
    assert len(found[True]) + len(found[False]) == len({*found[True], *found[False]}), "each once"
    return set(found[True]), set(found[False])


def load_state(optimizers, names, tensors):
    """As a checkpoint does: the state is made, and filled."""
    kinds = {name: (each.dtype, each.shape) for name, each in tensors.items()}
    for name, each in begun_state(optimizers, names, kinds).items():
        each.copy_(tensors[name])


def named(model) -> dict[torch.nn.Parameter, str]:
    return {each: name for name, each in model.named_parameters()}


def with_gradients(model, step=0, scale=1.0):
    """The same gradients for models of the same class."""
    torch.manual_seed(step)
    for each in model.parameters():
        each.grad = scale * torch.randn_like(each)
    return model


def square(*args, **kwargs):
    """A Llama with a matrix that torchao keeps in 8 bits."""
    model = llama(*args, **kwargs)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (torch.nn.Linear(*of) for of in ((32, 128), (32, 128), (128, 32)))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("model", "decays", "others"),
    [
        (llama(tied=True), LLAMA_MATRICES, LLAMA_OTHERS),
        (llama(), LLAMA_MATRICES | {"lm_head.weight"}, LLAMA_OTHERS),
        (gpt2(), GPT2_MATRICES, GPT2_OTHERS),
    ],
    ids=["llama, tied", "llama, untied", "gpt2"],
)
def test_matrices_decay_and_nothing_else(name, model, decays, others):
    assert grouped(model, name) == (decays, others)


def test_what_is_frozen_is_left_out():
    model = llama()
    for name, each in model.named_parameters():
        each.requires_grad = name.startswith("model.layers.1.")
    decays, others = grouped(model)
    assert decays == {name for name in LLAMA_MATRICES if name.startswith("model.layers.1.")}
    assert others == {name for name in LLAMA_OTHERS if name.startswith("model.layers.1.")}


def test_rows_of_new_tokens_do_not_decay():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [60, 61]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        model = get_peft_model(llama(tied=True), config)
    decays, others = grouped(model)
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
    decays, _ = grouped(model)
    assert not [name for name in decays if "bias" in name]


def test_updates_are_those_of_plain_adamw():
    ours, plain = gpt2().double(), gpt2().double()
    optimizers = make_optimizers("adamw", ours, 1e-2, 0.1)
    parameters = dict(plain.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in sorted(GPT2_MATRICES)], "weight_decay": 0.1},
            {"params": [parameters[name] for name in sorted(GPT2_OTHERS)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=False,
        foreach=False,
    )
    for step in range(3):
        with_gradients(ours, step)
        with_gradients(plain, step)
        take_step(optimizers, 1e-2)
        reference.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_muon_takes_the_hidden_matrices_and_adamw_all_else():
    for model, hidden in ((llama(), LLAMA_MATRICES), (llama(tied=True), LLAMA_MATRICES), (gpt2(), GPT2_MATRICES)):
        names = named(model)
        muon, adamw = make_optimizers("muon", model, 1e-3, 0.1)
        taken = [{names[each] for group in of.param_groups for each in group["params"]} for of in (muon, adamw)]
        assert taken == [hidden, set(names.values()) - hidden]
        assert isinstance(adamw, torch.optim.AdamW)


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw():
    before, model = weights_of(llama()), llama()
    take_step(make_optimizers("muon", with_gradients(model), 1.0, 0.0), 1e-2)
    for name in LLAMA_MATRICES:
        moved = (before[name] - model.get_parameter(name)).detach()
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.2), name
        lengths = torch.linalg.svdvals(moved) / (1e-2 * 0.2 * max(moved.shape) ** 0.5)
        assert lengths.max() < 1.3
        assert lengths.min() > (0.6 if moved.shape[0] != moved.shape[1] else 0.3), "five iterations bring them near 1"


def test_an_adapter_has_no_matrix_for_muon():
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match=r"muon: PeftModel has no whole matrix(?s:.)*--optimizer adamw"):
        make_optimizers("muon", model, 1e-3, 0.0)
    assert len(make_optimizers("adafactor", model, 1e-3, 0.0)) == 1


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["large gradients", "small gradients"])
def test_adafactor_is_that_of_transformers_without_its_scale(scale):
    ours, theirs = llama(), llama()
    groups = [
        {"params": [theirs.get_parameter(name) for name in sorted(LLAMA_MATRICES | {"lm_head.weight"})]},
        {"params": [theirs.get_parameter(name) for name in sorted(LLAMA_OTHERS)], "weight_decay": 0.0},
    ]
    rate = 1e-3
    reference = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False, weight_decay=0.1)
    optimizers = make_optimizers("adafactor", ours, rate, 0.1)
    for step in range(4):
        with_gradients(theirs, step, scale)
        reference.step()
        with_gradients(ours, step, scale)
        take_step(optimizers, rate)
    assert furthest(weights_of(ours), weights_of(theirs)) < 5e-6
    assert furthest(weights_of(ours), weights_of(llama())) > 2e-3


def test_adafactor_does_not_move_what_has_a_gradient_of_zero():
    model = llama()
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    take_step(make_optimizers("adafactor", model, 1e-2, 0.0), 1e-2)
    assert furthest(weights_of(model), weights_of(llama())) == 0


def test_adamw_in_8_bits_is_adamw_nearly():
    ours, plain = square(), square()
    plain.load_state_dict(ours.state_dict())
    before = weights_of(ours)
    both = [(ours, make_optimizers("adamw-8bit", ours, 1.0, 0.1)), (plain, make_optimizers("adamw", plain, 1.0, 0.1))]
    for step in range(4):
        for model, optimizers in both:
            with_gradients(model, step % 2)
            take_step(optimizers, 1e-3)
    kept = state_tensors(both[0][1], named(ours))
    gate, norm = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"
    assert kept[f"{gate}.exp_avg.codes"].dtype == torch.uint8
    assert kept[f"{norm}.exp_avg"].dtype == torch.float32
    found, expected = weights_of(ours), weights_of(plain)
    assert torch.allclose(found[norm], expected[norm], atol=1e-6), "what is small is exact"
    far = (found[gate] - expected[gate]).norm() / (expected[gate] - before[gate]).norm()
    assert 1e-4 < far < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path, name):
    def steps(model, optimizers, numbers):
        for step in numbers:
            with_gradients(model, step)
            model.model.layers[1].mlp.up_proj.weight.grad = None if step < 3 else torch.ones(48, 32)  # begins late
            take_step(optimizers, 1e-3 * (step + 1))
        return {key: value.clone() for key, value in state_tensors(optimizers, named(model)).items()}

    torch.manual_seed(0)
    model = square()
    optimizers = make_optimizers(name, model, 1.0, 0.1)
    saved = steps(model, optimizers, range(3))
    weights = weights_of(model)
    save_file(saved, tmp_path / "state.safetensors")
    expected = steps(model, optimizers, range(3, 6))

    restored = square()
    restored.load_state_dict(weights, strict=True)
    others = make_optimizers(name, restored, 1.0, 0.1)
    load_state(others, named(restored), load_file(tmp_path / "state.safetensors"))
    assert furthest(weights_of(restored), weights) == 0, "to load changes no weight"
    loaded = state_tensors(others, named(restored))
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    found = steps(restored, others, range(3, 6))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert furthest(weights_of(restored), weights_of(model)) == 0
    assert furthest(weights_of(restored), weights) > 1e-3


def test_the_state_of_other_parameters_is_refused():
    model = llama()
    optimizers = make_optimizers("adamw", with_gradients(model), 1e-3, 0.0)
    take_step(optimizers, 1e-3)
    saved = state_tensors(optimizers, named(model))

    def load(tensors, name="adamw"):
        load_state(make_optimizers(name, model, 1e-3, 0.0), named(model), tensors)

    load(saved)
    one = "model.norm.weight.exp_avg"
    with pytest.raises(TrainingError, match=rf"does not fit: {one} is missing\n"):
        load({key: value for key, value in saved.items() if key != one})
    with pytest.raises(TrainingError, match=r"does not fit: model\.other\.step belongs to nothing\n"):
        load({**saved, "model.other.step": torch.tensor(1.0)})
    with pytest.raises(TrainingError, match=rf"{one} is torch.float32 \(31,\), not torch.float32 \(32,\)"):
        load({**saved, one: saved[one][1:]})
    with pytest.raises(TrainingError, match=rf"{one} is torch.float64"):
        load({**saved, one: saved[one].double()})
    with pytest.raises(TrainingError, match=r"momentum_buffer is missing, and 53 more\n"):
        load(saved, "muon")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_state_takes_is_known_before(name):
    for model in (square(), gpt2()):
        list(model.parameters())[-1].requires_grad = False
        optimizers = make_optimizers(name, with_gradients(model), 1e-3, 0.0)
        take_step(optimizers, 1e-3)
        assert state_bytes(name, model) == sum(each.nbytes for each in state_tensors(optimizers, named(model)).values())


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name):
    model = llama()
    options = TrainOptions(optimizer=name, tokens_per_step=300, max_steps=20, learning_rate=1e-2, warmup=0.0)
    outcome = fit(reader(model), trees_of(make_rows(20)), options, tokens_per_batch=150)
    assert outcome.history[-1].loss < 0.75 * outcome.history[0].loss


def test_a_name_that_is_no_optimizer():
    with pytest.raises(UsageError, match=r"--optimizer adamw8bit(?s:.)*did you mean 'adamw-8bit'"):
        make_optimizers("adamw8bit", llama(), 1e-3, 0.0)


def test_without_torchao_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"torchao\n  pip install 'instil\[optim\]'"):
        check_installed("adamw-8bit")
    check_installed("adamw")


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
