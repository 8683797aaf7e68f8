"""The proof that a model reads token trees exactly: a tiny one of its own kind must give what separate paths give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from instil.model import attention
from instil.model.load import quiet
from instil.packing import TokenTree, merge
from instil.prompt.exchange import Exchange

TOLERANCE = 1e-4
"""Relative error allowed: float32 inside a model stays below 1e-5; the wrong models of the tests err by 8e-4 to 0.1."""

_VOCABULARY = 64
_WINDOW = 4
_SHORTENED = ("num_experts", "num_local_experts", "n_routed_experts")


class Reader(Protocol):
    """What reads packed batches with a model: a `TreeModel`."""

    def losses(self, batch: TokenTree) -> Tensor:
        """(S,) the cross-entropy of every target."""


Reading = Callable[[nn.Module, str], Reader]


def admit(model: nn.Module, reading: Reading) -> str:
    """Why a model cannot read token trees; "" if it is proved that it can.

    A model of its class and configuration with few layers, heads and tokens computes in float64 the loss and all
    gradients of a forest with branches longer than the window, and again path by path through its own attention.

    Args:
        model: A causal language model of transformers.
        reading: Makes a reader of a model; as trees, or path by path if the text says why.
    """
    with quiet():
        try:
            tiny = tiny_model(model)
        except Exception as error:  # configurations hold anything
            return f"no small model of its kind could be made to try it on: {_first_line(error)}"
        try:
            return _compared(tiny, reading)
        except Exception:  # some operations know no float64
            try:
                return _compared(tiny.float(), reading)
            except Exception as error:
                return f"it fails on a tree: {_first_line(error)}"


def _compared(tiny: nn.Module, reading: Reading) -> str:
    forest = _forest()
    expected = results(tiny, reading(tiny, "path by path"), forest)
    attention.unknown_arguments.clear()
    found = results(tiny, reading(tiny, ""), forest)
    if attention.unknown_arguments:
        return f"it hands its attention what is not known here: {', '.join(sorted(attention.unknown_arguments))}"
    norms = {name: float(value.norm()) for name, value in expected.items()}
    least = 1e-3 * max(norms.values())  # some gradients are 0 but for rounding
    for name, value in expected.items():
        off = float((found[name] - value).norm()) / max(norms[name], least)
        if not off <= TOLERANCE:
            return f"on a tree its {name} is off by {off:.1e}"
    return ""


def tiny_model(model: nn.Module) -> nn.Module:
    """A small random model of the same class and configuration, in float64."""
    base: Any = model
    config = _shrunk(base.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("cpu"):
            tiny: nn.Module = type(base)(config)
        with torch.no_grad():
            for each in tiny.parameters():
                each.add_(0.2 * torch.randn_like(each))  # freshly made, it would attend to all tokens alike
    return tiny.double().eval()


def _shrunk(config: Any) -> Any:
    """The configuration with few layers, one of each type, and few heads; what the attention computes stays."""
    config = copy.deepcopy(config)
    config.dtype = torch.float64
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    types = getattr(config, "layer_types", None)
    first = [types.index(each) for each in dict.fromkeys(types)] if types else [0]
    changed = {
        "num_hidden_layers": max(2, len(first)),
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2,
        "hidden_size": 2 * per_head,
        "intermediate_size": 4 * per_head,
        "ffn_dim": 4 * per_head,
        "word_embed_proj_dim": 2 * per_head,
        "n_inner": 4 * per_head,
        "vocab_size": _VOCABULARY,
        **{name: min(4, getattr(config, name, None) or 4) for name in _SHORTENED},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if getattr(config, "sliding_window", None):
        changed["sliding_window"] = _WINDOW
    if types:
        chosen = [types[each] for each in first]
        changed["layer_types"] = chosen if len(chosen) > 1 else chosen * 2
    for name, value in changed.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config._attn_implementation = "eager"
    return config


def _forest() -> TokenTree:
    """Two trees: branches of branches, all longer than the window, and a path by itself."""
    draw = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return draw.integers(1, _VOCABULARY, count).astype(np.int32)

    trunk, limb = ids(6), ids(5)
    prompts = [trunk, trunk, np.concatenate([trunk, limb]), np.concatenate([trunk, limb]), ids(7)]
    exchanges = []
    for prompt in prompts:
        answer = ids(int(draw.integers(5, 8)))
        weights = np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)
        exchanges.append(Exchange("", "", prompt, weights[0], answer, weights[1], "special"))
    return merge([TokenTree.from_exchanges(exchanges)])


def results(model: nn.Module, reader: Reader, forest: TokenTree) -> dict[str, Tensor]:
    """The losses of a forest and the gradients of their sum, by name.

    Args:
        model: A causal language model.
        reader: What reads with it.
        forest: What is read.
    """
    model.zero_grad()
    losses = reader.losses(forest)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    grads = {f"gradient of {name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": losses.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
