"""Preparation: what it stores is what the exchanges are, however many processes did it, from the cache or anew."""

import json
import operator
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import instil
from instil.errors import DataError
from instil.packing import cache_folder, concatenate
from instil.pocket import save_sample_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_sample_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count):
    """Rows of one to three turns, some alike, some spelling a control token."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "<|im_end|>", "stone", "river"]
    rows = []
    for number in range(count):
        messages = []
        for turn in range(1 + number % 3):
            messages.append({"role": "user", "content": f"{number % 50} {turn} " + " ".join(rng.choice(words, 3))})
            messages.append({"role": "assistant", "content": " ".join(rng.choice(words, 1 + number % 7))})
        rows.append({"messages": messages})
    return [*rows, *rows[:20]]


def tokenizer_text(tokenizer, ids):
    return instil.load_tokenizer(tokenizer).decode(ids.tolist()).removesuffix("<|im_end|>").split("<")[0]


def stored(prepared):
    return [
        [[e.record, e.label, *(part.tolist() for part in e[2:])] for e in instil.expand(tree)]
        for tree in prepared.trees
    ]


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
def test_what_is_stored_is_what_the_exchanges_are(tmp_path, tokenizer, prompt_weight):
    file = write_rows(tmp_path / "rows.jsonl", conversations(100))
    options = instil.PromptOptions(template="chatml", prompt_weight=prompt_weight)
    prepared = instil.prepare(instil.read(file), tokenizer, options)
    rows = list(instil.exchanges(instil.read(file), tokenizer, **options.model_dump()))
    arrays = operator.attrgetter("prompt_ids", "prompt_weights", "completion_ids", "completion_weights")
    wanted = [
        [[number, exchange.label, *(part.tolist() for part in arrays(exchange))] for exchange in row.exchanges]
        for number, row in enumerate(rows)
    ]
    assert stored(prepared) == wanted
    assert [prepared.trees.name(n) for n in range(len(rows))] == [str(row.record.source) for row in rows]
    assert prepared.trees.lengths.tolist() == [len(e) for row in rows for e in row.exchanges]
    assert prepared.stop_tokens == ("<|im_end|>",)
    assert prepared.added_tokens == ("<|im_start|>", "<|im_end|>")
    (duplicates,) = prepared.describe()["duplicates"]
    assert duplicates["rows"] == len(rows) - len({json.dumps([e[2:] for e in row]) for row in wanted})
    (spelled,) = prepared.describe()["control_tokens_in_text"]
    assert spelled["what"] == "<|im_end|>"
    assert spelled["rows"] == sum("<|im_end|>" in line for line in file.read_text().splitlines())


@pytest.mark.prove
def test_workers_change_nothing(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", conversations(3000))
    options = instil.PromptOptions(template="chatml")
    alone, together = (
        instil.prepare(instil.read(file), tokenizer, options, workers=workers, count_roles=True) for workers in (1, 3)
    )
    assert stored(alone) == stored(together)
    assert alone.describe() == together.describe()
    batches = [instil.pack(each.trees, 1024, seed=7, epoch=2) for each in (alone, together)]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.target_rows, other.target_rows)


def test_the_cache_is_found_again_and_only_for_the_same_content(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", conversations(30))
    cache = tmp_path / "cache"
    chatml = instil.PromptOptions(template="chatml")

    def prepare(options=chatml, **more):
        return instil.prepare(instil.read(file), tokenizer, options, cache=cache, **more)

    first, again = prepare(), prepare()
    assert not first.cached
    assert again.cached
    assert stored(first) == stored(again)
    assert {**first.describe(), "cached": True} == again.describe()
    assert not prepare(instil.PromptOptions(template="chatml", prompt_weight=1)).cached
    assert not prepare(instil.PromptOptions(template="alpaca")).cached
    assert not prepare(tokens_per_batch=64).cached
    write_rows(file, conversations(31))
    assert not prepare().cached
    assert not [path for path in cache.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_a_preparation_that_fails_leaves_nothing(tmp_path, tokenizer):
    rows = conversations(10)
    rows[3]["messages"][0]["role"] = "usr"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="did you mean 'user'"):
        instil.prepare(instil.read(file), tokenizer, instil.PromptOptions(template="chatml"), cache=cache)
    assert list(cache.iterdir()) == []


def test_bad_rows_of_reading_and_of_rendering_are_reported_together(tmp_path, tokenizer):
    good = {"instruction": "Say hello.", "output": "Hello."}
    tools = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "tools": [{"name": "f"}],
    }
    file = write_rows(tmp_path / "rows.jsonl", [good, tools, {"instruction": "no answer"}, good])
    options = instil.PromptOptions(template="alpaca")
    with pytest.raises(DataError) as caught:
        instil.prepare(instil.read(file), tokenizer, options)
    assert sorted(problem.source for problem in caught.value.problems) == [f"{file}:2", f"{file}:3"]
    assert "2 of 4 rows" in str(caught.value)

    rejects = tmp_path / "rejects.jsonl"
    prepared = instil.prepare(instil.read(file, on_bad_row="skip", rejects=rejects), tokenizer, options)
    assert len(prepared.trees) == 2
    assert prepared.describe()["rows"] == {"read": 4, "kept": 2, "cut": 0, "dropped": 0, "rejected": 2}
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(entry["source"], entry["row"]) for entry in entries] == [
        (f"{file}:2", tools),
        (f"{file}:3", {"instruction": "no answer"}),
    ]
    assert "no place for tools" in entries[0]["problems"][0]["reason"]


def test_the_limit_is_the_smaller_of_the_models_and_the_batchs(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "word " * count} for count in (5, 60, 400)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model = tmp_path / "model"
    model.mkdir()
    for name in os.listdir(tokenizer):
        (model / name).write_bytes((tokenizer / name).read_bytes())
    (model / "config.json").write_text('{"max_position_embeddings": 200}')
    options = instil.PromptOptions(template="plain")

    def kept(**more):
        return len(instil.prepare(instil.read(file), model, options, **more).trees)

    assert kept() == 2
    assert kept(tokens_per_batch=1000) == 2
    assert kept(tokens_per_batch=50) == 1
    longer = instil.PromptOptions(template="plain", max_length=1000)
    with pytest.raises(instil.PackingError, match=rf"1 row of 3 .*\n  {file}:3"):
        instil.prepare(instil.read(file), model, longer, tokens_per_batch=70)


def test_labels_go_with_their_exchanges(tmp_path, tokenizer):
    rows = [
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": ["No.", "Never."]},
        {"prompt": "Is it?", "completion": "Yes.", "label": True},
        {"prompt": "Is it?", "completion": "No.", "label": False},
        {"prompt": "Is it?", "completion": "Yes."},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    prepared = instil.prepare(instil.read(file), tokenizer, instil.PromptOptions(template="chatml"))
    for batch in (*instil.pack(prepared.trees, 500, share_prefixes="on"), *instil.pack(prepared.trees, 50)):
        for exchange in instil.expand(batch):
            said = tokenizer_text(tokenizer, exchange.completion_ids)
            wanted = {0: {"Yes.": "chosen"}.get(said, "rejected"), 1: "good", 2: "bad", 3: ""}[exchange.record]
            assert exchange.label == wanted


def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", conversations(20))
    cache = tmp_path / "cache"
    options = instil.PromptOptions(template="chatml")
    wanted = stored(instil.prepare(instil.read(file), tokenizer, options, cache=cache))
    (folder,) = cache.iterdir()

    def halve(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    damages = [lambda path: path.unlink(), halve, flip, lambda path: path.write_text("{}")]
    for name in ("input_ids.bin", "exchange_prompt.bin", "arrays.json", "meta.json"):
        for damage in damages:
            damage(folder / name)
            again = instil.prepare(instil.read(file), tokenizer, options, cache=cache)
            assert not again.cached
            assert stored(again) == wanted
            assert instil.prepare(instil.read(file), tokenizer, options, cache=cache).cached
            assert [path.name for path in cache.iterdir()] == [folder.name]


def test_prompts_for_evaluation_train_nothing(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}, {"prompt": "How?"}])
    prepared = instil.prepare(instil.read(file), tokenizer, instil.PromptOptions(template="chatml"))
    assert len(prepared.trees) == 0
    assert len(instil.pack(prepared.trees, 100)) == 0
    assert any("train nothing" in warning for warning in prepared.describe()["warnings"])


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("INSTIL_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    assert cache_folder("/else") == Path("/else")
    monkeypatch.delenv("INSTIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/instil")


def test_batches_read_in_one_go_are_those_put_together_tree_by_tree(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", conversations(200))
    prepared = instil.prepare(instil.read(file), tokenizer, template="chatml", prompt_weight=0.5)
    packs = instil.pack(prepared.trees, 300, share_prefixes="off")
    for number, batch in enumerate(packs):
        rows = packs.plan.rows(number)
        wanted = concatenate([prepared.trees[row].of_record(row) for row in rows.tolist()])
        for field in fields(wanted):
            one, other = getattr(batch, field.name), getattr(wanted, field.name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, field.name)
