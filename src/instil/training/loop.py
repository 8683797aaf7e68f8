"""The loop: step after step over the micro-batches of token trees."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.objectives import supervised
from instil.packing import PackedBatch, TokenTree, pack
from instil.packing.packs import Sharing
from instil.training.events import Evaluation, Outcome, Resolved, Step, Watcher
from instil.training.optimizer import adamw, learning_rate
from instil.training.options import TrainOptions
from instil.training.steps import Steps


def fit(
    model: TreeModel,
    trees: Sequence[TokenTree],
    options: TrainOptions,
    *,
    held_out: Sequence[TokenTree] = (),
    tokens_per_batch: int = 8192,
    share_prefixes: Sharing = "auto",
    seed: int = 0,
    watchers: Sequence[Watcher] = (),
    settings: dict[str, Any] | None = None,
) -> Outcome:
    """Train a model on the rows' trees; it has the best weights afterwards, where they were compared.

    Args:
        model: Trained in place: every parameter that requires a gradient.
        trees: One for each row.
        options: How it is trained.
        held_out: Rows that the loss is measured on.
        tokens_per_batch: The most tokens of a micro-batch.
        share_prefixes: Whether rows that begin alike share their prefix.
        seed: Decides the order of the rows and dropout.
        watchers: Are told of every step and evaluation.
        settings: What else was resolved, for the watchers.

    Raises:
        TrainingError: There is nothing to train, or the loss is no number.
    """
    steps = Steps.of(trees, options.tokens_per_step, tokens_per_batch, share_prefixes, seed)
    resolved = resolve(model, steps, options, settings or {})
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


def resolve(model: TreeModel, steps: Steps, options: TrainOptions, settings: dict[str, Any]) -> Resolved:
    """Settle what is left to the counts."""
    count = options.max_steps or max(1, round(options.epochs * steps.per_epoch))
    lora = hasattr(model.model, "peft_config")
    chosen = {
        "learning_rate": options.learning_rate or (2e-4 if lora else 2e-5),
        "schedule": options.schedule,
        "warmup_steps": round(options.warmup * count),
        "tokens_per_batch": steps.tokens_per_batch,
        "share_prefixes": steps.share_prefixes,
        "share_prefixes_reason": steps.reason,
        "attention": "token trees" if not model.one_by_one else f"one path at a time: {model.one_by_one}",
        "precision": "bf16" if model.bf16 else "fp32",
        "eval_every": options.eval_every or max(1, count // 10),
    }
    return Resolved(count, count / steps.per_epoch, steps.tokens_per_step, {**chosen, **settings})


class _Run:
    """A run under way: the optimizer, and what it has come to."""

    def __init__(
        self, model: TreeModel, resolved: Resolved, options: TrainOptions, watchers: Sequence[Watcher]
    ) -> None:
        self.model = model
        self.resolved = resolved
        self.options = options
        self.watchers = watchers
        self.parameters = [each for each in model.model.parameters() if each.requires_grad]
        if not self.parameters:
            raise TrainingError("the model has no parameter that is trained", "Train in full, or with --adapter lora.")
        self.optimizer = adamw(model.model, resolved.settings["learning_rate"], options.weight_decay)
        self.history: list[Step] = []
        self.began = time.perf_counter()

    def step(self, number: int, batches: Sequence[PackedBatch]) -> None:
        """One optimizer step over its micro-batches."""
        began = time.perf_counter()
        model, settings = self.model, self.resolved.settings
        model.model.train()
        weights = sum(map(supervised.weight, batches))  # of the whole step, before its first gradient
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
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
        best = self.best is None or mean < self.best.eval_loss
        found = Evaluation(step, mean, best, time.perf_counter() - run.began)
        self.found.append(found)
        if best:
            self.best = found
            self.kept = [each.detach().clone() for each in run.parameters]
        for watcher in run.watchers:
            watcher.evaluated(found)
        worse = len(self.found) - 1 - self.found.index(self.best) if self.best else 0
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
        seconds = time.perf_counter() - run.began
        return Outcome(last, run.history, self.found, None if best == last else best, self.stopped, seconds)


@torch.no_grad()
def evaluate(model: TreeModel, batches: Sequence[PackedBatch]) -> float:
    """The mean cross-entropy of the batches' targets, weighted, in nats."""
    model.model.eval()
    weights = sum(map(supervised.weight, batches))
    return sum(float(supervised.loss(model, batch)) for batch in batches) / weights
