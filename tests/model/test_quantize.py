"""The base in 4 bits: its bits, what it computes, what trains on it, and what is saved of it."""

import json

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2MoeConfig
from transformers.pytorch_utils import Conv1D

from instil.errors import ModelError
from instil.model.adapter import add_lora, trained_parameters
from instil.model.forward import TreeModel
from instil.model.load import load_model
from instil.model.options import ModelOptions
from instil.model.quantize import count_parameters, dequantize, describe, quantize, quantized_layers
from instil.model.save import merged, save_model
from instil.model.tokens import reserve_tokens

from . import forests
from .conftest import CONFIGS, KINDS, fresh_tokenizer, logits_of, random_model
from .test_adapter import IDS, LORA, rows_of, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module:RuntimeWarning"),  # of peft, on experts
]
NEW = ["<a>", "<b>"]
QLORA = LORA.model_copy(update={"quantize": "nf4"})
PLAIN = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)

# The quantiles of the normal distribution: QLoRA, arXiv:2305.14314, appendix E.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def plainly_loaded(folder):
    """What transformers and bitsandbytes make of it, but for a kernel that rounds to bf16 where the processor can."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PLAIN, dtype=torch.float32)
    for _, layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
    return model


def tuned(folder, options=QLORA):
    """A quantized model from a folder, with new tokens and an adapter, a little trained."""
    model = load_model(options.model_copy(update={"model": str(folder)}))
    growth = reserve_tokens(model, fresh_tokenizer(NEW), {"<a>": "the end of a turn"})
    model = add_lora(model, options, growth.ids)
    train(model)
    return model, growth


def bits(model):
    """All that a quantized layer holds: packed weights, and the scales in their two stages."""
    found = {}
    for name, layer in quantized_layers(model):
        state = layer.weight.quant_state
        found[name] = [layer.weight.data, state.absmax, state.state2.absmax, state.offset]
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert one
    for name, parts in one.items():
        assert all(torch.equal(part, same) for part, same in zip(parts, other[name], strict=True)), name


def weights_of(layer):
    """(O, I): what bitsandbytes itself makes of the packed weights."""
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_weights_are_the_nearest_levels_of_normal_float_in_blocks_of_64():
    model = random_model("llama")
    original = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model)
    gap = float(LEVELS.diff().max()) / 2
    for name, layer in quantized_layers(model):
        blocks = original[f"{name}.weight"].view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)  # (blocks, 1)
        nearest = (blocks / scales).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
        packed = layer.weight.data.view(-1)
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, 64)
        assert torch.equal(codes.long(), nearest)
        restored = weights_of(layer).view(-1, 64)
        held = restored.abs().amax(1, keepdim=True)  # the scales, from 8 bits
        torch.testing.assert_close(held, scales, rtol=0.02, atol=0)
        torch.testing.assert_close(restored, LEVELS[nearest] * held, rtol=1e-5, atol=1e-7)
        assert (restored - blocks).abs().le((gap + 0.02) * scales).all()
        assert not torch.equal(restored, blocks)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_layer_computes_with_its_dequantized_weight(kind):
    """Forward, and the gradient of what goes in; qwen2 has biases, gpt2 holds its weights transposed."""
    plain, model = random_model(kind), quantize(random_model(kind))
    for name, layer in quantized_layers(model):
        weight = weights_of(layer)
        assert weight.shape == (layer.out_features, layer.in_features)
        original = plain.get_submodule(name)
        error = weight - (original.weight.T if isinstance(original, Conv1D) else original.weight)
        assert 0.02 < error.std() / original.weight.std() < 0.15
        if original.bias is not None:
            assert torch.equal(layer.bias, original.bias)
        given = torch.randn(5, layer.in_features, requires_grad=True)
        again = given.detach().clone().requires_grad_()
        found = layer(given)
        expected = again @ weight.T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        out = torch.randn_like(found)
        found.backward(out)
        expected.backward(out)
        torch.testing.assert_close(given.grad, again.grad, rtol=1e-5, atol=1e-6)


def test_in_bf16_a_layer_computes_in_bf16_whatever_it_is_given():
    model = quantize(random_model("llama").to(torch.bfloat16))
    _, layer = quantized_layers(model)[0]
    given = torch.randn(3, layer.in_features)
    assert weights_of(layer).dtype == torch.bfloat16
    found = layer(given)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.nn.functional.linear(given.bfloat16(), weights_of(layer)))


def test_the_same_base_gives_the_same_bits(saved):
    folder = saved("qwen2")
    one, other = (load_model(QLORA.model_copy(update={"model": str(folder)})) for _ in range(2))
    assert_same_bits(bits(one), bits(other))
    plain = plainly_loaded(folder)
    assert_same_bits(bits(one), bits(plain))
    assert torch.equal(logits_of(one), logits_of(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantized_and_what_is_not_is_counted(kind):
    plain, model = random_model(kind), quantize(random_model(kind))
    layers = dict(quantized_layers(model))
    adapted = add_lora(random_model(kind), LORA)
    targets = {
        name.removeprefix("base_model.model.")
        for name, each in adapted.named_modules()
        if isinstance(each, peft.tuners.lora.Linear)
    }
    assert layers.keys() == targets
    assert count_parameters(model) == sum(each.numel() for each in plain.parameters())
    rest = {name: each for name, each in plain.named_parameters() if name.removesuffix(".weight") not in layers}
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], each) for name, each in rest.items())
    packed = [each.weight for each in layers.values()]
    of_layers = count_parameters(model) - sum(each.numel() for each in rest.values())
    assert sum(each.numel() * each.element_size() for each in packed) == of_layers // 2
    said = describe(add_lora(model, LORA))
    assert f"{len(layers)} layers with {of_layers:,} weights" in said
    assert describe(adapted) == ""
    if kind == "mixtral":
        assert "MixtralExperts 196,608" in said
        assert "MixtralTopKRouter 512" in said


def test_routers_and_gates_stay():
    """Of these models the gate of the shared expert is a linear layer with one output."""
    config = Qwen2MoeConfig(
        **{**CONFIGS["llama"]().to_dict(), "model_type": "qwen2_moe", "architectures": None},
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    model = quantize(AutoModelForCausalLM.from_config(config))
    names = {name.rpartition(".")[2] for name, _ in quantized_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.model.layers[0].mlp.shared_expert_gate) is torch.nn.Linear


def test_a_model_without_linear_layers_is_refused():
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
    )
    with pytest.raises(ModelError, match="no linear layer that could be quantized"):
        quantize(model)


def test_a_model_quantized_already_is_refused(saved):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
    with pytest.raises(ModelError, match="quantized already") as caught:
        load_model(ModelOptions(model=str(folder)))
    assert "--quantize nf4" in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_trees_are_read_as_path_by_path(kind):
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    wide = {"n_embd": 64, "n_inner": 128} if kind == "gpt2" else wide
    model = add_lora(quantize(forests.random_model(kind, torch.float32, **wide)), LORA)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
    records = forests.branching()
    expected = forests.separately(model, records)
    reader = TreeModel(model.eval())
    assert not reader.one_by_one
    model.zero_grad()
    batch = forests.forest_of(records)
    losses = reader.losses(batch)
    (losses * torch.from_numpy(batch.target_weights)).sum().backward()
    forests.check_same((losses.detach(), forests.gradients(model)), expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_and_the_new_rows_train_and_the_bits_stay(saved, kind):
    model = load_model(QLORA.model_copy(update={"model": str(saved(kind))}))
    growth = reserve_tokens(model, fresh_tokenizer(NEW), {"<a>": "the end of a turn"})
    untouched, count = logits_of(model, IDS), count_parameters(model)
    before = {name: [part.clone() for part in parts] for name, parts in bits(model).items()}
    model = add_lora(model, QLORA, growth.ids)
    torch.testing.assert_close(logits_of(model, IDS), untouched, rtol=0, atol=1e-6)
    trained, total = trained_parameters(model)
    assert total - trained == count
    rows = rows_of(model)
    learned = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    train(model)
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in learned.items())
    after = {name.removeprefix("base_model.model.").removesuffix(".base_layer"): p for name, p in bits(model).items()}
    assert_same_bits(before, after)
    for old, new in zip(rows[:2], rows_of(model)[:2], strict=True):
        assert (old[list(growth.ids)] != new[list(growth.ids)]).any(-1).all()


def test_weights_are_not_repacked_for_a_kernel_without_a_gradient():
    """Bitsandbytes would do so in evaluation, on processors with AVX-512 bf16."""
    layers = quantized_layers(quantize(random_model("llama")))
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_layers_are_those_of_the_model_with_the_weights_that_were_computed_with(kind):
    plain, model = random_model(kind), quantize(random_model(kind))
    expected = logits_of(model)
    dequantize(model)
    kinds = {name: type(each) for name, each in plain.named_modules()}
    assert {name: type(each) for name, each in model.named_modules()} == kinds
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(plain), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "dora"), [(kind, dora) for kind in KINDS for dora in (False, True) if not (dora and kind == "mixtral")]
)
def test_the_merged_model_computes_what_was_trained(saved, kind, dora):
    model, _ = tuned(saved(kind), QLORA.model_copy(update={"dora": dora}))
    expected = logits_of(model, IDS)
    found = merged(model)
    torch.testing.assert_close(logits_of(found, IDS), expected, rtol=0, atol=1e-5)
    assert not quantized_layers(found)
    assert torch.equal(logits_of(model, IDS), expected)


def test_the_merged_model_is_rounded_to_what_will_be_written(saved, tmp_path):
    model, _ = tuned(saved("llama"))
    found = merged(model, torch.bfloat16)
    assert {each.dtype for each in found.parameters()} == {torch.float32}
    save_model(model, tmp_path / "out", merge=True, dtype=torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits_of(found, IDS), logits_of(written, IDS))


@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen2", "qwen2-tied"])
def test_an_adapter_is_loaded_by_plain_peft_on_the_base_that_bitsandbytes_quantizes(saved, tmp_path, kind):
    """The vocabulary of all but qwen2 grows: their base is saved beside the adapter, with the weights it was given."""
    folder, out = saved(kind), tmp_path / "out"
    model, growth = tuned(folder)
    expected = logits_of(model, IDS)
    save_model(model, out, growth=growth, original=lambda: load_model(ModelOptions(model=str(folder))))
    assert torch.equal(logits_of(model, IDS), expected)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder if kind == "qwen2" else out / "base")
    again = peft.PeftModel.from_pretrained(plainly_loaded(base), str(out))
    torch.testing.assert_close(logits_of(again, IDS), expected, rtol=0, atol=1e-6)
    kept = load_model(QLORA.model_copy(update={"adapter": "none", "model": str(out), "base_adapter": "keep"}))
    torch.testing.assert_close(logits_of(kept, IDS), expected, rtol=0, atol=1e-6)
    assert quantized_layers(kept)
    plain, written = random_model(kind), load_file(f"{base}/model.safetensors")
    for name, _ in quantized_layers(quantize(random_model(kind))):
        assert torch.equal(written[f"{name}.weight"], plain.get_submodule(name).weight)


def test_a_base_whose_weights_are_not_at_hand_is_saved_dequantized(saved, tmp_path):
    model, growth = tuned(saved("llama"))
    save_model(model, tmp_path, growth=growth)
    written = load_file(tmp_path / "base/model.safetensors")
    for name, layer in quantized_layers(quantize(random_model("llama"))):
        assert torch.equal(written[f"{name}.weight"], weights_of(layer))


def test_a_kept_adapter_trains_on_a_quantized_base(saved, tmp_path):
    folder = saved("llama")
    save_model(add_lora(load_model(ModelOptions(model=str(folder))), LORA), tmp_path / "adapter")
    model = load_model(ModelOptions(model=str(tmp_path / "adapter"), base_adapter="keep", quantize="nf4"))
    assert len(quantized_layers(model)) == 14
    assert all("lora" in name for name, each in model.named_parameters() if each.requires_grad)
    assert torch.equal(logits_of(model), logits_of(quantize(random_model("llama"))))
    joined = load_model(ModelOptions(model=str(tmp_path / "adapter"), quantize="nf4"))
    assert torch.equal(logits_of(joined), logits_of(quantize(random_model("llama"))))


def test_a_layer_that_is_read_wrongly_is_refused_and_no_other():
    """On processors with AVX-512, bitsandbytes 0.50 takes scales of other blocks where a row ends within one."""
    model = forests.random_model("llama", torch.float32)  # rows of 16 and 24 weights
    name, layer = next((name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear))
    blocks = layer.weight.detach().view(-1, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(layer.weight.detach(), blocksize=64, quant_type="nf4")
    restored = bitsandbytes.functional.dequantize_4bit(packed, state).view(-1, 64)
    if torch.equal(restored.abs().amax(1), blocks.abs().amax(1)):
        assert quantized_layers(quantize(model))
    else:
        with pytest.raises(ModelError, match=f"{name} has 16 inputs, no multiple of 64, and bitsandbytes reads"):
            quantize(model)
