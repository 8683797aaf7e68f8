"""The key-value cache: a slot for each answer, filled from the left, so that a token's place is its position.

New prompts are read together as one forest of tokens, in one row without padding, through the attention of training;
their keys and values are copied into slots. From then on each step reads one token of every slot. Answers that end
leave; the last slot takes their place, so that those in use are always the first ones, and no step computes for nobody.
What a slot held may be kept, and a later prompt that begins alike goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from instil.model.attention import Layout, attend, by_definition, masked

NAME = "instil-cached"
_AHEAD = 64  # tokens that slots are made longer than they must be, at least


class Prefill:
    """New prompts, laid out as a forest: where each stands, and the slots that take them.

    Args:
        layout: Of the forest.
        paths: For each prompt the rows of its tokens, or a slice of them.
        slots: The slot of each prompt.
    """

    def __init__(self, layout: Layout, paths: Sequence[Tensor | slice], slots: Sequence[int]) -> None:
        self.layout = layout
        self.paths = paths
        self.slots = slots


class Rest:
    """The rest of a prompt whose first tokens a slot holds already.

    Args:
        slot: Which.
        start: The tokens that it holds.
        count: Those that are new.
        device: Where the cache is.
    """

    def __init__(self, slot: int, start: int, count: int, device: torch.device) -> None:
        self.slot, self.start = slot, start
        self.longest = start + count
        self.positions = torch.arange(start, self.longest, device=device)  # (count,)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, count, L) what is added to the scores: 0 for what a new token sees, -inf else."""
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = _unseen(self.positions, self.longest, window, dtype)[None, None]
        return self._masks[window, dtype]


class Step:
    """One more token for each of the first `len(lengths)` slots.

    Args:
        lengths: The tokens that each slot holds, which is the position of the new one.
        device: Where the cache is.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows = len(lengths)
        self.longest = max(lengths) + 1
        self.even = min(lengths) + 1 == self.longest
        self.positions = torch.tensor(lengths).to(device)  # (B,)
        self._all = None if self.even else torch.arange(self.rows, device=device)  # (B,)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Put the keys or values of the new tokens, (B, K, 1, D), into slots, (count, K, length, D)."""
        if self.even:
            kept[: self.rows, :, self.longest - 1] = new[:, :, 0]
        else:
            kept[self._all, :, self.positions] = new[:, :, 0]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, L) what is added to the scores: 0 for what a new token sees, -inf else; None if it sees all."""
        window = window if window is not None and window < self.longest else None
        if self.even and window is None:
            return None
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = _unseen(self.positions, self.longest, window, dtype)[:, None, None]
        return self._masks[window, dtype]


def _unseen(positions: Tensor, longest: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(N, longest) for tokens at these positions, (N,): 0 for those that each sees, -inf for the others."""
    at, here = torch.arange(longest, device=positions.device), positions[:, None]
    hidden = at > here if window is None else (at > here) | (here - at >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)


Layers = dict[int, tuple[Tensor, Tensor]]
"""Keys and values by the number of their layer."""


class Slots:
    """Keys and values of all layers, as transformers' models read and write them.

    Memory is taken as it is needed, and given back where it no longer is when more is taken: as many slots as there
    ever were, each as long as the longest ever was, would be many times what is in use.

    Args:
        count: Most slots.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows = self._longest = 0  # in use
        self._layers: Layers = {}  # each (slots, K, length, D), with numbers everywhere: a weight of 0 hides no NaN
        self.now: Prefill | Rest | Step | None = None

    def use(self, rows: int, longest: int) -> None:
        """Say what is in use from now on: the first slots, up to so many tokens each."""
        self._rows, self._longest = rows, longest

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a layer; return those that its attention is to read.

        Args:
            key: (1, K, T, D) of new prompts or the rest of one, or (B, K, 1, D) of a step.
            value: Likewise.
            layer_idx: Of the layer.
        """
        now = self.now
        assert now is not None
        layer = self._layer(layer_idx, (key[0], value[0]))
        if isinstance(now, Prefill):
            for slot, path in zip(now.slots, now.paths, strict=True):
                for kept, new in zip(layer, (key, value), strict=True):
                    part = new[0, :, path]
                    kept[slot, :, : part.shape[1]] = part
            return key, value
        if isinstance(now, Rest):
            for kept, new in zip(layer, (key, value), strict=True):
                kept[now.slot, :, now.start : now.longest] = new[0]
            keys, values = (kept[now.slot : now.slot + 1, :, : now.longest] for kept in layer)
            return keys, values
        for kept, new in zip(layer, (key, value), strict=True):
            now.write(kept, new)
        keys, values = (kept[: now.rows, :, : now.longest] for kept in layer)
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Let the slot `target` hold what the slot `source` does, which is of this length."""
        for layer in self._layers.values():
            for kept in layer:
                kept[target, :, :length] = kept[source, :, :length]

    def copy(self, slot: int, length: int) -> Layers:
        """What a slot holds, each (K, length, D)."""
        return {
            number: (keys[slot, :, :length].clone(), values[slot, :, :length].clone())
            for number, (keys, values) in self._layers.items()
        }

    def put(self, slot: int, layers: Layers, length: int) -> None:
        """Let a slot hold the first `length` tokens of what `copy` gave."""
        for number, own in layers.items():
            for kept, new in zip(self._layer(number, own), own, strict=True):
                kept[slot, :, :length] = new[:, :length]

    def clear(self) -> None:
        """Give the memory back."""
        self._layers.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every call."""
        return 0

    def _layer(self, number: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The slots of a layer, at least those in use; `new` are keys and values of it, each (K, ., D)."""
        found = self._layers.get(number)
        if found is None:
            found = tuple(each.new_empty((0, each.shape[0], 0, each.shape[2])) for each in new)  # type: ignore[assignment]
            assert found is not None
        count, size = found[0].shape[0], found[0].shape[2]
        rows, longest = self._rows, self._longest
        if count < rows or size < longest:
            count = min(self._count, max(rows, 2 * count)) if count < rows else min(count, 2 * rows)
            size = max(longest + _AHEAD, size * 3 // 2) if size < longest else min(size, longest * 3 // 2 + _AHEAD)
            keys, values = (_resized(each, count, size) for each in found)
            found = self._layers[number] = keys, values
        return found


def _resized(kept: Tensor, count: int, length: int) -> Tensor:
    """So many slots of this length that hold the same, as far as they go; 0 where nothing stands."""
    before, heads, size, width = kept.shape
    before, size = min(before, count), min(size, length)
    found = kept.new_empty((count, heads, length, width))
    found[:before, :, :size] = kept[:before, :, :size]
    found[before:] = 0
    found[:before, :, size:] = 0
    return found


def attend_cached(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | Rest | Step | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface, over a forest or over slots.

    Args:
        module: The attention layer.
        query: (1, H, T, D) over a forest or the rest of a prompt, (B, H, 1, D) over slots.
        key: (1, K, T, D), (1, K, L, D), or (B, K, L, D).
        value: (1, K, T, E), (1, K, L, E), or (B, K, L, E).
        attention_mask: None.
        scaling: Of the scores; 1 / sqrt(D) if None.
        dropout: None, for nothing is trained.
        sliding_window: Tokens that a token sees, itself included.
        softcap: Scores are squashed to this size by a tanh.
        s_aux: (H,) a score for each head that stands for no token.
        layout: Of the forest, or the rest of a prompt, or the step.
        others: What else the model hands on.

    Returns:
        (1, T, H, E) or (B, 1, H, E), and None for the weights, which are not kept.
    """
    if not isinstance(layout, Rest | Step):
        more: dict[str, Any] = {
            "scaling": scaling,
            "sliding_window": sliding_window,
            "softcap": softcap,
            "s_aux": s_aux,
            **others,
        }
        if layout is None or not query.is_cuda or _has_kernel(query, layout, softcap):
            out: Tensor = attend(module, query, key, value, attention_mask, layout=layout, **more)[0]
            return out, None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return by_definition(query, key, value, layout, scale, 0.0, sliding_window, softcap, s_aux), None
    mask = layout.mask(sliding_window, query.dtype)
    if softcap is not None or s_aux is not None:
        return masked(query, key, value, mask, scaling, 0.0, softcap, s_aux), None
    if isinstance(layout, Rest):
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )  # (1, H, T, E)
        return found.transpose(1, 2), None
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)  # heads that share keys, as if queries
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return found.reshape(batch, 1, heads, value.shape[-1]), None


def _has_kernel(query: Tensor, layout: Layout, softcap: float | None) -> bool:
    """Whether CUDA has one that need not be compiled first."""
    return layout.plain and softcap is None and query.dtype in (torch.bfloat16, torch.float16)


AttentionInterface.register(NAME, attend_cached)
