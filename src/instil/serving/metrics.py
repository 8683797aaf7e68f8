"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of when it was made
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server.

    Args:
        active: Gives the answers that are being generated.
        opened: Gives those that were asked for and have not ended.
    """

    def __init__(self, active: Callable[[], float], opened: Callable[[], float]) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("instil_requests", "Requests answered.", ["path", "status"], registry=own)
        self.prompt_tokens = Counter("instil_prompt_tokens", "Tokens of prompts.", ["model"], registry=own)
        self.answer_tokens = Counter("instil_answer_tokens", "Tokens generated.", ["model"], registry=own)
        self.left = Counter("instil_left", "Requests whose client left before the end.", registry=own)
        self.first = Histogram("instil_first_token_seconds", "Until the first token.", buckets=_SECONDS, registry=own)
        self.whole = Histogram("instil_answer_seconds", "Until the last token.", buckets=_SECONDS, registry=own)
        for name, help, value in (
            ("instil_answers_active", "Answers being generated.", active),
            ("instil_answers_open", "Answers being generated or waiting.", opened),
        ):
            Gauge(name, help, registry=own).set_function(value)

    def count(self, path: str, status: int) -> None:
        """A request to a path, as the server knows it, was answered with a status."""
        self.requests.labels(path, status).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
