"""Scores of answers: what the field `metric` of a record or a task can name, and what an answer looks like.

A metric gives of each answer its `Scores`: finite numbers by name, which go into JSON as they are and from which the
figure over all answers is computed again. Nothing is left out: an answer without a label or a number has a score that
says so, and `unparsed` counts it.
"""

from __future__ import annotations

import functools
import math
import re
import string
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from instil.errors import DataError, RowProblem, UsageError, nearest
from instil.evaluation.execute import OUTCOMES, Program, Ran

if TYPE_CHECKING:
    from sacrebleu import BLEU, CHRF

Scores = dict[str, float]
Need = Literal["references", "labels", "tests", "count"]

_ORDERS = 4  # of n-grams, in BLEU
_LARGEST = 1e100  # of a number: its square can still be summed
_NUMBER = re.compile(
    r"(?:(?<!\w)(?P<sign>[-+]))?[$€£¥]?"
    r"(?<!\w)(?P<digits>\d+(?:[.,/:]\d+)*|(?<!\.)\.\d+)(?P<exponent>e[-+]?\d+)?"
    r"(?P<percent> ?(?:%|per ?cent\b))?"
)
_FENCED = re.compile(r"^[ \t]*```[ \t]*([^\s`]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_WELL_FORMED = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Item:
    """An answer with what it is held against.

    Args:
        answer: The model's text.
        references: The right answers, any one of which will do.
        labels: The labels to choose from, for `accuracy` and `list_of`.
        tests: Python that the program in the answer must pass, for `execute`.
        count: How many of the labels are asked for, for `list_of`.
        source: Where the record stands, as `file:line`.
    """

    answer: str
    references: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    tests: str = ""
    count: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        name: As a record or a task names it, and as its value is named in `Scores`.
        about: What it is, in one line.
        needs: The fields of `Item` it cannot do without.
        high: The greatest value; None where there is none. The least is 0.
        higher_is_better: Whether a greater value is.
        score: The scores of one answer; `execute`, whose programs are run together, has none.
        aggregate: The figures over all answers, from their scores: that called `name`, `n`, and others.
    """

    name: str
    about: str
    needs: tuple[Need, ...]
    high: float | None
    higher_is_better: bool
    score: Callable[[Item], Scores] | None
    aggregate: Callable[[Sequence[Scores]], Scores]


def metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in METRICS:
        raise UsageError(f"there is no metric {name!r}", nearest(name, METRICS))
    return METRICS[name]


def score(
    name: str, items: Sequence[Item], run: Callable[[Sequence[Program]], Sequence[Ran]] | None = None
) -> list[Scores]:
    """Score answers.

    Args:
        name: The metric.
        items: The answers, each with what the metric needs.
        run: What runs the programs of `execute`, such as `instil.evaluation.execute.run_all`; without it no program
            that a model wrote is run.

    Returns:
        The scores of each answer, in order.

    Raises:
        UsageError: There is no such metric, or it is `execute` and nothing may run programs.
        DataError: Items lack what the metric needs, or it cannot be used; all of them.
    """
    chosen = metric(name)
    if chosen.score is None and run is None:
        raise UsageError(
            f"{name} runs programs that a model wrote, which was not allowed", "Allow it, or leave it out."
        )
    found = [problem for i, item in enumerate(items) for problem in problems(name, item, i)]
    if found:
        rows = len({problem.source for problem in found})
        raise DataError(f"{rows:,} of {len(items):,} records cannot be scored by {name}", problems=found)
    if chosen.score is not None:
        return [chosen.score(item) for item in items]
    assert run is not None
    return [_outcome(ran) for ran in run([Program(code_of(item.answer), item.tests) for item in items])]


def aggregate(name: str, scores: Sequence[Scores]) -> Scores:
    """The figures over all answers, from the scores of each.

    Args:
        name: The metric.
        scores: What `score` gave, or the same read from JSON.

    Returns:
        The value under the metric's name, `n` answers, and what else the metric counts. A mean over the answers that
        state a number is left out where none does.

    Raises:
        UsageError: There is no such metric, or there are no scores.
    """
    if not scores:
        raise UsageError(f"there is no {name} of no answers", "Give one or more.")
    return metric(name).aggregate(scores)


def normalize(text: str) -> str:
    """Text as `exact_match` and `token_f1` compare it (Rajpurkar et al., 2016).

    Lower case, no punctuation, no English articles, single blanks. Of Unicode: case is folded, compatible forms are
    one (NFKC), and punctuation is whatever Unicode calls so, beside the signs of ASCII. Where nothing would be left
    ("+", "A"), case and white space alone are made equal.
    """
    folded = _fold(text)
    kept = "".join(c for c in folded if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the")) or folded


def code_of(answer: str) -> str:
    """The program in an answer: its first fenced block that is marked as Python, else its first, else all of it."""
    blocks = _FENCED.findall(answer)
    python = [code for mark, code in blocks if mark.lower() in ("python", "python3", "py")]
    return textwrap.dedent(next(iter([*python, *(code for _, code in blocks)]), answer))


def number_of(text: str) -> float | None:
    """The last number that a text states; None where it states none.

    A sign, digits with a decimal point, thousands parted by commas, apostrophes or no-break spaces, an exponent; a
    percentage is hundredths. A hyphen behind a word or a number (`3-4`) is no sign, and digits within a word (`v2`) are
    no number. Nothing is guessed of what ends otherwise, such as `3,14`, `1/2`, `10:30` or a date: that states none, as
    does what is beyond 1e100.
    """
    grouped = re.sub(r"(?<=\d)['’\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text.casefold().replace("−", "-"))
    found = list(_NUMBER.finditer(grouped))
    if not found or not _WELL_FORMED.fullmatch(found[-1]["digits"]):
        return None
    last = found[-1]
    value = float(last["digits"].replace(",", "") + (last["exponent"] or "")) / (100 if last["percent"] else 1)
    return (-value if last["sign"] == "-" else value) if value <= _LARGEST else None


def label_of(text: str, labels: Sequence[str]) -> str | None:
    """The one label that a text states; None where it states none or several.

    It states the label that it is, case and white space aside. Otherwise it states those that occur in it as whole
    words, in any case, but a single letter in its own, so that "a" is no "A". A part of a hyphenated word is no whole
    word, and a label within a longer one that occurs there does not count.
    """
    by_folded = {_fold(label): label for label in labels}
    if _fold(text) in by_folded:
        return by_folded[_fold(text)]
    stated = _stated(text, labels)
    return by_folded[stated.pop()] if len(stated) == 1 else None


def _stated(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that occur in a text as `label_of` has it, their case folded."""
    longest_first = sorted((_spaced(label) for label in labels), key=len, reverse=True)
    choices = "|".join(re.escape(each) if len(each) == 1 else f"(?i:{re.escape(each)})" for each in longest_first)
    found = re.findall(rf"(?<!\w)(?<!\w[-'’])(?:{choices})(?!\w)(?![-'’]\w)", _spaced(text))
    return {_fold(each) for each in found}


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer looks like, whatever it says.

    Args:
        words: How many words it has, parted by white space.
        empty: Whether it has none.
        repeated: The share of its runs of four words that it has had before, 0 to 1 (seq-rep-4 of Welleck et al.,
            2020).
        repeats: Whether it repeats itself: more than 0.3 of those runs, or it ends in eight words or more that are
            one phrase three times over. White space parts words, so this sees nothing in text without any.
    """

    words: int
    empty: bool
    repeated: float
    repeats: bool

    @classmethod
    def of(cls, answer: str) -> Shape:
        """The shape of an answer."""
        words = answer.split()
        runs = list(zip(*(words[i:] for i in range(4)), strict=False))
        repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
        return cls(len(words), not words, repeated, repeated > 0.3 or _ends_in_a_loop(words))


def _ends_in_a_loop(words: Sequence[str]) -> bool:
    """Whether the last eight words or more are one phrase three times over, the last time perhaps cut."""
    for period in range(1, len(words) // 3 + 1):
        tail = words[-max(8, 3 * period) :]
        if len(tail) >= 8 and tail[period:] == tail[:-period]:
            return True
    return False


def problems(name: str, item: Item, index: int = 0) -> list[RowProblem]:
    """Why a metric cannot score an item, as far as that is known from the item alone.

    Args:
        name: The metric.
        item: The item, whose answer does not matter.
        index: Its number, for messages where it has no source.

    Raises:
        UsageError: There is no such metric.
    """
    chosen = metric(name)
    source = item.source or f"item {index}"
    found = [
        RowProblem(source, need, f"is missing, and {chosen.name} needs it", f"give the record {need}")
        for need in chosen.needs
        if not getattr(item, need)
    ]
    if found:
        return found
    if "labels" in chosen.needs:
        folded = Counter(_fold(label) for label in item.labels)
        if twice := [label for label in item.labels if folded[_fold(label)] > 1 or not _fold(label)]:
            found.append(RowProblem(source, "labels", f"{twice} are alike or empty", "make each one of its own"))
        if chosen.name == "list_of" and item.count > len(item.labels):
            reason = f"is {item.count}, and there are {len(item.labels)} labels"
            found.append(RowProblem(source, "count", reason, "give more labels"))
        unknown = [each for each in item.references if _fold(each) not in folded]
        if chosen.name == "accuracy" and unknown:
            found.append(RowProblem(source, "references", f"{unknown} are none of {list(item.labels)}", "name a label"))
    if chosen.name == "numeric" and (bad := [each for each in item.references if number_of(each) is None]):
        found.append(RowProblem(source, "references", f"{bad} state no number", "give a number"))
    return found


def _spaced(text: str) -> str:
    """Compatible forms made one, and single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _fold(text: str) -> str:
    return _spaced(text).casefold()


def _exact_match(item: Item) -> Scores:
    answer = normalize(item.answer)
    return {"exact_match": float(any(answer == normalize(reference) for reference in item.references))}


def _accuracy(item: Item) -> Scores:
    stated = label_of(item.answer, item.labels)
    right = stated is not None and _fold(stated) in map(_fold, item.references)
    return {"accuracy": float(right), "unparsed": float(stated is None)}


def _list_of(item: Item) -> Scores:
    return {"list_of": float(len(_stated(item.answer, item.labels)) == item.count)}


def _token_f1(item: Item) -> Scores:
    answer = normalize(item.answer).split()

    def f1(reference: list[str]) -> float:
        shared = (Counter(answer) & Counter(reference)).total()
        return 2 * shared / (len(answer) + len(reference)) if shared else float(answer == reference)

    return {"token_f1": max(f1(normalize(reference).split()) for reference in item.references)}


def _rouge_l(item: Item) -> Scores:
    from rapidfuzz.distance import LCSseq

    answer = _rouge_words(item.answer)
    references = [_rouge_words(reference) for reference in item.references]

    def f(reference: list[str]) -> float:
        return 2 * LCSseq.similarity(answer, reference) / (len(answer) + len(reference)) if reference else 0.0

    return {"rouge_l": max(map(f, references)), "no_words": float(not any(references))}


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@functools.cache
def _chrf_of_sacrebleu() -> CHRF:
    from sacrebleu import CHRF

    return CHRF()


@functools.cache
def _bleu_of_sacrebleu() -> BLEU:
    from sacrebleu import BLEU

    return BLEU(effective_order=True)


def _chrf(item: Item) -> Scores:
    chrf = _chrf_of_sacrebleu()
    # The counts that the score over all answers is computed of have no public name.
    (counts,) = chrf._extract_corpus_statistics([item.answer], [[reference] for reference in item.references])
    value = chrf._compute_score_from_stats(counts).score
    return {"chrf": _capped(value), **{f"count_{i}": float(count) for i, count in enumerate(counts)}}


def _chrf_of_all(scores: Sequence[Scores]) -> Scores:
    chrf = _chrf_of_sacrebleu()
    counts = [_count(scores, f"count_{i}") for i in range(3 * chrf.order)]
    found = chrf._compute_score_from_stats(counts)
    return {"chrf": _capped(found.score), "sentence_chrf": _sum(scores, "chrf") / len(scores), "n": len(scores)}


def _bleu(item: Item) -> Scores:
    found = _bleu_of_sacrebleu().sentence_score(item.answer, item.references)
    return {
        "bleu": _capped(found.score),
        **{f"matched_{i + 1}": float(found.counts[i]) for i in range(_ORDERS)},
        **{f"total_{i + 1}": float(found.totals[i]) for i in range(_ORDERS)},
        "answer_length": float(found.sys_len),
        "reference_length": float(found.ref_len),
    }


def _bleu_of_all(scores: Sequence[Scores]) -> Scores:
    found = _bleu_of_sacrebleu().compute_bleu(
        [_count(scores, f"matched_{i + 1}") for i in range(_ORDERS)],
        [_count(scores, f"total_{i + 1}") for i in range(_ORDERS)],
        _count(scores, "answer_length"),
        _count(scores, "reference_length"),
        smooth_method="exp",
    )
    return {"bleu": _capped(found.score), "sentence_bleu": _sum(scores, "bleu") / len(scores), "n": len(scores)}


def _capped(value: float) -> float:
    """What came out as 100.00000000000004 is 100."""
    return min(100.0, float(value))


def _numeric(item: Item) -> Scores:
    stated = number_of(item.answer)
    if stated is None:
        return {"unparsed": 1.0}
    error = min(abs(stated - (number_of(reference) or 0.0)) for reference in item.references)
    return {"numeric": error, "squared_error": error**2, "unparsed": 0.0}


def _numeric_of_all(scores: Sequence[Scores]) -> Scores:
    stated = [each for each in scores if not each["unparsed"]]
    keys = {"numeric": "numeric", "mean_squared_error": "squared_error"} if stated else {}
    means = {name: _sum(stated, key) / len(stated) for name, key in keys.items()}
    return {**means, "n": len(scores), "unparsed": len(scores) - len(stated)}


def _outcome(ran: Ran) -> Scores:
    others = {outcome.replace(" ", "_"): float(ran.outcome == outcome) for outcome in OUTCOMES if outcome != "passed"}
    return {"execute": float(ran.outcome == "passed"), **others}


def _sum(scores: Sequence[Scores], key: str) -> float:
    return math.fsum(each[key] for each in scores)


def _count(scores: Sequence[Scores], key: str) -> int:
    return int(_sum(scores, key))


def _mean_of(name: str) -> Callable[[Sequence[Scores]], Scores]:
    """What gives the mean of the scores called `name`, and counts the others, which are 0 or 1."""

    def of_all(scores: Sequence[Scores]) -> Scores:
        counts = {key: _count(scores, key) for key in scores[0] if key != name}
        return {name: _sum(scores, name) / len(scores), "n": len(scores), **counts}

    return of_all


def _metric(
    name: str,
    about: str,
    score: Callable[[Item], Scores] | None,
    *,
    needs: tuple[Need, ...] = ("references",),
    high: float | None = 1.0,
    aggregate: Callable[[Sequence[Scores]], Scores] | None = None,
) -> Metric:
    return Metric(name, about, needs, high, high is not None, score, aggregate or _mean_of(name))


METRICS: Mapping[str, Metric] = {
    each.name: each
    for each in (
        _metric(
            "exact_match", "the answer is a reference, as `normalize` has both (Rajpurkar et al., 2016)", _exact_match
        ),
        _metric(
            "accuracy",
            "the answer states the right label, as `label_of` finds it; `unparsed` counts those that state none",
            _accuracy,
            needs=("references", "labels"),
        ),
        _metric(
            "list_of",
            "the answer states as many of the labels as were asked for, each found as `label_of` does, in any order",
            _list_of,
            needs=("labels", "count"),
        ),
        _metric("token_f1", "F1 of the words, as `normalize` has both (Rajpurkar et al., 2016)", _token_f1),
        _metric(
            "rouge_l",
            "F1 of the longest common subsequence of words of a-z and 0-9, without stemming (Lin, 2004); `no_words` "
            "counts answers whose references have none such, which score 0",
            _rouge_l,
        ),
        _metric(
            "chrf",
            "chrF2 of sacrebleu over all answers (Popović, 2015); `sentence_chrf` is the mean of each answer's",
            _chrf,
            high=100.0,
            aggregate=_chrf_of_all,
        ),
        _metric(
            "bleu",
            "BLEU of sacrebleu over all answers (Papineni et al., 2002; Post, 2018), tokens as 13a; `sentence_bleu` is "
            "the mean of each answer's, of effective order",
            _bleu,
            high=100.0,
            aggregate=_bleu_of_all,
        ),
        _metric(
            "numeric",
            "the mean absolute error of the number that `number_of` finds, and `mean_squared_error`; `unparsed` counts "
            "the answers that state none, which neither has",
            _numeric,
            high=None,
            aggregate=_numeric_of_all,
        ),
        _metric("execute", "the program in the answer passes its tests", None, needs=("tests",)),
    )
}
"""Every metric, by name."""
