"""Trackers are told what `metrics.jsonl` holds; each is read back with its own reader."""

import importlib.util
import json
import logging
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from instil.errors import Interrupted, TrainingError, UsageError
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Resolved, Step
from instil.training.trackers import check_trackers, trackers

STEPS = [
    Step(n, 2.0 / n, 1e-4 * n, 0.5 + n, 100 * n, 40 * n, 1234.5, 0.25 * n, {"reward_margin": 0.125 * n})
    for n in (1, 2, 3, 4)
]
EVALUATIONS = {0: Evaluation(0, 2.5, True, 0.0), 2: Evaluation(2, 1.5, True, 0.6), 4: Evaluation(4, 1.75, False, 1.1)}
RESOLVED = Resolved(4, 2.0, 2048, {"learning_rate": 3e-4, "attention": "token trees"})
NAMES = [name for name in asdict(STEPS[0]) if name not in ("step", "measures")]


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory):
    """One for all tests: W&B reads its environment once a process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("wandb")
        patch.setenv("WANDB_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _local(monkeypatch, tmp_path, wandb_folder):
    """No tracker leaves the folder of the test."""
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the database takes ten seconds to be made
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def config(tmp_path):
    def make(*names, **values):
        return TrainConfig(model="base", data=["rows.jsonl"], output=tmp_path / "tuned", trackers=names, **values)

    return make


def feed(config, steps=STEPS, error=None):
    """A run as the loop tells it."""
    with trackers(config) as watchers:
        for watcher in watchers:
            watcher.started(RESOLVED)
            if steps[0].step == 1:
                watcher.evaluated(EVALUATIONS[0])
        for step in steps:
            for watcher in watchers:
                watcher.stepped(step)
                if step.step in EVALUATIONS:
                    watcher.evaluated(EVALUATIONS[step.step])
        if error is not None:
            raise error


def expected(steps=STEPS):
    """Every series as `(step, value)`."""
    series = {name: [(step.step, pytest.approx(getattr(step, name))) for step in steps] for name in NAMES}
    series["reward_margin"] = [(step.step, pytest.approx(step.measures["reward_margin"])) for step in steps]
    return {**series, "eval_loss": [(step, each.eval_loss) for step, each in EVALUATIONS.items()]}


# TensorBoard


def tensorboard_series(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(config("tensorboard"))
    assert tensorboard_series(tmp_path / "tuned" / "tensorboard") == expected()
    events = EventAccumulator(str(tmp_path / "tuned" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    (shown,) = (value.decode() for value in text.tensor_proto.string_val)
    assert "learning_rate: 0.0003\n" in shown, "as resolved"
    assert "model: base\n" in shown
    assert "max_steps" not in shown, "it has no value"


def test_tensorboard_shows_a_step_that_was_taken_twice_once(config, tmp_path):
    feed(config("tensorboard"), STEPS[:3])
    again = [Step(3, 9.0, *list(asdict(STEPS[2]).values())[2:]), STEPS[3]]
    feed(config("tensorboard"), again)
    series = tensorboard_series(tmp_path / "tuned" / "tensorboard")
    assert series["loss"] == [(1, 2.0), (2, 1.0), (3, 9.0), (4, 0.5)]
    assert series["eval_loss"] == [(0, 2.5), (2, 1.5), (4, 1.75)]


# Weights & Biases


def wandb_records(file):
    """The records of a `.wandb` file, a log of LevelDB's format: blocks of 32 KiB that hold parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, block = file.read_bytes(), 7, b"", 32 * 1024
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.fixture
def wandb_runs(tmp_path, wandb_folder):
    """The series, configuration, description and exit code of each time that W&B's run of the output was opened."""

    def read():
        sys.modules["wandb"].teardown()  # which waits until the files are written
        kept = json.loads((tmp_path / "tuned" / "trackers.json").read_text())["wandb"]
        return [wandb_run(file) for file in sorted(wandb_folder.glob(f"wandb/offline-run-*-{kept}*/*.wandb"))]

    return read


def wandb_run(file):
    series, settings, run, code = {}, {}, None, None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                series.setdefault(name, []).append((record.history.step.num, value))
        elif kind == "run":
            run = record.run
            settings.update({each.key: json.loads(each.value_json) for each in record.run.config.update})
        elif kind == "exit":
            code = record.exit.exit_code
    return {name: held for name, held in series.items() if name[0] != "_"}, settings, run, code


def test_wandb(config, wandb_runs):
    feed(config("wandb", run_name="first"))
    ((series, settings, run, code),) = wandb_runs()
    assert series == expected()
    assert (settings["learning_rate"], settings["model"], settings["steps"]) == (3e-4, "base", 4)
    assert (run.project, run.display_name, code) == ("instil", "first", 0)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 255), (ValueError(), 1)])
def test_wandb_is_told_how_the_run_ended(config, wandb_runs, error, code):
    with pytest.raises(type(error)):
        feed(config("wandb"), error=error)
    assert [run[3] for run in wandb_runs()] == [code]


def test_wandb_goes_on_in_its_run(config, wandb_runs):
    feed(config("wandb"), STEPS[:2])
    feed(config("wandb"), STEPS[2:])
    both = [run[0]["loss"] for run in wandb_runs()]
    assert sorted(both) == [expected()["loss"][:2], expected()["loss"][2:]]


@pytest.mark.parametrize(("chosen", "project"), [({}, "theirs"), ({"tracker_project": "ours"}, "ours")])
def test_the_environment_of_a_tracker_names_the_project_unless_a_flag_does(
    config, wandb_runs, monkeypatch, chosen, project
):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    feed(config("wandb", **chosen))
    assert [run[2].project for run in wandb_runs()] == [project]


# MLflow


def mlflow_runs():
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("instil")
    runs = client.search_runs([experiment.experiment_id])

    def series(run):
        return {
            name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }

    return [(run, series(run)) for run in runs]


def test_mlflow(config):
    feed(config("mlflow"))
    ((run, series),) = mlflow_runs()
    assert series == expected()
    assert (run.info.run_name, run.info.status) == ("tuned", "FINISHED")
    assert (run.data.params["learning_rate"], run.data.params["data"]) == ("0.0003", '["rows.jsonl"]')
    assert "max_steps" not in run.data.params, "it has no value"


@pytest.mark.parametrize(("error", "status"), [(Interrupted(2, 15, None), "KILLED"), (ValueError(), "FAILED")])
def test_mlflow_goes_on_in_its_run(config, error, status):
    with pytest.raises(type(error)):
        feed(config("mlflow"), STEPS[:2], error)
    assert [run.info.status for run, _ in mlflow_runs()] == [status]
    feed(config("mlflow"), STEPS[2:])
    ((run, series),) = mlflow_runs()
    assert run.info.status == "FINISHED"
    assert series == expected()


def test_mlflow_is_sent_many_steps_in_parts(config):
    many = [Step(n, 1.0 / n, *list(asdict(STEPS[0]).values())[2:]) for n in range(1, 401)]
    feed(config("mlflow"), many)
    ((_, series),) = mlflow_runs()
    assert series["loss"] == [(step.step, step.loss) for step in many]


# Trackio


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio asks for an older pillow")
def test_trackio(config, tmp_path):
    """In a process of its own, for Trackio reads its folder from the environment when it is imported."""
    code = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import test_trackers as t\n"
        "config = t.TrainConfig(model='base', data=['rows.jsonl'], output=Path('tuned'), trackers=['trackio'])\n"
        "t.feed(config, t.STEPS[:2]); t.feed(config, t.STEPS[2:])\n"
        "from trackio.sqlite_storage import SQLiteStorage as storage\n"
        "print(json.dumps([storage.get_runs('instil'), storage.get_logs('instil', 'tuned')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    names, logs = json.loads(done.stdout)  # and nothing of Trackio's own
    assert names == ["tuned"]
    series = {
        name: [(log["step"], log[name]) for log in logs if name in log]
        for name in [*NAMES, "reward_margin", "eval_loss"]
    }
    assert series == expected()


# What can go wrong


def test_each_tracker_asked_for_is_told(config, tmp_path):
    feed(config("tensorboard", "mlflow", "tensorboard"))
    ((_, series),) = mlflow_runs()
    assert tensorboard_series(tmp_path / "tuned" / "tensorboard") == expected() == series
    assert sorted(json.loads((tmp_path / "tuned" / "trackers.json").read_text())) == ["mlflow", "tensorboard"]


def test_a_tracker_that_fails_is_given_up_once_and_the_others_go_on(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("instil.training.trackers._MLflow._SECONDS", 0.0)  # each step is sent
    with trackers(config("mlflow", "tensorboard")) as watchers, caplog.at_level(logging.WARNING):
        for watcher in watchers:
            watcher.started(RESOLVED)
        for step in STEPS:
            for watcher in watchers:
                watcher.stepped(step)
            for file in (tmp_path / "mlflow").glob("*/*/meta.yaml"):
                file.unlink()  # the store loses its run
    said = [record.getMessage() for record in caplog.records if record.name.startswith("instil")]
    assert len(said) == 1
    assert said[0].startswith("instil: warning: mlflow tracks this run no more: ")
    assert "\n" not in said[0]
    assert tensorboard_series(tmp_path / "tuned" / "tensorboard")["loss"] == expected()["loss"]


def test_a_tracker_that_cannot_begin_stops_the_run_before_its_first_step(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://store")
    with pytest.raises(TrainingError, match=r"--trackers mlflow: the run cannot be begun there: .*nowhere"):
        feed(config("mlflow"))


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="'wandb' is not installed") as raised:
        check_trackers(["tensorboard", "wandb"])
    assert "pip install wandb" in raised.value.remedy


def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    importlib.invalidate_caches()
    assert importlib.util.find_spec("trackio") is not None
    with pytest.raises(UsageError, match="'trackio' is not installed"):
        check_trackers(["trackio"])
