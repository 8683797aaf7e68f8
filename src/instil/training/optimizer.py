"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained; matrices decay, norms, biases and embeddings do not.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = id(parameter) in embeddings or name.endswith("bias") or "trainable_tokens" in name
            groups[parameter.ndim > 1 and not spared].append(parameter)
    decay: list[dict[str, Any]] = [
        {"params": groups[decays], "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        if groups[decays]
    ]
    return torch.optim.AdamW(decay, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=True)


def state_of(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of an optimizer, each tensor by the name of its parameter and its own."""
    return {
        f"{name}.{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `state_of` gave."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        optimizer.state[named[owner]][key] = tensor


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """The learning rate of a step.

    Args:
        step: Counted from 1.
        steps: All of them.
        warmup_steps: Those in which it rises, evenly, from 0 to `peak`.
        peak: The highest.
        schedule: How it goes on: towards 0, which it would reach one step after the last, or not at all.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, steps - warmup_steps)  # in [0, 1)
    return peak * {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]
