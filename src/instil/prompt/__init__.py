"""Conversations to exchanges: chat templates, rendering, encoding, inspection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from instil.conversation import Record
from instil.prompt.encode import EncodedRecord, RecordEncoder
from instil.prompt.exchange import Exchange
from instil.prompt.options import PromptOptions
from instil.prompt.render import Renderer
from instil.prompt.template import ChatTemplate, builtin_templates, load_template
from instil.prompt.tokenizer import Tokenizer, from_transformers, load_tokenizer

__all__ = [
    "ChatTemplate",
    "EncodedRecord",
    "Exchange",
    "PromptOptions",
    "RecordEncoder",
    "Renderer",
    "Tokenizer",
    "builtin_templates",
    "exchanges",
    "load_renderer",
    "load_template",
    "load_tokenizer",
]

_CHUNK = 64


def load_renderer(tokenizer: Any, options: PromptOptions) -> Renderer:
    """The template that the options choose, bound to a tokenizer.

    Args:
        tokenizer: A folder or hub name, a `Tokenizer`, or a fast tokenizer of transformers.
        options: Names the template and its arguments.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = from_transformers(tokenizer)
    return Renderer(load_template(options.template, tokenizer, options.template_args), tokenizer)


def exchanges(
    records: Iterable[Record], tokenizer: Any, *, objective: str | None = None, **options: Any
) -> Iterator[EncodedRecord]:
    """What each record teaches: its exchanges, token by token, in the order of the records.

    Args:
        records: As `instil.read` gives them.
        tokenizer: A folder or hub name, or a fast tokenizer of transformers.
        objective: As given to `instil.read`.
        options: The fields of `PromptOptions`: `template`, `train_on`, `prompt_weight`, `max_length`, …

    Returns:
        One result for each record; what is wrong with a row stands in its `problems`.

    Raises:
        TokenizerError, TemplateError: The tokenizer or the template cannot be used.
    """
    chosen = PromptOptions(**options)
    renderer = load_renderer(tokenizer, chosen)
    encoder = RecordEncoder(renderer, chosen, chosen.max_length or renderer.tokenizer.max_length, objective)
    stream = iter(records)
    while chunk := list(islice(stream, _CHUNK)):
        yield from encoder.encode(chunk)
