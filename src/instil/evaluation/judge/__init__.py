"""A language model as the judge of answers, behind any OpenAI-compatible endpoint."""

from instil.evaluation.judge.endpoint import Budget, Endpoint, Reply
from instil.evaluation.judge.prompts import CRITERIA
from instil.evaluation.judge.questions import Question, read_questions
from instil.evaluation.judge.verdicts import (
    Item,
    Mean,
    Pair,
    Score,
    Scores,
    choice,
    judge_criteria,
    judge_pairs,
    judge_single,
    rating,
)
from instil.evaluation.judge.winrates import WinRate, length_controlled, win_rates

__all__ = [
    "CRITERIA",
    "Budget",
    "Endpoint",
    "Item",
    "Mean",
    "Pair",
    "Question",
    "Reply",
    "Score",
    "Scores",
    "WinRate",
    "choice",
    "judge_criteria",
    "judge_pairs",
    "judge_single",
    "length_controlled",
    "rating",
    "read_questions",
    "win_rates",
]
