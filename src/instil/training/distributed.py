"""Several processes that train one model: each reads its share of a step, and the sums are those of all.

`torchrun` starts them and says who they are. A step is the same however many there are: its rows are dealt before they
are shared out, its loss is divided by the weights of all, and gradients are summed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from instil.errors import TrainingError
from instil.packing import PackedBatch

_PATIENCE = timedelta(hours=2)  # while the first process encodes the data, the others wait; a dead one is seen at once
_BUCKET = 1 << 25  # gradient elements summed at once


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run; one alone by default.

    Args:
        rank: The number of this one, from 0.
        size: How many there are.
        local_rank: The number of this one on its machine.
        joined: Whether it joined the others itself, and so takes leave of them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    joined: bool = False

    @classmethod
    def join(cls) -> Processes:
        """Join those that `torchrun` started with this one; one alone where it did not.

        Raises:
            TrainingError: The others are not reached.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local)
            joined = not dist.is_initialized()
            if joined:
                dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:  # no such GPU, nobody there
            raise TrainingError(
                f"process {rank} of {size} cannot join the others: {str(error).strip().splitlines()[0]}",
                "Start one for each GPU, with torchrun.",
            ) from error
        return cls(rank, size, local, joined)

    def leave(self) -> None:
        """Take leave of the others; all do, once all is well."""
        if self.joined:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What takes all of them; when one is gone, the others say so.

        Raises:
            TrainingError: Another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
                raise
            raise TrainingError(
                "another process has ended or cannot be reached: "
                + re.sub(r"^\[[^]]*\]\s*", "", text.strip().splitlines()[0])[:200],
                "See what that one said; go on from the last checkpoint with --resume.",
            ) from error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine first, then the others: what it makes they find in the cache."""
        if self.size > 1 and self.local_rank:
            self.wait()
        yield
        if self.size > 1 and not self.local_rank:
            self.wait()

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            with self.together():
                dist.barrier()

    def total(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        with self.together():
            dist.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def gathered(self, values: Sequence[str]) -> list[str]:
        """What all processes say, in the order of their numbers."""
        if self.size == 1:
            return list(values)
        found: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(found, list(values))
        return [value for part in found for value in part]

    def share(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """This process's part of a step: as many micro-batches as any other has, one that weighs nothing if need be."""
        mine = [batches[index] for index in range(self.rank, len(batches), self.size)]
        if self.rank and self.rank >= len(batches) % self.size > 0:
            small = batches[0].select(np.array([0]))
            mine.append(replace(small, target_weights=np.zeros_like(small.target_weights)))
        return mine

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the sum of all processes'; those of sharded parameters are so already."""
        if self.size == 1:
            return
        held = [each for each in parameters if not _is_sharded(each)]
        for each in held:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        bucket: list[Tensor] = []
        for at, each in enumerate(held, 1):
            assert each.grad is not None
            bucket.append(each.grad)
            if at == len(held) or sum(grad.numel() for grad in bucket) >= _BUCKET:
                self._sum(bucket)
                bucket = []

    def _sum(self, grads: Sequence[Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        with self.together():
            dist.all_reduce(flat)
        for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def shard(model: nn.Module, layers: Sequence[nn.Module], methods: Sequence[str]) -> None:
    """Split the parameters of a model, its layers' apart, so that each process holds a part (FSDP2).

    A layer's weights are whole only while it computes. Gradients come out summed over the processes.

    Args:
        model: Split in place.
        layers: Those of its modules that are put together one after the other.
        methods: The model's methods that compute with it.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for module in [*layers, model]:
        fully_shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
            module.set_reduce_scatter_unused_params(True)  # an expert that no row of one process met
    for method in methods:
        register_fsdp_forward_method(model, method)


def reshard(model: nn.Module) -> None:
    """Give up what was put together to evaluate, or parameters would be taken from there when they have changed."""
    if hasattr(model, "reshard"):  # it is sharded
        cast(Any, model).reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that processes hold in parts, put together; all of them must ask."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import
