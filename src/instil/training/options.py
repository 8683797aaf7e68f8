"""What a person chooses about training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "muon"]


class TrainOptions(BaseModel):
    """How the model is trained: the size of a step, the optimizer, the schedule, when to evaluate and to stop."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens_per_step: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of the rows that an optimizer step trains, about, counted as if nothing were shared; "
        "32 steps an epoch, but no less than 2,048 and no more than 65,536.",
    )
    epochs: float = Field(default=3.0, gt=0.0, le=1e6, description="Times that each row is trained.")
    max_steps: int | None = Field(default=None, ge=1, le=10**9, description="Optimizer steps, in place of epochs.")
    optimizer: OptimizerName = Field(
        default="adamw",
        description="What takes the steps. Less memory: adamw-8bit (of torchao), adafactor; muon: AdamW, but the "
        "steps of hidden matrices are made orthogonal.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="At its highest; 2e-5 in full and 2e-4 with LoRA, and on preferences a twentieth of that.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up: to 0, or not at all."
    )
    warmup: float = Field(
        default=0.03, ge=0.0, lt=1.0, description="Part of the steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="Of matrices; never of norms, biases and embeddings."
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0.0, allow_inf_nan=False, description="The gradient is scaled down to this norm."
    )
    eval_data: list[str] = Field(
        default_factory=list, description="Files of held-out rows that the loss is measured on."
    )
    eval_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Part of the rows that is held out instead; rows alike fall on one side.",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps from one evaluation to the next; ten times in all, and at the end."
    )
    eval_metric: str = Field(
        default="loss",
        min_length=1,
        description="What decides which weights are the best, and when patience runs out: loss; or of generated "
        "answers exact_match, accuracy, list_of, token_f1, rouge_l, chrf, bleu, numeric.",
    )
    eval_metric_rows: int = Field(
        default=200, ge=1, description="The most held-out rows that are answered for it, evenly spaced."
    )
    eval_max_new_tokens: int = Field(default=128, ge=1, description="The most tokens of such an answer.")
    patience: int | None = Field(
        default=None, ge=1, description="Evaluations without a better loss, or metric, after which training stops."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="What to do where the loss or the gradient is no finite number."
    )
    max_nonfinite: int = Field(default=10, ge=1, description="The most steps that are skipped so.")
    shard: bool = Field(default=False, description="Split the model over the processes that torchrun started (FSDP2).")
    activation_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto", description="Whether activations are computed again in place of kept: when memory asks."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="Whether layers are compiled; auto: in runs long enough to gain by it."
    )


class PreferenceOptions(BaseModel):
    """How answers are compared, where the objective is to prefer some (dpo, cdpo, ipo, simpo, orpo, kto)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="How far from the reference the model is held; 0.1. A factor of the reward with simpo (2.0), of "
        "the comparison with orpo (0.1).",
    )
    label_smoothing: float | None = Field(
        default=None, ge=0.0, lt=0.5, description="Part of the pairs taken to be the wrong way round, of cdpo; 0.1."
    )
    margin: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description="By how much the chosen answer's reward is to be ahead, of simpo (its gamma); 1.0.",
    )
    sft_weight: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight of the supervised loss of chosen answers beside the comparison; 0, with orpo 1.",
    )
    desirable_weight: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False, description="Weight of good answers, of kto; 1."
    )
    undesirable_weight: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False, description="Weight of bad answers, of kto; 1."
    )
    reference: Literal["computed", "adapter-off"] = Field(
        default="computed",
        description="Where the reference's log-probabilities come from: computed once before training, and kept; or "
        "in each step from the model with its adapter switched off.",
    )


class OutputOptions(BaseModel):
    """Where the tuned model goes, and how a run is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path | None = Field(default=None, description="Folder that takes the tuned model; it must not exist yet.")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="Steps from one checkpoint to the next; ten in all, and one at the end."
    )
    keep_checkpoints: int = Field(default=2, ge=0, description="The newest checkpoints that are kept; 0 writes none.")
    resume: bool = Field(
        default=False,
        description="Go on from the newest checkpoint in the output folder that is whole; begin where there is none.",
    )
    allow_changed: list[str] = Field(
        default_factory=list, description="Names of settings that may differ from those of the checkpoint."
    )


class TrackerOptions(BaseModel):
    """Which experiment trackers watch a run, and what they call it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="Experiment trackers that are told of the run as it goes."
    )
    tracker_project: str | None = Field(
        default=None,
        description="Project, or experiment, that takes the run; that of the tracker's own environment, or instil.",
    )
    run_name: str | None = Field(
        default=None, description="Name of the run in the trackers; the output folder's, unless given."
    )
