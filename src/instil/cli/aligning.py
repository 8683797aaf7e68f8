"""The part of `instil quickstart` that teaches by preferences: three stages, and what chosen answers alone would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from instil.evaluation.statistics import Share
from instil.pocket import data_folder

if TYPE_CHECKING:
    from instil.inference import Loaded
    from instil.pocket.lesson import Lesson
    from instil.pocket.trial import Trial
    from instil.training import TrainConfig

PAIRS = data_folder() / "preferences.jsonl"
_TOKENS = 384  # of the chosen answers and their prompts, in a step
STAGES = {"base": "base", "tuned": "tuned", "aligned": "aligned", "supervised": "chosen answers alone"}
FIGURES = {
    "answerable_right": "Known, of entities never asked about: right",
    "answerable_declined": "… said not to be known",
    "answerable_several_tokens_declined": "… of such as are several tokens",
    "unanswerable_declined": "Names made up: said not to be known",
    "unanswerable_one_token_declined": "… of such as are one token",
    "misplaced_declined": "Things that are no such thing (in no pair)",
    "phrasings_answerable_right": "Known, in phrasings never seen: right",
    "phrasings_answerable_declined": "… said not to be known",
    "phrasings_unanswerable_declined": "Names made up, in such: said not to be known",
    "unsafe_declined": "Unsafe requests declined",
    "harmless_declined": "Harmless ones declined",
    "harmless_right": "… answered right",
    "phrasings_unsafe_declined": "Unsafe, in phrasings never seen: declined",
    "phrasings_harmless_declined": "Harmless, in such: declined",
    "acts_unsafe_declined": "Unsafe, of acts never seen: declined",
    "acts_harmless_declined": "Harmless, of such: declined",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A model after one of the stages.

    Args:
        lesson: What it made of the questions that the pairs are about.
        trial: What it made of those that the instructions are about.
    """

    lesson: Lesson
    trial: Trial


def preferred(tuned: Path, output: Path, seed: int) -> TrainConfig:
    """The run that fits the tuned model to the chosen answers, so that it gives them at all: the reference of DPO.

    Rafailov et al., 2023, arXiv:2305.18290, section 4, begin so where the rows are of another model.
    """
    return _on_pairs(
        tuned, output, seed, objective="supervised", epochs=4.0, tokens_per_step=_TOKENS, learning_rate=2e-3
    )


def aligned(reference: Path, output: Path, seed: int) -> TrainConfig:
    """The run that aligns that model by the pairs."""
    return _on_pairs(
        reference,
        output,
        seed,
        objective="dpo",
        beta=0.3,
        sft_weight=1.0,
        epochs=1.0,
        tokens_per_step=2 * _TOKENS,
        learning_rate=3e-4,
    )


def supervised(reference: Path, output: Path, seed: int, steps: int) -> TrainConfig:
    """The run beside it: the chosen answers alone, in steps of as many rows, as many of them."""
    return _on_pairs(
        reference,
        output,
        seed,
        objective="supervised",
        max_steps=steps,
        tokens_per_step=_TOKENS,
        learning_rate=3e-4,
    )


def _on_pairs(model: Path, output: Path, seed: int, **chosen: Any) -> TrainConfig:
    from instil.training import TrainConfig

    return TrainConfig(
        model=str(model),
        data=[str(PAIRS)],
        output=output,
        adapter="lora",
        merge_adapter=True,
        tokens_per_batch=4096,
        warmup=0.05,
        keep_checkpoints=0,
        seed=seed,
        cache=False,
        **chosen,
    )


def table(stages: Mapping[str, Stage]) -> Table:
    """What the models made of the questions, a column for each stage."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "items", *(STAGES[name] for name in stages)):
        shown.add_column(column, justify="right" if column == "items" else "left")
    figures = {name: stage.lesson.figures() for name, stage in stages.items()}
    for name, title in FIGURES.items():
        _row(shown, title, [figures[stage][name] for stage in stages])
    _row(shown, "What instructions taught, all of it", [stage.trial.everything for stage in stages.values()])
    _row(shown, "Plain facts, as text", [stage.trial.known for stage in stages.values()])
    lengths = (f"{stage.lesson.mean_length:.1f}" for stage in stages.values())
    shown.add_row("Tokens of an answer, on average", "", *lengths)
    return shown


def _row(shown: Table, title: str, shares: Sequence[Share]) -> None:
    shown.add_row(title, f"{shares[0].n:,}", *map(str, shares))


def results(stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Everything measured, as plain JSON values, by stage."""
    return {
        name: {
            **stage.lesson.to_json(),
            "everything": stage.trial.everything.to_json(),
            "plain_facts": stage.trial.known.to_json(),
        }
        for name, stage in stages.items()
    }


def show_examples(console: Console, lessons: Mapping[str, Lesson]) -> None:
    """One question of each kind, and what each model says to it."""
    first = next(iter(lessons.values())).replies
    kinds = dict.fromkeys(reply.kind for reply in first)
    for number in (next(n for n, reply in enumerate(first) if reply.kind == kind) for kind in kinds):
        console.print(Text(first[number].prompt, "bold"))
        for name, lesson in lessons.items():
            reply = lesson.replies[number]
            said = " ".join(reply.answer.split()) or "(blank lines)"
            said = said if len(said) <= 100 else f"{said[:100]} …"
            console.print(
                Text(f"  {STAGES[name]}: ", "dim").append(said, "green" if reply.right else ""), soft_wrap=True
            )


def stage(loaded: Loaded, trial: Trial | None = None, told: Callable[[int], object] | None = None) -> Stage:
    """What a model makes of all questions; `trial` where the one half is known already."""
    from instil.pocket.lesson import ask
    from instil.pocket.trial import examine

    return Stage(ask(loaded, told=told), trial or examine(loaded))
