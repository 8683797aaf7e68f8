"""Training on plain text: every token, no template asked for, none left behind."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import instil
from instil.errors import DataError
from instil.model.load import load_model
from instil.model.options import ModelOptions
from instil.pocket import tokenizer_files, train_tokenizer

TEXTS = [f"Number {n} is followed by {n + 1}." + " And so on." * (n % 3) for n in range(40)]
SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}


@pytest.fixture
def config(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 400)
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    shape = {
        **SHAPE,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return instil.TrainConfig(
        objective="pretrain",
        init=tmp_path,
        data=[str(tmp_path / "texts.jsonl")],
        output=tmp_path / "out",
        max_steps=3,
        tokens_per_step=100_000,
        precision="fp32",
        cache=False,
        workers=1,
    )


def test_every_token_is_trained_and_counted(config):
    outcome = instil.train(config)
    # the first loss is that of the model as it was made, over every text and its end
    model = load_model(ModelOptions(init=config.init), dtype=torch.float32, seed=config.seed).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.init)
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert outcome.history[0].loss == pytest.approx(total / count, abs=1e-5)
    assert outcome.history[0].trained_tokens in (count, count + len(TEXTS))  # the first has nothing before it


def test_what_is_left_goes_on_with_text_and_has_no_template(config):
    instil.train(config)
    assert not (config.output / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(config.output).chat_template is None
    AutoModelForCausalLM.from_pretrained(config.output)
    card = (config.output / "README.md").read_text()
    assert "apply_chat_template" not in card
    assert "conversational" not in card
    assert json.loads((config.output / "generation_config.json").read_text())["eos_token_id"] == [0]


def test_a_conversation_among_texts_asks_for_a_template(config):
    rows = config.init / "texts.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"instruction": "Count.", "output": "1, 2, 3."}) + "\n")
    with pytest.raises(DataError, match=r"texts.jsonl:41.*there is no chat template: choose one with --template"):
        instil.train(config)
    assert not config.output.exists()
