"""The page `/runs`: the training runs below a folder, as they go, beside each other, and the reports there."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from instil.errors import UsageError
from instil.serving.protocol import ApiError
from instil.training.events import Evaluation, Step
from instil.training.files import METRICS, RECORD, plain
from instil.training.metrics import GrowingMetrics
from instil.training.runs import Run, in_order, is_free, read_run, walk

POINTS = 1000
"""At most so many of a series are sent."""

_REPORT, _RESULTS = "report.html", "results.json"
_PAGE = Path(__file__).parent / "static" / "runs.html"
_PRIVATE = {"Cache-Control": "private, no-cache"}
# A report styles itself and runs nothing; in its sandbox it is of no origin, so it can ask this server for nothing.
_APART = {
    **_PRIVATE,
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}

Point = tuple[int, float]
"""A step, and what was measured."""
Span = Literal["0", "10", "50", "200"]
"""Steps that a running mean is about."""


def router(folder: Path, key: str | None = None) -> APIRouter:
    """The HTTP of the page.

    A link carries no `Authorization`: where there is a key, the address of a report holds a ticket made with it, which
    is checked here. The addresses are told to those who have the key alone.

    Args:
        folder: Holds the runs; they are read and never changed.
        key: The server's API key, if it has one. It is asked for where the routes are put together, not here.

    Raises:
        UsageError: It is no folder.
    """
    if not folder.is_dir():
        raise UsageError(f"--runs {folder}: is no folder", "Name one that holds runs.")
    runs = _Runs(folder, key)
    routes = APIRouter(tags=["runs"])

    @routes.get("/runs", include_in_schema=False)
    def page() -> Response:
        return FileResponse(_PAGE)

    @routes.get("/api/runs", responses={304: {"description": "Nothing has changed."}})
    def list_runs(request: Request) -> Response:
        """The runs in the order in which they were begun, and the reports that belong to none of them."""
        return _answer(request, runs.listed())

    @routes.get(
        "/api/runs/{run}",
        responses={304: {"description": "Nothing has changed."}, 404: {"description": "There is no such run."}},
    )
    def show_run(request: Request, run: str, smooth: Span = "0") -> Response:
        """All that is known of a run. `smooth`: its series as running means over about so many steps."""
        told = runs.told(run, int(smooth))
        return _missing(f"there is no run {run!r}") if told is None else _answer(request, told)

    @routes.get("/runs/{run}/reports/{name}", include_in_schema=False)
    def report(run: str, name: str, ticket: str = "") -> Response:
        found = runs.report(run, name, ticket)
        if found is None:
            return _missing(f"there is no report {name!r} of {run!r}, or the address has another ticket")
        return FileResponse(found, media_type="text/html", headers=_APART)

    return routes


def _answer(request: Request, value: Any) -> Response:
    """The value as JSON, unless the client has it already."""
    body = json.dumps(plain(value), allow_nan=False, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_PRIVATE, "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _missing(message: str) -> Response:
    error = ApiError(404, message, code="not_found")
    return JSONResponse(error.to_json(), error.status)


@dataclass(frozen=True, slots=True)
class _Read:
    """A run as it was read: what its files were like then, and what is told of it."""

    stamp: tuple[Any, ...]
    state: str
    order: tuple[Any, ...]
    summary: dict[str, Any]
    details: dict[int, dict[str, Any]]

    def holds(self, folder: Path, stamp: tuple[Any, ...]) -> bool:
        """Whether it is still so: a run that is killed leaves its files as they are."""
        return self.stamp == stamp and not (self.state == "running" and is_free(folder))


class _Runs:
    """The runs below a folder. Each is looked up by its id among those that are there: no id is made into a path.

    A run is read again when its files have changed; of one that goes on, only what is new.
    """

    def __init__(self, folder: Path, key: str | None) -> None:
        self._folder = folder.resolve()
        self._key = key
        self._read: dict[Path, _Read] = {}
        self._growing: dict[Path, GrowingMetrics] = {}
        self._lock = threading.Lock()

    def listed(self) -> dict[str, Any]:
        places = self._places()
        for place in set(self._read).difference(places.values()):
            self._read.pop(place, None)
        found = [(name, self._run(place), self._reports(name, place)) for name, place in places.items()]
        runs = sorted(((name, run, reports) for name, run, reports in found if run), key=lambda each: each[1].order)
        return {
            "runs": [{"id": name, **run.summary, "reports": reports} for name, run, reports in runs],
            "evaluations": [
                {"id": name, "name": self._name(places[name]), "reports": reports}
                for name, run, reports in sorted(found, key=lambda each: each[0])
                if run is None and reports
            ],
        }

    def told(self, name: str, smooth: int) -> dict[str, Any] | None:
        place = self._places().get(name)
        run = self._run(place) if place is not None else None
        if place is None or run is None:
            return None
        if smooth not in run.details:
            run.details[smooth] = _detail(self._reading(place), smooth)
        return {"id": name, **run.summary, "reports": self._reports(name, place), **run.details[smooth]}

    def report(self, name: str, report: str, ticket: str) -> Path | None:
        if self._key is not None and not hmac.compare_digest(self._ticket(name, report).encode(), ticket.encode()):
            return None
        place = self._places().get(name)
        if place is None:
            return None
        return next((page for page in self._pages(place) if _url_name(page.relative_to(place)) == report), None)

    def _places(self) -> dict[str, Path]:
        """The folders of runs, and of other reports, by their ids."""
        return {
            _url_name(place.relative_to(self._folder)): place
            for place, files in walk(self._folder)
            if RECORD in files or {_REPORT, _RESULTS} <= set(files)
        }

    def _run(self, place: Path) -> _Read | None:
        """The run of a folder; None if it holds none."""
        if not (place / RECORD).is_file():
            return None
        stamp = _stamp(place / RECORD), _stamp(place / METRICS)
        known = self._read.get(place)
        if known is None or not known.holds(place, stamp):
            run = self._reading(place)
            known = _Read(stamp, run.state, in_order(run), {"name": self._name(place), **run.summary()}, {})
            self._read[place] = known
        return known

    def _reading(self, place: Path) -> Run:
        with self._lock:
            growing = self._growing.pop(place, None) or GrowingMetrics()
            try:
                for name in (RECORD, METRICS):
                    if not self._is_inside(place / name):
                        raise UsageError(f"{name} leads out of the folder")
                run = read_run(place, growing.read)
            except UsageError as error:
                reason = error.message.removeprefix(f"{place}: ").replace(f"{place}{os.sep}", "")
                return Run(str(place), "unreadable", reason)
            if run.state == "running":
                self._growing[place] = growing
            return run

    def _reports(self, name: str, place: Path) -> list[dict[str, str]]:
        """The reports in a folder by name, each with its address."""
        found = []
        for page in self._pages(place):
            inside = page.relative_to(place)
            address = f"/runs/{name}/reports/{_url_name(inside)}"
            ticket = f"?ticket={self._ticket(name, _url_name(inside))}" if self._key is not None else ""
            found.append({"name": _shown(inside), "href": address + ticket})
        return found

    def _pages(self, place: Path) -> list[Path]:
        """The reports in a folder and in those right below it, where an evaluation may be kept."""
        try:
            beside = sorted(place.glob(f"*/{_REPORT}"))
        except OSError:
            beside = []
        pages = [place / _REPORT, *(page for page in beside if not page.parent.name.startswith("."))]
        return [page for page in pages if page.is_file() and self._is_inside(page)]

    def _ticket(self, name: str, report: str) -> str:
        assert self._key is not None
        return hmac.new(self._key.encode(), f"{name}/{report}".encode(), "sha256").hexdigest()

    def _is_inside(self, path: Path) -> bool:
        """Whether it is where it seems to be: no link leads out of the folder."""
        return Path(os.path.realpath(path)).is_relative_to(self._folder)

    def _name(self, place: Path) -> str:
        return _shown(place.relative_to(self._folder)) if place != self._folder else _shown(Path(place.name))


def _url_name(path: Path) -> str:
    """A relative path as one part of a URL, and no other path's: what has a meaning there is spelled in hex."""
    name = quote(os.fsencode(path.as_posix()), safe="")
    return name.replace("~", "%7E").replace("%", "~") if name != "." else "~2E"


def _shown(path: Path) -> str:
    """A path for people, whatever bytes it is made of."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written to; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _detail(run: Run, span: int) -> dict[str, Any]:
    """The series of a run and its record; long series thinned, which is said."""
    thinned: dict[str, int] = {}

    def few(name: str, points: Sequence[Point]) -> list[Point]:
        if len(points) > POINTS:
            thinned[name] = len(points)
        return thin(points)

    def trained(name: str, value: Callable[[Step], float]) -> list[Point]:
        points = [(each.step, value(each)) for each in run.history]
        return few(name, smooth(points, span) if span else points)

    metrics: dict[str, list[Point]] = {}
    for each in run.evaluations:
        if each.metric is not None and each.value is not None:
            metrics.setdefault(each.metric, []).append((each.step, each.value))
    measures = {
        name: few(name, smooth(points, span) if span else points) for name, points in _by_name(run.history).items()
    }
    held_out = _by_name(run.evaluations)
    return {
        "losses": trained("loss", lambda step: step.loss),
        "measures": measures,
        "optimizer": {
            "learning_rate": trained("learning_rate", lambda step: step.learning_rate),
            "grad_norm": trained("grad_norm", lambda step: step.grad_norm),
            "tokens_per_second": trained("tokens_per_second", lambda step: step.tokens_per_second),
        },
        "eval_losses": few("eval_loss", [(each.step, each.eval_loss) for each in run.evaluations]),
        "eval_metrics": {name: few(f"eval_{name}", points) for name, points in metrics.items()},
        "eval_measures": {name: few(f"eval_{name}", points) for name, points in held_out.items()},
        "smooth": span,
        "thinned": thinned,
        "changed": run.changed() if run.record else {},
        "record": run.record,
    }


def _by_name(events: Sequence[Step] | Sequence[Evaluation]) -> dict[str, list[Point]]:
    """What the objective measured beside its loss."""
    found: dict[str, list[Point]] = {}
    for each in events:
        for name, value in each.measures.items():
            found.setdefault(name, []).append((each.step, value))
    return found


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most so many points: the first, the last, and of each stretch between them the lowest, the highest and one
    that is no finite number.
    """
    if len(points) <= most:
        return list(points)
    values = np.array([value for _, value in points])
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    stretches = (most - 2) // (2 if finite.all() else 3)
    ends = np.linspace(1, len(points) - 1, stretches + 1).astype(int).tolist()
    kept = {0, len(points) - 1}
    for begin, end in pairwise(ends):
        kept |= {begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())}
        if not finite[begin:end].all():
            kept.add(begin + int(finite[begin:end].argmin()))
    return [points[at] for at in sorted(kept)]


def smooth(points: Iterable[Point], span: int) -> list[Point]:
    """Running means, exponentially weighted: a step weighs `1 - 2 / (span + 1)` of what the next one does.

    What is no finite number stays so, and is left out of the means.
    """
    fading = 1 - 2 / (span + 1)
    found, total, weight = [], 0.0, 0.0
    for step, value in points:
        if math.isfinite(value):
            total, weight = fading * total + value, fading * weight + 1
        found.append((step, total / weight if math.isfinite(value) else math.nan))
    return found
