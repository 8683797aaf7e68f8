"""Everything a run is told: the options of every room together, and which of them go together."""

from __future__ import annotations

from importlib.util import find_spec

import yaml
from pydantic import Field, model_validator

from instil.data.options import DataOptions
from instil.data.shapes import COMPARING
from instil.errors import UsageError, nearest
from instil.model.options import ModelOptions
from instil.packing.options import PackOptions
from instil.prompt.options import PromptOptions
from instil.training.options import OutputOptions, PreferenceOptions, TrackerOptions, TrainOptions

_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "dora")
_OF_PREFERENCES = {
    "beta": COMPARING,
    "label_smoothing": ("cdpo",),
    "margin": ("simpo",),
    "sft_weight": COMPARING,
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("dpo", "cdpo", "ipo", "kto"),
}
"""The objectives that each setting is for."""
OF_METRIC = ("eval_metric_rows", "eval_max_new_tokens")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class TrainConfig(
    TrackerOptions,
    OutputOptions,
    PreferenceOptions,
    TrainOptions,
    ModelOptions,
    PackOptions,
    PromptOptions,
    DataOptions,
):
    """A training run, whole: the data, the prompts, the batches, the model, the training, the output.

    Raises:
        UsageError: Options that exclude each other, or lack one that they need.
    """

    tokenizer: str | None = Field(default=None, description="Tokenizer, where the model's own is not the one to use.")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        check(self)
        return self

    @property
    def compares(self) -> bool:
        """Whether answers are compared: the objective is one of preferences."""
        return self.objective in COMPARING

    def tokenizer_source(self) -> str:
        """Where the tokenizer is: named by itself, or beside the model or the configuration."""
        return self.tokenizer or self.model or str(self.init)

    def to_yaml(self) -> str:
        """Every setting that has a value, as `--config` takes it."""
        fields = type(self).model_fields
        values = {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if value not in (None, [], {}) or value != fields[name].get_default(call_default_factory=True)
        }
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000))

    def remarks(self) -> list[str]:
        """What is no mistake and may yet surprise, a sentence each."""
        said = []
        if self.max_steps is not None and self.epochs != TrainConfig.model_fields["epochs"].default:
            said.append(f"--max-steps {self.max_steps} decides how long is trained, not --epochs {self.epochs:g}")
        return said


def check(config: TrainConfig) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: The first that do not.
    """
    _check_model(config)
    _check_adapter(config)
    _check_evaluation(config)
    _check_resume(config)
    _check_shard(config)
    _check_objective(config)


def _check_objective(config: TrainConfig) -> None:
    if config.objective == "preference":
        raise UsageError(
            "--objective preference: says what the data is, not how a model is trained on it",
            f"Say how: --objective {', '.join(COMPARING)}.",
        )
    for name, objectives in _OF_PREFERENCES.items():
        if config.objective not in objectives and getattr(config, name) != TrainConfig.model_fields[name].default:
            raise UsageError(
                f"--{_flag(name)}: is a setting of the objective {', '.join(objectives)}",
                f"Add --objective {objectives[0]}, or leave it out.",
            )
    if not config.compares:
        return
    if config.prompt_weight:
        raise UsageError(
            f"--prompt-weight {config.prompt_weight:g} and --objective {config.objective} exclude each other: answers "
            "are compared, and their prompt is the same",
            "Leave --prompt-weight out.",
        )
    if config.eval_metric != "loss":
        raise UsageError(
            f"--eval-metric {config.eval_metric} and --objective {config.objective} exclude each other",
            "Leave --eval-metric out: the loss on held-out pairs decides.",
        )
    if config.reference == "adapter-off" and config.adapter != "lora":
        raise UsageError(
            "--reference adapter-off: there is no new adapter to switch off",
            "Add --adapter lora, or leave it out: the reference is then computed before training.",
        )
    if config.shard and config.objective == "kto":
        raise UsageError(
            "--shard and --objective kto exclude each other: processes would wait for each other",
            "Leave one of them out.",
        )


def _check_model(config: TrainConfig) -> None:
    if config.model is None and config.init is None:
        raise UsageError(
            "--model: is missing, and so is --init",
            "Name the base model with --model, or with --init a configuration that makes a new one.",
        )
    if config.model is not None and config.init is not None:
        raise UsageError(
            "--model and --init exclude each other",
            "Leave --init out to tune the model, or --model to train a new one.",
        )
    init = config.init
    beside = init is not None and init.is_dir() and any((init / name).exists() for name in _TOKENIZER_FILES)
    if init is not None and config.tokenizer is None and not beside:
        raise UsageError(
            f"--init {init}: there is no tokenizer beside the configuration",
            "Name one with --tokenizer: a folder, or a name on the hub.",
        )


def _check_adapter(config: TrainConfig) -> None:
    kept = config.base_adapter == "keep"
    if kept and config.adapter == "lora":
        raise UsageError(
            "--base-adapter keep and --adapter lora exclude each other",
            "Leave --adapter out to train the adapter that is there, or --base-adapter to merge it and add another.",
        )
    if kept and config.init is not None:
        raise UsageError("--base-adapter keep: a new model has no adapter", "Leave it out, or name a --model.")
    if config.merge_adapter and not kept and config.adapter != "lora":
        raise UsageError("--merge-adapter: there is no adapter to merge", "Add --adapter lora, or leave it out.")
    if config.quantize != "none":
        _check_quantize(config)
    if config.optimizer == "muon" and (kept or config.adapter == "lora"):
        raise UsageError(
            "--optimizer muon: makes steps of whole matrices orthogonal, and an adapter holds factors of them",
            "Leave it out, or train in full, without an adapter.",
        )
    for name in () if config.adapter == "lora" else _OF_LORA:
        if getattr(config, name) != TrainConfig.model_fields[name].get_default(call_default_factory=True):
            raise UsageError(
                f"--{_flag(name)}: says how a LoRA adapter is made", "Add --adapter lora, or leave it out."
            )


def _check_quantize(config: TrainConfig) -> None:
    if config.adapter != "lora" and config.base_adapter != "keep":
        raise UsageError(
            f"--quantize {config.quantize}: weights in 4 bits cannot be trained themselves",
            "Add --adapter lora, which trains an adapter on them, or leave --quantize out.",
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--quantize {config.quantize}: needs the package 'bitsandbytes'", "pip install 'instil[qlora]'"
        )


def _check_evaluation(config: TrainConfig) -> None:
    if config.eval_data and config.eval_fraction:
        raise UsageError("--eval-data and --eval-fraction exclude each other", "Give one: each holds rows out.")
    if not config.eval_data and not config.eval_fraction:
        for name in ("patience", "eval_every", "eval_metric"):
            if getattr(config, name) != TrainConfig.model_fields[name].default:
                raise UsageError(
                    f"--{_flag(name)} {getattr(config, name)}: there are no held-out rows to evaluate on",
                    "Give some with --eval-data FILE or --eval-fraction 0.05.",
                )
    for name in OF_METRIC if config.eval_metric == "loss" else ():
        if getattr(config, name) != TrainConfig.model_fields[name].default:
            raise UsageError(
                f"--{_flag(name)}: says how answers are measured", "Add --eval-metric exact_match, or leave it out."
            )
    if "-" in config.data and "-" in config.eval_data:
        raise UsageError("--data - and --eval-data -: there is one standard input", "Name a file for one of them.")


def _check_shard(config: TrainConfig) -> None:
    if config.shard and config.optimizer != "adamw":
        raise UsageError(f"--shard and --optimizer {config.optimizer} exclude each other", "Leave one of them out.")
    if config.shard and config.eval_metric != "loss":
        raise UsageError(
            f"--shard and --eval-metric {config.eval_metric} exclude each other: a model in parts generates nothing",
            "Leave one of them out.",
        )
    if config.shard and config.quantize != "none":
        raise UsageError(f"--shard and --quantize {config.quantize} exclude each other", "Leave one of them out.")


def _check_resume(config: TrainConfig) -> None:
    if config.allow_changed and not config.resume:
        raise UsageError("--allow-changed: says what may differ on --resume", "Add --resume, or leave it out.")
    known = {*TrainConfig.model_fields, "weights"}
    for name in (each.replace("-", "_") for each in config.allow_changed):
        if name not in known:
            raise UsageError(f"--allow-changed {name}: there is no such setting", nearest(name, known))


def _flag(name: str) -> str:
    return name.replace("_", "-")
