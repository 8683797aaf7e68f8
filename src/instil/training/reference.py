"""What the model that training starts from makes of the answers: computed once, in packed batches, and kept."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from instil.errors import TrainingError, UsageError
from instil.model.forward import TreeModel
from instil.objectives.preference import log_probs
from instil.packing import StoredTrees, TokenTree, pack
from instil.training.distributed import Processes
from instil.training.memory import keep_freed_blocks
from instil.training.preflight import naming

_NAME = "reference"


class NamedTrees(list[TokenTree]):
    """Trees in memory that know where their rows stand.

    Args:
        trees: One for each row.
        source: The trees that they were made of, row by row.
    """

    def __init__(self, trees: Sequence[TokenTree], source: Sequence[TokenTree]) -> None:
        super().__init__(trees)
        self._source = source

    def name(self, index: int) -> str:
        """Where the row of a tree stands."""
        return naming(self._source)(index)


def with_reference(
    model: TreeModel,
    trees: Sequence[TokenTree],
    *,
    tokens_per_batch: int = 8192,
    cache: Path | None = None,
    processes: Processes | None = None,
    telling: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Sequence[TokenTree], str]:
    """The trees with the log-probability of each exchange under the model as it is now.

    Args:
        model: The one to stay near.
        trees: One for each row, each no larger than a batch.
        tokens_per_batch: The most tokens of a batch.
        cache: Folder that keeps the result, by the content of model and trees; None keeps nothing.
        processes: Those that train together, which share the work.
        telling: Is told how many batches are done, of how many.

    Returns:
        The trees, and what was done, for people.

    Raises:
        TrainingError: The model makes no finite number of an answer.
        UsageError: The cache cannot be written.
    """
    processes = processes or Processes()
    began = time.perf_counter()
    exchanges = _exchanges(trees)  # (N,)
    file = None if cache is None else cache / f"{_NAME}-{_key(model, trees)}.safetensors"
    found = None if file is None else _kept(file, int(exchanges.sum()))
    known = processes.total(float(found is None))[0] == 0
    if not known or found is None:
        found = _computed(model, trees, exchanges, tokens_per_batch, processes, telling)
        _check_finite(found, trees, exchanges)
        if file is not None and processes.first:
            _keep(file, found)
    said = "found in the cache" if known else f"computed in {time.perf_counter() - began:.0f} seconds"
    return _attached(trees, found, exchanges), f"log-probabilities of {len(found):,} answers, {said}"


@torch.no_grad()
def _computed(
    model: TreeModel,
    trees: Sequence[TokenTree],
    exchanges: NDArray[np.int64],
    tokens: int,
    processes: Processes,
    telling: Callable[[int, int], None],
) -> NDArray[np.float64]:
    model.model.eval()
    if model.device.type == "cpu":
        keep_freed_blocks()
    found = np.zeros(int(exchanges.sum()))
    first = np.cumsum(exchanges) - exchanges  # (N,)
    batches = pack(trees, tokens)
    for number in range(processes.rank, len(batches), processes.size):
        telling(number, len(batches))
        batch = batches[number]
        record = batch.exchange_record  # (E,), the exchanges of a row one after the other
        starts = np.flatnonzero(np.diff(record, prepend=-1))
        within = np.arange(len(record)) - np.repeat(starts, np.diff(np.append(starts, len(record))))
        found[first[record] + within] = log_probs(model, batch).cpu().numpy()
    return np.array(processes.total(*found.tolist()))


def _check_finite(found: NDArray[np.float64], trees: Sequence[TokenTree], exchanges: NDArray[np.int64]) -> None:
    row_of = np.repeat(np.arange(len(trees)), exchanges)
    rows = np.unique(row_of[~np.isfinite(found)])
    if len(rows):
        raise TrainingError(
            f"before training the model already makes no finite number of the answers of {len(rows):,} of "
            f"{len(trees):,} rows; the first is {naming(trees)(int(rows[0]))}",
            "Look at the row and at the model's weights, or compute with --precision fp32.",
        )


def _exchanges(trees: Sequence[TokenTree]) -> NDArray[np.int64]:
    """(N,) how many exchanges each row has."""
    stored = trees.exchanges if isinstance(trees, StoredTrees) else [tree.exchanges for tree in trees]
    return np.asarray(stored, np.int64)


def _attached(
    trees: Sequence[TokenTree], found: NDArray[np.float64], exchanges: NDArray[np.int64]
) -> Sequence[TokenTree]:
    if isinstance(trees, StoredTrees):
        return trees.with_reference(found)
    parts = np.split(found, np.cumsum(exchanges)[:-1])
    return NamedTrees([tree.with_reference(part) for tree, part in zip(trees, parts, strict=True)], trees)


def _key(model: TreeModel, trees: Sequence[TokenTree]) -> str:
    """What decides the result: every weight, what adapters are scaled by, and every token and weight of the trees."""
    digest = hashlib.sha256(f"{model.bf16} {model.one_by_one} {torch.__version__} {model.base.config!r}".encode())
    inner = model.model
    held = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    held |= {name: each for name, each in inner.state_dict().items() if name not in held}  # scales of 4 bits
    for name, each in held.items():
        digest.update(f"{name} {tuple(each.shape)} {each.dtype}\0".encode())
        digest.update(each.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    for name, module in inner.named_modules():
        digest.update(f"{name} {module.scaling}\0".encode() if hasattr(module, "lora_A") else b"")
    for tree in trees:
        for array in _told(tree):
            digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def _told(tree: TokenTree) -> Sequence[NDArray[Any]]:
    whole = (tree.input_ids, tree.subtree_end, tree.target_rows, tree.target_ids, tree.exchange_prompt)
    return [*(each.astype(np.int64) for each in whole), tree.target_weights, tree.target_exchange.astype(np.int64)]


def _kept(file: Path, exchanges: int) -> NDArray[np.float64] | None:
    """What is kept in a file, if it is whole."""
    try:
        found: NDArray[np.float64] = load_file(file)[_NAME]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == (exchanges,) and np.isfinite(found).all() else None


def _keep(file: Path, found: NDArray[np.float64]) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({_NAME: found}, draft)
        os.replace(draft, file)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise UsageError(
            f"{file.parent}: what the reference makes of the answers cannot be kept there: {error}",
            "Choose another folder with --cache-dir or $INSTIL_CACHE, or keep nothing with --no-cache.",
        ) from error
