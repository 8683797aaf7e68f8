"""Generation: sampling, a batched engine with a key-value cache, text as it comes."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instil.inference.engine import Answer, Engine
    from instil.inference.load import Loaded, load_engine
    from instil.inference.options import Sampling, SamplingOptions

__all__ = ["Answer", "Engine", "Loaded", "Sampling", "SamplingOptions", "load_engine"]

_HOME_OF = {
    "Answer": "engine",
    "Engine": "engine",
    "Loaded": "load",
    "Sampling": "options",
    "SamplingOptions": "options",
    "load_engine": "load",
}


def __getattr__(name: str) -> object:  # the options are read without torch
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
