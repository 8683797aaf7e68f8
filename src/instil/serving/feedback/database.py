"""The database of a store: where it is, its tables, and what SQLite is told so that it loses nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Boolean,
    Column,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from instil.errors import InstilError, UsageError

SCHEMA = 1
FILE = "interactions.sqlite3"
_BUSY_SECONDS = 30
_DATABASES = "Name a folder, or a database as postgresql://user@host/name or sqlite:///file."


class StoreError(InstilError):
    """A store that cannot be opened, read or written."""


class NotRecordedError(UsageError):
    """An interaction, an answer or a judgement that the store does not hold."""


class _Utc(TypeDecorator[datetime]):
    """A time with its zone, also where the database knows of none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


# Texts stand in JSON: unlike PostgreSQL's text it holds whatever a string may hold, and it keeps the order of keys.
tables = MetaData()
schema_table = Table("instil_schema", tables, Column("version", Integer, primary_key=True))
interaction_table = Table(
    "instil_interactions",
    tables,
    Column("id", String(200), primary_key=True),
    Column("time", _Utc, nullable=False, index=True),
    Column("model", String(1000), nullable=False),
    Column("model_hash", String(200), nullable=False),
    Column("template", String(1000)),
    Column("template_hash", String(200)),
    Column("kind", String(20), nullable=False),
    Column("client", String(20), nullable=False),
    Column("redacted", Boolean, nullable=False),
    Column("conversation", String(64), nullable=False),
    Column("messages", JSON, nullable=False),
    Column("tools", JSON, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("prompt_ids", JSON(none_as_null=True)),
    Column("answers", JSON, nullable=False),
    Column("choices", Integer, nullable=False),
)
judgement_table = Table(
    "instil_judgements",
    tables,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("time", _Utc, nullable=False, index=True),
    Column("kind", String(20), nullable=False),
    Column("interaction", ForeignKey(interaction_table.c.id, ondelete="CASCADE"), index=True),
    Column("choice", Integer),
    Column("rejected", ForeignKey(interaction_table.c.id, ondelete="CASCADE"), index=True),
    Column("rejected_choice", Integer),
    Column("body", JSON, nullable=False),
    Column("redacted", Boolean, nullable=False),
    sqlite_autoincrement=True,  # the number of a deleted one is not given again
)


def locate(target: str | Path, create: bool) -> URL:
    """The database that a target names; the folder of a file of SQLite is there."""
    if "://" not in str(target):
        folder = Path(target)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{target}: is a file", "Name a folder, or the URL of a database.")
        url = URL.create("sqlite", database=str(folder / FILE))
    else:
        try:
            url = make_url(str(target))
        except ArgumentError as error:
            raise UsageError(f"{target}: is no URL of a database", _DATABASES) from error
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise UsageError(f"{url.render_as_string()}: is no database that is known here", _DATABASES)
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UsageError(f"{target}: would be lost with the process", _DATABASES)
        _make_file(Path(str(url.database)), str(target), create)
    return url


def _make_file(path: Path, name: str, create: bool) -> None:
    """See that the file is there; what people say is for its owner alone to read."""
    if not create:
        if not path.exists():
            raise nothing_recorded(name)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StoreError(f"{name}: cannot be written: {error.strerror}", "Name another folder.") from error


def nothing_recorded(name: str) -> UsageError:
    """The error where there is no store."""
    return UsageError(f"{name}: nothing was recorded there", "Name what `instil serve --record` was given.")


def connect(url: URL, name: str) -> Engine:
    """The engine of a database, under the name that errors give it."""
    try:
        engine = create_engine(url, hide_parameters=True)  # the texts are nothing for an error's message
    except ModuleNotFoundError as error:
        remedy = "pip install 'psycopg[binary]'" if error.name == "psycopg" else _DATABASES
        raise UsageError(f"{name}: needs the package {error.name!r}", remedy) from error
    except SQLAlchemyError as error:
        raise UsageError(f"{name}: {_first_line(error)}", _DATABASES) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_up)
        event.listen(engine, "begin", _begin)
    return engine


def _set_up(connection: Any, _: Any) -> None:
    """A connection to SQLite: what is committed is on disk, and transactions begin where `_begin` says."""
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {1000 * _BUSY_SECONDS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection) -> None:
    """One that will write takes the lock at once: one that had read before would fail where another wrote meanwhile."""
    writes = connection.get_execution_options().get("instil_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def told(name: str) -> Iterator[None]:
    """The errors of the database as ours."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreError(
            f"{name}: {_first_line(error)}", "See that the database is there and can be written."
        ) from error


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
