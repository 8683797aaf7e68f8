"""Supervised tuning: the weighted cross-entropy of every target. An `Objective`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from instil.model.forward import TreeModel
from instil.objectives.objective import Objective, Total
from instil.packing import PackedBatch


def ready(model: TreeModel, batches: Sequence[PackedBatch], total: Total) -> Objective:
    """This objective: a step's batches have nothing to do with each other."""
    return cast(Objective, sys.modules[__name__])


def weight(batch: PackedBatch) -> float:
    """The part that a batch has in the loss of its step: the sum of its targets' weights."""
    return float(batch.target_weights.sum(dtype=float))


def loss(model: TreeModel, batch: PackedBatch) -> tuple[Tensor, list[float]]:
    """The sum of the targets' cross-entropies, each times its weight, in nats; a step divides it by all its weights.

    Args:
        model: What reads the batch.
        batch: A packed batch.
    """
    losses = model.losses(batch)  # (S,)
    return losses @ torch.from_numpy(batch.target_weights).to(losses), []


def measures(sums: Sequence[float]) -> Mapping[str, float]:
    """Nothing beside the loss."""
    return {}
