"""A data set's counts as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_BAR = 40


def show(described: Mapping[str, Any]) -> None:
    """Print what `Prepared.describe` gives."""
    console = Console(highlight=False)
    rows = described["rows"]
    console.print(Text(", ".join(f"{count:,} {name}" for name, count in rows.items()), "bold"), Text("rows"))
    facts = {
        "Shapes": _counted(described["shapes"]),
        "Unused columns": _counted(described["unused_columns"]),
        "Exchanges": f"{described['exchanges']:,}, {described['ending_in_stop_token']:,} end in a stop token "
        f"({' '.join(described['stop_tokens'])})",
        "Seams": _counted(described["boundaries"]),
        "Tokens": _shared(described["tokens"]),
        "Added tokens": " ".join(described["added_tokens"]) or "none",
    }
    if "packs" in described:
        facts["Packs"] = _packs(described["packs"])
    grid = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        grid.add_row(Text(name, "bold"), Text(fact))
    console.print(grid)
    _show_roles(console, described["roles"])
    _show_lengths(console, described["lengths"])
    for warning in described["warnings"]:
        console.print(Text("warning: ", "yellow").append(warning, "default"), soft_wrap=True)


def _show_roles(console: Console, roles: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("Whose text", "Tokens", "Trained", "Share", title="Tokens of the exchanges", title_justify="left")
    for name, counts in roles.items():
        table.add_row(name, f"{counts['total']:,}", f"{counts['trained']:,}", f"{counts['share']:.1%}")
    console.print(table)


def _show_lengths(console: Console, lengths: Mapping[str, Any]) -> None:
    bins = lengths["histogram"]
    if not bins:
        return
    console.print(
        f"Lengths in tokens: {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,}, "
        f"mean {lengths['mean']:,.0f}, 95 % up to {lengths['p95']:,}"
    )
    most, wide = max(each["exchanges"] for each in bins), len(f"{bins[-1]['to']:,}")
    for each in bins:
        bar = "█" * -(-_BAR * each["exchanges"] // most)
        console.print(
            f"  {each['from']:>{wide},} to {each['to']:>{wide},}  {bar} {each['exchanges']:,}", soft_wrap=True
        )


def _packs(packs: Mapping[str, Any]) -> str:
    return (
        f"{packs['batches']:,} batches of {packs['tokens_per_batch']:,} tokens, {packs['fill']:.2%} filled; "
        f"{packs['shared_within']:,} tokens shared within rows, {packs['shared_across']:,} across rows "
        f"(share_prefixes {packs['share_prefixes']}: {packs['reason']})"
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _shared(counts: Mapping[str, Any]) -> str:
    return f"{counts['total']:,}, {counts['trained']:,} trained ({counts['share']:.1%})"
