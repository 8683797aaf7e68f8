"""A sweep: several settings, each trained with several seeds, evaluated on the same items and compared.

The values of an item under all seeds of a setting are one cluster: intervals and tests are about other items of the
same kind, and count an item once however many seeds there are. They say nothing of other seeds, for which two or three
are too few to say; what each seed came to stands beside, and `disagreeing` tells where the seeds are not at one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from instil.evaluation.figures import Figure, Measure, adjusted, figure
from instil.evaluation.items import Item, Scores, Who
from instil.evaluation.suites import loss_of, of_metric

Runs = Mapping[str, Mapping[int, Sequence[Item]]]
"""The scored items of each setting, by its name, under each of its seeds."""

LOSS = Measure(
    "held-out loss",
    loss_of,
    "nats",
    higher_is_better=False,
    weight=lambda scores: scores["reference"]["tokens"],
    headline=False,
)


def sweep_figures(runs: Runs) -> list[Figure]:
    """The figures of each setting, beside the first on the items and seeds that both have.

    Args:
        runs: All of the same items, in the same order. A setting without seeds has no figures.

    Returns:
        For each metric, and for the loss of the references, a figure of each setting: `suite` is the metric, `measure`
        the setting, and `extra` holds the mean under each seed, as `seeds`. The p-values of all settings and metrics
        are adjusted together (Holm, 1979), those of the loss by themselves.
    """
    some = next((items for by_seed in runs.values() for items in by_seed.values()), ())
    found = []
    for name in dict.fromkeys(name for item in some for name in item.wanted["metrics"]):
        asked = {
            setting: {seed: [each for each in items if name in each.wanted["metrics"]] for seed, items in of.items()}
            for setting, of in runs.items()
        }
        found += _figures(of_metric(name), asked)
    return adjusted(found + _figures(LOSS, runs))


def disagreeing(found: Figure, first: Figure) -> list[str]:
    """The seeds under which a setting does not differ from the first as their comparison says.

    Args:
        found: The setting's figure.
        first: That of the first setting, of the same metric.
    """
    if found.comparison is None or found.comparison.verdict == "not distinguishable":
        return []
    means, others = found.extra["seeds"], first.extra["seeds"]
    up = found.comparison.difference > 0
    return [
        seed
        for seed in means
        if seed in others and not (means[seed] > others[seed] if up else means[seed] < others[seed])
    ]


def _figures(measure: Measure, runs: Runs) -> list[Figure]:
    first = next(iter(runs.values()))
    found = []
    for setting, of in runs.items():
        own = _figure(measure, setting, [{"tuned": items} for items in of.values()])
        if own is None:
            continue
        own = replace(own, extra={"seeds": {str(seed): _mean(measure, items) for seed, items in of.items()}})
        shared: list[Mapping[Who, Sequence[Item]]] = [
            {"tuned": of[seed], "base": first[seed]} for seed in of if seed in first and of is not first
        ]
        beside = _figure(measure, setting, shared)
        found.append(replace(own, base=beside.base, comparison=beside.comparison) if beside else own)
    return found


def _figure(measure: Measure, setting: str, seeds: Sequence[Mapping[Who, Sequence[Item]]]) -> Figure | None:
    """The measure over items, of which each has its values under all seeds; None where nothing is known of it."""
    merged: dict[str, Item] = {}
    for who in seeds[0] if seeds else ():
        for under_seeds in zip(*(models[who] for models in seeds), strict=True):
            first = under_seeds[0]
            item = merged.setdefault(first.id, Item(first.suite, first.id))
            item.scores[who] = _together(measure, [each.scores["tuned"] for each in under_seeds])
    over_seeds = replace(
        measure,
        name=setting,
        value=lambda scores: scores["value"],
        weight=measure.weight and (lambda scores: scores["weight"]),
    )
    return figure(measure.name, over_seeds, list(merged.values()))


def _together(measure: Measure, scores: Sequence[Scores]) -> Scores:
    """What an item has under all seeds: the values, or the mean of them where items have weights of their own."""
    values: list[Any] = [measure.value(each) for each in scores]
    if None in values:
        return {"value": None}
    return {"value": fmean(values), "weight": measure.weight(scores[0])} if measure.weight else {"value": values}


def _mean(measure: Measure, items: Sequence[Item]) -> float:
    scores = [item.scores["tuned"] for item in items if measure.value(item.scores["tuned"]) is not None]
    weights = [measure.weight(each) for each in scores] if measure.weight else None
    values: list[Any] = [measure.value(each) for each in scores]
    return fmean(values, weights)
