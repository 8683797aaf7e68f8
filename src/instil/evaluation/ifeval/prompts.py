"""The prompt file: what is asked, and which instructions the answers will be checked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instil.conversation import Source
from instil.data.files import LocalFile
from instil.data.row import described
from instil.data.sources import find
from instil.errors import RowProblem, UsageError, nearest
from instil.evaluation.ifeval.checks import CHECKS, RELATIONS
from instil.evaluation.ifeval.language import LANGUAGES

_SHOWN = 100
_COLUMNS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One verifiable instruction of a prompt.

    Args:
        id: One of the 25, as `punctuation:no_comma`.
        arguments: What it needs by name, no more and no less, as `{"num_words": 300, "relation": "at least"}`.
    """

    id: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class IfevalPrompt:
    """A prompt with the instructions that it holds.

    Args:
        key: What it is called in its file, as no other there.
        prompt: The text that the model is asked.
        instructions: At least one.
        source: Where it stands.
    """

    key: int | str
    prompt: str
    instructions: tuple[Instruction, ...]
    source: Source


def read_prompts(path: str | Path) -> list[IfevalPrompt]:
    """The prompts of a file, every row of it checked.

    The format is the published one (Zhou et al., 2023): JSON lines with `key`, `prompt`, `instruction_id_list`, and
    `kwargs`, an object of arguments for each id in turn. An argument that is null is as good as absent.

    Args:
        path: The file, which gzip or Zstandard may have compressed.

    Raises:
        UsageError: The file cannot be read or holds no prompts, or there are rows that cannot be checked: an
            unknown id, arguments that are missing, unknown, or of another kind than the id needs, not as many kwargs
            as ids, a key that stands twice. All of them are named.
        DataError: There is no such file.
    """
    prompts: list[IfevalPrompt] = []
    problems: list[RowProblem] = []
    seen: dict[int | str, Source] = {}
    find(path)
    for pending in LocalFile(str(path), Path(path), "jsonl").rows(lambda note: None):
        row = pending.read()
        if row.values is None:
            problems.append(RowProblem(str(row.source), "", row.reason, row.remedy))
            continue
        found = _Checked(row.source, row.values)
        problems += found.problems
        key: Any = row.values.get("key")
        if _is_key(key):
            if key in seen:
                problems.append(RowProblem(str(row.source), "key", f"{key!r} stands at {seen[key]} already"))
            seen.setdefault(row.values["key"], row.source)
        if not problems:
            prompts.append(IfevalPrompt(row.values["key"], row.values["prompt"], found.instructions, row.source))
    if problems:
        lines = [f"\n  {problem}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"\n  ... and {len(problems) - _SHOWN:,} more")
        raise UsageError(
            f"{path}: prompts that cannot be checked{''.join(lines)}", "Mend these rows, or take them out."
        )
    if not prompts:
        raise UsageError(f"{path}: holds no prompts", "Give a file with a JSON object on each line.")
    return prompts


class _Checked:
    """What a row asks for, and everything wrong with it."""

    def __init__(self, source: Source, values: Mapping[str, Any]) -> None:
        self.problems: list[RowProblem] = []
        self.instructions: tuple[Instruction, ...] = ()
        self._source = str(source)
        missing = [column for column in _COLUMNS if column not in values]
        for column in missing:
            self._bad(column, "is missing", nearest(column, values))
        if missing:
            return
        key, prompt, ids, kwargs = (values[column] for column in _COLUMNS)
        if not _is_key(key):
            self._bad("key", f"must be a number without a fraction, or a string, and is {described(key)}")
        if not _is_text(prompt):
            self._bad("prompt", f"must be {_TEXT}, and is {described(prompt)}")
        if not isinstance(ids, list) or not ids:
            self._bad("instruction_id_list", f"must be a list of at least one id, and is {described(ids)}")
        elif not isinstance(kwargs, list):
            self._bad("kwargs", f"must be a list of objects, and is {described(kwargs)}")
        elif len(ids) != len(kwargs):
            self._bad("kwargs", f"has {len(kwargs)} entries for {len(ids)} ids", "give {} to an id that needs nothing")
        else:
            self.instructions = tuple(
                Instruction(name, self._arguments(number, name, given))
                for number, (name, given) in enumerate(zip(ids, kwargs, strict=True))
            )

    def _arguments(self, number: int, name: Any, given: Any) -> Mapping[str, Any]:
        """The arguments of one instruction, all that are wrong noted."""
        if not isinstance(name, str) or name not in CHECKS:
            self._bad(f"instruction_id_list[{number}]", f"unknown: {described(name)}", nearest(str(name), CHECKS))
            return {}
        place = f"kwargs[{number}]"
        if not isinstance(given, Mapping):
            self._bad(place, f"must be an object, and is {described(given)}")
            return {}
        arguments = {argument: value for argument, value in given.items() if value is not None}
        needed = list(inspect.signature(CHECKS[name]).parameters)[1:]
        for argument in needed:
            allowed, what = _KINDS[argument]
            if argument not in arguments:
                self._bad(f"{place}.{argument}", f"is missing, and {name} needs it", f"give {what}")
            elif not allowed(arguments[argument]):
                self._bad(f"{place}.{argument}", f"must be {what}, and is {described(arguments[argument])}")
        for argument in (argument for argument in arguments if argument not in needed):
            remedy = nearest(argument, needed) if needed else "give {}"
            self._bad(f"{place}.{argument}", f"is not an argument of {name}", remedy)
        nth, last = arguments.get("nth_paragraph", 1), arguments.get("num_paragraphs", 1)
        if _is_count(nth) and _is_count(last) and nth > last:
            self._bad(f"{place}.nth_paragraph", f"is {nth}, and there are to be {last} paragraphs")
        return arguments

    def _bad(self, field: str, reason: str, remedy: str = "") -> None:
        self.problems.append(RowProblem(self._source, field, reason, remedy))


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


_TEXT = "a string that is not blank"
_COUNT = (_is_count, "a number without a fraction, 1 or more")
_RELATION = (lambda value: value in RELATIONS, " or ".join(map(repr, RELATIONS)))
_TEXTS = (_is_texts, "a list of at least one string, none blank")
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        (
            "capital_frequency",
            "frequency",
            "let_frequency",
            "nth_paragraph",
            "num_bullets",
            "num_highlights",
            "num_paragraphs",
            "num_placeholders",
            "num_sections",
            "num_sentences",
            "num_words",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("capital_relation", "let_relation", "relation"), _RELATION),
    **dict.fromkeys(("forbidden_words", "keywords"), _TEXTS),
    **dict.fromkeys(
        ("end_phrase", "first_word", "keyword", "postscript_marker", "prompt_to_repeat", "section_spliter"),
        (_is_text, _TEXT),
    ),
    "language": (lambda value: isinstance(value, str) and value in LANGUAGES, f"one of {', '.join(sorted(LANGUAGES))}"),
    "letter": (lambda value: _is_text(value) and len(value) == 1, "a single character"),
}
"""Of each argument, whether a value will do, and what will do in words."""
