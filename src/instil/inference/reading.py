"""How a model reads what it goes on with: many answers at once through slots, or, where it cannot, one by itself.

A model is given slots by proof, as it is given token trees: a tiny one of its own kind must give, step by step, the
logits that plain transformers gives for each answer as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from instil.inference.cache import NAME, Layers, Prefill, Rest, Slots, Step
from instil.inference.sampling import Told, tell
from instil.model import attention
from instil.model.admission import TOLERANCE, tiny_model
from instil.model.attention import Layout
from instil.model.forward import TreeModel
from instil.model.load import quiet
from instil.packing import TokenTree
from instil.packing.tree import Ints

_SHARED = 32
"""Tokens that prompts must have in common to be read once for all; below, attention in pieces costs more."""

_NONE: Mapping[int, int] = MappingProxyType({})


class Joined(NamedTuple):
    """Prompts that were taken in.

    Args:
        logits: (P, V), those behind each.
        told: Of those that were asked about.
        reused: Of each prompt the tokens that were not read anew.
    """

    logits: Tensor
    told: dict[int, Told]
    reused: list[int]


class Reader(Protocol):
    """Gives the logits behind answers, which stand in rows, the first ones of `rows`."""

    rows: int

    def join(self, prompts: Sequence[Sequence[int]], told: Mapping[int, int] = _NONE) -> Joined:
        """Take in prompts as the next rows.

        Args:
            prompts: Token ids of each.
            told: The numbers of those whose own tokens are told of, with how many of the likeliest at each place.

        """

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token for each row: (B, V), the logits behind each."""

    def drop(self, row: int) -> None:
        """Let the last row take the place of this one."""


class SlotReader:
    """Reads many answers at once.

    Args:
        model: Whose attention is `NAME`.
        rows: Most answers.
        shared: Tokens that prompts must have in common to be read once for all, or with an earlier answer to be taken
            over from it.
        kept: Tokens of answers that are kept when they leave, with their prompts, for prompts that begin alike: those
            read last.
    """

    def __init__(self, model: TreeModel, rows: int, shared: int = _SHARED, kept: int = 0) -> None:
        self.rows = rows
        self._model = model
        self._shared = shared
        self._slots = Slots(rows)
        self._ids: list[list[int]] = []  # of each row, as far as they were read
        self._kept = Kept(kept)

    def join(self, prompts: Sequence[Sequence[int]], told: Mapping[int, int] = _NONE) -> Joined:
        """Take in prompts as the next rows; as `Reader.join`."""
        first = len(self._ids)
        known = [None if n in told else self._kept.find(prompt, self._shared) for n, prompt in enumerate(prompts)]
        new = [n for n in range(len(prompts)) if known[n] is None]
        self._ids += map(list, prompts)
        self._slots.use(len(self._ids), max(map(len, self._ids)))
        behind: list[Tensor] = [torch.empty(0)] * len(prompts)
        found: dict[int, Told] = {}
        if new:
            hidden, paths = self._read_new([prompts[n] for n in new], [first + n for n in new])
            for n, path in zip(new, paths, strict=True):
                behind[n] = hidden[path[-1]]
                if n in told:
                    found[n] = tell(self._logits_of(hidden, path), prompts[n], told[n])
        for n, earlier in enumerate(known):
            if earlier is not None:
                behind[n] = self._read_rest(prompts[n], first + n, *earlier)
        reused = [0 if earlier is None else earlier[1] for earlier in known]
        return Joined(self._model.logits(torch.stack(behind)), found, reused)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token for each row: (B, V), the logits behind each."""
        now = self._slots.now = Step([len(ids) for ids in self._ids], self._model.device)
        self._slots.use(now.rows, now.longest)
        inputs = torch.tensor(tokens).to(self._model.device)[:, None]  # (B, 1)
        hidden = self._read(inputs, now.positions[:, None], now)[:, -1]  # (B, D)
        for ids, token in zip(self._ids, tokens, strict=True):
            ids.append(token)
        return self._model.logits(hidden)

    def drop(self, row: int) -> None:
        """Let the last row take the place of this one."""
        if self._kept.takes(self._ids[row]):
            self._kept.keep(self._ids[row], self._slots.copy(row, len(self._ids[row])))
        last = len(self._ids) - 1
        if row < last:
            self._slots.move(last, row, len(self._ids[last]))
            self._ids[row] = self._ids[last]
        self._ids.pop()
        if not self._ids:
            self._slots.clear()

    def _read_new(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> tuple[Tensor, list[Any]]:
        """Prompts that are read whole: (T, D), what stands behind the tokens of their forest, and whose those are."""
        device = self._model.device
        # On CUDA the kernel for trees is compiled first.
        tree, paths = forest(prompts, self._shared if device.type != "cuda" else max(map(len, prompts)) + 1)
        layout = Layout(tree, device)
        self._slots.now = Prefill(layout, [_as_slice(path, device) for path in paths], slots)
        inputs = torch.from_numpy(tree.input_ids).to(device)[None]  # (1, T)
        return self._read(inputs, layout.depth[None], layout)[0], paths

    def _read_rest(self, prompt: Sequence[int], slot: int, layers: Layers, start: int) -> Tensor:
        """(D,) What stands behind a prompt that begins as something did that is kept."""
        self._slots.put(slot, layers, start)
        now = self._slots.now = Rest(slot, start, len(prompt) - start, self._model.device)
        inputs = torch.tensor([list(prompt[start:])]).to(self._model.device)  # (1, T)
        return self._read(inputs, now.positions[None], now)[0, -1]

    def _logits_of(self, hidden: Tensor, path: Any) -> Callable[[slice], Tensor]:
        return lambda part: self._model.logits(hidden[torch.from_numpy(path[part]).to(hidden.device)])

    def _read(self, inputs: Tensor, positions: Tensor, layout: Layout | Rest | Step) -> Tensor:
        read = {"input_ids": inputs, "position_ids": positions, "cache": self._slots, "use_cache": True}
        found: Tensor = self._model.base.base_model(**read, layout=layout).last_hidden_state
        return found


class Kept:
    """What was read before, for prompts that begin alike: a conversation that goes on, a system message.

    Args:
        tokens: Most of them; what was used least lately goes first.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._read: list[tuple[Ints, Layers]] = []  # the one used last at the end

    def takes(self, ids: Sequence[int]) -> bool:
        """Whether that many tokens are kept at all."""
        return len(ids) <= self._tokens

    def find(self, prompt: Sequence[int], least: int) -> tuple[Layers, int] | None:
        """What begins as a prompt does, and how far; None if in less than that many tokens.

        The last token of a prompt is never among them, for something must be read to go on from.
        """
        ids = np.asarray(prompt[:-1], np.int64)
        common = [_common(own, ids) for own, _ in self._read]
        longest = max(common, default=0)
        if longest < max(least, 1):
            return None
        self._read.append(self._read.pop(common.index(longest)))
        return self._read[-1][1], longest

    def keep(self, ids: Sequence[int], layers: Layers) -> None:
        """Keep what was read, in place of what it begins with."""
        own = np.asarray(ids, np.int64)
        self._read = [each for each in self._read if _common(each[0], own) < len(each[0])]
        self._read.append((own, layers))
        while sum(len(each) for each, _ in self._read) > self._tokens:
            self._read.pop(0)


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

    def join(self, prompts: Sequence[Sequence[int]], told: Mapping[int, int] = _NONE) -> Joined:
        """Take in a prompt as the only row; as `Reader.join`."""
        (prompt,) = prompts
        self._ids = list(prompt)
        self._cache = DynamicCache(config=self._model.config) if self._cached else None
        logits = self._read(self._ids, {} if told else self._more)[0]  # (T or 1, V)
        return Joined(logits[-1:], {n: tell(logits.__getitem__, prompt, top) for n, top in told.items()}, [0])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in one more token: (1, V), the logits behind it."""
        self._ids += tokens
        return self._read(tokens if self._cached else self._ids, self._more)[:, -1]

    def drop(self, row: int) -> None:
        """Forget the row."""
        self._cache = None

    def _read(self, ids: Sequence[int], more: Mapping[str, Any]) -> Tensor:
        inputs = torch.tensor([list(ids)]).to(self._model.device)
        state = {"cache": self._cache, "use_cache": True} if self._cached else {"use_cache": False}
        found: Tensor = self._model(input_ids=inputs, **state, **more).logits
        return found


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
        common = _common(np.asarray(above, np.int64), np.asarray(prompt, np.int64))
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
    if "cache" not in _arguments(model):
        return plain
    with torch.inference_mode(), quiet():
        whole = plain.join([ids]).logits
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
        found = _side_by_side(SlotReader(TreeModel(tiny, one_by_one="it generates"), 2, shared=2, kept=64))
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
    """Answers of unlike lengths, longer than the window; one leaves, and others join, the last of which goes on from
    the one that left: ids, and the logits behind.
    """
    draw = np.random.default_rng(0)
    first, second, third = (draw.integers(1, 60, size).tolist() for size in (6, 4, 5))
    second[:3] = first[:3]
    left, rows = first, [first, second]
    found = list(zip(rows, reader.join(rows).logits, strict=True))
    for step in range(6):
        if step in (2, 4):
            reader.drop(0)
            new = third if step == 2 else [*left[:-2], *draw.integers(1, 60, 2).tolist()]
            left, rows = rows[0], [rows[1], new]
            found.append((new, reader.join([new]).logits[0]))
        tokens = draw.integers(1, 60, 2).tolist()
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        found += zip(rows, reader.step(tokens), strict=True)
    return found


def _common(one: Ints, other: Ints) -> int:
    """The tokens that both begin with."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def _as_slice(path: Any, device: torch.device) -> Tensor | slice:
    """The rows of a prompt as a slice where they stand together, which copies nothing."""
    if path[-1] - path[0] + 1 == len(path):
        return slice(int(path[0]), int(path[-1]) + 1)
    return torch.from_numpy(path).to(device)


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
