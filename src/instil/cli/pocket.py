"""`instil pocket build`: the bundled base model, made anew."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from instil.pocket.options import BuildOptions


def pocket(action: Literal["build"], /, *, options: Annotated[BuildOptions, Parameter(name="*")]) -> None:
    """Make the bundled base model anew: write its corpus, train its tokenizer and its weights on it, from a seed.

    Args:
        action: `build`.
        options: Sizes, seed and folder.
    """
    from instil.cli.progress import Progress
    from instil.cli.stopping import Stopping
    from instil.cli.train import hush
    from instil.pocket.build import build

    hush()
    with Progress() as progress, Stopping() as stopping:
        build(options, [progress, stopping], stopping=stopping.asked)
    sys.stderr.write(f"instil: wrote {options.output}\n")
