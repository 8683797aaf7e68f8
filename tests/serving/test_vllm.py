"""A model handed over to vLLM: the command that serves it, of real folders, and what vLLM cannot serve."""

import json
import os
import subprocess
import sys

import pytest

from instil.errors import ModelError, UsageError
from instil.model.adapter import add_lora
from instil.model.options import ModelOptions
from instil.model.save import save_model
from instil.serving.vllm import command, hand_over

from ..model.conftest import random_model

AT = {"host": "127.0.0.1", "port": 8001, "name": "tuned"}
BEGINS = ["--host", "127.0.0.1", "--port", "8001", "--allowed-origins", "[]"]


def flags(arguments):
    """The values of flags by their names, what stands before them as "program"."""
    found, last = {"program": []}, "program"
    for each in arguments:
        if each.startswith("--"):
            last = each
            found[last] = []
        else:
            found[last].append(each)
    return found


@pytest.fixture
def whole(tmp_path):
    """A whole model's folder, with its template and its stop tokens."""
    folder = tmp_path / "whole"
    save_model(random_model("llama"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def adapter_on(base, folder, new_ids=(), **options):
    """An adapter that Instil made on a base, in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"adapter": "lora", "lora_rank": 4, **options}
    save_model(add_lora(model, ModelOptions(**options), new_ids), folder)
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).write_text((base / name).read_text())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_whole_model(whole):
    assert command(str(whole), **AT) == [
        "vllm",
        "serve",
        str(whole),
        *BEGINS,
        *["--served-model-name", "tuned"],
        *["--chat-template", str(whole / "chat_template.jinja")],
        *["--generation-config", str(whole)],
    ]


def test_what_is_chosen(whole, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    found = flags(command(str(whole), **AT, precision="bf16", trust_remote_code=True, template=str(own)))
    assert found["--dtype"] == ["bfloat16"]
    assert found["--trust-remote-code"] == []
    assert found["--chat-template"] == [str(own)]
    with pytest.raises(UsageError, match="--engine vllm: --template chatml: is no file"):
        command(str(whole), **AT, template="chatml")


def test_the_template_is_given_what_training_gave_it(whole):
    name = "--default-chat-template-kwargs"
    (whole / "instil.json").write_text(json.dumps({"template": {"arguments": {"enable_thinking": False, "date": "x"}}}))
    assert json.loads(flags(command(str(whole), **AT))[name][0]) == {"enable_thinking": False, "date": "x"}
    chosen = command(str(whole), **AT, template_args={"enable_thinking": True})
    assert json.loads(flags(chosen)[name][0]) == {"enable_thinking": True, "date": "x"}


def test_of_two_templates_vllm_takes_that_for_tools_itself(whole):
    (whole / "additional_chat_templates").mkdir()
    assert "--chat-template" not in command(str(whole), **AT)


def test_a_model_without_template_and_stop_tokens(whole):
    (whole / "chat_template.jinja").unlink()
    (whole / "generation_config.json").unlink()
    assert command(str(whole), **AT) == ["vllm", "serve", str(whole), *BEGINS, "--served-model-name", "tuned"]


def test_an_adapter_is_served_beside_its_base(whole, tmp_path):
    folder = adapter_on(whole, tmp_path / "rate=1" / "adapter")
    found = flags(command(str(folder), **AT))
    assert found["program"] == ["vllm", "serve", str(whole)]
    assert found["--served-model-name"] == ["tuned-base"]
    assert found["--enable-lora"] == []
    assert found["--max-lora-rank"] == ["8"], "the next one that vLLM knows"
    (module,) = found["--lora-modules"]  # as JSON, for vLLM takes what follows a first = for the path
    assert json.loads(module) == {"name": "tuned", "path": str(folder), "base_model_name": "tuned-base"}
    assert found["--tokenizer"] == [str(folder)], "and its template and its stop tokens are the adapter's"
    assert found["--chat-template"] == [str(folder / "chat_template.jinja")]
    assert found["--generation-config"] == [str(folder)]


def test_the_base_beside_an_adapter_that_was_moved(whole, tmp_path):
    folder = adapter_on(whole, tmp_path / "adapter")
    whole.rename(folder / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere/base"}))
    assert flags(command(str(folder), **AT))["program"] == ["vllm", "serve", str(folder / "base")]


@pytest.mark.parametrize(
    ("new_ids", "options", "why"),
    [
        ([3, 4], {}, "it trained embeddings of new tokens"),
        ([], {"dora": True}, "it is one of DoRA"),
        ([], {"lora_rank": 600}, "its rank is 600, and 512 the greatest"),
    ],
)
def test_adapters_that_vllm_cannot_serve(whole, tmp_path, new_ids, options, why):
    folder = adapter_on(whole, tmp_path / "adapter", new_ids, **options)
    with pytest.raises(UsageError) as caught:
        command(str(folder), **AT)
    assert caught.value.message.startswith(f"--engine vllm: {folder}: vLLM cannot serve this adapter: {why}")
    assert caught.value.remedy.startswith("Merge it first")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"modules_to_save": ["lm_head"]}, "it holds whole layers (lm_head)"),
        ({"alpha_pattern": {"q_proj": 8}}, "its layers are scaled otherwise (q_proj)"),
        ({"bias": "all"}, "it trained biases (all)"),
        ({"peft_type": "IA3"}, "it is one of IA3, not LoRA"),
        ({"r": None, "use_dora": True}, "it is one of DoRA; its rank is None, and 512 the greatest"),
    ],
)
def test_adapters_of_others_that_vllm_cannot_serve(whole, tmp_path, change, why):
    folder = adapter_on(whole, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError) as caught:
        command(str(folder), **AT)
    assert caught.value.message.endswith(f"cannot serve this adapter: {why}")


def test_there_is_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        command(str(tmp_path / "nowhere"), **AT)


def test_it_is_not_installed(whole, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UsageError) as caught:
        hand_over(str(whole), **AT)
    assert (caught.value.message, caught.value.remedy) == ("--engine vllm: vLLM is not installed", "pip install vllm")


def test_flags_that_would_do_nothing(whole):
    with pytest.raises(UsageError, match="--engine vllm: --record, --base would do nothing"):
        hand_over(str(whole), **AT, ignored=["--record", "--base"])


def test_the_process_becomes_vllm(whole, tmp_path):
    """A program of that name, which says what it was given."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    told = "import json, os, sys; print(json.dumps([os.getpid(), sys.argv[1:], {n: os.environ.get(n) for n in NAMES}]))"
    names = "NAMES = ['VLLM_API_KEY', 'VLLM_NO_USAGE_STATS']"
    program.write_text(f"#!{sys.executable}\n{names}\n{told}\n")
    program.chmod(0o755)
    (whole / "instil.json").write_text(json.dumps({"notes": ["AutoTokenizer encodes otherwise"]}))
    at = {**AT, "api_key": "it's secret"}
    code = f"from instil.serving.vllm import hand_over\nhand_over({str(whole)!r}, **{at!r})"
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
    ) as started:
        out, said = started.communicate(timeout=120)
    assert started.returncode == 0, said
    process, given, environment = json.loads(out)
    assert process == started.pid
    assert given == command(str(whole), **AT)[1:]
    assert environment == {"VLLM_API_KEY": "it's secret", "VLLM_NO_USAGE_STATS": "1"}
    assert "secret" not in said
    assert "instil: note: vLLM serves: no page, no recording, no feedback and no list of runs\n" in said
    assert "instil: note: AutoTokenizer encodes otherwise\n" in said
    assert "note: vLLM asks for the API key under /v1 alone" in said
    assert said.splitlines()[-1].startswith(f"instil: vllm serve {whole} --host 127.0.0.1")
