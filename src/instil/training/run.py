"""A run from its configuration to its output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from instil.data import read
from instil.errors import TrainingError, UsageError
from instil.model.adapter import add_lora
from instil.model.forward import TreeModel
from instil.model.load import check_vocabulary, checkpoint_dtype, load_model
from instil.model.save import save_model
from instil.model.tokens import Growth, reserve_tokens
from instil.packing import Prepared, StoredTrees, TokenTree, cache_folder, prepare
from instil.packing.tree import LABELS, Ints
from instil.prompt import PromptOptions, builtin_templates, load_renderer
from instil.prompt.render import Renderer
from instil.training import loop
from instil.training.config import TrainConfig
from instil.training.events import Outcome, Resolved, Watcher
from instil.training.optimizer import check_installed
from instil.training.output import check_output, describe_data, write_output
from instil.training.steps import Steps


def train(config: TrainConfig, watchers: Sequence[Watcher] = ()) -> Outcome:
    """Train as configured, and write the output folder.

    Args:
        config: The whole run.
        watchers: Are told of every step and evaluation.

    Raises:
        InstilError: Of the rooms it goes through: data, tokenizer, template, packing, model, training.
    """
    if config.output is None:
        raise UsageError("output: is missing", "Name the folder that takes the tuned model.")
    check_output(config.output)
    check_installed(config.optimizer)
    data = _Data.of(config)
    model, growth = _model(config, data.renderer)
    reader = TreeModel(model, bf16=_precision(config) is torch.bfloat16)
    kept = _Keeper()
    outcome = loop.fit(
        reader,
        data.prepared.trees,
        config,
        rows=data.rows,
        held_out=data.held_out,
        tokens_per_batch=config.tokens_per_batch,
        share_prefixes=config.share_prefixes,
        seed=config.seed,
        watchers=[kept, *watchers],
    )
    generation = getattr(reader.base, "generation_config", None)
    notes = write_output(
        config.output,
        save=lambda folder: save_model(
            model,
            folder,
            growth=growth,
            merge=config.merge_adapter,
            dtype=checkpoint_dtype(config),
            place=config.output,
        ),
        config=config,
        renderer=data.renderer,
        prepared=data.prepared,
        resolved=kept.resolved,
        outcome=outcome,
        data=data.described,
        eval_data=data.eval_described,
        generation_config=generation.to_dict() if generation else None,
    )
    return replace(outcome, notes=notes)


def resolve(config: TrainConfig) -> Resolved:
    """What a run would do, without doing it.

    Raises:
        InstilError: What would stop it before its first step.
    """
    if config.output is not None:
        check_output(config.output)
    check_installed(config.optimizer)
    data = _Data.of(config)
    model, _ = _model(config, data.renderer)
    reader = TreeModel(model, bf16=_precision(config) is torch.bfloat16)
    options = config.tokens_per_step, config.tokens_per_batch, config.share_prefixes, config.seed
    steps = Steps.of(data.prepared.trees, *options, data.rows)
    resolved = loop.resolve(reader, steps, config, held_out=bool(len(data.held_out)))
    counts = data.prepared.describe()
    rows = {"rows": counts["rows"], "held_out": len(data.held_out), "tokens": counts["tokens"]}
    return Resolved(resolved.steps, resolved.epochs, resolved.tokens_per_step, {**rows, **resolved.settings})


@dataclass(frozen=True, slots=True)
class _Data:
    """The rows of a run, prepared; those held out apart."""

    renderer: Renderer
    prepared: Prepared
    rows: Ints | None
    held_out: Sequence[TokenTree]
    described: dict[str, Any]
    eval_described: dict[str, Any] | None

    @classmethod
    def of(cls, config: TrainConfig) -> _Data:
        options = PromptOptions.model_construct(**{name: getattr(config, name) for name in PromptOptions.model_fields})
        renderer = load_renderer(config.tokenizer_source(), options)
        prepared, described = _prepared(config, config.data, renderer, options)
        if config.eval_data:
            evaluated, eval_described = _prepared(config, config.eval_data, renderer, options)
            return cls(renderer, prepared, None, evaluated.trees, described, eval_described)
        if not config.eval_fraction:
            return cls(renderer, prepared, None, (), described, None)
        rows, held_out = split(prepared.trees, config.eval_fraction, config.seed)
        return cls(renderer, prepared, rows, [prepared.trees[i] for i in held_out.tolist()], described, None)


def _prepared(
    config: TrainConfig, files: list[str], renderer: Renderer, options: PromptOptions
) -> tuple[Prepared, dict[str, Any]]:
    records = read(
        files,
        format=config.format,
        columns=config.columns,
        objective=config.objective or "supervised",
        on_bad_row=config.on_bad_row,
        rejects=config.rejects,
    )
    prepared = prepare(
        records,
        renderer.tokenizer,
        options,
        tokens_per_batch=config.tokens_per_batch,
        workers=config.workers,
        cache=cache_folder(config.cache_dir) if config.cache else None,
    )
    named = ", ".join(files)
    if not len(prepared.trees):
        raise TrainingError(f"{named}: no row has anything to train", "See why with `instil inspect --summary`.")
    unwanted = {LABELS[label] for label in np.unique(prepared.trees.labels).tolist()} & {"rejected", "bad"}
    if unwanted:
        raise TrainingError(
            f"{named}: rows hold {' and '.join(sorted(unwanted))} answers, which supervised training would teach",
            "Leave those rows out, or map the good answers with --columns.",
        )
    return prepared, describe_data(records)


def split(trees: StoredTrees, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """The rows to train and the rows to hold out; rows with the same tokens fall on one side.

    Raises:
        TrainingError: One side would be empty.
    """
    _, same = np.unique(trees.hashes, return_inverse=True)  # (N,)
    order = np.random.default_rng((seed, 1)).permutation(int(same.max()) + 1)
    sizes = np.bincount(same)[order]
    held = order[: int(np.searchsorted(np.cumsum(sizes), fraction * len(same), side="left")) + 1]
    out = np.isin(same, held)
    if out.all():
        raise TrainingError(
            f"--eval-fraction {fraction:g}: of {len(same):,} rows none would be left to train",
            "Hold fewer out, or give the held-out rows with --eval-data.",
        )
    return np.flatnonzero(~out), np.flatnonzero(out)


def _model(config: TrainConfig, renderer: Renderer) -> tuple[torch.nn.Module, Growth]:
    """The model on its device, with the new tokens and the adapter."""
    lora = config.adapter == "lora"
    model = load_model(config, dtype=_precision(config) if lora else torch.float32, seed=config.seed)
    check_vocabulary(model, renderer.tokenizer)
    known = builtin_templates().get(renderer.template.name)
    growth = reserve_tokens(model, renderer.tokenizer, known.special_tokens if known else {})
    if lora:
        model = add_lora(model, config, growth.ids)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), growth


def _precision(config: TrainConfig) -> torch.dtype:
    """What products are computed in: bf16 where the hardware has it, unless chosen."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        has = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if has else torch.float32


class _Keeper:
    """Keeps what a run resolved."""

    resolved: Resolved

    def started(self, resolved: Resolved) -> None:
        self.resolved = resolved

    def stepped(self, step: Any) -> None:
        pass

    def evaluated(self, evaluation: Any) -> None:
        pass
