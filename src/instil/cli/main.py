"""The command `instil`: finds the command asked for and answers every mistake with one clear error."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from cyclopts import App, Parameter
from cyclopts.config import Dict
from cyclopts.exceptions import CycloptsError, MissingArgumentError, UnusedCliTokensError
from pydantic import ValidationError

from instil import __version__
from instil.errors import InstilError, UsageError, nearest

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
_COMMANDS = {
    "inspect": "Show the tokens of rows with what is trained marked, or count over the whole data set.",
    "train": "Tune a model on data.",
    "chat": "Talk with a model in the terminal, or have it answer prompts.",
    "serve": "Serve a model: OpenAI's API, a page to talk to it, what people make of its answers as data.",
    "complete": "Go on with a text as a model would, with no chat template.",
    "score": "Show how probable each token of rows is to a model, and its rank, or the likelihood of all rows.",
    "evaluate": "Measure what a tuned model does, beside its base, with how sure each figure is.",
    "compare": "Show the answers of two or more models to the same prompts, side by side.",
    "sweep": "Train every combination of some settings with several seeds, and compare what that gives.",
    "runs": "List the runs below a folder, or show one: its state, its loss, its settings.",
    "feedback": "List what a server recorded and people made of it, write it as data to train on, or delete it.",
    "templates": "List the built-in chat templates, or show one rendered.",
    "quickstart": "Tune the bundled base model on the bundled data, and see what that taught it.",
    "pocket": "Make the bundled base model anew, from nothing.",
}
for _name, _help in _COMMANDS.items():  # said here, so that `instil --help` need not load the commands
    app.command(f"instil.cli.{_name}:{_name}", name=_name, help=_help)

REMEDIES = {
    "data": "Name a file, a folder, a glob, - for standard input, or hf://owner/name.",
    "model": "Name the folder of a model, or one on the hub.",
    "record": "Name the folder, or the URL of the database, that `instil serve --record` was given.",
}
"""What to do where a setting that must be given is missing."""

_TAKE_DATA = ("--data", "--eval-data", "--eval", "--prompts")
_READ_CONFIG = (["sweep"],)  # whose --config holds the settings of another command


class _Ended(KeyboardInterrupt):
    """A signal that ends the process, raised so that everything under way is cleaned up as after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with 2 on an error of the user, with 128 and its number on a signal."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # beside other work, threads that wait busily wait 20 times as long
    for noisy in ("torchao", "torch.utils._pytree"):  # what transformers loads of it wherever it is installed
        logging.getLogger(noisy).setLevel(logging.ERROR)
    _open_streams()
    _heed_signals()
    tokens: list[str] = []
    settings: dict[str, Any] = {}
    file = None
    try:
        try:
            from instil.cli import config

            tokens = _with_standard_input(sys.argv[1:] if arguments is None else arguments)
            if tokens[:1] not in _READ_CONFIG:
                file = config.take(tokens)
            known = _check_flags(tokens)
            if file is not None:
                settings = config.load(file, known)
            app.config = [Dict(settings, source=file, use_commands_as_keys=False)] if settings else []
            app(tokens, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
    except InstilError as error:
        _fail(_placed(str(error), file, settings, tokens), error.exit_code)
    except CycloptsError as error:
        _fail(_placed(_explained(error, tokens), file, settings, tokens), UsageError.exit_code)
    except BrokenPipeError:
        _leave(141)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's own answer to one
            _leave(141)
        raise
    except OSError as error:
        _fail(f"{error.filename or 'the output cannot be written'}: {error.strerror or error}", 2, lost=True)
    except _Ended as error:
        _fail("ended by a signal", error.args[0])
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _open_streams() -> None:
    """UTF-8 whatever the locale; and no closed stream, whose number the next file opened would get."""
    closed = sys.stdout is None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if closed:
        _fail("the output cannot be written: standard output is closed", 2)


def _heed_signals() -> None:
    heeded = [
        number
        for name in ("SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) and signal.getsignal(number) == signal.SIG_DFL
    ]

    def end(number: int, frame: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)  # a second one would break the cleaning up off
        raise _Ended(128 + number)

    def let_go() -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_DFL)

    for each in heeded:
        signal.signal(each, end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=let_go)  # the cleaning up is for this process alone


def _with_standard_input(arguments: Sequence[str]) -> list[str]:
    """The arguments with a lone `-` among the data written so that it is not taken for a flag."""
    tokens: list[str] = []
    for at, token in enumerate(arguments):
        if token != "-":
            tokens.append(token)
            continue
        names = (token.partition("=")[0] for token in reversed(tokens) if token.startswith("--"))
        flag = next((name for name in names if name in _TAKE_DATA), "--data")
        if tokens[-1:] == [flag]:
            tokens.pop()
        tokens.append(f"{flag}=-")
        if at + 1 < len(arguments) and not arguments[at + 1].startswith("-"):
            tokens.append(flag)
    return tokens


def _check_flags(tokens: Sequence[str]) -> list[str]:
    """Refuse a mistyped flag before anything that it leaves missing; return the names of the command's flags."""
    if not tokens or tokens[0] not in _COMMANDS:
        return []
    command = app[tokens[0]]
    if command.default_command is not None:
        command.help = None  # now that it is loaded, its docstring says more
    below = [name for name in command if not name.startswith("-")]
    if tokens[1:2] and tokens[1] in below:
        command = command[tokens[1]]
    elif command.default_command is None:  # it is nothing without one of those below it
        if tokens[1:2] and not tokens[1].startswith("-"):
            raise UsageError(f"{tokens[0]} {tokens[1]}: there is no such command", nearest(tokens[1], below))
        return []
    flags = command.assemble_argument_collection()
    shown = [name for flag in flags if flag.parse for name in flag.names if name.startswith("--")]
    shown = [name for name in shown if name != "--empty-data"]
    for token in tokens:
        if token == "--":
            break
        name = token.partition("=")[0]
        if not name.startswith("--") or name in ("--help", "--version"):
            continue
        try:
            flags.match(name)
        except ValueError:
            raise UsageError(f"{name}: there is no such flag", nearest(name, [*shown, "--config"])) from None
    return [name.removeprefix("--") for name in shown if not name.startswith("--no-")]


def _explained(error: CycloptsError, tokens: Sequence[str]) -> str:
    """The error as one line for each thing that is wrong, with the flag and the value."""
    invalid: Any = error.__cause__
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())}: belongs to no flag\n  See what there is with --help."
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        what = "has no value" if name in tokens else "is missing"
        return f"{name}: {what}\n  {REMEDIES.get(name.removeprefix('--'), 'See what it takes with --help.')}"
    if not isinstance(invalid, ValidationError):
        return str(error)
    return "\n".join(reason(each) for each in invalid.errors())


def reason(each: Any) -> str:
    """One of pydantic's errors in plain words."""
    name = str(each["loc"][0]) if each["loc"] else ""
    flag, kind, given = name.replace("_", "-").removeprefix("as-"), each["type"], each.get("ctx", {})
    if kind == "missing":
        return f"--{flag}: is missing" + (f"\n  {REMEDIES[name]}" if name in REMEDIES else "")
    value = each["input"] if isinstance(each["input"], str) and each["input"] else repr(each["input"])
    said = each["msg"]
    if kind == "value_error":
        said = str(given["error"])
    elif kind == "literal_error":
        choices = re.findall("'([^']*)'", given["expected"])
        near = nearest(value, choices)
        said = f"must be {', '.join(choices[:-1])} or {choices[-1]}" + (f"; {near}" if near[:3] == "did" else "")
    elif kind.startswith("int_"):
        said = "must be a whole number"
    elif kind.startswith("float_"):
        said = "must be a number"
    elif kind == "finite_number":
        said = "must be a finite number"
    elif kind == "greater_than_equal":
        said = f"must be {given['ge']:g} or more"
    elif kind == "less_than_equal":
        said = f"must be {given['le']:g} or less"
    elif kind in ("greater_than", "less_than"):
        said = f"must be more than {given['gt']:g}" if "gt" in given else f"must be less than {given['lt']:g}"
    elif kind == "string_type":
        said = "must be text"
    return f"--{flag} {value}: {said}"


def _placed(message: str, file: str | None, settings: Mapping[str, Any], tokens: Sequence[str]) -> str:
    """The message, with the name of the configuration file where the value stands there."""
    given = {token.partition("=")[0].replace("_", "-") for token in tokens}
    lines = message.split("\n")
    for flag, value in settings.items():
        if f"--{flag}" not in given:
            starts = (f"--{flag}:", f"--{flag} ", f"{value}:")
            lines = [f"{file}: {line}" if line.startswith(starts) else line for line in lines]
    return "\n".join(lines)


def _fail(message: str, exit_code: int, *, lost: bool = False) -> NoReturn:
    rank = os.environ.get("RANK")  # of several processes that torchrun started
    try:
        sys.stderr.write(f"instil{f' (process {rank})' if rank else ''}: {message}\n")
        sys.stderr.flush()
    except OSError:
        lost = True
    if lost:
        _leave(exit_code)
    sys.exit(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """Exit where a stream takes no more: what it still holds goes nowhere, for Python would try again, and fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
            continue
        os.dup2(nowhere, stream.fileno())
    sys.exit(exit_code)
