"""`instil train`: a base model and data in, a tuned model out."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.cli.main import REMEDIES
from instil.cli.stopping import Stopping
from instil.errors import UsageError
from instil.evaluation.held_out import check_metric
from instil.training.config import TrainConfig, check
from instil.training.events import Outcome, Watcher, lately

if TYPE_CHECKING:
    from instil.training.run import Measuring

_INSTEAD = ("dry_run", "print_config", "print_schema")
Switch = Annotated[bool, Parameter(negative=())]


class TrainCommand(TrainConfig):
    """Everything that `instil train` takes."""

    data: list[str] = Field(default_factory=list, description=TrainConfig.model_fields["data"].description)
    dry_run: Switch = Field(default=False, description="Say what would be done, step sizes included; train nothing.")
    print_config: Switch = Field(default=False, description="Print the settings as YAML, which --config takes.")
    print_schema: Switch = Field(default=False, description="Print the JSON schema of that YAML, for editors.")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainCommand:
        instead = [f"--{name.replace('_', '-')}" for name in _INSTEAD if getattr(self, name)]
        if len(instead) > 1:
            raise UsageError(f"{' and '.join(instead)} exclude each other", "Give one.")
        if self.print_schema:
            return self
        if not self.data:
            raise UsageError("--data: is missing", REMEDIES["data"])
        check(self)
        if self.eval_metric != "loss":
            check_metric(self.eval_metric)
        if self.output is None and not instead:
            raise UsageError("--output: is missing", "Name the folder that takes the tuned model, which is made.")
        return self

    def config(self) -> TrainConfig:
        """The run, without the command's own switches."""
        values = {name: getattr(self, name) for name in TrainConfig.model_fields}
        given = self.model_fields_set.difference(_INSTEAD)
        return TrainConfig.model_construct(_fields_set=given, **values)  # checked already, and read: not twice


def train(*, options: Annotated[TrainCommand | None, Parameter(name="*")] = None) -> None:
    """Tune a model on data; the output folder holds the model, its tokenizer and template, and how it came about.

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    options = options or TrainCommand()  # which says what is missing
    if options.print_schema:
        sys.stdout.write(json.dumps(schema(), ensure_ascii=False, indent=2) + "\n")
        return
    config = options.config()
    if options.print_config:
        sys.stdout.write(config.to_yaml())
        return
    for remark in config.remarks():
        sys.stderr.write(f"instil: note: {remark}\n")
    if options.dry_run:
        _show(config)
    else:
        _train(config)


def schema() -> dict[str, Any]:
    """The JSON schema of the file that `--config` takes."""
    made = TrainConfig.model_json_schema()
    del made["required"]  # flags may give the rest
    made["description"] = "Settings of `instil train`, by the names of its flags."
    for setting in made["properties"].values():
        setting.pop("title", None)
        if setting.get("type") == "array":
            setting["type"] = ["array", "string"]  # one may stand without its dash
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "instil train"}


def _show(config: TrainConfig) -> None:
    from rich.console import Console

    from instil.cli.progress import show_resolved
    from instil.training import resolve

    hush()
    show_resolved(resolve(config, measuring(config)), Console(highlight=False))


def _train(config: TrainConfig) -> None:
    from instil.cli.progress import Progress
    from instil.training.output import check_output
    from instil.training.trackers import check_trackers

    assert config.output is not None
    check_output(config.output, resume=config.resume)  # before torch is loaded, which takes its time
    check_trackers(config.trackers)
    from instil.training import train as run

    hush()
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes that torchrun started
    with Progress() if speaks else nullcontext() as progress, Stopping() as stopping:
        watchers: list[Watcher] = [stopping, *([progress] if progress else [])]
        outcome = run(config, watchers, stopping=stopping.asked, measure=measuring(config))
    if not speaks:
        return
    notes = "".join(f"instil: note: {note}\n" for note in outcome.notes)
    with suppress(OSError):  # no one hears, and the model is written
        sys.stderr.write(f"instil: {_summary(outcome)}\n{notes}instil: wrote {config.output}\n")
        sys.stderr.flush()


def measuring(config: TrainConfig) -> Measuring | None:
    """What measures the metric chosen; None where that is the loss."""
    if config.eval_metric == "loss":
        return None
    from instil.evaluation.held_out import measure

    return measure


def hush() -> None:
    """No bars of transformers where no one watches: each of their states would be a line of its own."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _summary(outcome: Outcome) -> str:
    from instil.cli.progress import compared

    said = f"{outcome.steps:,} step{'s' if outcome.steps > 1 else ''} in {outcome.seconds:,.0f} seconds"
    if outcome.history:
        said += f", loss {outcome.history[0].loss:.4f} to {outcome.history[-1].loss:.4f}"
    metric = None
    if outcome.evaluations:
        first, last = outcome.evaluations[0], outcome.evaluations[-1]
        metric = last.metric
        said += f", held-out loss {first.eval_loss:.4f} to {last.eval_loss:.4f}"
        said += f", {metric} {first.value:.4f} to {last.value:.4f}" if metric else ""
        told = compared(last.measures)
        said += f" ({told})" if told else ""
    elif outcome.history and (told := compared(lately(outcome.history))):
        said += f", over the last steps {told}"
    skipped = sum(not step.taken for step in outcome.history)
    if skipped:
        said += f"; {skipped:,} steps were skipped, for their loss or gradient was no finite number"
    if outcome.stopped_early:
        said += f"; ended early, for the held-out {f'{metric} got no better' if metric else 'loss fell no more'}"
    if outcome.best_step is not None:
        said += f"; the weights are those of step {outcome.best_step:,}"
    return said
