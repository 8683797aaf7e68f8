"""`instil runs` through the real command."""

import json
import math
import subprocess
import sys

import pytest

from instil.cli.curve import draw
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Step
from instil.training.metrics import write_metrics

STEPS = [Step(n, 2.0 + 1.0 / n, 1e-4, 0.5, 100, 40, 1234.5, 30.0 * n) for n in range(1, 1201)]
EVALUATIONS = [Evaluation(0, 3.5, True, 0.0), Evaluation(600, 2.25, True, 9e3), Evaluation(1200, 2.5, False, 36e3)]


def make(folder, *, steps=STEPS, evaluations=EVALUATIONS, **record):
    config = TrainConfig(model="base/model", data=["one/rows.jsonl", "b.csv", "c.csv"], output=folder, lora_rank=16)
    held = {
        "format": 1,
        "base_model": "base/model",
        "config": {**config.model_dump(mode="json"), "seed": 7, "schedule": "linear"},
        "resolved": {"steps": 1200, "learning_rate": 2e-5},
        "versions": {"python": "3.11.7", "instil": "0.1.0"},
        "outcome": {"best_step": 600, "stopped_early": False},
        "notes": ["one thing to know"],
        "state": "finished",
        "ended": None,
        "started": "2026-03-01T10:00:00+00:00",
        **record,
    }
    folder.mkdir(parents=True)
    (folder / "instil.json").write_text(json.dumps(held))
    write_metrics(folder / "metrics.jsonl", steps, evaluations)
    return folder


@pytest.fixture
def some(tmp_path):
    make(tmp_path / "first")
    later = {"outcome": None, "started": "2026-03-02T10:00:00+00:00"}
    make(tmp_path / "lora" / "second", steps=STEPS[:10], evaluations=[], state="running", **later)
    (make(tmp_path / "bad") / "instil.json").write_text("{")
    return tmp_path


def test_the_list(instil, some):
    lines = [line.split() for line in instil("runs").stdout.splitlines()]
    assert lines[0] == ["Run", "State", "Step", "Loss", "Held", "out", "Data", "Time"]
    rows = {line[0]: line[1:] for line in lines[1:] if line}
    data = ["rows.jsonl,", "b.csv", "and", "1", "more"]
    assert rows["first"] == ["finished", "1,200/1,200", "2.0008", "2.2500", *data, "10:00:00"]
    assert rows["lora/second"] == ["killed", "10/1,200", "2.1000", *data, "0:05:00"]
    assert rows["bad"] == ["unreadable"]
    assert rows["bad:"][:5] == ["instil.json", "is", "no", "JSON:", "Expecting"]


def test_a_narrow_terminal_breaks_no_line_of_a_pipe(instil, some):
    shown = instil("runs", COLUMNS="40").stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("lora/second"))
    assert line.rstrip().endswith("0:05:00")
    assert "\x1b" not in shown


def test_the_list_as_json(instil, some):
    listed = json.loads(instil("runs", "--json").stdout)
    assert [(run["run"], run["state"]) for run in listed] == [
        ("bad", "unreadable"),
        ("first", "finished"),
        ("lora/second", "killed"),
    ]
    assert listed[1] == {
        "run": "first",
        "state": "finished",
        "reason": None,
        "started": "2026-03-01T10:00:00+00:00",
        "step": 1200,
        "steps": 1200,
        "loss": STEPS[-1].loss,
        "best_eval_loss": 2.25,
        "data": ["one/rows.jsonl", "b.csv", "c.csv"],
        "seconds": 36000.0,
    }
    assert json.loads(instil("runs", "lora", "--json").stdout) == [{**listed[2], "run": "lora/second"}]


def test_where_there_are_none(instil, tmp_path):
    assert instil("runs").stdout.startswith(".: there are no runs below it")
    assert json.loads(instil("runs", "--json").stdout) == []
    assert instil("runs", "nowhere", code=2).stderr.startswith("instil: nowhere: is no folder\n")


def test_one_run(instil, some):
    shown = instil("runs", "show", "first").stdout
    head, curve, settings, resolved, versions = shown.split("\n\n")
    facts = dict(line.strip().split("  ", 1) for line in head.splitlines()[1:])
    assert head.startswith("first finished\n")
    assert facts["step"].strip() == "1,200/1,200"
    assert facts["loss"].strip() == "3.0000 to 2.0008"
    assert facts["held-out loss"].strip() == "3.5000 to 2.5000, at best 2.2500 after step 600"
    assert facts["weights"].strip() == "those of step 600"
    assert facts["notes"].strip() == "one thing to know"
    assert sorted(line.split() for line in settings.splitlines()[1:]) == [
        ["model", "base/model"],
        ["schedule", "linear"],
        ["seed", "7"],
    ]
    assert "learning_rate" in resolved
    assert versions.split() == ["Versions", "python", "3.11.7", "instil", "0.1.0"]
    assert curve.splitlines()[0] == "Loss in nats a token, by step: the line is the training's, o held out"
    assert curve.count("o", curve.index("┤")) == len(EVALUATIONS)
    assert max(map(len, curve.splitlines())) <= 80
    assert curve.splitlines()[-1].split() == ["0", "1,200"]


def test_one_run_as_json(instil, some):
    shown = json.loads(instil("runs", "show", "first", "--json").stdout)
    assert shown["changed"] == {"seed": 7, "schedule": "linear", "model": "base/model"}
    assert shown["record"]["versions"]["python"] == "3.11.7"
    assert shown["losses"][-1] == [1200, STEPS[-1].loss]
    assert shown["eval_losses"] == [[each.step, each.eval_loss] for each in EVALUATIONS]


def test_why_a_run_ended(instil, tmp_path):
    make(tmp_path / "one", state="failed", ended="step 3: the loss is nan", outcome=None)
    head = instil("runs", "show", "one").stdout.split("\n\n")[0]
    assert head.startswith("one failed\n")
    assert "step 3: the loss is nan" in head
    assert "weights" not in head


def test_losses_that_are_no_numbers(instil, tmp_path):
    make(tmp_path / "one", steps=[Step(1, math.nan, 1e-4, 0.5, 100, 40, 1234.5, 1.0)], evaluations=[])
    assert "no number" in instil("runs").stdout
    assert json.loads(instil("runs", "--json").stdout)[0]["loss"] is None
    assert "┤" not in instil("runs", "show", "one").stdout


def test_a_folder_that_is_no_run(instil, some):
    told = instil("runs", "show", "frist", code=2).stderr
    assert told == "instil: frist: holds no run (there is no instil.json)\n  did you mean 'first'?\n"
    assert instil("runs", "show", "bad", code=2).stderr.startswith("instil: bad: instil.json is no JSON: ")


def test_no_model_library_is_loaded(some):
    code = (
        "import sys\nfrom instil.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    for arguments in (["runs"], ["runs", "show", "first"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, cwd=some
        )
        assert done.stdout.splitlines()[-1] == "[]"


# The curve


def dots(lines):
    """The dots of the plot as `(across, down)`, two by four of them a character."""
    numbers = ((1, 2, 3, 7), (4, 5, 6, 8))  # of Unicode's dots, by column and row
    rows = [line.partition("┤" if "┤" in line else "│")[2] for line in lines[:-2]]
    return {
        (2 * x + a, 4 * y + b)
        for y, row in enumerate(rows)
        for x, each in enumerate(row)
        for a in (0, 1)
        for b in (0, 1, 2, 3)
        if each != " " and (ord(each) - 0x2800) >> (numbers[a][b] - 1) & 1
    }


def test_a_line_that_falls():
    lines = draw([(1, 1.0), (2, 0.0)], width=24, height=7)
    assert [line[0] for line in lines] == ["1", " ", " ", " ", "0", " ", " "]
    assert lines[-1].split() == ["1", "2"]
    found = dots(lines)
    assert {across for across, _ in found} == set(range(40))
    for across, down in found:
        assert abs(down - 19 * across / 39) <= 0.75


def test_a_line_breaks_off_where_there_is_no_number():
    found = dots(draw([(0, 1.0), (1, math.nan), (2, 0.0), (3, 1.0)], width=34, height=6))
    assert {across for across, _ in found} == {0, *range(39, 60)}


def test_marks_and_the_ends_of_the_axes():
    lines = draw([(10, 1.0), (20, 1.0)], [(0, 3.0), (1500, 0.5)], width=20, height=5)
    assert lines[0].startswith("  3 ┤o")
    assert lines[2].startswith("0.5 ┤")
    assert lines[2].endswith("o")
    assert lines[-1].split() == ["0", "1,500"]


def test_a_level_line_and_a_single_point_and_none():
    assert len(dots(draw([(1, 2.0), (2, 2.0)], width=14, height=4))) == 20
    assert len(dots(draw([(1, 2.0)]))) == 1
    assert draw([]) == draw([(1, math.inf)]) == []
