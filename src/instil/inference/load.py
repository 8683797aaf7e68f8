"""From a folder to an engine: the model, its tokenizer and template, the tokens it stops at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instil.errors import ModelError, TemplateError, TokenizerError
from instil.inference.engine import Engine
from instil.model.load import base_of, check_vocabulary, load_model, product_dtype
from instil.model.options import ModelOptions
from instil.model.tokens import reserve_tokens
from instil.prompt import PromptOptions, Renderer, Tokenizer, builtin_templates, load_renderer, load_tokenizer
from instil.prompt.tokenizer import Encoder


class Loaded:
    """A model that generates, and what turns texts and conversations into its prompts.

    Args:
        engine: The model.
        tokenizer: Its tokenizer.
        prompt: Chooses the chat template; the tokenizer's own by default.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prompt: PromptOptions | None = None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompt = prompt or PromptOptions()

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template: one that was chosen, or the tokenizer's own."""
        return bool(self.prompt.template or self.tokenizer.chat_template)

    @cached_property
    def renderer(self) -> Renderer:
        """Renders conversations with the chat template.

        Raises:
            UsageError, TemplateError: There is no such template, or the tokenizer has none.
            TokenizerError: The template needs tokens that the model does not know.
        """
        return renderer_of(self.tokenizer, self.prompt)

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes text: the template's, if the tokenizer has one that can be used."""
        if self.prompt.template is None:
            try:
                return self.renderer.encoder
            except (TemplateError, TokenizerError):
                pass
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return Encoder(self.tokenizer, [token.content for token in added if token.special])

    def encode(self, text: str) -> list[int]:
        """The prompt that a plain text makes, as plain text is trained: behind BOS, if the tokenizer adds it itself;
        what spells a control token is text.
        """
        bos = self.tokenizer.bos_token
        start = self.tokenizer.backend.token_to_id(bos) if bos is not None else None
        spelled = frozenset(found.start() for found in self.encoder.pattern.finditer(text))
        return [*([] if start is None else [start]), *self.encoder.encode(text, spelled)]


def renderer_of(tokenizer: Tokenizer, prompt: PromptOptions) -> Renderer:
    """The renderer of a model that is to answer, whose tokenizer has all that the template needs.

    Raises:
        UsageError, TemplateError: There is no such template, or the tokenizer has none.
        TokenizerError: The template needs tokens that the model does not know.
    """
    before = tokenizer.added
    found = load_renderer(tokenizer, prompt)
    new = tokenizer.added[len(before) :]
    if new:
        raise TokenizerError(
            f"{tokenizer.name}: has no token {', '.join(map(repr, new[:3]))}, which the template "
            f"{found.template.name!r} needs",
            "Choose the template that the model was trained with.",
        )
    return found


def load_engine(options: ModelOptions, prompt: PromptOptions | None = None) -> Loaded:
    """Load a model to generate with: on the GPU if there is one; in bf16 where the hardware has it, else in float32.

    Args:
        options: Where the model is: a folder or a hub name, of a whole model or of an adapter, which is merged.
        prompt: Chooses the chat template; the tokenizer's own by default.

    Raises:
        ModelError, TokenizerError: There is no such model, or something of it is missing or does not fit.
    """
    tokenizer = tokenizer_of(options)
    model = load_model(options, dtype=product_dtype(options.precision))
    check_vocabulary(model, tokenizer)
    found = _generation_config(options, model)
    try:
        model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{options.model}: the model does not fit on the GPU: {str(error).splitlines()[0]}",
            "Hold it in 4 bits (--quantize nf4), or choose a smaller one.",
        ) from error
    engine = Engine(model.requires_grad_(False), tokenizer, stop_ids(found, tokenizer), generation_config=found)
    return Loaded(engine, tokenizer, prompt)


def load_base(options: ModelOptions, tuned: Loaded) -> Loaded:
    """Load a base model to be asked beside one that was tuned from it: with the very ids that the tuned one is asked
    with. It gets rows for the tokens it lacks, untrained, as tuning began with.

    Args:
        options: Where the base is.
        tuned: The model tuned from it.

    Raises:
        ModelError, TokenizerError: There is no such model; or its tokens are others, so it is no base of that one.
    """
    own, common = tokenizer_of(options), tuned.tokenizer
    known = own.backend.get_vocab(with_added_tokens=True)
    added = common.backend.get_added_tokens_decoder()
    own.add_special_tokens(added[number].content for number in sorted(added) if added[number].content not in known)
    if own.backend.get_vocab(with_added_tokens=True) != common.backend.get_vocab(with_added_tokens=True):
        raise ModelError(
            f"{options.model}: has other tokens than {common.name}, and so is no base of it",
            "Name the model that it was tuned from, or leave the base out.",
        )
    model = load_model(options, dtype=product_dtype(options.precision))
    template = builtin_templates().get(tuned.renderer.template.name) if tuned.has_template else None
    reserve_tokens(model, own, template.special_tokens if template else {})
    model = model.to(tuned.engine.model.device)
    stops = stop_ids(_generation_config(options, model), common)
    return Loaded(Engine(model.requires_grad_(False), common, stops), common, tuned.prompt)


def stop_ids(generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: those of the `generation_config.json`, else the tokenizer's EOS."""
    named = generation_config.get("eos_token_id")
    if named is None and tokenizer.eos_token is not None:
        named = tokenizer.backend.token_to_id(tokenizer.eos_token)
    return [int(each) for each in (named if isinstance(named, list) else [named]) if each is not None]


def tokenizer_of(options: ModelOptions) -> Tokenizer:
    """The model's own tokenizer; that of its base, where an adapter has none.

    Raises:
        ModelError, TokenizerError: There is no such model, or it has none that can be used.
    """
    base = base_of(options)
    name = options.model or base
    try:
        return load_tokenizer(name)
    except TokenizerError:
        if base == name:
            raise
        return load_tokenizer(base)


def _generation_config(options: ModelOptions, model: nn.Module) -> dict[str, Any]:
    """What stands in the `generation_config.json` beside the model or the adapter, else beside its base."""
    file = Path(options.model or ".") / "generation_config.json"
    if options.model is None or not file.is_file():
        base: Any = model
        own = getattr(base.get_base_model() if hasattr(base, "get_base_model") else base, "generation_config", None)
        return dict(own.to_diff_dict()) if own is not None else {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not JSON: {error}", "Mend or replace the file.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: must be a JSON object", "Mend or replace the file.")
    named = found.get("eos_token_id")
    if not all(each is None or type(each) is int for each in (named if isinstance(named, list) else [named])):
        raise ModelError(f"{file}: eos_token_id {named!r}: must be the id of a token, or several", "Mend the file.")
    return found
