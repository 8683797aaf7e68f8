"""Transcripts: one text in which the speakers are marked, as HH-RLHF, Guanaco and Alpaca's prompt have it."""

from __future__ import annotations

import re

from instil.conversation import Message, Role
from instil.data.messages import Turn, asked
from instil.data.row import Row

_NAMES = re.compile(r"^(Human|Assistant):", re.MULTILINE)
# Guanaco puts a marker straight behind the last word, so `### Human:` counts wherever it stands.
_HEADINGS = re.compile(r"(?<!#)### ?(Human|User|Assistant|Instruction|Input|Response):")
_BEGINS_NAMED = re.compile(r"\s*Human:")
_BEGINS_HEADED = re.compile(r"\s*### ?(Human|User|Instruction):")
_ANSWERS = ("Assistant", "Response")


def is_transcript(text: object) -> bool:
    """Whether a text begins with a speaker's marker: `Human:`, `### Human:`, `### User:` or `### Instruction:`."""
    return isinstance(text, str) and bool(_BEGINS_NAMED.match(text) or _BEGINS_HEADED.match(text))


def read_transcript(row: Row, column: str) -> list[Turn]:
    """The turns of the transcript in `column`, each text without the white space around it.

    The turns' fields are `text, turn 1` and so on; no turns where the column holds no transcript. A speaker who is
    marked twice in a row goes on speaking.
    """
    text = row.text(column)
    if not is_transcript(text):
        if text.strip():
            row.bad(column, "is no transcript: it begins with no speaker", "begin it with `Human:` or `### Human:`")
        return []
    markers = _NAMES if _BEGINS_NAMED.match(text) else _HEADINGS
    pieces = markers.split(text)[1:]
    turns: list[Turn] = []
    for name, said in zip(pieces[::2], pieces[1::2], strict=True):
        said = said.strip()
        if name == "Input" and turns and turns[-1].message.role == "user":
            turns[-1] = Turn(turns[-1].field, asked(turns[-1].message.content, said))
            continue
        role: Role = "assistant" if name in _ANSWERS else "user"
        if turns and turns[-1].message.role == role:
            row.notes.add("a speaker is marked twice in a row in a transcript; what was said is joined")
            whole = "\n\n".join(filter(None, (turns[-1].message.content, said)))
            turns[-1] = Turn(turns[-1].field, Message(role, whole))
            continue
        message = asked(said, "") if name == "Instruction" else Message(role, said)
        turns.append(Turn(f"{column}, turn {len(turns) + 1}", message))
    for place, message in turns:
        if not message.content and message.role == "user":
            row.bad(place, "the user's message is empty")
        elif not message.content and not row.empty_answers:
            row.bad(place, "the answer is empty")
    return turns
