"""Models loaded from folders, with adapters and at random, and everything that cannot be loaded."""

import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, T5Config, ViTConfig

from instil.errors import ModelError
from instil.model import load
from instil.model.load import base_of, check_vocabulary, checkpoint_dtype, is_adapter, load_model
from instil.model.options import ModelOptions

from .conftest import KINDS, WORDS, fresh_tokenizer, logits_of, random_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def change_json(file, **changes):
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def peft_adapter(base, folder, **more):
    """An adapter as plain peft writes it, with random weights on both sides."""
    model = AutoModelForCausalLM.from_pretrained(base)
    transposed = model.config.model_type == "gpt2"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=transposed,
        **more,
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "trainable_tokens" in name:
                each.add_(1.0)
    model.save_pretrained(folder)
    return logits_of(model)


def error_of(**options):
    with pytest.raises(ModelError) as caught:
        load_model(ModelOptions(**{key: str(value) for key, value in options.items()}))
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_what_transformers_loads(saved, kind):
    folder = saved(kind)
    model = load_model(ModelOptions(model=str(folder)))
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(folder)))
    assert torch.equal(logits_of(model), logits_of(random_model(kind)))
    assert all(each.requires_grad for each in model.parameters())
    assert base_of(ModelOptions(model=str(folder))) == str(folder)
    assert not is_adapter(folder)


def test_the_dtype_is_the_one_asked_for_and_that_of_the_files_is_known(tmp_path):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path))
    assert {each.dtype for each in load_model(options).parameters()} == {torch.float32}
    assert {each.dtype for each in load_model(options, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert checkpoint_dtype(options) == torch.bfloat16


def test_random_weights_follow_from_the_seed_and_leave_the_generator_alone(saved):
    options = ModelOptions(init=saved("gpt2"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load_model(options, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits_of(first), logits_of(load_model(options, seed=1)))
    assert not torch.equal(logits_of(first), logits_of(load_model(options, seed=2)))
    assert base_of(options) == str(options.init)
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(first.config)
    assert torch.equal(logits_of(first), logits_of(plain))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_is_merged_or_kept(saved, tmp_path, kind):
    base = saved(kind)
    expected = peft_adapter(base, tmp_path / "adapter")
    options = ModelOptions(model=str(tmp_path / "adapter"))
    assert is_adapter(tmp_path / "adapter")
    assert base_of(options) == str(base)
    merged = load_model(options)
    assert not hasattr(merged, "peft_config")
    assert all(each.requires_grad for each in merged.parameters())
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)
    kept = load_model(options.model_copy(update={"base_adapter": "keep"}))
    assert isinstance(kept, peft.PeftModel)
    assert torch.equal(logits_of(kept), expected)
    trained = {name for name, each in kept.named_parameters() if each.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("ids", [[3, WORDS - 1], [WORDS, WORDS + 2]])
def test_an_adapter_with_tokens_of_its_own_finds_room_for_them(saved, tmp_path, ids):
    base = saved("llama")
    grown = random_model("llama", seed=0)
    grown.resize_token_embeddings(WORDS + 3)
    grown.save_pretrained(tmp_path / "grown")
    expected = peft_adapter(
        tmp_path / "grown", tmp_path / "adapter", trainable_token_indices={"embed_tokens": ids, "lm_head": ids}
    )
    change_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(base))
    found = logits_of(load_model(ModelOptions(model=str(tmp_path / "adapter"), base_adapter="keep")))
    assert torch.equal(found[..., :WORDS], expected[..., :WORDS])
    columns = [i for i in ids if i < found.shape[-1]]
    assert columns == ids
    assert torch.equal(found[..., ids], expected[..., ids])


def test_an_adapter_with_whole_embeddings_brings_them(saved, tmp_path):
    base = saved("llama")
    grown = random_model("llama")
    grown.resize_token_embeddings(WORDS + 3)
    model = peft.get_peft_model(grown, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    change_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(base))
    for kept in ("merge", "keep"):
        found = load_model(ModelOptions(model=str(tmp_path / "adapter"), base_adapter=kept))
        torch.testing.assert_close(logits_of(found), logits_of(model), rtol=0, atol=1e-5)


def test_the_base_beside_an_adapter_goes_before_one_in_the_working_directory(saved, tmp_path, monkeypatch):
    base, other = saved("llama"), saved("llama", seed=5, name="other")
    expected = peft_adapter(base, tmp_path / "out/adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(other, "llama-base")
    shutil.copytree(base, tmp_path / "out/llama-base")
    change_json(tmp_path / "out/adapter/adapter_config.json", base_model_name_or_path="../llama-base")
    found = load_model(ModelOptions(model=str(tmp_path / "out/adapter"), base_adapter="keep"))
    assert torch.equal(logits_of(found), expected)
    change_json(tmp_path / "out/adapter/adapter_config.json", base_model_name_or_path="llama-base")
    found = load_model(ModelOptions(model=str(tmp_path / "out/adapter"), base_adapter="keep"))
    assert not torch.equal(logits_of(found), expected)


def test_what_names_no_model(tmp_path, saved):
    folder = saved("llama")
    assert "neither --model nor --init is given" in error_of()
    assert "both --model and --init are given" in error_of(model=folder, init=folder)
    assert f"{tmp_path}/none: no such folder" in error_of(model=tmp_path / "none")
    assert "a file, not a model's folder" in error_of(model=folder / "config.json")
    assert "no config.json there" in error_of(init=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no config.json in this folder (it holds nothing)" in error_of(model=tmp_path / "empty")
    (folder / "config.json").write_text("{")
    assert "the model cannot be loaded" in error_of(model=folder)


class Hub(BaseHTTPRequestHandler):
    """The little of the hub that loading asks for: files of a folder, and its ways to refuse."""

    root = Path()
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        owner, name, resolve, _, file = [*self.path.strip("/").split("/", 4), "", "", "", ""][:5]
        found = self.root / owner / name
        if owner == "api" or resolve != "resolve" or not found.is_dir():
            gated = name == "gated"
            return self.answer(403 if gated else 404, {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"})
        if not (found / file).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        content = (found / file).read_bytes()
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self.answer(200, headers, content)

    do_GET = do_HEAD  # noqa: N815

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, which is gone once it is shut down."""
    monkeypatch.setattr(Hub, "root", tmp_path / "hub")
    monkeypatch.setattr(Hub, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        load._offline.cache_clear()
        yield server
        server.shutdown()
        load._offline.cache_clear()


def test_models_and_adapters_come_from_the_hub_and_later_from_its_cache(saved, tmp_path, hub):
    shutil.copytree(saved("llama"), Hub.root / "meta/tiny")
    expected = peft_adapter(Hub.root / "meta/tiny", Hub.root / "me/adapter")
    change_json(Hub.root / "me/adapter/adapter_config.json", base_model_name_or_path="meta/tiny")
    base, adapter = ModelOptions(model="meta/tiny"), ModelOptions(model="me/adapter", base_adapter="keep")

    def check():
        assert torch.equal(logits_of(load_model(base)), logits_of(random_model("llama")))
        kept = load_model(adapter)
        assert torch.equal(logits_of(kept), expected)
        assert kept.get_base_model().name_or_path == "meta/tiny"
        assert (base_of(base), base_of(adapter)) == ("meta/tiny", "meta/tiny")
        assert (is_adapter("meta/tiny"), is_adapter("me/adapter")) == (False, True)

    check()
    hub.shutdown()
    hub.socket.close()
    load._offline.cache_clear()
    started = time.monotonic()
    check()
    assert time.monotonic() - started < 10


def test_what_the_hub_does_not_give(saved, hub):
    folder = saved("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    shutil.copytree(folder, Hub.root / "me/pickled")
    assert "has no weights in safetensors" in error_of(model="me/pickled")
    assert "neither a folder here nor a model on the hub" in error_of(model="nobody/nothing")
    assert "its owner wants to be asked" in error_of(model="meta/gated")
    hub.shutdown()
    hub.socket.close()
    load._offline.cache_clear()
    started = time.monotonic()
    assert "nobody/nothing: no such folder, and the hub cannot be reached" in error_of(model="nobody/nothing")
    assert time.monotonic() - started < 6


def test_pickled_weights_are_never_read(saved):
    folder = saved("gpt2")
    (folder / "model.safetensors").unlink()
    assert "no weights in this folder" in error_of(model=folder)
    (folder / "pytorch_model.bin").write_bytes(b"would run")
    text = error_of(model=folder)
    assert "its weights are pickled (pytorch_model.bin)" in text
    assert "save_pretrained" in text


def test_missing_weights_are_named(saved):
    folder = saved("llama")
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "1 weights are not in its files: model.layers.1.mlp.up_proj.weight" in error_of(model=folder)


def test_weights_of_another_shape_are_named(saved):
    folder = saved("llama")
    change_json(folder / "config.json", intermediate_size=20)
    text = error_of(model=folder)
    assert "6 weights have other shapes than its config.json says" in text
    assert "model.layers.0.mlp.down_proj.weight is (64, 128), not (64, 20)" in text


def test_weights_that_nobody_asked_for_are_left(saved):
    folder = saved("llama")
    change_weights(folder, lambda weights: weights.update({"vision.weight": torch.ones(2)}))
    found = load_model(ModelOptions(model=str(folder)))
    assert torch.equal(logits_of(found), logits_of(random_model("llama")))


def test_layers_beyond_those_of_the_configuration_are_refused(saved):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert "its files hold more layers than its config.json says: 9 weights have no place" in error_of(model=folder)


def test_only_an_adapter_can_be_kept(saved):
    folder = saved("llama")
    assert f"--base-adapter keep: {folder} has no adapter" in error_of(model=folder, base_adapter="keep")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BertConfig(), "is an encoder (bert)"),
        (T5Config(), "is an encoder and a decoder (t5)"),
        (ViTConfig(), "is of a kind without a causal language model in transformers (vit)"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    assert said in error_of(model=tmp_path)
    assert said in error_of(init=tmp_path)


def test_a_models_own_code_runs_only_when_trusted(tmp_path):
    GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "modeling_own.py").write_text(code)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_json(tmp_path / "config.json", model_type="own", auto_map=classes)
    text = error_of(init=tmp_path)
    assert "needs the Python code that comes with it" in text
    assert "--trust-remote-code" in text
    assert type(load_model(ModelOptions(init=tmp_path, trust_remote_code=True))).__name__ == "OwnModel"


def test_adapters_that_cannot_be(saved, tmp_path):
    base, folder = saved("llama"), tmp_path / "adapter"
    peft_adapter(base, folder)
    config = folder / "adapter_config.json"
    good = config.read_text()

    def told(**changes):
        config.write_text(good)
        change_json(config, **changes)
        return error_of(model=folder)

    assert f"its base model {tmp_path}/gone is not there" in told(base_model_name_or_path=f"{tmp_path}/gone")
    assert "its base model ../gone is not there" in told(base_model_name_or_path="../gone")
    assert "names no base model" in told(base_model_name_or_path=None)
    assert "an adapter for another task (SEQ_CLS)" in told(task_type="SEQ_CLS")
    assert "an adapter of virtual tokens (PROMPT_TUNING)" in told(peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    assert "the adapter does not fit its base model" in told(r=3)
    assert "the adapter does not fit its base model" in told(base_model_name_or_path=str(saved("gpt2")))
    config.write_text(good)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")
    assert "weights of the adapter are not in its files" in error_of(model=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "only pickled weights (adapter_model.bin)" in error_of(model=folder)
    config.write_text("[")
    assert "not JSON" in error_of(model=folder)


def test_a_tokenizer_with_ids_beyond_the_model_is_not_its_own():
    model = random_model("llama")
    check_vocabulary(model, fresh_tokenizer())
    check_vocabulary(model, fresh_tokenizer(["<a>", "<b>"]))
    other = fresh_tokenizer()
    other.backend.add_tokens(["<x>", "<y>"])
    other.add_special_tokens(["<a>"])
    said = r"words: 2 of its tokens have ids beyond the 40 embeddings of the model: '<x>' \(40\), '<y>' \(41\)"
    with pytest.raises(ModelError, match=said):
        check_vocabulary(model, other)
    check_vocabulary(random_model("qwen2"), other)
