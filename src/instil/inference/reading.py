"""How a model reads what it goes on with: many answers at once through slots, or, where it cannot, one by itself.

A model is given slots by proof, as it is given token trees: a tiny one of its own kind must give, step by step, the
logits that plain transformers gives for each answer as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from instil.inference.cache import NAME, Prefill, Slots, Step
from instil.model import attention
from instil.model.admission import TOLERANCE, tiny_model
from instil.model.attention import Layout
from instil.model.forward import TreeModel
from instil.model.load import quiet
from instil.packing import TokenTree

_SHARED = 32
"""Tokens that prompts must have in common to be read once for all; below, attention in pieces costs more."""


class Reader(Protocol):
    """Gives the logits behind answers, which stand in rows, the first ones of `rows`."""

    rows: int

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take in prompts as the next rows: (P, V), the logits behind each."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token for each row: (B, V), the logits behind each."""

    def drop(self, row: int) -> None:
        """Let the last row take the place of this one."""


class SlotReader:
    """Reads many answers at once.

    Args:
        model: Whose attention is `NAME`.
        rows: Most answers.
        length: Most tokens of one, its prompt included.
        shared: Tokens that prompts must have in common to be read once for all.
    """

    def __init__(self, model: TreeModel, rows: int, length: int, shared: int = _SHARED) -> None:
        self.rows = rows
        self._model = model
        self._shared = shared if model.device.type != "cuda" else length + 1  # its kernel for trees is compiled first
        self._slots = Slots(rows, length)
        self._lengths: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take in prompts as the next rows: (P, V), the logits behind each."""
        tree, paths = forest(prompts, self._shared)
        device = self._model.device
        layout = Layout(tree, device)
        ends, which = np.unique([path[-1] for path in paths], return_inverse=True)
        self._slots.now = Prefill(layout, [_as_slice(path, device) for path in paths], len(self._lengths))
        hidden = self._read(torch.from_numpy(tree.input_ids).to(device)[None], layout.depth[None], layout)[0]  # (T, D)
        self._lengths += map(len, prompts)
        return self._model.logits(hidden[torch.from_numpy(ends).to(device)])[torch.from_numpy(which).to(device)]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token for each row: (B, V), the logits behind each."""
        now = self._slots.now = Step(self._lengths, self._model.device)
        inputs = torch.tensor(tokens).to(self._model.device)[:, None]  # (B, 1)
        hidden = self._read(inputs, now.positions[:, None], now)[:, -1]  # (B, D)
        self._lengths = [length + 1 for length in self._lengths]
        return self._model.logits(hidden)

    def drop(self, row: int) -> None:
        """Let the last row take the place of this one."""
        last = len(self._lengths) - 1
        if row < last:
            self._slots.move(last, row, self._lengths[last])
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def _read(self, inputs: Tensor, positions: Tensor, layout: Layout | Step) -> Tensor:
        read = {"input_ids": inputs, "position_ids": positions, "past_key_values": self._slots, "use_cache": True}
        found: Tensor = self._model.base.base_model(**read, layout=layout).last_hidden_state
        return found


class OneReader:
    """Reads one answer at a time, through the model's own attention and cache.

    Args:
        model: A causal language model of transformers.
        cached: Whether it can go on from a cache; else all is read again for each token.
    """

    rows = 1

    def __init__(self, model: nn.Module, *, cached: bool) -> None:
        self._model: Any = model
        self._cached = cached
        self._cache: Any = None
        self._ids: list[int] = []
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take in a prompt as the only row: (1, V), the logits behind it."""
        (prompt,) = prompts
        self._ids = list(prompt)
        self._cache = DynamicCache(config=self._model.config) if self._cached else None
        return self._read(self._ids)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token: (1, V), the logits behind it."""
        self._ids += tokens
        return self._read(tokens if self._cached else self._ids)

    def drop(self, row: int) -> None:
        """Forget the row."""
        self._cache = None

    def _read(self, ids: Sequence[int]) -> Tensor:
        inputs = torch.tensor([list(ids)]).to(self._model.device)
        state = {"past_key_values": self._cache, "use_cache": True} if self._cached else {"use_cache": False}
        logits: Tensor = self._model(input_ids=inputs, **state, **self._more).logits
        return logits[:, -1]


def forest(prompts: Sequence[Sequence[int]], shared: int) -> tuple[TokenTree, list[Any]]:
    """Prompts laid out as a forest, where those that begin alike share that.

    Args:
        prompts: None is empty.
        shared: Tokens that two must have in common to share them; what is the same as a whole is always shared.

    Returns:
        The forest, without targets, and for each prompt the rows of its tokens, int64.
    """
    ids: list[int] = []
    ends: list[int] = []
    depths: list[int] = []
    paths: list[Any] = [None] * len(prompts)
    above: Sequence[int] = ()
    path = np.empty(0, np.int64)
    for number in sorted(range(len(prompts)), key=lambda each: list(prompts[each])):
        prompt = prompts[number]
        common = _common(above, prompt)
        common = common if common >= shared or common == len(prompt) == len(above) else 0
        start, new = len(ids), len(prompt) - common
        for row in path[common:].tolist():
            ends[row] = start
        ids += prompt[common:]
        depths += range(common, len(prompt))
        ends += [0] * new
        path = paths[number] = np.concatenate([path[:common], np.arange(start, start + new)])
        above = prompt
    for row in path.tolist():
        ends[row] = len(ids)
    none = np.empty(0, np.int64)
    laid, depth, end = (np.array(each, np.int64) for each in (ids, depths, ends))
    return TokenTree(laid, depth, end, none, none, np.empty(0, np.float32), none, none, none, none, np.empty(0)), paths


def reading_alone(model: nn.Module) -> OneReader:
    """Reads one answer at a time; from a cache, if the model is seen to go on from it as if it had read all again."""
    ids = [1, 2, 3, 5, 4, 2]
    plain, reader = OneReader(model, cached=False), OneReader(model, cached=True)
    if "past_key_values" not in _arguments(model):
        return plain
    with torch.inference_mode(), quiet():
        whole = plain.join([ids])
        try:
            reader.join([ids[:3]])
            found = [reader.step([each]) for each in ids[3:]][-1]
        except Exception:  # caches are of many kinds
            return plain
        wide = max(TOLERANCE, 64 * torch.finfo(whole.dtype).eps)
        return reader if float((found - whole).norm()) <= wide * float(whole.norm()) else plain


def refusal(model: nn.Module) -> str:
    """Why a model cannot read many answers at once; "" if it is proved that it can.

    Args:
        model: A causal language model of transformers.
    """
    with quiet(), torch.inference_mode():
        try:
            tiny = tiny_model(model)
        except Exception as error:  # configurations hold anything
            return f"no small model of its kind could be made to try it on: {_first_line(error)}"
        wrong = _wrong(tiny)
        return wrong and _wrong(tiny.float())  # some operations know no float64


def _wrong(tiny: Any) -> str:
    """What is wrong with the logits of answers side by side, against each read as a whole."""
    attention.unknown_arguments.clear()
    try:
        tiny.set_attn_implementation(NAME)
        found = _side_by_side(SlotReader(TreeModel(tiny, one_by_one="it generates"), 2, 32, shared=2))
        tiny.set_attn_implementation("eager")
        off = 0.0
        for ids, logits in found:
            whole = tiny(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            off = max(off, float((logits - whole).norm() / whole.norm()))
    except Exception as error:  # models do anything
        return f"it fails with answers side by side: {_first_line(error)}"
    if attention.unknown_arguments:
        return f"it hands its attention what is not known here: {', '.join(sorted(attention.unknown_arguments))}"
    return "" if off <= TOLERANCE else f"side by side its logits are off by {off:.1e}"


def _side_by_side(reader: SlotReader) -> list[tuple[list[int], Tensor]]:
    """Answers of unlike lengths, longer than the window; one leaves and another joins: ids, and the logits behind."""
    draw = np.random.default_rng(0)
    first, second, third = (draw.integers(1, 60, size).tolist() for size in (6, 4, 5))
    second[:3] = first[:3]
    rows: list[list[int]] = [first, second]
    found = list(zip(rows, reader.join(rows), strict=True))
    for step in range(6):
        if step == 3:
            reader.drop(0)
            rows = [rows[1], third]
            found.append((third, reader.join([third])[0]))
        tokens = draw.integers(1, 60, 2).tolist()
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        found += zip(rows, reader.step(tokens), strict=True)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The tokens that both begin with."""
    if one == other:
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _as_slice(path: Any, device: torch.device) -> Tensor | slice:
    """The rows of a prompt as a slice where they stand together, which copies nothing."""
    if path[-1] - path[0] + 1 == len(path):
        return slice(int(path[0]), int(path[-1]) + 1)
    return torch.from_numpy(path).to(device)


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
