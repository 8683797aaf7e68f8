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
from instil.training.files import write_json
from instil.training.output import run_state

_SETTINGS = "build.json"

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

    The model is trained twice: on sentences, and then, more gently, on marked-up pages in which what is
    spoken of and what it is stand apart.

    Args:
        options: Sizes, the seed and the folder.
        watchers: Are told of every step.
        stopping: As `train` takes it.

    Raises:
        UsageError: The folder holds something, or no build of these settings to go on with.
    """
    folder = options.output
    settings = options.model_dump(mode="json", exclude={"output", "resume"})
    if options.resume:
        _check_resumable(folder, settings)
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"--output {folder}: the folder holds something", "Name another, remove it, or go on with --resume."
        )
    else:
        first = list(corpus(options.documents, options.seed))
        _write_corpus(folder / "first.jsonl", first)
        _write_corpus(folder / "second.jsonl", list(corpus(options.pages, options.seed + 1, pages=True)))
        _write_init(folder / "init", first, options.vocab_size)
        write_json(folder / _SETTINGS, settings)
    rate = options.learning_rate
    outcome = _train(options, "first", {"init": folder / "init", "learning_rate": rate}, watchers, stopping)
    later = _train(options, "second", {"model": str(folder / "first"), "learning_rate": rate / 3}, watchers, stopping)
    found = later or outcome
    if found is None:
        raise UsageError(f"--output {folder}: the build is finished", "Leave --resume out, and name another folder.")
    return found


def _check_resumable(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        begun = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {folder}: holds no build to go on with", "Leave --resume out.") from error
    differing = [name for name in settings if settings[name] != begun.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"--{name.replace('_', '-')} {settings[name]}: the build in {folder} has {begun.get(name)}",
            "Give the same settings as before, or leave --resume out and name another folder.",
        )


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
) -> Outcome | None:
    """Train once over one of the corpora; the folder of the same name takes the model. None where that was done."""
    output = options.output / name
    state = run_state(output)
    if state == "finished":
        return None
    config = TrainConfig(
        objective="pretrain",
        data=[str(options.output / f"{name}.jsonl")],
        output=output,
        resume=state is not None,
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
