"""Experiment trackers that watch a run: TensorBoard, Weights & Biases, MLflow and Trackio.

They are told what `metrics.jsonl` holds, by the same names and steps, and the configuration as resolved. Each goes by
its own environment (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`, …), which decides what leaves the machine;
TensorBoard writes to `OUTPUT/tensorboard`. `OUTPUT/trackers.json` keeps the id of each tracker's run, so that a run
that is resumed goes on in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from instil.errors import Interrupted, TrainingError, UsageError
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Resolved, Step, Watcher
from instil.training.metrics import measured

Ending = Literal["finished", "interrupted", "failed"]

_IDS = "trackers.json"
_log = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before anything is loaded for the run.

    Raises:
        UsageError: The first that is not.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a folder of runs that is named like the package
            raise UsageError(
                f"--trackers {name}: the package {name!r} is not installed",
                f"pip install {name}, or all trackers: pip install 'instil[trackers]'.",
            )


@contextlib.contextmanager
def trackers(config: TrainConfig) -> Iterator[list[Watcher]]:
    """The watchers that `config.trackers` asks for; closed on leaving, each told how the run ended.

    A tracker's run is begun by `started`. One that fails there ends the run with a `TrainingError`; one that fails
    later is given up with a warning, and training goes on without it.
    """
    tracking = [_Tracking(name, config) for name in dict.fromkeys(config.trackers)]
    ending: Ending = "failed"
    try:
        yield [*tracking]
        ending = "finished"
    except (KeyboardInterrupt, Interrupted):
        ending = "interrupted"
        raise
    finally:
        for each in tracking:
            each.close(ending)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a tracker is told of a run before it begins.

    Args:
        project: What the tracker files it under; None leaves it to the tracker's environment.
        name: Shown for it.
        folder: Its output.
        settings: The configuration as resolved, plain JSON values by name.
        kept: The id of the tracker's run that is gone on in; None begins a new one.
    """

    project: str | None
    name: str
    folder: Path
    settings: Mapping[str, Any]
    kept: str | None

    def project_or(self, variable: str) -> str:
        """The project: as chosen, of the tracker's environment, or the common one."""
        return self.project or os.environ.get(variable) or "instil"


class _Tracker(Protocol):
    def open(self, run: _Run) -> str:
        """Begin a run, or go on in the one kept; return its id."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured at a step."""

    def close(self, ending: Ending) -> None:
        """End the run, with all that was logged stored."""


class _Tracking:
    """The watcher that feeds one tracker."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self._name = name
        self._config = config
        self._tracker: _Tracker | None = None

    def started(self, resolved: Resolved) -> None:
        config, tracker = self._config, _TRACKERS[self._name]()
        assert config.output is not None
        ids = config.output / _IDS
        settings = {**config.model_dump(mode="json"), **resolved.to_json()}
        try:
            kept = json.loads(ids.read_text(encoding="utf-8")) if ids.exists() else {}
            name = config.run_name or config.output.resolve().name
            run = _Run(config.tracker_project, name, config.output, settings, kept.get(self._name))
            kept[self._name] = tracker.open(run)
            config.output.mkdir(parents=True, exist_ok=True)
            ids.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            raise TrainingError(
                f"--trackers {self._name}: the run cannot be begun there: {_reason(error)}",
                f"Mend that, or leave {self._name} out.",
            ) from error
        self._tracker = tracker

    def stepped(self, step: Step) -> None:
        values = asdict(step)
        del values["measures"]
        self._take(values.pop("step"), values | measured(step))

    def evaluated(self, evaluation: Evaluation) -> None:
        metric = {} if evaluation.value is None else {f"eval_{evaluation.metric}": evaluation.value}
        self._take(evaluation.step, {"eval_loss": evaluation.eval_loss, **metric, **measured(evaluation)})

    def close(self, ending: Ending) -> None:
        if self._tracker is not None:
            with self._given_up_on_failure(self._tracker):
                self._tracker.close(ending)
        self._tracker = None

    def _take(self, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            with self._given_up_on_failure(self._tracker):
                self._tracker.log(step, values)

    @contextlib.contextmanager
    def _given_up_on_failure(self, tracker: _Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            _log.warning("instil: warning: %s tracks this run no more: %s", self._name, _reason(error))


class _TensorBoard:
    def open(self, run: _Run) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.folder / "tensorboard"
        self._resumed = run.kept is not None
        self._writer = SummaryWriter(self._folder, flush_secs=10)
        shown = yaml.safe_dump(_given(run.settings), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", f"```yaml\n{shown}```", 0)
        return self._folder.name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._resumed and "loss" in values:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that were lost with a killed run are taken again from here on; what was logged of them is hidden.
            self._writer.close()
            self._writer = SummaryWriter(self._folder, purge_step=step, flush_secs=10)
            self._resumed = False
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ending: Ending) -> None:
        self._writer.close()


class _WandB:
    _EXIT_CODES: Mapping[Ending, int] = {"finished": 0, "interrupted": 255, "failed": 1}

    def open(self, run: _Run) -> str:
        os.environ.setdefault("WANDB_CONSOLE", "off")  # the progress bar is no log
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which reports to its makers, offline as well
        import wandb

        self._run = wandb.init(
            project=run.project_or("WANDB_PROJECT"),
            name=run.name,
            id=run.kept,
            resume="allow",
            reinit="create_new",
            config=dict(run.settings),
        )
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=self._EXIT_CODES[ending])


class _MLflow:
    _STATUS: Mapping[Ending, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    _SECONDS = 5.0  # from one sending to the next: each is a round trip to the server
    _MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000  # that a server takes at once

    def open(self, run: _Run) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()
        self._id = run.kept or self._begin(run)
        self._client.update_run(self._id, status="RUNNING")
        return self._id

    def _begin(self, run: _Run) -> str:
        from mlflow.entities import Param

        project = run.project_or("MLFLOW_EXPERIMENT_NAME")
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        begun = str(self._client.create_run(number, run_name=run.name).info.run_id)
        params = [Param(name, _as_text(value)[: self._LONGEST_PARAM]) for name, value in _given(run.settings).items()]
        for at in range(0, len(params), self._MOST_PARAMS):
            self._client.log_batch(begun, params=params[at : at + self._MOST_PARAMS])
        return begun

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if len(self._waiting) + len(values) > self._MOST_METRICS:
            self._send()
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in values.items()]
        if time.monotonic() - self._sent_at >= self._SECONDS:
            self._send()

    def _send(self) -> None:
        self._client.log_batch(self._id, metrics=self._waiting)
        self._waiting, self._sent_at = [], time.monotonic()

    def close(self, ending: Ending) -> None:
        self._send()
        self._client.set_terminated(self._id, self._STATUS[ending])


class _Trackio:
    def open(self, run: _Run) -> str:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # standard output is not its to print to
            self._run = trackio.init(
                project=run.project_or("TRACKIO_PROJECT"),
                name=run.kept or run.name,
                resume="allow" if run.kept else "never",
                config=dict(run.settings),
                embed=False,
            )
        return str(self._run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, ending: Ending) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()


_TRACKERS: Mapping[str, type[_Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value."""
    return {name: value for name, value in settings.items() if value not in (None, [], {})}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _reason(error: Exception) -> str:
    """An error of a tracker on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
