"""Supervised tuning: the weighted cross-entropy of every target."""

from __future__ import annotations

import torch
from torch import Tensor

from instil.model.forward import TreeModel
from instil.packing import PackedBatch


def weight(batch: PackedBatch) -> float:
    """The part that a batch has in the loss of its step: the sum of its targets' weights."""
    return float(batch.target_weights.sum(dtype=float))


def loss(model: TreeModel, batch: PackedBatch) -> Tensor:
    """The sum of the targets' cross-entropies, each times its weight, in nats; a step divides it by all its weights.

    Args:
        model: What reads the batch.
        batch: A packed batch.
    """
    losses = model.losses(batch)  # (S,)
    return losses @ torch.from_numpy(batch.target_weights).to(losses)
