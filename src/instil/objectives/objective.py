"""What training is for: how packed batches and a model make a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from instil.model.forward import TreeModel
from instil.packing import PackedBatch

Total = Callable[..., list[float]]
"""Gives the sums of some numbers over all the processes that train together."""


class Objective(Protocol):
    """A loss that is a sum over parts (targets, pairs, answers) by the sum of their weights, over a whole step.

    So it is the same however the step is cut into batches. A module with these functions is one.
    """

    def ready(self, model: TreeModel, batches: Sequence[PackedBatch], total: Total) -> Objective:
        """The objective for a step, with what depends on all of its batches.

        Args:
            model: What is trained.
            batches: This process's batches of the step.
            total: Sums over all processes.
        """

    def weight(self, batch: PackedBatch) -> float:
        """The part that a batch has in the loss of its step."""

    def loss(self, model: TreeModel, batch: PackedBatch) -> tuple[Tensor, list[float]]:
        """A batch's part of the loss, which the step divides by all its weights; and what `measures` is made of.

        Args:
            model: What reads the batch.
            batch: A packed batch.

        Returns:
            (), in nats, with gradients; and numbers whose sums over a step's batches `measures` takes.
        """

    def measures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """What a step is told by beside its loss, by name.

        Args:
            sums: Over all batches of the step; empty where it has none.
        """
