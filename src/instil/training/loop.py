"""The loop: step after step over the micro-batches of token trees."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.objectives import supervised
from instil.packing import PackedBatch, TokenTree, pack
from instil.packing.packs import Sharing
from instil.packing.tree import Ints
from instil.training.events import Evaluation, Outcome, Resolved, Step, Watcher
from instil.training.memory import Kept, Load, Memory, estimate, keep_freed_blocks
from instil.training.optimizer import learning_rate, make_optimizers, take_step
from instil.training.options import TrainOptions
from instil.training.steps import Steps

WORTH_COMPILING = {"cpu": 1e15, "cuda": 1e17}
"""Floating-point operations of a run from which compiling its layers, which takes a minute or two, is worth it."""


def fit(
    model: TreeModel,
    trees: Sequence[TokenTree],
    options: TrainOptions,
    *,
    rows: Ints | None = None,
    held_out: Sequence[TokenTree] = (),
    tokens_per_batch: int = 8192,
    share_prefixes: Sharing = "auto",
    seed: int = 0,
    watchers: Sequence[Watcher] = (),
) -> Outcome:
    """Train a model on the rows' trees; it has the best weights afterwards, where they were compared.

    Args:
        model: Trained in place: every parameter that requires a gradient.
        trees: One for each row.
        options: How it is trained.
        rows: (N,) the indices of the rows that are trained; None for all.
        held_out: Rows that the loss is measured on.
        tokens_per_batch: The most tokens of a micro-batch.
        share_prefixes: Whether rows that begin alike share their prefix.
        seed: Decides the order of the rows and dropout.
        watchers: Are told of every step and evaluation.

    Raises:
        TrainingError: There is nothing to train, or the loss is no number.
    """
    if not len(trees if rows is None else rows):
        raise TrainingError("there are no rows to train", "Give some.")
    steps = Steps.of(trees, options.tokens_per_step, tokens_per_batch, share_prefixes, seed, rows)
    resolved = resolve(model, steps, options, held_out=bool(len(held_out)))
    _prepare(model, resolved)
    run = _Run(model, resolved, options, watchers)
    for watcher in watchers:
        watcher.started(resolved)
    torch.manual_seed(seed)
    evaluations = _Evaluations(run, held_out, options, tokens_per_batch)
    for number, batches in enumerate(islice(steps, resolved.steps), 1):
        run.step(number, batches)
        if evaluations.are_due(number) and evaluations.run(number):
            break
    return evaluations.finish()


def resolve(model: TreeModel, steps: Steps, options: TrainOptions, *, held_out: bool = False) -> Resolved:
    """Settle what is left to the counts.

    Args:
        model: What is trained.
        steps: The steps of an epoch.
        options: How it is trained.
        held_out: Whether rows are held out, so that the best weights are kept.

    Raises:
        TrainingError: The run does not fit into memory.
    """
    count = options.max_steps or max(1, round(options.epochs * steps.per_epoch))
    lora = hasattr(model.model, "peft_config")
    trained, parameters = (sum(each.numel() for each in group) for group in (_trained(model), model.model.parameters()))
    checkpointing, memory = _memory(model, steps, options, held_out)
    work = 6 * parameters * count * steps.tokens_per_step  # multiplications and additions, roughly
    settings = {
        "optimizer": options.optimizer,
        "learning_rate": options.learning_rate or (2e-4 if lora else 2e-5),
        "schedule": options.schedule,
        "warmup_steps": round(options.warmup * count),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "tokens_per_batch": steps.tokens_per_batch,
        "share_prefixes": steps.share_prefixes,
        "share_prefixes_reason": steps.reason,
        "trained_parameters": trained,
        "parameters": parameters,
        "attention": "token trees" if not model.one_by_one else f"one path at a time: {model.one_by_one}",
        "precision": "bf16" if model.bf16 else "fp32",
        "activation_checkpointing": checkpointing,
        "compile": options.compile == "on" or (options.compile == "auto" and work > WORTH_COMPILING[model.device.type]),
        "eval_every": options.eval_every or max(1, count // 10),
        "memory": str(memory),
    }
    return Resolved(count, count / steps.per_epoch, steps.tokens_per_step, settings)


def _memory(model: TreeModel, steps: Steps, options: TrainOptions, held_out: bool) -> tuple[bool, Memory]:
    """Whether activations are computed again, and the memory that takes."""
    load, kept, chosen = Load.of(steps), Kept.by(model), options.activation_checkpointing

    def take(load: Load, checkpointing: bool) -> Memory:
        return estimate(model, options.optimizer, load, kept, checkpointing=checkpointing, held_out=held_out)

    memory = take(load, chosen == "on")
    if memory.needed <= memory.available:
        return chosen == "on", memory
    with_checkpointing = take(load, True)
    if chosen == "auto" and with_checkpointing.needed <= memory.available:
        return True, with_checkpointing
    lower = steps.tokens_per_batch
    while lower > 256 and take(load.within(lower), True).needed > memory.available:
        lower //= 2
    fits = take(load.within(lower), True).needed <= memory.available
    remedy = (
        f"--tokens-per-batch {lower} --activation-checkpointing on" if fits else "--adapter lora, or a smaller model"
    )
    raise TrainingError(f"the run does not fit into memory: {memory}", f"It would fit with {remedy}.")


def _prepare(model: TreeModel, resolved: Resolved) -> None:
    if model.device.type == "cpu":
        keep_freed_blocks()
    if resolved.settings["activation_checkpointing"]:
        model.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if resolved.settings["compile"]:
        for layer in model.base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)


def _trained(model: TreeModel) -> list[torch.nn.Parameter]:
    return [each for each in model.model.parameters() if each.requires_grad]


class _Run:
    """A run under way: the optimizer, and what it has come to."""

    def __init__(
        self, model: TreeModel, resolved: Resolved, options: TrainOptions, watchers: Sequence[Watcher]
    ) -> None:
        self.model = model
        self.resolved = resolved
        self.options = options
        self.watchers = watchers
        self.parameters = _trained(model)
        if not self.parameters:
            raise TrainingError("the model has no parameter that is trained", "Train in full, or with --adapter lora.")
        rate = resolved.settings["learning_rate"]
        self.optimizers = make_optimizers(options.optimizer, model.model, rate, options.weight_decay)
        self.history: list[Step] = []
        self.began = time.perf_counter()

    def step(self, number: int, batches: Sequence[PackedBatch]) -> None:
        """One optimizer step over its micro-batches."""
        began = time.perf_counter()
        model, settings = self.model, self.resolved.settings
        model.model.train()
        weights = sum(map(supervised.weight, batches))  # of the whole step, before its first gradient
        if not weights:
            raise TrainingError(f"step {number}: no token has a weight", "Give its rows an answer that is trained.")
        total, tokens, trained = 0.0, 0, 0
        for batch in batches:
            loss = supervised.loss(model, batch) / weights
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            tokens += batch.size
            trained += int(np.count_nonzero(batch.target_weights))
        limit = self.options.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise TrainingError(
                f"step {number}: the loss is {total:g} and the gradient's norm {norm:g}",
                "Lower --learning-rate, or train with --precision fp32.",
            )
        rate = learning_rate(
            number,
            self.resolved.steps,
            settings["warmup_steps"],
            settings["learning_rate"],
            self.options.schedule,
        )
        take_step(self.optimizers, rate)
        now = time.perf_counter()
        step = Step(number, total, rate, norm, tokens, trained, tokens / (now - began), now - self.began)
        self.history.append(step)
        for watcher in self.watchers:
            watcher.stepped(step)


class _Evaluations:
    """Measures the loss on held-out rows, keeps the best weights, and says when to stop."""

    def __init__(self, run: _Run, trees: Sequence[TokenTree], options: TrainOptions, tokens_per_batch: int) -> None:
        self.whole_run = run
        self.patience = options.patience
        self.every: int = run.resolved.settings["eval_every"]
        self.batches = pack(trees, tokens_per_batch) if len(trees) else ()
        self.found: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.kept: list[torch.Tensor] = []
        self.stopped = False
        if self.batches:
            self.run(0)

    def are_due(self, step: int) -> bool:
        """Whether the loss is measured after a step."""
        return bool(self.batches) and (step % self.every == 0 or step == self.whole_run.resolved.steps)

    def run(self, step: int) -> bool:
        """Measure the loss; whether patience has run out."""
        run = self.whole_run
        mean = evaluate(run.model, self.batches)
        best = math.isfinite(mean) and (self.best is None or mean < self.best.eval_loss)
        found = Evaluation(step, mean, best, time.perf_counter() - run.began)
        self.found.append(found)
        if best:
            self.best = found
            self.kept = [each.detach().clone() for each in run.parameters]
        for watcher in run.watchers:
            watcher.evaluated(found)
        worse = len(self.found) - 1 - self.found.index(self.best) if self.best else len(self.found)
        self.stopped = self.patience is not None and worse >= self.patience
        return self.stopped

    def finish(self) -> Outcome:
        """Put the best weights back."""
        run, last = self.whole_run, len(self.whole_run.history)
        best = self.best.step if self.best else None
        if best is not None and best != last:
            with torch.no_grad():
                for parameter, kept in zip(run.parameters, self.kept, strict=True):
                    parameter.copy_(kept)
        run.model.model.eval()
        if run.resolved.settings["activation_checkpointing"]:
            run.model.base.activation_checkpointing_disable()
        seconds = time.perf_counter() - run.began
        return Outcome(last, run.history, self.found, None if best == last else best, self.stopped, seconds)


@torch.no_grad()
def evaluate(model: TreeModel, batches: Sequence[PackedBatch]) -> float:
    """The mean cross-entropy of the batches' targets, weighted, in nats."""
    model.model.eval()
    weights = sum(map(supervised.weight, batches))
    if not weights:
        raise TrainingError("no token of the held-out rows has a weight", "Give rows with an answer that is trained.")
    return sum(float(supervised.loss(model, batch)) for batch in batches) / weights
