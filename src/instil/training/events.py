"""What a run tells those who watch it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, variance
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from instil.model.forward import TreeModel
    from instil.training.distributed import Processes


@dataclass(frozen=True, slots=True)
class Resolved:
    """Everything a run does by configuration or by counts, settled before the first step.

    Args:
        steps: The optimizer steps to come.
        epochs: The epochs that they make, in whole or in part.
        tokens_per_step: Tokens of the rows of a step, as if nothing were shared.
        settings: All else by name, as plain JSON values: `learning_rate`, `warmup_steps`, `share_prefixes`,
            `precision`, `compile`, `attention`, `trained_parameters`, …
    """

    steps: int
    epochs: float
    tokens_per_step: int
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it by name, as plain JSON values."""
        counts = {"steps": self.steps, "epochs": self.epochs, "tokens_per_step": self.tokens_per_step}
        return {**counts, **self.settings}


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: a line of `metrics.jsonl`.

    Args:
        step: Counted from 1.
        loss: What the objective makes smaller: with supervised rows the mean cross-entropy of the trained tokens,
            weighted, in nats.
        learning_rate: What the step was taken with.
        grad_norm: Of the whole gradient, before it was scaled down.
        tokens: The step's tokens, each shared one once.
        trained_tokens: The targets of weight above 0.
        tokens_per_second: `tokens` by the time the step took.
        seconds: Since training began.
        measures: What the objective measures beside its loss, by name.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def taken(self) -> bool:
        """Whether the weights were changed: not where the loss or the gradient was no finite number."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss on held-out rows after a step, and what else is measured on them.

    Args:
        step: The step it was measured after; 0 before the first.
        eval_loss: The objective's loss on them, as of one step.
        best: Whether it is the best so far: by the metric, where there is one, else by the loss.
        seconds: Since training began.
        metric: The name of what is measured beside the loss; None for nothing.
        value: Its value.
        measures: What the objective measures beside its loss, by name.
    """

    step: int
    eval_loss: float
    best: bool
    seconds: float
    metric: str | None = None
    value: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def decisive(self) -> float:
        """What decides whether it is the best: the metric's value, else the loss."""
        return self.eval_loss if self.value is None else self.value


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The best of a run's evaluations, the first of those that are equal; None where none has a finite number."""
    return next((each for each in reversed(evaluations) if each.best), None)


@dataclass(frozen=True, slots=True)
class Measure:
    """How held-out rows are measured beside their loss, to decide which weights are the best and when to stop.

    Args:
        value: Gives the metric of a model, which is in evaluation mode and must be left as it was. Each of the
            processes that train calls it at the same time, and the value of the first one counts.
        higher_is_better: Whether a greater value is.
        about: What is measured, on what, for people.
    """

    value: Callable[[TreeModel, Processes], float]
    higher_is_better: bool = True
    about: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        steps: Those taken.
        history: Every step.
        evaluations: Every evaluation.
        best_step: The step whose weights the model has now; None if it has those of the last.
        stopped_early: Whether patience ran out.
        seconds: Of training, evaluations included.
        notes: What a person should know about what was written, a sentence each.
    """

    steps: int
    history: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best_step: int | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def lately(history: Sequence[Step]) -> dict[str, float]:
    """What the objective measured over the last tenth of some steps, at least ten of them, on average, by name."""
    last = history[-max(10, len(history) // 10) :]
    names = dict.fromkeys(name for step in last for name in step.measures)
    return {name: mean(values) for name in names if (values := _finite(last, name))}


def chosen_fell(history: Sequence[Step]) -> str | None:
    """A sentence, where chosen answers have become less likely than they were before training; None where not.

    With a reference that is known of every answer. Without one the last tenth of the steps is held against the first:
    their rows differ, and it is said where the means do by twice their standard error.
    """
    count = max(10, len(history) // 10)
    last = _finite(history[-count:], "chosen_logp")
    if len(history) < 10 or not last:
        return None
    if "kl" in history[-1].measures:
        fell, than = lately(history)["chosen_reward"] < 0, "under the reference"
    else:
        first = _finite(history[:count], "chosen_logp")
        if len(history) < 2 * count or min(len(first), len(last)) < 2:
            return None
        error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
        fell, than = mean(first) - mean(last) > 2 * error, "at the beginning"
    return (
        f"chosen answers are less likely than {than}: what is learned is to avoid the rejected ones" if fell else None
    )


def _finite(steps: Sequence[Step], name: str) -> list[float]:
    """The values of a measure that are finite numbers."""
    return [value for step in steps if math.isfinite(value := step.measures.get(name, math.nan))]


@runtime_checkable
class Preparing(Protocol):
    """A watcher that is told as well of what is computed before a run begins."""

    def preparing(self, what: str, done: int, of: int) -> None:
        """Some parts of it are done."""


class Watcher(Protocol):
    """Is told of a run as it goes."""

    def started(self, resolved: Resolved) -> None:
        """Before the first step."""

    def stepped(self, step: Step) -> None:
        """After each optimizer step."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """After each evaluation."""
