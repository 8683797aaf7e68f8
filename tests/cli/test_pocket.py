"""`instil pocket build`, as a user runs it."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from instil.pocket.corpus import corpus

SMALL = ["--documents", "200", "--pages", "200", "--vocab-size", "600", "--tokens-per-step", "8192"]


@pytest.mark.prove
def test_a_small_one_is_made_from_nothing(instil, tmp_path):
    done = instil("pocket", "build", "--output", "made", *SMALL)
    assert "instil: wrote made" in done.stderr
    made = tmp_path / "made"
    texts, later = (
        [json.loads(line)["text"] for line in (made / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("first", "second")
    )
    assert texts == list(corpus(200))
    assert later == list(corpus(200, 1, pages=True))
    tokenizer = AutoTokenizer.from_pretrained(made / "second")
    model = AutoModelForCausalLM.from_pretrained(made / "second")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 600
    assert model.config.dtype is not None
    assert str(model.config.dtype).endswith("bfloat16")
    assert tokenizer.decode(tokenizer(texts[3])["input_ids"]) == texts[3]
    record = json.loads((made / "second" / "instil.json").read_text())
    assert record["summary"]["tokens"]["share"] == 1
    before = json.loads((made / "first" / "instil.json").read_text())
    assert record["outcome"]["final_loss"] < before["outcome"]["first_loss"]
    again = instil("pocket", "build", "--output", "made", *SMALL, code=2)
    assert "--output made: the folder holds something" in again.stderr


def test_what_is_wrong_is_said(instil, tmp_path):
    assert "build" in instil("pocket", "biuld", "--output", "made", code=2).stderr
    assert "--output: is missing" in instil("pocket", "build", code=2).stderr
    assert (
        "--documents 3: must be 200 or more"
        in instil("pocket", "build", "--output", "made", "--documents", "3", code=2).stderr
    )
    assert not list(tmp_path.glob("made*"))


def test_the_quickstart_takes_nothing_away(instil, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    for output in ("file", "own"):
        failed = instil("quickstart", "--output", output, code=2)
        assert failed.stdout == ""
        assert failed.stderr.startswith(f"instil: --output {output}: there is something already")
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"
    assert "--output '': is empty" in instil("quickstart", "--output", "", code=2).stderr
    assert "--data none.jsonl: is no file" in instil("quickstart", "--data", "none.jsonl", code=2).stderr
    assert list(tmp_path.glob("instil-quickstart")) == []
