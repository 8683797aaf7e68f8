"""`instil chat`: a conversation with a model, in the terminal, or prompts answered once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, model_validator

from instil.cli.generating import GenerationOptions, inert, missing, notes, progress, save, shown, standard_input
from instil.conversation import Conversation, Message, Record, Source
from instil.errors import DataError, InstilError, RowProblem, UsageError
from instil.inference.prompts import read_prompts
from instil.prompt.options import PromptOptions, arguments

if TYPE_CHECKING:
    from instil.inference.session import Chat, Reply

_OF_PROMPTS = PromptOptions.model_fields


class ChatOptions(GenerationOptions):
    """Everything that `instil chat` takes."""

    template: str | None = Field(default=None, description=_OF_PROMPTS["template"].description)
    template_args: Annotated[dict[str, Any], BeforeValidator(arguments)] = Field(
        default_factory=dict, description=_OF_PROMPTS["template_args"].description
    )
    system: str | None = Field(default=None, description="System message.")
    prompt: str | None = Field(default=None, description="Answer this once, in place of a conversation.")
    prompts: str | None = Field(
        default=None,
        description="Answer all of a file: rows of any shape with a prompt, or, in .txt, a prompt on each line.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ChatOptions:
        if self.prompt is not None and self.prompts is not None:
            raise UsageError("--prompt and --prompts: both were given", "Give one.")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt: says nothing", "Give the model something to answer.")
        return self

    def prompt_options(self) -> PromptOptions:
        """Those of the options that say how conversations become prompts."""
        return PromptOptions(template=self.template, template_args=self.template_args)


def chat(*, options: Annotated[ChatOptions, Parameter(name="*")]) -> None:
    """Talk with a model in the terminal, or have it answer --prompt, standard input or --prompts once.

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    given = _given(options)
    if given is None:
        _talk(options)
        return
    from_file = options.prompts is not None
    model = _load(options)
    sys.stderr.write(f"instil: {shown(model.engine.sampling(options).to_json())}\n")
    if len(given) == options.answers == 1 and not (from_file or options.as_json or options.output):
        _say(model.reply(given[0].conversations[0], options, _write))
        return
    replies = answers(model, given, options)
    lines = (
        json.dumps(({"source": str(record.source)} if from_file else {}) | reply.to_json(), ensure_ascii=False) + "\n"
        for record, reply in zip(given, replies, strict=True)
    )
    if options.output is not None:
        save(options.output, lines)
        sys.stderr.write(f"instil: wrote {options.output}\n")
        return
    for line in lines if options.as_json else _texts(given, replies, from_file):
        sys.stdout.write(line)


def _given(options: ChatOptions) -> list[Record] | None:
    """What is to be answered once; None for a conversation in the terminal."""
    if options.prompt is not None or options.prompts is not None:
        return prompts(options)
    if not sys.stdin.isatty():
        text = standard_input()
        if not text.strip():
            raise UsageError("--prompt: is missing, and nothing stands on standard input", "Give --prompt TEXT.")
        return prompts(options.model_copy(update={"prompt": text}))
    if options.as_json or options.output is not None:
        flag = "--json" if options.as_json else "--output"
        raise UsageError(f"{flag}: is for prompts, not for a terminal", "Give --prompt TEXT or --prompts FILE.")
    if not sys.stdout.isatty():
        raise UsageError("standard output is no terminal to talk in", "Give --prompt TEXT or --prompts FILE.")
    return None


def prompts(options: ChatOptions) -> list[Record]:
    """What --prompt or --prompts asks, behind the system message."""
    records = [_asked(options.prompt or "", "--prompt", 1)] if options.prompts is None else _read(options.prompts)
    return [_behind_system(record, options.system) for record in records]


def _read(file: str) -> list[Record]:
    """The prompts of a file."""
    if Path(file).suffix != ".txt":
        from instil.data import read

        return list(read(file, format="prompt"))
    return [_asked(each.text, file, int(each.source.rpartition(":")[2])) for each in read_prompts(file)]


def _asked(text: str, file: str, line: int) -> Record:
    return Record(Source(file, line), "text", "prompt", (Conversation((Message("user", text),)),))


def _behind_system(record: Record, system: str | None) -> Record:
    """The record behind a system message, unless it has its own."""
    (conversation,) = record.conversations
    if not system or conversation.messages[0].role in ("system", "developer"):
        return record
    messages = (Message("system", system), *conversation.messages)
    return replace(record, conversations=(replace(conversation, messages=messages),))


def _load(options: ChatOptions) -> Chat:
    loaded = options.load(options.prompt_options())
    from instil.inference.session import Chat

    found = Chat(loaded)
    if loaded.engine.one_by_one:
        sys.stderr.write(f"instil: note: answers are generated one by one: {loaded.engine.one_by_one}\n")
    return found


def _talk(options: ChatOptions) -> None:
    try:
        from instil.cli.terminal import Terminal
    except ModuleNotFoundError as error:
        raise missing(error) from error
    from instil.inference.options import SamplingOptions

    model = _load(options)
    from instil.inference.session import ChatSession

    sampling = SamplingOptions(**{name: getattr(options, name) for name in SamplingOptions.model_fields})
    Terminal(ChatSession(model, sampling, options.system), options.model).run()


def answers(model: Chat, given: Sequence[Record], options: ChatOptions) -> list[Reply]:
    """The replies to all prompts, those to a prompt's later turns in their place; bad prompts are told together."""
    conversations = [record.conversations[0] for record in given]
    problems = []
    for record, conversation in zip(given, conversations, strict=True):
        try:
            model.prompt(conversation, options)
        except InstilError as error:
            problems.append(RowProblem(str(record.source), "", error.message, error.remedy))
    if problems:
        raise DataError("there are prompts that the model cannot answer", problems=problems)
    with progress(sum(1 + len(record.later_turns) for record in given)) as done:
        replies = model.replies(conversations, options, done)
        for turn in range(max(len(record.later_turns) for record in given)):
            again = [n for n, record in enumerate(given) if len(record.later_turns) > turn]
            goes_on = [_further(replies[n], given[n].later_turns[turn]) for n in again]
            for n, reply in zip(again, model.replies(goes_on, options, done), strict=True):
                replies[n] = reply
    return replies


def _further(reply: Reply, turn: Iterable[Message]) -> Conversation:
    """What was answered, its first answer, and what is said next."""
    said = (*reply.conversation.messages, reply.answers[0].message, *turn)
    return replace(reply.conversation, messages=said)


def _say(reply: Reply) -> None:
    """What follows an answer that was written as it came."""
    sys.stdout.write("\n")
    for note in notes(reply):
        sys.stderr.write(f"instil: note: {note}\n")
    if any(each.ended == "stopped" for each in reply.answers) or not reply.answers:
        raise KeyboardInterrupt


def _write(answer: int, piece: str) -> None:
    sys.stdout.write(inert(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _texts(given: Sequence[Record], replies: Sequence[Reply], from_file: bool) -> Iterator[str]:
    """Each answer below a line that says which it is."""
    for record, reply in zip(given, replies, strict=True):
        for number, each in enumerate(reply.answers, 1):
            names = [str(record.source)] * from_file + [f"answer {number}"] * (len(reply.answers) > 1)
            yield f"[{', '.join(names)}]\n{each.message.content}\n\n"
        for note in notes(reply):
            sys.stderr.write(f"instil: note: {f'{record.source}: ' if from_file else ''}{note}\n")
