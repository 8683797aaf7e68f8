"""What a person chooses about the bundled model, where it is made anew."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class BuildOptions(BaseModel):
    """How large the corpus and the vocabulary are, and where all of it goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = Field(
        description="Folder that takes the corpora, init/, first/ and second/, which is the model; made."
    )
    documents: int = Field(default=36_000, ge=200, description="Documents of the first part, sentences.")
    pages: int = Field(default=20_000, ge=200, description="Documents of the second part, marked-up pages.")
    vocab_size: int = Field(default=4096, ge=512, description="Entries of the tokenizer.")
    tokens_per_step: int = Field(default=2048, ge=256, description="Tokens of an optimizer step, about.")
    learning_rate: float = Field(default=3e-3, gt=0.0, description="At its highest.")
    seed: int = Field(default=0, ge=0, description="Decides the corpus, the weights and the order of documents.")
    resume: bool = Field(default=False, description="Go on with a build of the same settings that was broken off.")
