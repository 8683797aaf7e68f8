"""`instil train` through the real command, and what plain transformers and peft make of its output."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from instil.training import TrainConfig, train

from .small import environment, make_folder, rows

ROWS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer, a small configuration, and 50 rows."""
    root = tmp_path_factory.mktemp("train")
    make_folder(root, ROWS, hidden_size=96, intermediate_size=256)
    return root


def instil(folder, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "instil", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def answers(model, tokenizer, count):
    """The greedy answers to the first rows, with whatever ended them."""
    found = []
    for row in rows(count):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        message = {"role": "user", "content": asked}
        ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=80, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return found


@pytest.fixture(scope="module")
def tuned(folder):
    """The model that has learned the rows by heart."""
    arguments = ["--init", "base", "--data", "rows.jsonl", "--output", "tuned", "--template", "chatml"]
    instil(
        folder,
        *arguments,
        "--learning-rate",
        "3e-3",
        "--epochs",
        "60",
        "--tokens-per-step",
        "1024",
        "--precision",
        "fp32",
    )
    return folder / "tuned"


@pytest.mark.prove
def test_answers_learned_by_heart_are_the_references_and_end(tuned):
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    expected = [row["output"] + "<|im_end|>" for row in rows(12)]
    assert answers(model, tokenizer, 12) == expected


def test_the_loss_falls_and_is_written_down(tuned):
    metrics = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[0]["loss"] > 7
    assert metrics[-1]["loss"] < 0.15
    written = json.loads((tuned / "instil.json").read_text())
    assert written["resolved"]["steps"] == len(metrics)
    assert written["added_tokens"].keys() == {"<|im_start|>", "<|im_end|>"}
    generation = json.loads((tuned / "generation_config.json").read_text())
    assert written["stop_tokens"]["<|im_end|>"] in generation["eos_token_id"]


@pytest.mark.prove
def test_an_adapter_is_loaded_by_plain_peft(folder, tuned):
    """The tuned model learns other answers as an adapter; its base stays as it was."""
    changed = [{**row, "output": row["output"].upper()} for row in rows(8)]
    (folder / "upper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    before = (tuned / "model.safetensors").read_bytes()
    instil(
        folder,
        *("--model", "tuned", "--data", "upper.jsonl", "--output", "adapter", "--adapter", "lora", "--lora-rank", "32"),
        *("--learning-rate", "5e-3", "--max-steps", "250", "--precision", "fp32"),
    )
    assert (tuned / "model.safetensors").read_bytes() == before
    assert not (folder / "adapter" / "model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert answers(model, tokenizer, 8) == [row["output"].upper() + "<|im_end|>" for row in rows(8)]


@pytest.mark.prove
def test_python_does_what_the_command_does(folder):
    given = ["--init", "base", "--data", "rows.jsonl", "--template", "alpaca", "--max-steps", "3", "--seed", "5"]
    instil(folder, *given, "--output", "command", "--precision", "fp32")
    config = TrainConfig(
        init=folder / "base",
        data=[str(folder / "rows.jsonl")],
        output=folder / "python",
        template="alpaca",
        max_steps=3,
        seed=5,
        precision="fp32",
        cache=False,
    )
    train(config)
    one, other = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("command", "python"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.prove
def test_a_dry_run_says_what_would_be_done_and_does_nothing(folder):
    shown = instil(
        folder, "--init", "base", "--data", "rows.jsonl", "--template", "chatml", "--output", "dry", "--dry-run"
    ).stdout
    assert "learning rate" in shown
    assert "token trees" in shown
    assert "memory" in shown
    assert not (folder / "dry").exists()


@pytest.mark.prove
def test_rows_that_are_left_out_are_said_before_anything_is_trained(folder):
    (folder / "bad.jsonl").write_text((folder / "rows.jsonl").read_text() + '{"instruction": "no answer"}\n')
    given = ["--init", "base", "--data", "bad.jsonl", "--template", "chatml", "--output", "dry", "--dry-run"]
    limits = ["--on-bad-row", "skip", "--max-length", "40", "--eval-data", "rows.jsonl"]
    shown = instil(folder, *given, *limits).stdout
    rows = re.search(r"rows +read 51, kept (\d+), dropped (\d+), rejected 1\n", shown)
    kept, dropped = map(int, rows.groups())
    assert kept + dropped == ROWS
    assert dropped > 10
    named = r"\(bad\.jsonl:\d+, bad[^)]*, …\)"
    assert re.search(rf"rows not whole +{dropped} dropped \(longer than max_length\) {named}; 1 rejected: ", shown)
    assert re.search(rf"held out +read 50, kept {kept}, dropped {dropped}\n", shown)
    assert re.search(rf"held out and trained +{kept}\n", shown)


@pytest.mark.prove
def test_a_tokenizer_that_is_not_the_models_is_refused(tuned, folder):
    own = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = own["model"]["vocab"]
    (folder / "other").mkdir()
    turned = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    own["model"] |= {"vocab": turned}
    (folder / "other" / "tokenizer.json").write_text(json.dumps(own))
    given = ["--model", tuned, "--tokenizer", "other", "--data", "rows.jsonl", "--template", "chatml", "--output", "x"]
    said = instil(folder, *given, code=2).stderr
    assert re.match(r"instil: --tokenizer other: is not the model's: [\d,]+ of its [\d,]+ ids mean other tokens", said)
    assert not (folder / "x").exists()


@pytest.mark.prove
def test_a_run_that_cannot_fit_is_refused_with_what_would_fit(folder):
    deep = LlamaConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=512, num_attention_heads=2).to_dict()
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text(json.dumps({**deep, "intermediate_size": 128}))
    (folder / "many.jsonl").write_text((folder / "rows.jsonl").read_text() * 300)
    given = ["--init", "deep", "--tokenizer", "base", "--data", "many.jsonl", "--template", "chatml", "--output", "x"]
    large = ["--tokens-per-batch", "500000", "--tokens-per-step", "500000", "--share-prefixes", "off"]
    told = instil(folder, *given, *large, code=2).stderr
    assert "does not fit into memory" in told
    assert "--tokens-per-batch" in told
    assert not (folder / "x").exists()


@pytest.mark.prove
def test_rejected_answers_are_not_taught(folder):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    given = ["--init", "base", "--data", "pairs.jsonl", "--template", "chatml", "--output", "x"]
    done = subprocess.run(
        [sys.executable, "-m", "instil", "train", *given, "--max-steps", "1", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    trained = json.loads((folder / "x" / "instil.json").read_text()) if done.returncode == 0 else None
    assert trained is None or trained["summary"]["exchanges"] == 1, done.stderr


def test_what_training_takes_is_named_where_it_is_missing(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from instil.cli.main import main\n"
        "main(['train', '--init', 'base', '--data', 'rows.jsonl', '--output', 'none'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2
    assert done.stderr == "instil: training needs the package 'torch'\n  pip install 'instil[train]'\n"
