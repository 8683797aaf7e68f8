"""`instil complete` as a user runs it: a tiny random model goes on with texts."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from instil.inference import SamplingOptions, load_engine
from instil.model.options import ModelOptions

from .small import make_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    make_folder(folder, 1, max_position_embeddings=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base"))
        with torch.no_grad():
            for each in made.parameters():
                each.add_(0.3 * torch.randn_like(each))
    made.save_pretrained(folder / "base")
    return str(folder / "base")


def answers(model, texts, **options):
    loaded = load_engine(ModelOptions(model=model))
    return loaded.engine.generate([loaded.encode(text) for text in texts], SamplingOptions(**options))


def test_one_prompt_comes_as_text(instil, model):
    done = instil("complete", "--model", model, "--prompt", "Name a <|im_end|>", "--max-new-tokens", "9")
    assert done.stdout == answers(model, ["Name a <|im_end|>"], max_new_tokens=9)[0][0].text + "\n"
    assert "temperature 0" in done.stderr
    piped = instil("complete", "--model", model, "--max-new-tokens", "9", stdin="Name a <|im_end|>\n")
    assert piped.stdout == done.stdout


def test_many_come_as_json(instil, model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is"}\n\n{"prompt": "Tell me", "id": 3}\n')
    options = ["--answers", "2", "--temperature", "0.9", "--seed", "4", "--max-new-tokens", "6"]
    done = instil("complete", "--model", model, "--prompts", "prompts.jsonl", "--json", *options)
    expected = answers(model, ["What is", "Tell me"], answers=2, temperature=0.9, seed=4, max_new_tokens=6)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"], row["answer"], row["text"], row["tokens"], row["ended"]) for row in found] == [
        (prompt, number, each.text, len(each.ids), each.ended)
        for prompt, own in zip(["What is", "Tell me"], expected, strict=True)
        for number, each in enumerate(own)
    ]
    (tmp_path / "prompts.txt").write_text("What is\nTell me\n")
    (tmp_path / "run.yaml").write_text("answers: 2\ntemperature: 0.9\nseed: 4\nmax_new_tokens: 6\n")
    arguments = [
        "complete",
        "--model",
        model,
        "--prompts",
        "prompts.txt",
        "--output",
        "a.jsonl",
        "--config",
        "run.yaml",
    ]
    assert instil(*arguments).stdout == ""
    assert (tmp_path / "a.jsonl").read_text() == done.stdout
    assert "--output a.jsonl: is there already" in instil(*arguments, code=2).stderr


def test_bad_rows_are_told_together(instil, model):
    rows = '{"prompt": "a"}\n{"promt": "b"}\n{"prompt": 3}\nno\n'
    said = instil("complete", "--model", model, "--prompts", "-", code=2, stdin=rows).stderr
    assert "stdin:2: has no field 'prompt' (it has 'promt')" in said
    assert "stdin:3: its prompt is no text: 3" in said
    assert "stdin:4: " in said


def test_prompts_that_the_model_cannot_take(instil, model):
    said = instil("complete", "--model", model, "--prompt", "", "a", "no " * 99, code=2).stderr
    assert "--prompt 1: is empty" in said
    assert "--prompt 3: has" in said
    assert "the model takes 64" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a"], "--model: is missing"),
        (["--model", "m", "--prompt", "a", "--top-p", "1.5"], "--top-p 1.5: must be 1 or less"),
        (["--model", "m", "--prompt", "a", "--tempreature", "1"], "did you mean '--temperature'?"),
        (["--model", "m", "--prompt", "a", "--prompts", "b"], "both were given"),
        (["--model", "m", "--prompts", "b.jsonl"], "b.jsonl: cannot be read"),
        (["--model", "m"], "--prompt: is missing, and nothing stands on standard input"),
    ],
)
def test_mistakes_are_said(instil, arguments, said):
    assert said in instil("complete", *arguments, code=2, stdin="").stderr
