"""The file of measurements: strict JSON lines, read back as they were."""

import json
import math

import pytest

from instil.errors import UsageError
from instil.training.events import Evaluation, Step
from instil.training.metrics import GrowingMetrics, read_metrics, to_line, write_metrics

STEPS = [Step(n, 2.0 / n, 1e-4, 0.5, 100, 40, 1234.5, 0.25 * n) for n in (1, 2, 3)]
EVALUATIONS = [Evaluation(0, 2.5, True, 0.0), Evaluation(2, 1.5, True, 0.6)]


def test_what_is_written_is_read_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_metrics(file, STEPS, EVALUATIONS)
    assert read_metrics(file) == (STEPS, EVALUATIONS)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [tuple(line)[:2] for line in lines] == [
        ("step", "eval_loss"),
        ("step", "loss"),
        ("step", "loss"),
        ("step", "eval_loss"),
        ("step", "loss"),
    ]
    assert lines[1] == {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens": 100,
        "trained_tokens": 40,
        "tokens_per_second": 1234.5,
        "seconds": 0.25,
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(tmp_path, loss):
    file = tmp_path / "metrics.jsonl"
    write_metrics(file, [Step(1, loss, 1e-4, loss, 100, 40, 10.0, 1.0)], [])

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(file.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["learning_rate"]) == (None, None, 1e-4)
    ((step,), _) = read_metrics(file)
    assert math.isnan(step.loss)


def test_a_line_that_breaks_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_metrics(file, STEPS[:2], [])
    file.write_text(file.read_text()[:-20])
    assert read_metrics(file) == (STEPS[:1], [])


def test_what_is_no_file_of_measurements(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_metrics(file)
    for line in ('{"step": 1}', "[]", "loss"):
        file.write_text(f"{line}\n")
        with pytest.raises(UsageError, match=r"metrics\.jsonl:1: no step and no evaluation"):
            read_metrics(file)


def test_a_file_that_grows_is_read_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [Step(n, 1.0 / n, 1e-4, 0.5, 100, 40, 1234.5, float(n)) for n in range(1, 5)]
    evaluation = Evaluation(2, 0.5, True, 2.5)
    growing = GrowingMetrics()
    path.write_text(to_line(steps[0]) + to_line(steps[1])[:20])
    assert growing.read(path) == (steps[:1], [])
    path.write_text("x" * len(to_line(steps[0])) + to_line(steps[1]) + to_line(evaluation))
    assert growing.read(path) == (steps[:2], [evaluation]), "what was read is not looked at again"
    assert growing.read(path) == (steps[:2], [evaluation])
    with path.open("a") as file:
        file.write(to_line(steps[2]) + "{}\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl:5: no step and no evaluation: \{\}"):
        growing.read(path)
    write_metrics(path, steps, [])
    assert growing.read(path) == (steps, []), "written anew, as where a run goes on from a checkpoint"
