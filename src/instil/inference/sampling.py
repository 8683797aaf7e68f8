"""From logits to tokens: what is drawn among, and the draw itself, for all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instil.inference.options import Sampling

_LIKELIEST = 128
"""Tokens looked at for top-p; where they do not reach it, eight times as many, and so on."""


def noise(seed: int, prompt: int, answer: int, count: int) -> NDArray[np.float64]:
    """(count,) in [0, 1): a number for each token of an answer, whatever else is generated beside it."""
    return np.random.default_rng([seed, prompt, answer]).random(count)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The logits with those of tokens that stand there already made less likely (CTRL, arXiv:1909.05858).

    Args:
        logits: (B, V).
        seen: (B, V) bool, whether a token stands in the prompt or the answer.
        penalty: Divides positive logits and multiplies negative ones.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What is drawn among: temperature, top-k, top-p and min-p, in this order.

    Args:
        scores: (B, V) logits in float32.
        sampling: Its temperature must be above 0.

    Returns:
        (B, C) the scores that are left, -inf for what is not, and (B, C) whose they are; None if C is V and they stand
        in order.
    """
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # finite at any temperature
    ids = None
    narrow = 0 < sampling.top_k < scores.shape[-1]
    if narrow or sampling.top_p < 1.0:
        scores, ids = _nucleus(scores, sampling, sampling.top_k if narrow else _LIKELIEST, narrow)
    if sampling.min_p > 0.0:
        scores = scores.masked_fill(scores < float(np.log(sampling.min_p)), -torch.inf)  # the likeliest is at 0
    return scores, ids


def _nucleus(scores: Tensor, sampling: Sampling, count: int, narrow: bool) -> tuple[Tensor, Tensor]:
    """The likeliest `count` tokens, in order, as far as they are needed to reach top-p; more if these do not.

    `narrow`: whether no others are left in any case.
    """
    found, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)  # (B, C), the likeliest first
    if sampling.top_p >= 1.0:
        return found, ids
    total = (found if narrow else scores).logsumexp(-1, keepdim=True)
    reached = (found - total).exp().cumsum(-1)
    if not narrow and found.shape[-1] < scores.shape[-1] and bool((reached[:, -1] < sampling.top_p).any()):
        return _nucleus(scores, sampling, 8 * count, narrow)
    before = reached - (found - total).exp()  # what the likelier ones have together
    left = before < sampling.top_p
    left[:, 0] = True
    return found.masked_fill(~left, -torch.inf), ids


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """The places drawn with the probabilities softmax(scores).

    Args:
        scores: (B, C).
        uniform: (B,) float64 in [0, 1): which of them.

    Returns:
        (B,) int64.
    """
    reached = torch.softmax(scores.double(), -1).cumsum(-1)  # (B, C)
    wanted = uniform.unsqueeze(-1) * reached[:, -1:]
    places = torch.searchsorted(reached, wanted, right=True)
    last = (scores > -torch.inf).long().cumsum(-1).argmax(-1, keepdim=True)  # where rounding would lead beyond
    return torch.minimum(places, last).squeeze(-1)


class Sampler:
    """Draws the next token of each row of a batch, and remembers which tokens stand in it.

    Args:
        sampling: How.
        rows: Most rows of the batch.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        self._rows = rows
        self._seen: Tensor | None = None  # (rows, V) bool

    def join(self, first: int, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Take in prompts as the rows from `first` on; `logits` are those behind them, (P, V)."""
        if self.sampling.repetition_penalty == 1.0:
            return
        if self._seen is None:
            self._seen = torch.zeros((self._rows, logits.shape[-1]), dtype=torch.bool, device=logits.device)
        for row, prompt in enumerate(prompts, first):
            self._seen[row] = False
            self._seen[row, torch.tensor(prompt, device=logits.device)] = True

    def move(self, source: int, target: int) -> None:
        """Let the row `source` be the row `target`."""
        if self._seen is not None:
            self._seen[target] = self._seen[source]

    def __call__(self, logits: Tensor, first: int, uniform: Sequence[float]) -> tuple[list[int], list[float]]:
        """The next token of the rows from `first` on, and the logarithm of the probability that the model gives it.

        Args:
            logits: (B, V), as the model gives them.
            first: The first of the rows.
            uniform: B numbers in [0, 1), one for each draw; unused where the likeliest is taken.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits
        rows = slice(first, first + len(logits))
        if self._seen is not None:
            scores = penalize(logits, self._seen[rows], self.sampling.repetition_penalty)
        if self.sampling.greedy:
            chosen = scores.argmax(-1)  # (B,)
        else:
            left, ids = candidates(scores, self.sampling)
            places = draw(left, torch.tensor(uniform, dtype=torch.float64).to(left.device))
            chosen = places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)
        if self._seen is not None:
            self._seen[rows].scatter_(-1, chosen.unsqueeze(-1), True)
        logprobs = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        found = torch.stack([chosen.double(), logprobs.double()]).tolist()  # one wait for the device, not two
        return [int(each) for each in found[0]], found[1]
