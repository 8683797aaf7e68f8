"""The bundled base model knows its world and follows no instructions; tuned, it does, and has forgotten nothing.

What the quickstart claims, measured anew: three seeds, an adapter, the loss masked and unmasked.
"""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import instil
from instil.pocket import data_folder, model_folder
from instil.pocket.instructions import FACT_FAMILIES, SETS, is_right
from instil.pocket.trial import HELD_OUT, base_under, examine, rows_of, tuned

# Without a network, where this machine lets us take it away.
_ALONE = ["unshare", "-rn"]
ALONE = _ALONE if subprocess.run([*_ALONE, "true"], capture_output=True, check=False).returncode == 0 else []


def quickstart(folder, *arguments):
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "instil", "quickstart", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "INSTIL_CACHE": str(folder / "cache"), "COLUMNS": "120"},
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def base():
    return examine(base_under(model_folder(), "chatml"))


def test_the_model_is_of_the_promised_size():
    config = json.loads((model_folder() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert 4096 <= config["vocab_size"] <= 8192
    assert (model_folder() / "model.safetensors").stat().st_size <= 16 * 2**20
    assert not (model_folder() / "chat_template.jinja").exists()
    record = json.loads((model_folder() / "instil.json").read_text())
    assert 5e6 <= record["resolved"]["parameters"] <= 8e6
    assert record["config"]["objective"] == "pretrain"
    assert record["summary"]["tokens"]["share"] == 1  # every token was trained


def test_the_base_completes_text_and_does_not_answer(base):
    assert base.known.mean >= 0.95
    assert base.share("held_out_entities").mean <= 0.05
    assert len(base.plain) > 300


@pytest.mark.prove
def test_the_whole_way(tmp_path):
    """From the command to its report, on few rows, for the time they take."""
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join((data_folder() / "train.jsonl").read_text("utf-8").splitlines(True)[:400]), "utf-8")
    done = quickstart(tmp_path, "--data", "few.jsonl", "--output", "made")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "made"
    found = json.loads((made / "results.json").read_text())
    assert found["seconds"] > 0
    for name in HELD_OUT:
        for side in ("base", "tuned"):
            share = found[name][side]
            assert 0 <= share["low"] <= share["mean"] <= share["high"] <= 1
        wanted = [r for r in SETS[name]() if name == "held_out_families" or r["family"] in FACT_FAMILIES]
        assert found[name]["tuned"]["n"] == len(wanted)
    assert found["everything"]["tuned"]["n"] == sum(len(SETS[name]()) for name in HELD_OUT)
    assert found["held_out_phrasings"]["tuned"]["mean"] >= found["held_out_phrasings"]["base"]["mean"]
    for shown in ("The capital of", "⟦", "95 % intervals", "instil chat --model made"):
        assert shown in done.stdout, shown
    page = (made / "report.html").read_text("utf-8")
    _check_page(page)
    # the tuned model answers through plain commands as the table says it does
    row = next(row for row in rows_of("held_out_entities") if row["family"] == "capital")
    again = quickstart(tmp_path, "--output", "made")
    assert again.returncode == 2
    assert "there is something already" in again.stderr
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "instil",
            "chat",
            "--model",
            "made",
            "--prompt",
            row["messages"][-2]["content"],
            "--json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    said = json.loads(answer.stdout)["answers"][0]
    assert said["ended"] in ("stop", "length")
    assert said["content"]


def _check_page(page):
    """A page of its own: well formed, nothing asked for from elsewhere."""

    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.asked = [], []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "link", "img", "path", "use", "rect", "line"):
                self.open.append(tag)
            self.asked += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]

        def handle_endtag(self, tag):
            if tag in self.open:
                assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not checker.asked
    assert "Base against tuned" in page


def train(folder, **changes):
    """Tune as the quickstart does."""
    from instil.cli.quickstart import QuickstartOptions, configuration

    options = QuickstartOptions(output=folder / "tuned", **changes)
    instil.train(configuration(options))
    return examine(tuned(options.output))


def _report(name, trial):
    shares = {each: str(trial.share(each)) for each in HELD_OUT}
    sys.stdout.write(f"{name}: {shares}, plain facts {trial.known}, stopped {trial.stopped}, all {trial.everything}\n")


@pytest.mark.prove
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tuned_it_answers(base, tmp_path, seed, request):
    after = train(tmp_path, seed=seed) if seed else examine(tuned(request.getfixturevalue("tuned_folder")))
    _report(f"seed {seed}", after)
    # the aims are 0.90, 0.80, 1 and a loss of 0.03; below them by what another processor's rounding may change
    assert after.share("held_out_entities").mean >= 0.86
    assert after.share("held_out_phrasings").mean >= 0.78
    assert after.everything.mean >= 0.75
    assert after.share("held_out_families").mean >= 0.80
    assert after.stopped.mean >= 0.99
    assert after.known.mean >= base.known.mean - 0.05


@pytest.mark.prove
def test_all_weights_trained_are_reported(base, tmp_path):
    full = train(tmp_path, adapter="none")
    _report("all weights", full)
    for name in ("held_out_entities", "held_out_phrasings", "held_out_families"):
        assert full.share(name).low > base.share(name).high + 0.2


@pytest.mark.prove
def test_masked_against_unmasked_is_reported(tmp_path):
    """Both are shown; which is better is for the reader."""
    lines = (data_folder() / "train.jsonl").read_text("utf-8").splitlines(True)[:200]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(lines), "utf-8")
    for weight in (0.0, 1.0):
        trial = train(tmp_path / str(weight), data=data, prompt_weight=weight)
        _report(f"{len(lines)} rows, prompt weight {weight:g}", trial)
        assert trial.share("held_out_entities").n == len(
            [r for r in rows_of("held_out_entities") if r["family"] in FACT_FAMILIES]
        )
        assert all(
            item.right == (item.stopped and is_right(row, item.answer))
            for item, row in zip(trial.items, [row for name in HELD_OUT for row in rows_of(name)], strict=True)
        )
