"""Runs are found and read as their folders tell of them."""

import fcntl
import json
import os
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from instil.errors import UsageError
from instil.training.events import Evaluation, Step
from instil.training.metrics import write_metrics
from instil.training.runs import find_runs, read_run

STEPS = [Step(n, 2.0 / n, 1e-4, 0.5, 100, 40, 1234.5, 0.25 * n) for n in (1, 2, 3)]
EVALUATIONS = [Evaluation(0, 2.5, True, 0.0), Evaluation(2, 1.5, True, 0.6), Evaluation(3, 1.75, False, 0.9)]


def make(folder, *, steps=STEPS, evaluations=EVALUATIONS, **record):
    """A run's folder."""
    folder.mkdir(parents=True)
    held = {
        "config": {"data": ["rows.jsonl"]},
        "resolved": {"steps": 10},
        "state": "finished",
        "ended": None,
        "started": "2026-03-01T10:00:00+00:00",
        **record,
    }
    (folder / "instil.json").write_text(json.dumps(held))
    write_metrics(folder / "metrics.jsonl", steps, evaluations)
    return folder


@contextmanager
def locked(folder):
    """As the process holds it that trains there."""
    number = os.open(folder, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    yield
    os.close(number)


def test_a_run_is_read(tmp_path):
    run = read_run(make(tmp_path / "one", state="interrupted", ended="stopped after step 3"))
    assert (run.name, run.state, run.reason) == (str(tmp_path / "one"), "interrupted", "stopped after step 3")
    assert (run.step, run.steps, run.loss, run.seconds) == (3, 10, 2.0 / 3, 0.9)
    assert run.best == EVALUATIONS[1]
    assert run.data == ["rows.jsonl"]
    assert run.started == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert (run.history, run.evaluations) == (STEPS, EVALUATIONS)


def test_a_run_of_which_nothing_is_measured_yet(tmp_path):
    run = read_run(make(tmp_path / "one", steps=[], evaluations=[], resolved=None))
    assert (run.step, run.steps, run.loss, run.best, run.seconds) == (0, None, None, None, None)
    (tmp_path / "one" / "metrics.jsonl").unlink()
    assert read_run(tmp_path / "one").step == 0


def test_a_best_loss_is_a_number(tmp_path):
    evaluations = [Evaluation(0, float("nan"), False, 0.0), Evaluation(1, 1.5, True, 0.0)]
    assert read_run(make(tmp_path / "one", evaluations=evaluations)).best == evaluations[1]
    assert read_run(make(tmp_path / "two", evaluations=evaluations[:1])).best is None


def test_a_run_that_is_not_locked_does_not_run(tmp_path):
    folder = make(tmp_path / "one", state="running")
    with locked(folder):
        assert read_run(folder).state == "running"
    assert read_run(folder).state == "killed"
    with locked(make(tmp_path / "two", state="failed")):
        assert read_run(tmp_path / "two").state == "failed", "the lock says nothing of a run that has ended"


def test_to_read_a_run_leaves_no_lock(tmp_path):
    folder = make(tmp_path / "one", state="running")
    read_run(folder)
    number = os.open(folder, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(number)


def test_an_older_record_without_a_state_has_finished(tmp_path):
    folder = make(tmp_path / "one")
    record = json.loads((folder / "instil.json").read_text())
    for name in ("state", "started", "ended"):
        del record[name]
    (folder / "instil.json").write_text(json.dumps(record))
    run = read_run(folder)
    assert (run.state, run.started) == ("finished", None)


def test_runs_are_found_in_the_order_in_which_they_began(tmp_path):
    make(tmp_path / "b" / "later", started="2026-03-02T10:00:00+00:00")
    make(tmp_path / "a", started="2026-03-02T10:30:00+02:00")
    make(tmp_path / "c" / "first", started="2026-03-01T10:00:00+00:00")
    make(tmp_path / "c" / "first" / "base")  # what a run holds is its own
    make(tmp_path / ".hidden" / "run")
    names = [run.name for run in find_runs(tmp_path)]
    assert names == [str(tmp_path / name) for name in ("c/first", "a", "b/later")]
    assert [run.name for run in find_runs(tmp_path / "a")] == [str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"config": ', "instil.json is no JSON: Expecting value"),
        ("[1]", "instil.json is no record of a run: it holds no object"),
        ('{"resolved": null}', "instil.json is no record of a run: 'config' is missing"),
        ('{"config": {"data": []}, "resolved": 3}', "instil.json is no record of a run: "),
        ('{"state": "flying"}', "instil.json: state 'flying' is none that is known"),
        ('{"started": "soon"}', "instil.json is no record of a run: "),
    ],
)
def test_what_cannot_be_read_is_found_with_the_reason(tmp_path, text, reason):
    make(tmp_path / "good")
    (make(tmp_path / "bad") / "instil.json").write_text(text)
    bad, good = find_runs(tmp_path)
    assert (bad.name, bad.state) == (str(tmp_path / "bad"), "unreadable")
    assert bad.reason.startswith(reason)
    assert "\n" not in bad.reason
    assert good.state == "finished"
    with pytest.raises(UsageError, match=r"bad: instil\.json"):
        read_run(tmp_path / "bad")


def test_measurements_that_cannot_be_read(tmp_path):
    (make(tmp_path / "bad") / "metrics.jsonl").write_text("{}\n")
    (bad,) = find_runs(tmp_path)
    assert bad.state == "unreadable"
    assert "metrics.jsonl:1: no step and no evaluation" in bad.reason


def test_a_folder_that_is_no_run_is_answered_with_the_nearest_that_is(tmp_path):
    make(tmp_path / "tuned")
    with pytest.raises(UsageError, match="holds no run") as raised:
        read_run(tmp_path / "tuend")
    assert raised.value.remedy == f"did you mean {str(tmp_path / 'tuned')!r}?"
    with pytest.raises(UsageError, match="holds no run") as raised:
        read_run(tmp_path / "tuned" / "nowhere" / "deep")
    assert "instil runs" in raised.value.remedy


def test_where_there_are_none(tmp_path):
    assert find_runs(tmp_path) == []
    with pytest.raises(UsageError, match="nowhere: is no folder"):
        find_runs(tmp_path / "nowhere")
