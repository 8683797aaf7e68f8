"""What a person chooses about the model: where it comes from, what of it is trained, how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelOptions(BaseModel):
    """The model to tune: its weights, the adapter that takes what is learned, the precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None, description="Base model or adapter: a folder or a hub name, with weights in safetensors."
    )
    init: Path | None = Field(
        default=None, description="Folder with a config.json to make a model with random weights from."
    )
    base_adapter: Literal["merge", "keep"] = Field(
        default="merge",
        description="What becomes of an adapter given as the model: merged into its base, or kept and trained on.",
    )
    adapter: Literal["none", "lora"] = Field(
        default="none", description="Train all weights of the model, or low-rank additions to them."
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the additions.")
    lora_alpha: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="The additions are scaled by this over the rank (with rslora, over its root); twice the rank.",
    )
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout of what the additions read.")
    lora_targets: list[str] = Field(
        default=["all-linear"],
        min_length=1,
        description="Linear layers to add to, by name (q_proj); all-linear: all of them, those of experts too, but the "
        "output head.",
    )
    rslora: bool = Field(default=False, description="Scale by the root of the rank, which suits large ranks.")
    dora: bool = Field(default=False, description="Also train the length of each output's weights (DoRA); slower.")
    quantize: Literal["none", "nf4"] = Field(
        default="none",
        description="Hold the frozen linear layers of the base in 4 bits below the adapter (QLoRA).",
    )
    merge_adapter: bool = Field(
        default=False, description="Save the model with the adapter merged into it, in place of the adapter."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What products are computed in; auto: bf16 where the hardware has it."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; only from a source you trust."
    )
