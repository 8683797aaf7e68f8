"""HTTP/1.1 as uvicorn speaks it, with an end to idle connections, and refusals that look like all others."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from instil.serving.guard import HEADERS
from instil.serving.protocol import ApiError

_IDLE = 30.0  # seconds in which a connection must ask for something
_CONNECTIONS = 900  # fewer than the 1,024 files that a process may commonly have open


class Connection(H11Protocol):
    """A connection of a client."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It begins."""
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            self._refuse(ApiError(503, "too many connections are open: try again", retry_after=1))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        if self._idle is not None:
            self._idle.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """A request was answered."""
        self._wait()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        self._refuse(ApiError(400, "this is not HTTP/1.1, or its headers are too long"))

    def _wait(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self.loop.call_later(_IDLE, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.transport.is_closing():  # for what its client does not take
            self.transport.abort()
            return
        if getattr(self.cycle, "response_complete", True):  # there is none before the first request
            self.transport.close()
        self._wait()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.to_json()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **HEADERS,
            **error.headers,
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
