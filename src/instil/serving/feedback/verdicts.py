"""What counts of all judgements: of each answer the last word, and how content people are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from instil.serving.feedback.values import Judgement, Overview

Answer = tuple[str, int]
"""An answer, by its interaction's id and the number of its choice."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The judgements that count.

    Args:
        ratings: Of each answer the last rating, unless it was taken back.
        corrections: Of each answer the last correction.
        preferences: Of each two answers the last comparison.
        dialogues: All that were written.
    """

    ratings: dict[Answer, Judgement] = field(default_factory=dict)
    corrections: dict[Answer, Judgement] = field(default_factory=dict)
    preferences: dict[frozenset[Answer], Judgement] = field(default_factory=dict)
    dialogues: list[Judgement] = field(default_factory=list)

    @classmethod
    def of(cls, judgements: Iterable[Judgement]) -> Verdicts:
        """Those of judgements in the order in which they were given."""
        found = cls()
        for each in judgements:
            if each.kind == "rating":
                found.ratings[_better(each)] = each
            elif each.kind == "correction":
                found.corrections[_better(each)] = each
            elif each.kind == "preference":
                found.preferences[frozenset(compared(each))] = each
            else:
                found.dialogues.append(each)
        for answer in [answer for answer, each in found.ratings.items() if each.body["value"] is None]:
            del found.ratings[answer]
        return found


def compared(preference: Judgement) -> tuple[Answer, Answer]:
    """The better and the worse answer of a comparison."""
    assert preference.rejected is not None
    assert preference.rejected_choice is not None
    return _better(preference), (preference.rejected, preference.rejected_choice)


def _better(judgement: Judgement) -> Answer:
    assert judgement.interaction is not None
    assert judgement.choice is not None
    return judgement.interaction, judgement.choice


def statistics(interactions: Sequence[Overview], judgements: Iterable[Judgement]) -> dict[str, Any]:
    """How many interactions and judgements there are, and what share of the rated answers was rated up: of all, of each
    model, and of the answers of each week (ISO 8601, UTC), as plain JSON values.
    """
    verdicts = Verdicts.of(judgements)
    by_id = {each.id: each for each in interactions}
    rated = [(by_id[answer[0]], each.body["value"]) for answer, each in verdicts.ratings.items() if answer[0] in by_id]

    def grouped(name: str, group: Callable[[Overview], str]) -> list[dict[str, Any]]:
        asked = Counter(map(group, interactions))
        return [
            {name: key, "interactions": asked[key], **_satisfaction([v for each, v in rated if group(each) == key])}
            for key in sorted(asked)
        ]

    return {
        "interactions": len(interactions),
        "answers": sum(each.answers for each in interactions),
        **_satisfaction([value for _, value in rated]),
        "corrections": _about(verdicts.corrections, by_id),
        "preferences": sum(any(id in by_id for id, _ in each) for each in verdicts.preferences),
        "dialogues": len(verdicts.dialogues),
        "models": grouped("model", lambda each: each.model),
        "weeks": grouped("week", lambda each: f"{each.time:%G-W%V}"),
    }


def _about(judged: Mapping[Answer, Judgement], by_id: Mapping[str, Overview]) -> int:
    return sum(id in by_id for id, _ in judged)


def _satisfaction(values: Sequence[str]) -> dict[str, Any]:
    up = values.count("up")
    share, low, high = (up / len(values), *wilson(up, len(values))) if values else (None, None, None)
    return {"up": up, "down": len(values) - up, "satisfaction": share, "low": low, "high": high}


def wilson(successes: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share by its score (Wilson, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
