"""Prompts that ask a model to fill a gap: between a prefix and a suffix."""

from __future__ import annotations

import re
from collections.abc import Container

from instil.conversation import Conversation, Message
from instil.data.messages import gap
from instil.data.strict_json import lone_surrogate
from instil.errors import TemplateError, TokenizerError, UsageError
from instil.inference.load import Loaded
from instil.inference.session import prompt_ids
from instil.prompt import Renderer
from instil.prompt.tokenizer import Encoder

_LAYOUTS = (
    "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",  # Qwen2.5-Coder, CodeGemma
    "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",  # StarCoder, StarCoder2, Granite, StableCode, CodeQwen
    "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",  # SantaCoder
    "▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>",  # Code Llama
    "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",  # DeepSeek-Coder
    "<[fim-suffix]>{suffix}<[fim-prefix]>{prefix}<[fim-middle]>",  # Seed-Coder
    "[SUFFIX]{suffix}[PREFIX]{prefix}",  # Codestral
)
"""The prompts that models were trained with, each written in tokens of its own."""

_ENDS = (
    *("<|endoftext|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<|fim_pad|>"),
    *("<file_sep>", "<repo_name>", "<reponame>", "<fim_pad>", "<fim-pad>", "▁<EOT>"),
)
"""Tokens that models without a template end a middle with, beside EOS."""

_TOKEN = re.compile(r"([^{}]+)(?:\{(prefix|suffix)\})?")
_BEFORE, _AFTER = "zqBeforeqz", "zqAfterqz"


class Infill:
    """Prompts for the text between a prefix and a suffix: those of training, if the model's chat template has a place
    for both; else those that its tokens are for, if it has such tokens.

    A vocabulary may hold them though the model was never trained with them: that cannot be told from it.

    Args:
        loaded: The model.

    Raises:
        UsageError: It cannot fill a gap.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.stop_ids: list[int]
        """The tokens that end what fills a gap, beside those that end any answer of the model."""
        self._renderer = _fitting_renderer(loaded)
        if self._renderer is not None:
            numbers = map(self._renderer.tokenizer.backend.token_to_id, self._renderer.stop_tokens)
            self.stop_ids = [number for number in numbers if number is not None]
            return
        added = loaded.tokenizer.backend.get_added_tokens_decoder()
        number_of = {token.content: number for number, token in added.items()}
        layout = _known_layout(loaded, number_of)
        steering = [token for token, _ in layout] + [token for token in _ENDS if token in number_of]
        self.stop_ids = [number_of[token] for token in steering]
        self._layout = [(number_of[token], place) for token, place in layout]
        special = [token.content for token in added.values() if token.special]
        self._encoder = Encoder(loaded.tokenizer, special + steering)
        bos = loaded.tokenizer.bos_token
        start = loaded.tokenizer.backend.token_to_id(bos) if bos is not None else None
        self._start = [] if start is None else [start]

    def ids(self, prefix: str, suffix: str) -> list[int]:
        """The prompt. What the texts spell of control tokens is text.

        Args:
            prefix: The text before the gap.
            suffix: The text after it.

        Raises:
            UsageError: One of them is no text.
        """
        for name, text in (("prefix", prefix), ("suffix", suffix)):
            if lone_surrogate(text):
                raise UsageError(f"the {name} holds half of a surrogate pair, which is no character", "Take it out.")
        if self._renderer is not None:
            return prompt_ids(self._renderer, Conversation((gap(prefix, suffix),)))
        ids = list(self._start)
        for token, place in self._layout:
            ids.append(token)
            if place == "prefix":  # the text begins with it, with a dummy space where the tokenizer puts one
                ids += self._encoder.encode(prefix, self._spelled(prefix))
            elif place == "suffix":
                ids += self._encoder.encode_continuation(suffix, self._spelled(suffix))
        return ids

    def _spelled(self, text: str) -> frozenset[int]:
        return frozenset(found.start() for found in self._encoder.pattern.finditer(text))


def _known_layout(loaded: Loaded, tokens: Container[str]) -> list[tuple[str, str]]:
    """The first of the layouts whose tokens the tokenizer has all: each token, and the text that stands behind it."""
    for each in _LAYOUTS:
        layout = _TOKEN.findall(each)
        if all(token in tokens for token, _ in layout):
            return layout
    known = ", ".join(_TOKEN.findall(each)[0][0] for each in _LAYOUTS)
    template = "its chat template has no place for" if loaded.has_template else "it has no chat template that takes"
    raise UsageError(
        f"suffix: this model cannot fill in the middle: {template} a prefix and a suffix, and its tokenizer has none "
        f"of the tokens known for that ({known}, ...)",
        "Leave the suffix out, or tune the model on rows of prefix, suffix and middle (--template fim).",
    )


def _fitting_renderer(loaded: Loaded) -> Renderer | None:
    """The model's renderer, if its chat template has a place for a prefix and a suffix, and for what fills the gap."""
    if not loaded.has_template:
        return None
    asked = gap(_BEFORE, _AFTER)
    try:
        text = loaded.renderer.exchange(Conversation((asked, Message("assistant", "a"))), 1).prompt
    except (TemplateError, TokenizerError):
        return None
    return loaded.renderer if _BEFORE in text and _AFTER in text else None
