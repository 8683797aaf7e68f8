"""Checkpoints: the whole state of a run, written so that what is there is whole.

    step-00000120/
        *.safetensors    what is trained, the optimizer's state and the best weights so far, by name
        state.json       the step, and what the run was made of
        metrics.jsonl    every step and evaluation so far
        manifest.json    the hash of each file, written last

A checkpoint is written beside its place, put on the disk, sealed by its manifest and renamed; an older one is removed
when the new one has been read back and is as its manifest says. Tensors go through torch's distributed checkpointing,
so that a run can go on with another number of processes. The order of the rows and dropout follow from the seed and the
step, so there is nothing else to keep.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instil.errors import TrainingError
from instil.training.distributed import Processes
from instil.training.events import Evaluation, Step
from instil.training.files import METRICS, broken, seal, sync_one, write_json
from instil.training.metrics import read_metrics, write_metrics

_PREFIX = "step-"
_DRAFT = f".{_PREFIX}"
_STATE = "state.json"
_FILE = 1 << 28  # bytes of one file: as much is held in memory once more while it is written


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is whole.

    Args:
        folder: Where it stands.
        step: The last step that it holds.
        made_of: What the run was made of, by name: settings and hashes.
        steps: Every step so far.
        evaluations: Every evaluation so far.
        passed: What is wrong with newer ones.
    """

    folder: Path
    step: int
    made_of: Mapping[str, Any]
    steps: list[Step]
    evaluations: list[Evaluation]
    passed: Sequence[str] = ()

    @classmethod
    def read(cls, folder: Path, passed: Sequence[str] = ()) -> Checkpoint:
        """Read all but the tensors of a checkpoint that is whole."""
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        steps, evaluations = read_metrics(folder / METRICS)
        return cls(folder, state["step"], state["made_of"], steps, evaluations, passed)

    def kinds(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """The type and the whole shape of each tensor."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        metadata: dict[str, Any] = HuggingFaceStorageReader(str(self.folder)).read_metadata().state_dict_metadata
        return {name: (each.properties.dtype, each.size) for name, each in metadata.items()}

    def load(self, tensors: dict[str, Tensor], processes: Processes) -> None:
        """Read tensors in place; of those that processes hold in parts, each its part."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with torch.no_grad(), processes.together(), _alone():
            load(
                {name: each.detach() for name, each in tensors.items()},
                storage_reader=HuggingFaceStorageReader(str(self.folder)),
                no_dist=processes.size == 1,
            )


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: Where they stand.
        keep: How many; 0 writes none.
        every: Steps from one to the next; None for ten in all.
        made_of: What the run is made of, by name: what a checkpoint must agree with to be gone on from.
        processes: The processes that train.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        every: int | None = None,
        made_of: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.every = every
        self.made_of = dict(made_of or {})
        self.processes = processes or Processes()

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with those that were passed over."""
        passed: list[str] = []
        for folder in reversed(self._all()):
            wrong = broken(folder)
            if not wrong:
                return Checkpoint.read(folder, passed), passed
            passed.append(f"{folder}: {wrong}")
        return None, passed

    def due(self, step: int, steps: int) -> bool:
        """Whether one is written after a step."""
        return self.keep > 0 and (step == steps or step % (self.every or max(1, steps // 10)) == 0)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], steps: Sequence[Step], evaluations: Sequence[Evaluation]
    ) -> Path:
        """Write one; older ones go when it has been read back.

        Args:
            step: The last step that it holds.
            tensors: The whole state.
            steps: Every step so far.
            evaluations: Every evaluation so far.

        Raises:
            TrainingError: It cannot be written; older ones are as they were.
        """
        final, draft = self.folder / f"{_PREFIX}{step:08d}", self.folder / f"{_DRAFT}{step:08d}"
        with self._writing(step, draft):
            if self.processes.first:
                for left in self.folder.glob(f"{_DRAFT}*"):  # of a run that was killed
                    shutil.rmtree(left)
                draft.mkdir(parents=True)
                sync_one(self.folder.parent)
            self.processes.wait()
            self._write(tensors, draft)
            self.processes.wait()
            if self.processes.first:
                write_metrics(draft / METRICS, steps, evaluations)
                state = {"format": 1, "step": step, "made_of": self.made_of}
                write_json(draft / _STATE, state)
                seal(draft)
                self._put(draft, final)
            self.processes.wait()  # until it is there: who ends now, ends all
        return final

    def _write(self, tensors: Mapping[str, Tensor], draft: Path) -> None:
        """Write tensors, each process its part."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # which takes a second to import
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(draft), fqn_to_index_mapping=_files(tensors), save_distributed=True)
        with self.processes.together(), _alone():
            save(dict(tensors), storage_writer=writer, no_dist=self.processes.size == 1)

    def _put(self, draft: Path, final: Path) -> None:
        """Move a sealed checkpoint to its place; once it has been read back, those beyond the number to keep go."""
        if final.exists():  # a broken one, that was passed over
            shutil.rmtree(final)
        os.replace(draft, final)
        sync_one(self.folder)
        if wrong := broken(final):
            raise TrainingError(
                f"{final}: a checkpoint was written and is not what it should be: {wrong}",
                "The disk may be failing; older checkpoints are as they were.",
            )
        found = self._all()
        kept = [each for each in found if each.name <= final.name][-self.keep :]  # later ones were passed over, too
        for each in found:
            if each not in kept:
                shutil.rmtree(each)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit())

    @contextmanager
    def _writing(self, step: int, draft: Path) -> Iterator[None]:
        """Leave nothing half-written, and say what went wrong."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            reason = _of_the_system(error)
            if reason is None:
                raise
            raise TrainingError(
                f"{self.folder}: the checkpoint of step {step:,} cannot be written: {reason}",
                "Older checkpoints are as they were: make room and go on with --resume.",
            ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to, from 1."""
    found, number, size = {}, 1, 0
    for name, each in tensors.items():
        more = each.numel() * each.element_size()
        if size and size + more > _FILE:
            number, size = number + 1, 0
        found[name] = number
        size += more
    return found


def _of_the_system(error: BaseException) -> str | None:
    """The words of the system if it is what failed; torch puts its own error around that."""
    failures: dict[int, Any] = getattr(error, "failures", {})  # by process
    cause = next((failure[0] for failure in failures.values()), error)
    return cause.strerror or str(cause) if isinstance(cause, OSError) else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what two runs were not made of alike."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
