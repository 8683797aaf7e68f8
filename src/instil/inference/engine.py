"""The engine: prompts in, answers out, as many at once as memory takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import nn

from instil.errors import UsageError
from instil.inference.batch import Batch, Ended, Hear, Job
from instil.inference.cache import NAME
from instil.inference.options import Sampling, SamplingOptions
from instil.inference.reading import OneReader, SlotReader, reading_alone, refusal
from instil.inference.sampling import noise
from instil.inference.text import Decoder, TextStream
from instil.model.forward import TreeModel, rotation_regime
from instil.prompt.tokenizer import Tokenizer

OnText = Callable[[int, int, str], object]
OnDone = Callable[[int], object]


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

    @classmethod
    def of(cls, job: Job) -> Answer:
        """What a job that has ended gave."""
        assert job.ended is not None
        return cls(tuple(job.said), job.stream.text, job.ended, sum(each.logprob for each in job.drawn))


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
        left = [chosen.answers] * len(prompts)

        def hear(job: Job, piece: str) -> None:
            if piece and on_text is not None:
                on_text(job.prompt, job.answer, piece)
            if job.ended is not None:
                left[job.prompt] -= 1
                if not left[job.prompt] and on_done is not None:
                    on_done(job.prompt)

        jobs = []
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            own = [int(each) for each in ids]  # one list, by which answers to the same prompt are known
            jobs += [self.job(own, chosen, limit, prompt=number, answer=n, hear=hear) for n in range(chosen.answers)]
        longest = max((len(job.ids) + job.limit for job in jobs), default=1)
        batch = self.batch(max(1, min(chosen.batch_size, len(jobs), self.fitting // longest)))
        try:
            batch.add(jobs)
            while batch.busy:
                batch.advance()
        finally:
            batch.close()
        answers = iter(jobs)
        return [[Answer.of(next(answers)) for _ in range(chosen.answers)] for _ in prompts]

    def job(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        limit: int,
        *,
        prompt: int = 0,
        answer: int = 0,
        hear: Hear | None = None,
        shown: Collection[int] = (),
    ) -> Job:
        """An answer that is to be generated by a `batch`.

        Args:
            ids: The prompt. Answers to the same prompt are given the same object.
            sampling: How tokens are drawn, and when the answer ends.
            limit: Most tokens; fewer where the model's context is full before.
            prompt: The number of the prompt, which its draws follow from.
            answer: The number of the answer, which they follow from too.
            hear: Told of the text that is new, after each token, and when it has ended.
            shown: Special tokens that are text here.
        """
        room = self.context - len(ids) if self.context else limit
        return Job(
            ids=ids,
            sampling=sampling,
            limit=min(limit, room),
            full="length" if limit <= room else "context",
            stop_ids=self.stop_ids | self._special(sampling.stop),
            stream=TextStream(self._decoder, ids, sampling.stop, shown),
            draws=repeat(0.0) if sampling.greedy else noise(sampling.seed, prompt, answer),
            prompt=prompt,
            answer=answer,
            hear=hear,
        )

    def batch(self, rows: int, *, kept: int = 0, models: int = 1) -> Batch:
        """What generates answers, which come and go.

        Args:
            rows: Most answers at once.
            kept: Tokens of earlier answers and their prompts that are kept, for prompts that begin alike.
            models: How many of them share the memory, each in a batch of its own.
        """
        return Batch(self, rows, kept, models)

    @property
    def fitting(self) -> int:
        """The tokens whose keys and values fit into half of the free memory; 0 of a model that keeps none."""
        if self.one_by_one:
            return 0
        config = self._model.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(self._model.parameters())
        bytes_a_token = 2 * config.num_hidden_layers * heads * size * weight.element_size()
        return int(_free_memory(self._model.device) // 2 // bytes_a_token)

    def alone(self, job: Job) -> bool:
        """Whether an answer must be read by itself: as all of this model, or where positions are rotated otherwise."""
        limit = None if self._regime is None else self._regime[0]
        return bool(self.one_by_one) or (limit is not None and len(job.ids) + job.limit > limit)

    def reader(self, rows: int, kept: int) -> SlotReader:
        """Reads answers side by side."""
        return SlotReader(self._model, rows, kept=kept)

    def reader_alone(self) -> OneReader:
        """Reads one answer at a time."""
        model = self._model.base
        return reading_alone(model) if self._regime is None else OneReader(model, cached=False)

    def attend(self, side_by_side: bool) -> None:
        """Set the model's attention for answers side by side, or alone."""
        self.attention = NAME if side_by_side else self._own_attention

    @property
    def attention(self) -> str:
        """The name of the model's attention."""
        return str(self._model.base.config._attn_implementation)

    @attention.setter
    def attention(self, name: str) -> None:
        if self.attention != name:
            self._model.base.set_attn_implementation(name)

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

    def _special(self, stop: Sequence[str]) -> set[int]:
        """The ids of stop strings that are special tokens, whose text is never seen."""
        ids = (self.tokenizer.backend.token_to_id(each) for each in stop)
        return {each for each in ids if each in self._decoder.special}


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
