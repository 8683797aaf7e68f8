"""What comes with Instil to try it on: a small base model, the world it knows, and data to tune it with."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from instil.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

_DATA = Path(__file__).parent / "data"


def model_folder() -> Path:
    """The bundled base model: it goes on with text about a small world, and follows no instructions."""
    return Path(__file__).parent / "model"


def data_folder() -> Path:
    """The bundled instruction data: `train.jsonl`, and what is held out of it, `held_out_*.jsonl`."""
    return _DATA


def sample_data() -> list[Path]:
    """The bundled files: instructions in Alpaca's columns, and conversations with systems, tools and reasoning."""
    return [_DATA / "sample.jsonl", _DATA / "conversations.jsonl"]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`: it loses nothing of any text, and adds no tokens to one.

    Args:
        texts: What to learn the merges from.
        vocab_size: The most entries it may have, the 256 bytes and the special tokens among them.
        special_tokens: Further ones, after `<|endoftext|>` (id 0) and `<|pad|>` (id 1).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_sample_tokenizer(directory: str | Path) -> Path:
    """Train a tokenizer on the bundled data and write it as transformers reads it; the folder is made if missing.

    Returns:
        The folder, with `tokenizer.json` and `tokenizer_config.json` in it.

    Raises:
        UsageError: The folder cannot be written, or holds another tokenizer.
    """
    folder = Path(directory)
    files = tokenizer_files(train_tokenizer(_sample_texts()))
    ours = folder / "tokenizer_config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "tokenizer.json").exists() and not (
            ours.exists() and ours.read_bytes() == files[ours.name].encode()
        ):
            raise UsageError(f"{folder}: holds another tokenizer, which would be lost", "Name another folder.")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}", "Name another folder.") from error
    return folder


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files that transformers reads a tokenizer of ours from, by name."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }


def _sample_texts() -> Iterator[str]:
    for file in sample_data():
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from _strings_of(json.loads(line))


def _strings_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings_of(part)
