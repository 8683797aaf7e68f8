"""Tiny random models made on the spot, in memory and in folders, and a tokenizer for them."""

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PhiConfig, Qwen2Config
from transformers.utils import logging

from instil.prompt import Tokenizer

logging.disable_progress_bar()

WORDS = 40
_TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
_SIZES = {  # multiples of 64, the blocks of a quantized weight
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TOKENS,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(vocab_size=WORDS, tie_word_embeddings=False, **_SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=2, n_positions=64, **_TOKENS),
    "qwen2": lambda: Qwen2Config(vocab_size=WORDS + 8, tie_word_embeddings=False, **_SIZES),  # with spare rows
    "qwen2-tied": lambda: Qwen2Config(vocab_size=WORDS + 1, tie_word_embeddings=True, **_SIZES),  # with one
    "mixtral": lambda: MixtralConfig(vocab_size=WORDS, num_local_experts=4, **_SIZES),
    "phi": lambda: PhiConfig(vocab_size=WORDS + 8, **_SIZES),  # its head has a bias
    "phi-full": lambda: PhiConfig(vocab_size=WORDS, **_SIZES),
    "phi-tied": lambda: PhiConfig(vocab_size=WORDS, tie_word_embeddings=True, **_SIZES),
}
KINDS = sorted(CONFIGS)


def random_model(kind, seed=0):
    """A model whose weights, biases included, are all random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def fresh_tokenizer(added=()):
    """A tokenizer of single words (`w3`, `the`, `end`, …), with tokens added."""
    words = ["<unk>", "</s>", "the", "end", "of", "a", "turn"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(len(words), WORDS))])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, name="words")
    tokenizer.add_special_tokens(added)
    return tokenizer


def logits_of(model, ids=None):
    ids = torch.arange(2, WORDS)[None] if ids is None else ids
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost tiny models more than they give, ten times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path):
    """The folder of a model of a kind: `saved("llama")`."""

    def made(kind, seed=0, name="model"):
        folder = tmp_path / f"{kind}-{name}"
        random_model(kind, seed).save_pretrained(folder)
        return folder

    return made
