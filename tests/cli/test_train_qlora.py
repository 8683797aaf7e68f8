"""`instil train --quantize nf4`: an adapter on a base in 4 bits, and what plain transformers and peft make of it."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from instil.errors import UsageError
from instil.training import TrainConfig, train

from .small import make_folder, rows
from .test_train import answers, instil

COUNT = 4
EXPECTED = [row["output"] + "<|im_end|>" for row in rows(COUNT)]
CHOSEN = {"template": "chatml", "adapter": "lora", "quantize": "nf4", "precision": "fp32"}
LEARNING = {"lora_rank": 32, "learning_rate": 6e-3, "max_steps": 90}


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small base model, its tokenizer, and four rows."""
    root = tmp_path_factory.mktemp("qlora")
    # Rows of the head long enough to tell tokens apart: they do not train.
    config = make_folder(root, COUNT, hidden_size=128, intermediate_size=256, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    return root


@pytest.mark.prove
def test_an_adapter_learned_on_the_quantized_base_answers_on_it(folder):
    given = ["--model", "base", "--data", "rows.jsonl", "--output", "adapter", *flags(CHOSEN | LEARNING)]
    told = instil(folder, *given).stderr
    assert "nf4: 14 layers with 294,912 weights" in told
    assert "instil: note: the adapter was trained on a base in 4 bits" in told
    out = folder / "adapter"
    held = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoPeftModelForCausalLM.from_pretrained(out, quantization_config=held, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(out)  # as the card says
    assert answers(model, AutoTokenizer.from_pretrained(out), COUNT) == EXPECTED
    written = json.loads((out / "instil.json").read_text())
    assert written["config"]["quantize"] == "nf4"
    assert "bitsandbytes" in written["versions"]
    base, original = (
        AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (out / "base", folder / "base")
    )
    layers = [name for name in original if name.endswith("_proj.weight")]
    assert len(layers) == 14
    assert all(torch.equal(base[name], original[name]) for name in layers)


def test_the_merged_model_stands_beside_the_quantized_one(folder):
    config = TrainConfig(
        model=str(folder / "base"),
        data=[str(folder / "rows.jsonl")],
        output=folder / "merged",
        merge_adapter=True,
        cache=False,
        **CHOSEN,
        **LEARNING,
    )
    outcome = train(config)
    (note,) = [note for note in outcome.notes if "merged into the dequantized weights" in note]
    assert "of 3 answers the merged model gives 3" in note
    out = folder / "merged"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert answers(AutoModelForCausalLM.from_pretrained(out), tokenizer, COUNT) == EXPECTED
    found = json.loads((out / "instil.json").read_text())["comparison"]
    assert found["merged_loss"] == pytest.approx(found["quantized_loss"], rel=1e-3)
    assert found["merged_loss"] < 0.5
    begun = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:32]) for text in EXPECTED[:3]]
    assert found["answers"] == [{"row": number, "quantized": text, "merged": text} for number, text in enumerate(begun)]
    card = (out / "README.md").read_text()
    assert "| Row | Quantized, with the adapter | Merged |" in card
    assert f"| Loss | {found['quantized_loss']:.4f} | {found['merged_loss']:.4f} |" in card


def test_weights_in_4_bits_need_an_adapter():
    with pytest.raises(UsageError, match="weights in 4 bits cannot be trained themselves") as caught:
        TrainConfig(model="m", data=["x.jsonl"], quantize="nf4")
    assert "--adapter lora" in str(caught.value)
    TrainConfig(model="m", data=["x.jsonl"], quantize="nf4", adapter="lora")
    TrainConfig(model="m", data=["x.jsonl"], quantize="nf4", base_adapter="keep")


def test_what_quantizing_takes_is_named_where_it_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from instil.cli.main import main\n"
        "main(['train', '--model', 'm', '--data', 'x', '--output', 'o', '--adapter', 'lora', '--quantize', 'nf4'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "instil: --quantize nf4: needs the package 'bitsandbytes'\n  pip install 'instil[qlora]'\n"
