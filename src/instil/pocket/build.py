"""The bundled base model, made from nothing: corpus, tokenizer and weights, from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

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
    init = folder / "init"
    init.mkdir(parents=True, exist_ok=True)
    documents = list(corpus(options.documents, options.seed))
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    tokenizer = train_tokenizer(documents, options.vocab_size)
    for name, text in tokenizer_files(tokenizer).items():
        (init / name).write_text(text, encoding="utf-8")
    ids = {"eos_token_id": tokenizer.token_to_id(END_OF_TEXT), "pad_token_id": tokenizer.token_to_id(PADDING)}
    config = {**ARCHITECTURE, "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": None, **ids}
    (init / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return train(
        TrainConfig(
            objective="pretrain",
            data=[str(folder / "corpus.jsonl")],
            init=init,
            output=folder / "model",
            epochs=1.0,
            eval_fraction=0.005,
            tokens_per_step=options.tokens_per_step,
            tokens_per_batch=4096,
            share_prefixes="off",
            learning_rate=options.learning_rate,
            weight_decay=0.1,
            seed=options.seed,
            cache=False,
        ),
        watchers,
        stopping=stopping,
    )
