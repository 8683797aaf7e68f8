"""Load a causal language model: from a folder or the hub, with the adapter on it, or with random weights.

Weights are read from safetensors alone, and all of them must be there: a model that was completed at random, as
transformers does with a warning, would train and look well.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from instil.errors import ModelError
from instil.model.options import ModelOptions
from instil.model.quantize import quantize
from instil.prompt.tokenizer import Tokenizer

BASE = "base"
"""The folder, in an adapter's own, of a base model that is nowhere else."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_PATIENCE = 5.0  # seconds that the hub has to answer; transformers would retry for half a minute
_PICKLED = {".bin", ".pth", ".pt", ".ckpt"}
_CONVERT = (
    "Convert it once, where you trust its source: `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)` writes "
    "safetensors."
)


def load_model(options: ModelOptions, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model to train, on the CPU, all its weights trainable (of a kept adapter only those of the adapter).

    Args:
        options: Where it comes from, and whether its linear layers are quantized; then those are frozen.
        dtype: Of the weights in memory.
        seed: Of random weights, where `init` asks for them.

    Returns:
        A causal language model of transformers, or a `PeftModel` around one where an adapter is kept.

    Raises:
        ModelError: There is no such model, it is no causal language model, or weights are missing.
    """
    with quiet():
        if options.init is not None and options.model is None:
            return _held(_random_model(options.init, options.trust_remote_code, dtype, seed), options)
        name = _named(options)
        found = adapter_config(name)
        if found is None:
            if options.base_adapter == "keep":
                raise ModelError(f"--base-adapter keep: {name} has no adapter", "Leave it out, or name an adapter.")
            return _held(_load_base(name, options.trust_remote_code, dtype), options)
        folder, config = found
        base = _load_base(_base_of_adapter(folder, config), options.trust_remote_code, dtype)
        if options.base_adapter == "keep":
            return _with_adapter(_held(base, options), folder, config, keep=True)
        return _held(_with_adapter(base, folder, config, keep=False), options)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder or a hub name holds an adapter of peft, not a whole model.

    Raises:
        ModelError: There is no such folder, and it is no hub name that can be reached.
    """
    return adapter_config(str(folder)) is not None


def base_of(options: ModelOptions) -> str:
    """The name of the base model: a hub name or a folder; of an adapter the model below it.

    Raises:
        ModelError: No model is given, or the adapter's base is not to be found.
    """
    if options.init is not None and options.model is None:
        return str(options.init)
    name = _named(options)
    found = adapter_config(name)
    return name if found is None else _base_of_adapter(*found)


def checkpoint_dtype(options: ModelOptions) -> torch.dtype:
    """What the base model's weights are stored in, by its `config.json`; float32 where that does not say.

    Raises:
        ModelError: Its configuration cannot be read.
    """
    with quiet():
        found = getattr(_read_config(base_of(options), options.trust_remote_code), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def product_dtype(precision: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """What products are computed in: bf16 where the hardware has it, unless chosen."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        has = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if has else torch.float32


def check_vocabulary(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the model's: one with ids for which the model has no embedding.

    Args:
        model: A causal language model.
        tokenizer: Tokens added to it (`tokenizer.added`) may be beyond; `reserve_tokens` makes room for them.

    Raises:
        ModelError: Other tokens have ids beyond the model's embedding.
    """
    embedding = cast(Any, model).get_input_embeddings()
    rows = embedding.weight.shape[0]
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows and token not in tokenizer.added)
    if beyond:
        shown = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3]) + (", …" if len(beyond) > 3 else "")
        raise ModelError(
            f"{tokenizer.name}: {len(beyond):,} of its tokens have ids beyond the {rows:,} embeddings of the model: "
            f"{shown}",
            "Use the model's own tokenizer.",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log of transformers: what it warns of is an error here, or expected."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def grow(model: nn.Module, rows: int) -> None:
    """Grow the embedding of a model, its head and the head's bias to `rows` tokens; tied ones stay tied.

    Raises:
        ModelError: The model cannot grow.
    """
    try:
        with quiet():
            cast(Any, model).resize_token_embeddings(rows, mean_resizing=False)
    except Exception as error:  # what an architecture does not implement
        raise ModelError(
            f"{type(model).__name__}: its vocabulary cannot grow to {rows:,} tokens: {_first_line(error)}",
            "Choose a --template whose tokens the tokenizer has already.",
        ) from error


def vocabulary_layers(model: Any) -> list[nn.Module]:
    """What has a row for each token: the embedding and the head, if the model has one."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return [layer for layer in layers if layer is not None]


def _held(model: nn.Module, options: ModelOptions) -> nn.Module:
    """The model as it is held in memory: quantized, if that is asked for."""
    return quantize(model) if options.quantize == "nf4" else model


def _named(options: ModelOptions) -> str:
    if options.model is None or options.init is not None:
        given = "both --model and --init are" if options.model is not None else "neither --model nor --init is"
        raise ModelError(f"{given} given", "Give --model, or --init for random weights.")
    return options.model


def _random_model(folder: Path, trust: bool, dtype: torch.dtype, seed: int) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ModelError(f"--init {folder}: no config.json there", "Give a folder that holds a model's config.json.")
    config = _read_config(str(folder), trust)
    _check_kind(config, str(folder))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    except Exception as error:  # configurations hold anything
        raise _unloadable(str(folder), error) from error
    _from_nowhere(model)
    return cast(nn.Module, model)


def _from_nowhere(model: Any) -> None:
    """Mark a model whose weights no name gives again, so that an adapter is saved together with it."""
    model.name_or_path = ""
    model.config.name_or_path = ""


def _load_base(name: str, trust: bool, dtype: torch.dtype) -> Any:
    local = _is_local(name)
    config = _read_config(name, trust)
    _check_kind(config, name)
    _check_precision(config, name)
    _check_weights(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            local_files_only=local or _offline(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name all of them
        )
    except Exception as error:  # files hold anything
        raise _unloadable(name, error) from error
    _check_complete(name, model, info)
    return model


def _read_config(name: str, trust: bool) -> Any:
    local = _is_local(name)
    if local and not (Path(name) / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in Path(name).iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{name}: no config.json in this folder (it holds {found})", "Give a model in Hugging Face format."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust, local_files_only=local or _offline(name))
    except Exception as error:  # files hold anything
        raise _unloadable(name, error) from error


def _check_kind(config: Any, name: str) -> None:
    """Refuse what is no causal language model, though transformers might make one of it."""
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        wrong = f"an encoder and a decoder ({kind})"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        wrong = f"an encoder ({kind})"
    elif type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        wrong = f"of a kind without a causal language model in transformers ({kind})"
    else:
        return
    raise ModelError(
        f"{name}: is {wrong}; only a causal (decoder-only) language model can be tuned",
        "Give a model such as Llama, Qwen, Mistral, Gemma, Phi or GPT-NeoX.",
    )


def _check_precision(config: Any, name: str) -> None:
    """Refuse weights that bitsandbytes has quantized: they could be neither trained nor saved again as they were."""
    given = getattr(config, "quantization_config", None) or {}
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    if "bitsandbytes" in str(getattr(method, "value", method)):
        raise ModelError(
            f"{name}: its weights are quantized already (bitsandbytes)",
            "Give the model that it was made of; --quantize nf4 quantizes it while it is loaded.",
        )


def _check_weights(name: str) -> None:
    """Refuse a model without safetensors; transformers would ask a service of the hub to convert it."""
    if not _is_local(name):
        if not _on_hub(name, "model.safetensors") and not _on_hub(name, "model.safetensors.index.json"):
            raise ModelError(f"{name}: has no weights in safetensors", _CONVERT)
        return
    files = sorted(file.name for file in Path(name).iterdir() if file.is_file())
    if any(file.endswith(".safetensors") for file in files):
        return
    pickled = [file for file in files if Path(file).suffix in _PICKLED and file != "training_args.bin"]
    if pickled:
        raise ModelError(
            f"{name}: its weights are pickled ({', '.join(pickled[:3])}), and to read them is to run what is in them",
            _CONVERT,
        )
    raise ModelError(
        f"{name}: no weights in this folder (it holds {', '.join(files[:8])})",
        "Give a folder with *.safetensors, or --init in place of --model for random weights.",
    )


def _on_hub(name: str, file: str) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if _offline(name):
        return isinstance(try_to_load_from_cache(name, file), str)
    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=_PATIENCE)
    except EntryNotFoundError:
        return False
    except Exception as error:  # of the network, of many kinds
        raise _unloadable(name, error) from error
    return True


def _check_complete(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    alike = {_LAYER.sub("#", key) for key in model.state_dict()}
    more = sorted(key for key in info["unexpected_keys"] if _LAYER.sub("#", key) in alike)
    if more:  # others, as of a part that sees, are nothing to a language model
        raise ModelError(
            f"{name}: its files hold more layers than its config.json says: {len(more):,} weights have no place: "
            f"{_some(more)}",
            "Mend its config.json, or fetch the model again.",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing):,} weights are not in its files: {_some(missing)}",
            "Fetch the model again; its weights may stand in files that are not here, or be of another kind.",
        )
    wrong = [f"{key} is {tuple(has)}, not {tuple(needs)}" for key, has, needs in sorted(info["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{name}: {len(wrong):,} weights have other shapes than its config.json says: {_some(wrong)}",
            "Mend its config.json, or fetch the model again.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _is_local(name: str) -> bool:
    """Whether a model is a folder here; else it is a hub name."""
    path = Path(name)
    if path.is_dir():
        return True
    if path.is_file():
        raise ModelError(f"{name}: a file, not a model's folder", "Give the folder that holds config.json.")
    if not _HUB_NAME.fullmatch(name) or ("/" in name and path.parent.is_dir()):
        raise ModelError(f"{name}: no such folder", "Check the path.")
    return False


@lru_cache
def _offline(name: str) -> bool:
    """Whether the hub cannot be reached, asked once and briefly: then only what is in the cache can be loaded.

    Raises:
        ModelError: The hub answers, but not with this model; or it does not, and nothing is in the cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_PATIENCE)
    except EntryNotFoundError:  # an adapter has none
        return False
    except GatedRepoError as error:
        raise ModelError(
            f"{name}: its owner wants to be asked before it is fetched",
            f"Ask at https://huggingface.co/{name}, then `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: neither a folder here nor a model on the hub that you can see",
            "Check the name; for a private model, `hf auth login` first.",
        ) from error
    except Exception as error:  # of the network, of many kinds
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER_CONFIG)):
            raise ModelError(
                f"{name}: no such folder, and the hub cannot be reached: {_first_line(error)}",
                "Check the path, or go online once: what was fetched is kept.",
            ) from error
        return True
    return False


def _unloadable(name: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name}: needs the Python code that comes with it",
            "If you trust its source, allow that with --trust-remote-code.",
        )
    return ModelError(f"{name}: the model cannot be loaded: {_first_line(error)}", "Mend or replace its files.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def adapter_config(name: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder of an adapter, fetched from the hub if need be, and its configuration; None for a whole model."""
    folder = Path(name) if _is_local(name) else _fetched_adapter(name)
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: not JSON: {error}", "Mend or replace the file.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: must be a JSON object", "Mend or replace the file.")
    return folder, config


def _fetched_adapter(name: str) -> Path | None:
    """The folder in the hub's cache that an adapter was fetched to; None for what is no adapter."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    offline = _offline(name)
    try:
        config = hf_hub_download(name, ADAPTER_CONFIG, local_files_only=offline)
    except EntryNotFoundError:
        return None
    with suppress(EntryNotFoundError):  # said where they are read
        hf_hub_download(name, ADAPTER_WEIGHTS, local_files_only=offline)
    return Path(config).parent


def _base_of_adapter(folder: Path, config: dict[str, Any]) -> str:
    """The base model of an adapter; what stands in the adapter's own folder goes before what its name says."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG} names no base model", "Set base_model_name_or_path there to the model."
        )
    own = [folder / BASE] if Path(named).name == BASE else []
    for candidate in (*own, folder / named, Path(named)):
        if (candidate / "config.json").is_file():
            return str(candidate)
    try:
        _is_local(named)
    except ModelError as error:
        raise ModelError(
            f"{folder}: its base model {named} is not there",
            f"Put it there, or set base_model_name_or_path in its {ADAPTER_CONFIG} to where it is.",
        ) from error
    return named


def _with_adapter(base: Any, folder: Path, config: dict[str, Any], *, keep: bool) -> nn.Module:
    """The base model with the adapter merged into it, or kept on it to be trained on."""
    from peft import PeftConfig, PeftModel

    _check_adapter(folder, config)
    try:
        if _brings_embeddings(base, folder, config):
            _from_nowhere(base)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loaded = PeftConfig.from_pretrained(str(folder))
            loaded.base_model_name_or_path = base.name_or_path or None
            model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=keep, config=loaded)
    except Exception as error:  # files hold anything
        raise ModelError(
            f"{folder}: the adapter does not fit its base model: {_first_line(error)}",
            f"Set base_model_name_or_path in its {ADAPTER_CONFIG} to the model that it was trained on.",
        ) from error
    missing = [str(each.message) for each in warned if "missing adapter keys" in str(each.message)]
    if missing:
        raise ModelError(
            f"{folder}: weights of the adapter are not in its files: {missing[0][:300]}", "Fetch the adapter again."
        )
    if keep:
        return cast(nn.Module, model)
    try:
        merged = model.merge_and_unload()
    except Exception as error:  # some kinds cannot be merged
        raise ModelError(
            f"{folder}: the adapter cannot be merged: {_first_line(error)}", "Keep it: --base-adapter keep."
        ) from error
    _from_nowhere(merged)
    return cast(nn.Module, merged.requires_grad_(True))  # peft had frozen it


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(f"{folder}: an adapter for another task ({config['task_type']})", "Give one for CAUSAL_LM.")
    if "num_virtual_tokens" in config:
        raise ModelError(
            f"{folder}: an adapter of virtual tokens ({config.get('peft_type')}), which stand in no prompt",
            "Give one that changes weights, as LoRA does.",
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder}: no {ADAPTER_WEIGHTS} there" + (", only pickled weights (adapter_model.bin)" if pickled else ""),
            "Load it once with peft, where you trust its source, and save it again: that writes safetensors.",
        )


def _brings_embeddings(base: Any, folder: Path, config: dict[str, Any]) -> bool:
    """Whether an adapter brings embeddings of its own or tokens beyond those of its base, which is grown for them."""
    from safetensors import safe_open

    layers = [name for name, each in base.named_modules() if each in vocabulary_layers(base)]
    ends = tuple(f".{layer}{inner}.weight" for layer in layers for inner in ("", ".base_layer"))
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        brought = [file.get_slice(key).get_shape()[0] for key in list(file.keys()) if key.endswith(ends)]
    chosen = config.get("trainable_token_indices") or []
    highest = [max(ids, default=-1) for ids in (chosen.values() if isinstance(chosen, dict) else [chosen])]
    needed, present = max([*brought, *(each + 1 for each in highest)], default=0), base.get_input_embeddings().weight
    if needed > len(present):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of rows that the adapter does not bring
            grow(base, needed)
    return bool(brought) or needed > len(present)
