"""Load and save models, adapters, attention over token trees, new tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instil.model.forward import TreeModel
    from instil.model.options import ModelOptions

__all__ = ["ModelOptions", "TreeModel"]

_HOME_OF = {"ModelOptions": "options", "TreeModel": "forward"}


def __getattr__(name: str) -> object:  # the options are read without torch
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
