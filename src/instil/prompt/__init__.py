"""Conversations to exchanges: chat templates, rendering, encoding, inspection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from instil.conversation import Record
from instil.errors import UsageError, nearest
from instil.prompt.encode import EncodedRecord, RecordEncoder
from instil.prompt.exchange import Exchange
from instil.prompt.options import PromptOptions
from instil.prompt.render import Renderer
from instil.prompt.template import ChatTemplate, builtin_templates, load_template, no_template
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
    "longest_exchange",
    "prompt_options",
]

_CHUNK = 64


def load_renderer(tokenizer: Any, options: PromptOptions, *, text: bool = False) -> Renderer:
    """The template that the options choose, bound to a tokenizer.

    Args:
        tokenizer: A folder or hub name, a `Tokenizer`, or a fast tokenizer of transformers.
        options: Names the template and its arguments.
        text: Whether plain text is what it is for: where there is no template, none is needed.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = from_transformers(tokenizer)
    if text and options.template is None and not tokenizer.chat_template:
        return Renderer(no_template(tokenizer), tokenizer)
    return Renderer(load_template(options.template, tokenizer, options.template_args), tokenizer)


def prompt_options(options: PromptOptions | None = None, **changes: Any) -> PromptOptions:
    """Options given whole, by name, or both.

    Raises:
        UsageError: A name that is no option, with the nearest one that is, or a value that an option cannot have.
    """
    for name in changes:
        if name not in PromptOptions.model_fields:
            raise UsageError(f"{name}: there is no such option of prompts", nearest(name, PromptOptions.model_fields))
    try:
        changed = PromptOptions(**changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{first['loc'][0]} = {first['input']!r}: {first['msg']}") from error
    return changed if options is None else options.model_copy(update={name: getattr(changed, name) for name in changes})


def longest_exchange(renderer: Renderer, options: PromptOptions, tokens_per_batch: int | None = None) -> int | None:
    """The most tokens an exchange may have: as chosen, or the smaller of the model's limit and a batch."""
    limits = [limit for limit in (renderer.tokenizer.max_length, tokens_per_batch) if limit is not None]
    return options.max_length or min(limits, default=None)


def exchanges(
    records: Iterable[Record], tokenizer: Any, options: PromptOptions | None = None, **changes: Any
) -> Iterator[EncodedRecord]:
    """What each record teaches: its exchanges, token by token, in the order of the records.

    Args:
        records: As `instil.read` gives them.
        tokenizer: A folder or hub name, or a fast tokenizer of transformers.
        options: The template, what is trained and what is too long.
        changes: Fields of the options by name: `template="chatml"`, `prompt_weight=0.1`, …

    Returns:
        One result for each record; what is wrong with a row stands in its `problems`.

    Raises:
        UsageError, TokenizerError, TemplateError: An option, the tokenizer or the template cannot be used.
    """
    chosen = prompt_options(options, **changes)
    objective = getattr(records, "objective", None)
    renderer = load_renderer(tokenizer, chosen, text=objective == "pretrain")
    return _encoded(iter(records), RecordEncoder(renderer, chosen, longest_exchange(renderer, chosen), objective))


def _encoded(records: Iterator[Record], encoder: RecordEncoder) -> Iterator[EncodedRecord]:
    while chunk := list(islice(records, _CHUNK)):
        yield from encoder.encode(chunk)
