"""A chat in the terminal: lines in, answers as they come, commands that begin with a slash."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import yaml
from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import ValidationError

from instil.cli.generating import inert, notes, shown
from instil.cli.main import reason
from instil.errors import InstilError, UsageError, nearest
from instil.inference.options import SamplingOptions
from instil.inference.session import ChatSession, OnAnswer, Reply

_ASKS = "> "
_GOES_ON = ". "
_HELP = """\
/reset           forget the conversation
/system [TEXT]   show the system message, or set it ("" for none)
/retry           have the last message answered again
/save FILE       append the conversation to a file of training records (.jsonl)
/params [A=B …]  show how answers are drawn, or change it: /params temperature=0.7 top_p=0.9
/help            show this
/exit            leave; Ctrl-D does too
Enter sends. Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C stops an answer.
A message that begins with a slash is sent with a space before it."""


class Terminal:
    """A chat that reads from the terminal and writes to it.

    Args:
        session: The conversation.
        name: The model's, to say.
    """

    def __init__(self, session: ChatSession, name: str) -> None:
        self._session = session
        self._name = name
        self._reader: PromptSession[str] = PromptSession(
            message=_ASKS, multiline=True, prompt_continuation=_GOES_ON, key_bindings=_keys()
        )
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "system": self._system,
            "retry": self._retry,
            "save": self._save,
            "params": self._params,
            "help": lambda _: _say(_HELP),
        }

    def run(self) -> None:
        """Talk until /exit or the end of input."""
        _say(f"{self._name}; {self._resolved()}\n/help lists the commands.")
        while True:
            try:
                text = self._reader.prompt()
                if text.strip() == "/exit":
                    return
                if text.strip():
                    self._take(text)
            except EOFError:
                return
            except KeyboardInterrupt as stop:
                if type(stop) is not KeyboardInterrupt:  # a signal that ends the process
                    raise
            except InstilError as error:
                _say(str(error))

    def _take(self, text: str) -> None:
        """A command, or something to be answered."""
        if not text.startswith("/"):
            self._answer(lambda on_text: self._session.send(text.strip(), on_text))
            return
        name, _, rest = text[1:].strip().partition(" ")
        if name not in self._commands:
            known = [f"/{each}" for each in (*self._commands, "exit")]
            raise UsageError(
                f"/{name}: there is no such command",
                f"{nearest(f'/{name}', known)}\n  A message that begins with a slash is sent with a space before it.",
            )
        self._commands[name](rest.strip())

    def _answer(self, ask: Callable[[OnAnswer], Reply]) -> None:
        several = self._session.sampling.answers > 1

        def write(answer: int, piece: str) -> None:
            if not several:
                sys.stdout.write(inert(piece))
                sys.stdout.flush()

        reply = ask(write)
        for number, each in enumerate(reply.answers if several else (), 1):
            _say(f"[answer {number}]\n{inert(each.message.content)}\n")
        said = list(notes(reply))
        if not reply.answers:
            said.append("stopped before a word was said; all is as it was")
        elif any(each.ended == "stopped" for each in reply.answers):
            said.append("stopped; what was said is kept, and is no answer to train on")
        if several and reply.answers:
            said.append("the conversation goes on with the first answer")
        _say("".join(f"\n({each})" for each in said))

    def _reset(self, _: str) -> None:
        self._session.reset()
        _say("The conversation is forgotten.")

    def _system(self, text: str) -> None:
        if text:
            self._session.system = "" if text == '""' else text
        _say(f"System message: {self._session.system}" if self._session.system else "There is no system message.")

    def _retry(self, _: str) -> None:
        if self._session.chat.engine.sampling(self._session.sampling).greedy:
            _say("(the likeliest tokens are taken, so the answer is the same; /params temperature=0.7 draws)")
        self._answer(self._session.retry)

    def _save(self, file: str) -> None:
        if not file:
            raise UsageError("/save: names no file", "Write /save chats.jsonl.")
        self._session.save(file)
        _say(f"Appended to {file}.")

    def _params(self, text: str) -> None:
        if text:
            self._session.sampling = changed(self._session.sampling, text)
        _say(self._resolved())

    def _resolved(self) -> str:
        return shown(self._session.chat.engine.sampling(self._session.sampling).to_json())


def changed(sampling: SamplingOptions, text: str) -> SamplingOptions:
    """The options with others put in their place.

    Args:
        sampling: As they were.
        text: `temperature=0.7 stop='["END"]' …`; `top_k=` for the default.

    Raises:
        UsageError: There is no such option, or it cannot have this value.
    """
    fields = SamplingOptions.model_fields
    given = {name: getattr(sampling, name) for name in sampling.model_fields_set & fields.keys()}
    try:
        parts = [part.partition("=") for part in shlex.split(text)]
    except ValueError as error:
        raise UsageError(f"/params {text}: {str(error).lower()}", "Close the quotation.") from error
    for flag, equals, value in parts:
        name = flag.removeprefix("--").replace("-", "_")
        if name not in fields:
            raise UsageError(f"/params {flag}: there is no such setting", nearest(name, fields))
        if not equals:
            raise UsageError(f"/params {flag}: has no value", f"Write {name}=VALUE.")
        given.pop(name, None)
        if value:
            given[name] = _texts(value) if name == "stop" else value
    try:
        return SamplingOptions(**given)
    except ValidationError as error:
        said = (reason(each).replace("--", "/params ", 1) for each in error.errors())
        raise UsageError("\n".join(said)) from error


def _texts(value: str) -> list[str]:
    """A list of texts, or one text."""
    try:
        found = yaml.safe_load(value) if value.startswith("[") else [value]
    except yaml.YAMLError:
        found = [value]
    return list(map(str, found))


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
