"""Figures: what items are worth together, base against tuned, each with how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from instil.evaluation.items import Item, Scores, Who
from instil.evaluation.statistics import Comparison, Mean, Share, compare, holm

Value = bool | float | Sequence[bool] | Sequence[float | None] | None
Unit = Literal["share", "points", "perplexity", "nats", ""]

_BOTH: tuple[Who, Who] = ("base", "tuned")


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that scores say of an item.

    Args:
        name: What it is called.
        value: Takes it out of the scores: whether it is so, a number, one of these for each of several parts of the
            item, as many for every model, or None where it cannot be said.
        unit: `share` of items; `points` up to `high`; `perplexity`, of a mean loss in nats; `nats`; "" for a number.
        higher_is_better: Whether a greater value is.
        high: The greatest that a number can be; None where there is no such thing. The least is `low`.
        low: The least that a number can be.
        weight: Takes out what an item counts, as its number of tokens; None: every item alike.
        headline: Whether it is of those that are tested together, and shown first.
        alone: Whether it is of the tuned model alone, as what it has beside the base.
    """

    name: str
    value: Callable[[Scores], Value]
    unit: Unit = "share"
    higher_is_better: bool = True
    high: float | None = None
    low: float = 0.0
    weight: Callable[[Scores], float] | None = None
    headline: bool = True
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A measure over items.

    Args:
        suite: The suite they are of.
        measure: The name of the measure.
        family: The task they belong to; "" for all of the suite.
        unit: As of the measure.
        tuned: The tuned model's; of a perplexity the mean loss in nats, for which `shown` has the perplexity.
        base: The base model's, where there is one.
        comparison: The two on the same items.
        missing: Items of which it cannot be said, of each model; they are in none of its figures.
        headline: Whether it is of those that are tested together.
        extra: What else is known of it, by name.
    """

    suite: str
    measure: str
    family: str
    unit: Unit
    tuned: Share | Mean
    base: Share | Mean | None
    comparison: Comparison | None
    missing: dict[Who, int]
    headline: bool
    extra: dict[str, Any]

    def shown(self, value: float | None) -> str:
        """A value in its unit, for people."""
        if value is None:
            return "?"
        if self.unit == "share":
            return f"{100 * value:.1f} %"
        if self.unit == "perplexity":
            return f"{math.exp(min(value, 700)):.4g}"
        return f"{value:.1f}" if self.unit == "points" else f"{value:.4g}"

    def with_interval(self, who: Who) -> str:
        """The value of a model with its 95 % interval."""
        found = self.tuned if who == "tuned" else self.base
        if found is None:
            return ""
        if found.low is None:
            return self.shown(found.mean)
        low, high = (self.shown(each).removesuffix(" %") for each in (found.low, found.high))
        return f"{self.shown(found.mean)} ({low} to {high})"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        values = {"suite": self.suite, "measure": self.measure, "family": self.family, "unit": self.unit}
        return {
            **values,
            "tuned": self.tuned.to_json(),
            "base": self.base.to_json() if self.base else None,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "missing": self.missing,
            **self.extra,
        }


def figure(suite: str, measure: Measure, items: Sequence[Item], family: str = "", **extra: Any) -> Figure | None:
    """A measure over items: of each model over those it can be said of, the comparison over those of both.

    None where it can be said of no answer of the tuned model.
    """
    paired = not measure.alone and any("base" in item.scores for item in items)
    whos: tuple[Who, ...] = ("tuned", "base") if paired else ("tuned",)
    values = {who: [measure.value(item.scores.get(who, {})) for item in items] for who in whos}
    columns = {who: _Column.of(measure, who, items, values[who]) for who in whos}
    tuned, base = columns["tuned"], columns.get("base")
    if not tuned.values:
        return None
    comparison = None
    if base is not None:
        pairs = [
            (item, before, after)
            for item, *several in zip(items, values["base"], values["tuned"], strict=True)
            for before, after in zip(*map(_parts, several), strict=True)
            if before is not None and after is not None
        ]
        if pairs:
            comparison = compare(
                [before for _, before, _ in pairs],
                [after for _, _, after in pairs],
                None if tuned.clusters is None else [item.id for item, _, _ in pairs],
                higher_is_better=measure.higher_is_better,
                weights=[measure.weight(item.scores["tuned"]) for item, _, _ in pairs] if measure.weight else None,
            )
    return Figure(
        suite,
        measure.name,
        family,
        measure.unit,
        tuned.estimate(measure),
        base.estimate(measure) if base is not None and base.values else None,
        comparison,
        {who: values[who].count(None) for who in whos},
        measure.headline and not family,
        extra,
    )


@dataclass(frozen=True, slots=True)
class _Column:
    """The values of a model: one for each item, or for each part of each, with what it belongs to and counts."""

    values: list[Any]
    clusters: list[str] | None
    weights: list[float] | None

    @classmethod
    def of(cls, measure: Measure, who: Who, items: Sequence[Item], values: Sequence[Value]) -> _Column:
        kept = [(item, value) for item, value in zip(items, values, strict=True) if value is not None]
        several = any(isinstance(value, list | tuple) for _, value in kept)
        return cls(
            [each for _, value in kept for each in _parts(value) if each is not None],
            [item.id for item, value in kept for each in _parts(value) if each is not None] if several else None,
            [measure.weight(item.scores[who]) for item, _ in kept] if measure.weight else None,
        )

    def estimate(self, measure: Measure) -> Share | Mean:
        if all(isinstance(each, bool) for each in self.values):
            return Share.of(self.values, self.clusters)
        bounds = None if measure.high is None else (measure.low, measure.high)
        return Mean.of(self.values, self.clusters, bounds, self.weights)


def of_harness(found: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Figures of the tasks of EleutherAI's harness: compared where the value of each document is known.

    Args:
        found: What `instil.evaluation.lm_eval.run` found, by model: `tuned`, and `base` where there is one.
    """

    def mean(values: Mapping[str, Any]) -> Mean:
        value = math.nan if values["value"] is None else values["value"]  # JSON has no other number that is none
        return Mean(value, values["low"], values["high"], values["n"])

    def documents(who: Who, task: str, metric: str) -> Mapping[str, Any]:
        of_metric: Mapping[str, Any] = found.get(who, {}).get("documents", {}).get(task, {}).get(metric, {})
        return of_metric

    def paired(task: str, metric: str) -> Comparison | None:
        base, tuned = (documents(who, task, metric).get("values", {}) for who in _BOTH)
        both = [each for each in tuned if each in base]
        if not both:
            return None
        columns: list[Any] = [[values[each] for each in both] for values in (base, tuned)]
        if {*columns[0], *columns[1]} <= {0.0, 1.0}:  # right against wrong
            columns = [list(map(bool, column)) for column in columns]
        higher = documents("tuned", task, metric)["higher_is_better"]
        return compare(*columns, higher_is_better=higher)

    base = found["base"]["tasks"] if "base" in found else None
    return [
        Figure(
            "lm-eval",
            f"{task}: {metric}",
            "",
            values["unit"],
            mean(values),
            mean(base[task][metric]) if base is not None else None,
            paired(task, metric),
            {},
            task not in found["tuned"].get("parts", ()),
            {},
        )
        for task, metrics in (found["tuned"]["tasks"] if found else {}).items()
        for metric, values in metrics.items()
    ]


def adjusted(figures: Sequence[Figure]) -> list[Figure]:
    """The figures with their p-values adjusted: those of the headlines together, those of the families of a suite."""
    groups: dict[tuple[str, str], dict[str, Comparison]] = {}
    for at, each in enumerate(figures):
        if each.comparison is not None:
            group = ("", "headline") if each.headline else (each.suite, each.measure if each.family else "other")
            groups.setdefault(group, {})[str(at)] = each.comparison
    tested = {at: comparison for group in groups.values() for at, comparison in holm(group).items()}
    return [replace(each, comparison=tested[str(at)]) if str(at) in tested else each for at, each in enumerate(figures)]


def by_family(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each family, in the order they come; none where all are of one."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.family, []).append(item)
    return found if len(found) > 1 else {}


def _parts(value: Value) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
