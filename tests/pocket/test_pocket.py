"""The bundled data is clean, and the tokenizer made from it is whole."""

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from instil.pocket import sample_data, save_sample_tokenizer, train_tokenizer

ROWS = {path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in sample_data()}


def test_instructions_are_clean():
    rows = ROWS["sample.jsonl"]
    assert len(rows) >= 120
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"]
        assert row["output"]
        assert all(text == text.strip() for text in row.values())
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert 50 <= sum(bool(row["input"]) for row in rows) <= len(rows) - 50


def test_conversations_are_well_formed():
    rows = ROWS["conversations.jsonl"]
    assert len(rows) >= 20
    seen = set()
    for row in rows:
        messages = row["messages"]
        open_calls: dict[str, str] = {}
        offered = {tool["function"]["name"] for tool in row.get("tools", [])}
        assert messages[-1]["role"] == "assistant"
        for before, message in zip([None, *messages], messages, strict=False):
            role = message["role"]
            seen |= {role, *message}
            assert (role == "system") <= (before is None)
            assert (role == "user") <= (before is None or before["role"] in ("system", "assistant"))
            assert (role == "assistant") <= (before is not None and before["role"] in ("user", "tool"))
            assert message["content"] or message.get("tool_calls")
            for call in message.get("tool_calls", []):
                assert call["function"]["name"] in offered
                open_calls[call["id"]] = call["function"]["name"]
            if role == "tool":
                assert open_calls.pop(message["tool_call_id"]) == message["name"]
        assert not open_calls
    assert seen >= {"system", "user", "assistant", "tool", "tool_calls", "reasoning_content"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sample_tokenizer(tmp_path_factory.mktemp("pocket") / "new" / "tokenizer")


def test_transformers_loads_it(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer.bos_token is None
    assert 1024 < len(tokenizer) <= 2048
    answer = ROWS["sample.jsonl"][15]["output"]
    assert len(tokenizer(answer).input_ids) < len(answer) / 2
    assert tokenizer("<|endoftext|>").input_ids == [0]


def test_it_is_the_same_each_time_and_needs_no_model_library(folder, tmp_path):
    code = (
        "import sys\nfrom instil.pocket import save_sample_tokenizer\nsave_sample_tokenizer(sys.argv[1])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert process.stdout == "[]\n"
    digests = {hashlib.sha256((place / "tokenizer.json").read_bytes()).hexdigest() for place in (folder, tmp_path)}
    assert len(digests) == 1


TOKENIZER = train_tokenizer(["To be, or not to be, that is the question."] * 2, 300, ["<|mark|>"])


@given(st.text(st.characters(codec="utf-8")))
def test_nothing_of_a_text_is_lost(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_come_first():
    assert [TOKENIZER.token_to_id(token) for token in ("<|endoftext|>", "<|pad|>", "<|mark|>")] == [0, 1, 2]
    assert TOKENIZER.encode("to<|mark|>be").ids.count(2) == 1
    assert TOKENIZER.get_vocab_size() <= 300
