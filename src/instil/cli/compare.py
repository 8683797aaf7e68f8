"""`instil compare`: the answers of two or more models to the same prompts, side by side."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.cli.chat import ChatOptions, answers, prompts
from instil.cli.generating import inert, missing, notes, shown
from instil.cli.rows import check_page, write_page
from instil.errors import UsageError
from instil.evaluation.report import Answered, Page, to_html

if TYPE_CHECKING:
    from instil.conversation import Record
    from instil.inference.session import Reply

_NARROW = 36  # characters of a column, below which answers stand below each other


class CompareOptions(ChatOptions):
    """Everything that `instil compare` takes, but for the models."""

    model: Annotated[str, Parameter(parse=False)] = Field(default="", description="Each of them in its turn.")
    output: Annotated[Path | None, Parameter(parse=False)] = None
    html: Path | None = Field(default=None, description="Write a page of its own, with differences marked.")

    @model_validator(mode="after")
    def _asks(self) -> CompareOptions:
        if self.prompt is None and self.prompts is None:
            raise UsageError("--prompts: is missing, and so is --prompt", "Give --prompts FILE or --prompt TEXT.")
        if self.html is not None and self.as_json:
            raise UsageError("--html and --json: both were given", "Give one.")
        if self.html is not None:
            check_page(self.html)
        return self


def compare(*models: str, options: Annotated[CompareOptions | None, Parameter(name="*")] = None) -> None:
    """Show the answers of two or more models to the same prompts, side by side.

    Settings may stand in a YAML file as well: --config FILE; flags override it.

    Args:
        models: Models or adapters: folders or hub names, with weights in safetensors.
    """
    options = options or CompareOptions()  # which says what is missing
    _check(models, options)
    given = prompts(options)
    said: dict[str, list[Reply]] = {}
    about: dict[str, Any] = {}
    for number, model in enumerate(models, 1):
        sys.stderr.write(f"instil: model {number} of {len(models)}: {inert(model)}\n")
        said[model], about[model] = _asked(options.model_copy(update={"model": model}), given)
        sys.stderr.write(f"instil: {about[model]}\n")
    for model, replies in said.items():
        for record, reply in zip(given, replies, strict=True):
            for note in notes(reply):
                sys.stderr.write(f"instil: note: {inert(model)}: {record.source}: {note}\n")
    if options.html is not None:
        write_page(options.html, to_html(_page(given, said, about)))
        sys.stderr.write(f"instil: wrote {options.html}\n")
    elif options.as_json:
        for number, record in enumerate(given):
            found = [{"model": model, **replies[number].to_json()} for model, replies in said.items()]
            sys.stdout.write(json.dumps({"source": str(record.source), "models": found}, ensure_ascii=False) + "\n")
    else:
        _show(given, said)


def _check(models: Sequence[str], options: ChatOptions) -> None:
    """Refuse models that cannot be asked, before the first of them is loaded."""
    if len(models) < 2:
        raise UsageError(f"{len(models)} model{'s' * (not models)} to compare", "Name two or more: instil compare A B.")
    twice = [model for model in models if models.count(model) > 1]
    if twice:
        raise UsageError(f"{twice[0]}: is named twice", "Name each model once.")
    try:
        from instil.inference.load import renderer_of, tokenizer_of
    except ModuleNotFoundError as error:
        raise missing(error) from error
    from instil.model.options import ModelOptions

    for model in models:
        renderer_of(tokenizer_of(ModelOptions(model=model)), options.prompt_options())


def _asked(options: ChatOptions, given: Sequence[Record]) -> tuple[list[Reply], str]:
    """What a model, which is in memory no longer than that, answers; and how."""
    from instil.cli.train import hush
    from instil.inference.session import Chat

    hush()
    chat = Chat(options.load(options.prompt_options()))
    if chat.engine.one_by_one:
        sys.stderr.write(f"instil: note: answers are generated one by one: {chat.engine.one_by_one}\n")
    how = f"template {chat.renderer.template.name}, {shown(chat.engine.sampling(options).to_json())}"
    replies = answers(chat, given, options)
    del chat
    free()
    return replies, how


def free() -> None:
    """Give the memory of models back that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _text(record: Record, reply: Reply) -> str:
    """What a model said: its answer to each turn, and where there are several answers to the last, all of them."""
    before = reply.conversation.messages[len(record.conversations[0].messages) :]
    turns = [f"> {each.content}" if each.role == "user" else each.content for each in before]
    last = [
        f"[answer {number}]\n{each.message.content}" if len(reply.answers) > 1 else each.message.content
        for number, each in enumerate(reply.answers, 1)
    ]
    return "\n\n".join((*turns, *last))


def _prompt(record: Record) -> str:
    return record.conversations[0].messages[-1].content


def _show(given: Sequence[Record], said: Mapping[str, Sequence[Reply]]) -> None:
    """In columns where a terminal has room for them, else below each other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    beside = console.is_terminal and console.width // len(said) >= _NARROW
    show = inert if console.is_terminal else str
    for number, record in enumerate(given):
        console.print(Text(f"[{record.source}] {show(_prompt(record))}", "bold"), soft_wrap=True)
        texts = {show(model): show(_text(record, replies[number])) for model, replies in said.items()}
        if not beside:
            for model, text in texts.items():
                sys.stdout.write(f"[{model}]\n{text}\n\n")
            continue
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for model in texts:
            table.add_column(Text(model), ratio=1, overflow="fold")
        table.add_row(*map(Text, texts.values()))
        console.print(table, "")


def _page(given: Sequence[Record], said: Mapping[str, Sequence[Reply]], about: Mapping[str, Any]) -> Page:
    return Page(
        title="Models side by side",
        summary=f"{len(given):,} prompts, each answered by {len(said)} models.",
        about=about,
        compared=(),
        answered=[
            Answered(_prompt(record), [(model, _text(record, replies[number])) for model, replies in said.items()])
            for number, record in enumerate(given)
        ],
    )
