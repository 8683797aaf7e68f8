"""`instil templates`: the built-in chat templates, and one of them rendered."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from instil.conversation import Message
from instil.errors import TemplateError, UsageError, nearest
from instil.prompt.template import Builtin, ChatTemplate, builtin_templates

_ROW = Message(
    "user",
    "Name the capital.\n\nPeru",
    fields={"instruction": "Name the capital.", "input": "Peru", "prefix": "def add(a, b):\n", "suffix": "\n"},
)
_SHOWN = [_ROW.to_wire(), Message("assistant", "Lima").to_wire()]


def templates(name: str | None = None, *, source: bool = False) -> None:
    """List the built-in chat templates, or show one rendered.

    Args:
        name: The template to show.
        source: Print its Jinja source instead of a rendering.
    """
    console = Console(highlight=False)
    known = builtin_templates()
    if name is None:
        table = Table("Name", "What it is", "Special tokens")
        for builtin in known.values():
            table.add_row(builtin.name, Text(builtin.description), Text(" ".join(builtin.special_tokens) or "-"))
        console.print(table)
        console.print("Show one with: instil templates NAME (--source for its Jinja source)")
        return
    if name not in known:
        raise UsageError(f"{name}: there is no built-in template of this name", nearest(name.lower(), known))
    console.print(Text(known[name].text if source else _rendered(known[name])), soft_wrap=True)


def _rendered(builtin: Builtin) -> str:
    """A prompt, a bar where the answer begins, and the answer."""
    template = ChatTemplate(builtin.name, builtin.text, {"eos_token": "<eos>"})
    prompt, whole = template.render(_SHOWN[:1], answer=True), template.render(_SHOWN)
    if not whole.startswith(prompt):
        raise TemplateError(f"{builtin.name}: the prompt is not a prefix of the rendering")
    return f"{prompt}┃{whole[len(prompt) :]}"
