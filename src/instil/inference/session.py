"""Chat without a terminal: conversations to prompts that the model's context holds, answers to messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from instil.conversation import Conversation, Message
from instil.data.strict_json import lone_surrogate
from instil.errors import TemplateError, UsageError
from instil.inference.batch import Ended
from instil.inference.engine import Answer
from instil.inference.load import Loaded
from instil.inference.options import SamplingOptions
from instil.prompt import Renderer
from instil.prompt.encode import encode_seam, without_oldest_turn

OnAnswer = Callable[[int, str], object]
"""Told the number of an answer and the text that is new in it."""

_SAID = "zqAnswerqz"
_PROBE = Conversation((Message("user", "a"), Message("assistant", _SAID)))
_REASONED = Conversation((Message("user", "a"), Message("assistant", _SAID, reasoning_content="a")))


class TooLongError(UsageError):
    """A prompt that leaves the model's context no room for an answer, whatever turns are left out."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given.

    Args:
        ids: The tokens.
        dropped_turns: How many of the oldest turns were left out, so that it fits.
    """

    ids: tuple[int, ...]
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer as a message.

    Args:
        message: What the assistant said. Its weight is 0 where it is empty or cut off, and so not to be trained.
        ended: As the engine says, or `stopped` by whoever asked.
        tokens: How many it has, the stop token not counted; None where it was stopped.
    """

    message: Message
    ended: Ended | Literal["stopped"]
    tokens: int | None

    @classmethod
    def of(cls, text: str, ended: Ended | Literal["stopped"], tokens: int | None) -> ChatAnswer:
        """The answer that a text makes."""
        whole = ended in ("stop", "stop-string") and text.strip()
        return cls(Message("assistant", text, weight=None if whole else 0.0), ended, tokens)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to one conversation.

    Args:
        conversation: What was answered, whole, whatever was left out of the prompt.
        answers: At least one, unless it was stopped before a word was said.
        prompt_tokens: The tokens of the prompt.
        dropped_turns: How many of the oldest turns were left out of it.
    """

    conversation: Conversation
    answers: tuple[ChatAnswer, ...]
    prompt_tokens: int
    dropped_turns: int

    def to_json(self) -> dict[str, Any]:
        """The reply as plain JSON values; `messages` is a record that `instil.read` reads."""
        answers = [{"content": a.message.content, "ended": a.ended, "tokens": a.tokens} for a in self.answers]
        said = [each.message for each in self.answers[:1]]
        return {
            "messages": [each.to_data() for each in (*self.conversation.messages, *said)],
            **({"tools": list(self.conversation.tools)} if self.conversation.tools else {}),
            "answers": answers,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": sum(each.tokens or 0 for each in self.answers),
            "dropped_turns": self.dropped_turns,
        }


class Chat:
    """A model that answers conversations.

    Args:
        loaded: The model, whose engine from now on stops at what its template ends an answer with, too.

    Raises:
        TemplateError, TokenizerError: There is no chat template, or it is not for this model.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.renderer = loaded.renderer
        self.engine = loaded.engine
        self.engine.stop_ids |= frozenset(stop_ids(self.renderer))
        self._frame = frame(self.renderer)

    def content(self) -> Content:
        """What takes the text of an answer, and gives its content."""
        return Content(*self._frame)

    def prompt(self, conversation: Conversation, sampling: SamplingOptions | None = None) -> Prompt:
        """The tokens that training saw before the answer to this conversation.

        Where they and an answer (of the most tokens it may have, but of no more than a quarter of the context) do not
        fit, the oldest turns are left out; never a system message, never the last turn.

        Raises:
            TemplateError: The template refuses the conversation.
            UsageError: Its last turn alone does not fit, or a message is no text.
        """
        _check_text(conversation)
        context, dropped = self.engine.context, 0
        room = min((sampling or SamplingOptions()).max_new_tokens, context // 4)
        while True:
            ids = prompt_ids(self.renderer, conversation)
            if not context or len(ids) + room <= context:
                return Prompt(tuple(ids), dropped)
            keep = without_oldest_turn(conversation.messages)
            if keep is None:
                break
            conversation = replace(conversation, messages=tuple(conversation.messages[i] for i in keep))
            dropped += 1
        if len(ids) < context:
            return Prompt(tuple(ids), dropped)
        raise TooLongError(
            f"the last message makes a prompt of {len(ids):,} tokens, system message included, and the model takes "
            f"{context:,}, its answer included",
            "Shorten the message, or the system message.",
        )

    def whole_prompt(self, conversation: Conversation) -> tuple[int, ...]:
        """The tokens of `prompt`, of a conversation from which nothing is left out.

        Raises:
            TemplateError: The template refuses the conversation.
            UsageError: It does not fit, or a message is no text.
        """
        _check_text(conversation)
        ids = prompt_ids(self.renderer, conversation)
        if self.engine.context and len(ids) >= self.engine.context:
            raise TooLongError(
                f"the conversation makes a prompt of {len(ids):,} tokens, and the model takes "
                f"{self.engine.context:,}, its answer included",
                "Shorten it.",
            )
        return tuple(ids)

    def reply(
        self, conversation: Conversation, sampling: SamplingOptions | None = None, on_text: OnAnswer | None = None
    ) -> Reply:
        """The answers to one conversation. A KeyboardInterrupt stops them and keeps what was said.

        Args:
            conversation: Ends in the turn that is to be answered.
            sampling: How.
            on_text: Told of each piece of text as it comes.

        Raises:
            TemplateError, UsageError: As `prompt`.
        """
        prompt = self.prompt(conversation, sampling)
        said: dict[int, Content] = {}

        def hear(_: int, answer: int, piece: str) -> None:
            new = said.setdefault(answer, self.content()).push(piece)
            if new and on_text is not None:
                on_text(answer, new)

        try:
            (found,) = self.engine.generate([prompt.ids], sampling, on_text=hear)
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # more than a wish to stop: a signal that ends the process
                raise
            for n in sorted(said):
                said[n].finish()
            stopped = tuple(ChatAnswer.of(said[n].text, "stopped", None) for n in sorted(said) if said[n].text)
            return Reply(conversation, stopped, len(prompt.ids), prompt.dropped_turns)
        for n in sorted(said):
            new = said[n].finish()
            if new and on_text is not None:
                on_text(n, new)
        return self._reply(conversation, prompt, found)

    def replies(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingOptions | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> list[Reply]:
        """The answers to many conversations, generated together.

        Args:
            conversations: Each ends in the turn that is to be answered.
            sampling: How.
            on_done: Told the number of a conversation when it is answered.

        Raises:
            TemplateError, UsageError: As `prompt`.
        """
        return self.replies_to([(each, self.prompt(each, sampling)) for each in conversations], sampling, on_done)

    def replies_to(
        self,
        asked: Sequence[tuple[Conversation, Prompt]],
        sampling: SamplingOptions | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> list[Reply]:
        """The answers to many conversations with the prompts that `prompt` made of them; as `replies`."""
        found = self.engine.generate([prompt.ids for _, prompt in asked], sampling, on_done=on_done)
        return [self._reply(*each, answers) for each, answers in zip(asked, found, strict=True)]

    def _reply(self, conversation: Conversation, prompt: Prompt, answers: Sequence[Answer]) -> Reply:
        found = tuple(ChatAnswer.of(self.content().whole(each.text), each.ended, len(each.ids)) for each in answers)
        return Reply(conversation, found, len(prompt.ids), prompt.dropped_turns)


class Content:
    """The content of an answer as it comes, without what the template puts before and behind it.

    Args:
        opening: What the template puts before the content.
        closing: What it puts between the content and the stop token.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self._opening, self._closing = opening, closing
        self._said = ""
        self.text = ""
        """What was given out."""

    def push(self, piece: str) -> str:
        """Take text; return what is certain to be content now: not what may be the opening or the closing."""
        self._said += piece
        if self._opening.startswith(self._said):
            return ""
        content = self._said.removeprefix(self._opening)
        held = next(n for n in range(len(self._closing), -1, -1) if content.endswith(self._closing[:n]))
        return self._given(content[: len(content) - held])

    def finish(self) -> str:
        """The rest, when no text comes any more."""
        if self._said and self._opening.startswith(self._said) and self._said != self._opening:
            return self._given(self._said)
        return self._given(self._said.removeprefix(self._opening).removesuffix(self._closing))

    def whole(self, text: str) -> str:
        """The content of an answer that is there as a whole."""
        self.push(text)
        self.finish()
        return self.text

    def _given(self, content: str) -> str:
        new = content[len(self.text) :]
        self.text += new
        return new


class ChatSession:
    """A conversation with a model, turn by turn.

    Args:
        chat: The model.
        sampling: How it answers; may be changed between turns.
        system: The system message, which may be changed too; None or "" for none.
    """

    def __init__(self, chat: Chat, sampling: SamplingOptions | None = None, system: str | None = None) -> None:
        self.chat = chat
        self.sampling = sampling or SamplingOptions()
        self.system = system
        self.messages: list[Message] = []
        """What was said, user and assistant in turn, without the system message."""
        self._replies = 0

    @property
    def conversation(self) -> Conversation:
        """What was said, behind the system message."""
        return self._behind_system(self.messages)

    def send(self, text: str, on_text: OnAnswer | None = None) -> Reply:
        """Say something; the first answer is kept. An error, or a stop before a word was said, leaves all as it was.

        Args:
            text: What the user says.
            on_text: Told of each piece of text as it comes.

        Raises:
            TemplateError, UsageError: As `Chat.prompt`.
        """
        return self._answered([*self.messages, Message("user", text)], on_text)

    def retry(self, on_text: OnAnswer | None = None) -> Reply:
        """Have the last turn answered again, by other draws, in place of its answer.

        Raises:
            UsageError: Nothing was said yet.
        """
        asked = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=None)
        if asked is None:
            raise UsageError("there is no answer to give again", "Say something first.")
        return self._answered(self.messages[: asked + 1], on_text)

    def reset(self) -> None:
        """Forget what was said; the system message and the sampling stay."""
        self.messages = []
        self._replies = 0

    def save(self, file: str | Path) -> None:
        """Append the conversation to a file of JSON lines, as a record that `instil.read` reads.

        Raises:
            UsageError: Nothing was answered yet, or the file is none of JSON lines or cannot be written.
        """
        path = Path(file)
        if not any(message.role == "assistant" for message in self.messages):
            raise UsageError(f"{file}: there is no answer to save", "Say something first.")
        if path.suffix != ".jsonl":
            raise UsageError(f"{file}: is not named as a file of JSON lines", "Name it so: chats.jsonl.")
        record = {"messages": [message.to_data() for message in self.conversation.messages]}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            with path.open("a+b") as out:
                if out.tell():
                    out.seek(-1, 2)
                    line = line if out.read(1) == b"\n" else b"\n" + line
                out.write(line)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{file}: cannot be written: {reason}", "Name a file in a folder that takes it."
            ) from error

    def _answered(self, asked: list[Message], on_text: OnAnswer | None) -> Reply:
        # Draws follow from the seed: each turn, and each try, has its own.
        sampling = self.sampling.model_copy(update={"seed": self.sampling.seed + self._replies})
        reply = self.chat.reply(self._behind_system(asked), sampling, on_text)
        self._replies += 1
        if reply.answers:
            self.messages = [*asked, reply.answers[0].message]
        return reply

    def _behind_system(self, messages: Iterable[Message]) -> Conversation:
        return Conversation((*([Message("system", self.system)] if self.system else []), *messages))


def prompt_ids(renderer: Renderer, conversation: Conversation) -> list[int]:
    """The tokens of the prompt that a conversation makes, as training encodes them.

    Raises:
        TemplateError: The template refuses the conversation.
    """
    return encode_seam(renderer.encoder, renderer.prompt(conversation))[0]


def frame(renderer: Renderer) -> tuple[str, str]:
    """What the template puts between the prompt and the content of an answer, and between that and the stop token, as
    it shows of a short one. The model says it, and it is not the content: a template that asks with `Assistant:` and
    answers with ` Yes.` would else render two spaces when the answer is history.
    """
    try:
        before, _, after = renderer.exchange(_PROBE, 1).completion.partition(_SAID)
    except TemplateError:  # it takes no such conversation, or an answer begins with reasoning
        return "", ""
    stop = next((token for token in renderer.stop_tokens if after.endswith(token)), "")
    return before, after.removesuffix(stop)


def stop_ids(renderer: Renderer) -> list[int]:
    """The tokens that the template ends an answer with, as it shows of a short one."""
    for probe in (_PROBE, _REASONED):  # some open <think> for the model, and take no answer without reasoning
        with suppress(TemplateError):
            renderer.exchange(probe, 1)
    ids = (renderer.tokenizer.backend.token_to_id(token) for token in renderer.stop_tokens)
    return [each for each in ids if each is not None]


def _check_text(conversation: Conversation) -> None:
    for message in conversation.messages:
        if lone_surrogate(message.content):  # of bytes in the command line that are no UTF-8
            raise UsageError(f"the {message.role} message is not UTF-8", "Convert the text to UTF-8.")
