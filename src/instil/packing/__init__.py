"""Exchanges to token trees to packed batches."""

from instil.packing.options import PackOptions
from instil.packing.packs import Packs, Plan, Report, TreeStore, deal, pack, plan
from instil.packing.prepared import Prepared, cache_folder, prepare
from instil.packing.store import StoredTrees
from instil.packing.tree import Expanded, PackedBatch, TokenTree, concatenate, expand, merge

__all__ = [
    "Expanded",
    "PackOptions",
    "PackedBatch",
    "Packs",
    "Plan",
    "Prepared",
    "Report",
    "StoredTrees",
    "TokenTree",
    "TreeStore",
    "cache_folder",
    "concatenate",
    "deal",
    "expand",
    "merge",
    "pack",
    "plan",
    "prepare",
]
