"""`instil quickstart`: inspect the bundled sample data with a tokenizer made on the spot."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from instil.pocket import sample_data, save_sample_tokenizer


def quickstart(*, output: Path = Path("instil-quickstart")) -> None:
    """Show what would be trained on the bundled sample data, with a tokenizer made on the spot.

    Args:
        output: The folder that gets the tokenizer.
    """
    from instil.cli.main import app

    console = Console(highlight=False)
    tokenizer = output / "tokenizer"
    console.print(Text(f"Training a small tokenizer on the bundled data, into {tokenizer}"))
    save_sample_tokenizer(tokenizer)
    instructions, conversations = map(str, sample_data())
    common = ["inspect", "--tokenizer", str(tokenizer), "--template", "chatml", "--data"]
    for title, arguments in (
        ("What is trained, token by token", [*common, instructions, "--rows", "1:2"]),
        (
            "The prompt's text trained too, at a tenth of the weight",
            [*common, instructions, "--row", "1", "--prompt-weight", "0.1"],
        ),
        ("Several turns and tool calls", [*common, conversations, "--row", "1"]),
        ("All of the data", [*common, instructions, conversations, "--summary"]),
    ):
        console.rule(Text(title, "bold"), align="left")
        console.print(Text("$ " + shlex.join(["instil", *arguments]), "dim"), soft_wrap=True)
        app(arguments, exit_on_error=False, print_error=False)
    console.print("Next: the same with --data FILE on data of your own; `instil templates` lists the other templates.")
