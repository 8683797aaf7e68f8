"""`instil complete`: a model goes on with a text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.data.strict_json import lone_surrogate
from instil.errors import DataError, RowProblem, UsageError
from instil.inference.options import SamplingOptions
from instil.inference.prompts import Prompt, read_prompts
from instil.model.options import ModelOptions

if TYPE_CHECKING:
    from instil.inference.engine import Answer
    from instil.inference.load import Loaded

_GIVE = "Give --prompt TEXT, --prompts FILE, or a text on standard input."


class CompleteOptions(SamplingOptions):
    """Everything that `instil complete` takes."""

    model: str = Field(description="Model or adapter: a folder or a hub name, with weights in safetensors.")
    prompt: list[str] = Field(default_factory=list, description="Text to go on with; may be given several times.")
    prompts: str | None = Field(
        default=None,
        description='File of prompts: a JSON object {"prompt": ...} on each line, or, in .txt, the prompt itself; '
        "- for standard input.",
    )
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = Field(
        default=False, description="Print a JSON object for each answer."
    )
    output: Path | None = Field(default=None, description="Write these JSON objects to a new file instead.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What is computed in; auto: bf16 where the hardware has it."
    )
    quantize: Literal["none", "nf4"] = Field(default="none", description="Hold the linear layers in 4 bits.")
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; only from a source you trust."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CompleteOptions:
        if not self.model:
            raise UsageError("--model: is empty (a shell variable that is not set?)", "Name a folder or a hub name.")
        if self.prompt and self.prompts is not None:
            raise UsageError("--prompt and --prompts: both were given", "Give one.")
        if self.prompts == "":
            raise UsageError("--prompts: is empty (a shell variable that is not set?)", "Name a file of prompts.")
        if self.output is not None:
            _check_new(self.output)
        return self


def complete(*, options: Annotated[CompleteOptions, Parameter(name="*")]) -> None:
    """Go on with texts as the model would, with no chat template: what it learned from plain text.

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    prompts = _prompts(options)
    loaded = _load(options)
    ids = _encoded(loaded, prompts)
    chosen = loaded.engine.sampling(options)
    said = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in chosen.to_json().items())
    sys.stderr.write(f"instil: {said}\n")
    if loaded.engine.one_by_one:
        sys.stderr.write(f"instil: note: answers are generated one by one: {loaded.engine.one_by_one}\n")
    if len(prompts) == options.answers == 1 and not options.as_json and options.output is None:
        loaded.engine.generate(ids, options, on_text=_write)
        sys.stdout.write("\n")
        return
    with _progress(len(prompts)) as done:
        answers = loaded.engine.generate(ids, options, on_done=done)
    if options.output is not None:
        _save(options.output, _lines(prompts, answers))
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
    text = "" if sys.stdin.isatty() else _standard_input()
    if not text:
        raise UsageError("--prompt: is missing, and nothing stands on standard input", _GIVE)
    return [Prompt("stdin", text)]


def _standard_input() -> str:
    """All of it, less the line break at its end, which `echo` and editors put there."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: byte {error.start + 1} is not UTF-8", "Convert the text to UTF-8.") from error


def _load(options: CompleteOptions) -> Loaded:
    try:
        from instil.inference.load import load_engine
    except ModuleNotFoundError as error:
        raise UsageError(f"generation needs the package {error.name!r}", "pip install 'instil[train]'") from error
    names = ("model", "precision", "quantize", "trust_remote_code")
    return load_engine(ModelOptions.model_validate({name: getattr(options, name) for name in names}))


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
    sys.stdout.write(piece)
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


@contextmanager
def _progress(prompts: int) -> Iterator[Callable[[int], Any] | None]:
    """A bar on standard error, in a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=prompts)
        yield lambda _: bar.advance(task)


def _check_new(path: Path) -> None:
    if path.exists():
        raise UsageError(f"--output {path}: is there already", "Name a new file.")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist", "Name a file in one that does.")


def _save(path: Path, lines: Iterator[str]) -> None:
    """Write the file whole, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        os.replace(draft, path)
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written: {error.strerror}", "Name another file.") from error
    finally:
        draft.unlink(missing_ok=True)
