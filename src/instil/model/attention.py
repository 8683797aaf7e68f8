"""Attention over packed token trees, registered with transformers as `instil`.

Token `q` attends to token `k` if and only if `k <= q < subtree_end[k]`, and in layers with a sliding window also
`depth[q] - depth[k] < window`. A forest is cut into chains (stretches of tokens with one child each); a chain attends
to itself causally, and all its descendants, which follow it in one stretch, attend to the whole of it. No mask is made.

CPU: the flash kernel on each of these blocks, put together by their log-sum-exp. CUDA: `varlen_attn` for plain paths,
FlexAttention for trees. What kernels do not know (soft-capping, sinks, dropout, a window shorter than a path) is
computed from its definition, chain by chain, in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from instil.packing import PackedBatch

NAME = "instil"
_ROWS_AT_ONCE = 512  # of a chain, where scores are held in memory
_IGNORED = {"is_causal", "use_cache", "position_ids", "cache_position", "output_attentions", "output_router_logits"}

Chain = tuple[int, int, int]  # first row, row after the last, row after the last descendant


class Layout:
    """Where the tokens of a batch stand to each other.

    Args:
        batch: The forest.
        device: Where the model is.
    """

    def __init__(self, batch: PackedBatch, device: torch.device) -> None:
        ends = batch.subtree_end
        first = np.flatnonzero(np.diff(ends, prepend=-1))  # a token that ends where the one before it does is its child
        stops = np.append(first[1:], batch.size)
        self.chains: list[Chain] = list(zip(first.tolist(), stops.tolist(), ends[first].tolist(), strict=True))
        self.plain = all(stop == end for _, stop, end in self.chains)
        self.longest = batch.longest
        self.depth = torch.from_numpy(batch.position_ids).to(device)  # (T,)
        self.subtree_end = torch.from_numpy(ends).to(device)  # (T,)

    @cached_property
    def paths(self) -> list[Tensor]:
        """For each chain, the rows on the way from its root to its last row, itself included: (depth of it,)."""
        found, above = [], list[Chain]()
        for chain in self.chains:
            while above and above[-1][2] <= chain[0]:
                above.pop()
            above.append(chain)
            rows = [torch.arange(start, stop, device=self.depth.device) for start, stop, _ in above]
            found.append(torch.cat(rows))
        return found

    @cached_property
    def starts(self) -> Tensor:
        """(N + 1,) int32: where each plain path begins, and the end."""
        ends = [0, *(stop for _, stop, _ in self.chains)]
        return torch.tensor(ends, dtype=torch.int32, device=self.depth.device)


_reading: ContextVar[bool] = ContextVar("reading", default=False)
unknown_arguments: set[str] = set()
"""What models handed to the attention function that it does not know: they are not admitted."""


@contextmanager
def without_masks() -> Iterator[None]:
    """While a model runs over a packed batch, it makes no masks of its own."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
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
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        module: The attention layer.
        query: (1, H, T, D).
        key: (1, K, T, D), K key heads, each for H / K query heads.
        value: (1, K, T, E).
        attention_mask: None over a packed batch.
        scaling: Of the scores; 1 / sqrt(D) if None.
        dropout: The part of the attention weights set to 0.
        sliding_window: Tokens of the same path that a token sees, itself included.
        softcap: Scores are squashed to this size by a tanh.
        s_aux: (H,) a score for each head that takes part in the softmax and stands for no token.
        layout: Of the packed batch, as the model was called with it; without one, this is transformers' own `sdpa`.
        others: What else the model hands on.

    Returns:
        (1, T, H, E), and None for the weights, which are not kept.
    """
    if layout is None:
        more = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **others}
        if softcap is not None or s_aux is not None:
            return masked(query, key, value, attention_mask, scaling, dropout, softcap, s_aux), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)[0], None
    unknown_arguments.update(name for name, value in others.items() if name not in _IGNORED and value is not None)
    if attention_mask is not None:
        unknown_arguments.add("attention_mask")
    dtype = value.dtype
    if query.is_cuda:
        query, key = query.to(dtype), key.to(dtype)  # under autocast, rotation leaves them in float32
    else:  # where the kernel is no slower in float32, and sums over many branches need it
        query, key, value = (each.to(torch.promote_types(dtype, torch.float32)) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest else None
    kernels = not dropout and s_aux is None and query.shape[-1] == value.shape[-1]
    if kernels and query.is_cuda:
        return _on_cuda(query, key, value, layout, scale, window, softcap), None
    if kernels and window is None and softcap is None:
        out: Tensor = _Flash.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    else:
        out = by_definition(query, key, value, layout, scale, dropout, window, softcap, s_aux)
    return out.to(dtype), None


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(B, T, H, E): what `sdpa` does not know, over batches that are no trees (generation, a plain evaluation)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = torch.nn.functional.dropout(weights[..., : key.shape[2]].nan_to_num(), dropout)
    return (weights @ value).transpose(1, 2)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _reading.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Flash(torch.autograd.Function):
    """The CPU's flash kernel on the blocks of a forest.

    A block's result and its log-sum-exp are merged into those of the rows' other blocks. Going back, each block is
    given the merged result and log-sum-exp of its rows: then its weights are those of the whole softmax.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        out = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3])).transpose(1, 2)  # (1, H, T, D)
        lse = query.new_empty(query.shape[:3])  # (1, H, T)
        for start, stop, _ in layout.chains:
            own = slice(start, stop)
            parts = (each[:, :, own] for each in (query, key, value))
            out[:, :, own], lse[:, :, own] = _flash(*parts, 0.0, True, scale=scale)
        for start, stop, end in layout.chains:
            if stop < end:
                above, below = slice(start, stop), slice(stop, end)
                more, their_lse = _flash(query[:, :, below], key[:, :, above], value[:, :, above], scale=scale)
                both = torch.logaddexp(lse[:, :, below], their_lse)
                out[:, :, below] *= (lse[:, :, below] - both).exp().unsqueeze(-1)
                out[:, :, below] += more * (their_lse - both).exp().unsqueeze(-1)
                lse[:, :, below] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        result = grads[0].transpose(1, 2)  # (1, H, T, D)
        totals = [torch.zeros_like(each) for each in (query, key, value)]

        def add(queries: slice, keys: slice, *, causal: bool) -> None:
            given = (
                result[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
            )
            found = _flash_backward(*given, lse[:, :, queries], 0.0, causal, scale=ctx.scale)
            for total, rows, part in zip(totals, (queries, keys, keys), found, strict=True):
                total[:, :, rows] += part

        for start, stop, end in ctx.layout.chains:
            add(slice(start, stop), slice(start, stop), causal=True)
            if stop < end:
                add(slice(stop, end), slice(start, stop), causal=False)
        return (*totals, None, None)


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax over each token's path, from scores that are held in memory for some rows at a time."""
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (each.to(wide).repeat_interleave(groups, 1) for each in (key, value))
    found = []
    for (start, stop, _), path in zip(layout.chains, layout.paths, strict=True):
        top = len(path) - (stop - start)  # the depth of the chain's first row
        for first in range(start, stop, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, stop)
            depth = torch.arange(top + first - start, top + last - start, device=path.device)  # (L,)
            seen = slice(max(0, int(depth[0]) - window + 1) if window else 0, int(depth[-1]) + 1)
            at = torch.arange(seen.start, seen.stop, device=path.device)  # (P,)
            distance = depth[:, None] - at  # (L, P)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            own = path[seen]
            scores = query[:, :, first:last].to(wide) @ keys[:, :, own].mT * scale  # (1, H, L, P)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
            weights = torch.softmax(scores, -1)[..., : len(own)]
            weights = torch.nn.functional.dropout(weights, dropout)
            found.append(weights @ values[:, :, own])  # (1, H, L, E)
    return torch.cat(found, 2).transpose(1, 2).to(query.dtype)


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    if layout.plain and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        flat = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, H, D)
        left = -1 if window is None else window - 1
        more: dict[str, Any] = {"scale": scale, "window_size": (left, 0), "enable_gqa": grouped}
        attention: Any = varlen_attn
        found: Tensor = attention(*flat, layout.starts, layout.starts, layout.longest, layout.longest, **more)
        return found.unsqueeze(0)
    capped = None if softcap is None else _capped(softcap)
    mask = _block_mask(layout, window)
    out: Tensor = _flex()(query, key, value, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Any:
    return lambda score, batch, head, q, k: softcap * torch.tanh(score / softcap)


def _block_mask(layout: Layout, window: int | None) -> Any:
    """The rule of the forest for FlexAttention, made once for each batch and window."""
    from torch.nn.attention.flex_attention import create_block_mask

    masks: dict[int | None, Any] = layout.__dict__.setdefault("block_masks", {})
    if window not in masks:
        depth, end = layout.depth, layout.subtree_end

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = (k <= q) & (q < end[k])
            return found if window is None else found & (depth[q] - depth[k] < window)

        size = len(depth)
        masks[window] = create_block_mask(sees, None, None, size, size, device=str(depth.device))
    return masks[window]
