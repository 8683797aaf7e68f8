"""The shapes that rows come in: how each is recognized, and how it becomes a Record.

A shape is recognized by its columns. What a shape does not use stays with the record as `extra`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from instil.conversation import Conversation, Kind, Message, Record
from instil.data.messages import Turn, asked, check_order, conversation, gap, read_messages, read_tools
from instil.data.row import Row, described
from instil.data.transcript import is_transcript, read_transcript
from instil.errors import UsageError, nearest

Objective = Literal["supervised", "preference", "pretrain"]
OBJECTIVES: tuple[Objective, ...] = ("supervised", "preference", "pretrain")
COMPARING = ("dpo", "cdpo", "ipo", "simpo", "orpo", "kto")
"""The ways to train on preferences, for each of which data is read alike."""


class Reading(NamedTuple):
    """What a shape makes of a row: the parts of a Record that it decides."""

    kind: Kind
    conversations: tuple[Conversation, ...]
    labels: tuple[str, ...] = ("",)
    later_turns: tuple[tuple[Message, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of rows.

    Args:
        needs: The columns that a row of this shape has; in each group one is enough.
        read: Makes the record's parts; adds to the row's problems.
        optional: Other columns that it uses.
    """

    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row, Objective | None], Reading]
    optional: tuple[str, ...] = ()


def recognize(values: Mapping[str, Any], objective: Objective | None) -> str | None:
    """The shape of a row by its columns, or None. A column that holds null tips the balance only for answers."""
    given = {column for column, value in values.items() if value is not None}
    shape = _recognize(given, values, objective)
    if shape in (None, "prompt") and len(given) < len(values):
        answered = _recognize(set(values), values, objective)
        return answered if answered not in (None, "prompt") else shape
    return shape


def _recognize(columns: set[str], values: Mapping[str, Any], objective: Objective | None) -> str | None:
    if objective == "pretrain" and "text" in columns:
        return "text"
    pair = "chosen" in columns and "rejected" in columns
    answered = _recognize_answered(columns)
    if pair and (answered is None or objective == "preference"):
        return "preference"
    if "messages" in columns or "conversations" in columns or "conversation" in columns:
        # Beside a pair, a conversation is the prompt; unless another column holds the prompt already.
        if pair and not ("prompt" in columns and objective != "preference"):
            return "preference"
        if _label(values) is not None:
            return "labelled"
        return "messages" if "messages" in columns else "sharegpt"
    if answered == "prompt-completion" and _label(values) is not None:
        return "labelled"
    if answered is not None:
        return answered
    if "text" in columns:
        return "transcript" if is_transcript(values["text"]) else "text"
    asks = columns & {"prompt", "question", "instruction", "turns"} or {"prefix", "suffix"} <= columns
    # A column named like an answer is no prompt's; to leave it out in silence would train nothing.
    return "prompt" if asks and not columns & _ANSWER_COLUMNS else None


def _recognize_answered(columns: set[str]) -> str | None:
    if "messages" in columns or "conversations" in columns or "conversation" in columns:
        return None
    if "prompt" in columns and "completion" in columns:
        return "prompt-completion"
    if {"prefix", "suffix", "middle"} <= columns:
        return "fim"
    if "instruction" in columns:
        if "output" in columns or "response" in columns:
            return "alpaca"
        if "instances" in columns:
            return "self-instruct"
    return "question-answer" if "question" in columns and "answer" in columns else None


_ANSWER_COLUMNS = frozenset(
    ("output", "response", "answer", "completion", "middle", "chosen", "rejected", "instances", "text")
)


def missing_columns(values: Mapping[str, Any], shape: str) -> list[str]:
    """The columns that a row lacks to be of the shape, named by the first of each group."""
    return [group[0] for group in SHAPES[shape].needs if not any(column in values for column in group)]


def build(row: Row, shape: str, objective: Objective | None) -> Record | None:
    """The row as a Record of the shape; None, with `row.problems` filled, where it cannot be."""
    lacking = missing_columns(row.values, shape)
    for column in lacking:
        row.missing(column)
    if lacking:
        return None
    reading = SHAPES[shape].read(row, objective)
    if row.problems:
        return None
    extra = {name: value for name, value in row.values.items() if name not in row.used and value is not None}
    return Record(row.source, shape, reading.kind, reading.conversations, reading.labels, reading.later_turns, extra)


def unknown_shape(values: Mapping[str, Any]) -> tuple[str, str]:
    """The reason and the remedy for columns that make no known shape."""
    reason = f"no known shape has the columns {', '.join(map(repr, values)) or '(none)'}"
    best, renames, score = "alpaca", "instruction=…,output=…", 0.0
    for name in ("alpaca", "prompt-completion", "question-answer", "messages", "sharegpt", "preference"):
        groups = SHAPES[name].needs
        found = [_closest(group, values) for group in groups]
        exact = sum(column in group for group, column in zip(groups, found, strict=True))
        fit = (exact + sum(column != "…" for column in found)) / len(groups)
        if fit > score:
            pairs = [(group[0], column) for group, column in zip(groups, found, strict=True) if column not in group]
            best, renames, score = name, ",".join(f"{ours}={theirs}" for ours, theirs in pairs), fit
    return reason, f"nearest is {best}: name its columns with --columns {renames}, or the shape with --format"


_ALIKE = (("instruction", "prompt", "question", "query"), ("output", "response", "completion", "answer", "reply"))


def _closest(group: Sequence[str], values: Iterable[str]) -> str:
    """The column among `values` that may stand for one of the group, or "…"."""
    names = list(values)
    alike = [name for family in _ALIKE if group[0] in family for name in family if name in names]
    for column in group:
        if column in names:
            return column
    if alike:
        return alike[0]
    return next((close[0] for column in group if (close := difflib.get_close_matches(column, names, n=1))), "…")


def check_format(name: str | None) -> None:
    """Raises UsageError where `name` is no shape."""
    if name is not None and name not in SHAPES:
        raise UsageError(f"--format {name}: there is no such shape of rows", nearest(name, SHAPES))


def known_columns() -> frozenset[str]:
    """Every column that some shape uses."""
    needed = (column for shape in SHAPES.values() for group in shape.needs for column in group)
    optional = (column for shape in SHAPES.values() for column in shape.optional)
    return frozenset(("system", "tools", *needed, *optional))


# How each shape is read.


def _system(row: Row) -> list[Turn]:
    text = row.optional_text("system")
    return [Turn("system", Message("system", text))] if text.strip() else []


def _turns_of(row: Row, column: str) -> list[Turn] | None:
    """The conversation in a column, behind the row's own system prompt."""
    system = _system(row)
    turns = read_messages(row, column, row.structure(column))
    if turns is None:
        return None
    if not turns:
        row.bad(column, "is empty")
    if system and turns and turns[0].message.role == "system":
        row.bad("system", f"is given in the row and in {column}", "keep one of them")
    return system + turns


def _chat_column(row: Row) -> str:
    return row.first("messages", "conversations", "conversation")


def _check_answered(row: Row, turns: Sequence[Turn], column: str) -> None:
    if turns and not any(turn.message.role == "assistant" for turn in turns):
        row.bad(column, "has no assistant turn", "for prompts without answers use --format prompt")


def _check_end(row: Row, turns: Sequence[Turn], column: str) -> None:
    """The last turn must be the answer that is judged."""
    if turns and turns[-1].message.role != "assistant":
        row.bad(column, f"must end in an assistant turn, and ends in one of {turns[-1].message.role}")


def _read_messages(row: Row, objective: Objective | None) -> Reading:
    column = _chat_column(row)
    turns = _turns_of(row, column)
    tools = read_tools(row, "tools")
    if turns is None:
        return _nothing
    _check_answered(row, turns, column)
    last = turns[-1].message.role if turns else ""
    if last in ("user", "tool"):
        row.notes.add(f"ends in a {last} turn that nothing answers; that turn is context only")
    return Reading("conversation", (conversation(row, turns, tools),))


def _instructed(row: Row) -> Turn:
    instruction = row.text("instruction", empty=True)
    given = row.optional_text(row.first("input", "context"))
    if isinstance(row.values.get("instruction"), str) and not instruction.strip() and not given.strip():
        row.bad("instruction", "is empty")
    return Turn("instruction", asked(instruction, given))


def _history(row: Row) -> list[Turn]:
    """LLaMA-Factory's `history`: pairs of what was asked and answered before."""
    if not row.has("history"):
        return []
    pairs = row.structure("history")
    if pairs in ("", None):
        return []
    turns: list[Turn] = []
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            row.bad(f"history[{index}]", f"must be a pair of question and answer, and is {described(pair)}")
            continue
        for place, text in enumerate(pair):
            if not text.strip():
                row.bad(f"history[{index}][{place}]", "is empty")
        turns += [
            Turn(f"history[{index}][0]", Message("user", pair[0])),
            Turn(f"history[{index}][1]", Message("assistant", pair[1])),
        ]
    return turns


def _read_alpaca(row: Row, objective: Objective | None) -> Reading:
    turns = [*_system(row), *_history(row), _instructed(row)]
    column = row.first("output", "response")
    turns.append(Turn(column, Message("assistant", row.text(column))))
    return Reading("conversation", (conversation(row, turns, read_tools(row, "tools")),))


def _read_self_instruct(row: Row, objective: Objective | None) -> Reading:
    system = _system(row)
    instruction = row.text("instruction")
    tools = read_tools(row, "tools")
    instances = row.structure("instances")
    if not isinstance(instances, list) or not instances:
        row.bad("instances", f"must be a list of objects with input and output, and is {described(instances)}")
        return _nothing
    conversations = []
    for index, instance in enumerate(instances):
        place = f"instances[{index}]"
        if not isinstance(instance, Mapping):
            row.bad(place, f"must be an object with input and output, and is {described(instance)}")
            continue
        given, output = instance.get("input"), instance.get("output")
        if given is not None and not row.is_text(f"{place}.input", given):
            continue
        if row.is_text(f"{place}.output", output) and not str(output).strip():
            row.bad(f"{place}.output", f"the answer is empty: {described(output)}")
        question = Turn("instruction", asked(instruction, given or ""))
        answer = Turn(f"{place}.output", Message("assistant", str(output)))
        conversations.append(conversation(row, [*system, question, answer], tools))
    return Reading("conversation", tuple(conversations), ("",) * len(conversations))


def _read_question_answer(row: Row, objective: Objective | None) -> Reading:
    turns = [
        *_system(row),
        Turn("question", Message("user", row.text("question"))),
        Turn("answer", Message("assistant", row.text("answer"))),
    ]
    return Reading("conversation", (conversation(row, turns, read_tools(row, "tools")),))


def _said(row: Row, column: str, role: Literal["user", "assistant"]) -> list[Turn] | None:
    """A column that holds a text, a message or a list of messages."""
    value = row.values.get(column)
    if isinstance(value, (list, Mapping)):
        row.used.add(column)
        if value == []:
            row.bad(column, "is empty")
        return read_messages(row, column, value)
    return [Turn(column, Message(role, row.text(column)))]


def _completed(row: Row) -> tuple[Conversation, ...]:
    """Prompt and completion as one conversation, in which the prompt's own answers are not trained."""
    system, prompt, completion = _system(row), _said(row, "prompt", "user"), _said(row, "completion", "assistant")
    tools = read_tools(row, "tools")
    if prompt is None or completion is None:
        return ()
    context = [Turn(field, _untrained(message)) for field, message in prompt]
    if completion:
        _check_end(row, completion, "completion")
    return (conversation(row, [*system, *context, *completion], tools),)


def _untrained(message: Message) -> Message:
    if message.role != "assistant" or message.weight is not None:
        return message
    return Message(
        "assistant", message.content, message.reasoning_content, message.tool_calls, message.name, weight=0.0
    )


def _read_prompt_completion(row: Row, objective: Objective | None) -> Reading:
    return Reading("conversation", _completed(row))


def _read_transcript(row: Row, objective: Objective | None) -> Reading:
    turns = read_transcript(row, "text")
    if turns and not any(turn.message.role == "assistant" for turn in turns):
        row.bad("text", "is a transcript without an assistant turn", "--format text trains it as it stands")
    if turns and turns[-1].message.role == "user":
        row.notes.add("ends in a user turn that nothing answers; that turn is context only")
    return Reading("conversation", (conversation(row, turns, ()),))


def _read_text(row: Row, objective: Objective | None) -> Reading:
    return Reading("text", (Conversation((Message("assistant", row.text("text")),)),))


def _read_fim(row: Row, objective: Objective | None) -> Reading:
    middle = row.text("middle", empty=True)
    if middle == "" and isinstance(row.values.get("middle"), str):
        row.bad("middle", "is empty")
    messages = (_gap(row, "prefix"), Message("assistant", middle))
    return Reading("conversation", (Conversation(messages),))


def _gap(row: Row, before: str) -> Message:
    """The user's message of a fill-in-the-middle row: what stands before the gap, and after it."""
    return gap(row.text(before, empty=True), row.text("suffix", empty=True))


def may_be_labelled(values: Mapping[str, Any], shape: str | None) -> bool:
    """Whether a row of the shape would be a labelled one if its label, perhaps null, were a verdict."""
    return shape in ("prompt-completion", "messages", "sharegpt") and not missing_columns(values, "labelled")


def _label(values: Mapping[str, Any], *, numbers: bool = False) -> bool | None:
    """The row's verdict: true, false, or a cell of text that says so; of `numbers`, 1 and 0."""
    for column in ("label", "kto_tag"):
        value = values.get(column)
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        if numbers and isinstance(value, (int, float)) and value in (0, 1):
            return value == 1
    return None


def _read_labelled(row: Row, objective: Objective | None) -> Reading:
    row.used.add(row.first("label", "kto_tag"))
    good = _label(row.values, numbers=True)
    if good is None:
        column = row.first("label", "kto_tag")
        row.bad(column, f"must be true or false, and is {described(row.values.get(column))}")
    if row.has("prompt") and row.has("completion"):
        conversations = _completed(row)
    else:
        column = _chat_column(row)
        if column not in row.values:
            row.missing("completion" if row.has("prompt") else "messages")
            return _nothing
        turns = _turns_of(row, column)
        tools = read_tools(row, "tools")
        if turns is None:
            return _nothing
        _check_end(row, turns, column)
        conversations = (conversation(row, turns, tools),)
    if good and objective == "supervised":
        return Reading("conversation", conversations)
    return Reading("labelled", conversations, ("good" if good else "bad",))


# Preference pairs.


def _read_preference(row: Row, objective: Objective | None) -> Reading:
    tools = read_tools(row, "tools")
    prompt = _pair_prompt(row)
    row.empty_answers = objective != "supervised"  # such a pair teaches nothing, and is dropped and counted later
    chosen = _alternatives(row, "chosen", prompt)
    if len(chosen) > 1:
        row.bad("chosen", f"must be one answer, and holds {len(chosen)}")
    supervised = objective == "supervised"
    rejected = [] if supervised else _alternatives(row, "rejected", prompt)
    if prompt is None or row.problems:
        return _nothing
    wholes = [_whole(row, prompt, answer) for answer in chosen + rejected]
    if row.problems:
        return _nothing
    for column, whole in zip(["chosen"] + ["rejected"] * len(rejected), wholes, strict=True):
        _check_end(row, whole, column)
        check_order(row, whole)
    if not row.problems and not supervised:
        _check_shared(row, wholes)
    conversations = tuple(Conversation(tuple(turn.message for turn in whole), tools) for whole in wholes)
    if supervised:
        return Reading("conversation", conversations)
    return Reading("preference", conversations, ("chosen",) + ("rejected",) * len(rejected))


def _pair_prompt(row: Row) -> list[Turn] | None:
    """The prompt that stands in a column of its own; empty where the answers hold it; None where it is broken."""
    chat = _chat_column(row)
    if row.has("prompt"):
        prompt = _said(row, "prompt", "user")
        return None if prompt is None else _system(row) + prompt
    if row.has(chat):
        return _turns_of(row, chat)
    if row.has("instruction"):
        return [*_system(row), *_history(row), _instructed(row)]
    if row.has("question"):
        return [*_system(row), Turn("question", Message("user", row.text("question")))]
    return _system(row)


def _alternatives(row: Row, column: str, prompt: Sequence[Turn] | None) -> list[list[Turn]]:
    """The answers in `chosen` or `rejected`: one text, message or list of messages, or a list of several."""
    value = row.values.get(column)
    row.used.add(column)
    if isinstance(value, str):
        if prompt is not None and not any(turn.message.role == "user" for turn in prompt):
            return [read_transcript(row, column)]
        return [[Turn(column, Message("assistant", row.text(column, empty=row.empty_answers)))]]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        for index, item in enumerate(value):
            if not item.strip() and not row.empty_answers:
                row.bad(f"{column}[{index}]", f"the answer is empty: {described(item)}")
        return [[Turn(f"{column}[{index}]", Message("assistant", item))] for index, item in enumerate(value)]
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        several = [read_messages(row, f"{column}[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, (list, Mapping)) and value:
        several = [read_messages(row, column, value)]
    else:
        row.bad(column, f"must be an answer or a list of answers, and is {described(value)}")
        return []
    if [] in several:
        row.bad(column, "must be an answer, and holds an empty list")
    return [turns or [] for turns in several]


def _whole(row: Row, prompt: list[Turn], answer: list[Turn]) -> list[Turn]:
    """Prompt and answer as one conversation, where the answer may repeat the prompt."""
    lead = next((at for at, turn in enumerate(answer) if turn.message.role not in ("system", "developer")), len(answer))
    if lead == len(answer) or answer[lead].message.role != "user":
        return prompt + answer
    system = [turn for turn in prompt if turn.message.role in ("system", "developer")]
    asks = [turn for turn in prompt if turn.message.role not in ("system", "developer")]
    repeated = answer[lead : lead + len(asks)]
    if [turn.message for turn in repeated] != [turn.message for turn in asks]:
        row.bad(answer[lead].field, "does not begin with the prompt", "leave the prompt out of the answer")
    return (answer[:lead] or system) + answer[lead:]


def _check_shared(row: Row, wholes: Sequence[Sequence[Turn]]) -> None:
    """Every answer must answer the same prompt: where the conversations part, each goes on with the assistant."""
    shared = 0
    shortest = min(len(whole) for whole in wholes) - 1
    while shared < shortest and all(whole[shared].message == wholes[0][shared].message for whole in wholes):
        shared += 1
    for whole in wholes:
        if whole[shared].message.role != "assistant":
            row.bad(
                whole[shared].field,
                "the prompts of chosen and rejected differ: "
                + " against ".join(described(each[shared].message.content) for each in wholes[:2]),
                "both must answer the same prompt",
            )
            return


# Prompts without answers.


def _read_prompt(row: Row, objective: Objective | None) -> Reading:
    turns, later = _prompt_turns(row)
    tools = read_tools(row, "tools" if row.has("tools") else "function")
    if turns is None:
        return _nothing
    if turns and turns[-1].message.role == "assistant":
        row.bad(turns[-1].field, "a prompt ends before the answer, and this ends in an assistant turn")
    elif turns and turns[-1].message.role not in ("user", "tool"):
        row.bad(turns[-1].field, "a prompt must ask something, and this holds no user turn")
    return Reading("prompt", (conversation(row, turns, tools),), later_turns=tuple(later))


def _prompt_turns(row: Row) -> tuple[list[Turn] | None, list[tuple[Message, ...]]]:
    """The prompt, and what the user says after each answer to come."""
    chat = _chat_column(row)
    if row.has(chat):
        return _turns_of(row, chat), []
    if row.has("suffix") and (row.has("prefix") or row.has("prompt")):
        before = row.first("prefix", "prompt")
        return [Turn(before, _gap(row, before))], []
    if row.has("turns"):
        return _asked_in_turn(row)
    if row.has("prompt"):
        prompt = _said(row, "prompt", "user")
        return (None if prompt is None else _system(row) + prompt), []
    if isinstance(row.values.get("question"), list):
        return _messages_in_turn(row)
    if row.has("question"):
        return [*_system(row), Turn("question", Message("user", row.text("question")))], []
    if row.has("instruction"):
        return [*_system(row), *_history(row), _instructed(row)], []
    column = row.first("prompt", "question", "instruction", "turns", *_CHATS, "prefix")
    if row.has(column):
        column = "suffix"
    row.text(column)
    return None, []


def _asked_in_turn(row: Row) -> tuple[list[Turn] | None, list[tuple[Message, ...]]]:
    """MT-Bench's `turns`: what the user says, turn by turn."""
    turns = row.structure("turns")
    if not isinstance(turns, list) or not turns:
        row.bad("turns", f"must be a list of strings, and is {described(turns)}")
        return None, []
    for index, text in enumerate(turns):
        if row.is_text(f"turns[{index}]", text) and not text.strip():
            row.bad(f"turns[{index}]", "is empty")
    first, *others = [Message("user", str(text)) for text in turns]
    return [*_system(row), Turn("turns[0]", first)], [(message,) for message in others]


def _messages_in_turn(row: Row) -> tuple[list[Turn] | None, list[tuple[Message, ...]]]:
    """BFCL's `question`: a list of turns, each a list of messages; a later turn may be empty."""
    question = row.structure("question")
    if question and isinstance(question[0], Mapping):
        return read_messages(row, "question", question), []
    read = [read_messages(row, f"question[{index}]", turn) for index, turn in enumerate(question)]
    if not read or read[0] == []:
        row.bad("question", "is empty")
        return None, []
    later = [tuple(turn.message for turn in turns or []) for turns in read[1:]]
    return (None if read[0] is None else _system(row) + read[0]), later


_nothing = Reading("conversation", ())

_CHATS = ("messages", "conversations", "conversation")
SHAPES: dict[str, Shape] = {
    "alpaca": Shape((("instruction",), ("output", "response")), _read_alpaca, ("input", "context", "history")),
    "prompt-completion": Shape((("prompt",), ("completion",)), _read_prompt_completion),
    "messages": Shape((("messages",),), _read_messages),
    "sharegpt": Shape((("conversations", "conversation"),), _read_messages),
    "question-answer": Shape((("question",), ("answer",)), _read_question_answer),
    "self-instruct": Shape((("instruction",), ("instances",)), _read_self_instruct),
    "transcript": Shape((("text",),), _read_transcript),
    "fim": Shape((("prefix",), ("suffix",), ("middle",)), _read_fim),
    "preference": Shape((("chosen",), ("rejected",)), _read_preference),
    "labelled": Shape((("label", "kto_tag"), (*_CHATS, "prompt")), _read_labelled),
    "text": Shape((("text",),), _read_text),
    "prompt": Shape(
        (("prompt", "question", "instruction", "turns", *_CHATS, "prefix"),), _read_prompt, ("function", "suffix")
    ),
}
