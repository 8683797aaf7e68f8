"""Exchanges to token trees to packed batches."""

from instil.packing.pack import Packs, Plan, Report, TreeStore, deal, pack, plan
from instil.packing.tree import Expanded, PackedBatch, TokenTree, concatenate, expand, merge

__all__ = [
    "Expanded",
    "PackedBatch",
    "Packs",
    "Plan",
    "Report",
    "TokenTree",
    "TreeStore",
    "concatenate",
    "deal",
    "expand",
    "merge",
    "pack",
    "plan",
]
