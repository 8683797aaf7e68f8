"""What is saved is loaded again by plain transformers and plain peft, bit for bit."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from instil.model.adapter import add_lora
from instil.model.load import load_model
from instil.model.options import ModelOptions
from instil.model.save import save_model
from instil.model.tokens import reserve_tokens

from .conftest import KINDS, fresh_tokenizer, logits_of, random_model
from .test_adapter import IDS, LORA, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module:RuntimeWarning"),  # of peft, on experts
]
HOLDS = ["adapter_config.json", "adapter_model.safetensors"]


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def tuned(folder, options=LORA):
    """A model from a folder with new tokens and an adapter, a little trained."""
    model = load_model(ModelOptions(model=str(folder)))
    growth = reserve_tokens(model, fresh_tokenizer(["<a>", "<b>"]), {"<a>": "the end of a turn"})
    model = add_lora(model, options, growth.ids)
    train(model)
    return model, growth


def plain(folder):
    """The adapter as peft alone loads it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model(tmp_path, kind):
    model = random_model(kind)
    growth = reserve_tokens(model, fresh_tokenizer(["<a>", "<b>"]), {})
    save_model(model, tmp_path / "out", growth=growth)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(found, IDS), logits_of(model, IDS))
    assert torch.equal(logits_of(load_model(ModelOptions(model=str(tmp_path / "out"))), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_are_written_in_the_precision_asked_for_and_kept_in_memory(tmp_path, kind):
    model = random_model(kind)
    before, config = logits_of(model), model.config.to_dict()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "model.safetensors")
    assert {each.dtype for each in written.values()} == {torch.bfloat16}
    assert len(written) == len(list(model.parameters()))  # a tied head is written once
    weights = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(weights[name], value.to(torch.bfloat16)) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model), before)
    assert model.config.to_dict() == config
    assert model.can_generate()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_new_tokens(saved, tmp_path, kind):
    model, growth = tuned(saved(kind))
    expected = logits_of(model, IDS)
    out = tmp_path / "out"
    save_model(model, out, growth=growth)
    beside = kind != "qwen2"  # that has spare rows, and no bias
    assert names(out) == HOLDS + ["base"] * beside
    assert torch.equal(logits_of(plain(out), IDS), expected)
    assert torch.equal(logits_of(model, IDS), expected)
    kept = load_model(ModelOptions(model=str(out), base_adapter="keep"))
    assert torch.equal(logits_of(kept, IDS), expected)
    save_model(model, tmp_path / "merged", growth=growth, merge=True)
    assert names(tmp_path / "merged") == ["config.json", "model.safetensors"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, IDS), expected, rtol=0, atol=1e-5)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == model.get_base_model().config.tie_word_embeddings
    assert torch.equal(logits_of(model, IDS), expected)


def test_an_adapter_goes_on_training_after_it_was_saved(saved, tmp_path):
    models = [tuned(saved("gpt2", name=name)) for name in "ab"]
    save_model(models[0][0], tmp_path / "adapter", growth=models[0][1], dtype=torch.bfloat16)
    save_model(models[0][0], tmp_path / "merged", growth=models[0][1], merge=True, dtype=torch.bfloat16)
    for model, _ in models:
        train(model)
    assert torch.equal(logits_of(models[0][0], IDS), logits_of(models[1][0], IDS))


@pytest.mark.prove
def test_peft_finds_the_grown_base_from_any_working_directory(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, growth = tuned(saved("llama"))
    (tmp_path / "draft").mkdir()
    save_model(model, tmp_path / "draft", growth=growth, place=tmp_path.relative_to(tmp_path) / "out")
    (tmp_path / "draft").rename(tmp_path / "out")  # as a finished run is put in its place
    (tmp_path / "elsewhere").mkdir()
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import peft, torch, warnings\nwarnings.simplefilter('ignore')\ntorch.set_num_threads(1)\n"
        "model = peft.AutoPeftModelForCausalLM.from_pretrained('../out', dtype=torch.float32).eval()\n"
        "with torch.no_grad(): torch.save(model(torch.load('../ids.pt')).logits, '../logits.pt')\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "elsewhere", env=env, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(model, IDS))


def test_a_folder_with_its_base_may_be_moved(saved, tmp_path):
    model, growth = tuned(saved("llama"))
    save_model(model, tmp_path / "out", growth=growth)
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    # what stands in the old place is another model by now, and must not be taken
    random = random_model("llama", seed=9)
    random.resize_token_embeddings(growth.rows_after)
    random.save_pretrained(tmp_path / "out/base")
    found = load_model(ModelOptions(model=str(tmp_path / "moved"), base_adapter="keep"))
    assert torch.equal(logits_of(found, IDS), logits_of(model, IDS))


def test_an_adapter_names_a_local_base_for_any_working_directory(saved, monkeypatch, tmp_path):
    folder = saved("llama")
    monkeypatch.chdir(tmp_path)
    model = add_lora(load_model(ModelOptions(model=folder.name)), LORA)
    save_model(model, tmp_path / "out")
    assert names(tmp_path / "out") == HOLDS
    held = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == str(folder)
    assert held["inference_mode"] is True


@pytest.mark.parametrize("made", ["random", "merged"])
def test_a_base_that_is_nowhere_else_is_saved_beside_the_adapter(saved, tmp_path, made):
    folder = saved("llama")
    if made == "merged":
        first = add_lora(load_model(ModelOptions(model=str(folder))), LORA)
        train_old(first)
        save_model(first, tmp_path / "first")
        base = load_model(ModelOptions(model=str(tmp_path / "first")))
    else:
        base = load_model(ModelOptions(init=folder), seed=4)
    model = add_lora(base, LORA)
    train_old(model)
    save_model(model, tmp_path / "out")
    assert names(tmp_path / "out") == [*HOLDS, "base"]
    assert torch.equal(logits_of(plain(tmp_path / "out")), logits_of(model))


def train_old(model):
    """A step on tokens that the model has."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    model(torch.tensor([[3, 4, 5, 6]])).logits.logsumexp(-1).sum().backward()
    torch.optim.AdamW(parameters, lr=0.01).step()
    model.zero_grad()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_kept_adapter_is_trained_on_and_saved_again(saved, tmp_path, kind):
    model, growth = tuned(saved(kind))
    save_model(model, tmp_path / "first", growth=growth)
    kept = load_model(ModelOptions(model=str(tmp_path / "first"), base_adapter="keep"))
    train(kept)
    assert not torch.equal(logits_of(kept, IDS), logits_of(model, IDS))
    save_model(kept, tmp_path / "second")
    assert torch.equal(logits_of(plain(tmp_path / "second"), IDS), logits_of(kept, IDS))
    save_model(kept, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, IDS), logits_of(kept, IDS), rtol=0, atol=1e-5)


def test_a_kept_adapter_that_brought_its_embeddings_is_saved_with_them(saved, tmp_path):
    grown = random_model("llama")
    grown.resize_token_embeddings(43)
    model = peft.get_peft_model(grown, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(saved("llama"))
    model.save_pretrained(tmp_path / "first", save_embedding_layers=True)
    kept = load_model(ModelOptions(model=str(tmp_path / "first"), base_adapter="keep"))
    save_model(kept, tmp_path / "second")
    assert torch.equal(logits_of(plain(tmp_path / "second"), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("changes", [{"dora": True}, {"rslora": True, "lora_targets": ["c_attn"]}])
def test_every_kind_of_adapter_is_loaded_by_peft(saved, tmp_path, changes):
    model, growth = tuned(saved("gpt2"), LORA.model_copy(update=changes))
    save_model(model, tmp_path / "out", growth=growth)
    assert torch.equal(logits_of(plain(tmp_path / "out"), IDS), logits_of(model, IDS))


def test_an_adapter_stays_in_float32_beside_a_base_in_bf16(saved, tmp_path):
    model, growth = tuned(saved("llama"))
    save_model(model, tmp_path / "out", growth=growth, dtype=torch.bfloat16)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {each.dtype for each in load_file(tmp_path / "out/base/model.safetensors").values()} == {torch.bfloat16}
    now = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert written.keys() == now.keys()
    assert all(torch.equal(written[name], value) for name, value in now.items())


def test_a_generation_configuration_is_neither_written_nor_judged(tmp_path):
    model = random_model("llama")
    model.generation_config.temperature = 0.5  # without do_sample, for which transformers refuses to save it
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "plain")
    save_model(model, tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert model.generation_config.temperature == 0.5


def test_the_attention_of_instil_is_not_written(tmp_path):
    from instil.model.forward import TreeModel

    model = random_model("llama")
    TreeModel(model)
    save_model(model, tmp_path)
    assert "instil" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(random_model("llama")))
