"""Preference tuning: answers to one prompt are compared, or are good or bad by themselves.

Chosen and rejected answers are branches of one prompt, which is read once. The log-probability of an answer is the sum
over the tokens of its turns, each times its weight; its length |y| is the sum of the weights. Answers under the model
that training starts from, the reference, come with the batch (`TokenTree.exchange_reference`), or from the model with
its adapter switched off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.objectives.objective import Total
from instil.packing import PackedBatch, TokenTree, merge
from instil.packing.tree import LABELS, Ints, expand, paths
from instil.prompt.exchange import Exchange

Formula: TypeAlias = Literal["dpo", "cdpo", "ipo", "simpo", "orpo"]

_CHOSEN, _REJECTED, _GOOD, _BAD, _MORE, _OTHER = range(1, len(LABELS))
_NO_REFERENCE = ("simpo", "orpo")
_OF_FORMULA = {"dpo": (), "cdpo": ("label_smoothing",), "ipo": (), "simpo": ("margin",), "orpo": ()}
_USUAL: dict[str, dict[str, float]] = {
    "cdpo": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "margin": 1.0},
    "orpo": {"sft_weight": 1.0},
}
"""Settings that differ from those of dpo: the papers' own, of simpo within the range that its authors searched."""

_NEXT_TO_NOTHING = 1e-9


class Answers(NamedTuple):
    """The answers of a batch, in order.

    Args:
        label: (A,) int64, the place in LABELS of what each is.
        record: (A,) int64, its row of data.
        log_prob: (A,) float64, its log-probability, in nats, with gradients.
        reference: (A,) float64, the same under the reference; NaN where it is not known.
        length: (A,) float64, the weights of its tokens.
    """

    label: Ints
    record: Ints
    log_prob: Tensor
    reference: Tensor
    length: Tensor

    @property
    def ratio(self) -> Tensor:
        """(A,) the logarithm of how many times as likely each answer is as under the reference."""
        return self.log_prob - self.reference

    @property
    def mean(self) -> Tensor:
        """(A,) the log-probability of a token of each answer, on average."""
        return self.log_prob / self.length


@dataclass(frozen=True, slots=True)
class Preference:
    """A chosen answer against a rejected one; of several rejected ones, against each. An `Objective`.

    With w and l the chosen and the rejected answer to the prompt x, r(y) = log p(y|x) - log p_ref(y|x), m(y) = log
    p(y|x) / |y|, and s the logistic function, the loss of a pair is

        dpo     -log s(beta (r(w) - r(l)))                  Rafailov et al., 2023, arXiv:2305.18290, equation 7
        cdpo    -(1 - e) log s(d) - e log s(-d),            Mitchell, 2023, a note on DPO with noisy preferences;
                d = beta (r(w) - r(l))                      e is the label smoothing
        ipo     (r(w)/|w| - r(l)/|l| - 1 / (2 beta))^2      Azar et al., 2023, arXiv:2310.12036, equation 17; by token,
                                                            as its authors' results are
        simpo   -log s(beta (m(w) - m(l)) - margin)         Meng et al., 2024, arXiv:2405.14734, equation 6
        orpo    -beta log s(log odds(w) - log odds(l)),     Hong et al., 2024, arXiv:2403.07691, equations 6 and 7;
                odds(y) = p / (1 - p), p = exp m(y)         beta is its lambda, and the loss of w has weight 1 there

    each plus `sft_weight` times -m(w), the supervised loss of the chosen answer (Pang et al., 2024, arXiv:2404.19733,
    equation 1). A step's loss is the mean over its pairs.

    Args:
        formula: One of these.
        beta: How far from the reference the model is held, in dpo, cdpo and ipo; a factor in the others.
        label_smoothing: The part of the pairs taken to be the wrong way round; cdpo alone.
        margin: By how much the chosen answer is to be ahead; simpo alone (its gamma).
        sft_weight: The weight of the supervised loss of the chosen answers.
    """

    formula: Formula = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    sft_weight: float = 0.0

    @classmethod
    def of(cls, formula: Formula, **settings: float) -> Preference:
        """The formula with its usual settings, where none are given."""
        return cls(formula, **{**_USUAL.get(formula, {}), **settings})

    def describe(self) -> str:
        """What it is, for people."""
        return _described(self.formula, self, _OF_FORMULA[self.formula])

    @property
    def needs_reference(self) -> bool:
        """Whether answers are compared with what they were under the reference."""
        return self.formula not in _NO_REFERENCE

    def ready(self, model: TreeModel, batches: Sequence[PackedBatch], total: Total) -> Preference:
        """This objective: pairs have nothing to do with each other."""
        return self

    def weight(self, batch: PackedBatch) -> float:
        """The number of its pairs."""
        return float(len(_pairs(*_labelled(batch))[0]))

    def loss(self, model: TreeModel, batch: PackedBatch) -> tuple[Tensor, list[float]]:
        """The sum of the pairs' losses, in nats, and of what is measured of each pair.

        Raises:
            TrainingError: A reference is needed and is not there.
        """
        answers = read(model, batch, reference=self.needs_reference)
        chosen, rejected = (torch.from_numpy(each).to(model.device) for each in _pairs(answers.label, answers.record))
        found = self._losses(answers, chosen, rejected) - self.sft_weight * answers.mean[chosen]  # (pairs,)
        with torch.no_grad():
            reward = self.beta * (answers.ratio if self.needs_reference else answers.mean)  # (A,)
            better, worse = reward[chosen], reward[rejected]
            away = (answers.ratio[chosen] + answers.ratio[rejected]) / 2
            of_each = [better > worse, better, worse, answers.log_prob[chosen], answers.log_prob[rejected], -away]
            sums = [float(len(chosen)), *torch.stack([each.sum() for each in of_each]).tolist()]
        return found.sum() + 0 * answers.log_prob.sum(), sums

    def _losses(self, answers: Answers, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(pairs,) the loss of each pair, but for the supervised part."""
        if self.formula in ("dpo", "cdpo"):
            ahead = self.beta * (answers.ratio[chosen] - answers.ratio[rejected])
            return -(1 - self.label_smoothing) * logsigmoid(ahead) - self.label_smoothing * logsigmoid(-ahead)
        if self.formula == "ipo":
            by_token = answers.ratio / answers.length
            return (by_token[chosen] - by_token[rejected] - 1 / (2 * self.beta)) ** 2
        if self.formula == "simpo":
            return -logsigmoid(self.beta * (answers.mean[chosen] - answers.mean[rejected]) - self.margin)
        odds = answers.mean - torch.log(-torch.expm1(answers.mean.clamp(max=-_NEXT_TO_NOTHING)))
        return -self.beta * logsigmoid(odds[chosen] - odds[rejected])

    def measures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Means over the pairs.

        `reward_accuracy` is the part of them whose chosen answer has the higher reward, which is beta r(y), without a
        reference beta m(y); `reward_margin` by how much. `kl` is the mean of -r(y) in nats: where the answers are drawn
        from the reference, an estimate of the Kullback-Leibler divergence of the model from it.
        """
        if not sums or not sums[0]:
            return {}
        right, better, worse, chosen, rejected, away = (each / sums[0] for each in sums[1:])
        return {
            "reward_accuracy": right,
            "reward_margin": better - worse,
            "chosen_reward": better,
            "rejected_reward": worse,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            **({"kl": away} if self.needs_reference else {}),
        }


@dataclass(frozen=True, slots=True)
class Kto:
    """Answers that are good or bad by themselves. An `Objective`.

    With r as for `Preference`, the loss of a good answer is desirable_weight (1 - s(beta (r(y) - z))), and that of a
    bad one undesirable_weight (1 - s(beta (z - r(y)))); z, which has no gradient, is the mean of r over answers of
    other rows behind the prompts of the step, and no less than 0: an estimate of the divergence from the reference. A
    step's loss is the mean over its answers. Ethayarajh et al., 2024, arXiv:2402.01306, equation 8.

    Args:
        beta: How far from the reference the model is held.
        desirable_weight: Of good answers.
        undesirable_weight: Of bad ones.
        sft_weight: The weight of the supervised loss of good answers.
        divergence: z; made ready for each step.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sft_weight: float = 0.0
    divergence: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """Answers are compared with what they were under the reference."""
        return True

    def describe(self) -> str:
        """What it is, for people."""
        return _described("kto", self, ("desirable_weight", "undesirable_weight"))

    def ready(self, model: TreeModel, batches: Sequence[PackedBatch], total: Total) -> Kto:
        """With the divergence estimated from the answers of other rows, before any gradient of the step."""
        ratio = number = 0.0
        for batch in batches:
            if len(others := np.flatnonzero(batch.exchange_label == _OTHER)):
                with torch.no_grad():
                    found = read(model, batch.select(others)).ratio
                ratio, number = ratio + float(found.sum()), number + len(found)
        ratio, number = total(ratio, number)
        return replace(self, divergence=max(0.0, ratio / number) if number else 0.0)

    def weight(self, batch: PackedBatch) -> float:
        """The number of its answers that are good or bad."""
        return float(np.isin(_labelled(batch)[0], (_CHOSEN, _GOOD, _REJECTED, _BAD)).sum())

    def loss(self, model: TreeModel, batch: PackedBatch) -> tuple[Tensor, list[float]]:
        """The sum of the answers' losses, and of what is measured of good and of bad ones.

        Raises:
            TrainingError: A reference is needed and is not there.
        """
        judged = batch.select(np.flatnonzero(batch.exchange_label != _OTHER))
        answers = read(model, judged)
        sums = []
        loss = 0 * answers.log_prob.sum()
        for labels, sign, weight in (
            ((_CHOSEN, _GOOD), 1.0, self.desirable_weight),
            ((_REJECTED, _BAD), -1.0, self.undesirable_weight),
        ):
            at = torch.from_numpy(np.flatnonzero(np.isin(answers.label, labels))).to(model.device)
            ahead = sign * (answers.ratio[at] - self.divergence)
            loss = loss + weight * (1 - torch.sigmoid(self.beta * ahead)).sum()
            if sign > 0:
                loss = loss - self.sft_weight * answers.mean[at].sum()
            told = torch.stack([(ahead > 0).sum(), answers.ratio[at].sum(), answers.log_prob[at].sum()])
            sums += [float(len(at)), *told.tolist()]
        return loss, sums

    def measures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Means over good and over bad answers, under the names that pairs have.

        `reward_accuracy` is the part of all answers that are on their side of the divergence, which is `kl`. What there
        is none of has no number (NaN).
        """
        if not sums or not sums[0] + sums[4]:
            return {}
        good, bad = np.array(sums[:4]), np.array(sums[4:])
        with np.errstate(invalid="ignore", divide="ignore"):
            (better, chosen), (worse, rejected) = (each[2:] / each[0] for each in (good, bad))
        return {
            "reward_accuracy": float((good[1] + bad[1]) / (good[0] + bad[0])),
            "reward_margin": self.beta * float(better - worse),
            "chosen_reward": self.beta * float(better),
            "rejected_reward": self.beta * float(worse),
            "chosen_logp": float(chosen),
            "rejected_logp": float(rejected),
            "kl": self.divergence,
        }


def _described(name: str, objective: Preference | Kto, settings: Sequence[str]) -> str:
    shown = ("beta", *settings, *(["sft_weight"] if objective.sft_weight else []))
    return f"{name} ({', '.join(f'{each} {getattr(objective, each):g}' for each in shown)})"


def read(model: TreeModel, batch: PackedBatch, *, reference: bool = True) -> Answers:
    """What a model makes of the answers of a batch.

    Args:
        model: What reads it.
        batch: A packed batch.
        reference: Whether it is needed what the reference makes of them.

    Raises:
        TrainingError: It is needed, does not come with the batch, and there is no adapter to switch off.
    """
    starts = batch.exchange_label != _MORE  # (E,)
    number = torch.from_numpy(np.cumsum(starts) - 1).to(model.device)  # (E,)

    def of_answers(values: Tensor) -> Tensor:
        return values.new_zeros(int(starts.sum())).index_add(0, number, values)  # (A,)

    then = torch.from_numpy(batch.exchange_reference).to(model.device)
    if reference and bool(then.isnan().any()):
        then = _switched_off(model, batch)
    weights = torch.from_numpy(_weights(batch)).to(model.device)  # (S,)
    exchange = torch.from_numpy(batch.target_exchange).to(model.device)
    lengths = weights.new_zeros(batch.exchanges).index_add(0, exchange, weights)
    return Answers(
        *_labelled(batch),
        of_answers(log_probs(model, batch)),
        of_answers(then),
        of_answers(lengths).clamp(min=_NEXT_TO_NOTHING),  # an answer that weighs nothing is in no loss, and no NaN
    )


def log_probs(model: TreeModel, batch: PackedBatch) -> Tensor:
    """The log-probability of the completion of every exchange, each of its tokens times its weight.

    Args:
        model: What reads it.
        batch: A packed batch.

    Returns:
        (E,) float64, in nats, with gradients.
    """
    found = model.losses(batch).double() * torch.from_numpy(_weights(batch)).to(model.device)  # (S,)
    exchange = torch.from_numpy(batch.target_exchange).to(model.device)
    return -found.new_zeros(batch.exchanges).index_add(0, exchange, found)


def with_others(
    trees: Sequence[TokenTree], seed: int, *, most: int, longest: int | None = None
) -> tuple[list[TokenTree], int]:
    """The rows' trees, each with the answer of another row behind its first prompt, as `Kto` measures divergence by.

    Args:
        trees: One for each row.
        seed: Decides which other row it is.
        most: The tokens of the largest tree that may be made so; a row that would be larger is left as it is.
        longest: The same of a path; None for any.

    Returns:
        The trees, and how many were left as they are.
    """
    order = np.random.default_rng((seed, 2)).permutation(len(trees))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    firsts = [next(expand(tree)) for tree in trees]
    found, alone = [], 0
    for row, tree in enumerate(trees):
        own, strange = firsts[row], firsts[other[row]]
        exchange = Exchange(
            "",
            "",
            own.prompt_ids.astype(np.int32),
            np.zeros(len(own.prompt_ids), np.float32),
            strange.completion_ids.astype(np.int32),
            strange.completion_weights,
            "none",
            LABELS[_OTHER],
        )
        joined = merge([tree.of_record(row), paths([exchange], [row])])
        fits = joined.size <= most and joined.longest <= (longest or most) and len(trees) > 1
        found.append(joined if fits else tree)
        alone += not fits
    return found, alone


@torch.no_grad()
def _switched_off(model: TreeModel, batch: PackedBatch) -> Tensor:
    """What the model makes of the exchanges without its adapter, and without dropout."""
    if not hasattr(model.model, "disable_adapter"):
        raise TrainingError(
            "the objective compares with a reference, which the rows lack, and the model has no adapter to switch off",
            "Give the rows one with instil.training.reference.with_reference.",
        )
    training = model.model.training
    model.model.eval()
    try:
        with model.model.disable_adapter():
            return log_probs(model, batch)
    finally:
        model.model.train(training)


def _weights(batch: PackedBatch) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(S,) the weight of each target of a completion; 0 of those that stand in a prompt."""
    place = batch.position_ids[batch.target_rows] + 1
    weights: np.ndarray[tuple[int], np.dtype[np.float64]] = np.where(
        place >= batch.exchange_prompt[batch.target_exchange], batch.target_weights, 0.0
    ).astype(np.float64)
    return weights


def _labelled(batch: PackedBatch) -> tuple[Ints, Ints]:
    """(A,) what each answer is, 0 where it weighs nothing, and (A,) its row."""
    starts = batch.exchange_label != _MORE
    of_exchange = np.bincount(batch.target_exchange, _weights(batch), batch.exchanges)
    weighs = np.add.reduceat(of_exchange, np.flatnonzero(starts)) > 0
    return np.where(weighs, batch.exchange_label[starts], 0), batch.exchange_record[starts]


def _pairs(label: Ints, record: Ints) -> tuple[Ints, Ints]:
    """(pairs,) the places of the chosen and of the rejected answer of each pair."""
    chosen, rejected = np.flatnonzero(label == _CHOSEN), np.flatnonzero(label == _REJECTED)
    before = np.searchsorted(chosen, rejected) - 1
    beside = before >= 0
    beside[beside] = record[chosen[before[beside]]] == record[rejected[beside]]
    return chosen[before[beside]], rejected[beside]
