"""Interactions with a model and what people made of them, in SQLite or PostgreSQL.

What a method wrote is on disk when it returns. Several threads and processes may use one store at once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, delete, func, insert, inspect, or_, select, true
from sqlalchemy.exc import IntegrityError

from instil.conversation import Source
from instil.data.messages import check_order, read_messages, read_tools
from instil.data.row import Row as DataRow
from instil.errors import UsageError
from instil.serving.feedback import database
from instil.serving.feedback.database import (
    SCHEMA,
    NotRecordedError,
    StoreError,
    interaction_table,
    judgement_table,
    schema_table,
)
from instil.serving.feedback.redaction import Redactor
from instil.serving.feedback.values import JUDGEMENT, Deleted, Given, Interaction, Judgement, JudgementKind, Overview

MOST_TEXT = 200_000
"""Characters of one text that a person wrote: what is redacted takes time."""


class Store:
    """Interactions and judgements, kept.

    Args:
        target: A folder, in which SQLite keeps a file, or the URL of a database (`postgresql://…`, `sqlite:///…`).
        redact: Whether e-mail addresses, phone numbers and card numbers are taken out before anything is written.
        phone_region: The country whose phone numbers are found without a country code as well.
        retention_days: For how many days `expire` leaves them.
        create: Whether a store is made where there is none.

    Raises:
        UsageError: There is no such database, country or retention.
        StoreError: It cannot be opened, or was made by a later version.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        redact: bool = True,
        phone_region: str = "US",
        retention_days: int | None = None,
        create: bool = True,
    ) -> None:
        if retention_days is not None and retention_days < 1:
            raise UsageError(f"a retention of {retention_days} days: must be 1 or more", "Leave it out to keep all.")
        self.retention_days = retention_days
        self._redactor = Redactor(phone_region) if redact else None
        url = database.locate(target, create)
        self.name = url.render_as_string() if "://" in str(target) else str(target)
        """Where it is, without a password."""
        self._engine = database.connect(url, self.name)
        self._wiped = True
        try:
            self._open(create)
        except BaseException:
            self._engine.dispose()
            raise

    @property
    def redacts(self) -> bool:
        """Whether addresses and numbers are taken out."""
        return self._redactor is not None

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Written.

    def record(self, interaction: Interaction) -> str:
        """Keep an interaction.

        Returns:
            Its id.

        Raises:
            StoreError: It cannot be written, or is there already.
        """
        said: dict[str, Any] = {
            "messages": [_in_one_text(each) for each in interaction.messages],
            "tools": list(interaction.tools),
            "sampling": dict(interaction.sampling),
            "answers": [
                {"content": each.content, "tool_calls": list(each.tool_calls), "ended": each.ended}
                for each in interaction.answers
            ],
        }
        said, changed = self._redacted(said)
        redacted = interaction.redacted or changed
        for each, answer in zip(said["answers"], interaction.answers, strict=True):
            each["token_ids"] = None if redacted or answer.token_ids is None else list(answer.token_ids)
        known = not redacted and interaction.prompt_ids is not None
        row = {name: getattr(interaction, name) for name in _AS_THEY_ARE} | {
            **said,
            "redacted": redacted,
            "conversation": conversation_key(said["messages"], said["tools"]),
            "prompt_ids": list(interaction.prompt_ids or ()) if known else None,
            "choices": len(interaction.answers),
        }
        with self._writing() as connection:
            try:
                connection.execute(insert(interaction_table), row)
            except IntegrityError as error:
                raise StoreError(f"{self.name}: {interaction.id} is recorded already") from error
        return interaction.id

    def rate(
        self, interaction: str, choice: int, value: Literal["up", "down"] | None, comment: str | None = None
    ) -> str:
        """Say that an answer is good or bad; None takes back what was said. Of each answer the last one counts.

        Returns:
            The judgement's id.

        Raises:
            NotRecordedError: There is no such answer.
        """
        if value not in ("up", "down", None):
            raise UsageError(f"a rating of {value!r}: must be 'up', 'down' or null")
        body = {"value": value} | ({"comment": _short(comment, "comment")} if comment else {})
        return self._judge("rating", body, (interaction, choice))

    def correct(self, interaction: str, choice: int, content: str) -> str:
        """Say what the answer should have been. Of each answer the last one counts.

        Returns:
            The judgement's id.

        Raises:
            NotRecordedError: There is no such answer.
            UsageError: It says nothing.
        """
        if not content.strip():
            raise UsageError("the correction is empty", "Write the answer that should have been given.")
        return self._judge("correction", {"content": _short(content, "correction")}, (interaction, choice))

    def prefer(self, chosen: tuple[str, int], rejected: tuple[str, int]) -> str:
        """Say which of two answers to one conversation is the better. Of the same two the last one counts.

        Returns:
            The judgement's id.

        Raises:
            NotRecordedError: There is no such answer.
            UsageError: They are the same, or answer different conversations.
        """
        if chosen == rejected:
            raise UsageError(f"answer {chosen[1]} of {chosen[0]}: cannot be better than itself", "Name two answers.")
        return self._judge("preference", {}, chosen, rejected)

    def author(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Keep a dialogue that a person wrote, to be trained on.

        It is kept as OpenAI's API writes messages, whichever of the ways that training reads it came in.

        Returns:
            The judgement's id.

        Raises:
            UsageError: Training would not take it: a role is unknown, turns are out of order, an answer is empty.
        """
        held = {"messages": list(messages), "tools": list(tools)}
        _short(json.dumps(held, ensure_ascii=False), "dialogue")
        row = DataRow(Source("dialogue", 1), held)
        turns = read_messages(row, "messages", held["messages"])
        read_tools(row, "tools")
        if turns is not None:
            check_order(row, turns)
            if not any(turn.message.role == "assistant" for turn in turns):
                row.bad("messages", "has no assistant turn")
        if turns is None or row.problems:
            said = "; ".join(f"{each.field}: {each.reason}" for each in row.problems)
            raise UsageError(f"the dialogue cannot be trained on: {said}")
        return self._judge("dialogue", {**held, "messages": [turn.message.to_data() for turn in turns]})

    def _judge(
        self,
        kind: JudgementKind,
        body: Mapping[str, Any],
        answer: tuple[str, int] | None = None,
        rejected: tuple[str, int] | None = None,
    ) -> str:
        held, changed = self._redacted(dict(body))
        row = {
            "time": datetime.now(UTC),
            "kind": kind,
            "interaction": answer[0] if answer else None,
            "choice": answer[1] if answer else None,
            "rejected": rejected[0] if rejected else None,
            "rejected_choice": rejected[1] if rejected else None,
            "body": held,
            "redacted": changed,
        }
        with self._writing() as connection:
            conversations = {self._conversation_of(connection, each) for each in (answer, rejected) if each}
            if len(conversations) > 1:
                raise UsageError(
                    f"{row['interaction']} and {row['rejected']} answer different conversations",
                    "Compare answers to the same one.",
                )
            (number,) = connection.execute(insert(judgement_table), row).inserted_primary_key or (0,)
        return f"{JUDGEMENT}{number}"

    def _conversation_of(self, connection: Connection, answer: tuple[str, int]) -> str:
        found = select(interaction_table.c.conversation, interaction_table.c.choices).where(
            interaction_table.c.id == answer[0]
        )
        row = connection.execute(found).one_or_none()
        if row is None:
            raise NotRecordedError(
                f"{answer[0]}: is not recorded", "Say store: true in requests that are to be judged."
            )
        if not 0 <= answer[1] < row.choices:
            raise NotRecordedError(f"{answer[0]}: has no answer {answer[1]}: the last one is {row.choices - 1}")
        return str(row.conversation)

    # Read.

    def interactions(
        self,
        *,
        model: str | None = None,
        since: datetime | None = None,
        judged: bool = False,
        last: int | None = None,
    ) -> list[Interaction]:
        """Those that are kept, the oldest first.

        Args:
            model: Only those of this model.
            since: Only those from this time on.
            judged: Only those that a judgement is about.
            last: Only so many of the newest.
        """
        chosen = _chosen(select(interaction_table), model, since)
        if judged:
            about = (
                select(each).where(each.is_not(None))
                for each in (judgement_table.c.interaction, judgement_table.c.rejected)
            )
            chosen = chosen.where(or_(*(interaction_table.c.id.in_(each) for each in about)))
        newest = chosen.order_by(interaction_table.c.time.desc(), interaction_table.c.id.desc()).limit(last)
        return [_interaction(row) for row in reversed(self._rows(newest))]

    def overview(self, *, model: str | None = None, since: datetime | None = None) -> list[Overview]:
        """Of those that are kept what is counted, as `interactions`."""
        columns = interaction_table.c
        chosen = select(columns.id, columns.time, columns.model, columns.choices).order_by(columns.time, columns.id)
        return [Overview(row.id, row.time, row.model, row.choices) for row in self._rows(_chosen(chosen, model, since))]

    def judgements(self) -> list[Judgement]:
        """All that are kept, the history included, in order."""
        return [
            Judgement(**row._asdict()) for row in self._rows(select(judgement_table).order_by(judgement_table.c.number))
        ]

    def _rows(self, chosen: Select[Any]) -> Sequence[Row[Any]]:
        with self._reading() as connection:
            return connection.execute(chosen).all()

    # Deleted.

    def delete(self, ids: Collection[str]) -> Deleted:
        """Delete interactions, with all judgements of them, and judgements, for good.

        Raises:
            NotRecordedError: One of them is not there; nothing is deleted then.
            StoreError: The rows are deleted, but their bytes still stand in the files.
        """
        numbers = {int(each.removeprefix(JUDGEMENT)): each for each in ids if _is_judgement(each)}
        named = {each for each in ids if not _is_judgement(each)}
        with self._writing() as connection:
            there = set(
                connection.scalars(select(interaction_table.c.id).where(interaction_table.c.id.in_(list(named))))
            )
            kept = set(
                connection.scalars(select(judgement_table.c.number).where(judgement_table.c.number.in_(list(numbers))))
            )
            unknown = sorted(named - there) + [numbers[each] for each in sorted(numbers.keys() - kept)]
            if unknown:
                raise NotRecordedError(f"{', '.join(unknown)}: not recorded", "See what is with: instil feedback list")
            deleted = _delete(
                connection, interaction_table.c.id.in_(list(named)), judgement_table.c.number.in_(list(numbers))
            )
        self._wipe()
        return deleted

    def delete_before(self, time: datetime | None) -> Deleted:
        """Delete for good all interactions before a time, with all judgements of them, and all dialogues before it.

        Args:
            time: None for everything there is.

        Raises:
            StoreError: The rows are deleted, but their bytes still stand in the files.
        """
        deleted = self._delete_before(time)
        self._wipe()
        return deleted

    def expire(self) -> Deleted:
        """Delete for good what is older than the retention; nothing where there is none.

        Raises:
            StoreError: The rows are deleted, but their bytes still stand in the files, until it is called again.
        """
        if self.retention_days is None:
            return Deleted(0, 0)
        deleted = self._delete_before(days_ago(self.retention_days))
        if deleted != Deleted(0, 0) or not self._wiped:
            self._wipe()
        return deleted

    def _delete_before(self, time: datetime | None) -> Deleted:
        with self._writing() as connection:
            if time is None:
                return _delete(connection, true(), true())
            dialogues = and_(judgement_table.c.time < time, judgement_table.c.kind == "dialogue")
            return _delete(connection, interaction_table.c.time < time, dialogues)

    def _wipe(self) -> None:
        """Have no file of SQLite hold what was deleted: not the log of writes either, nor pages that are free."""
        if self._engine.dialect.name != "sqlite":
            return
        with self._reading() as connection:
            raw = connection.connection.driver_connection
            assert raw is not None
            reason = ""
            try:
                raw.execute("VACUUM")
                if raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    reason = "another process reads it"
            except sqlite3.Error as error:
                reason = str(error)
        self._wiped = not reason
        if reason:
            raise StoreError(
                f"{self.name}: the rows are deleted, but the files still hold their bytes: {reason}",
                "Delete them by `instil feedback delete --older-than 36500` once that is over.",
            )

    # The database.

    def _open(self, create: bool) -> None:
        """Make the tables where there are none, and see that they are those of this version."""
        with self._reading() as connection:
            made = inspect(connection).has_table(schema_table.name)
        if not made and not create:
            raise database.nothing_recorded(self.name)
        if not made:
            with self._writing() as connection:
                if connection.dialect.name == "postgresql":  # of two processes one makes them
                    connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(schema_table.name))))
                if not inspect(connection).has_table(schema_table.name):
                    database.tables.create_all(connection)
                    connection.execute(insert(schema_table), {"version": SCHEMA})
        versions = [row.version for row in self._rows(select(schema_table))]
        if versions != [SCHEMA]:
            found = ", ".join(map(str, versions)) or "none"
            raise StoreError(
                f"{self.name}: its tables are of version {found}, and this Instil knows version {SCHEMA}",
                "Use the version of Instil that made it, or a later one.",
            )

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with database.told(self.name), self._engine.execution_options(instil_writes=True).begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with database.told(self.name), self._engine.connect() as connection:
            yield connection

    def _redacted(self, value: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The value as it may be kept, in plain JSON, and whether it is another."""
        value = json.loads(json.dumps(value))
        if self._redactor is None:
            return value, False
        found = self._redactor.value(value)
        return found, found != value


_AS_THEY_ARE = ("id", "time", "model", "model_hash", "template", "template_hash", "kind", "client")


def days_ago(days: int) -> datetime:
    """The time so many days ago; of more days than there are times, the first there is."""
    try:
        return datetime.now(UTC) - timedelta(days=days)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def conversation_key(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """A hash by which answers to the same conversation are known."""
    return hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).hexdigest()


def _in_one_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its parts of text as the one text that a chat template makes of them."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(
        isinstance(each, Mapping) and each.get("type") == "text" for each in parts
    ):
        return message
    return {**message, "content": "".join(str(each.get("text", "")) for each in parts)}


def _short(text: str, name: str) -> str:
    if len(text) > MOST_TEXT:
        raise UsageError(f"the {name} has {len(text):,} characters, and may have {MOST_TEXT:,}", "Shorten it.")
    return text


def _is_judgement(id: str) -> bool:
    number = id.removeprefix(JUDGEMENT)
    return number != id and number.isascii() and number.isdigit() and len(number) < 10


def _interaction(row: Row[Any]) -> Interaction:
    held = row._asdict()
    return Interaction(
        **{name: held[name] for name in _AS_THEY_ARE},
        messages=tuple(held["messages"]),
        tools=tuple(held["tools"]),
        sampling=held["sampling"],
        prompt_ids=None if held["prompt_ids"] is None else tuple(held["prompt_ids"]),
        answers=tuple(_given(each) for each in held["answers"]),
        redacted=held["redacted"],
    )


def _chosen(query: Select[Any], model: str | None, since: datetime | None) -> Select[Any]:
    if model is not None:
        query = query.where(interaction_table.c.model == model)
    return query if since is None else query.where(interaction_table.c.time >= since)


def _given(held: Mapping[str, Any]) -> Given:
    ids = held["token_ids"]
    return Given(held["content"], tuple(held["tool_calls"]), held["ended"], None if ids is None else tuple(ids))


def _delete(connection: Connection, asked: ColumnElement[bool], judged: ColumnElement[bool]) -> Deleted:
    """Delete such interactions, all judgements of them, and such judgements."""
    gone = select(interaction_table.c.id).where(asked)
    of_them = or_(judgement_table.c.interaction.in_(gone), judgement_table.c.rejected.in_(gone), judged)
    judgements = connection.execute(delete(judgement_table).where(of_them)).rowcount
    return Deleted(connection.execute(delete(interaction_table).where(asked)).rowcount, judgements)
