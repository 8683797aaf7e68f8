"""What a data set came to: counted row by row as it is prepared, and added up over all of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from instil.conversation import ROLES, Source
from instil.errors import RowProblem
from instil.prompt import EncodedRecord
from instil.prompt.exchange import Boundary

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\b\d[\d,.]*\b")
_PLACE = re.compile(r"(.*?):(\d+(?::\d+)?)")
_INDEX = re.compile(r"\[\d+\]")
_FIGURES = re.compile(r": [\d,]+ tokens, more than max_length [\d,]+")

NAMED = 5
"""Rows named beside each count."""

MOST_KINDS = 50
"""Kinds of one subject that are told apart."""

ROLE_NAMES = (*ROLES, "template")


@dataclass(slots=True)
class Tally:
    """How many rows something happened to, and the first of them."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, source: Source | str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.first) < NAMED:
            self.first.append(str(source))

    def merge(self, later: Tally) -> None:
        """Add the count of later rows."""
        self.rows += later.rows
        self.first += later.first[: NAMED - len(self.first)]

    def __str__(self) -> str:
        lines: dict[str, list[str]] = {}
        for source in self.first:
            found = _PLACE.fullmatch(source)
            file, line = found.groups() if found else (source, "")
            lines.setdefault(file, []).append(line)
        places = "; ".join(f"{file}:{', '.join(numbers)}" for file, numbers in lines.items())
        more = ", …" if self.rows > len(self.first) else ""
        return f"{self.rows:,} ({places}{more})" if places else f"{self.rows:,}"


@dataclass(slots=True)
class Summary:
    """Counts over a data set.

    Args:
        counts: `rows`, `exchanges`, `stopped` (exchanges that end in a stop token), `tokens` (of the exchanges one by
            one), `trained` (of them, the tokens of weight above 0).
        tallies: By subject (`status`, `cut because`, …, `kind`, `split`, `spelled`, `left_out`, `rewritten`,
            `duplicate`) and by what was found: the rows.
        role_tokens: Tokens of the exchanges one by one, by whose text they are; empty unless asked for.
        role_trained: Those of them that are trained.
    """

    counts: Counter[str] = field(default_factory=Counter)
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    role_tokens: Counter[str] = field(default_factory=Counter)
    role_trained: Counter[str] = field(default_factory=Counter)

    def tally(self, subject: str, found: str) -> Tally:
        """The count of one thing; of the things of a subject, all beyond the first are counted together."""
        known = self.tallies.setdefault(subject, {})
        return known.setdefault(found if found in known or len(known) < MOST_KINDS else "others", Tally())

    def reject(self, source: str, problems: Sequence[RowProblem]) -> None:
        """Count a row that could not be read."""
        for what in dict.fromkeys(_general(_without_index(each.field) + each.reason) for each in problems):
            self.tally("rejected because", what).add(source)

    def add(self, rows: Sequence[EncodedRecord], stop_ids: frozenset[int]) -> None:
        """Count some rows.

        Args:
            rows: As they were encoded.
            stop_ids: The tokens that end an answer.
        """
        for row in rows:
            self._add_row(row)
        exchanges = [exchange for row in rows for exchange in row.exchanges]
        weights = [part for each in exchanges for part in (each.prompt_weights, each.completion_weights)]
        answers = [each.completion_ids for each in exchanges if len(each.completion_ids)]
        self.counts.update(f"boundary {exchange.boundary}" for exchange in exchanges)
        self.counts["rows"] += len(rows)
        self.counts["exchanges"] += len(exchanges)
        self.counts["tokens"] += sum(map(len, weights))
        self.counts["trained"] += int(np.count_nonzero(np.concatenate(weights))) if weights else 0
        self.counts["stopped"] += sum(int(ids[-1]) in stop_ids for ids in answers)

    def _add_row(self, row: EncodedRecord) -> None:
        source = row.record.source
        self.tally("status", row.status).add(source)
        self.tally("kind", row.record.kind).add(source)
        if row.reason:
            self.tally(f"{row.status} because", _general(row.reason)).add(source)
        for token in row.spelled:
            self.tally("spelled", token).add(source)
        for what in row.notes:
            self.tally("left_out", what).add(source)
        if row.rewritten:
            self.tally("rewritten", "history").add(source)
        if any(exchange.boundary == "split" for exchange in row.exchanges):
            self.tally("split", "seam").add(source)
        if row.role_tokens:
            self.role_tokens.update(row.role_tokens)
            self.role_trained.update(row.role_trained)

    def merge(self, later: Summary) -> None:
        """Add the counts of later rows."""
        self.counts.update(later.counts)
        self.role_tokens.update(later.role_tokens)
        self.role_trained.update(later.role_trained)
        for subject, found in later.tallies.items():
            for name, tally in found.items():
                self.tally(subject, name).merge(tally)

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values; `from_json` takes them back."""
        tallies = {
            subject: {name: {"rows": tally.rows, "first": tally.first} for name, tally in found.items()}
            for subject, found in self.tallies.items()
        }
        return {
            "counts": dict(self.counts),
            "tallies": tallies,
            "role_tokens": dict(self.role_tokens),
            "role_trained": dict(self.role_trained),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`."""
        tallies = {
            subject: {name: Tally(**tally) for name, tally in found.items()}
            for subject, found in value["tallies"].items()
        }
        roles = Counter(value["role_tokens"]), Counter(value["role_trained"])
        return cls(Counter(value["counts"]), tallies, *roles)


def describe(summary: Summary, report: Mapping[str, Any], lengths: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """Everything counted, as plain JSON values.

    Args:
        summary: The counts of the rows that were encoded.
        report: What was met while reading.
        lengths: (exchanges,) the tokens of each exchange that is trained.
    """
    counts, tallies = summary.counts, summary.tallies
    rejected = report["rejected"] + _rows(tallies, "status", "rejected")
    rows = {"read": report["rows"], **{status: _rows(tallies, "status", status) for status in _STATUSES}}
    described = {
        "rows": {**rows, "rejected": rejected},
        "reasons": [
            {"status": status, **each} for status in _REASONED for each in _listed(tallies, f"{status} because")
        ],
        "shapes": report["shapes"],
        "kinds": {name: tally.rows for name, tally in tallies.get("kind", {}).items()},
        "files": report["files"],
        "unused_columns": report["unused_columns"],
        "exchanges": counts["exchanges"],
        "ending_in_stop_token": counts["stopped"],
        "boundaries": {name: counts[f"boundary {name}"] for name in get_args(Boundary) if counts[f"boundary {name}"]},
        "tokens": _share(counts["tokens"], counts["trained"]),
        "roles": {
            name: _share(summary.role_tokens[name], summary.role_trained[name])
            for name in ROLE_NAMES
            if summary.role_tokens[name]
        },
        "lengths": _lengths(lengths),
        "history_rewritten": _listed(tallies, "rewritten"),
        "duplicates": _listed(tallies, "duplicate"),
        "control_tokens_in_text": _listed(tallies, "spelled"),
        "left_out_by_template": _listed(tallies, "left_out"),
    }
    return {**described, "warnings": _warnings(summary, report)}


_STATUSES = ("kept", "cut", "dropped")
_REASONED = ("cut", "dropped", "rejected")


def _rows(tallies: Mapping[str, Mapping[str, Tally]], subject: str, found: str) -> int:
    tally = tallies.get(subject, {}).get(found)
    return tally.rows if tally else 0


def _listed(tallies: Mapping[str, Mapping[str, Tally]], subject: str) -> list[dict[str, Any]]:
    found = sorted(tallies.get(subject, {}).items(), key=lambda item: -item[1].rows)
    return [{"what": name, "rows": tally.rows, "first": tally.first} for name, tally in found]


def _share(tokens: int, trained: int) -> dict[str, Any]:
    return {"total": tokens, "trained": trained, "share": trained / tokens if tokens else 0.0}


def _lengths(lengths: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """Quantiles and a histogram of lengths in tokens, in at most ten bins of equal, round width."""
    if not len(lengths):
        return {"histogram": []}
    rough = max(1, -(-int(lengths.max() + 1) // 10))
    step = 10 ** (len(str(rough)) - 1)
    width = next(width for width in (step, 2 * step, 5 * step, 10 * step) if width >= rough)
    bins = enumerate(np.bincount(lengths // width).tolist())
    low, median, high, top = np.quantile(lengths, (0, 0.5, 0.95, 1), method="nearest").tolist()
    return {
        "min": low,
        "median": median,
        "mean": float(lengths.mean()),
        "p95": high,
        "max": top,
        "histogram": [{"from": n * width, "to": (n + 1) * width - 1, "exchanges": count} for n, count in bins],
    }


def _warnings(summary: Summary, report: Mapping[str, Any]) -> list[str]:
    """What a person should look at before training, each with the rows it was met in."""
    tallies, counts = summary.tallies, summary.counts
    said = [f"{count:,} rows: {note}" for note, count in report["notes"].items()]
    for status in _REASONED:
        found = tallies.get(f"{status} because", {}).items()
        said += [f"rows {status}: {what.removeprefix(f'{status} ').strip('()')}: {tally}" for what, tally in found]
    for what, tally in tallies.get("left_out", {}).items():
        said.append(f"the template leaves out or changes the {what} of rows: {tally}")
    for what, tally in tallies.get("spelled", {}).items():
        said.append(f"messages spell the control token {what}, encoded as plain text: {tally}")
    for subject, says in _SAID.items():
        said += [f"{says}: {tally}" for tally in tallies.get(subject, {}).values()]
    if split := tallies.get("split", {}).get("seam"):
        said.append(f"a token would straddle the seam, so the completion was encoded by itself: {split}")
    if prompts := tallies.get("kind", {}).get("prompt"):
        said.append(f"rows without an answer are for evaluation and train nothing: {prompts}")
    answered = counts["exchanges"] - counts["boundary none"]
    if counts["stopped"] < answered:
        said.append(f"{answered - counts['stopped']:,} of {answered:,} exchanges do not end in a stop token")
    return said


_SAID = {
    "rewritten": "the template rewrites history, so turns of one row do not share one path",
    "duplicate": "rows with the same tokens as an earlier one",
}


def _general(reason: str) -> str:
    """A reason without what is particular to one row, so that rows of one kind are counted together."""
    parts = (_QUOTED.sub("…", _FIGURES.sub(" (longer than max_length)", part)) for part in reason.split("; "))
    return "; ".join(dict.fromkeys(parts))


def _without_index(field: str) -> str:
    """A field's name for all rows: `messages[].role` for `messages[2].role`."""
    return _INDEX.sub("[]", field) + ": " if field else ""
