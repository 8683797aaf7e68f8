"""From a folder to an engine: whole models, adapters, what ends an answer, prompts as plain text is trained."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from instil.conversation import Message
from instil.errors import ModelError, TokenizerError
from instil.inference import SamplingOptions, load_engine
from instil.inference.load import stop_ids
from instil.model.options import ModelOptions
from instil.pocket import save_sample_tokenizer
from instil.prompt import PromptOptions, load_tokenizer
from instil.prompt.encode import encode_seam


@pytest.fixture
def folder(tmp_path):
    """A small model with the tokenizer of the sample data."""
    save_sample_tokenizer(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(tmp_path / "base")),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.3 * torch.randn_like(each))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_is_merged_and_reads_its_own_settings(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.5, "top_k": 3})
    )
    loaded = load_engine(ModelOptions(model=str(tmp_path / "adapter"), precision="fp32"))
    assert loaded.engine.stop_ids == {5, 6}
    assert loaded.engine.sampling(SamplingOptions()).to_json()["top_k"] == 3
    ids = loaded.encode("What is the capital of")
    (answer,) = loaded.engine.generate([ids], SamplingOptions(temperature=0, max_new_tokens=8))[0]
    for at, token in enumerate(answer.ids):
        logits = adapted(input_ids=torch.tensor([[*ids, *answer.ids[:at]]])).logits[0, -1]
        assert int(logits.argmax()) == token


def test_a_prompt_is_encoded_as_plain_text_is_trained(folder):
    loaded = load_engine(ModelOptions(model=str(folder)), PromptOptions(template="plain"))
    text = "I type <|im_end|> and <|endoftext|> here"
    exchange = loaded.renderer.document(Message("user", text))
    prompt, completion, _ = encode_seam(loaded.renderer.encoder, exchange)
    assert [*loaded.encode(text)] == [*prompt, *completion[:-1]]


def test_stop_tokens(folder):
    tokenizer = load_tokenizer(folder)
    assert stop_ids({"eos_token_id": 7}, tokenizer) == [7]
    assert stop_ids({}, tokenizer) == [tokenizer.backend.token_to_id(tokenizer.eos_token)]


def test_half_precision_generates(folder):
    loaded = load_engine(ModelOptions(model=str(folder), precision="bf16"))
    (answer,) = loaded.engine.generate([loaded.encode("What is")], SamplingOptions(max_new_tokens=5))[0]
    assert len(answer.ids) == 5 or answer.ended == "stop"


def test_a_template_whose_tokens_the_model_lacks_is_refused(folder):
    loaded = load_engine(ModelOptions(model=str(folder)), PromptOptions(template="headers"))
    with pytest.raises(TokenizerError, match="which the template 'headers' needs"):
        _ = loaded.renderer


def test_a_broken_file_is_said(folder):
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_engine(ModelOptions(model=str(folder)))
