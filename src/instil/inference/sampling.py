"""From logits to tokens: what is drawn among, and the draw itself, for all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from instil.inference.options import Sampling

_AT_ONCE = 256
"""Places of a prompt whose logits are held at once."""

_DRAWN = 64
"""Numbers drawn at once."""

_LIKELIEST = 128
"""Tokens looked at for top-p; where they do not reach it, eight times as many, and so on."""


def noise(seed: int, prompt: int, answer: int) -> Iterator[float]:
    """Numbers in [0, 1), one for each token of an answer, whatever else is generated beside it."""
    draws = np.random.default_rng([seed, prompt, answer])
    while True:
        yield from draws.random(_DRAWN).tolist()


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


class Drawn(NamedTuple):
    """A token that was drawn.

    Args:
        id: Which.
        logprob: The logarithm of the probability that the model gives it, before temperature and the rest; in nats.
        top: The likeliest tokens there, each with its logarithm, the likeliest first; as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the next token of each row of a batch, and remembers which tokens stand in it.

    Args:
        rows: Most rows of the batch.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._how: list[Sampling] = []  # of each row
        self._seen: Tensor | None = None  # (rows, V) bool

    def join(self, prompts: Sequence[Sequence[int]], how: Sequence[Sampling], logits: Tensor) -> None:
        """Take in prompts as the next rows; `logits` are those behind them, (P, V)."""
        for row, (prompt, own) in enumerate(zip(prompts, how, strict=True), len(self._how)):
            if own.repetition_penalty == 1.0:
                continue
            if self._seen is None:
                self._seen = torch.zeros((self._rows, logits.shape[-1]), dtype=torch.bool, device=logits.device)
            self._seen[row] = False
            self._seen[row, torch.tensor(prompt, device=logits.device)] = True
        self._how += how

    def drop(self, row: int) -> None:
        """Let the last row take the place of this one."""
        if self._seen is not None:
            self._seen[row] = self._seen[len(self._how) - 1]
        self._how[row] = self._how[-1]
        self._how.pop()

    def __call__(
        self, logits: Tensor, first: int, uniform: Sequence[float], top: Sequence[int] | None = None
    ) -> list[Drawn]:
        """The next token of the rows from `first` on.

        Args:
            logits: (B, V), as the model gives them.
            first: The first of the rows.
            uniform: B numbers in [0, 1), one for each draw; unused where the likeliest is taken.
            top: B numbers: how many of the likeliest tokens to tell of beside the one that was drawn; None for none.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        alike: dict[tuple[float, ...], list[int]] = {}
        for place, own in enumerate(self._how[first : first + len(logits)]):
            alike.setdefault(own.how, []).append(place)
        if len(alike) == 1:
            chosen = self._choose(logits, list(range(first, first + len(logits))), uniform)
        else:
            chosen = logits.new_zeros(len(logits), dtype=torch.long)  # (B,)
            for places in alike.values():
                rows = [first + place for place in places]
                chosen[places] = self._choose(logits[places], rows, [uniform[place] for place in places])
        totals = logits.logsumexp(-1)  # (B,)
        logprobs = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - totals
        found = torch.stack([chosen.double(), logprobs.double()]).tolist()  # one wait for the device, not two
        tops = [()] * len(logits) if not any(top or ()) else _likeliest(logits, totals, top or ())
        return [Drawn(int(id), logprob, own) for id, logprob, own in zip(*found, tops, strict=True)]

    def _choose(self, logits: Tensor, rows: Sequence[int], uniform: Sequence[float]) -> Tensor:
        """(B,) The next tokens of rows that are drawn alike."""
        how = self._how[rows[0]]
        penalized = self._seen is not None and how.repetition_penalty != 1.0
        seen = self._seen[list(rows)] if penalized and self._seen is not None else None
        scores = logits if seen is None else penalize(logits, seen, how.repetition_penalty)
        if how.greedy:
            chosen = scores.argmax(-1)
        else:
            left, ids = candidates(scores, how)
            places = draw(left, torch.tensor(uniform, dtype=torch.float64).to(left.device))
            chosen = places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)
        if seen is not None and self._seen is not None:
            self._seen[torch.tensor(rows, device=chosen.device), chosen] = True
        return chosen


class Told(NamedTuple):
    """What a model makes of the tokens of a prompt.

    Args:
        logprobs: Of each token but the first, given those before it; in nats.
        top: For each of them the likeliest tokens there, with their logarithms.
    """

    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]


def tell(logits: Callable[[slice], Tensor], ids: Sequence[int], top: int) -> Told:
    """What a model makes of tokens.

    Args:
        logits: Gives (N, V) those of some of the places, of which each predicts the token after it.
        ids: The tokens.
        top: How many of the likeliest tokens to tell of at each place.
    """
    told = Told([], [])
    for start in range(0, len(ids) - 1, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, len(ids) - 1))
        found = logits(part)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        totals = found.logsumexp(-1)
        wanted = torch.tensor(list(ids[part.start + 1 : part.stop + 1]), device=found.device)
        told.logprobs.extend((found.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - totals).tolist())
        told.top.extend(_likeliest(found, totals, [top] * len(found)))
    return told


def _likeliest(logits: Tensor, totals: Tensor, top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """For each row as many of the likeliest tokens as it asks for, with the logarithms of their probabilities."""
    values, ids = logits.topk(min(max(top), logits.shape[-1]), dim=-1)
    pairs = zip(ids.tolist(), (values - totals.unsqueeze(-1)).tolist(), strict=True)
    return [tuple(zip(own[:count], logs[:count], strict=True)) for (own, logs), count in zip(pairs, top, strict=True)]
