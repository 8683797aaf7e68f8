"""Instil: instruction tuning that trains the very tokens it will serve, and shows them.

    records = instil.read("instructions.jsonl")              # rows of any common shape, as a stream
    rows = instil.exchanges(records, "my-model")             # each answer with the prompt it is served under
    prepared = instil.prepare(records, "my-model")           # the same as token trees, on all cores
    batches = instil.pack(prepared.trees, 8192)              # packed batches
    outcome = instil.train(instil.TrainConfig(model="my-model", data=["instructions.jsonl"], output="tuned"))

Each name is loaded when it is first used, so `import instil` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instil.conversation import Conversation, Message, Record, Source
    from instil.data import Records, read
    from instil.errors import (
        DataError,
        InstilError,
        ModelError,
        PackingError,
        RowProblem,
        TemplateError,
        TokenizerError,
        TrainingError,
        UsageError,
    )
    from instil.model import TreeModel
    from instil.packing import PackedBatch, Packs, Prepared, StoredTrees, TokenTree, expand, pack, prepare
    from instil.prompt import EncodedRecord, Exchange, PromptOptions, exchanges, load_tokenizer
    from instil.training import Outcome, TrainConfig, TrainOptions, fit, train

__version__ = "0.1.0"

__all__ = [
    "Conversation",
    "DataError",
    "EncodedRecord",
    "Exchange",
    "InstilError",
    "Message",
    "ModelError",
    "Outcome",
    "PackedBatch",
    "PackingError",
    "Packs",
    "Prepared",
    "PromptOptions",
    "Record",
    "Records",
    "RowProblem",
    "Source",
    "StoredTrees",
    "TemplateError",
    "TokenTree",
    "TokenizerError",
    "TrainConfig",
    "TrainOptions",
    "TrainingError",
    "TreeModel",
    "UsageError",
    "exchanges",
    "expand",
    "fit",
    "load_tokenizer",
    "pack",
    "prepare",
    "read",
    "train",
]

_HOMES = {
    "instil.conversation": ("Conversation", "Message", "Record", "Source"),
    "instil.data": ("Records", "read"),
    "instil.errors": (
        "DataError",
        "InstilError",
        "ModelError",
        "PackingError",
        "RowProblem",
        "TemplateError",
        "TokenizerError",
        "TrainingError",
        "UsageError",
    ),
    "instil.model": ("TreeModel",),
    "instil.packing": ("PackedBatch", "Packs", "Prepared", "StoredTrees", "TokenTree", "expand", "pack", "prepare"),
    "instil.prompt": ("EncodedRecord", "Exchange", "PromptOptions", "exchanges", "load_tokenizer"),
    "instil.training": ("Outcome", "TrainConfig", "TrainOptions", "fit", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
