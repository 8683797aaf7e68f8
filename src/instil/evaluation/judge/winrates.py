"""How often one model is preferred to another, as it is and as it would be at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instil.evaluation.judge.verdicts import Pair

_RIDGE = 1 / 2.5**2
_WORTH = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often a model is preferred to a baseline. A rate is None where no pair has a verdict.

    Args:
        wins: Preferred in both orders.
        ties: Neither won in both orders.
        losses: The baseline was preferred in both orders.
        unparsed: Pairs without a verdict in one order at least. They are in no rate.
        inconsistent: Of the ties, those in which the two orders said different things.
        rate: Wins and half the ties, as a share of the pairs with a verdict.
        length_controlled: What the rate would be if the answers were equally long; see `length_controlled`.
        regularized: Whether that needed a prior, since without one its estimate would be infinite.
    """

    wins: int
    ties: int
    losses: int
    unparsed: int
    inconsistent: int
    rate: float | None
    length_controlled: float | None
    regularized: bool


def win_rates(pairs: Sequence[Pair]) -> WinRate:
    """The win rate over pairs.

    A win needs the same verdict in both orders; verdicts that differ make a tie (Zheng et al. 2023, "Judging
    LLM-as-a-Judge"). A tie counts as half a win.
    """
    outcomes = [pair.outcome for pair in pairs]
    worth = [_WORTH[outcome] for outcome in outcomes if outcome is not None]
    adjusted, regularized = None, False
    if worth:
        longer = [pair.longer_by for pair in pairs if pair.outcome is not None]
        adjusted, regularized = length_controlled(worth, longer)
    return WinRate(
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        unparsed=outcomes.count(None),
        inconsistent=sum(pair.outcome is not None and pair.as_first != pair.as_second for pair in pairs),
        rate=sum(worth) / len(worth) if worth else None,
        length_controlled=adjusted,
        regularized=regularized,
    )


def length_controlled(worth: Sequence[float], longer: Sequence[float]) -> tuple[float, bool]:
    """The win rate at equal length, and whether its estimate needed a prior.

    The preference is taken as logistic in `a + b * tanh(d / s)`, d being how much longer the model's answer is and s
    the standard deviation of d; the rate at d = 0 is the logistic function of a (Dubois et al. 2024,
    "Length-Controlled AlpacaEval"). Their term for how hard an instruction is, which is estimated from many models, is
    left out. Where d is the same throughout, nothing is known of b, and it is 0.

    The estimate is that of maximum likelihood, a tie being half a win and half a loss. Where that is infinite, as when
    every pair is won, a and b are given a normal prior of mean 0 and standard deviation 2.5, the scale of Gelman et al.
    2008 ("A weakly informative default prior distribution for logistic and other regression models"). If the answers of
    the model are always the longer ones, or always the shorter, the rate at d = 0 is an extrapolation.

    Args:
        worth: (N,) 1 for a win, 0.5 for a tie, 0 for a loss; at least one.
        longer: (N,) how much longer the model's answer is, in any unit.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    y, d = np.array(worth, float), np.array(longer, float)
    columns = np.ones((len(y), 1))  # (N, 1), or (N, 2) with the lengths
    if np.ptp(d) > 0:
        columns = np.stack([np.ones_like(d), np.tanh(d / d.std())], axis=1)
    regularized = _infinite(columns[y > 0, -1], columns[y < 1, -1])
    ridge = _RIDGE if regularized else 0.0

    def loss(weights: Any) -> tuple[float, Any]:
        score = columns @ weights
        value = np.logaddexp(0, score).sum() - y @ score + ridge / 2 * weights @ weights
        return value, columns.T @ (expit(score) - y) + ridge * weights

    found = minimize(loss, np.zeros(columns.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9})
    return float(expit(found.x[0])), regularized


def _infinite(won: Any, lost: Any) -> bool:
    """Whether no finite estimate exists: the x of wins and those of losses do not overlap (Albert & Anderson 1984)."""
    if not won.size or not lost.size:
        return True
    if min(won.min(), lost.min()) == max(won.max(), lost.max()):  # x says nothing, and b stays 0
        return False
    return bool(won.min() >= lost.max() or won.max() <= lost.min())
