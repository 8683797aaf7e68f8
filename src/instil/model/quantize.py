"""QLoRA: the linear layers of a frozen base in 4 bits, through bitsandbytes.

A weight is one of the 16 levels of NormalFloat (NF4) times the largest absolute value of its block of 64; those scales
are themselves quantized to 8 bits, in blocks of 256 (Dettmers et al., 2023, QLoRA, arXiv:2305.14314, section 3): 4.127
bits a weight. Products are computed with the dequantized weight, and the gradient of what goes in flows through it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from instil.errors import ModelError

BLOCK = 64
"""Weights with one scale."""

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for a kernel that is not used here

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def quantize(model: nn.Module) -> nn.Module:
    """Hold the linear layers of a model's blocks in NF4, one after another; equal weights give equal bits.

    What stays as it is: the embedding, the head, norms, biases, routers and other gates (a linear layer with one
    output, or one for each expert), and weights that are no linear layer, as fused experts (`describe` counts them).
    The layers of GPT-2, which hold their weights transposed, are turned.

    Args:
        model: A causal language model without an adapter, on the CPU; changed in place. A layer computes in the dtype
            that its weights had.

    Returns:
        The model.

    Raises:
        ModelError: No layer can be quantized, or bitsandbytes computes one wrongly on this processor.
    """
    for name in _linear_layers(model):
        model.set_submodule(name, made := _quantized(cast(Any, model.get_submodule(name))))
        _check(name, made)
    if not quantized_layers(model):
        raise ModelError(
            f"--quantize nf4: {type(model).__name__} has no linear layer that could be quantized",
            "Leave --quantize out: LoRA alone holds the base in bf16.",
        )
    cast(Any, model).is_loaded_in_4bit = True  # by which peft knows
    return model


def dequantize(model: nn.Module) -> None:
    """Turn quantized layers into plain ones, on the CPU, with the very weights that they computed with; in place."""
    for name, layer in quantized_layers(model):
        model.set_submodule(name, _plain(layer))
    model.__dict__.pop("is_loaded_in_4bit", None)


def quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers in 4 bits, with their names."""
    return [(name, each) for name, each in model.named_modules() if getattr(each, "quant_state", None) is not None]


def count_parameters(model: nn.Module) -> int:
    """How many parameters there are, of packed weights as many as they stand for."""
    packed: int = sum(math.prod(each.quant_state.shape) - each.weight.numel() for _, each in quantized_layers(model))
    return packed + sum(each.numel() for each in model.parameters())


def describe(model: nn.Module) -> str:
    """What of a frozen base is in 4 bits and what is not, by the kind of layer; "" where nothing is."""
    layers = quantized_layers(model)
    if not layers:
        return ""
    weights = {id(each.weight): math.prod(each.quant_state.shape) for _, each in layers}
    left: Counter[str] = Counter()
    seen = set(weights)
    for module in model.modules():
        kind = "their biases" if hasattr(module, "quant_state") else type(module).__name__
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                left[kind] += parameter.numel()
    count = sum(weights.values())
    others = ", ".join(f"{kind} {number:,}" for kind, number in left.most_common())
    share = count / (count + left.total())
    return f"nf4: {len(layers):,} layers with {count:,} weights ({share:.1%}); not quantized: {others or 'none'}"


def _linear_layers(model: Any) -> list[str]:
    """The names of what is quantized."""
    head = model.get_output_embeddings()
    experts = {getattr(model.config, name, None) for name in _EXPERTS}
    return [
        name
        for name, each in model.named_modules()
        if each is not head and type(each) in (nn.Linear, Conv1D) and _outputs(each) not in {1, *experts}
    ]


def _outputs(layer: Any) -> int:
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def _quantized(layer: Any) -> Any:
    import bitsandbytes

    kind = type(layer)
    weight: Tensor = layer.weight.detach()
    weight = weight.T if kind is Conv1D else weight  # (O, I)
    made = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], False, weight.dtype, device="meta")
    packed = bitsandbytes.nn.Params4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4", module=made
    ).to("cpu")  # which quantizes
    packed.module = None  # a copy of the layer would hold on to this one
    made.weight = packed
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    made.source_cls = kind  # as transformers calls it
    # In evaluation on a CPU with bf16, bitsandbytes would repack the weights for a kernel that has no gradient, and
    # leave them so.
    made.support_avx512bf16_for_cpu = False
    made.register_forward_pre_hook(_in_its_dtype)
    return made.train(layer.training)


def _check(name: str, layer: Any) -> None:
    """Refuse a layer whose rows end within a block where those are read wrongly: by bitsandbytes 0.50 with AVX-512."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = layer.weight.data, layer.weight.quant_state
    if layer.in_features % BLOCK == 0:
        return
    in_one_row = copy(state)
    in_one_row.shape = torch.Size((1, math.prod(state.shape)))
    if not torch.equal(dequantize_4bit(packed, state).flatten(), dequantize_4bit(packed, in_one_row).flatten()):
        raise ModelError(
            f"--quantize nf4: {name} has {layer.in_features:,} inputs, no multiple of {BLOCK}, and bitsandbytes reads "
            "such weights wrongly on this processor",
            "Leave --quantize out: LoRA alone holds the base in bf16.",
        )


def _in_its_dtype(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What comes out has the layer's dtype as well, as with a plain layer under autocast."""
    return (inputs[0].to(layer.compute_dtype), *inputs[1:])


def _plain(layer: Any) -> nn.Module:
    import bitsandbytes

    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).cpu()  # (O, I)
    outputs, inputs = weight.shape
    made: Any
    with torch.device("meta"):
        made = Conv1D(outputs, inputs) if layer.source_cls is Conv1D else nn.Linear(inputs, outputs, bias=False)
    made.weight = nn.Parameter(weight.T.contiguous() if layer.source_cls is Conv1D else weight)
    made.bias = layer.bias
    return cast(nn.Module, made.train(layer.training))
