"""What a person chooses about prompts and the loss mask."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from instil.data.options import pairs


def arguments(value: Any) -> Any:
    """`name=value,…` with each value read as YAML, so that `false` is no text."""
    given = pairs(value)
    if isinstance(value, dict | str) and isinstance(given, dict):
        return {name: _read(text) if isinstance(text, str) else text for name, text in given.items()}
    return given


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is no value: put text that is no plain word in quotes") from None


class PromptOptions(BaseModel):
    """How conversations become exchanges: the template, what is trained, what is too long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str | None = Field(
        default=None,
        description="Chat template: a built-in name (`instil templates`) or a .jinja file; the tokenizer's own.",
    )
    template_args: Annotated[dict[str, Any], BeforeValidator(arguments)] = Field(
        default_factory=dict, description="Arguments of the template, as enable_thinking=false."
    )
    train_on: Literal["assistant", "last"] = Field(
        default="assistant",
        description="Which answers are trained: every assistant turn, or the last one of a conversation.",
    )
    prompt_weight: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight in the loss of the text of messages in the prompt; 1 is the unmasked loss.",
    )
    train_reasoning: bool = Field(default=True, description="Whether an answer's reasoning is trained.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of a prompt and its completion; the model's limit, or a batch if smaller.",
    )
    on_too_long: Literal["error", "drop", "cut-prompt", "cut-completion"] = Field(
        default="drop",
        description="A longer exchange is an error, is dropped, loses its oldest turns (dropped when there are none to "
        "lose), or loses the end of its completion, stop token included.",
    )
