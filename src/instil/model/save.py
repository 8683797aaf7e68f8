"""Save a model or an adapter in the layout of Hugging Face, which transformers and peft load as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from instil.model.adapter import biased_rows
from instil.model.load import ADAPTER_WEIGHTS, BASE, quiet, vocabulary_layers
from instil.model.quantize import dequantize, quantized_layers
from instil.model.tokens import Growth

_SHARD = "5GB"


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    growth: Growth | None = None,
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
    place: Path | None = None,
    original: Callable[[], nn.Module] | None = None,
) -> None:
    """Write a model, or the adapter on it, with its configuration; the model stays as it is.

    An adapter whose base is nowhere else (its vocabulary grew, its weights were random or had an adapter merged into
    them) has it in `folder/base`. Plain peft takes a relative path as one from the working directory, so the adapter
    names the absolute one, in `place`; `load_model` looks beside the adapter first, so that for Instil both may be
    moved. A merged copy or a base takes the memory of the model once more while it is written.

    Args:
        model: A causal language model of transformers, or a `PeftModel` around one.
        folder: Where to write; made if need be.
        growth: What new tokens did to the model, as `reserve_tokens` gave it.
        merge: Write the model with the adapter merged into it, in place of the adapter.
        dtype: Of the weights in the files; those of an adapter, and some others that are float32 in any case, stay so.
        place: Where the folder will stand, if it is to be moved; `folder` otherwise.
        original: Gives the model as it was loaded, not quantized: a base in 4 bits is saved with these weights. Without
            it with the dequantized ones, which are as large and no longer those that the model was made with.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapted: Any = model
    if not hasattr(model, "peft_config"):
        _save_full(adapted, folder, dtype)
    elif merge:
        _save_full(merged(adapted), folder, dtype)
    else:
        _save_adapter(adapted, folder, growth, dtype, (place or folder).resolve(), original)


def merged(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the base model with the adapter merged into its weights; `model` stays as it is.

    Below an adapter that was trained on quantized weights, these are dequantized, not the original ones: the adapter
    learned to mend them, and so the copy computes what was trained, but for rounding. The copy of a quantized model is
    on the CPU.

    Args:
        model: A `PeftModel`.
        dtype: That of the files to come: weights are rounded to it, and computed with in the precision they had.
    """
    adapted: Any = copy.deepcopy(model)
    if quantized_layers(model):
        adapted = _on_plain_layers(adapted)
    found = cast(nn.Module, adapted.merge_and_unload())
    if dtype is not None:
        exact = _exact(found, dtype)
        for name, each in found.named_parameters():
            if not exact.intersection(name.split(".")):
                each.data = each.data.to(dtype).to(each.dtype)
    return found


def _on_plain_layers(adapted: Any) -> Any:
    """The adapter on the dequantized base, for peft itself would merge into 4 bits again."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(adapted.peft_config[adapted.active_adapter])
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    base = adapted.unload()
    dequantize(base)
    base.cpu()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of the configuration it said at the first time
        again = get_peft_model(base, config)
        set_peft_model_state_dict(again, weights)
    return again


def _save_full(model: Any, folder: Path, dtype: torch.dtype) -> None:
    with _as_it_was(model), quiet():
        model.save_pretrained(folder, state_dict=_cast(model, dtype), max_shard_size=_SHARD)
        config = copy.deepcopy(model.config)
        config.dtype = dtype  # save_pretrained writes the one in memory
        config.save_pretrained(folder)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Write no generation configuration, which is made elsewhere, and put the configuration back after."""
    config, model.config = model.config, copy.deepcopy(model.config)
    model.can_generate = lambda: False
    try:
        yield
    finally:
        model.config = config
        del model.can_generate


def _exact(model: Any, dtype: torch.dtype) -> set[str]:
    """The names of modules that stay in float32 whatever the rest is written in."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept | set((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())


def _cast(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another precision; tied ones stay one tensor, so that they are written once."""
    kept = _exact(model, dtype)
    done: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, value in model.state_dict().items():
        key = value.data_ptr(), value.shape
        if key not in done:
            exact = not value.is_floating_point() or kept.intersection(name.split("."))
            done[key] = value if exact else value.to(dtype)
        found[name] = done[key]
    return found


def _save_adapter(
    model: Any,
    folder: Path,
    growth: Growth | None,
    dtype: torch.dtype,
    place: Path,
    original: Callable[[], nn.Module] | None,
) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    base = model.get_base_model()
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.base_model_name_or_path = _lasting(base.name_or_path)
    if biased_rows(model):  # peft would lose the bias: the base takes the rows
        config.trainable_token_indices = None
        weights = {name: value for name, value in weights.items() if ".token_adapter." not in name}
    if biased_rows(model) or not base.name_or_path or (growth is not None and growth.grown):
        _save_full(_base_alone(model, original), folder / BASE, dtype)
        config.base_model_name_or_path = str(place / BASE)
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}  # in float32, as trained
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _lasting(name: str) -> str:
    """The name of a base model that holds from any working directory."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _base_alone(model: Any, original: Callable[[], nn.Module] | None) -> Any:
    """A copy of the base model without its adapter, but with the trained rows that the adapter cannot hold."""
    alone = copy.deepcopy(model)
    if biased_rows(alone):
        for layer in vocabulary_layers(alone.get_base_model()):
            cast(Any, layer).token_adapter.merge()
    base = alone.unload()
    if original is not None and quantized_layers(base):
        _put_back(base, cast(Any, original()))
    dequantize(base)
    return base


def _put_back(base: Any, original: Any) -> None:
    """Replace quantized layers by those they were made of."""
    source = original.unload() if hasattr(original, "peft_config") else original
    for name, _ in quantized_layers(base):
        base.set_submodule(name, source.get_submodule(name))
