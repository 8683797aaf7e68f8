"""The only loop: from token trees and a model to a tuned model."""

from importlib import import_module
from typing import TYPE_CHECKING

from instil.errors import UsageError

if TYPE_CHECKING:
    from instil.training.config import TrainConfig
    from instil.training.events import Evaluation, Measure, Outcome, Resolved, Step, Watcher
    from instil.training.loop import fit
    from instil.training.options import TrainOptions
    from instil.training.run import resolve, train

__all__ = [
    "Evaluation",
    "Measure",
    "Outcome",
    "Resolved",
    "Step",
    "TrainConfig",
    "TrainOptions",
    "Watcher",
    "fit",
    "resolve",
    "train",
]

_HOMES = {
    "config": ("TrainConfig",),
    "events": ("Evaluation", "Measure", "Outcome", "Resolved", "Step", "Watcher"),
    "loop": ("fit",),
    "options": ("TrainOptions",),
    "run": ("resolve", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:  # the options are read without torch
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f"{__name__}.{_HOME_OF[name]}")
    except ModuleNotFoundError as error:
        raise UsageError(f"training needs the package {error.name!r}", "pip install 'instil[train]'") from error
    return getattr(home, name)
