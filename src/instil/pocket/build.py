"""The bundled base model, made from nothing: corpus, tokenizer and weights, from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instil.errors import UsageError
from instil.pocket import END_OF_TEXT, PADDING, tokenizer_files, train_tokenizer
from instil.pocket.corpus import corpus
from instil.pocket.options import BuildOptions
from instil.training import Outcome, TrainConfig, Watcher, train

ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def build(
    options: BuildOptions, watchers: Sequence[Watcher] = (), *, stopping: Callable[[], int] = lambda: 0
) -> Outcome:
    """Write the corpus, train the tokenizer on it and then the model, through the same loop as any other.

    The model is trained twice: on sentences, and then, more gently, on text in which things stand on several lines.

    Args:
        options: Sizes, the seed and the folder.
        watchers: Are told of every step.
        stopping: As `train` takes it.

    Raises:
        UsageError: The folder holds something.
    """
    folder = options.output
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output {folder}: the folder holds something", "Name another, or remove it.")
    first = list(corpus(options.documents, options.seed))
    second = list(corpus(options.documents // 4, options.seed + 1, lines=True))
    _write_corpus(folder / "first.jsonl", first)
    _write_corpus(folder / "second.jsonl", second)
    _write_init(folder / "init", first, options.vocab_size)
    rate = options.learning_rate
    _train(options, "first", {"init": folder / "init", "learning_rate": rate}, watchers, stopping)
    return _train(options, "second", {"model": str(folder / "first"), "learning_rate": rate / 3}, watchers, stopping)


def _write_corpus(file: Path, documents: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)


def _write_init(folder: Path, documents: Sequence[str], vocab_size: int) -> None:
    """The tokenizer, and the configuration of the model that is begun with."""
    folder.mkdir()
    tokenizer = train_tokenizer(documents, vocab_size)
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    ids = {"eos_token_id": tokenizer.token_to_id(END_OF_TEXT), "pad_token_id": tokenizer.token_to_id(PADDING)}
    config = {**ARCHITECTURE, "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": None, **ids}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _train(
    options: BuildOptions,
    name: str,
    chosen: Mapping[str, Any],
    watchers: Sequence[Watcher],
    stopping: Callable[[], int],
) -> Outcome:
    """Train once over one of the corpora; the folder of the same name takes the model."""
    config = TrainConfig(
        objective="pretrain",
        data=[str(options.output / f"{name}.jsonl")],
        output=options.output / name,
        epochs=1.0,
        eval_fraction=0.005,
        tokens_per_step=options.tokens_per_step,
        tokens_per_batch=4096,
        share_prefixes="off",
        weight_decay=0.1,
        seed=options.seed,
        cache=False,
        **chosen,
    )
    return train(config, watchers, stopping=stopping)
