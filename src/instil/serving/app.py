"""The server over HTTP: its paths, its page, and errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from instil import __version__
from instil.data.strict_json import explain
from instil.serving.protocol import ApiError, ErrorBody
from instil.serving.server import Server

_CODES = {
    400: "The request cannot be done.",
    401: "The API key is missing or wrong.",
    403: "It comes from another origin, or names another host.",
    404: "There is no such thing.",
    405: "There is no such method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting.",
    500: "The server failed.",
    503: "The server is ending.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": text} for code, text in _CODES.items()
}


def application(server: Server, more: Sequence[APIRouter] = ()) -> FastAPI:
    """The server over HTTP.

    Args:
        server: What answers.
        more: What else it answers: the page of training runs.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="Instil", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=_ERRORS
    )
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _told_invalid)
    app.add_exception_handler(HTTPException, _told_http)

    for path, method, act in (
        ("/health", "GET", server.health),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{model:path}", "GET", server.model),
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/completions", "POST", server.complete),
        ("/tokenize", "POST", server.tokenize),
        ("/detokenize", "POST", server.detokenize),
        ("/tokenizer_info", "GET", server.tokenizer_info),
        ("/metrics", "GET", server.prometheus),
        ("/api/about", "GET", server.about),
        ("/api/feedback", "POST", server.feedback),
    ):
        app.add_api_route(path, act, methods=[method], response_model=None)
    for router in more:
        app.include_router(router)
    pages = resources.files("instil.serving") / "static"
    app.mount("/static", StaticFiles(directory=str(pages)), "static")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response((pages / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    return app


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _told_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field, place = _place(first, error.body)
    what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "json_invalid":
        what = "the body is not JSON"
    elif first["type"] == "union_tag_not_found":
        field = place = "kind"
        what = "Field required"
    elif first["type"] == "union_tag_invalid":
        field = place = "kind"
        what = f"Input should be one of {first['ctx']['expected_tags']}"
    elif not place and first["type"] == "missing":
        what = "there is no body"
    elif not place and first["type"].startswith(("model_", "dict_")):
        if isinstance(first["input"], bytes):  # not read, for it says that it is something else
            return await _told(request, ApiError(415, "the body must be JSON: send Content-Type: application/json"))
        what = "the body must be an object"
    return await _told(request, ApiError(400, f"{place}: {what}" if place else what, field))


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | None, str]:
    """The field at fault, and where in it: without the names that pydantic gives to the alternatives of a field."""
    if error["type"] == "json_invalid":
        return None, ""
    found: list[str] = []
    for each in error["loc"][1:]:
        if isinstance(body, list) and isinstance(each, int) and each < len(body):
            found.append(f"[{each}]")
            body = body[each]
        elif isinstance(body, Mapping) and (each in body or (error["type"] == "missing" and each == error["loc"][-1])):
            found.append(f".{each}" if found else str(each))
            body = body.get(each)
    return (found[0] if found else None), "".join(found)


async def _told_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # met while the body was read
        return await _told(request, error.__cause__)
    if isinstance(error.__cause__, (ValueError, RecursionError)):
        broken = "is not UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else explain(error.__cause__)
        return await _told(request, ApiError(400, f"the body cannot be read: {broken}"))
    code = "unknown_url" if error.status_code == 404 else None
    own = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(own.to_json(), own.status, error.headers)
