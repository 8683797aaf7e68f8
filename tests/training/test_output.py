"""The output folder: whole or not at all, and read by plain transformers as training read it."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

import instil
from instil.conversation import Conversation, Message
from instil.errors import UsageError
from instil.packing import prepare
from instil.pocket import sample_data, save_sample_tokenizer
from instil.prompt import PromptOptions, Tokenizer, exchanges, load_renderer
from instil.training import output
from instil.training.events import Evaluation, Outcome, Resolved, Step
from instil.training.output import check_output, describe_data, describe_run, save_tokenizer, write_output

THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if not (enable_thinking | default(true)) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
TEXTS = [
    "Name a prime. It's seven, don't you think?",
    "  two  spaces\n\n\tdef f(x):\n    return x  +  1\n",
    "café naïve Ελληνικά 日本語 🙂 é",
    "<|im_start|>user\nHi<|im_end|>\n<s> </s> <|endoftext|> <think>",
    "",
    " ",
]
ROWS = [
    {"instruction": "Name the capital.", "input": "Peru", "output": "Lima."},
    {"messages": [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", " Hello! "))]},
    {
        "messages": [
            {"role": role, "content": text}
            for role, text in (
                ("system", "Be  brief."),
                ("user", "def f(x):\n    return"),
                ("assistant", "café"),
                ("user", "日本語?"),
                ("assistant", "It's 12345."),
            )
        ]
    },
]


def _kinds():
    file = Path(__file__).parent.parent / "prompt" / "conftest.py"
    spec = importlib.util.spec_from_file_location("prompt_conftest", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KINDS


KINDS = _kinds()


def fresh(kind, name="made"):
    backend, special = KINDS[kind]()
    return Tokenizer(Backend.from_str(backend.to_str()), special, name=name)


def encoded(tokenizer, options):
    rows = list(exchanges(instil.read(ROWS), tokenizer, options))
    assert not any(row.problems for row in rows)
    return [
        (each.prompt_text, each.prompt_ids.tolist(), each.completion_text, each.completion_ids.tolist())
        for row in rows
        for each in row.exchanges
    ]


@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca", "headers"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_tokenizer_comes_back_as_it_was_trained_with(tmp_path, kind, template):
    options = PromptOptions(template=template)
    renderer = load_renderer(fresh(kind), options)
    trained = encoded(renderer.tokenizer, options)
    assert save_tokenizer(tmp_path, renderer.tokenizer, renderer.template) == []

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = renderer.tokenizer.backend.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special).input_ids == ids, text
            assert loaded.decode(ids) == renderer.tokenizer.decode(ids)
    assert len(loaded) == len(renderer.tokenizer)
    named = renderer.tokenizer.special_tokens
    assert {name: getattr(loaded, name) for name in named} == named

    texts = [record.conversations[0] for record in instil.read(ROWS)]
    for (prompt, prompt_ids, *_), conversation in zip(trained, texts[:2], strict=False):
        messages = [message.to_wire() for message in conversation.messages[:-1]]
        assert loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt
        served = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert served == prompt_ids

    again = load_renderer(tmp_path, PromptOptions())
    assert encoded(again.tokenizer, PromptOptions()) == trained
    assert (again.template.text, again.tokenizer.added) == (renderer.template.text, ())
    assert again.template.fingerprint() == renderer.template.fingerprint()


def test_the_template_stands_in_one_place(tmp_path):
    """A source with a template of its own in each of the old places, a class of its own, and a BOS switch."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    saved.mkdir()
    backend, special = KINDS["llama2"]()
    (source / "tokenizer.json").write_text(backend.to_str())
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "old",
        "add_bos_token": True,
        "add_eos_token": True,
        "padding_side": "left",
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        "name_or_path": "/somewhere",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    renderer = load_renderer(source, PromptOptions(template="chatml"))
    assert save_tokenizer(saved, renderer.tokenizer, renderer.template) == []
    written = json.loads((saved / "tokenizer_config.json").read_text())
    assert written == {**special, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    loaded = AutoTokenizer.from_pretrained(saved)
    assert loaded.chat_template == renderer.template.text
    assert loaded.padding_side == "left"
    assert loaded("Hi").input_ids == AutoTokenizer.from_pretrained(source)("Hi").input_ids


def test_a_template_for_tools_goes_along(tmp_path):
    tokenizer = fresh("cl100k")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.tool_template = "{{ tools[0].function.name }}: " + tokenizer.chat_template
    renderer = load_renderer(tokenizer, PromptOptions())
    assert save_tokenizer(tmp_path, tokenizer, renderer.template) == []
    loaded, message = AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert loaded.apply_chat_template(message, tokenize=False) == "Hi<|im_end|>"
    assert loaded.apply_chat_template(message, tools=tools, tokenize=False) == "f: Hi<|im_end|>"
    again = load_renderer(tmp_path, PromptOptions())
    assert (again.template.text, again.template.tool_text) == (renderer.template.text, renderer.template.tool_text)


def test_arguments_of_the_template_are_said(tmp_path):
    (tmp_path / "think.jinja").write_text(THINKING)
    options = PromptOptions(template=str(tmp_path / "think.jinja"), template_args={"enable_thinking": False})
    renderer = load_renderer(fresh("cl100k"), options)
    prompt = renderer.prompt(Conversation((Message("user", "Hi"),))).prompt
    assert prompt.endswith("<think>\n\n</think>\n\n")
    (said,) = save_tokenizer(tmp_path, renderer.tokenizer, renderer.template)
    assert said.endswith("enable_thinking=False")
    loaded, messages = AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "Hi"}]
    served = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert served == prompt
    assert loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) != prompt


def test_a_class_that_builds_its_own_tokenizer_is_said(tmp_path):
    """transformers loads every tokenizer of a Qwen2 model as Qwen2's, whatever its files say."""
    Qwen2Config().save_pretrained(tmp_path)
    renderer = load_renderer(fresh("llama2"), PromptOptions(template="chatml"))
    (said,) = save_tokenizer(tmp_path, renderer.tokenizer, renderer.template)
    assert re.search(r"as Qwen2Tokenizer, which encodes otherwise .*PreTrainedTokenizerFast", said)
    LlamaConfig().save_pretrained(tmp_path)
    assert save_tokenizer(tmp_path, renderer.tokenizer, renderer.template) == []


class Options(BaseModel):
    """Stands for a run's configuration."""

    model: str | None = None
    init: str | None = None
    learning_rate: float = 1e-4
    data: list[str] = []


STEPS = [Step(n, 3.0 / n, 1e-4, 0.5, 100, 40, 1234.5, 0.25 * n) for n in (1, 2, 3)]
OUTCOME = Outcome(3, STEPS, [Evaluation(0, 2.5, True, 0.0), Evaluation(3, 1.5, True, 1.0)], seconds=1.5)
RESOLVED = Resolved(3, 1.5, 2048, {"learning_rate": 1e-4, "share_prefixes": "on", "attention": "tree"})


def tiny_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def run(tmp_path):
    """Everything `write_output` is given."""
    base = save_sample_tokenizer(tmp_path / "base")
    records = instil.read(sample_data()[:1])
    prepared = prepare(records, base, template="chatml")
    renderer = load_renderer(base, PromptOptions(template="chatml"))
    (base / "generation_config.json").write_text(
        '{"_from_model_config": true, "eos_token_id": 0, "pad_token_id": 1, "top_k": 7}'
    )
    model = tiny_model(renderer.tokenizer)
    # Written by itself, as weights without their configuration for generation: that is the base model's.

    def save(folder):
        model.config.save_pretrained(folder)
        (folder / "weights").write_bytes(b"1")
        (folder / "weights").chmod(0o600)  # as safetensors leaves it

    made_of = describe_run(Options(model=str(base)), renderer, prepared, describe_data(records))
    record = {**made_of, "resolved": RESOLVED.to_json()}
    return {"record": record, "save": save, "renderer": renderer, "outcome": OUTCOME}


def test_all_that_belongs_to_a_run_is_there(tmp_path, run):
    folder = tmp_path / "deep" / "tuned"
    ended = write_output(folder, **run)
    assert sorted(child.name for child in folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "loss.svg",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights",
    ]
    assert [child.name for child in folder.parent.iterdir()] == ["tuned"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert {child.stat().st_mode & 0o777 for child in folder.iterdir()} == {0o666 & ~_umask()}

    stop = run["renderer"].tokenizer.backend.token_to_id("<|im_end|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [stop], "pad_token_id": 1, "top_k": 7}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [stop]

    told = {**run["record"], **ended}
    data = sample_data()[0]
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    rows = len(data.read_text().splitlines())
    assert told["data"]["files"] == [{"path": str(data), "sha256": digest, "records": rows}]
    assert told["data"]["fingerprint"] == instil.read([data]).fingerprint()
    assert told["resolved"]["share_prefixes"] == "on"
    assert told["stop_tokens"] == {"<|im_end|>": stop}
    assert told["added_tokens"].keys() == {"<|im_start|>", "<|im_end|>"}
    assert told["template"]["name"] == "chatml"
    assert told["template"]["fingerprint"] == run["renderer"].template.fingerprint()
    assert told["summary"]["rows"]["read"] == rows
    assert told["versions"].keys() >= {"python", "instil", "torch", "transformers", "peft", "tokenizers"}
    assert (told["outcome"]["final_loss"], told["outcome"]["best_eval_loss"]) == (1.0, 1.5)
    assert (told["kind"], told["base_model"], told["eval_data"]) == ("model", str(tmp_path / "base"), None)
    assert told["notes"] == []


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("breaks", ["save", "save_tokenizer", "model_card"])
def test_nothing_is_left_of_what_fails(tmp_path, run, monkeypatch, breaks):
    def fail(*arguments, **named):
        raise KeyboardInterrupt if breaks == "save" else OSError(28, "No space left on device")

    if breaks == "save":
        run["save"] = fail
    else:
        monkeypatch.setattr(output, breaks, fail)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "run.yaml").write_text("its own")
    with pytest.raises((KeyboardInterrupt, UsageError)) as raised:
        write_output(tmp_path / "tuned", **run)
    assert breaks == "save" or str(raised.value).startswith(f"--output {tmp_path}/tuned: cannot be written: No space")
    assert [child.name for child in (tmp_path / "tuned").iterdir()] == ["run.yaml"]


def test_an_empty_folder_is_taken_and_a_link_followed(tmp_path, run):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_output(tmp_path / "link", **run)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "README.md").is_file()


def test_the_runs_own_files_stay_and_what_makes_it_a_model_comes_last(tmp_path, run, monkeypatch):
    folder = tmp_path / "tuned"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".output.1").mkdir()  # of a run that was killed
    moved = []
    monkeypatch.setattr(output.os, "replace", lambda one, other: (moved.append(other.name), one.rename(other)))
    write_output(folder, **run)
    assert moved[-1] == "config.json"
    assert (folder / "checkpoints").is_dir()
    assert not list(folder.glob(".*"))
    monkeypatch.undo()
    write_output(folder, **run)  # it was killed while it moved


def test_the_models_own_generation_config_comes_first(tmp_path, run):
    save = run["save"]

    def with_generation(draft):
        save(draft)
        GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=0, bos_token_id=3).save_pretrained(draft)

    write_output(tmp_path / "tuned", **{**run, "save": with_generation})
    written = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    stop = run["renderer"].tokenizer.backend.token_to_id("<|im_end|>")
    assert (written["temperature"], written["bos_token_id"], written["eos_token_id"]) == (0.5, 3, [stop])
    other = {
        **run,
        "record": {**run["record"], "base_model": "owner/name"},
        "generation_config": {"pad_token_id": 9, "top_k": None},
    }
    write_output(tmp_path / "other", **other)
    written = json.loads((tmp_path / "other" / "generation_config.json").read_text())
    assert written == {"pad_token_id": 9, "eos_token_id": [stop]}


def test_places_that_take_no_output(tmp_path):
    check_output(tmp_path / "new")
    check_output(tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    assert [child.name for child in tmp_path.iterdir()] == ["empty"], "nothing is left behind"

    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output .*file: is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(UsageError, match=r"file is no folder"):
        check_output(tmp_path / "file" / "tuned")
    with pytest.raises(UsageError, match=r"holds something \(empty, file\)"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        check_output("/proc/none/tuned")


def test_a_run_that_has_not_finished_is_gone_on_with_and_nothing_else_is(tmp_path):
    for state in ("running", "interrupted", "failed"):
        (tmp_path / "instil.json").write_text(json.dumps({"state": state}))
        check_output(tmp_path, resume=True)
        with pytest.raises(UsageError, match="a run is there that has not finished") as raised:
            check_output(tmp_path)
        assert "--resume" in raised.value.remedy
    for record in ({"state": "finished"}, {}):
        (tmp_path / "instil.json").write_text(json.dumps(record))
        with pytest.raises(UsageError, match="has finished; nothing is left to do"):
            check_output(tmp_path, resume=True)
        with pytest.raises(UsageError, match=r"holds something \(instil.json\)"):
            check_output(tmp_path)
    (tmp_path / "instil.json").write_text("no record")
    with pytest.raises(UsageError, match=r"holds something \(instil.json\)"):
        check_output(tmp_path, resume=True)


def test_data_without_bytes_is_named_without_a_hash():
    records = instil.read(ROWS)
    list(records)
    assert describe_data(records) == {
        "fingerprint": None,
        "files": [{"path": records.paths[0], "sha256": None, "records": 3}],
    }
