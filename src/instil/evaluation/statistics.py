"""How sure a figure is, and whether two figures of the same items differ."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from instil.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["better", "worse", "not distinguishable"]
Test = Literal["exact McNemar", "exact sign flips", "paired bootstrap"]

_ALPHA = 0.05
_POWER = 0.8
_RESAMPLES = 9999
_BATCH = 10_000_000  # numbers that a bootstrap holds at once
_ALIKE = 1e-9  # a standard error, of the span of the values, that is none
_FEW = 13  # items of which every way to flip their signs can be tried


@dataclass(frozen=True, slots=True)
class Share:
    """A share of items, with its 95 % interval.

    Args:
        mean: The share itself, 0 to 1.
        low: Where the interval begins.
        high: Where it ends.
        n: How many items there were.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Share:
        """The share of the items that are right, with the interval of Wilson's score (Wilson, 1927).

        Items that belong together, such as the instructions of one prompt, say less than as many apart. With
        `clusters` the interval is Wilson's for the effective number of items, which has the variance of the
        cluster-robust estimate, with the t quantile of one less than the clusters (Dean and Pagano, 2015).

        Args:
            right: Whether each item is.
            clusters: What each item belongs to; None where they stand alone.

        Raises:
            ValueError: There are no items.
            UsageError: `clusters` has another length.
        """
        from scipy.stats import binomtest

        if not right:
            raise ValueError("a share of no items")
        if clusters is not None:
            values = _numbers(right)
            low, high = _wilson(values, _codes(clusters, len(right)), (0.0, 1.0))
            return cls(float(values.mean()), low, high, len(right))
        interval = binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
        return cls(sum(right) / len(right), float(interval.low), float(interval.high), len(right))

    def to_json(self) -> dict[str, float | int]:
        """The four numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over items, with its 95 % interval.

    Args:
        mean: The mean, in the unit of the values.
        low: Where the interval begins; None where one item, or one cluster, tells nothing of it.
        high: Where it ends, or None.
        n: How many items there were.
        clusters: How many clusters they were in; None where each stood alone.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int | None = None

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        clusters: Sequence[Hashable] | None = None,
        bounds: tuple[float, float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Mean:
        """The mean of the values.

        Without bounds the interval is Student's, on the standard error of the mean; with clusters that is the
        cluster-robust one (Liang and Zeger, 1986), with one degree of freedom less than clusters. With bounds it is
        Wilson's, for the number of items at which a share would have that standard error: it keeps within the bounds,
        and has a width where every value is the same.

        Args:
            values: One for each item.
            clusters: What each item belongs to; None where they stand alone.
            bounds: The least and the greatest that a value can be.

        Raises:
            UsageError: There are no values, one is no finite number or out of bounds, or the lengths differ.
        """
        numbers = _numbers(values, bounds)
        codes = _codes(clusters, len(numbers))
        counts = None if weights is None else _numbers(weights)
        groups, mean = _groups(numbers, codes), _mean(numbers, counts)
        low: float | None = None
        high: float | None = None
        if bounds is not None:
            low, high = _wilson(numbers, codes, bounds)
        elif (error := _standard_error(numbers, codes, counts)) is not None:
            half = _t_quantile(groups - 1) * error
            low, high = mean - half, mean + half
        return cls(mean, low, high, len(numbers), None if codes is None else groups)

    def to_json(self) -> dict[str, float | int | None]:
        """The numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tuned model against the base model on the same items.

    Args:
        n: How many items there were.
        clusters: How many clusters they were in; None where each stood alone.
        base: The mean of the base model.
        tuned: The mean of the tuned model.
        difference: Tuned less base.
        low: Where the 95 % interval of the difference begins.
        high: Where it ends.
        wins: Items on which the tuned model is better.
        losses: Items on which it is worse.
        ties: Items on which they are alike.
        test: What gave the p-value.
        p_value: The probability of a difference as great, were there none; two-sided.
        adjusted: The p-value as one of several comparisons, by `holm`; None where it stands alone.
        detectable: The least true difference that so many items would have shown with 80 % power at a level of 5 %;
            None where nothing tells how much items differ.
        higher_is_better: Whether a greater value is.
    """

    n: int
    clusters: int | None
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    test: Test
    p_value: float
    adjusted: float | None
    detectable: float | None
    higher_is_better: bool

    @property
    def verdict(self) -> Verdict:
        """Whether the tuned model is better or worse, at a level of 5 % of the (adjusted) p-value."""
        if (self.p_value if self.adjusted is None else self.adjusted) >= _ALPHA:
            return "not distinguishable"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"

    def to_json(self) -> dict[str, Any]:
        """The fields by name, and the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def compare(
    base: Sequence[bool] | Sequence[float],
    tuned: Sequence[bool] | Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    higher_is_better: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same items.

    The interval of the difference is the percentiles of a paired bootstrap of 9,999 resamples (Efron, 1979), in which
    clusters stay whole. The p-value of right against wrong, `bool`s without clusters, is McNemar's exact one (1947).
    Of any other values it is the bootstrap's, twice the share of resamples on the far side of 0; a bootstrap of 13
    items (or clusters) or less promises too much, and there it is that of every way to flip the signs of their
    differences (Fisher, 1935).

    Args:
        base: The value of each item under the base model: whether it is right, or a score.
        tuned: The same under the tuned model.
        clusters: What each item belongs to; None where they stand alone.
        higher_is_better: Whether a greater value is.
        weights: What each item counts in the means; None: all alike.
        seed: Of the resamples.

    Raises:
        UsageError: There are no items, a value is no finite number, or the lengths differ.
    """
    before, after = _numbers(base), _numbers(tuned)
    if len(before) != len(after):
        raise UsageError(
            f"{len(before)} values of the base model and {len(after)} of the tuned one are not of the same items",
            "Give both models the same items, in the same order.",
        )
    codes = _codes(clusters, len(before))
    differences = after - before
    groups = _groups(differences, codes)
    counts = None if weights is None else _numbers(weights)
    low, high, p_value = _bootstrap(differences, codes, counts, seed)
    test: Test = "paired bootstrap"
    if codes is None and counts is None and all(isinstance(each, bool) for each in (*base, *tuned)):
        test, p_value = "exact McNemar", _mcnemar(before, after)
    elif groups <= _FEW:
        test, p_value = "exact sign flips", _sign_flips(differences if counts is None else differences * counts, codes)
    error = _standard_error(differences, codes, counts)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    wins, losses = (better, worse) if higher_is_better else (worse, better)
    return Comparison(
        n=len(before),
        clusters=None if codes is None else groups,
        base=_mean(before, counts),
        tuned=_mean(after, counts),
        difference=_mean(differences, counts),
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        ties=len(before) - wins - losses,
        test=test,
        p_value=p_value,
        adjusted=None,
        detectable=detectable(groups, error * math.sqrt(groups)) if error else None,
        higher_is_better=higher_is_better,
    )


def detectable(n: int, deviation: float) -> float:
    """The least true mean difference that a paired t test of n items shows with 80 % power, at a two-sided 5 %.

    Args:
        n: Items, at least 2.
        deviation: The standard deviation of the items' differences; of right against wrong about the square root of
            the share of items on which the two models differ.

    Returns:
        The difference, in the unit of the deviation.

    Raises:
        UsageError: n is less than 2, or the deviation is not above 0.
    """
    from statsmodels.stats.power import TTestPower

    if n < 2 or not 0 < deviation < math.inf:
        raise UsageError(
            f"{n} items whose differences deviate by {deviation!r} show no difference of any size",
            "Give 2 or more items, and a deviation above 0.",
        )
    return float(TTestPower().solve_power(nobs=n, alpha=_ALPHA, power=_POWER)) * deviation


def holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The same comparisons, each with its p-value adjusted for there being several (Holm, 1979)."""
    from statsmodels.stats.multitest import multipletests

    if not comparisons:
        return {}
    adjusted = multipletests([each.p_value for each in comparisons.values()], _ALPHA, method="holm")[1]
    return {
        name: replace(each, adjusted=float(p)) for (name, each), p in zip(comparisons.items(), adjusted, strict=True)
    }


def check_installed() -> None:
    """See that what computes intervals and tests is there, before anything is generated that needs them.

    Raises:
        UsageError: A package is not installed.
    """
    for package in ("scipy", "statsmodels"):
        if find_spec(package) is None:
            raise UsageError(f"evaluation needs the package {package!r}", "pip install 'instil[evaluate]'")


def _numbers(values: Sequence[float], bounds: tuple[float, float] | None = None) -> NDArray[np.float64]:
    """The values as an array, once it is certain that they are numbers."""
    import numpy as np

    if not values:
        raise UsageError("there is a mean of no values", "Give one value or more.")
    low, high = bounds or (-math.inf, math.inf)
    bad = [
        f"item {i}: {value!r}" for i, value in enumerate(values) if not (low <= value <= high and abs(value) < math.inf)
    ]
    if bad:
        what = f"not numbers from {low:g} to {high:g}" if bounds else "no finite numbers"
        raise UsageError(
            f"{len(bad)} values are {what}: {', '.join(bad[:10])}", "Leave such items out, and say how many."
        )
    return np.array(values, dtype=np.float64)


def _codes(clusters: Sequence[Hashable] | None, n: int) -> NDArray[np.int64] | None:
    """The cluster of each item, counted from 0."""
    import numpy as np

    if clusters is None:
        return None
    if len(clusters) != n:
        raise UsageError(f"{len(clusters)} clusters for {n} items", "Say of each item what it belongs to.")
    known = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([known[cluster] for cluster in clusters])


def _groups(values: NDArray[np.float64], codes: NDArray[np.int64] | None) -> int:
    """How many clusters there are, or items that stand alone."""
    return len(values) if codes is None else int(codes.max()) + 1


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> float:
    import numpy as np

    return float(np.average(values, weights=weights))


def _standard_error(
    values: NDArray[np.float64], codes: NDArray[np.int64] | None, weights: NDArray[np.float64] | None = None
) -> float | None:
    """That of the mean, robust to clusters and weights if there are any; None of one item or one cluster alone."""
    import numpy as np
    from statsmodels.regression.linear_model import WLS

    if _groups(values, codes) < 2:
        return None
    if values.min() == values.max():
        return 0.0
    model = WLS(values, np.ones(len(values)), 1.0 if weights is None else weights)
    if codes is None and weights is None:
        return float(model.fit().bse[0])
    groups = np.arange(len(values)) if codes is None else codes
    return float(model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True).bse[0])


def _t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(1 - _ALPHA / 2, freedom))


def _wilson(
    values: NDArray[np.float64], codes: NDArray[np.int64] | None, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Wilson's interval of a mean within bounds, for the number of items at which a share had its standard error."""
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    error = _standard_error(values, codes)
    if error is None:
        return bounds
    if codes is not None:  # that the items of a cluster differ more than chance would have it is not counted on
        error = max(error, _standard_error(values, None) or 0.0)
    groups, span = _groups(values, codes), bounds[1] - bounds[0]
    share = min(max((float(values.mean()) - bounds[0]) / span, 0.0), 1.0)
    spread = error / span
    effective = share * (1 - share) / spread**2 if spread > _ALIKE else float(groups)
    alpha = 2 * float(norm.sf(_t_quantile(groups - 1)))
    low, high = proportion_confint(share * effective, effective, alpha, method="wilson")
    return max(bounds[0], bounds[0] + span * float(low)), min(bounds[1], bounds[0] + span * float(high))


def _mcnemar(base: NDArray[np.float64], tuned: NDArray[np.float64]) -> float:
    """The p-value of McNemar's exact test."""
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[int(((base == i) & (tuned == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)


def _sign_flips(differences: NDArray[np.float64], codes: NDArray[np.int64] | None) -> float:
    """The p-value of a sum of differences, of every way to flip the signs of items or of whole clusters."""
    import numpy as np
    from scipy.stats import permutation_test

    sums = differences if codes is None else np.bincount(codes, differences)
    if len(sums) < 2:
        return 1.0
    tried = permutation_test(
        (sums,), np.sum, permutation_type="samples", vectorized=True, n_resamples=max(_RESAMPLES, 2**_FEW)
    )
    return float(tried.pvalue)


def _bootstrap(
    differences: NDArray[np.float64],
    codes: NDArray[np.int64] | None,
    weights: NDArray[np.float64] | None,
    seed: int,
) -> tuple[float, float, float]:
    """The percentile interval of the mean difference, and the two-sided p-value that goes with it."""
    import numpy as np
    from scipy.stats import bootstrap

    clusters = np.arange(len(differences)) if codes is None else codes
    counts = np.ones(len(differences)) if weights is None else weights
    sums, sizes = np.bincount(clusters, differences * counts), np.bincount(clusters, counts)
    if len(sums) < 2:
        return _mean(differences, weights), _mean(differences, weights), 1.0

    def mean(sums: NDArray[np.float64], sizes: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = sums.sum(axis) / sizes.sum(axis)
        return found

    drawn = bootstrap(
        (sums, sizes),
        mean,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH // len(sums)),
        rng=seed,
    )
    resampled = drawn.bootstrap_distribution
    far = min((resampled <= 0).sum(), (resampled >= 0).sum())
    interval = drawn.confidence_interval
    return float(interval.low), float(interval.high), min(1.0, 2 * float(far + 1) / (_RESAMPLES + 1))
