"""What a person chooses about generation: how tokens are drawn, and when an answer ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, with nothing left open.

    The logits are changed in this order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        temperature: The logits are divided by it; 0 takes the likeliest token.
        top_k: Of the tokens only this many of the likeliest are left; 0 leaves all.
        top_p: Only the likeliest tokens whose probabilities together reach this are left.
        min_p: Only tokens at least this probable, relative to the likeliest, are left.
        repetition_penalty: Logits of tokens that stand in the prompt or the answer are divided by it where they are
            positive, and multiplied where they are negative.
        seed: What the draws follow from, together with the number of the prompt, of the answer and of the token.
        answers: Answers to each prompt.
        max_new_tokens: Most tokens of an answer.
        stop: Texts before which an answer ends.
        batch_size: Most answers generated at once.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    answers: int = 1
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch_size: int = 64

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0.0

    @property
    def how(self) -> tuple[float, ...]:
        """What says how a token is drawn, without what it follows from."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty

    def to_json(self) -> dict[str, Any]:
        """The values by name; where nothing is drawn, without those that say how."""
        values = asdict(self) | {"stop": list(self.stop)}
        unused = ("top_k", "top_p", "min_p", "seed") if self.greedy else ()
        return {name: value for name, value in values.items() if name not in unused}


class SamplingOptions(BaseModel):
    """How answers are generated. What is unset is as the model's own `generation_config.json` says where that asks for
    sampling; else the likeliest token is taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description="Divide the logits by this; 0 takes the likeliest token. As the model's generation_config.json "
        "says where it samples, else 0 (1 where top-k, top-p or min-p narrows the draw).",
    )
    top_k: int | None = Field(default=None, ge=0, description="Draw among this many of the likeliest; 0: among all.")
    top_p: float | None = Field(
        default=None, gt=0.0, le=1.0, description="Draw among the likeliest that together are this probable."
    )
    min_p: float | None = Field(
        default=None, ge=0.0, le=1.0, description="Draw among those at least this probable beside the likeliest."
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Divide (above 0; else multiply) the logits of tokens that stand there already; 1 does nothing.",
    )
    seed: int = Field(default=0, ge=0, description="What the draws follow from: the same seed, the same answers.")
    answers: int = Field(default=1, ge=1, description="Answers to each prompt.")
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    stop: list[str] = Field(default_factory=list, description="Texts before which an answer ends.")
    batch_size: int = Field(default=64, ge=1, description="Most answers generated at once; fewer if memory is short.")

    @field_validator("stop")
    @classmethod
    def _are_texts(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text stands everywhere (a shell variable that is not set?)")
        return value

    def resolve(self, generation_config: Mapping[str, Any] | None = None) -> Sampling:
        """The options with the model's own put where nothing is set.

        Args:
            generation_config: What the model's `generation_config.json` holds.
        """
        own = dict(generation_config or {})
        own = own if own.get("do_sample") is True else {}
        narrowed = bool(self.top_k) or bool(self.min_p) or (self.top_p is not None and self.top_p < 1.0)
        usual = {"temperature": float(bool(own) or narrowed), "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        found: dict[str, Any] = {}
        for name, default in {**usual, "repetition_penalty": 1.0}.items():
            given = getattr(self, name)
            value = own.get(name) if given is None else given
            found[name] = default if value is None else type(default)(value)
        return Sampling(
            **found,
            seed=self.seed,
            answers=self.answers,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop),
            batch_size=self.batch_size,
        )
