"""`instil score` as a user runs it: JSON, table, page and summary say the same of the same rows."""

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from instil.cli import score as command
from instil.data import read
from instil.errors import ModelError, TemplateError
from instil.prompt import PromptOptions, RecordEncoder, load_renderer
from instil.prompt.inspect import to_json

from .small import make_folder

CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic --hide-scrollbars --dump-dom"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without a template of its own, and rows; likelier tokens than at random, so that shades differ."""
    root = tmp_path_factory.mktemp("score")
    config = make_folder(root, 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.save_pretrained(root / "base")
    return root


@pytest.fixture
def score(folder, capsys, monkeypatch, tmp_path):
    """The command in this process, which has loaded torch already; what it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    given = {"model": str(folder / "base"), "data": [str(folder / "rows.jsonl")], "template": "chatml"}

    def run(**settings):
        command.score(options=command.ScoreOptions(**{**given, **settings}))
        return capsys.readouterr()

    return run


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tokens, self.links, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        self.inside = "title" in attributes
        if self.inside:
            self.tokens.append([attributes["class"].split(), attributes["title"], ""])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][2] += data


def test_every_form_says_the_same(score, folder, instil, tmp_path):
    common = ["--model", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--template", "chatml"]
    exchanges = [json.loads(line) for line in instil("score", *common, "--json").stdout.splitlines()]
    renderer = load_renderer(str(folder / "base"), PromptOptions(template="chatml"))
    rows = RecordEncoder(renderer, PromptOptions()).encode(list(read(folder / "rows.jsonl")))
    shown = [to_json(row) for row in rows]
    assert [each["source"] for each in exchanges] == [row["source"] for row in shown]
    for each, row in zip(exchanges, shown, strict=True):
        expected, tokens = row["exchanges"][0], each["tokens"]
        assert [token["id"] for token in tokens] == expected["prompt_ids"] + expected["completion_ids"]
        assert [token["weight"] for token in tokens] == expected["prompt_weights"] + expected["weights"]
        answer = [token["log_probability"] for token in tokens if token["part"] == "completion"]
        assert each["completion"]["log_likelihood"] == pytest.approx(sum(answer))
        assert each["loss"] == pytest.approx(-sum(answer) / len(answer))
        assert (tokens[0]["probability"], tokens[0]["rank"]) == (None, None)
    summary = json.loads(score(as_json=True, summary=True).out)
    assert summary["rows"] == {"kept": 4}
    for part in ("prompt", "completion"):
        assert summary[part]["tokens"] == sum(each[part]["tokens"] for each in exchanges)
        assert summary[part]["log_likelihood"] == pytest.approx(sum(each[part]["log_likelihood"] for each in exchanges))
    worst = sorted(exchanges, key=lambda each: -each["completion"]["perplexity"])
    assert [each["source"] for each in summary["least_likely"]] == [each["source"] for each in worst]
    text = score(row=2).out
    assert f"{exchanges[1]['tokens'][-1]['rank']:,}" in text.splitlines()[-5]
    assert f"log-likelihood {exchanges[1]['completion']['log_likelihood']:,.2f} nats" in text
    assert "rows: 4 kept" in score(summary=True).out
    assert score(html=Path("page.html")).err == "instil: wrote page.html\n"
    check_page((tmp_path / "page.html").read_text(), exchanges)
    if shutil.which("chromium"):
        done = subprocess.run(
            [*CHROMIUM.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        check_page(done.stdout, exchanges)


def check_page(text, exchanges):
    page = Page(text)
    tokens = [token for each in exchanges for token in each["tokens"]]
    assert (page.links, "<script" in text) == ([], False)
    assert len(page.tokens) == len(tokens)
    for (kinds, title, _), token in zip(page.tokens, tokens, strict=True):
        assert ("t" in kinds) == (token["weight"] > 0)
        if token["rank"] is None:
            assert title.startswith("nothing precedes")
            continue
        assert f"rank {token['rank']:,}, " in title
        level = sum(token["probability"] < low for low in (0.5, 0.1, 0.01, 0.001))
        assert f"l{level}" in kinds
    assert len({kind for kinds, _, _ in page.tokens for kind in kinds if kind[0] == "l"}) > 2


MISTAKES = {
    "no model": (["--data", "rows.jsonl"], "--model: is missing"),
    "no such model": (["--data", "rows.jsonl", "--model", "./nowhere"], "./nowhere: no such folder"),
    "unknown flag": (["--modle", "x"], "did you mean '--model'?"),
    "page and JSON": (["--model", "x", "--data", "y", "--html", "a.html", "--json"], "exclude each other"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error(instil, tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    arguments, part = MISTAKES[name]
    done = instil("score", *arguments, code=2)
    assert part in done.stderr
    assert done.stdout == ""


def test_no_template_and_no_weights(score, tmp_path, folder):
    with pytest.raises(TemplateError, match="has no chat template of its own"):
        score(template=None)
    bare = tmp_path / "bare"
    shutil.copytree(folder / "base", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="no weights in this folder"):
        score(model=str(bare))
