"""What stands before the server: who may ask, from which page, and how much; and that an error shows nothing."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instil.serving.protocol import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/runs", "/health", "/favicon.ico")  # with no key: pages hold nothing, and ask for it
_OPEN_BELOW = ("/static/", "/runs/")  # reports are opened with a ticket
_SLOW = 30.0  # seconds in which a body must come
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::\d+)?", re.ASCII)

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Guards:
    """What is let in.

    Args:
        key: What clients must name; None for no key.
        hosts: Names that the server may be asked under, besides those of the loopback and of this machine.
        public: Whether it listens beyond the loopback.
        most_bytes: Of a body.
    """

    key: str | None
    hosts: Collection[str]
    public: bool
    most_bytes: int

    def knows_host(self, header: str) -> bool:
        """Whether a request that names this host is meant for this server: a foreign name that leads here (DNS
        rebinding) is none.
        """
        named = _HOST.fullmatch(header.lower())
        if named is None:
            return False
        name = named[1].strip("[]")
        if name in LOOPBACK or name in self.hosts:
            return True
        return self.public and (_is_address(name) or name == socket.gethostname().lower())

    def knows_key(self, header: str) -> bool:
        """Whether a header names the right key, found out in the same time whatever it names."""
        return self.key is None or hmac.compare_digest(header.encode("latin-1"), f"Bearer {self.key}".encode())


class Guard:
    """Lets requests in or answers them itself.

    Args:
        app: What is guarded.
        guards: What is let in.
        answered: Told of the path, as the server knows it, and the status of each request.
    """

    def __init__(self, app: ASGIApp, guards: Guards, answered: Callable[[str, int], object]) -> None:
        self._app = app
        self._guards = guards
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._answered(getattr(scope.get("route"), "path", "other"), message["status"])
                held = {name for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in held]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _Bounded(receive, self._guards.most_bytes), send_safely)
        except ApiError as error:
            refused = error
        except RecursionError:
            refused = ApiError(400, "the body is nested too deeply")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # nothing of a request is told to the log, nor of the server to a client
            log(error)
            refused = ApiError(500, "the server failed", code="internal_error")
        else:
            return
        if not begun:
            await _answer(refused, send_safely)

    def _check(self, scope: Scope) -> None:
        headers = _texts(scope["headers"])
        host = headers.get("host", [""])
        if len(host) != 1 or not self._guards.knows_host(host[0]):
            raise ApiError(403, "the Host header names no host of this server (--allow-host adds one)", code="host")
        for origin in headers.get("origin", []):
            if origin.lower() not in (f"http://{host[0]}".lower(), f"https://{host[0]}".lower()):
                raise ApiError(403, "the request comes from a page of another origin", code="origin")
        length = headers.get("content-length", ["0"])[0]
        if length.isdigit() and int(length) > self._guards.most_bytes:
            raise _too_large(self._guards.most_bytes)
        path = scope["path"]
        if path in _OPEN or path.startswith(_OPEN_BELOW):
            return
        if headers.get("sec-fetch-site", [""])[0] in ("cross-site", "same-site"):
            raise ApiError(403, "the request comes from a page of another origin", code="origin")
        if not self._guards.knows_key(headers.get("authorization", [""])[0]):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )


class _Bounded:
    """Takes in a body that is neither too large nor too slow."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most
        self._most = most
        self._whole = False
        self._until = time.monotonic() + _SLOW

    async def __call__(self) -> Message:
        if self._whole:  # from now on it is waited for the client to leave
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._until - time.monotonic())
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_SLOW:.0f} seconds") from None
        self._left -= len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._left < 0:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {most:,} bytes that this server takes", code="body_too_large")


def _texts(headers: Sequence[tuple[bytes, bytes]]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def log(error: Exception) -> None:
    """Where an error happened, without what it says, which may hold text of a request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    sys.stderr.write(f"instil: error: {type(error).__name__}{place}\n")


async def _answer(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps(error.to_json()).encode()})
