"""A causal language model that reads packed batches: the cross-entropy of every target, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from instil.model.admission import admit
from instil.model.attention import NAME, Layout, without_masks
from instil.packing import PackedBatch
from instil.packing.tree import Ints

LOGITS_AT_ONCE = 1 << 28
"""The logits held at once, 512 MiB in bf16; what is beyond is computed again going back."""

_LOGITS_OF_A_CHUNK = 1 << 26
"""Of the fused head: 512 rows of a vocabulary of 128k; torch's own choice of chunks takes long on a CPU."""

ROWS_AT_ONCE = 128
"""The rows whose logits are worked on in float32 while they are in the processor's cache."""


class TreeModel(nn.Module):
    """A causal language model and the way it reads packed batches.

    Args:
        model: A causal language model of transformers, or one of peft around it.
        bf16: Whether products are computed in bf16 where the weights are float32.
        one_by_one: Why the model cannot read trees, as `admit` found; "" if it can. Then it reads path after path,
            through its own attention.
        fused_head: Whether the head and the loss are computed together, in chunks; None for so on CUDA alone. A head
            that does more than multiply is not.
    """

    def __init__(
        self, model: nn.Module, *, bf16: bool = False, one_by_one: str | None = None, fused_head: bool | None = None
    ) -> None:
        super().__init__()
        self.model = cast(Any, model)
        self.fused_head = (self.device.type == "cuda" if fused_head is None else fused_head) and self._only_multiplies
        self.bf16 = bf16
        self.one_by_one = admit(self.base, _reading) if one_by_one is None else one_by_one
        self._regime = rotation_regime(self.base.config)
        if not self.one_by_one:
            self.base.set_attn_implementation(NAME)

    @property
    def base(self) -> Any:
        """The causal language model itself, without what peft puts around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def in_one_go(self) -> bool:
        """Whether any batch is read by one call of the model."""
        return not self.one_by_one and self._regime is None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.base.device
        return found

    @property
    def learned_positions(self) -> int | None:
        """The most tokens of a path where positions are learned (GPT-2, OPT); None where they are computed."""
        limit: int = getattr(self.base.config, "max_position_embeddings", None) or 0
        tables = {each.num_embeddings for each in self.base.modules() if isinstance(each, nn.Embedding)}
        return limit if tables & {limit, limit + 2} else None  # OPT has two more than it says

    def losses(self, batch: PackedBatch) -> Tensor:
        """The cross-entropy of every target.

        Args:
            batch: A packed batch.

        Returns:
            (S,) float32 at least, in nats, in the order of the batch's targets; gradients flow through it.
        """
        losses, places = [], []
        for part, targets in self._parts(batch):
            losses.append(self._losses(part))
            places.append(targets)
        order = torch.from_numpy(np.argsort(np.concatenate(places))) if len(places) > 1 else None
        return losses[0] if order is None else torch.cat(losses)[order.to(self.device)]

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """How likely every target is, read as it is for the loss.

        Args:
            batch: A packed batch.

        Returns:
            (S,) float32 at least, the log-probability of each target in nats, the negative of its loss; (S,) int64, its
            rank: one more than the tokens of the vocabulary that are more probable.
        """
        log_probs = torch.empty(len(batch.target_ids), device=self.device)
        ranks = torch.empty(len(batch.target_ids), dtype=torch.int64, device=self.device)
        for part, targets in self._parts(batch):
            found = self._scores(part)
            at = torch.from_numpy(targets).to(self.device)
            log_probs = log_probs.to(found[0].dtype)
            log_probs[at], ranks[at] = found
        return log_probs, ranks

    def _parts(self, batch: PackedBatch) -> Iterator[tuple[PackedBatch, Ints]]:
        """What the model reads in one go, and which targets of the batch stand there."""
        lengths = batch.path_lengths
        if self.one_by_one:
            groups = _paths(batch)
            if self._regime is not None:
                limit, alone = self._regime
                kind = np.where(lengths > limit, lengths if alone else 1, 0)
                groups = [group[kind[group] == each] for group in groups for each in np.unique(kind[group])]
        elif self._regime is None:
            groups = [np.arange(batch.exchanges)]
        else:  # a path is rotated otherwise beside a longer one
            limit, alone = self._regime
            longer = np.flatnonzero(lengths > limit)
            groups = [
                np.flatnonzero(lengths <= limit),
                *(np.array_split(longer, max(1, len(longer))) if alone else [longer]),
            ]
        for group in groups:
            if len(group) == batch.exchanges:
                yield batch, np.arange(len(batch.target_ids))
            elif len(group):
                yield batch.select(group), np.flatnonzero(np.isin(batch.target_exchange, group))

    def _losses(self, batch: PackedBatch) -> Tensor:
        rows, row_of = np.unique(batch.target_rows, return_inverse=True)  # (R,), (S,)
        at, ids = (torch.from_numpy(each).to(self.device) for each in (row_of, batch.target_ids))
        with self._precision():
            found = self._read(batch, rows)
            return cross_entropy(found, at, ids) if self.one_by_one else self._of_rows(found, at, ids)

    def _scores(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        pairs = np.stack([batch.target_rows, batch.target_ids])  # (2, S)
        (target_rows, target_ids), of_pair = np.unique(pairs, axis=1, return_inverse=True)  # (2, S'), (S,)
        rows, row_of = np.unique(target_rows, return_inverse=True)  # (R,), (S',) ascending
        log_probs, ranks = [], []
        with self._precision():
            found = self._read(batch, rows)
            for start in range(0, len(rows), ROWS_AT_ONCE):
                here = slice(*np.searchsorted(row_of, (start, start + ROWS_AT_ONCE)))
                logits = found[start : start + ROWS_AT_ONCE]
                at, ids = (torch.from_numpy(each[here]).to(self.device) for each in (row_of - start, target_ids))
                scored = score(logits if self.one_by_one else self.logits(logits), at, ids)
                log_probs.append(scored[0])
                ranks.append(scored[1])
        again = torch.from_numpy(of_pair.reshape(-1)).to(self.device)
        return torch.cat(log_probs)[again], torch.cat(ranks)[again]

    def _read(self, batch: PackedBatch, rows: Ints) -> Tensor:
        """What the model makes of rows of a batch that it reads in one go: (R, D) hidden states after the last norm; of
        one that reads path after path, (R, V) logits.
        """
        if self._regime is not None and self._regime[1]:
            _forget_lengths(self.base)
        layout = Layout(batch, self.device)
        inputs = torch.from_numpy(batch.input_ids).to(self.device).unsqueeze(0)  # (1, T)
        at = torch.from_numpy(rows).to(self.device)
        read = {"input_ids": inputs, "position_ids": layout.depth.unsqueeze(0), "use_cache": False}
        if self.one_by_one:
            return cast(Tensor, self.base(**read).logits[0][at])
        with without_masks():
            return cast(Tensor, self.base.base_model(**read, layout=layout).last_hidden_state[0][at])

    def _of_rows(self, hidden: Tensor, row_of: Tensor, ids: Tensor) -> Tensor:
        """(S,) the cross-entropy of targets at rows of hidden states, (R, D)."""
        if self.fused_head:
            head = self.base.get_output_embeddings()
            return fused_cross_entropy(hidden[row_of], head.weight, head.bias, ids)
        pieces = -(-hidden.shape[0] * self.base.config.vocab_size // LOGITS_AT_ONCE)
        if pieces <= 1:
            return cross_entropy(self.logits(hidden), row_of, ids)
        from torch.utils.checkpoint import checkpoint

        size = -(-hidden.shape[0] // pieces)
        losses, places = [], []
        for start in range(0, hidden.shape[0], size):
            at = ((row_of >= start) & (row_of < start + size)).nonzero()[:, 0]
            piece = hidden[start : start + size]

            def of_piece(piece: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
                return cross_entropy(self.logits(piece), rows, ids)

            losses.append(checkpoint(of_piece, piece, row_of[at] - start, ids[at], use_reentrant=False))
            places.append(at)
        return torch.cat(losses)[torch.cat(places).argsort()]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states.

        Args:
            hidden: (R, D), after the last norm.

        Returns:
            (R, V), soft-capped and scaled as the model does.
        """
        config = self.base.config
        with torch.profiler.record_function("instil::head"):
            logits: Tensor = self.base.get_output_embeddings()(hidden)
            if times := getattr(config, "logit_scale", None):
                logits = logits * times
            if over := getattr(config, "logits_scaling", None):
                logits = logits / over
            cap = getattr(config, "final_logit_softcapping", None)
            return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def _only_multiplies(self) -> bool:
        config = self.base.config
        names = "final_logit_softcapping", "logit_scale", "logits_scaling"
        return type(self.base.get_output_embeddings()) is nn.Linear and not any(getattr(config, n, None) for n in names)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def _reading(model: nn.Module, one_by_one: str) -> TreeModel:
    return TreeModel(model, one_by_one=one_by_one)


def fused_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """The cross-entropy of rows of hidden states, without ever holding all logits.

    Args:
        hidden: (S, D).
        weight: (V, D), of the head.
        bias: (V,), of the head, if it has one.
        ids: (S,), the targets.

    Returns:
        (S,) float32 at least, in nats.
    """
    with torch.profiler.record_function("instil::head"):
        return nn.functional.linear_cross_entropy(
            hidden,
            weight.to(hidden.dtype),
            ids,
            linear_bias=None if bias is None else bias.to(hidden.dtype),
            reduction="none",
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=max(1, _LOGITS_OF_A_CHUNK // weight.shape[0]), acc_policy="accurate"
            ),
        ).to(torch.promote_types(hidden.dtype, torch.float32))


def cross_entropy(logits: Tensor, row_of: Tensor, ids: Tensor) -> Tensor:
    """The cross-entropy of targets, of which one row may have several.

    Args:
        logits: (R, V).
        row_of: (S,), the row of each target.
        ids: (S,), the targets.

    Returns:
        (S,) float32 at least, in nats.
    """
    found: Tensor = _CrossEntropy.apply(logits, row_of, ids)  # type: ignore[no-untyped-call]
    return found


def score(logits: Tensor, row_of: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability and the rank of targets, of which one row may have several.

    Args:
        logits: (R, V).
        row_of: (S,), the row of each target.
        ids: (S,), the targets.

    Returns:
        (S,) float32 at least, in nats; (S,) int64, one more than the tokens that are more probable.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    taken = wide[row_of, ids]
    return taken - wide.logsumexp(-1)[row_of], 1 + (wide[row_of] > taken[:, None]).sum(-1)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of targets, of which one row may have several, from logits in any precision.

    As `F.cross_entropy` in float32, but what is held besides the logits is a few rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row_of: Tensor, ids: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.cat([piece.to(wide).logsumexp(-1) for piece in torch.split(logits, ROWS_AT_ONCE)])  # (R,)
        ctx.save_for_backward(logits, lse, row_of, ids)
        return lse[row_of] - logits[row_of, ids].to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, row_of, ids = ctx.saved_tensors
        of_row = torch.zeros_like(lse).index_add_(0, row_of, grads[0])  # (R,): a row's targets share its softmax
        found = torch.empty_like(logits)  # (R, V)
        for at in range(0, len(lse), ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            grad = (logits[rows] - lse[rows, None]).exp_().mul_(of_row[rows, None])  # (R', V)
            here = ((row_of >= at) & (row_of < at + ROWS_AT_ONCE)).nonzero()[:, 0]
            grad.index_put_((row_of[here] - at, ids[here]), -grads[0][here], accumulate=True)
            found[rows] = grad
        return found, None, None


def _forget_lengths(model: Any) -> None:
    """Dynamic RoPE keeps the frequencies of the longest sequence so far; a path alone has its own."""
    for module in model.modules():
        if "max_seq_len_cached" in module.__dict__ and "original_max_seq_len" in module.__dict__:
            module.max_seq_len_cached = module.original_max_seq_len
            module.register_buffer("inv_freq", module.original_inv_freq.to(module.inv_freq.device), persistent=False)


def _paths(batch: PackedBatch) -> list[Ints]:
    """The exchanges of a forest, those on one path together."""
    ends = batch.target_rows[batch.last_targets]  # (E,)
    left = np.argsort(-ends, kind="stable")
    groups = []
    while len(left):
        on_path = np.isin(ends[left], batch.path(int(ends[left[0]])))
        groups.append(np.sort(left[on_path]))
        left = left[~on_path]
    return groups


def rotation_regime(config: Any) -> tuple[int, bool] | None:
    """The length beyond which a model rotates positions otherwise, and whether that depends on the length itself."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    longest = getattr(config, "max_position_embeddings", None)
    if kind == "longrope":
        original: Any = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", longest
        )
        return int(original), False
    return (int(longest), True) if kind == "dynamic" and longest else None
