"""What a model makes of answers that are given: the probability and the rank of every token, where it stands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from instil.errors import ModelError
from instil.model.forward import TreeModel
from instil.model.load import check_vocabulary, checkpoint_dtype, load_model
from instil.model.options import ModelOptions
from instil.model.tokens import reserve_tokens
from instil.packing import TokenTree, merge
from instil.packing.tree import Ints
from instil.prompt import EncodedRecord, Exchange, Renderer, builtin_templates


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely tokens are together.

    Args:
        tokens: Those that something precedes; only they have a probability.
        log_likelihood: The sum of their log-probabilities, in nats.
        top1: How many of them are the most probable token where they stand.
        weight: The sum of their weights in the loss.
        weighted_loss: The sum of their losses, each times its weight, in nats.
    """

    tokens: int = 0
    log_likelihood: float = 0.0
    top1: int = 0
    weight: float = 0.0
    weighted_loss: float = 0.0

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(
            self.tokens + other.tokens,
            self.log_likelihood + other.log_likelihood,
            self.top1 + other.top1,
            self.weight + other.weight,
            self.weighted_loss + other.weighted_loss,
        )

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean loss of a token; None where there is no token."""
        return _exp(-self.log_likelihood / self.tokens) if self.tokens else None

    @property
    def loss(self) -> float | None:
        """The loss that training would have, in nats: the weighted mean; None where no token is trained."""
        return self.weighted_loss / self.weight if self.weight else None


class Parts(NamedTuple):
    """The likelihood of the prompt, and of the completion given it."""

    prompt: Likelihood = Likelihood()
    completion: Likelihood = Likelihood()

    @property
    def whole(self) -> Likelihood:
        """Both together."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True, eq=False)
class ScoredExchange:
    """An exchange and what the model makes of each of its tokens, prompt and completion in a row.

    Args:
        exchange: What was scored.
        log_probs: (P + C,) float64, the log-probability of each token given those before it, in nats; NaN of the first,
            which nothing precedes.
        ranks: (P + C,) int64, one more than the tokens of the vocabulary that are more probable there; 0 of the first.
    """

    exchange: Exchange
    log_probs: NDArray[np.float64]
    ranks: Ints

    @property
    def likelihood(self) -> Parts:
        """Of the prompt, and of the completion."""
        seam = len(self.exchange.prompt_ids)
        weights = np.concatenate([self.exchange.prompt_weights, self.exchange.completion_weights])
        return Parts(*(self._of(part, weights[part]) for part in (slice(0, seam), slice(seam, None))))

    def _of(self, part: slice, weights: NDArray[np.float32]) -> Likelihood:
        known = ~np.isnan(self.log_probs[part])
        log_probs, weights = self.log_probs[part][known], weights[known]
        return Likelihood(
            len(log_probs),
            float(log_probs.sum()),
            int((self.ranks[part] == 1).sum()),
            float(weights.sum(dtype=float)),
            float(-(log_probs * weights).sum()),
        )


class ScoredRow(NamedTuple):
    """A row and its exchanges scored, none if it has none."""

    row: EncodedRecord
    exchanges: list[ScoredExchange]


def load_reader(name: str, renderer: Renderer, *, trust_remote_code: bool = False) -> TreeModel:
    """The model as training would begin with it: on the GPU if there is one, new tokens of the template reserved.

    Args:
        name: A folder or hub name of a model or an adapter.
        renderer: What the rows are encoded with.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ModelError: It cannot be loaded, or the tokenizer is not its own.
    """
    options = ModelOptions(model=name, trust_remote_code=trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = checkpoint_dtype(options)
    if dtype is torch.float16 and device.type == "cpu":  # which knows no fast products of it
        dtype = torch.float32
    model = load_model(options, dtype=dtype)
    check_vocabulary(model, renderer.tokenizer)
    known = builtin_templates().get(renderer.template.name)
    reserve_tokens(model, renderer.tokenizer, known.special_tokens if known else {})
    return TreeModel(model.to(device).eval().requires_grad_(False))


def score_rows(model: TreeModel, rows: Iterable[EncodedRecord], tokens_per_batch: int = 8192) -> Iterator[ScoredRow]:
    """Score the exchanges of rows, as many rows together as a batch holds.

    Args:
        model: What reads them.
        rows: As `RecordEncoder.encode` gives them.
        tokens_per_batch: The most tokens of a batch, those of an exchange each counted; a row is never split.

    Raises:
        ModelError: As `score_exchanges`.
    """
    waiting: list[EncodedRecord] = []
    tokens = 0
    for row in rows:
        size = sum(map(len, row.exchanges))
        if waiting and tokens + size > tokens_per_batch:
            yield from _score_together(model, waiting)
            waiting, tokens = [], 0
        waiting.append(row)
        tokens += size
    yield from _score_together(model, waiting)


def _score_together(model: TreeModel, rows: Sequence[EncodedRecord]) -> Iterator[ScoredRow]:
    exchanges = [exchange for row in rows for exchange in row.exchanges]
    names = [str(row.record.source) for row in rows for _ in row.exchanges]
    scored = iter(score_exchanges(model, exchanges, names))
    for row in rows:
        yield ScoredRow(row, [next(scored) for _ in row.exchanges])


def score_exchanges(
    model: TreeModel, exchanges: Sequence[Exchange], names: Sequence[str] | None = None
) -> list[ScoredExchange]:
    """Score exchanges in one batch, which computes what they begin alike with once, as training does.

    Args:
        model: What reads them.
        exchanges: Any, a prompt without a completion too.
        names: Where each stands, for errors; their numbers if None.

    Raises:
        ModelError: An exchange is longer than the positions that the model has learned, or holds an id that it lacks.
    """
    _check(model, exchanges, names or [f"exchange {number}" for number in range(len(exchanges))])
    paths = [_all_targets(each) for each in exchanges if len(each) > 1]
    found: Iterator[tuple[NDArray[np.float64], Ints]] = iter(())
    if paths:
        forest = merge([TokenTree.from_exchanges([each]) for each in paths])
        log_probs, ranks = (each.cpu().numpy() for each in model.scores(forest))  # (S,)
        ends = np.cumsum([len(each) - 1 for each in paths])[:-1]
        found = zip(np.split(log_probs.astype(np.float64), ends), np.split(ranks, ends), strict=True)
    scored = []
    for each in exchanges:
        of_each = next(found) if len(each) > 1 else (np.empty(0), np.empty(0, np.int64))
        first = np.full(min(1, len(each)), np.nan), np.zeros(min(1, len(each)), np.int64)
        scored.append(ScoredExchange(each, *map(np.concatenate, zip(first, of_each, strict=True))))
    return scored


def _all_targets(exchange: Exchange) -> Exchange:
    """The same tokens as an exchange in which the model predicts every one but the first."""
    ids = np.concatenate([exchange.prompt_ids, exchange.completion_ids])
    weights = np.ones(len(ids), np.float32)
    return replace(
        exchange,
        prompt_ids=ids[:1],
        prompt_weights=weights[:1],
        completion_ids=ids[1:],
        completion_weights=weights[1:],
    )


def _check(model: TreeModel, exchanges: Sequence[Exchange], names: Sequence[str]) -> None:
    limit, embeddings = model.learned_positions, model.base.get_input_embeddings().weight.shape[0]
    for name, each in zip(names, exchanges, strict=True):
        if limit is not None and len(each) - 1 > limit:  # the last token is only predicted
            raise ModelError(
                f"{name}: an exchange of {len(each):,} tokens is longer than the {limit:,} positions that the model "
                "has learned",
                f"Give --max-length {limit}, and with --on-too-long what becomes of such rows.",
            )
        highest = max(int(ids.max(initial=0)) for ids in (each.prompt_ids, each.completion_ids))
        if highest >= embeddings:
            raise ModelError(
                f"{name}: holds the token id {highest:,}, and the model has {embeddings:,} embeddings",
                "Encode the rows with the model's own tokenizer.",
            )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
