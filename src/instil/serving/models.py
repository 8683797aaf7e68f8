"""The models that are served, and requests to them as answers that the engine can generate."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from instil.conversation import Conversation, Source
from instil.data.messages import read_messages, read_tools
from instil.data.row import Row
from instil.errors import InstilError, TemplateError, TokenizerError, UsageError
from instil.inference.batch import Job
from instil.inference.infill import Infill
from instil.inference.load import Loaded
from instil.inference.options import Sampling
from instil.inference.session import Chat, Content, TooLongError
from instil.inference.tools import CallFormat, CallStream, ToolCall, call_format
from instil.prompt.inspect import TokenText
from instil.serving.protocol import ApiError, ChatRequest, CompletionRequest, Generation

_COMPLETION_TOKENS = 16  # OpenAI's default
_SHRINKS = 4  # times, at most, that a tokenizer makes text shorter before it cuts it
_TOO_LONG = "the prompt is longer than the model's context length"  # words by which some clients know it


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the engine generates it.

    Args:
        jobs: Its answers; those to one prompt stand together.
        sampling: How they are drawn.
        conversation: What is answered; None of a plain text.
        names: The functions that the model may call.
    """

    jobs: list[Job]
    sampling: Sampling
    conversation: Conversation | None = None
    names: frozenset[str] = frozenset()


class ServedModel:
    """A model under its name.

    Args:
        name: What clients call it.
        role: The tuned model, or the base it was tuned from.
        loaded: The model.
        most_tokens: Of an answer, whatever is asked for.
    """

    def __init__(self, name: str, role: Literal["tuned", "base"], loaded: Loaded, most_tokens: int) -> None:
        self.name = name
        self.role = role
        self.loaded = loaded
        self.engine = loaded.engine
        self.most_tokens = most_tokens
        self.token_text = TokenText(loaded.tokenizer)
        self.chat: Chat | None = None
        self.no_chat = f"{name} has no chat template: use /v1/completions"
        self.calls: CallFormat | None = None
        if loaded.has_template:
            try:
                self.chat = Chat(loaded)
            except (TemplateError, TokenizerError) as error:
                self.no_chat = str(error)
            else:
                self.calls = call_format(loaded.renderer)

    @cached_property
    def most_characters(self) -> int | None:
        """More text than this is more tokens than the context holds, however it is cut; None where there is no limit.

        Known without cutting it, for megabytes would take seconds.
        """
        vocabulary = self.loaded.tokenizer.backend.get_vocab(with_added_tokens=True)
        longest = max(map(len, vocabulary))
        return self.engine.context * longest * _SHRINKS if self.engine.context else None

    def check_length(self, text: str, place: str) -> None:
        """Refuse text that cannot fit.

        Raises:
            ApiError: It is more than the context holds.
        """
        if self.most_characters is not None and len(text) > self.most_characters:
            raise ApiError(
                400,
                f"{_TOO_LONG}: {place} has {len(text):,} characters, the context holds {self.engine.context:,} tokens",
                place,
                "context_length_exceeded",
            )

    @cached_property
    def infill(self) -> Infill | UsageError | TemplateError:
        """What asks the model to fill gaps in text, or why it cannot."""
        try:
            return Infill(self.loaded)
        except (UsageError, TemplateError) as error:
            return error

    @cached_property
    def weights_hash(self) -> str:
        """The SHA-256 of the weights as they are held, by name."""
        import torch

        found = hashlib.sha256()
        for name, tensor in sorted(self.engine.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    @cached_property
    def template_hash(self) -> str | None:
        """The SHA-256 of the chat template's text."""
        return hashlib.sha256(self.chat.renderer.template.text.encode()).hexdigest() if self.chat else None

    def content(self) -> Content:
        """What takes the text of an answer, and gives its content."""
        return self.chat.content() if self.chat else Content("", "")

    def said(self, asked: Asked) -> Said:
        """What takes the text of one of the answers, and gives what it says and calls."""
        return Said(self.content(), CallStream(self.calls, asked.names) if self.calls and asked.names else None)

    def conversation(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> Conversation:
        """What a client sends as a conversation, read as training reads it.

        Raises:
            ApiError: A message cannot be read.
        """
        row = Row(Source("request", 1), {"messages": list(messages), "tools": list(tools or ())})
        row.empty_answers = True  # a model may have given one, and the conversation goes on
        turns = read_messages(row, "messages", list(messages))
        offered = read_tools(row, "tools")
        if row.problems or turns is None:
            problem = row.problems[0]
            raise ApiError(400, f"{problem.field}: {problem.reason}", problem.field)
        if turns[-1].message.role == "assistant":
            raise ApiError(400, "messages: the last message is the assistant's: there is nothing to answer", "messages")
        return Conversation(tuple(turn.message for turn in turns), offered)

    def chat_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """The tokens that training saw before the answer to this conversation.

        Raises:
            ApiError: There is no template, it refuses the conversation, or that leaves no room for an answer.
        """
        if self.chat is None:
            raise ApiError(400, self.no_chat, "model")
        for message in conversation.messages:
            self.check_length(message.content, "messages")
        try:
            return self.chat.whole_prompt(conversation)
        except TooLongError as error:
            said = f"{_TOO_LONG}: {error.message}"
            raise ApiError(400, said, "messages", "context_length_exceeded") from error
        except InstilError as error:
            raise ApiError(400, str(error), "messages") from error

    def asked_chat(self, request: ChatRequest) -> Asked:
        """A conversation that is to be answered.

        Raises:
            ApiError: It cannot be.
        """
        tools = None if request.tool_choice == "none" else request.tools
        conversation = self.conversation(request.messages, tools)
        ids = self.chat_ids(conversation)
        names = frozenset(str(tool["function"]["name"]) for tool in conversation.tools)
        top = request.top_logprobs or 0
        shown, stops = self._of_calls if names else ([], [])
        jobs, sampling = self._jobs(request, [list(ids)], request.limit, shown=shown, top=top, stops=stops)
        return Asked(jobs, sampling, conversation, names)

    def asked_completion(self, request: CompletionRequest) -> Asked:
        """Texts to go on with, or gaps to fill.

        Raises:
            ApiError: They cannot be.
        """
        prompts = [self._completion_ids(number, each, request.suffix) for number, each in enumerate(request.prompts)]
        if not prompts:
            raise ApiError(400, "prompt: is empty", "prompt")
        limit = min(_COMPLETION_TOKENS, self.most_tokens) if request.max_tokens is None else request.max_tokens
        stops = self._infill().stop_ids if request.suffix is not None else []
        jobs, sampling = self._jobs(request, prompts, limit, top=request.logprobs or 0, stops=stops)
        for job in jobs:
            job.told_top = request.logprobs if request.echo else None
        return Asked(jobs, sampling)

    def text_ids(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text as the tokenizer reads it, control tokens that it spells included.

        Args:
            text: The text.
            special: Whether to put BOS before it, if the tokenizer does.
        """
        bos = self.loaded.tokenizer.bos_token if special else None
        start = [] if bos is None else [self._id(bos)]
        return [*start, *self.loaded.encoder.encode(text, frozenset())]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.loaded.tokenizer.backend.decode(list(ids), skip_special_tokens=False))

    def check_ids(self, ids: Sequence[int], place: str) -> None:
        """Refuse ids that are no tokens of the model.

        Raises:
            ApiError: There is one.
        """
        most = self.engine.model.get_input_embeddings().weight.shape[0]
        wrong = next((each for each in ids if each >= most), None)
        if wrong is not None:
            raise ApiError(400, f"{place}: the token id {wrong} is none of the model's {most:,}", place)

    @property
    def fills_gaps(self) -> bool:
        """Whether the model fills gaps in text."""
        return isinstance(self.infill, Infill)

    def _completion_ids(self, number: int, prompt: str | list[int], suffix: str | None) -> list[int]:
        """The tokens of a prompt."""
        place = "prompt" if number == 0 else f"prompt[{number}]"
        if isinstance(prompt, str):
            self.check_length(prompt + (suffix or ""), "prompt")
            if suffix is not None:
                try:
                    ids = self._infill().ids(prompt, suffix)
                except InstilError as error:
                    raise ApiError(400, str(error), "suffix") from error
            else:
                ids = self.loaded.encode(prompt)
        else:
            if suffix is not None:
                raise ApiError(400, "suffix: needs prompts of text, not of token ids", "suffix")
            self.check_ids(prompt, "prompt")
            ids = prompt
        if not ids:
            raise ApiError(
                400, f"{place}: is empty, and the tokenizer begins a text with no token of its own", "prompt"
            )
        context = self.engine.context
        if context and len(ids) > context:
            raise self._too_long(place, len(ids))
        return ids

    @cached_property
    def _of_calls(self) -> tuple[list[int], list[int]]:
        """The special tokens that calls are written with, and the token that ends them."""
        if self.calls is None:
            return [], []
        return [self._id(token) for token in self.calls.tokens], [self._id(self.calls.stop)] if self.calls.stop else []

    def _infill(self) -> Infill:
        if not isinstance(self.infill, Infill):
            raise ApiError(400, str(self.infill), "suffix")
        return self.infill

    def _jobs(
        self,
        request: Generation,
        prompts: Sequence[list[int]],
        limit: int | None,
        *,
        top: int,
        shown: Sequence[int] = (),
        stops: Sequence[int] = (),
    ) -> tuple[list[Job], Sampling]:
        if limit is not None and limit > self.most_tokens:
            raise ApiError(
                400, f"max_tokens: {limit:,} is more than the {self.most_tokens:,} that this server gives", "max_tokens"
            )
        tokens = self.most_tokens if limit is None else limit
        context = self.engine.context
        for number, ids in enumerate(prompts):
            if context and tokens and len(ids) >= context:
                raise self._too_long("prompt" if number == 0 else f"prompt[{number}]", len(ids))
        options = request.sampling(tokens, secrets.randbits(63))
        sampling = self.engine.sampling(options)
        jobs = [
            self.engine.job(ids, sampling, tokens, prompt=number, answer=answer, shown=shown)
            for number, ids in enumerate(prompts)
            for answer in range(sampling.answers)
        ]
        for job in jobs:
            job.top = top
            job.stop_ids = frozenset(job.stop_ids).union(stops)
        return jobs, sampling

    def _too_long(self, place: str, tokens: int) -> ApiError:
        return ApiError(
            400,
            f"{_TOO_LONG}: {place} has {tokens:,} tokens, the context holds {self.engine.context:,} with the answer",
            "prompt",
            "context_length_exceeded",
        )

    def _id(self, token: str) -> int:
        found = self.loaded.tokenizer.backend.token_to_id(token)
        assert found is not None
        return int(found)


class Said:
    """What an answer says and calls, as it comes.

    Args:
        content: Takes its text.
        calls: Holds back what is or may be a call; None where no functions are on offer.
    """

    def __init__(self, content: Content, calls: CallStream | None) -> None:
        self._content = content
        self._calls = calls
        self.text = ""
        """What was given out."""
        self.tool_calls: list[ToolCall] = []

    def push(self, piece: str) -> str:
        """Take text; return what is certain to be said."""
        return self._given(self._content.push(piece))

    def finish(self) -> str:
        """The rest, when no text comes any more; the calls are known then."""
        rest = self._given(self._content.finish())
        if self._calls is not None:
            last, self.tool_calls = self._calls.finish()
            self.text += last
            rest += last
        return rest

    def _given(self, content: str) -> str:
        new = self._calls.push(content) if self._calls is not None else content
        self.text += new
        return new
