"""The folder that the real command trains in: a small base model's configuration and tokenizer, and rows."""

import json
import os

from transformers import AutoTokenizer, LlamaConfig

from instil.pocket import sample_data, save_sample_tokenizer


def rows(count):
    return [json.loads(line) for line in sample_data()[0].read_text(encoding="utf-8").splitlines()[:count]]


def make_folder(root, count, **changes):
    """Write `base`, whose vocabulary new tokens make grow, and `rows.jsonl`; return the configuration."""
    tokenizer = AutoTokenizer.from_pretrained(save_sample_tokenizer(root / "base"))
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(**{**sizes, **changes})
    config.save_pretrained(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return config


def environment(folder):
    """Encoded data is kept in the folder, lines are long, and threads only slow such small models down."""
    return {**os.environ, "INSTIL_CACHE": str(folder / "cache"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
