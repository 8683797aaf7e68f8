"""What a run will hold in memory, estimated before it starts, and what the machine has.

The model is asked: a pass over a few tokens tells what it keeps for the way back, whatever its layers are made of. All
else is counted.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from instil.model.forward import LOGITS_AT_ONCE, ROWS_AT_ONCE, TreeModel
from instil.packing import PackedBatch, TokenTree, merge
from instil.prompt.exchange import Exchange
from instil.training.optimizer import state_bytes
from instil.training.options import OptimizerName
from instil.training.steps import Steps

_LOOKED_AT = 4  # steps, of which the largest micro-batch is taken
_FEW, _MORE = 13, 29  # tokens of the passes that are watched, numbers that no width of a model is
_HOLES = 0.6  # of what a micro-batch takes, on a CPU: between 0.2 and 0.9 was seen


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one run.

    Args:
        process: The interpreter, its libraries and the data (on a CPU; of a GPU the model has its own).
        weights: The parameters, trained or not.
        copies: Weights in the precision of the products, kept for the way back.
        optimizer: Its state.
        best: The best weights, where rows are held out.
        gradients: Of what is trained.
        activations: Kept of a micro-batch for the way back.
        logits: Of a micro-batch, with their gradient.
        holes: Freed blocks that the C library keeps and that no later tensor fits: what stays (states, gradients) is
            put where a micro-batch was.
        available: What the machine has free, and what the process holds of it already.
        accumulated: Whether a step has several micro-batches. The gradients of a single one come while its
            activations go, and take their place.
    """

    process: int
    weights: int
    copies: int
    optimizer: int
    best: int
    gradients: int
    activations: int
    logits: int
    holes: int
    available: int
    accumulated: bool

    @property
    def needed(self) -> int:
        """The most that is held at once."""
        always = self.process + self.weights + self.copies + self.optimizer + self.best
        batch = self.activations + self.logits + self.holes
        return always + (self.gradients + batch if self.accumulated else max(self.gradients, batch))

    def __str__(self) -> str:
        names = ("process", "weights", "copies", "optimizer", "best", "gradients", "activations", "logits", "holes")
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name in names if (size := getattr(self, name)) >= 5e7)
        return f"about {self.needed / 1e9:.2f} GB ({listed}) of {self.available / 1e9:.1f} GB free"


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch of a run.

    Args:
        tokens: In it.
        pairs: Of tokens of which one may see the other, chain by chain: the scores where they are held.
        rows: Tokens that have targets.
        accumulated: Whether a step has several.
    """

    tokens: int
    pairs: int
    rows: int
    accumulated: bool

    @classmethod
    def of(cls, steps: Steps) -> Load:
        """Look at some steps of the first epoch."""
        chosen = steps.rows(0)[:: max(1, steps.per_epoch // _LOOKED_AT)]
        looked_at = [steps.batches(rows, number) for number, rows in enumerate(chosen)]
        batches = [batch for step in looked_at for batch in step]
        return cls(
            tokens=max(batch.size for batch in batches),
            pairs=max(map(_pairs, batches)),
            rows=max(len(np.unique(batch.target_rows)) for batch in batches),
            accumulated=any(len(step) > 1 for step in looked_at),
        )

    def within(self, tokens_per_batch: int) -> Load:
        """About the largest micro-batch of so many tokens at most."""
        part = min(1.0, tokens_per_batch / self.tokens)
        tokens, pairs, rows = (int(part * each) for each in (self.tokens, self.pairs, self.rows))
        return Load(tokens, pairs, rows, self.accumulated or part < 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a model keeps of a batch for the way back.

    Args:
        copies: Whatever the batch: weights in the precision of the products.
        a_token: Of each token, but for its logits.
        a_pair: Of each two tokens that see each other.
        a_row: Logits of each token that has targets, as they are and as they were before they were soft-capped.
    """

    copies: float
    a_token: float
    a_pair: float
    a_row: float

    @classmethod
    def by(cls, model: TreeModel) -> Kept:
        """Watch a model read a few tokens, twice; nothing is kept of it."""
        training = model.model.training
        model.model.train()
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            (few, *_), (more, pairs, logits) = (_watch(model, tokens) for tokens in (_FEW, _MORE))
        model.model.train(training)
        a_token = (more - few) / (_MORE - _FEW)
        return cls(max(0.0, few - a_token * _FEW), a_token, pairs / _MORE**2, logits / (_MORE - 1))


def estimate(
    model: TreeModel,
    optimizer: OptimizerName,
    load: Load,
    kept: Kept,
    *,
    checkpointing: bool,
    held_out: bool,
    shards: int = 1,
) -> Memory:
    """What training the model takes.

    Args:
        model: On its device.
        optimizer: What takes the steps.
        load: The largest micro-batch.
        kept: Of it by the model.
        checkpointing: Whether activations are computed again in place of kept: all but what goes into each layer.
        held_out: Whether the best weights are kept.
        shards: The processes that hold the model in parts.
    """
    config = model.base.config
    trained = sum(each.nbytes for each in model.model.parameters() if each.requires_grad)
    weights = sum(each.nbytes for each in model.model.parameters())
    activations = kept.a_token * load.tokens + kept.a_pair * load.pairs
    if checkpointing:
        into_layers = 4 * config.hidden_size * config.num_hidden_layers * load.tokens
        activations = into_layers + activations / config.num_hidden_layers
    vocabulary = config.vocab_size
    rows = min(load.tokens if model.one_by_one else load.rows, LOGITS_AT_ONCE // vocabulary + 1)
    gradients = (2 if model.bf16 else 4) * vocabulary * rows
    pieces = 2 * 4 * vocabulary * min(rows, ROWS_AT_ONCE)  # in float32
    logits = int(kept.a_row * rows) + gradients + pieces
    process, available = _held(model, weights)
    return Memory(
        process=process,
        weights=weights,  # loaded whole, then split
        copies=int(kept.copies),
        optimizer=state_bytes(optimizer, model.model) // shards,
        best=trained // shards if held_out else 0,
        gradients=trained // shards,
        activations=int(activations),
        logits=logits,
        holes=int(_HOLES * (activations + logits)) if model.device.type == "cpu" else 0,
        available=available,
        accumulated=load.accumulated,
    )


def _watch(model: TreeModel, tokens: int) -> tuple[int, int, int]:
    """Bytes kept of a path of so many tokens; of each two of them besides; of their logits, all but the first's."""
    own = {each.untyped_storage().data_ptr() for each in model.model.parameters()}
    vocabulary = model.base.config.vocab_size
    seen: dict[int, StorageWeakRef] = {}
    kept = [0, 0, 0]

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # its address goes to no other
        if storage.data_ptr() not in own and reference.cdata not in seen:
            seen[reference.cdata] = reference
            of_logits = tensor.shape[-2:] in ((tokens, vocabulary), (tokens - 1, vocabulary))
            kept[2 if of_logits else tensor.shape.count(tokens) > 1] += storage.nbytes()

    ids = np.arange(tokens, dtype=np.int32) % vocabulary
    weights = np.ones(tokens, np.float32)
    path = Exchange("", "", ids[:1], 0 * weights[:1], ids[1:], weights[1:], "special")
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # which would hold all copies at once
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda _: torch.empty(0)):
            model.losses(merge([TokenTree.from_exchanges([path])]))
    finally:
        torch.set_autocast_cache_enabled(cached)
    return kept[0], kept[1], kept[2]


def _pairs(batch: PackedBatch) -> int:
    """A chain's tokens times those on the way to its last, over all chains."""
    ends = batch.subtree_end
    first = np.flatnonzero(np.diff(ends, prepend=-1))  # as `Layout` cuts a forest
    stops = np.append(first[1:], batch.size)
    return int(((stops - first) * (batch.position_ids[stops - 1] + 1)).sum())


def _held(model: TreeModel, weights: int) -> tuple[int, int]:
    """What the process holds besides the weights, and what there is for all of it."""
    if model.device.type == "cuda":
        return 0, weights + _available(model.device)
    import psutil  # type: ignore[import-untyped]

    for each in model.model.parameters():  # what was never read of a mapped file is in no memory yet
        each.detach().flatten()[:: 4096 // each.element_size()].sum()
    held: int = psutil.Process().memory_info().rss
    return max(0, held - weights), held + _available(model.device)


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free: Any = psutil.virtual_memory().available
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started here


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
