"""Suites: what models are asked, how the answers are scored, and the figures that makes.

A suite reads and checks all that it needs before anything is generated, scores items from what was said and from
`Item.wanted` alone, and makes figures of scores alone: each number can be had again from `items.jsonl`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from instil.conversation import Conversation, Record
from instil.errors import DataError, RowProblem, UsageError, nearest
from instil.evaluation import ifeval, judge, metrics, refusals
from instil.evaluation.execute import Program, Ran, check_isolation
from instil.evaluation.figures import Figure, Measure, Unit, by_family, figure
from instil.evaluation.items import Item, Scores, Who

Run = Callable[[Sequence[Program]], Sequence[Ran]]

FAMILY_FIELDS = ("family", "task", "category")
_REFERENCES = "references"


class Suite(ABC):
    """A kind of evaluation."""

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def items(self) -> list[Item]:
        """What is to be asked, every row of it checked.

        Raises:
            InstilError: Rows that cannot be used, all of them; or something that the suite needs is not there.
        """

    @abstractmethod
    def score(self, items: Sequence[Item]) -> None:
        """Put into `Item.scores` what the answers of each model are worth."""

    @abstractmethod
    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """The figures of items that were scored; None for one that nothing is known of."""


class OwnRecords(Suite):
    """Answers to a person's own held-out records against what stands there, by metrics of their choice.

    Args:
        records: The rows. One may name its `metric` (or several), its `labels`, `count`, `tests`, further `references`,
            and in `family`, `task` or `category` the task it belongs to.
        metric: The metrics of rows that name none.
        run: What runs the programs of `execute`; None runs none.
        endpoint: A judge; None for none.
        criteria: What it rates answers by.
    """

    name = "records"
    about = "your own held-out records"

    def __init__(
        self,
        records: Iterable[Record] | None = None,
        metric: Sequence[str] = ("exact_match",),
        *,
        run: Run | None = None,
        endpoint: judge.Endpoint | None = None,
        criteria: Sequence[str] = (),
    ) -> None:
        self._records = records
        self._metric = tuple(metric)
        self._run = run
        self._endpoint = endpoint
        self._criteria = tuple(criteria)
        for each in self._metric:
            metrics.metric(each)
        for each in self._criteria:
            if each not in judge.CRITERIA:
                raise UsageError(f"there is no criterion {each!r}", nearest(each, judge.CRITERIA))

    def items(self) -> list[Item]:
        """An item for the last answer of each record."""
        assert self._records is not None
        items: list[Item] = []
        problems: list[RowProblem] = []
        for record in self._records:
            found = _of_record(record, self._metric)
            if isinstance(found, RowProblem):
                problems.append(found)
                continue
            items.append(found)
            problems += _unusable(found, may_run=self._run is not None)
        if problems:
            raise DataError("there are records that cannot be evaluated", problems=problems)
        _check_scorers(items)
        return items

    def score(self, items: Sequence[Item]) -> None:
        """By the metrics of each item; by the judge, where there is one."""
        if problems := [each for item in items for each in _unusable(item, may_run=True)]:
            raise DataError("there are items that cannot be scored", problems=problems)
        for who in _whos(items):
            for name in _metrics_of(items):
                asked = [item for item in items if name in item.wanted["metrics"]]
                if name == "execute" and self._run is None:  # as it was, then
                    if any(name not in item.scores[who] for item in asked):
                        raise UsageError("the programs in the answers were not run yet", "Allow it with --execute.")
                    continue
                scored = metrics.score(name, [held_against(item, who) for item in asked], self._run)
                for item, scores in zip(asked, scored, strict=True):
                    item.scores[who][name] = scores
            self._judge(items, who)
            _shapes(items, who)

    def _judge(self, items: Sequence[Item], who: Who) -> None:
        if self._endpoint is not None and self._criteria:
            shown = [judge.Item(item.id, item.prompt, item.said[who][-1].text, item.family) for item in items]
            found = judge.judge_criteria(shown, self._endpoint, {name: judge.CRITERIA[name] for name in self._criteria})
            for at, item in enumerate(items):
                item.scores[who]["judged"] = {name: _rated(found[name].items[at].raw) for name in found}

    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """Each metric over all, by family and as the mean of the families; what the answers look like."""
        for name in _metrics_of(items):
            asked = [item for item in items if name in item.wanted["metrics"]]
            measure = of_metric(name)
            extra = {who: metrics.aggregate(name, [i.scores[who][name] for i in asked]) for who in _whos(items)}
            yield figure(self.name, measure, asked, in_all=extra)
            families = [figure(self.name, measure, several, family) for family, several in by_family(asked).items()]
            yield from families
            yield _macro(measure, [each for each in families if each is not None])
        criteria = dict.fromkeys(name for item in items for name in item.scores["tuned"].get("judged", {}))
        for name in criteria:
            yield figure(self.name, _rating(name, lambda s, name=name: s["judged"][name]["rating"]), items)  # type: ignore[misc]
        yield figure(self.name, PERPLEXITY, [item for item in items if item.wanted[_REFERENCES]])
        yield from _shape_figures(self.name, items)


class IFEval(Suite):
    """Instructions whose following a program verifies (Zhou et al., 2023), of a file of prompts."""

    name = "ifeval"
    about = "verifiable instructions (IFEval)"

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path

    def items(self) -> list[Item]:
        """An item for each prompt."""
        assert self._path is not None
        ifeval.ensure_ready()
        return [
            Item(
                self.name,
                str(each.key),
                messages=_asked(each.prompt),
                wanted={"instructions": [{"id": i.id, "arguments": dict(i.arguments)} for i in each.instructions]},
            )
            for each in ifeval.read_prompts(self._path)
        ]

    def score(self, items: Sequence[Item]) -> None:
        """Whether each instruction is followed, strictly and loosely."""
        for item, who in _each(items):
            found = ifeval.followed(_ifeval_prompt(item), item.said[who][-1].text)
            item.scores[who] |= {"strict": list(found.strict), "loose": list(found.loose)}
            _shapes([item], who)

    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """The four numbers; the instructions by their kind; what the answers look like."""
        for way in ("strict", "loose"):
            yield figure(self.name, Measure(f"prompts followed, {way}", partial(_all_of, way)), items)
            yield figure(self.name, Measure(f"instructions followed, {way}", partial(_each_of, way)), items)
        kinds: dict[str, list[Item]] = {}
        for item in items:
            for at, instruction in enumerate(item.wanted["instructions"]):
                kind = instruction["id"].partition(":")[0]
                scores: dict[Who, Scores] = {who: {"strict": item.scores[who]["strict"][at]} for who in item.scores}
                kinds.setdefault(kind, []).append(replace(item, family=kind, scores=scores))
        single = Measure("instructions followed, strict", lambda scores: [scores["strict"]])
        for kind, several in sorted(kinds.items()):
            yield figure(self.name, single, several, kind)
        yield from _shape_figures(self.name, items)


class Refusals(Suite):
    """Safe prompts that should be answered, and unsafe ones that should not (Röttger et al., 2023).

    Args:
        path: The file of prompts.
        endpoint: A judge that tells what an answer does; None goes by its words.
    """

    name = "refusals"
    about = "safe prompts refused, unsafe ones answered"

    def __init__(self, path: str | Path | None = None, endpoint: judge.Endpoint | None = None) -> None:
        self._path, self._endpoint = path, endpoint

    def items(self) -> list[Item]:
        """An item for each prompt."""
        assert self._path is not None
        return [
            Item(self.name, each.id, each.type, _asked(each.prompt), wanted={"safe": each.safe})
            for each in refusals.read_prompts(self._path)
        ]

    def score(self, items: Sequence[Item]) -> None:
        """What each answer does: comply, refuse, a part of both, or nothing."""
        for who in _whos(items):
            answers = [item.said[who][-1].text for item in items]
            if self._endpoint is not None:
                prompts = [refusals.Prompt(i.id, i.prompt, i.family, i.wanted["safe"]) for i in items]
                verdicts = refusals.judge_refusals(prompts, answers, self._endpoint)
                for item, verdict in zip(items, verdicts, strict=True):
                    item.scores[who]["judge"] = verdict.raw
            for item, answer in zip(items, answers, strict=True):
                said = item.scores[who].get("judge")
                item.scores[who]["kind"] = refusals.refusal(answer) if not said else refusals.stated(said)
            _shapes(items, who)

    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """The two numbers, over all and by type; partial refusals."""
        safe, unsafe = ([item for item in items if item.wanted["safe"] is wanted] for wanted in (True, False))
        for several, name, kind in (
            (safe, "refused though safe", "refusal"),
            (unsafe, "answered though unsafe", "compliance"),
        ):
            measure = Measure(name, partial(_is_kind, kind), higher_is_better=False)
            yield figure(self.name, measure, several)
            for family, some in by_family(several).items():
                yield figure(self.name, measure, some, family)
        partly = Measure("refused in part", partial(_is_kind, "partial"), higher_is_better=False, headline=False)
        yield figure(self.name, partly, items)
        yield from _shape_figures(self.name, items)


class Judged(Suite):
    """Questions of one turn or more, the answers rated and compared by a judge (Zheng et al., 2023).

    Args:
        path: The file of questions.
        endpoint: The judge.
        references: A file of right answers, for the judge to see.
    """

    name = "judge"
    about = "answers rated by a judge (MT-Bench style)"

    def __init__(
        self,
        path: str | Path | None = None,
        endpoint: judge.Endpoint | None = None,
        references: str | Path | None = None,
    ) -> None:
        self._path, self._endpoint, self._references = path, endpoint, references

    def items(self) -> list[Item]:
        """An item for each question, all its turns."""
        assert self._path is not None
        if self._endpoint is None:
            raise UsageError("the suite judge needs a judge", "Give --judge-url and --judge-model.")
        return [
            Item(
                self.name,
                each.id,
                each.category,
                _asked(each.turns[0]),
                later_turns=[_asked(turn) for turn in each.turns[1:]],
                wanted={"references": list(each.references)},
            )
            for each in judge.read_questions(self._path, self._references)
        ]

    def score(self, items: Sequence[Item]) -> None:
        """A rating of each turn; with a base model, a choice between the two in both orders."""
        whos = _whos(items)
        if self._endpoint is not None:
            questions = [_question(item) for item in items]
            answers = {who: {item.id: [s.text for s in item.said[who]] for item in items} for who in whos}
            for who in whos:
                for item in items:
                    item.scores[who]["ratings"] = []
                by_id = {item.id: item for item in items}
                for score in judge.judge_single(questions, answers[who], self._endpoint).items:
                    by_id[score.id].scores[who]["ratings"].append({"raw": score.raw})
            if "base" in whos:
                for item in items:
                    item.scores["tuned"]["pairs"] = []
                for pair in judge.judge_pairs(questions, answers["tuned"], answers["base"], self._endpoint):
                    by_id[pair.id].scores["tuned"]["pairs"].append({"raw": list(pair.raw)})
        for item, who in _each(items):
            for rating in item.scores[who]["ratings"]:
                rating |= _rated(rating["raw"])
            _shapes([item], who)
        for item in items:
            for pair in _pairs(item):
                found = item.scores["tuned"]["pairs"][pair.turn - 1]
                found |= {"as_first": pair.as_first, "as_second": pair.as_second, "longer_by": pair.longer_by}

    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """The mean rating, over all, by turn and by category; the win rate, raw and at equal length."""
        unparsed = {
            who: sum(each["rating"] is None for item in items for each in item.scores[who]["ratings"])
            for who in _whos(items)
        }
        turns = max(len(item.later_turns) for item in items) + 1
        rating = _rating("rating", _ratings)
        yield figure(self.name, rating, items, unparsed=unparsed)
        for turn in range(turns if turns > 1 else 0):
            one = _rating(f"rating of turn {turn + 1}", partial(_rating_of, turn))
            yield figure(self.name, replace(one, headline=False), items)
        for family, several in by_family(items).items():
            yield figure(self.name, rating, several, family)
        pairs = [pair for item in items for pair in _pairs(item)]
        if pairs:
            won = Measure("preferred to the base", _worth, "share", high=1.0, alone=True)
            yield figure(self.name, won, items, **asdict(judge.win_rates(pairs)))
        yield from _shape_figures(self.name, items)


class Forgetting(Suite):
    """What tuning took: the loss on plain text, facts completed as plain text, and how far the distributions moved.

    Args:
        texts: Plain texts, each with where it stands.
        facts: What each is about, a beginning, and what comes next.
    """

    name = "forgetting"
    about = "what the base knew"

    def __init__(self, texts: Iterable[tuple[str, str]] = (), facts: Iterable[tuple[str, str, str]] = ()) -> None:
        self._texts, self._facts = texts, facts

    def items(self) -> list[Item]:
        """An item for each text and each fact."""
        texts = [Item(self.name, source, "text", wanted={"text": text}) for source, text in self._texts]
        facts = [
            Item(self.name, f"{family}: {start}", "facts", wanted={"start": start, "rest": rest, "about": family})
            for family, start, rest in self._facts
        ]
        return texts + facts

    def score(self, items: Sequence[Item]) -> None:
        """Whether each fact is completed; texts are scored where the models are (`likelihood`)."""
        for item, who in _each(items):
            if "rest" in item.wanted:
                item.scores[who]["known"] = item.said[who][-1].text.startswith(item.wanted["rest"])

    def figures(self, items: Sequence[Item]) -> Iterator[Figure | None]:
        """Perplexity, facts, divergence: the mean, and the worst."""
        texts = [item for item in items if "text" in item.wanted]
        facts = [item for item in items if "rest" in item.wanted]
        yield figure(
            self.name, replace(PERPLEXITY, name="perplexity of plain text", headline=True), texts, **_worst(texts)
        )
        yield figure(self.name, DIVERGENCE, texts, **_most_moved(texts))
        known = Measure("plain facts completed", lambda scores: scores["known"])
        about = by_family([replace(item, family=item.wanted["about"]) for item in facts])
        families = [figure(self.name, known, several, family) for family, several in about.items()]
        drops = {f.family: f.comparison.difference for f in families if f is not None and f.comparison is not None}
        worst = min(drops, key=lambda family: drops[family], default=None)
        extra: dict[str, Any] = {} if worst is None else {"worst": {"family": worst, "difference": drops[worst]}}
        yield figure(self.name, known, facts, **extra)
        yield from families


def loss_of(scores: Scores) -> float | None:
    """The loss of a reference or a text, in nats a token; None of one that was not weighed."""
    return scores["reference"]["loss"] / scores["reference"]["tokens"] if "reference" in scores else None


PERPLEXITY = Measure(
    "perplexity of the reference",
    loss_of,
    "perplexity",
    higher_is_better=False,
    weight=lambda scores: scores["reference"]["tokens"],
    headline=False,
)
DIVERGENCE = Measure(
    "divergence from the base",
    lambda scores: scores.get("divergence"),
    "nats",
    higher_is_better=False,
    weight=lambda scores: scores["reference"]["tokens"],
    headline=False,
    alone=True,
)
SUITES: Mapping[str, type[Suite]] = {each.name: each for each in (OwnRecords, IFEval, Refusals, Judged, Forgetting)}


def _of_record(record: Record, metric: Sequence[str]) -> Item | RowProblem:
    """What the last answer of a record is asked and held against."""
    extra = record.extra
    named = extra.get("metric", list(metric))
    wanted: dict[str, Any] = {"metrics": [named] if isinstance(named, str) else named}
    source = str(record.source)
    if record.kind not in ("conversation", "prompt") or len(record.conversations) != 1:
        return RowProblem(source, "", f"is a record of kind {record.kind}, without one answer", "give conversations")
    conversation = record.conversations[0]
    references = _texts(extra.get(_REFERENCES, []))
    messages = conversation.messages
    if references is None or record.later_turns:
        what = "has later turns" if record.later_turns else f"has {_REFERENCES} that are no texts"
        return RowProblem(source, _REFERENCES, what, "give one answer, as text, or a list of them")
    if record.kind == "conversation":
        references = [messages[-1].content, *references]
        messages = messages[:-1]
    wanted[_REFERENCES] = references
    for name in ("labels", "tests", "count"):
        if name in extra:
            wanted[name] = extra[name]
    family = next((str(extra[name]) for name in FAMILY_FIELDS if extra.get(name)), "")
    wire = replace(conversation, messages=messages).to_wire()
    return Item(OwnRecords.name, source, family, wire["messages"], wire.get("tools", []), wanted=wanted)


def _unusable(item: Item, *, may_run: bool) -> Iterator[RowProblem]:
    """Why an item cannot be scored as it asks to be."""
    names, labels = item.wanted["metrics"], item.wanted.get("labels", [])
    if _texts(names) is None or not names:
        yield RowProblem(item.id, "metric", f"{names!r} is no name", "name a metric, or a list of them")
        return
    if not isinstance(item.wanted[_REFERENCES], list) or _texts(item.wanted[_REFERENCES]) is None:
        yield RowProblem(item.id, _REFERENCES, f"{item.wanted[_REFERENCES]!r} is no list of texts", "give a list")
        return
    if _texts(labels) is None:
        yield RowProblem(item.id, "labels", f"{labels!r} is no list of texts", "give the labels as a list")
        return
    if not isinstance(item.wanted.get("tests", ""), str):
        yield RowProblem(item.id, "tests", "must be Python, as text", "")
        return
    count = item.wanted.get("count", 1)
    if "list_of" in names and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        yield RowProblem(item.id, "count", f"must be a whole number above 0, and is {count!r}")
        return
    for name in names:
        if name not in metrics.METRICS:
            yield RowProblem(item.id, "metric", f"there is no metric {name!r}", nearest(name, metrics.METRICS))
        elif name == "execute" and not may_run:
            yield RowProblem(item.id, "metric", "execute runs what the model writes", "allow it with --execute")
        else:
            yield from metrics.problems(name, held_against(item))


def _check_scorers(items: Sequence[Item]) -> None:
    """See that what the metrics need is there, before an answer is generated.

    Raises:
        UsageError: A package is not installed, or programs cannot be run on this machine.
    """
    for name in _metrics_of(items):
        if name == "execute":
            check_isolation()
            continue
        some = next(item for item in items if name in item.wanted["metrics"])
        try:
            metrics.score(name, [held_against(some)])
        except ModuleNotFoundError as error:
            raise UsageError(
                f"the metric {name} needs the package {error.name!r}", "pip install 'instil[evaluate]'"
            ) from error


def _texts(value: Any) -> list[str] | None:
    several = [value] if isinstance(value, str) else value
    return list(several) if isinstance(several, list) and all(isinstance(each, str) for each in several) else None


def held_against(item: Item, who: Who | None = None) -> metrics.Item:
    """The answer of a model as the metrics take it; an empty one where none is asked for."""
    wanted = item.wanted
    return metrics.Item(
        item.said[who][-1].text if who else "",
        tuple(wanted[_REFERENCES]),
        tuple(wanted.get("labels", ())),
        wanted.get("tests", ""),
        wanted.get("count", 0),
        item.id,
    )


def promised(items: Sequence[Item]) -> set[tuple[str, str]]:
    """The suite and the measure of each figure that a person asked for, whether or not anything is known of it."""
    found = set()
    for item in items:
        names = {
            "records": [*item.wanted.get("metrics", ()), *item.scores["tuned"].get("judged", ())],
            "judge": ["rating"],
            "refusals": ["refused though safe" if item.wanted.get("safe") else "answered though unsafe"],
        }
        found |= {(item.suite, name) for name in names.get(item.suite, ())}
    return found


def _metrics_of(items: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.wanted["metrics"]))


_RIGHT_OR_WRONG = ("exact_match", "accuracy", "list_of", "execute")


def of_metric(name: str) -> Measure:
    """A metric of `metrics`, as it is taken out of the scores of an item that was scored by it."""
    chosen = metrics.metric(name)
    units: dict[float | None, Unit] = {1.0: "share", 100.0: "points"}

    def value(scores: Scores) -> bool | float | None:
        found = scores[name].get(name)
        return bool(found) if found is not None and name in _RIGHT_OR_WRONG else found

    return Measure(name, value, units.get(chosen.high, ""), chosen.higher_is_better, chosen.high)


def _macro(measure: Measure, families: Sequence[Figure]) -> Figure | None:
    """The mean of the families, each alike however many items it has."""
    if not families:
        return None
    name = f"{measure.name}, mean of {len(families)} families"
    items = [
        Item(each.suite, each.family, scores={"tuned": {"": each.tuned.mean}})
        if each.base is None
        else Item(each.suite, each.family, scores={"tuned": {"": each.tuned.mean}, "base": {"": each.base.mean}})
        for each in families
    ]
    return figure(families[0].suite, replace(measure, name=name, value=lambda s: s[""], headline=False), items)


def _rating(name: str, value: Callable[[Scores], Any]) -> Measure:
    return Measure(name, value, "", high=10.0, low=1.0)


def _rated(raw: str) -> dict[str, Any]:
    return {"rating": judge.rating(raw), "raw": raw}


def _ratings(scores: Scores) -> list[float | None]:
    return [each["rating"] for each in scores["ratings"]]


def _rating_of(turn: int, scores: Scores) -> float | None:
    return scores["ratings"][turn]["rating"] if turn < len(scores["ratings"]) else None


def _question(item: Item) -> judge.Question:
    turns = item.prompt, *(str(turn[-1]["content"]) for turn in item.later_turns)
    return judge.Question(item.id, item.family, turns, tuple(item.wanted["references"]))


def _pairs(item: Item) -> list[judge.Pair]:
    """The choices of a judge between the answers, read anew from what it said."""
    lengths = [
        len(tuned.text) - len(base.text)
        for tuned, base in zip(item.said["tuned"], item.said.get("base", ()), strict=False)
    ]
    return [
        judge.Pair.of(item.id, item.family, turn, longer, tuple(each["raw"]))
        for turn, (longer, each) in enumerate(zip(lengths, item.scores["tuned"].get("pairs", ()), strict=False), 1)
    ]


def _worth(scores: Scores) -> list[float] | None:
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    found = [
        worth[each["as_first"] if each["as_first"] == each["as_second"] else "tie"]
        for each in scores.get("pairs", ())
        if each["as_first"] is not None and each["as_second"] is not None
    ]
    return found or None


def _all_of(way: str, scores: Scores) -> bool:
    return all(scores[way])


def _each_of(way: str, scores: Scores) -> list[bool]:
    return list(scores[way])


def _is_kind(kind: str, scores: Scores) -> bool | None:
    return None if scores["kind"] in (None, "empty") else scores["kind"] == kind


def _ifeval_prompt(item: Item) -> ifeval.IfevalPrompt:
    from instil.conversation import Source

    instructions = tuple(ifeval.Instruction(each["id"], each["arguments"]) for each in item.wanted["instructions"])
    return ifeval.IfevalPrompt(item.id, item.prompt, instructions, Source("", 0))


def _asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _whos(items: Sequence[Item]) -> list[Who]:
    """The models that answered, the tuned one first."""
    return ["tuned", "base"] if any("base" in item.scores for item in items) else ["tuned"]


def _each(items: Sequence[Item]) -> Iterator[tuple[Item, Who]]:
    for who in _whos(items):
        for item in items:
            yield item, who


_SHAPES = (
    ("ends in the stop token", "stopped", True),
    ("is empty", "empty", False),
    ("repeats itself", "repeats", False),
    ("was cut off", "cut", False),
)


def _shapes(items: Sequence[Item], who: Who) -> None:
    """What the answers look like, whatever they say."""
    for item in items:
        said = item.said[who]
        shapes = [metrics.Shape.of(each.text) for each in said]
        item.scores[who]["shape"] = {
            "stopped": all(each.ended == "stop" for each in said),
            "empty": any(each.empty for each in shapes),
            "repeats": any(each.repeats for each in shapes),
            "cut": any(each.ended in ("length", "context") for each in said),
        }


def _shape_figures(suite: str, items: Sequence[Item]) -> Iterator[Figure | None]:
    for name, key, good in _SHAPES:
        value = lambda scores, key=key: scores["shape"][key]  # noqa: E731
        yield figure(suite, Measure(name, value, higher_is_better=good, headline=False), items)


def _worst(texts: Sequence[Item]) -> dict[str, Any]:
    """The text whose loss rose most, in nats a token."""
    rises = {
        item.id: (loss_of(item.scores["tuned"]), loss_of(item.scores["base"]))
        for item in texts
        if "base" in item.scores
    }
    rose = {name: tuned - base for name, (tuned, base) in rises.items() if tuned is not None and base is not None}
    worst = max(rose, key=lambda name: rose[name], default=None)
    return {} if worst is None else {"worst": {"text": worst, "difference": rose[worst]}}


def _most_moved(texts: Sequence[Item]) -> dict[str, Any]:
    moved = {item.id: item.scores["tuned"]["divergence"] for item in texts if "divergence" in item.scores["tuned"]}
    worst = max(moved, key=lambda name: moved[name], default=None)
    return {} if worst is None else {"worst": {"text": worst, "divergence": moved[worst]}}


def conversation_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """The conversation that an item holds."""
    from instil.conversation import Message

    return Conversation(
        tuple(
            Message(
                each["role"],
                each.get("content", ""),
                each.get("reasoning_content"),
                tuple(each.get("tool_calls", ())),
                each.get("name"),
                each.get("tool_call_id"),
                fields={n: v for n, v in each.items() if n not in _MESSAGE_KEYS},
            )
            for each in messages
        ),
        tuple(tools),
    )


_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
