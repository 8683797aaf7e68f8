"""The server as a process: a socket, the models, the store, and an end that lets answers under way come to theirs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

import uvicorn

from instil.errors import InstilError, UsageError
from instil.serving import runs
from instil.serving.app import application
from instil.serving.feedback import Store
from instil.serving.guard import LOOPBACK, Guard, Guards
from instil.serving.http import Connection
from instil.serving.models import ServedModel
from instil.serving.server import Recording, Server
from instil.serving.worker import Worker

_KEPT = 4  # contexts, but no more than a quarter of what memory holds
_EXPIRE = 3600.0  # seconds


class Settings(Protocol):
    """What is chosen about the server; see `instil serve --help`."""

    host: str
    allow_host: list[str]
    max_batch: int
    max_waiting: int
    max_body: int
    drain: float
    record: str | None
    consent: Literal["each", "all"]
    redact: bool
    phone_region: str
    retention_days: int | None
    runs: Path | None

    @property
    def key(self) -> str | None:
        """What clients must name; None for nothing."""


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before anything slow is done.

    Raises:
        UsageError: The address is none of this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(found[0], socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: is no address of this machine: {error}", "Name one that is.") from error
    with opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(found[4])
            opened.listen()  # whoever comes while the models are loaded waits; another server is told at once
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--host {host} --port {port}: cannot be listened on: {reason}",
                "Give another --port (0 takes a free one), or an address of this machine as --host.",
            ) from error
        yield opened


def run(models: Sequence[ServedModel], opened: socket.socket, settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM; then answers under way are given their time.

    Raises:
        UsageError, StoreError: There is no such store, or no such folder of runs.
    """
    store = None
    if settings.record is not None:
        store = Store(
            settings.record,
            redact=settings.redact,
            phone_region=settings.phone_region,
            retention_days=settings.retention_days,
        )
        for model in models:
            _ = model.weights_hash  # of a large model it takes seconds, which no request is to wait for
    engines = {model.name: model.engine for model in models}
    fitting = min(engine.fitting for engine in engines.values()) // len(engines)
    contexts = max(engine.context for engine in engines.values()) or fitting
    worker = Worker(engines, settings.max_batch, settings.max_waiting, min(fitting // 4, _KEPT * contexts))
    more = [] if settings.runs is None else [runs.router(settings.runs, settings.key)]
    recording = Recording(store, settings.consent) if store is not None else None
    server = Server(models, worker, recording, has_runs=bool(more))
    guards = Guards(
        settings.key,
        frozenset(name.lower() for name in (settings.host, *settings.allow_host)),
        settings.host not in LOOPBACK,
        settings.max_body,
    )
    worker.start()
    try:
        asyncio.run(_serve(Guard(application(server, more), guards, server.metrics.count), opened, settings, store))
    finally:
        worker.stop()
        if store is not None:
            store.close()


async def _serve(app: Guard, opened: socket.socket, settings: Settings, store: Store | None) -> None:
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=True,
        ws="none",
        lifespan="on",
        http=Connection,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(settings.drain),
    )
    served = _Uvicorn(config, settings)
    expiring = asyncio.create_task(_expire(store)) if store is not None else None
    try:
        await served.serve([opened])
    finally:
        if expiring is not None:
            expiring.cancel()


class _Uvicorn(uvicorn.Server):
    """Says where it listens, and what an end waits for."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        port = sockets[0].getsockname()[1]
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        what = "what says store: true" if self._settings.consent == "each" else "all but what says store: false"
        kept = f"; recording {what} to {self._settings.record}" if self._settings.record else ""
        _say(f"serving at http://{host}:{port}{kept} (Ctrl-C ends it)")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server, the second what is still under way."""
        if self.should_exit:
            self.force_exit = True
            raise KeyboardInterrupt
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        given = f": answers under way are given {self._settings.drain:g} seconds (Ctrl-C again ends at once)"
        _say(f"ending{given if self.server_state.tasks else ''}")
        await super().shutdown(sockets)


def _say(what: str) -> None:
    sys.stderr.write(f"instil: {what}\n")
    sys.stderr.flush()


async def _expire(store: Store) -> None:
    """Delete what has been kept long enough, now and from time to time."""
    while store.retention_days is not None:
        try:
            await asyncio.to_thread(store.expire)
        except Exception as error:  # the next time may do
            why = error if isinstance(error, InstilError) else type(error).__name__
            _say(f"what is older than --retention-days is not all deleted: {why}")
        await asyncio.sleep(_EXPIRE)
