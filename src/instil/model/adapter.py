"""Low-rank adapters: a few weights beside each linear layer, and a row of its own for each new token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from instil.errors import ModelError, nearest
from instil.model.load import vocabulary_layers
from instil.model.options import ModelOptions
from instil.model.quantize import count_parameters

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


def add_lora(model: nn.Module, options: ModelOptions, new_ids: Sequence[int] = (), *, seed: int = 0) -> PeftModel:
    """Freeze a model and add what LoRA trains to it.

    An addition begins at zero, so the model computes what it computed before. Of the embedding and the head only the
    rows of new tokens train, with peft's `trainable_token_indices`; where the head is tied, the two stay one.

    Args:
        model: A causal language model without an adapter; changed in place.
        options: Rank, scale, dropout and targets.
        new_ids: The ids of new tokens, whose rows are there already (`reserve_tokens`).
        seed: Of the additions.

    Raises:
        ModelError: The model has an adapter already, no layer of a target's name, or layers that cannot be adapted so.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ModelError(
            "--adapter lora: the model has an adapter already, which --base-adapter keep keeps",
            "Train that one on, without --adapter; or merge it first: --base-adapter merge.",
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=cast(Any, options.lora_alpha or 2 * options.lora_rank),
        lora_dropout=options.lora_dropout,
        target_modules=_targets(model, options.lora_targets),
        use_rslora=options.rslora,
        use_dora=options.dora,
        fan_in_fan_out=any(_source(each) is Conv1D for each in model.modules()),  # GPT-2 holds weights transposed
        trainable_token_indices={name: sorted(new_ids) for name in _token_layers(model)} if new_ids else None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        warnings.filterwarnings("ignore", ".* keys did not match any targeted module", RuntimeWarning)  # but experts
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(cast(Any, model), config)
        except (ValueError, TypeError, NotImplementedError) as error:  # experts take no dropout and no DoRA
            raise ModelError(
                f"--adapter lora: {type(model).__name__} cannot have this adapter: {error}",
                "Leave --dora and --lora-dropout out, or name other --lora-targets.",
            ) from error
    if new_ids:
        _keep_bias(adapted)
    return adapted


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are, those of an adapter included; packed ones count in full."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad), count_parameters(model)


def _source(layer: nn.Module) -> type:
    """What kind of layer it is, or was before it was quantized."""
    return cast(type, getattr(layer, "source_cls", type(layer)))


def _targets(model: nn.Module, targets: Sequence[str]) -> str | list[str]:
    """The targets as peft takes them, each of them seen to be there."""
    if list(targets) == [ALL_LINEAR]:
        return ALL_LINEAR
    layers = vocabulary_layers(model)
    linear = [
        name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D) and each not in layers
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = {name.rpartition(".")[2] for name in linear} | {ALL_LINEAR}
            why = "stands alone" if target == ALL_LINEAR else "no linear layer below the head is called so"
            raise ModelError(f"--lora-targets {target}: {why}", nearest(target, known).capitalize())
    return list(targets)


def _token_layers(model: Any) -> list[str]:
    """The names of what has a row for each token: the embedding, and the head unless it is tied to it."""
    embedding, *head = vocabulary_layers(model)
    chosen = [embedding, *(each for each in head if each.weight is not embedding.weight)]
    return [name for name, each in model.named_modules() if each in chosen]


def _keep_bias(model: Any) -> None:
    """Add the bias of a head (GPT-J, Phi) to what its token rows give: peft leaves it out."""
    head = model.get_base_model().get_output_embeddings()
    if biased_rows(model):
        head.register_forward_hook(_with_bias)


def biased_rows(model: Any) -> bool:
    """Whether the rows of new tokens train in a head with a bias, which peft cannot load again from an adapter."""
    head = model.get_base_model().get_output_embeddings()
    wrapped = getattr(head, "token_adapter", None)
    return wrapped is not None and getattr(wrapped.base_layer, "bias", None) is not None


def _with_bias(head: Any, _: Any, output: Tensor) -> Tensor:
    rows = head.token_adapter
    return output if rows.merged or rows.disable_adapters else output + rows.base_layer.bias
