"""`instil train --objective dpo` and its kin through the real command, and what they refuse."""

import json
import math
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import GPT2Config

from instil.cli.progress import Progress, compared
from instil.errors import InstilError, Interrupted, TrainingError
from instil.training import TrainConfig, resolve, train
from instil.training.events import lately
from instil.training.metrics import read_metrics

from .small import environment, make_folder, rows

MEASURES = {"reward_accuracy", "reward_margin", "chosen_logp", "rejected_logp"}
RUN = ["--init", "base", "--template", "chatml", "--precision", "fp32", "--learning-rate", "3e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small configuration and tokenizer; pairs whose rejected answer is another row's; labelled answers."""
    root = tmp_path_factory.mktemp("preferences")
    make_folder(root, 2)
    asked = [(" ".join(filter(None, [row["instruction"], row.get("input")])), row["output"]) for row in rows(40)]
    others = [answer for _, answer in asked[1:] + asked[:1]]
    pairs = [
        {"prompt": ask, "chosen": right, "rejected": wrong}
        for (ask, right), wrong in zip(asked, others, strict=True)
        if right != wrong
    ]
    pairs[3]["rejected"] = [pairs[3]["rejected"], "I do not know that."]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
        if isinstance(pair[name], str)
    ]
    for name, found in (("pairs", pairs), ("labelled", labelled)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    return root


def instil(folder, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "instil", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_pairs_are_learned_measured_and_described(folder):
    done = instil(
        folder,
        "train",
        *RUN,
        "--objective",
        "dpo",
        "--data",
        "pairs.jsonl",
        "--eval-fraction",
        "0.1",
        "--output",
        "dpo",
    )
    steps, evaluations = read_metrics(folder / "dpo" / "metrics.jsonl")
    assert all(step.measures.keys() >= MEASURES for step in steps)
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1].loss < 0.5
    assert steps[-1].measures["reward_accuracy"] > 0.8
    assert evaluations[0].eval_loss == pytest.approx(math.log(2), abs=1e-4)
    (line,) = [
        json.loads(line)
        for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()
        if '"step": 1, "loss' in line
    ]
    assert line["reward_margin"] == pytest.approx(0, abs=1e-4)
    record = json.loads((folder / "dpo" / "instil.json").read_text())
    assert record["resolved"]["objective"] == "dpo (beta 0.1)"
    assert record["outcome"]["measures"]["training"]["reward_accuracy"] > 0.5
    assert record["outcome"]["measures"]["held_out"].keys() >= MEASURES
    card = (folder / "dpo" / "README.md").read_text()
    assert "- dpo\n" in card
    assert "reward accuracy" in card
    assert "Losses are means of dpo (beta 0.1)" in card
    curve = (folder / "dpo" / "loss.svg").read_text()
    assert "margin" in curve
    assert "accuracy " in done.stderr
    shown = instil(folder, "runs", "show", "dpo").stdout
    assert "reward margin" in shown


@pytest.mark.prove
def test_a_dry_run_says_what_would_be_compared_and_what_not(folder):
    pair = {"prompt": "Name a city.", "chosen": "Lima.", "rejected": "Lima."}
    more = [pair, {**pair, "rejected": ""}, {**pair, "rejected": "Oslo."}]
    (folder / "alike.jsonl").write_text("".join(json.dumps(each) + "\n" for each in more))
    given = ["--init", "base", "--template", "chatml", "--data", "alike.jsonl", "--objective", "orpo", "--dry-run"]
    said = instil(folder, "train", *given).stdout
    assert "orpo (beta 0.1, sft_weight 1)" in said
    assert "1e-06" in said  # the learning rate
    assert "2 dropped: the rejected answer is empty, or is the chosen one (alike.jsonl:1, alike.jsonl:2)" in said


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder, objective, monkeypatch):
    monkeypatch.chdir(folder)
    config = TrainConfig(
        init="base",
        template="chatml",
        precision="fp32",
        data=["pairs.jsonl" if objective == "dpo" else "labelled.jsonl"],
        objective=objective,
        adapter="lora",
        lora_dropout=0.1,
        learning_rate=1e-2,
        max_steps=6,
        tokens_per_step=400,
        eval_fraction=0.1,
        cache_dir=str(folder / "cache"),
        output=f"whole-{objective}",
    )
    whole = train(config)
    broken = config.model_copy(update={"output": folder / f"broken-{objective}"})
    asked = iter([0, 0, 15])
    with pytest.raises(Interrupted):
        train(broken, stopping=lambda: next(asked))
    train(broken.model_copy(update={"resume": True}))
    one, other = (
        load_file(folder / f"{name}-{objective}" / "adapter_model.safetensors") for name in ("whole", "broken")
    )
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    steps, _ = read_metrics(folder / f"broken-{objective}" / "metrics.jsonl")
    assert [step.loss for step in steps] == [step.loss for step in whole.history]
    assert [step.measures for step in steps] == [step.measures for step in whole.history]
    assert whole.history[-1].measures["kl"] != 0


def test_good_and_bad_answers_are_learned(folder, monkeypatch):
    monkeypatch.chdir(folder)
    settings = {"init": "base", "template": "chatml", "precision": "fp32", "cache": False}
    steps = train(
        TrainConfig(**settings, objective="kto", data=["labelled.jsonl"], learning_rate=3e-3, epochs=6, output="kto")
    ).history
    assert steps[0].loss == pytest.approx(0.5, abs=1e-3)
    assert steps[-1].loss < 0.49
    assert steps[-1].measures["reward_margin"] > 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "preference"}, "Say how: --objective dpo"),
        ({"objective": "dpo", "prompt_weight": 1.0}, "their prompt is the same"),
        ({"objective": "dpo", "eval_fraction": 0.1, "eval_metric": "chrf"}, "exclude each other"),
        ({"objective": "dpo", "margin": 1.0}, "a setting of the objective simpo"),
        ({"beta": 0.2}, "a setting of the objective dpo"),
        ({"objective": "orpo", "reference": "adapter-off"}, "a setting of the objective dpo"),
        ({"objective": "dpo", "reference": "adapter-off"}, "no new adapter to switch off"),
        ({"objective": "kto", "shard": True}, "wait for each other"),
        ({"objective": "dpo", "tokens_per_batch": 150, "on_too_long": "error"}, "do not fit a batch of 150 tokens"),
        ({"objective": "dpo", "data": ["labelled.jsonl"]}, "do not have a chosen and a rejected answer"),
        ({"objective": "kto", "data": ["rows.jsonl"]}, "or one labelled good or bad"),
        ({"objective": "dpo", "data": ["apart.jsonl"]}, "the prompts of chosen and rejected differ"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, settings, said, monkeypatch):
    monkeypatch.chdir(folder)
    asks = [{"role": "user", "content": text} for text in ("a", "b")]
    answer = {"role": "assistant", "content": "c"}
    apart = {"chosen": [asks[0], answer], "rejected": [asks[1], answer]}
    long = {"prompt": "word " * 20, "chosen": "yes " * 40, "rejected": "no " * 40}
    (folder / "apart.jsonl").write_text(json.dumps(apart) + "\n")
    (folder / "long.jsonl").write_text(json.dumps(long) + "\n")
    data = {"data": ["long.jsonl" if "tokens_per_batch" in settings else "pairs.jsonl"], "cache": False}
    with pytest.raises(InstilError) as refused:
        train(TrainConfig(**{"init": "base", "template": "chatml", "output": "none", **data, **settings}))
    assert said in f"{refused.value} {refused.value.remedy}"
    assert not (folder / "none").exists()


@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_rows_that_no_position_is_left_for_are_refused_before_the_reference_reads_them(folder, where, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "gpt2").mkdir(exist_ok=True)
    vocabulary = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    sizes = {"vocab_size": vocabulary, "n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2Config(**sizes).save_pretrained(folder / "gpt2")
    long = {"prompt": "Name it.", "chosen": "yes " * 150, "rejected": "no"}
    (folder / "longer.jsonl").write_text(json.dumps(long) + "\n")
    settings = {"data": ["pairs.jsonl"], "init": "gpt2", "tokenizer": "base", "template": "chatml", "cache": False}
    config = TrainConfig(**{**settings, where: ["longer.jsonl"]}, max_length=400, objective="dpo", output="none")
    for call in (train, resolve):
        with pytest.raises(TrainingError, match=r"longer.jsonl:1: is longer than the 128 positions"):
            call(config)
    assert not (folder / "none").exists()


def test_where_all_answers_are_good_there_is_no_margin_and_none_is_shown(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = (folder / "labelled.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if json.loads(line)["label"]][:6]
    (folder / "good.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    settings = {"init": "base", "template": "chatml", "precision": "fp32", "cache": False, "output": "good"}
    said = StringIO()
    progress = Progress(Console(file=said, width=200))
    steps = train(TrainConfig(**settings, objective="kto", data=["good.jsonl"], max_steps=2), [progress]).history
    assert "step 2/2" in said.getvalue()
    assert "nan" not in said.getvalue()
    assert [compared(step.measures) for step in steps] == [
        f"accuracy {step.measures['reward_accuracy']:.1%}" for step in steps
    ]
    assert "margin" not in compared(lately(steps))


def test_a_setting_of_another_objective_is_one_clear_error(folder):
    given = ["--init", "base", "--data", "pairs.jsonl", "--output", "none", "--objective", "dop"]
    done = instil(folder, "train", *given, code=2)
    assert "dpo" in done.stderr
    assert not (folder / "none").exists()


@pytest.mark.prove
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_take_the_steps_of_one(folder, objective):
    data = "pairs.jsonl" if objective == "dpo" else "labelled.jsonl"
    given = [
        *("train", *RUN, "--objective", objective, "--data", data, "--max-steps", "6", "--tokens-per-step", "500"),
        *("--tokens-per-batch", "300", "--eval-fraction", "0.1", "--no-cache"),
    ]
    instil(folder, *given, "--output", f"one-{objective}")
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "instil"]
    done = subprocess.run(
        [*two, *given, "--output", f"two-{objective}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
    )
    assert done.returncode == 0, done.stderr
    one, other = (read_metrics(folder / f"{name}-{objective}" / "metrics.jsonl") for name in ("one", "two"))
    for mine, theirs in zip(one[0] + one[1], other[0] + other[1], strict=True):
        loss = "loss" if hasattr(mine, "loss") else "eval_loss"
        assert getattr(mine, loss) == pytest.approx(getattr(theirs, loss), abs=1e-4)
        for name in ("reward_margin", "chosen_logp", "kl"):
            assert mine.measures[name] == pytest.approx(theirs.measures[name], abs=1e-3)
