"""Ratings and choices of a judge. What it said without a verdict is counted and kept, never left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from instil.evaluation.judge import prompts
from instil.evaluation.judge.endpoint import Endpoint
from instil.evaluation.judge.questions import Answers, Question, check_answers

Outcome = Literal["win", "tie", "loss"]

_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")


def rating(text: str) -> float | None:
    """The rating that a judge ends in: the last number in double square brackets; None without, or not in 1 to 10."""
    found = _RATING.findall(text)
    number = float(found[-1]) if found else 0.0
    return number if 1 <= number <= 10 else None


def choice(text: str) -> Literal["A", "B", "tie"] | None:
    """The choice that a judge ends in: the last of [[A]], [[B]] and, for a tie, [[C]]; None without."""
    found = _CHOICE.findall(text)
    marks: dict[str, Literal["A", "B", "tie"]] = {"A": "A", "B": "B", "C": "tie"}
    return marks[found[-1]] if found else None


@dataclass(frozen=True, slots=True)
class Score:
    """The rating of one answer.

    Args:
        id: The question or item.
        category: Its category.
        turn: Which turn was rated, from 1.
        rating: 1 to 10; None where the judge gave none.
        raw: What the judge said.
    """

    id: str
    category: str
    turn: int
    rating: float | None
    raw: str


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over ratings.

    Args:
        mean: Over those that were given, 1 to 10; None without any.
        parsed: How many were given.
        unparsed: How often the judge gave none. They are not in the mean.
    """

    mean: float | None
    parsed: int
    unparsed: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Ratings, one by one and their means."""

    items: tuple[Score, ...]

    @property
    def mean(self) -> Mean:
        """Over all."""
        given = [score.rating for score in self.items if score.rating is not None]
        return Mean(sum(given) / len(given) if given else None, len(given), len(self.items) - len(given))

    @property
    def per_category(self) -> dict[str, Mean]:
        """Over each category, in the order they come."""
        names = dict.fromkeys(score.category for score in self.items)
        return {name: Scores(tuple(each for each in self.items if each.category == name)).mean for name in names}

    @property
    def per_turn(self) -> dict[int, Mean]:
        """Over each turn."""
        turns = sorted({score.turn for score in self.items})
        return {turn: Scores(tuple(each for each in self.items if each.turn == turn)).mean for turn in turns}


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with its answer.

    Args:
        id: Its name.
        prompt: What was asked.
        answer: What the model said.
        category: What kind of prompt it is, if there are kinds.
    """

    id: str
    prompt: str
    answer: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models' answers to one turn, compared in both orders.

    Args:
        id: The question.
        category: Its category.
        turn: Which turn was compared, from 1.
        as_first: What the judge made of the model when its answer was shown first; None where it gave no verdict.
        as_second: The same when it was shown second.
        longer_by: Characters that the model's answer has more than the baseline's.
        raw: What the judge said, in both orders.
    """

    id: str
    category: str
    turn: int
    as_first: Outcome | None
    as_second: Outcome | None
    longer_by: int
    raw: tuple[str, str]

    @classmethod
    def of(cls, id: str, category: str, turn: int, longer_by: int, raw: tuple[str, str]) -> Pair:
        """What the judge's words, the model's answer shown first and then second, make of a turn."""
        return cls(id, category, turn, _outcome(raw[0], "A"), _outcome(raw[1], "B"), longer_by, raw)

    @property
    def outcome(self) -> Outcome | None:
        """A win or a loss if it is one in both orders, else a tie; None where a verdict is missing."""
        if self.as_first is None or self.as_second is None:
            return None
        return self.as_first if self.as_first == self.as_second else "tie"


def judge_single(questions: Sequence[Question], answers: Answers, endpoint: Endpoint) -> Scores:
    """A rating of each answer from 1 to 10, by itself (Zheng et al. 2023); a later turn with all that came before.

    Args:
        questions: What was asked. Where there is a reference, the judge is shown it.
        answers: What the model said.
        endpoint: The judge: one request for each turn.

    Raises:
        UsageError: A question without its answers; or as `Endpoint.complete_all`.
    """
    check_answers(questions, answers)
    turns = _turns(questions)
    replies = endpoint.complete_all(
        [prompts.single(each.turns[:n], answers[each.id][:n], each.references[:n]) for each, n in turns]
    )
    return Scores(
        tuple(
            Score(question.id, question.category, turn, rating(reply.text), reply.text)
            for (question, turn), reply in zip(turns, replies, strict=True)
        )
    )


def judge_pairs(questions: Sequence[Question], answers: Answers, baseline: Answers, endpoint: Endpoint) -> list[Pair]:
    """Each answer of the model against that of a baseline, in both orders (Zheng et al. 2023).

    Args:
        questions: What was asked. Where there is a reference, the judge is shown it.
        answers: What the model said.
        baseline: What the other one said.
        endpoint: The judge: two requests for each turn.

    Raises:
        UsageError: A question without its answers; or as `Endpoint.complete_all`.
    """
    check_answers(questions, answers)
    check_answers(questions, baseline, "the baseline")
    turns = _turns(questions)
    asked = []
    for question, n in turns:
        ours, theirs = answers[question.id][:n], baseline[question.id][:n]
        for first, second in ((ours, theirs), (theirs, ours)):
            asked.append(prompts.pair(question.turns[:n], first, second, question.references[:n]))
    said = [reply.text for reply in endpoint.complete_all(asked)]
    return [
        Pair.of(
            question.id,
            question.category,
            turn,
            len(answers[question.id][turn - 1]) - len(baseline[question.id][turn - 1]),
            (first, second),
        )
        for (question, turn), first, second in zip(turns, said[::2], said[1::2], strict=True)
    ]


def judge_criteria(
    items: Sequence[Item], endpoint: Endpoint, criteria: Mapping[str, str] = prompts.CRITERIA
) -> dict[str, Scores]:
    """Ratings from 1 to 10 of answers to prompts of any kind, by one thing at a time.

    Args:
        items: The prompts with their answers.
        endpoint: The judge: one request for each item and criterion.
        criteria: The name of each thing and what it means, as a phrase that the judge is told.

    Raises:
        UsageError: As `Endpoint.complete_all`.
    """
    cases = [(name, item) for name in criteria for item in items]
    asked = [prompts.criterion(name, criteria[name], item.prompt, item.answer) for name, item in cases]
    found: dict[str, list[Score]] = {name: [] for name in criteria}
    for (name, item), reply in zip(cases, endpoint.complete_all(asked), strict=True):
        found[name].append(Score(item.id, item.category, 1, rating(reply.text), reply.text))
    return {name: Scores(tuple(scores)) for name, scores in found.items()}


def _turns(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def _outcome(said: str, ours: Literal["A", "B"]) -> Outcome | None:
    chosen = choice(said)
    if chosen is None or chosen == "tie":
        return chosen
    return "win" if chosen == ours else "loss"
