"""A run from its configuration to its output folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from instil.errors import Interrupted, TokenizerError, TrainingError, UsageError
from instil.model.adapter import add_lora
from instil.model.forward import TreeModel
from instil.model.load import base_of, check_vocabulary, checkpoint_dtype, load_model, product_dtype
from instil.model.save import merged, save_model
from instil.model.tokens import Growth, reserve_tokens
from instil.objectives import supervised
from instil.objectives.objective import Objective
from instil.objectives.preference import Formula, Kto, Preference, with_others
from instil.packing import TokenTree, cache_folder
from instil.prompt import Tokenizer, builtin_templates
from instil.prompt.render import Renderer
from instil.prompt.tokenizer import load_tokenizer
from instil.training import loop, preflight
from instil.training.checkpoint import Checkpoint, Checkpoints, differences
from instil.training.comparison import Comparison, compare
from instil.training.config import TrainConfig
from instil.training.distributed import Processes, whole
from instil.training.events import Measure, Outcome, Preparing, Resolved, Watcher
from instil.training.files import plain
from instil.training.optimizer import check_installed
from instil.training.options import OutputOptions, PreferenceOptions, TrackerOptions
from instil.training.output import check_output, describe_run, write_output
from instil.training.reference import NamedTrees, with_reference
from instil.training.rows import Rows
from instil.training.run_folder import CHECKPOINTS, RunFolder
from instil.training.steps import Steps
from instil.training.trackers import check_trackers, trackers

Measuring = Callable[[TrainConfig, Rows], Measure]


def train(
    config: TrainConfig,
    watchers: Sequence[Watcher] = (),
    *,
    stopping: Callable[[], int] = lambda: 0,
    measure: Measuring | None = None,
) -> Outcome:
    """Train as configured, and write the output folder.

    Args:
        config: The whole run.
        watchers: Are told of every step and evaluation.
        stopping: Asked after each step for the number of a signal upon which to save and to stop; 0 goes on.
        measure: Makes of the run and its rows what measures `eval_metric`, where that is not the loss:
            `instil.evaluation.held_out.measure`, or one's own.

    Raises:
        InstilError: Of the rooms it goes through: data, tokenizer, template, packing, model, training.
        Interrupted: `stopping` said so.
    """
    if config.output is None:
        raise UsageError("output: is missing", "Name the folder that takes the tuned model.")
    check_output(config.output, resume=config.resume)
    check_trackers(config.trackers)
    check_installed(config.optimizer)
    processes = Processes.join()
    try:
        outcome = _train(config, config.output, watchers, stopping, measure, processes)
    except Interrupted:
        processes.leave()
        raise
    processes.leave()  # not upon an error, which others know nothing of: NCCL would wait for them
    return outcome


def _train(
    config: TrainConfig,
    output: Path,
    watchers: Sequence[Watcher],
    stopping: Callable[[], int],
    measure: Measuring | None,
    processes: Processes,
) -> Outcome:
    with processes.in_turn():
        data = Rows.of(config, rejects=processes.first)
    measured = None if measure is None else measure(config, data)
    model, growth = _model(config, data.renderer)
    reader = TreeModel(model, bf16=product_dtype(config.precision) is torch.bfloat16)
    task = _Task.of(config, reader, data)
    record = describe_run(config, data.renderer, data.prepared, data.described, data.eval_described)
    checkpoints = Checkpoints(
        Path(output).resolve() / CHECKPOINTS,
        keep=config.keep_checkpoints,
        every=config.checkpoint_every,
        made_of=_made_of(config, data, model),
        processes=processes,
    )
    folder = RunFolder(config, record) if processes.first else None
    told: AbstractContextManager[list[Watcher]] = trackers(config) if folder is not None else nullcontext([])
    with folder or nullcontext(), told as tracking:
        processes.wait()  # until the folder is locked
        task = task.with_reference(config, reader, data, processes, watchers)
        resume = _to_resume(checkpoints, config, processes)
        if folder is not None and resume is not None:
            folder.goes_on_from(resume)
        outcome = loop.fit(
            reader,
            task.trees,
            config,
            rows=data.trained,
            held_out=task.held_out,
            tokens_per_batch=config.tokens_per_batch,
            share_prefixes=config.share_prefixes,
            seed=config.seed,
            watchers=[folder, *tracking, *watchers] if folder is not None else watchers,
            processes=processes,
            checkpoints=checkpoints,
            resume=resume,
            stopping=stopping,
            measure=measured,
            objective=task.objective,
            about=_about(data, measured, task),
        )
        if config.shard and processes.size > 1:
            model = _put_together(reader, config, data.renderer, processes)
        if folder is None:
            return outcome
        generation = getattr(reader.base, "generation_config", None)
        dtype, comparison = checkpoint_dtype(config), None
        if config.quantize != "none" and config.merge_adapter:
            model = merged(model, dtype)
            comparison = _compared(reader, model, data, config)
        ended = write_output(
            output,
            folder.record,
            save=lambda place: save_model(
                model,
                place,
                growth=growth,
                merge=config.merge_adapter,
                dtype=dtype,
                place=output,
                original=lambda: _load(config.model_copy(update={"quantize": "none"}), frozen=True),
            ),
            renderer=data.renderer,
            outcome=outcome,
            comparison=comparison,
            generation_config=generation.to_dict() if generation else None,
        )
        folder.finish(ended)
        return replace(outcome, notes=ended["notes"])


@dataclass(frozen=True, slots=True)
class _Task:
    """What a run's rows are to teach, and the trees of those rows.

    Args:
        objective: What makes a loss of them.
        trees: One for each row.
        held_out: Those of the rows held out.
        about: What a person should know of it, by name.
    """

    objective: Objective
    trees: Sequence[TokenTree]
    held_out: Sequence[TokenTree]
    about: dict[str, Any]

    @classmethod
    def of(cls, config: TrainConfig, model: TreeModel, data: Rows) -> _Task:
        """As configured, but for what a reference makes of the rows; those that no position is left for are refused."""
        for each in (data.prepared.trees, data.held_out):
            preflight.check_positions(model, each)
        objective = objective_of(config)
        if not isinstance(objective, Preference | Kto):
            return cls(objective, data.prepared.trees, data.held_out, {})
        trees: Sequence[TokenTree] = data.prepared.trees
        held_out, about = data.held_out, {"objective": objective.describe()}
        if isinstance(objective, Kto):
            trees, alone = _beside_others(trees, config, model)
            held_out = _set_aside(trees, data) or _beside_others(held_out, config, model)[0]
            if alone:
                rows = "row" if alone == 1 else "rows"
                about["kl"] = f"estimated without {alone:,} {rows}, which no answer of another row fits"
        preflight.check_whole(trees, config.tokens_per_batch)
        preflight.check_whole(held_out, config.tokens_per_batch)
        return cls(objective, trees, held_out, about)

    def with_reference(
        self, config: TrainConfig, model: TreeModel, data: Rows, processes: Processes, watchers: Sequence[Watcher]
    ) -> _Task:
        """With what the model, as it is now, makes of the rows, where that is needed."""
        if config.reference != "computed" or not getattr(self.objective, "needs_reference", False):
            return self

        def telling(done: int, of: int) -> None:
            for watcher in watchers:
                if isinstance(watcher, Preparing):
                    watcher.preparing("reference", done, of)

        compute = partial(
            with_reference,
            model,
            tokens_per_batch=config.tokens_per_batch,
            cache=cache_folder(config.cache_dir) if config.cache else None,
            processes=processes,
            telling=telling,
        )
        trees, said = compute(self.trees)
        about = {**self.about, "reference": said}
        held_out = _set_aside(trees, data) or self.held_out
        if held_out is self.held_out and len(held_out):
            held_out, about["held_out_reference"] = compute(held_out)
        return _Task(self.objective, trees, held_out, about)


def _beside_others(
    trees: Sequence[TokenTree], config: TrainConfig, model: TreeModel
) -> tuple[Sequence[TokenTree], int]:
    found, alone = with_others(trees, config.seed, most=config.tokens_per_batch, longest=model.learned_positions)
    return NamedTrees(found, trees), alone


def _set_aside(trees: Sequence[TokenTree], data: Rows) -> Sequence[TokenTree] | None:
    """The trees of the rows that are held out of those that are trained; None where others are, or none."""
    return None if data.set_aside is None else [trees[row] for row in data.set_aside.tolist()]


def objective_of(config: TrainConfig) -> Objective:
    """What makes a loss, as configured: its own defaults where nothing is said."""
    chosen = {name: value for name in PreferenceOptions.model_fields if (value := getattr(config, name)) is not None}
    del chosen["reference"]
    if not config.compares:
        return supervised
    return Kto(**chosen) if config.objective == "kto" else Preference.of(cast(Formula, config.objective), **chosen)


def _about(data: Rows, measure: Measure | None, task: _Task) -> dict[str, Any]:
    """What became of the rows, and what is measured on those held out."""
    return {**data.about, **task.about, **({"eval_metric": measure.about} if measure else {})}


def _to_resume(checkpoints: Checkpoints, config: TrainConfig, processes: Processes) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin.

    Raises:
        TrainingError: There are checkpoints and none is whole, or the run is not the one they are of.
    """
    if not config.resume:
        return None
    found, passed = checkpoints.newest() if processes.first else (None, [])
    if found is None and passed:
        raise TrainingError(
            "no checkpoint is whole:" + "".join(f"\n  {each}" for each in passed),
            "Start anew in another folder: --output NEW.",
        )
    names = processes.gathered([str(found.folder)] if found else [])
    if not names:
        return None
    found = found or Checkpoint.read(Path(names[0]))
    then, now = found.made_of, checkpoints.made_of
    allowed = {name.replace("-", "_") for name in config.allow_changed}
    changed = [name for name in differences(then, now) if name not in allowed]
    if changed:
        listed = "".join(f"\n  {name}: {_said(then.get(name))} then, {_said(now.get(name))} now" for name in changed)
        raise TrainingError(
            f"{found.folder}: the run has changed since:{listed}",
            f"Set them back, allow it with --allow-changed {' '.join(changed)}, or start anew in another folder.",
        )
    return found


def _said(value: Any) -> str:
    return "nothing" if value in (None, [], {}) else value if isinstance(value, str) else json.dumps(plain(value))


_NOT_OF_THE_WEIGHTS = {
    *OutputOptions.model_fields,
    *TrackerOptions.model_fields,
    *("activation_checkpointing", "cache", "cache_dir", "data", "eval_data", "max_nonfinite", "merge_adapter"),
    *("on_nonfinite", "rejects", "shard", "tokenizer", "trust_remote_code", "workers"),
}


def _made_of(config: TrainConfig, data: Rows, model: torch.nn.Module) -> dict[str, Any]:
    """What decides the weights of every step, by the name of its setting."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NOT_OF_THE_WEIGHTS}
    template = data.renderer.template
    eval_data = data.eval_described
    made_of = {
        **settings,
        "precision": str(product_dtype(config.precision)).removeprefix("torch."),
        "data": data.described["fingerprint"] or config.data,
        "eval_data": (eval_data["fingerprint"] or config.eval_data) if eval_data else None,
        "template": f"{template.name} {template.fingerprint()[:16]}",
        "tokenizer": data.renderer.tokenizer.fingerprint()[:16],
        "weights": _frozen(model),
    }
    plain_values: dict[str, Any] = json.loads(json.dumps(plain(made_of)))
    return plain_values


def _frozen(model: torch.nn.Module) -> str:
    """A hash of what a checkpoint does not hold: the shapes of all weights, and values of those that do not train."""
    digest = hashlib.sha256()
    for name, each in model.named_parameters():
        digest.update(f"{name} {tuple(each.shape)} {each.dtype} {each.requires_grad}\0".encode())
        if not each.requires_grad:
            values = each.detach().reshape(-1)
            some = values[:: max(1, len(values) // 1024)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _put_together(reader: TreeModel, config: TrainConfig, renderer: Renderer, processes: Processes) -> torch.nn.Module:
    """The tuned model as one process holds it: made anew, with what was trained; in the others what they hold."""
    model = _model(config, renderer, torch.device("cpu"))[0] if processes.first else reader.model
    places = dict(model.named_parameters())
    with torch.no_grad(), processes.together():
        for name, each in reader.model.named_parameters():
            if each.requires_grad:
                value = whole(each)
                if processes.first:
                    places[name].copy_(value)
    return model


def resolve(config: TrainConfig, measure: Measuring | None = None) -> Resolved:
    """What a run would do, without doing it.

    Args:
        config: The run.
        measure: As `train` takes it.

    Raises:
        InstilError: What would stop it before its first step.
    """
    if config.output is not None:
        check_output(config.output, resume=config.resume)
    check_installed(config.optimizer)
    data = Rows.of(config, rejects=False)
    measured = None if measure is None else measure(config, data)
    model, _ = _model(config, data.renderer)
    reader = TreeModel(model, bf16=product_dtype(config.precision) is torch.bfloat16)
    task = _Task.of(config, reader, data)
    options = config.tokens_per_step, config.tokens_per_batch, config.share_prefixes, config.seed
    steps = Steps.of(task.trees, *options, data.trained)
    resolved = preflight.resolve(reader, steps, config, compares=config.compares, held_out=bool(len(data.held_out)))
    return replace(resolved, settings={**_about(data, measured, task), **resolved.settings})


def _model(
    config: TrainConfig, renderer: Renderer, device: torch.device | None = None
) -> tuple[torch.nn.Module, Growth]:
    """The model on its device, the GPU if there is one, with the new tokens and the adapter."""
    lora = config.adapter == "lora"
    model = _load(config, frozen=lora or config.quantize != "none")
    check_vocabulary(model, renderer.tokenizer)
    _check_tokenizer(config, renderer.tokenizer)
    known = builtin_templates().get(renderer.template.name)
    growth = reserve_tokens(model, renderer.tokenizer, known.special_tokens if known else {})
    if lora:
        model = add_lora(model, config, growth.ids)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), growth
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the model does not fit on the GPU: {str(error).splitlines()[0]}",
            "Train an adapter (--adapter lora, with --quantize nf4 for less), or a smaller model.",
        ) from error


def _check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer named by itself whose ids mean other tokens than those of the model's own.

    Raises:
        TokenizerError: More than a tenth of them do; a few may be reserved ones with a name of their own.
    """
    if config.tokenizer is None or config.model is None:
        return
    base = Path(base_of(config))
    if not (base / "tokenizer.json").is_file():
        return
    own = load_tokenizer(base).backend.get_vocab(with_added_tokens=True)
    given = tokenizer.backend.get_vocab(with_added_tokens=True)
    meant = {number: token for token, number in own.items()}
    other = [(n, t, meant[n]) for t, n in given.items() if meant.get(n, t) != t]
    if len(other) > len(own) // 10:
        number, token, mine = min(other)
        raise TokenizerError(
            f"--tokenizer {config.tokenizer}: is not the model's: {len(other):,} of its {len(given):,} ids mean other "
            f"tokens there, as {number} does ({token!r} here, {mine!r} there)",
            "Leave --tokenizer out: the model brings its own.",
        )


def _load(config: TrainConfig, *, frozen: bool) -> torch.nn.Module:
    """The model on the CPU; a frozen base in the precision of the products, one that is trained in float32."""
    return load_model(config, dtype=product_dtype(config.precision) if frozen else torch.float32, seed=config.seed)


def _compared(reader: TreeModel, merged: torch.nn.Module, data: Rows, config: TrainConfig) -> Comparison:
    """The quantized model with its adapter beside the merged one, which stays on the CPU where it does not fit."""
    size = sum(each.numel() * each.element_size() for each in merged.parameters())
    if reader.device.type == "cuda" and 1.2 * size < torch.cuda.mem_get_info(reader.device)[0]:
        merged.to(reader.device)
    beside = TreeModel(merged, bf16=reader.bf16, one_by_one=reader.one_by_one)
    tokenizer = data.renderer.tokenizer
    stops = [i for token in data.prepared.stop_tokens if (i := tokenizer.backend.token_to_id(token)) is not None]
    rows = data.held_out or data.prepared.trees
    return compare(reader, beside, rows, tokenizer, stops, tokens_per_batch=config.tokens_per_batch)
