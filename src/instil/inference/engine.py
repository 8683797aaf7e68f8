"""The engine: prompts in, answers out, as many at once as memory takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from instil.errors import UsageError
from instil.inference.cache import NAME
from instil.inference.options import Sampling, SamplingOptions
from instil.inference.reading import OneReader, Reader, SlotReader, reading_alone, refusal
from instil.inference.sampling import Sampler, noise
from instil.inference.text import Decoder, TextStream
from instil.model.forward import TreeModel, rotation_regime
from instil.prompt.tokenizer import Tokenizer

Ended = Literal["stop", "stop-string", "length", "context"]
OnText = Callable[[int, int, str], object]
OnDone = Callable[[int], object]

_PROMPT_TOKENS = 2048
"""Prompt tokens read in one go: enough to keep the processor busy, few enough to stay in its caches."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gave to a prompt.

    Args:
        ids: The tokens, without the stop token.
        text: Their text as it follows the prompt, without special tokens, up to a stop string.
        ended: By a stop token, a stop string, the length asked for, or because the model's context is full.
        logprob: The sum of the logarithms of the probabilities that the model gives the tokens, the stop token
            included, before temperature and the rest; in nats.
    """

    ids: tuple[int, ...]
    text: str
    ended: Ended
    logprob: float


class _Job:
    """An answer on its way."""

    def __init__(self, prompt: int, answer: int, ids: Sequence[int], limit: int, full: Ended) -> None:
        self.prompt, self.answer = prompt, answer
        self.prompt_ids = ids
        self.limit, self.full = limit, full
        self.ids: list[int] = []
        self.logprob = 0.0
        self.draws: Sequence[float] = ()
        self.stream: TextStream
        self.ended: Ended | None = None

    def told(self) -> Answer:
        assert self.ended is not None
        return Answer(tuple(self.ids), self.stream.text, self.ended, self.logprob)


class Engine:
    """A causal language model that generates.

    Args:
        model: A causal language model of transformers, or one of peft around it, on its device; it is put into
            evaluation mode, and its attention is set.
        tokenizer: The model's.
        stop_ids: The tokens that end an answer.
        generation_config: What the model's `generation_config.json` holds, which says how to sample where the options
            do not.
        context: The most tokens of a prompt and its answer; None for what the configuration says, 0 for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        *,
        generation_config: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.generation_config = dict(generation_config or {})
        self._model = TreeModel(model.eval(), one_by_one="it generates")  # whose trees are not asked for
        config = self._model.base.config.get_text_config()
        self.context = _context(config, tokenizer) if context is None else context
        self.one_by_one = refusal(self._model.base)
        """Why answers are generated one by one; "" if many are at once."""
        self._regime = rotation_regime(config)
        self._decoder = Decoder(tokenizer)
        self._own_attention = self._model.base.config._attn_implementation

    @property
    def model(self) -> Any:
        """The causal language model itself, through its own attention where nothing is being generated."""
        return self._model.base

    def sampling(self, options: SamplingOptions) -> Sampling:
        """The options with nothing left open, as `generate` understands them."""
        return options.resolve(self.generation_config)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_text: OnText | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Answer]]:
        """Answers to prompts, of which many are generated at once.

        A draw follows from the seed and the numbers of the prompt, the answer and the token, not from what is
        generated beside it.

        Args:
            prompts: Token ids of each, BOS included where the model wants one.
            sampling: How tokens are drawn, and when an answer ends.
            max_new_tokens: Most tokens of the answers to each prompt, in place of the one number of `sampling`.
            on_text: Told the number of the prompt, that of the answer, and the text that is new; together an answer's
                pieces are its text.
            on_done: Told the number of a prompt when all its answers are there.

        Returns:
            For each prompt its answers, in order.

        Raises:
            UsageError: A prompt is empty or fills the model's context, or it is to have no tokens for an answer.
        """
        chosen = self.sampling(sampling or SamplingOptions())
        limits = [chosen.max_new_tokens] * len(prompts) if max_new_tokens is None else list(max_new_tokens)
        self._check(prompts, limits)
        jobs = []
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            own = [int(each) for each in ids]  # one list, by which answers to the same prompt are known
            jobs += [self._job(chosen, number, answer, own, limit) for answer in range(chosen.answers)]
        left = [chosen.answers] * len(prompts)

        def done(job: _Job) -> None:
            left[job.prompt] -= 1
            if not left[job.prompt] and on_done is not None:
                on_done(job.prompt)

        apart = [job for job in jobs if self._alone(job)]
        beside = [job for job in jobs if not self._alone(job)] if apart else jobs
        with torch.inference_mode():
            if beside:
                with self._attention(NAME):
                    self._run(self._slots(beside, chosen), beside, chosen, on_text, done)
            if apart:
                with self._attention(self._own_attention):
                    self._run(self._one(), apart, chosen, on_text, done)
        answers = iter(jobs)
        return [[next(answers).told() for _ in range(chosen.answers)] for _ in prompts]

    def _check(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            if limit < 1:
                raise UsageError(f"prompt {number}: max_new_tokens is {limit}", "Give 1 or more.")
            if not len(ids):
                raise UsageError(f"prompt {number}: has no tokens", "Give the model something to go on with.")
            if self.context and len(ids) >= self.context:
                raise UsageError(
                    f"prompt {number}: has {len(ids):,} tokens, and the model takes {self.context:,}, its answer "
                    "included",
                    "Shorten it.",
                )

    def _job(self, sampling: Sampling, number: int, answer: int, ids: Sequence[int], limit: int) -> _Job:
        room = self.context - len(ids) if self.context else limit
        job = _Job(number, answer, ids, min(limit, room), "length" if limit <= room else "context")
        job.stream = TextStream(self._decoder, ids, sampling.stop)
        if not sampling.greedy:
            job.draws = noise(sampling.seed, number, answer, job.limit).tolist()
        return job

    def _alone(self, job: _Job) -> bool:
        """Whether an answer must be read by itself: as all of this model, or where positions are rotated otherwise."""
        limit = None if self._regime is None else self._regime[0]
        return bool(self.one_by_one) or (limit is not None and len(job.prompt_ids) + job.limit > limit)

    def _slots(self, jobs: Sequence[_Job], sampling: Sampling) -> SlotReader:
        longest = max(len(job.prompt_ids) + job.limit for job in jobs)
        rows = max(1, min(sampling.batch_size, len(jobs), self._fitting(longest)))
        return SlotReader(self._model, rows, longest)

    def _one(self) -> OneReader:
        model = self._model.base
        return reading_alone(model) if self._regime is None else OneReader(model, cached=False)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = self._model.base.config._attn_implementation
        self._model.base.set_attn_implementation(name)
        try:
            yield
        finally:
            self._model.base.set_attn_implementation(before)

    def _fitting(self, length: int) -> int:
        """Answers of a length whose keys and values fit into half of the memory that is free."""
        config = self._model.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(self._model.parameters())
        bytes_a_token = 2 * config.num_hidden_layers * heads * size * weight.element_size()
        return int(_free_memory(self._model.device) // 2 // (bytes_a_token * length))

    def _run(
        self,
        reader: Reader,
        jobs: Sequence[_Job],
        sampling: Sampling,
        on_text: OnText | None,
        done: Callable[[_Job], None],
    ) -> None:
        """Generate: answers that have ended leave their row, waiting ones come in where enough rows are free."""
        waiting = deque(jobs)
        active: list[_Job] = []
        sampler = Sampler(sampling, reader.rows)
        stop_ids = self.stop_ids | self._special(sampling.stop)

        def take(logits: torch.Tensor, first: int) -> None:
            """The next token of the rows from `first` on; what has ended leaves."""
            rows = active[first:]
            tokens, logprobs = sampler(logits, first, [job.draws[len(job.ids)] for job in rows if job.draws])
            for job, token, logprob in zip(rows, tokens, logprobs, strict=True):
                _advance(job, token, logprob, stop_ids, on_text)
            for row in range(len(active) - 1, first - 1, -1):
                if active[row].ended is not None:
                    done(active[row])
                    reader.drop(row)
                    sampler.move(len(active) - 1, row)
                    active[row] = active[-1]
                    active.pop()

        while waiting or active:
            free = reader.rows - len(active)
            if waiting and (free >= min(len(waiting), max(1, reader.rows // 8))):
                joining = _next(waiting, free)
                prompts = [job.prompt_ids for job in joining]
                logits = reader.join(prompts)
                sampler.join(len(active), prompts, logits)
                active += joining
                take(logits, len(active) - len(joining))
            else:
                take(reader.step([job.ids[-1] for job in active]), 0)

    def _special(self, stop: Sequence[str]) -> set[int]:
        """The ids of stop strings that are special tokens, whose text is never seen."""
        ids = (self.tokenizer.backend.token_to_id(each) for each in stop)
        return {each for each in ids if each in self._decoder.special}


def _advance(job: _Job, token: int, logprob: float, stop_ids: Collection[int], on_text: OnText | None) -> None:
    """Add a token to an answer, and say what it adds to the text; the answer may end with it."""
    job.logprob += logprob
    if token in stop_ids:
        job.ended, piece = "stop", ""
    else:
        job.ids.append(token)
        piece = job.stream.push(token)
        if job.stream.stopped:
            job.ended = "stop-string"
        elif len(job.ids) == job.limit:
            job.ended = job.full
    if job.ended is not None:
        piece += job.stream.finish()
        if job.stream.stopped:
            job.ended = "stop-string"
    if piece and on_text is not None:
        on_text(job.prompt, job.answer, piece)


def _next(waiting: deque[_Job], free: int) -> list[_Job]:
    """Those of the waiting that come in next: as many as there are rows, and as their prompts are read in one go."""
    found, tokens = [waiting.popleft()], 0
    while waiting and len(found) < free:
        same = waiting[0].prompt_ids is found[-1].prompt_ids
        tokens += 0 if same else len(found[-1].prompt_ids)
        if not same and tokens + len(waiting[0].prompt_ids) > _PROMPT_TOKENS:
            break
        found.append(waiting.popleft())
    return found


def _context(config: Any, tokenizer: Tokenizer) -> int:
    """The most positions of a model, or what its tokenizer says; 0 for no limit."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return tokenizer.max_length or 0


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)
