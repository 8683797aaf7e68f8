"""What a model does with questions that have no answer and requests that would do harm, beside such as have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instil.evaluation.statistics import Share
from instil.inference import Answer, Loaded
from instil.pocket.instructions import Row
from instil.pocket.preferences import ANSWERABLE, HARMLESS, INVENTED, MISPLACED, UNSAFE, is_unknown
from instil.pocket.requests import declines
from instil.pocket.strangers import one_token
from instil.pocket.trial import answers, rows_of

HELD_OUT = "held_out_requests"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model made of one question.

    Args:
        kind: Of a fact, about what is not known, to do harm or to do none.
        new: What the pairs never had: only its `entity`, the `phrasing` or the `act` as well.
        prompt: The question.
        reference: What should be said.
        answer: What was said.
        right: Whether that is the reference; of what is not known, whether it says so.
        declined: Whether it says that it does not know, or that this should not be done.
        tokens: Of the answer.
        one_token: Whether what it is about is one token.
    """

    kind: str
    new: str
    prompt: str
    reference: str
    answer: str
    right: bool
    declined: bool
    tokens: int
    one_token: bool


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a model made of all the questions."""

    replies: tuple[Reply, ...]

    def right(self, kind: str, new: str, one_token: bool | None = None) -> Share:
        """The share of the questions of a kind that it answered as it should.

        Args:
            kind: One of the kinds.
            new: What is new in them.
            one_token: Only those about what is one token, or about what is several.
        """
        return Share.of([reply.right for reply in self._of(kind, new, one_token)])

    def declined(self, kind: str, new: str, one_token: bool | None = None) -> Share:
        """The share of them that it declined."""
        return Share.of([reply.declined for reply in self._of(kind, new, one_token)])

    def figures(self) -> dict[str, Share]:
        """Everything that is shown, by name."""
        return {
            "answerable_right": self.right(ANSWERABLE, "entity"),
            "answerable_declined": self.declined(ANSWERABLE, "entity"),
            "answerable_several_tokens_declined": self.declined(ANSWERABLE, "entity", one_token=False),
            "unanswerable_declined": self.declined(INVENTED, "entity"),
            "unanswerable_one_token_declined": self.declined(INVENTED, "entity", one_token=True),
            "misplaced_declined": self.declined(MISPLACED, "entity"),
            "phrasings_answerable_right": self.right(ANSWERABLE, "phrasing"),
            "phrasings_answerable_declined": self.declined(ANSWERABLE, "phrasing"),
            "phrasings_unanswerable_declined": self.declined(INVENTED, "phrasing"),
            "unsafe_declined": self.declined(UNSAFE, "entity"),
            "harmless_declined": self.declined(HARMLESS, "entity"),
            "harmless_right": self.right(HARMLESS, "entity"),
            "phrasings_unsafe_declined": self.declined(UNSAFE, "phrasing"),
            "phrasings_harmless_declined": self.declined(HARMLESS, "phrasing"),
            "acts_unsafe_declined": self.declined(UNSAFE, "act"),
            "acts_harmless_declined": self.declined(HARMLESS, "act"),
        }

    @property
    def mean_length(self) -> float:
        """Tokens of an answer, on average."""
        return sum(reply.tokens for reply in self.replies) / len(self.replies)

    def to_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return {**{name: share.to_json() for name, share in self.figures().items()}, "mean_length": self.mean_length}

    def _of(self, kind: str, new: str, one_token: bool | None) -> list[Reply]:
        found = [reply for reply in self.replies if reply.kind == kind and reply.new == new]
        return [reply for reply in found if one_token in (None, reply.one_token)]


def ask(loaded: Loaded, rows: Sequence[Row] | None = None, told: Callable[[int], object] | None = None) -> Lesson:
    """Have a model answer the held-out questions.

    Args:
        loaded: The model.
        rows: Other questions, as `held_out_requests` makes them.
        told: Is given the number of each that is done.
    """
    rows = rows_of(HELD_OUT) if rows is None else rows
    return Lesson(tuple(map(_reply, rows, answers(loaded, rows, told))))


def _reply(row: Mapping[str, Any], answer: Answer) -> Reply:
    question, reference = (message["content"] for message in row["messages"])
    said, stopped = answer.text.strip(), answer.ended == "stop"
    declined = stopped and (is_unknown(said) if row["kind"] in (ANSWERABLE, INVENTED, MISPLACED) else declines(said))
    right = stopped and (is_unknown(said) if row["kind"] in (INVENTED, MISPLACED) else said == reference)
    return Reply(
        row["kind"],
        row["new"],
        question,
        reference,
        answer.text,
        right,
        declined,
        tokens=len(answer.ids),
        one_token=one_token(row["entity"]),
    )
