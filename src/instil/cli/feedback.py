"""`instil feedback`: what people made of the answers that a server recorded, and the data that this gives."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from instil.cli.generating import check_new, inert, save
from instil.errors import UsageError

if TYPE_CHECKING:
    from instil.serving.feedback import Judgement, Store

Record = Annotated[str, Parameter(name="--record")]
Since = Annotated[str | None, Parameter(name="--since")]
AsJson = Annotated[bool, Parameter(name="--json", negative=())]
All = Annotated[bool, Parameter(name="--all", negative=())]
Flag = Annotated[bool, Parameter(negative=())]

_SHOWN = 60  # characters of a text in a list

feedback = App(name="feedback")


@feedback.command
def export(
    *,
    record: Record,
    output: Path,
    kind: Literal["supervised", "preference", "labelled"],
    model: str | None = None,
    since: Since = None,
    pairs_from_ratings: Flag = False,
) -> None:
    """Write rows to train on: good answers, pairs of a better and a worse one, or answers labelled good or bad.

    Args:
        record: Where they were recorded: a folder, or the URL of a database.
        output: The new file of JSON lines.
        kind: supervised: what was rated up, corrected or written by a person. preference: the better of two answers,
            corrections and what they correct. labelled: what was rated, for kto.
        model: Only what was made of this model's answers.
        since: Only what was made of answers from this day on (UTC), as 2026-05-31.
        pairs_from_ratings: Of two answers to one conversation the one that was rated up is better than one that was
            rated down (preference).
    """
    check_new(output)
    if pairs_from_ratings and kind != "preference":
        raise UsageError(f"--pairs-from-ratings: makes no rows of kind {kind}", "Add --kind preference.")
    begin = _day(since)
    with _open(record) as store:
        from instil.serving.feedback.export import export as exported

        found = exported(store, kind, model=model, since=begin, pairs_from_ratings=pairs_from_ratings)
    left_out = "".join(
        f"instil: left out: {count:,} {reason}\n" for reason, count in found.left_out.most_common() if count
    )
    if not found.rows:
        sys.stderr.write(left_out)
        raise UsageError(
            f"{store.name}: nothing in it makes a row of kind {kind}", "See what is: instil feedback stats"
        )
    save(output, (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    used = ", ".join(f"{count:,} {why.replace('-', ' ')}" for why, count in found.used.most_common())
    sys.stderr.write(f"{left_out}instil: wrote {output}: {_count(len(found.rows), 'row')} ({used})\n")


@feedback.command(name="list")
def list_interactions(
    *,
    record: Record,
    model: str | None = None,
    since: Since = None,
    only: Literal["up", "down", "corrected", "compared", "written"] | None = None,
    last: int = 20,
    as_json: AsJson = False,
) -> None:
    """List what was recorded, and what was made of it, the newest at the end.

    Args:
        record: Where it was recorded: a folder, or the URL of a database.
        model: Only interactions with this model.
        since: Only what is from this day on (UTC), as 2026-05-31.
        only: Only what was rated up or down, corrected or compared, or dialogues that a person wrote.
        last: How many at most; 0 for all.
        as_json: Print JSON objects, a line each, whole.
    """
    if last < 0:
        raise UsageError(f"--last {last}: must be 0 or more", "0 lists all.")
    begin = _day(since)
    with _open(record) as store:
        entries = _entries(store, model, begin, judged=only is not None, last=last or None)
    entries = [each for each in entries if only is None or only in each["judged"]][-last:]
    if as_json:
        for each in entries:
            sys.stdout.write(json.dumps(each, ensure_ascii=False) + "\n")
        return
    whole = Column("Id", overflow="fold")  # in a narrow terminal too: it is what `delete` takes
    table = Table(
        "Time", whole, "Model", "Asked", "Answered", "Judged", box=SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for each in entries:
        asked = next((turn["content"] for turn in reversed(each["messages"]) if turn["role"] == "user"), "")
        said = [answer["content"] for answer in each["answers"]]
        table.add_row(
            each["time"][:16].replace("T", " "),
            each["id"],
            Text(each["model"] or ""),
            _shown(asked),
            _shown(said[0] if said else "") + Text(f" (and {len(said) - 1} more)" if len(said) > 1 else ""),
            ", ".join(name if count == 1 else f"{name} {count}" for name, count in each["judged"].items()),
        )
    _console().print(table if entries else f"{store.name}: nothing of that kind is recorded there")


@feedback.command
def delete(
    *ids: str, record: Record, older_than: int | None = None, everything: All = False, yes: Flag = False
) -> None:
    """Delete interactions with all that was made of them, or single judgements, for good.

    Args:
        ids: Those of interactions (chatcmpl-…) or of judgements (feedback-…).
        record: Where they were recorded: a folder, or the URL of a database.
        older_than: Instead, all interactions and dialogues older than so many days.
        everything: Instead, all there is.
        yes: Do not ask first.
    """
    if sum((bool(ids), older_than is not None, everything)) != 1:
        raise UsageError("what is to be deleted is not said, or said twice", "Give ids, --older-than DAYS, or --all.")
    if older_than is not None and older_than < 0:
        raise UsageError(f"--older-than {older_than}: must be 0 or more", "Give a number of days.")
    what = f"what is older than {older_than} days" if older_than is not None else ", ".join(ids) or "everything"
    with _open(record) as store:
        if not yes:
            _ask(f"Delete {what} from {store.name} for good?")
        if ids:
            deleted = store.delete(ids)
        else:
            from instil.serving.feedback.store import days_ago

            deleted = store.delete_before(None if older_than is None else days_ago(older_than))
    judgements = _count(deleted.judgements, "judgement")
    sys.stderr.write(f"instil: deleted {_count(deleted.interactions, 'interaction')} and {judgements}\n")


@feedback.command
def stats(*, record: Record, model: str | None = None, since: Since = None, as_json: AsJson = False) -> None:
    """Count what was recorded, and show what share of the rated answers was rated up, by model and by week.

    Args:
        record: Where it was recorded: a folder, or the URL of a database.
        model: Only interactions with this model.
        since: Only what is from this day on (UTC), as 2026-05-31.
        as_json: Print a JSON object.
    """
    begin = _day(since)
    with _open(record) as store:
        from instil.serving.feedback.verdicts import statistics

        made = [each for each in store.judgements() if each.kind != "dialogue" or _is_chosen(each, model, begin)]
        found = statistics(store.overview(model=model, since=begin), made)
    if as_json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
        return
    console = _console()
    for name in ("interactions", "answers", "corrections", "preferences", "dialogues"):
        console.print(f"{name:13}{found[name]:>9,}")
    table = Table("", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("Interactions", "Up", "Down", "Satisfaction"):
        table.add_column(name, justify="right", no_wrap=True)
    groups = [(each["model"], each) for each in found["models"]] + [(each["week"], each) for each in found["weeks"]]
    for name, each in [*groups, ("all", found)]:
        share = each["satisfaction"]
        told = "" if share is None else f"{share:.0%} ({each['low']:.0%} to {each['high']:.0%})"
        table.add_row(Text(name), *(f"{each[key]:,}" for key in ("interactions", "up", "down")), told)
    console.print()
    console.print(table)
    console.print("Satisfaction: the share of the rated answers that was rated up, with its 95 % interval (Wilson)")


def _open(record: str) -> Store:
    try:
        from instil.serving.feedback import Store
    except ModuleNotFoundError as error:
        raise UsageError(f"feedback needs the package {error.name!r}", "pip install 'instil[serve]'") from error
    return Store(record, create=False)


def _entries(
    store: Store, model: str | None, since: datetime | None, *, judged: bool, last: int | None
) -> list[dict[str, Any]]:
    """Interactions and written dialogues as plain JSON values, the oldest first, with counts of judgements."""
    from instil.serving.feedback.verdicts import Verdicts

    verdicts = Verdicts.of(store.judgements())
    made: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (id, _), rating in verdicts.ratings.items():
        made[id][rating.body["value"]] += 1
    for id, _ in verdicts.corrections:
        made[id]["corrected"] += 1
    for pair in verdicts.preferences:
        for id in {id for id, _ in pair}:  # both answers may be of one
            made[id]["compared"] += 1
    entries = [
        {
            "id": each.id,
            "time": each.time.isoformat(),
            "model": each.model,
            "kind": each.kind,
            "client": each.client,
            "redacted": each.redacted,
            "messages": list(each.messages),
            "tools": list(each.tools),
            "answers": [answer.to_wire() | {"ended": answer.ended} for answer in each.answers],
            "judged": dict(made[each.id]),
        }
        for each in store.interactions(model=model, since=since, judged=judged, last=None if judged else last)
    ]
    for each in verdicts.dialogues:
        if _is_chosen(each, model, since):
            time = each.time.isoformat()
            fixed: dict[str, Any] = {
                "model": None,
                "kind": "dialogue",
                "client": "page",
                "answers": [],
                "judged": {"written": 1},
            }
            entries.append({"id": each.id, "time": time, "redacted": each.redacted, **each.body, **fixed})
    return sorted(entries, key=lambda each: each["time"])


def _is_chosen(dialogue: Judgement, model: str | None, since: datetime | None) -> bool:
    """Whether a dialogue that a person wrote is of what is asked for: it is of no model."""
    return model is None and (since is None or dialogue.time >= since)


def _day(text: str | None) -> datetime | None:
    """The beginning of a day."""
    try:
        return None if text is None else datetime.combine(date.fromisoformat(text), time(), UTC)
    except ValueError as error:
        raise UsageError(f"--since {text}: is no day", "Write it as 2026-05-31.") from error


def _ask(question: str) -> None:
    """Ask; anything but a yes ends the command."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask in", "Say --yes to delete without being asked.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was deleted")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _shown(text: Any) -> Text:
    """The beginning of a text, on one line, as a terminal may show it."""
    line = " ".join(str(text).split())
    return Text(inert(line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"), overflow="fold")


def _console() -> Console:
    """The terminal; where there is none, no line is broken, for other programs read them."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
