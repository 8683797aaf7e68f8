"""What a run will hold in memory, estimated from counts before it starts, and what the machine has."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from instil.model.forward import LOGITS_AT_ONCE, TreeModel

_OF_HIDDEN, _OF_INTERMEDIATE = 16, 4  # float32 values kept of each token in each layer, as measured on Llama


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one run.

    Args:
        weights: The parameters, trained or not.
        training: Gradients and both moments of AdamW, of what is trained.
        activations: Kept of a micro-batch for the way back.
        logits: Of a micro-batch, with their gradient.
        available: What the machine has free, and what the weights hold of it already.
    """

    weights: int
    training: int
    activations: int
    logits: int
    available: int

    @property
    def needed(self) -> int:
        """All of it together."""
        return self.weights + self.training + self.activations + self.logits

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "training", "activations", "logits")}
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        return f"about {self.needed / 1e9:.1f} GB ({listed}) of {self.available / 1e9:.1f} GB free"


def estimate(model: TreeModel, tokens_per_batch: int, *, checkpointing: bool) -> Memory:
    """What training the model takes.

    Args:
        model: On its device.
        tokens_per_batch: The most tokens of a micro-batch, half of which are taken to be trained.
        checkpointing: Whether activations are computed again in place of kept.
    """
    config = model.base.config
    weights = [(each.numel(), each.element_size(), each.requires_grad) for each in model.model.parameters()]
    trained = sum(count for count, _, required in weights if required)
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    kept = 4 * (_OF_HIDDEN * hidden + _OF_INTERMEDIATE * intermediate)  # bytes a token and layer
    layers = config.num_hidden_layers
    a_token = 4 * hidden * layers + kept if checkpointing else kept * layers
    logits = min(tokens_per_batch // 2 * config.vocab_size, LOGITS_AT_ONCE) * (4 if model.bf16 else 8)
    held = sum(count * size for count, size, _ in weights)
    return Memory(held, 12 * trained, a_token * tokens_per_batch, logits, held + _available(model.device))


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]

    free: Any = psutil.virtual_memory().available
    return int(free)


def keep_freed_blocks() -> None:
    """Have the C library keep what is freed, for the next micro-batch: memory that the system gives anew is zeroed
    first, page by page, which takes about as long as training does. (glibc alone; elsewhere nothing happens.)
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
                library.mallopt(option, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
