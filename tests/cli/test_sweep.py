"""`instil sweep` through the real command: its runs, its figures held against naive ones, what it refuses."""

import html
import json
import re
import signal
import subprocess
import sys
from statistics import fmean

import pytest

from instil.cli.sweep import SweepOptions
from instil.errors import UsageError

from .small import environment, make_folder

RUN = {
    "init": "base",
    "data": "rows.jsonl",
    "template": "chatml",
    "max_steps": 2,
    "tokens_per_step": 512,
    "precision": "fp32",
    "seed": 7,
}
GIVEN = ["--config", "run.yaml", "--eval", "eval.jsonl", "--metric", "token_f1", "--max-new-tokens", "4"]
VARIED = ["--vary", "prompt_weight=0,1"]
NAMES = ["prompt_weight=0", "prompt_weight=1"]
ITEMS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model's configuration and tokenizer, rows, held-out rows and the settings of a run."""
    root = tmp_path_factory.mktemp("sweep")
    make_folder(root, 20 + ITEMS, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    lines = (root / "rows.jsonl").read_text().splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[:20]))
    (root / "eval.jsonl").write_text("".join(lines[20:]))
    (root / "run.yaml").write_text(json.dumps(RUN))
    return root


def command(*arguments):
    return [sys.executable, "-m", "instil", "sweep", *map(str, arguments)]


def sweep(folder, *arguments, code=0):
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=folder, env=environment(folder), check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def swept(folder):
    """Two settings with two seeds each, the second pair added by another call."""
    first = sweep(folder, *GIVEN, *VARIED, "--seeds", "1", "--output", "out")
    assert first.stderr.count("instil: run ") == 2
    before = (folder / "out" / NAMES[0] / "seed-0" / "items.jsonl").stat().st_mtime_ns
    done = sweep(folder, *GIVEN, *VARIED, "--seeds", "2", "--output", "out", "--resume")
    assert before == (folder / "out" / NAMES[0] / "seed-0" / "items.jsonl").stat().st_mtime_ns
    return folder / "out", done


def items_of(out, name, seed):
    lines = (out / name / f"seed-{seed}" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["scores"]["tuned"] for line in lines]


@pytest.mark.prove
def test_every_run_is_made_once_and_as_the_settings_say(swept):
    out, done = swept
    said = [re.search(r"run (\d) of 4: (\S+), seed (\d)(: done before)?", line) for line in done.stderr.splitlines()]
    runs = [each.groups() for each in said if each]
    assert [(number, name, seed, bool(before)) for number, name, seed, before in runs] == [
        ("1", NAMES[0], "0", True),
        ("2", NAMES[1], "0", True),
        ("3", NAMES[0], "1", False),
        ("4", NAMES[1], "1", False),
    ]
    assert "run.yaml: seed is not taken" in done.stderr
    for name in NAMES:
        for seed in (0, 1):
            folder = out / name / f"seed-{seed}"
            config = json.loads((folder / "instil.json").read_text())["config"]
            assert (config["prompt_weight"], config["seed"]) == (float(name[-1]), seed)
            assert config["max_steps"] == RUN["max_steps"]
            assert {"results.json", "items.jsonl", "report.html"} <= {path.name for path in folder.iterdir()}
            assert not [*folder.glob("*.safetensors"), *folder.glob("checkpoints")]


@pytest.mark.prove
def test_the_figures_are_those_of_the_items(swept):
    """Against sums written out by hand over what the runs left."""
    out, _ = swept
    results = json.loads((out / "results.json").read_text())
    assert [each["values"] for each in results["settings"]] == [{"prompt_weight": 0}, {"prompt_weight": 1}]
    figures = {(each["metric"], each["setting"]): each for each in results["figures"]}
    assert len(figures) == 4
    values = {}
    for name in NAMES:
        runs = [items_of(out, name, seed) for seed in (0, 1)]
        assert all(len(run) == ITEMS for run in runs)
        f1 = [[item["token_f1"]["token_f1"] for item in run] for run in runs]
        found = figures["token_f1", name]
        assert found["tuned"]["mean"] == pytest.approx(sum(map(sum, f1)) / (2 * ITEMS))
        assert (found["tuned"]["n"], found["tuned"]["clusters"]) == (2 * ITEMS, ITEMS)
        losses = [sum(item["reference"]["loss"] for item in run) for run in runs]
        tokens = sum(item["reference"]["tokens"] for item in runs[0])
        loss = figures["held-out loss", name]
        assert loss["seeds"] == pytest.approx({"0": losses[0] / tokens, "1": losses[1] / tokens})
        assert loss["tuned"]["mean"] == pytest.approx(fmean(losses) / tokens)
        values[name] = fmean(losses) / tokens
    assert figures["held-out loss", NAMES[0]]["comparison"] is None
    compared = figures["held-out loss", NAMES[1]]["comparison"]
    assert compared["difference"] == pytest.approx(values[NAMES[1]] - values[NAMES[0]])
    assert compared["n"] == ITEMS
    assert values[NAMES[0]] != values[NAMES[1]]


@pytest.mark.prove
def test_the_table_and_the_report_show_the_figures(swept):
    out, done = swept
    results = json.loads((out / "results.json").read_text())
    page = (out / "report.html").read_text()
    for each in results["figures"]:
        if each["metric"] == "held-out loss":
            mean = f"{each['tuned']['mean']:.4g}"
            assert re.search(rf"^ +{re.escape(each['setting'])} +{mean} \(", done.stdout, re.MULTILINE)
            assert mean in page
    assert all(name in page for name in NAMES)
    answers = page.split("<h2>Answers</h2>")[1]
    assert answers.count('<div class="answer">') == ITEMS
    shown = html.unescape(re.sub(r"</?mark>", "", answers))
    for name in NAMES:
        for line in (out / name / "seed-0" / "items.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            assert item["messages"][-1]["content"] in shown
            assert f"<p>{item['said']['tuned'][0]['text']}</p>" in shown
            assert f"Reference</b><p>{item['wanted']['references'][0]}</p>" in shown
    assert f"{ITEMS} items say little" in done.stderr


@pytest.mark.prove
def test_a_sweep_that_is_another_is_refused(swept, folder):
    assert "a sweep is there" in sweep(folder, *GIVEN, *VARIED, "--output", "out", code=2).stderr
    other = ["--vary", "prompt_weight=0,0.5"]
    assert "the sweep there is another one: settings, folders, data differ" in (
        sweep(folder, *GIVEN, *other, "--output", "out", "--resume", code=2).stderr
    )


def test_everything_wrong_is_said_at_once_before_anything_is_trained(folder):
    given = [*GIVEN, "--output", "none"]
    names = sweep(folder, *given, "--vary", "prompt_wait=0", "seed=1,2", "epochs=", code=2).stderr
    assert "there is no setting 'prompt_wait'; did you mean 'prompt_weight'?" in names
    assert "--vary seed=1,2: seed is not varied so: --seeds says how many there are" in names
    assert "--vary epochs=: has no value" in names
    values = sweep(folder, *given, "--vary", "prompt_weight=0,-1,much", "adapter=none,lore", code=2).stderr
    assert "--vary: --prompt-weight -1: must be 0 or more" in values
    assert "--vary: --prompt-weight much: must be a number" in values
    assert "--vary: --adapter lore: must be none or lora; did you mean 'lora'?" in values
    assert values.count("\n") == 4  # these, and a note on the file's seed
    assert "stands twice" in sweep(folder, *given, "--vary", "prompt_weight=0,0.0", code=2).stderr
    with pytest.raises(UsageError, match="each run reads the data anew"):
        SweepOptions(vary=["a=1"], eval=["e"], output="none", data=["-"])
    with pytest.raises(UsageError, match="--metric f2: there is no such metric"):
        SweepOptions(vary=["a=1"], eval=["e"], output="none", metric=["f2"])
    assert not (folder / "none").exists()


@pytest.mark.prove
def test_more_mistakes(folder):
    (folder / "wrong.yaml").write_text(json.dumps({**RUN, "learning_rat": 1}))
    given = [*VARIED, "--eval", "eval.jsonl", "--output", "none"]
    said = sweep(folder, "--config", "wrong.yaml", *given, code=2).stderr
    assert said == (
        "instil: --config wrong.yaml: learning_rat: there is no such setting\n  did you mean 'learning-rate'?\n"
    )
    assert "--eval: is missing" in sweep(folder, "--config", "run.yaml", *VARIED, "--output", "none", code=2).stderr
    (folder / "bad.jsonl").write_text('{"instruction": "a", "output": "b", "metric": "f2"}\n')
    bad = ["--config", "run.yaml", *VARIED, "--eval", "bad.jsonl", "--output", "none"]
    assert "bad.jsonl:1: metric: there is no metric 'f2'" in sweep(folder, *bad, code=2).stderr
    assert not (folder / "none").exists()


@pytest.mark.prove
def test_a_metric_is_measured_while_the_runs_are_trained(folder):
    measured = {**RUN, "eval_data": "eval.jsonl", "eval_metric": "token_f1", "eval_max_new_tokens": 4}
    (folder / "measured.yaml").write_text(json.dumps(measured))
    given = ["--config", "measured.yaml", *VARIED, "--seeds", "1", "--eval", "eval.jsonl", "--max-new-tokens", "4"]
    sweep(folder, *given, "--output", "measured")
    lines = (folder / "measured" / NAMES[0] / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["metric"] == "token_f1"


@pytest.mark.prove
def test_a_setting_that_fails_leaves_the_others(folder):
    """A learning rate that breaks the model: its run is told of, and the figures of the other are there."""
    done = sweep(folder, *GIVEN, "--vary", "learning_rate=1e-3,1e30", "--seeds", "1", "--output", "broken", code=2)
    assert "1 of 2 runs failed" in done.stderr
    results = json.loads((folder / "broken" / "results.json").read_text())
    assert [each["seeds"] for each in results["settings"]] == [[0], []]
    assert {each["setting"] for each in results["figures"]} == {"learning_rate=1e-3"}
    assert len(results["failed"]) == 1


@pytest.mark.prove
def test_an_interrupted_sweep_goes_on_to_the_same_figures(folder):
    """Asked to stop in the middle of a run: what is done is compared, and the rest comes out as if never stopped."""
    given = [*GIVEN, *VARIED, "--seeds", "1", "--keep-models"]
    sweep(folder, *given, "--output", "whole")
    (folder / "long.yaml").write_text(json.dumps({**RUN, "keep_checkpoints": 1, "checkpoint_every": 1}))
    process = subprocess.Popen(
        command(*given, "--output", "parted"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=environment(folder),
    )
    for line in process.stderr:
        if line.startswith("instil: run 2"):
            process.send_signal(signal.SIGINT)
            break
    assert process.wait(300) == 130
    process.stderr.close()
    parted = json.loads((folder / "parted" / "results.json").read_text())
    assert [each["seeds"] for each in parted["settings"]] == [[0], []]
    sweep(folder, *given, "--output", "parted", "--resume")
    whole, parted = (json.loads((folder / name / "results.json").read_text()) for name in ("whole", "parted"))
    assert parted["figures"] == whole["figures"]
    for name in NAMES:
        kept = [folder / way / name / "seed-0" / "model.safetensors" for way in ("whole", "parted")]
        assert kept[0].read_bytes() == kept[1].read_bytes()
