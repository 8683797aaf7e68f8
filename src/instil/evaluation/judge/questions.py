"""Questions of one turn or more, in the files of MT-Bench, and the answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from instil.data.row import Row, described
from instil.errors import DataError, RowProblem, UsageError
from instil.evaluation.reading import new_id, read_rows, text, texts

Answers = Mapping[str, Sequence[str]]
"""The answers to each question, one for each of its turns, by its id."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, turn by turn.

    Args:
        id: Its name in the file, `question_id`.
        category: What kind of question it is.
        turns: What the user says; the second after the answer to the first, and so on.
        references: A right answer to each turn, "" for none; () where no turn has one.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answers that one row of a file holds, and where it stands."""

    id: str
    turns: tuple[str, ...]
    source: str


def read_questions(path: str | Path, references: str | Path | None = None) -> list[Question]:
    """Questions in the format of MT-Bench (Zheng et al., "Judging LLM-as-a-Judge", 2023).

    Args:
        path: Rows of `question_id`, `category`, `turns` (a list of texts) and, if they like, `reference` (as many).
        references: A file of right answers, which go before `reference`: rows of `question_id` and the answers, one for
            each turn, in `turns` or, as MT-Bench publishes them, in `choices`, a list of one object that holds `turns`.
            An answer may be empty. It may hold answers to other questions too.

    Raises:
        DataError: A file cannot be read, or rows of it, of which it names all.
    """
    seen: dict[str, str] = {}
    questions = read_rows(path, lambda row: _question(row, seen))
    if references is None:
        return questions
    found = {answer.id: answer for answer in _read(references)}
    problems = []
    for question in questions:
        answer = found.get(question.id)
        if answer and len(answer.turns) != len(question.turns):
            reason = f"answers {len(answer.turns)} turns, and the question {question.id} has {len(question.turns)}"
            problems.append(RowProblem(answer.source, "turns", reason))
    if problems:
        raise DataError(f"{references}: has rows that do not fit {path}", problems=problems)
    return [
        Question(each.id, each.category, each.turns, found[each.id].turns if each.id in found else each.references)
        for each in questions
    ]


def check_answers(questions: Sequence[Question], answers: Answers, whose: str = "the model") -> None:
    """See that every question has an answer to each turn, and that nothing else is answered.

    Raises:
        UsageError: Some have not; it names them.
    """
    wrong = []
    for question in questions:
        got = len(answers[question.id]) if question.id in answers else 0
        if got != len(question.turns):
            wrong.append(f"{question.id} ({got} answers to {len(question.turns)} turns)")
    if wrong:
        some = ", ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UsageError(f"{whose} has not answered each turn of {len(wrong)} questions: {some}", "Answer them first.")
    unknown = sorted(set(answers) - {question.id for question in questions})
    if unknown:
        some = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise UsageError(f"{whose} has answered questions that are not among these: {some}", "Leave those answers out.")


def _read(path: str | Path) -> list[_Answer]:
    seen: dict[str, str] = {}
    return read_rows(path, lambda row: _answer(row, seen))


def _question(row: Row, seen: dict[str, str]) -> Question:
    name, category = new_id(row, "question_id", seen), text(row, "category")
    turns = texts(row, "turns", row.values.get("turns"))
    references: tuple[str, ...] = ()
    if row.has("reference"):
        references = texts(row, "reference", row.values["reference"], empty=True)
        if references and turns and len(references) != len(turns):
            row.bad("reference", f"has {len(references)} texts, and turns has {len(turns)}", "write one for each turn")
    return Question(name, category, turns, references)


def _answer(row: Row, seen: dict[str, str]) -> _Answer:
    name = new_id(row, "question_id", seen)
    if "choices" not in row.values:
        return _Answer(name, texts(row, "turns", row.values.get("turns"), empty=True), str(row.source))
    choices = row.values["choices"]
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        row.bad("choices", f"must be a list of one object, and is {described(choices)}", "keep one choice")
        return _Answer(name, (), str(row.source))
    return _Answer(name, texts(row, "choices[0].turns", choices[0].get("turns"), empty=True), str(row.source))
