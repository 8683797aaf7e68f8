"""`instil quickstart`: inspect the bundled sample data with a tokenizer made on the spot."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from instil.errors import UsageError
from instil.pocket import sample_data, save_sample_tokenizer

_WITH_A_CALL = 17  # a row of the bundled conversations


def quickstart(*, output: str = "instil-quickstart") -> None:
    """Show what would be trained on the bundled sample data, with a tokenizer made on the spot.

    Args:
        output: The folder that gets the tokenizer.
    """
    from instil.cli.main import app

    console = Console(highlight=False)
    if not output:
        raise UsageError("--output: is empty (a shell variable that is not set?)", "Name a folder.")
    tokenizer = _short(save_sample_tokenizer(Path(output) / "tokenizer"))
    console.print(Text(f"A small tokenizer, trained on the bundled data: {tokenizer}"))
    instructions, conversations = map(_short, sample_data())
    common = ["inspect", "--tokenizer", tokenizer, "--template", "chatml", "--data"]
    for title, arguments in (
        ("What is trained, token by token", [*common, instructions, "--rows", "1:2"]),
        (
            "The prompt's text trained too, at a tenth of the weight",
            [*common, instructions, "--row", "1", "--prompt-weight", "0.1"],
        ),
        ("A conversation of several turns, with a tool call", [*common, conversations, "--row", str(_WITH_A_CALL)]),
        ("All of the data", [*common, instructions, conversations, "--summary"]),
    ):
        console.rule(Text(title, "bold"), align="left")
        console.print(Text("$ " + shlex.join(["instil", *arguments]), "dim"), soft_wrap=True)
        app(arguments, exit_on_error=False, print_error=False)
    console.print("Next: the same with --data FILE on data of your own; `instil templates` lists the other templates.")


def _short(path: Path) -> str:
    """The path, from the current folder where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
