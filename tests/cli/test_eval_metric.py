"""`instil train --eval-metric` through the real command: what it says, writes and refuses."""

import json
import subprocess
import sys

import pytest

from instil.training.metrics import read_metrics

from .small import environment, make_folder, rows

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "instil"]
SETTINGS = {
    "init": "base",
    "data": ["rows.jsonl"],
    "eval_data": ["held.jsonl"],
    "template": "chatml",
    "learning_rate": 5e-3,
    "max_steps": 40,
    "tokens_per_step": 1024,
    "eval_every": 10,
    "checkpoint_every": 20,
    "keep_checkpoints": 9,
    "precision": "fp32",
    "eval_metric": "exact_match",
    "eval_metric_rows": 10,
    "eval_max_new_tokens": 24,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Held out are rows that are learned by heart, and questions of the same whose answers are quite other ones: the
    surer the model is of what it learns, the worse is its loss on those.
    """
    root = tmp_path_factory.mktemp("metric")
    make_folder(root, 10)
    some = rows(10)
    others = [{**row, "output": "zebra quartz vex " * 8} for row in some]
    held = [row for pair in zip(some, others, strict=True) for row in pair]
    (root / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    (root / "run.yaml").write_text(json.dumps(SETTINGS))
    return root


def run(folder, *arguments, command=(sys.executable, "-m", "instil"), code=0):
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment(folder))
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def train(folder, output, *arguments, **given):
    return run(folder, "train", "--config", "run.yaml", "--output", output, *arguments, **given).stderr


def measured(folder, output):
    found = read_metrics(folder / output / "metrics.jsonl")[1]
    return [(each.step, each.eval_loss, each.value, each.best) for each in found]


@pytest.mark.prove
def test_the_best_by_the_metric_is_not_the_best_by_the_loss(folder):
    said = train(folder, "tuned")
    found = measured(folder, "tuned")
    losses, values = [each[1] for each in found], [each[2] for each in found]
    by_loss, by_metric = losses.index(min(losses)), values.index(max(values))
    assert values[by_loss] < values[by_metric] > 0.5
    assert [each[3] for each in found].count(True) > 1
    assert by_metric == max(at for at, each in enumerate(found) if each[3])
    record = json.loads((folder / "tuned" / "instil.json").read_text())
    kept = found[by_metric][0]
    assert record["outcome"]["best_step"] == (None if kept == 40 else kept)
    assert "exact_match (higher is better) of greedy answers to 10 of 20 held-out rows, evenly spaced" in said
    assert f"step {kept}: held-out loss {losses[by_metric]:.4f}, exact_match {max(values):.4f}, the best so far" in said
    assert f", exact_match {values[0]:.4f} to {values[-1]:.4f}" in said
    shown = run(folder, "runs", "show", "tuned").stdout
    assert f"{values[0]:.4f} to {values[-1]:.4f}, at best {max(values):.4f} after step {kept}" in shown
    series = json.loads(run(folder, "runs", "show", "tuned", "--json").stdout)["eval_metrics"]
    assert series == [[each[0], "exact_match", each[2]] for each in found]


@pytest.mark.prove
def test_patience_is_for_the_metric(folder):
    said = train(folder, "patient", "--patience", "2", "--max-steps", "200")
    found = measured(folder, "patient")
    best = max(at for at, each in enumerate(found) if each[3])
    assert len(found) - 1 - best >= 2
    assert found[-1][0] < 200
    assert "; ended early, for the held-out exact_match got no better" in said


@pytest.mark.prove
def test_two_processes_decide_as_one_and_a_run_goes_on(folder):
    train(folder, "one")
    train(folder, "two", command=TWO)
    alone, together = measured(folder, "one"), measured(folder, "two")
    assert [(each[0], each[2], each[3]) for each in alone] == [(each[0], each[2], each[3]) for each in together]
    assert {each[2] for each in alone} != {0.0}
    weights = (folder / "one" / "model.safetensors").read_bytes()
    later = folder / "one" / "checkpoints" / "step-00000040"
    record = folder / "one" / "instil.json"
    subprocess.run(["rm", "-r", str(later), str(folder / "one" / "model.safetensors")], check=True)
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "interrupted"}))
    assert "step-00000020" in train(folder, "one", "--resume")
    assert measured(folder, "one") == alone
    assert (folder / "one" / "model.safetensors").read_bytes() == weights


HELD = ["--eval-data", "rows.jsonl"]
MISTAKES = {
    "a mistyped metric": (
        [*HELD, "--eval-metric", "exact-match"],
        "--eval-metric exact-match: there is no such metric\n  did you mean 'exact_match'?",
    ),
    "programs": ([*HELD, "--eval-metric", "execute"], "--eval-metric execute: runs programs that the model writes"),
    "nothing held out": (["--eval-metric", "bleu"], "--eval-metric bleu: there are no held-out rows to evaluate on"),
    "rows of no metric": ([*HELD, "--eval-metric-rows", "5"], "--eval-metric-rows: says how answers are measured"),
    "no rows": ([*HELD, "--eval-metric", "bleu", "--eval-metric-rows", "0"], "--eval-metric-rows 0: must be 1 or more"),
    "a model in parts": (
        [*HELD, "--eval-metric", "bleu", "--shard"],
        "--shard and --eval-metric bleu exclude each other: a model in parts generates nothing",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_for_each_mistake(folder, mistake):
    arguments, said = MISTAKES[mistake]
    done = run(folder, "train", "--model", "m", "--data", "rows.jsonl", "--output", "none", *arguments, code=2)
    assert done.stderr.startswith(f"instil: {said}")
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.prove
def test_rows_without_an_answer_are_named_by_a_dry_run(folder):
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    asked = {"role": "user", "content": "Look."}
    calling, said = {"content": "", "tool_calls": [call]}, {"content": "So."}
    lines = [{"messages": [asked, {"role": "assistant", **each}]} for each in (calling, said, calling)]
    (folder / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(folder, "train", "--config", "run.yaml", "--eval-data", "bad.jsonl", "--dry-run", code=2)
    assert "bad.jsonl:1: its last answer has no text" in done.stderr
    assert "bad.jsonl:3: its last answer has no text" in done.stderr
    assert "bad.jsonl:2" not in done.stderr
