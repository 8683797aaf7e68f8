"""What a person chooses about batches."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PackOptions(BaseModel):
    """How exchanges fill batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens_per_batch: int = Field(default=8192, ge=2, description="Token budget of a batch.")
    share_prefixes: Literal["auto", "on", "off"] = Field(
        default="auto", description="Whether rows that begin alike share their prefix; auto decides by token counts."
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Decides everything random.")
    workers: int | None = Field(default=None, ge=1, description="Processes that encode; one on each core.")
    cache: bool = Field(default=True, description="Whether encoded data is kept for the next run.")
    cache_dir: str | None = Field(
        default=None, description="Where it is kept; $INSTIL_CACHE, or instil in the user's cache folder."
    )
