"""`instil complete`: a model goes on with a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.cli.generating import GenerationOptions, inert, progress, save, shown, standard_input
from instil.data.strict_json import lone_surrogate
from instil.errors import DataError, RowProblem, UsageError
from instil.inference.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from instil.inference.engine import Answer
    from instil.inference.load import Loaded

_GIVE = "Give --prompt TEXT, --prompts FILE, or a text on standard input."


class CompleteOptions(GenerationOptions):
    """Everything that `instil complete` takes."""

    may_be_empty = ("prompt",)  # where the tokenizer begins a text with a token of its own

    prompt: list[str] = Field(default_factory=list, description="Text to go on with; may be given several times.")
    prompts: str | None = Field(
        default=None,
        description='File of prompts: a JSON object {"prompt": ...} on each line, or, in .txt, the prompt itself; '
        "- for standard input.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CompleteOptions:
        if self.prompt and self.prompts is not None:
            raise UsageError("--prompt and --prompts: both were given", "Give one.")
        return self


def complete(*, options: Annotated[CompleteOptions, Parameter(name="*")]) -> None:
    """Go on with texts as the model would, with no chat template: what it learned from plain text.

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    prompts = _prompts(options)
    loaded = options.load()
    ids = _encoded(loaded, prompts)
    sys.stderr.write(f"instil: {shown(loaded.engine.sampling(options).to_json())}\n")
    if loaded.engine.one_by_one:
        sys.stderr.write(f"instil: note: answers are generated one by one: {loaded.engine.one_by_one}\n")
    if len(prompts) == options.answers == 1 and not options.as_json and options.output is None:
        loaded.engine.generate(ids, options, on_text=_write)
        sys.stdout.write("\n")
        return
    with progress(len(prompts)) as done:
        answers = loaded.engine.generate(ids, options, on_done=done)
    if options.output is not None:
        save(options.output, _lines(prompts, answers))
        sys.stderr.write(f"instil: wrote {options.output}\n")
        return
    for line in _lines(prompts, answers) if options.as_json else _texts(prompts, answers):
        sys.stdout.write(line)


def _prompts(options: CompleteOptions) -> list[Prompt]:
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.prompt:
        alone = len(options.prompt) == 1
        return [Prompt("--prompt" if alone else f"--prompt {n}", text) for n, text in enumerate(options.prompt, 1)]
    text = "" if sys.stdin.isatty() else standard_input()
    if not text:
        raise UsageError("--prompt: is missing, and nothing stands on standard input", _GIVE)
    return [Prompt("stdin", text)]


def _encoded(loaded: Loaded, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of the prompts; all those that cannot be are refused together."""
    encoded, problems = [], []
    context = loaded.engine.context
    for prompt in prompts:
        half = lone_surrogate(prompt.text)  # of bytes in the command line that are no UTF-8
        ids = [] if half else loaded.encode(prompt.text)
        encoded.append(ids)
        if half:
            problem = "is not UTF-8", "convert the text to UTF-8"
        elif not ids:
            problem = "is empty, and the tokenizer begins a text with no token of its own", "give some text"
        elif context and len(ids) >= context:
            problem = f"has {len(ids):,} tokens, and the model takes {context:,} with its answer", "shorten it"
        else:
            continue
        problems.append(RowProblem(prompt.source, "", *problem))
    if problems:
        raise DataError("there are prompts that the model cannot go on with", problems=problems)
    return encoded


def _write(prompt: int, answer: int, piece: str) -> None:
    sys.stdout.write(inert(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _lines(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Iterator[str]:
    """A JSON object for each answer, each on a line."""
    for prompt, own in zip(prompts, answers, strict=True):
        for number, each in enumerate(own):
            row = {
                "prompt": prompt.text,
                "answer": number,
                "text": each.text,
                "ended": each.ended,
                "tokens": len(each.ids),
                "logprob": each.logprob,
            }
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _texts(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Iterator[str]:
    """Each answer below a line that says which it is."""
    for prompt, own in zip(prompts, answers, strict=True):
        for number, each in enumerate(own, 1):
            yield f"[{prompt.source}{f', answer {number}' if len(own) > 1 else ''}]\n{each.text}\n\n"
