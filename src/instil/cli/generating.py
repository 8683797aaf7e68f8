"""What the commands that generate have in common: which model, where answers go, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.data.options import Given
from instil.errors import UsageError
from instil.inference.options import SamplingOptions
from instil.model.options import ModelOptions
from instil.prompt.inspect import VISIBLE
from instil.prompt.options import PromptOptions

if TYPE_CHECKING:
    from instil.inference.load import Loaded
    from instil.inference.session import Reply


_INERT = {code: sign for code, sign in VISIBLE.items() if chr(code) not in " \n\t"}


class LoadOptions(Given):
    """A model that is to generate, and how it is held."""

    model: str = Field(description="Model or adapter: a folder or a hub name, with weights in safetensors.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What is computed in; auto: bf16 where the hardware has it."
    )
    quantize: Literal["none", "nf4"] = Field(default="none", description="Hold the linear layers in 4 bits.")
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; only from a source you trust."
    )

    def of(self, model: str) -> ModelOptions:
        """A model, held as these say."""
        names = ("precision", "quantize", "trust_remote_code")
        return ModelOptions.model_validate({"model": model} | {name: getattr(self, name) for name in names})


class GenerationOptions(LoadOptions, SamplingOptions):
    """A model, how it generates, and where its answers go."""

    as_json: Annotated[bool, Parameter(name="--json", negative=())] = Field(
        default=False, description="Print JSON objects, a line each."
    )
    output: Path | None = Field(default=None, description="Write these JSON objects to a new file instead.")

    @model_validator(mode="after")
    def _can_be_written(self) -> GenerationOptions:
        if self.output is not None:
            check_new(self.output)
        return self

    def load(self, prompt: PromptOptions | None = None) -> Loaded:
        """The model.

        Args:
            prompt: Chooses its chat template.

        Raises:
            UsageError: What runs a model is not installed.
            ModelError, TokenizerError: It cannot be loaded.
        """
        try:
            from instil.inference.load import load_engine
        except ModuleNotFoundError as error:
            raise missing(error) from error
        return load_engine(self.of(self.model), prompt)


def shown(values: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def notes(reply: Reply) -> Iterator[str]:
    """What a person should know of a reply besides its text."""
    if reply.dropped_turns:
        turns = "turn was" if reply.dropped_turns == 1 else f"{reply.dropped_turns:,} turns were"
        yield f"the oldest {turns} left out, so that the prompt fits into the model's context"
    ended = {each.ended for each in reply.answers}
    if "length" in ended:
        yield "an answer was cut off (--max-new-tokens)"
    if "context" in ended:
        yield "an answer was cut off: the model's context is full"


def inert(text: str) -> str:
    """The text as a terminal may show it: what would act on it, by signs."""
    return text.translate(_INERT)


def missing(error: ModuleNotFoundError) -> UsageError:
    """The error of a package that is not installed."""
    return UsageError(f"generation needs the package {error.name!r}", "pip install 'instil[train]'")


def standard_input() -> str:
    """All of it, less the line break at its end, which `echo` and editors put there.

    Raises:
        UsageError: It is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: byte {error.start + 1} is not UTF-8", "Convert the text to UTF-8.") from error


@contextmanager
def progress(prompts: int) -> Iterator[Callable[[int], Any] | None]:
    """A bar on standard error, in a terminal; what it is to be told of each prompt."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=prompts)
        yield lambda _: bar.advance(task)


def check_new(path: Path) -> None:
    """Refuse an output that is there already, or has no folder to be in."""
    if path.exists():
        raise UsageError(f"--output {path}: is there already", "Name a new file.")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist", "Name a file in one that does.")


def save(path: Path, lines: Iterable[str]) -> None:
    """Write the file whole, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        os.replace(draft, path)
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written: {error.strerror}", "Name another file.") from error
    finally:
        draft.unlink(missing_ok=True)
