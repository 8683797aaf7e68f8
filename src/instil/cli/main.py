"""The command `instil`: finds the command asked for and answers every mistake with one clear error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, Parameter
from cyclopts.config import Yaml
from cyclopts.exceptions import CycloptsError
from pydantic import ValidationError

from instil import __version__
from instil.errors import InstilError, UsageError

app = App(
    name="instil",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help="Teach a base language model to follow instructions, and show exactly what it was taught.",
    default_parameter=Parameter(
        negative_iterable=(),
        consume_multiple=True,
        show_default=lambda value: None if value in (None, {}, []) else str(value),
    ),
)
app.command("instil.cli.inspect:inspect", name="inspect")
app.command("instil.cli.templates:templates", name="templates")
app.command("instil.cli.quickstart:quickstart", name="quickstart")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with 2 on an error of the user, with 130 on Ctrl-C."""
    try:
        tokens = _with_standard_input(sys.argv[1:] if arguments is None else arguments)
        app.config = [_configuration(tokens)] if "--config" in tokens else []
        app(tokens, exit_on_error=False, print_error=False)
    except InstilError as error:
        _fail(str(error), error.exit_code)
    except CycloptsError as error:
        _fail(_explained(error), UsageError.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing is left to say
        sys.exit(141)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _with_standard_input(arguments: Sequence[str]) -> list[str]:
    """The arguments with a lone `-` among the data written so that it is not taken for a flag."""
    tokens: list[str] = []
    for at, token in enumerate(arguments):
        if token != "-":
            tokens.append(token)
            continue
        if tokens[-1:] == ["--data"]:
            tokens.pop()
        tokens.append("--data=-")
        if at + 1 < len(arguments) and not arguments[at + 1].startswith("-"):
            tokens.append("--data")
    return tokens


def _configuration(tokens: list[str]) -> Yaml:
    """Take `--config FILE` out of the arguments; flags override what the file says."""
    at = tokens.index("--config")
    if at + 1 == len(tokens):
        raise UsageError("--config: names no file", "Give a YAML file of flags, as in `prompt_weight: 0.5`.")
    path = Path(tokens[at + 1])
    del tokens[at : at + 2]
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file", "Check the path.")
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}", "Mend the file.") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config {path}: holds no settings", "Write one on each line, as in `prompt_weight: 0.5`.")
    return Yaml(path, must_exist=True, use_commands_as_keys=False)


def _explained(error: CycloptsError) -> str:
    """The error as one line for each thing that is wrong, with the flag and the value."""
    invalid: Any = error.__cause__
    if not isinstance(invalid, ValidationError):
        return str(error)
    return "\n".join(
        f"--{str(each['loc'][0]).replace('_', '-') if each['loc'] else ''} {_shown(each['input'])}: {each['msg']}"
        for each in invalid.errors()
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _fail(message: str, exit_code: int) -> None:
    sys.stderr.write(f"instil: {message}\n")
    sys.exit(exit_code)
