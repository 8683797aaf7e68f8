"""The key-value cache: a slot for each answer, filled from the left, so that a token's place is its position.

New prompts are read together as one forest of tokens, in one row without padding, through the attention of training;
their keys and values are copied into slots. From then on each step reads one token of every slot. Answers that end
leave; the last slot takes their place, so that those in use are always the first ones, and no step computes for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from instil.model.attention import Layout, attend, by_definition, masked

NAME = "instil-cached"
_CLEARED_AHEAD = 64  # tokens


class Prefill:
    """New prompts, laid out as a forest: where each stands, and the slots that take them.

    Args:
        layout: Of the forest.
        paths: For each prompt the rows of its tokens, or a slice of them.
        first: The slot of the first prompt; the others follow.
    """

    def __init__(self, layout: Layout, paths: Sequence[Tensor | slice], first: int) -> None:
        self.layout = layout
        self.paths = paths
        self.longest = layout.longest
        self.first = first


class Step:
    """One more token for each of the first `len(lengths)` slots.

    Args:
        lengths: The tokens that each slot holds, which is the position of the new one.
        device: Where the cache is.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count = len(lengths)
        self.longest = max(lengths) + 1
        self.even = min(lengths) + 1 == self.longest
        self.positions = torch.tensor(lengths).to(device)  # (B,)
        self._rows = None if self.even else torch.arange(self.count, device=device)  # (B,)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor | None] = {}

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Put the keys or values of the new tokens, (B, K, 1, D), into slots, (count, K, length, D)."""
        if self.even:
            kept[: self.count, :, self.longest - 1] = new[:, :, 0]
        else:
            kept[self._rows, :, self.positions] = new[:, :, 0]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, L) what is added to the scores: 0 for what a new token sees, -inf else; None if it sees all."""
        window = window if window is not None and window < self.longest else None
        key = window, dtype
        if key not in self._masks:
            at, here = torch.arange(self.longest, device=self.positions.device), self.positions[:, None]
            hidden = at > here if window is None else (at > here) | (here - at >= window)
            found = torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = None if self.even and window is None else found[:, None, None]
        return self._masks[key]


class Slots:
    """Keys and values of all layers, as transformers' models read and write them.

    Args:
        count: Slots.
        length: Most tokens of one.
    """

    def __init__(self, count: int, length: int) -> None:
        self._count = count
        self._length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # each (count, K, length, D)
        self._cleared: dict[int, int] = {}  # tokens of a layer's slots that hold numbers, written or 0
        self.now: Prefill | Step | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a layer; return those that its attention is to read.

        Args:
            key: (1, K, T, D) of new prompts, or (B, K, 1, D) of a step.
            value: Likewise.
            layer_idx: Of the layer.
        """
        now = self.now
        assert now is not None
        layer = self._layer(layer_idx, key, value, now.longest)
        if isinstance(now, Prefill):
            for slot, path in enumerate(now.paths, now.first):
                for kept, new in zip(layer, (key, value), strict=True):
                    part = new[0, :, path]
                    kept[slot, :, : part.shape[1]] = part
            return key, value
        for kept, new in zip(layer, (key, value), strict=True):
            now.write(kept, new)
        keys, values = (kept[: now.count, :, : now.longest] for kept in layer)
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Let the slot `target` hold what the slot `source` does, which is of this length."""
        for layer in self._layers.values():
            for kept in layer:
                kept[target, :, :length] = kept[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given with every call."""
        return 0

    def _layer(self, number: int, key: Tensor, value: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """The slots of a layer, with numbers in their first `needed` tokens: a weight of 0 does not hide what is none.

        Memory is taken as it is needed.
        """
        if number not in self._layers:
            sizes = ((self._count, each.shape[1], self._length, each.shape[3]) for each in (key, value))
            self._layers[number] = key.new_empty(next(sizes)), value.new_empty(next(sizes))
        done = self._cleared.get(number, 0)
        if done < needed:
            self._cleared[number] = min(self._length, needed + _CLEARED_AHEAD)
            for kept in self._layers[number]:
                kept[:, :, done : self._cleared[number]] = 0
        return self._layers[number]


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
    layout: Layout | Step | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface, over a forest or over slots.

    Args:
        module: The attention layer.
        query: (1, H, T, D) over a forest, (B, H, 1, D) over slots.
        key: (1, K, T, D), or (B, K, L, D).
        value: (1, K, T, E), or (B, K, L, E).
        attention_mask: None.
        scaling: Of the scores; 1 / sqrt(D) if None.
        dropout: None, for nothing is trained.
        sliding_window: Tokens that a token sees, itself included.
        softcap: Scores are squashed to this size by a tanh.
        s_aux: (H,) a score for each head that stands for no token.
        layout: Of the forest, or the step.
        others: What else the model hands on.

    Returns:
        (1, T, H, E) or (B, 1, H, E), and None for the weights, which are not kept.
    """
    if not isinstance(layout, Step):
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
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)  # heads that share keys, as if queries
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return found.reshape(batch, 1, heads, value.shape[-1]), None


def _has_kernel(query: Tensor, layout: Layout, softcap: float | None) -> bool:
    """Whether CUDA has one that need not be compiled first."""
    return layout.plain and softcap is None and query.dtype in (torch.bfloat16, torch.float16)


AttentionInterface.register(NAME, attend_cached)
