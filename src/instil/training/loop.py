"""The loop: step after step over the micro-batches of token trees."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from instil.errors import Interrupted, TrainingError
from instil.model.forward import TreeModel
from instil.objectives import supervised
from instil.objectives.objective import Objective
from instil.packing import PackedBatch, TokenTree, pack
from instil.packing.packs import Sharing
from instil.packing.tree import Ints
from instil.training.checkpoint import Checkpoint, Checkpoints
from instil.training.distributed import Processes, reshard, shard, whole
from instil.training.events import Evaluation, Measure, Outcome, Resolved, Step, Watcher, best_of
from instil.training.memory import keep_freed_blocks
from instil.training.optimizer import begun_state, learning_rate, make_optimizers, state_tensors, take_step
from instil.training.options import TrainOptions
from instil.training.preflight import check, check_measure, check_whole, naming, resolve
from instil.training.steps import Steps


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
    processes: Processes | None = None,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
    stopping: Callable[[], int] = lambda: 0,
    measure: Measure | None = None,
    objective: Objective = supervised,
    about: Mapping[str, Any] | None = None,
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
        processes: Those that train together; all are given the same arguments but for `watchers`.
        checkpoints: Where the state is written from time to time.
        resume: What to go on from.
        stopping: Asked after each step for the number of a signal upon which to stop; 0 goes on.
        measure: What is measured beside the loss of held-out rows, and decides in its place; it is called
            `options.eval_metric`.
        objective: What makes a loss of model and batches.
        about: What else the watchers are told of the run before it begins.

    Raises:
        TrainingError: There is nothing to train, it does not fit into memory, or the loss is no number.
        Interrupted: `stopping` said so; the state is saved.
    """
    processes = processes or Processes()
    check(model, trees, rows, held_out=held_out, sharded=options.shard and processes.size > 1)
    check_measure(measure, options, held_out=bool(len(held_out)), sharded=options.shard and processes.size > 1)
    steps = Steps.of(
        trees, options.tokens_per_step, tokens_per_batch, share_prefixes, seed, rows, processes=processes.size
    )
    compares = objective is not supervised
    if compares:
        check_whole(trees, tokens_per_batch)
        check_whole(held_out, tokens_per_batch)
    resolved = resolve(
        model, steps, options, resume, compares=compares, held_out=bool(len(held_out)), processes=processes
    )
    _prepare(model, resolved)
    if options.shard and processes.size > 1:
        shard(model, _layers(model), ["losses"])
    run = _Run(model, resolved, options, objective, watchers, processes, seed, naming(trees))
    evaluations = _Evaluations(run, held_out, options, tokens_per_batch, measure)
    if resume is not None:
        run.restore(resume)
        evaluations.restore(resume)
    told = replace(resolved, settings={**(about or {}), **resolved.settings})
    for watcher in watchers:
        watcher.started(told)
    if evaluations.batches and resume is None:
        evaluations.run(0)
    done = len(run.history)
    left = 0 if evaluations.stopped else max(0, resolved.steps - done)
    for number, batches in islice(steps.after(done), left):
        run.step(number, batches)
        ended = evaluations.are_due(number) and evaluations.run(number)
        asked = stopping()
        interrupted = processes.total(asked)[0] > 0
        saved = None
        if (
            checkpoints is not None
            and checkpoints.keep
            and (interrupted or ended or checkpoints.due(number, resolved.steps))
        ):
            run.check_weights()
            state = {**run.state(), **evaluations.state()}
            saved = checkpoints.save(number, state, run.history, evaluations.found)
        if ended:
            break
        if interrupted and number < resolved.steps:
            raise Interrupted(number, asked, saved)
    return evaluations.finish()


def _prepare(model: TreeModel, resolved: Resolved) -> None:
    if model.device.type == "cpu":
        keep_freed_blocks()
    if resolved.settings["activation_checkpointing"]:
        model.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if resolved.settings["compile"]:
        for layer in _layers(model):
            layer.compile(dynamic=True)


def _layers(model: TreeModel) -> list[GradientCheckpointingLayer]:
    return [each for each in model.base.modules() if isinstance(each, GradientCheckpointingLayer)]


_MODEL, _OPTIMIZER, _BEST = "model.", "optimizer.", "best."
"""What the names of a checkpoint's tensors begin with."""


class _Run:
    """A run under way: the optimizer, and what it has come to."""

    def __init__(
        self,
        model: TreeModel,
        resolved: Resolved,
        options: TrainOptions,
        objective: Objective,
        watchers: Sequence[Watcher],
        processes: Processes,
        seed: int,
        name: Callable[[int], str],
    ) -> None:
        self.model = model
        self.resolved = resolved
        self.options = options
        self.objective = objective
        self.watchers = watchers
        self.processes = processes
        self.seed = seed
        self.name = name
        self.named = {name: each for name, each in model.model.named_parameters() if each.requires_grad}
        self.parameters = list(self.named.values())
        if not self.parameters:
            raise TrainingError("the model has no parameter that is trained", "Train in full, or with --adapter lora.")
        rate = resolved.settings["learning_rate"]
        self.optimizers = make_optimizers(options.optimizer, model.model, rate, options.weight_decay)
        self.history: list[Step] = []
        self.began = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """What is trained and the optimizer's state, by name."""
        trained = {f"{_MODEL}{name}": each.detach() for name, each in self.named.items()}
        states = state_tensors(self.optimizers, {each: name for name, each in self.named.items()})
        return {**trained, **{f"{_OPTIMIZER}{name}": each for name, each in states.items()}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        kinds = {
            name.removeprefix(_OPTIMIZER): kind
            for name, kind in checkpoint.kinds().items()
            if name.startswith(_OPTIMIZER)
        }
        begun_state(self.optimizers, {each: name for name, each in self.named.items()}, kinds)
        checkpoint.load(self.state(), self.processes)
        self.history = checkpoint.steps
        ends = [events[-1].seconds for events in (checkpoint.steps, checkpoint.evaluations) if events]
        self.began -= max(ends)

    def step(self, number: int, batches: Sequence[PackedBatch]) -> None:
        """One optimizer step over its micro-batches."""
        began = time.perf_counter()
        processes = self.processes
        self.model.model.train()
        torch.manual_seed(_seed(self.seed, number, processes.rank))
        mine = processes.share(batches)
        objective = self._ready(number, mine)
        weight = processes.total(sum(map(objective.weight, mine)))[0]  # of the whole step, before its first gradient
        if not weight:
            raise TrainingError(f"step {number}: no token has a weight", "Give its rows an answer that is trained.")
        found = [self._backward(number, objective, batch, weight) for batch in mine]
        losses = [loss for loss, _ in found]
        processes.sum_gradients(self.parameters)
        limit = self.options.max_grad_norm
        with processes.together():
            norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)))
        counted = [batch for batch in mine if batch.target_weights.any()]
        loss, tokens, trained, *sums = processes.total(
            sum(losses),
            sum(batch.size for batch in counted),
            sum(batch.trained for batch in counted),
            *added([sums for _, sums in found]),
        )
        rate = learning_rate(
            number,
            self.resolved.steps,
            self.resolved.settings["warmup_steps"],
            self.resolved.settings["learning_rate"],
            self.options.schedule,
        )
        if math.isfinite(loss) and math.isfinite(norm):
            with _memory_explained(f"step {number}"):
                take_step(self.optimizers, rate)
        else:
            broken = [batch for batch, found in zip(mine, losses, strict=True) if not math.isfinite(found)]
            self._skip(number, loss, norm, broken or mine)
            self.model.zero_grad(set_to_none=True)
        now = time.perf_counter()
        speed, measures = tokens / (now - began), objective.measures(sums)
        step = Step(number, loss, rate, norm, int(tokens), int(trained), speed, now - self.began, measures)
        self.history.append(step)
        for watcher in self.watchers:
            watcher.stepped(step)

    def check_weights(self) -> None:
        """Refuse to keep weights that a step has made no finite numbers.

        Raises:
            TrainingError: There are such.
        """
        with self.processes.together():
            broken = [name for name, each in self.named.items() if not whole(torch.isfinite(each).all())]
        if broken:
            raise TrainingError(
                f"after step {len(self.history)} {len(broken):,} of {len(self.named):,} trained weights are "
                f"no finite numbers: {', '.join(broken[:3])}",
                "Lower --learning-rate, and go on with --resume from the checkpoint before.",
            )

    def _ready(self, number: int, batches: Sequence[PackedBatch]) -> Objective:
        """The objective for the step."""
        largest = max(batches, key=lambda batch: batch.size)
        with self.processes.together(), _memory_explained(f"step {number}", largest):
            return self.objective.ready(self.model, batches, self.processes.total)

    def _backward(
        self, number: int, objective: Objective, batch: PackedBatch, weight: float
    ) -> tuple[float, list[float]]:
        """Add a micro-batch's part to the gradients; its part of the loss, and what is measured of it."""
        with self.processes.together(), _memory_explained(f"step {number}", batch):
            found, sums = objective.loss(self.model, batch)
            loss = found / weight
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach()), sums

    def _skip(self, number: int, loss: float, norm: float, batches: Sequence[PackedBatch]) -> None:
        """Stop before the weights are harmed, or go on without the step if that is wished."""
        rows = {self.name(int(index)) for batch in batches for index in batch.exchange_record}
        named = sorted(set(self.processes.gathered(sorted(rows))))
        skipped = sum(not each.taken for each in self.history)
        if self.options.on_nonfinite == "skip" and skipped < self.options.max_nonfinite:
            return
        shown = ", ".join(named[:10]) + (f" and {len(named) - 10:,} more" if len(named) > 10 else "")
        before = f", and so were {skipped} steps before" if skipped else ""
        raise TrainingError(
            f"step {number}: the loss is {loss:g} and the gradient's norm {norm:g}{before}; the batch's rows: {shown}",
            f"The weights are {'those of the step before' if number > 1 else 'still those that it began with'}. "
            + "Lower --learning-rate, "
            + ("train with --precision fp32, " if self.model.bf16 else "")
            + "look at the rows, or pass over such steps with --on-nonfinite skip.",
        )


@contextmanager
def _memory_explained(
    place: str,
    batch: PackedBatch | None = None,
    *,
    doing: str = "the optimizer took the step",
    remedy: str = "Lower --tokens-per-batch, choose --optimizer adafactor, or train an adapter (--adapter lora).",
) -> Iterator[None]:
    """Say what batch took more memory than there was; without one it is what was being done, by default the optimizer.

    Raises:
        TrainingError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in words:
            raise
        if batch is None:
            raise TrainingError(f"{place}: memory ran out when {doing}", remedy) from error
        raise TrainingError(
            f"{place}: memory ran out on a batch of {batch.size:,} tokens ({batch.exchanges:,} exchanges, the "
            f"longest of {batch.longest:,} tokens, {len(batch.target_ids):,} targets)",
            f"Lower --tokens-per-batch, to {max(batch.longest, batch.size // 2):,} or less, or turn on "
            "--activation-checkpointing on.",
        ) from error


def _seed(seed: int, step: int, rank: int) -> int:
    """What decides dropout in a step: a function of where the run is, so that it is the same when it goes on."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Evaluations:
    """Measures the loss on held-out rows and what else is asked, keeps the best weights, and says when to stop."""

    def __init__(
        self,
        run: _Run,
        trees: Sequence[TokenTree],
        options: TrainOptions,
        tokens_per_batch: int,
        measure: Measure | None,
    ) -> None:
        self.whole_run = run
        self.measure = measure
        self.metric = options.eval_metric if measure is not None else None
        self.patience = options.patience
        self.every: int = run.resolved.settings["eval_every"]
        self.batches = pack(trees, tokens_per_batch) if len(trees) else ()
        self.found: list[Evaluation] = []
        self.kept: dict[str, Tensor] = {}

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss or the best metric, the first of those."""
        return best_of(self.found)

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        last = self.found.index(self.best) if self.best else -1
        worse = sum(each.step > 0 for each in self.found[last + 1 :])
        return self.patience is not None and worse >= self.patience

    def are_due(self, step: int) -> bool:
        """Whether held-out rows are measured after a step."""
        return bool(self.batches) and (step % self.every == 0 or step == self.whole_run.resolved.steps)

    def run(self, step: int) -> bool:
        """Measure; whether patience has run out."""
        run = self.whole_run
        mean, measures = evaluate(run.model, self.batches, run.processes, run.objective)
        value = self._value(step)
        found = Evaluation(step, mean, False, time.perf_counter() - run.began, self.metric, value, measures)
        found = replace(found, best=self._is_better(found))
        self.found.append(found)
        if found.best:
            self._keep()
        for watcher in run.watchers:
            watcher.evaluated(found)
        return self.stopped

    @torch.no_grad()
    def _value(self, step: int) -> float | None:
        """The metric, as the first process has it: all decide alike."""
        if self.measure is None:
            return None
        run = self.whole_run
        compiled = run.resolved.settings["compile"]  # for training; answers grow token by token
        explained = _memory_explained(
            f"step {step}", doing="held-out rows were answered", remedy="Lower --eval-max-new-tokens."
        )
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), explained:
            value = self.measure.value(run.model, run.processes)
        return run.processes.total(value if run.processes.first else 0.0)[0]

    def _is_better(self, found: Evaluation) -> bool:
        """Whether it is better than the best so far; what is no finite number never is."""
        if not (math.isfinite(found.eval_loss) and math.isfinite(found.decisive)):
            return False
        if self.best is None:
            return True
        gain = found.decisive - self.best.decisive
        return gain > 0 if self.measure is not None and self.measure.higher_is_better else gain < 0

    def _keep(self) -> None:
        """Keep the weights as they are now."""
        with torch.no_grad():
            for name, each in self.whole_run.named.items():
                if name in self.kept:
                    self.kept[name].copy_(each)
                else:
                    self.kept[name] = each.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """The best weights by name, where they are not those of the last step."""
        if self.best is None or self.best.step == len(self.whole_run.history):
            return {}
        return {f"{_BEST}{name}": each for name, each in self.kept.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.found = checkpoint.evaluations
        if self.best is not None:
            self._keep()
            if self.best.step != checkpoint.step:
                checkpoint.load({f"{_BEST}{name}": each for name, each in self.kept.items()}, self.whole_run.processes)

    def finish(self) -> Outcome:
        """Put the best weights back."""
        run, last = self.whole_run, len(self.whole_run.history)
        run.check_weights()
        best = self.best.step if self.best else None
        if best is not None and best != last:
            with torch.no_grad():
                for name, kept in self.kept.items():
                    run.named[name].copy_(kept)
        run.model.model.eval()
        if run.resolved.settings["activation_checkpointing"]:
            run.model.base.activation_checkpointing_disable()
        seconds = time.perf_counter() - run.began
        return Outcome(last, run.history, self.found, None if best == last else best, self.stopped, seconds)


@torch.no_grad()
def evaluate(
    model: TreeModel,
    batches: Sequence[PackedBatch],
    processes: Processes | None = None,
    objective: Objective = supervised,
) -> tuple[float, Mapping[str, float]]:
    """The loss of the batches, as of one step, in nats, and what the objective measures beside it."""
    processes = processes or Processes()
    model.model.eval()
    mine = processes.share(batches)
    loss, sums = 0.0, []
    with processes.together(), _memory_explained("held-out rows"):
        objective = objective.ready(model, mine, processes.total)
    for batch in mine:
        with processes.together(), _memory_explained("held-out rows", batch):
            part, of_part = objective.loss(model, batch)
            loss += float(part)
            sums.append(of_part)
    reshard(model)
    loss, weight, *summed = processes.total(loss, sum(map(objective.weight, mine)), *added(sums))
    if not weight:
        raise TrainingError("no token of the held-out rows has a weight", "Give rows with an answer that is trained.")
    return loss / weight, objective.measures(summed)


def added(several: Sequence[Sequence[float]]) -> list[float]:
    """The sums of numbers in the same place."""
    return [math.fsum(same) for same in zip(*several, strict=True)]
