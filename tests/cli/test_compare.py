"""`instil compare`: the answers are those that `instil chat` gives for each model, wherever they are shown."""

import html
import json
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from instil.cli import chat, compare
from instil.cli.generating import inert
from instil.errors import DataError, InstilError, TemplateError
from instil.evaluation.report import Answered

from .small import make_folder

SETTINGS = {"template": "human-assistant", "max_new_tokens": 5, "temperature": 1.5, "seed": 3}
FLAGS = ["--template", "human-assistant", "--max-new-tokens", "5", "--temperature", "1.5", "--seed", "3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models that say other things, `one` and `two`, and prompts, one of them of two turns."""
    root = tmp_path_factory.mktemp("compare")
    config = make_folder(root, 3)
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(root / "base", root / name)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    rows = [{"prompt": "Say <it>."}, {"turns": ["Three", "And four"]}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def run(root, capsys, monkeypatch):
    """The command in this process, which has loaded torch already; what it wrote."""
    monkeypatch.chdir(root)

    def run(*models, **settings):
        compare.compare(*models, options=compare.CompareOptions(**{**SETTINGS, **settings}))
        return capsys.readouterr()

    return run


@pytest.fixture
def alone(root, capsys, monkeypatch):
    """What `instil chat` answers."""
    monkeypatch.chdir(root)

    def alone(model, **settings):
        chat.chat(options=chat.ChatOptions(model=model, as_json=True, **{**SETTINGS, **settings}))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return alone


def test_the_answers_are_those_of_chat(run, alone):
    said = {model: alone(model, prompts="prompts.jsonl", answers=2) for model in ("one", "two")}
    assert said["one"] != said["two"]
    found = [
        json.loads(x) for x in run("one", "two", prompts="prompts.jsonl", answers=2, as_json=True).out.splitlines()
    ]
    assert [each["source"] for each in found] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    for number, each in enumerate(found):
        for model in each["models"]:
            expected = said[model.pop("model")][number]
            assert {"source": each["source"], **model} == expected


def test_below_each_other_and_as_a_page(run, alone, root):
    said = {model: alone(model, prompts="prompts.jsonl") for model in ("one", "two")}
    shown = run("one", "two", prompts="prompts.jsonl").out
    for number, (asked, turn) in enumerate((("Say <it>.", None), ("Three", "And four"))):
        assert f"[prompts.jsonl:{number + 1}] {asked}\n" in shown
        for model, replies in said.items():
            last = replies[number]["answers"][0]["content"]
            earlier = f"{replies[number]['messages'][1]['content']}\n\n> {turn}\n\n" if turn else ""
            assert f"[{model}]\n{earlier}{last}\n\n" in shown
    err = run("one", "two", prompts="prompts.jsonl", html="page.html").err
    assert "instil: model 2 of 2: two" in err
    page = (root / "page.html").read_text(encoding="utf-8")
    assert "Say &lt;it&gt;." in page
    assert "<mark>" in page
    beside = re.findall(r'<b class="soft">(.*?)</b><p>(.*?)</p>', page, re.DOTALL)
    texts = [(model, html.unescape(re.sub("</?mark>", "", text))) for model, text in beside]
    assert texts[:2] == [(model, said[model][0]["answers"][0]["content"]) for model in ("one", "two")]


def test_columns_in_a_terminal_that_is_wide_enough(run, alone, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    one, two = (inert(alone(model, prompt="Say it.")[0]["answers"][0]["content"]) for model in ("one", "two"))
    for columns, beside in (("200", True), ("60", False)):
        monkeypatch.setenv("COLUMNS", columns)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", run("one", "two", prompt="Say it.").out)
        assert bool(re.search(r"^one +two +$", shown, re.MULTILINE)) is beside
        assert one.split("\n")[0].strip() in shown
        assert two.split("\n")[0].strip() in shown
        assert ("[two]\n" in shown) is not beside


def test_each_has_its_own_template_unless_one_is_given(run, root):
    shutil.copytree(root / "one", root / "own")
    (root / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}\nA:{% if false %}{% endif %}")
    with pytest.raises(TemplateError, match=r"^two: this tokenizer has no chat template"):
        run("own", "two", prompt="a", template=None)
    assert "template human-assistant" in run("own", "two", prompt="a").err


def test_what_differs_is_told_word_by_word():
    answered = Answered("", [("one", "It is red."), ("two", "It was red."), ("three", "It is red.")])
    assert answered.parts(0) == [("It ", True), ("is", False), (" red.", True)]
    assert answered.parts(1) == [("It ", True), ("was", False), (" red.", True)]
    assert answered.parts(2) == [("It is red.", True)]


def test_mistakes(run, root):
    for models, settings, part in (
        (("one",), {"prompt": "a"}, "1 model to compare"),
        (("one", "two", "one"), {"prompt": "a"}, "one: is named twice"),
        (("one", "two"), {}, "--prompts: is missing, and so is --prompt"),
        (("one", "two"), {"prompt": "a", "html": "x", "as_json": True}, "--html and --json: both were given"),
        (("one", "two"), {"prompt": "a", "html": "prompts.jsonl"}, "--html prompts.jsonl: the file is there and is no"),
        (("one", "two"), {"prompt": "a", "html": "none/x.html"}, "--html none/x.html: the folder none does not exist"),
        (("one", "two"), {"prompt": "a", "template": "llama3"}, "which the template 'llama3' needs"),
    ):
        with pytest.raises(InstilError, match=re.escape(part)):
            run(*models, **settings)
    (root / "long.txt").write_text("One\n" + "word " * 3000 + "\n")
    with pytest.raises(DataError, match=r"long\.txt:2: the last message makes a prompt of"):
        run("one", "two", prompts="long.txt")


@pytest.mark.prove
def test_the_real_command(instil, root, alone):
    expected = alone("two", prompt="Say it.")[0]["answers"][0]["content"]
    done = instil("compare", str(root / "one"), str(root / "two"), "--prompt", "Say it.", *FLAGS)
    assert done.stdout.endswith(f"[{root / 'two'}]\n{expected}\n\n")
    refused = instil("compare", "one", "two", "--model", "three", "--prompt", "a", code=2)
    assert refused.stderr.startswith("instil: --model: there is no such flag")
