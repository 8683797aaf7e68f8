"""What a quantized model with its adapter and the model merged of the two make of the same rows, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from instil.model.forward import TreeModel
from instil.model.load import quiet
from instil.packing import TokenTree, expand, pack
from instil.prompt import Tokenizer
from instil.training.loop import evaluate

_ROWS = 3
_TOKENS = 32  # of an answer


@dataclass(frozen=True, slots=True)
class Answers:
    """The greedy answers to one prompt, their first tokens.

    Args:
        row: The row of data, counted from 0.
        quantized: Of the quantized model with its adapter.
        merged: Of the merged model.
    """

    row: int
    quantized: str
    merged: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantized model with its adapter beside the merged one.

    Args:
        quantized_loss: The mean cross-entropy of the rows' targets, in nats, of the quantized model with its adapter.
        merged_loss: That of the merged model.
        answers: One for each row.
    """

    quantized_loss: float
    merged_loss: float
    answers: Sequence[Answers]

    @property
    def same(self) -> int:
        """How many answers are the same."""
        return sum(each.quantized == each.merged for each in self.answers)

    def __str__(self) -> str:
        return (
            f"of {len(self.answers)} answers the merged model gives {self.same} as the quantized one with its adapter "
            f"did; the loss on those rows is {self.merged_loss:.4f}, and was {self.quantized_loss:.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As `instil.json` holds it."""
        return asdict(self)


def compare(
    quantized: TreeModel,
    merged: TreeModel,
    trees: Sequence[TokenTree],
    tokenizer: Tokenizer,
    stops: Sequence[int],
    *,
    tokens_per_batch: int,
) -> Comparison:
    """Put the two beside each other on the first rows.

    Args:
        quantized: With its adapter.
        merged: Made of it by `merged`.
        trees: The rows, those held out if there are any.
        tokenizer: Tells the answers.
        stops: The tokens that end an answer.
        tokens_per_batch: The most tokens that are read at once.
    """
    rows = list(islice((tree for tree in trees if tree.target_weights.any()), _ROWS))
    batches = pack(rows, tokens_per_batch)
    before, after = (evaluate(each, batches)[0] for each in (quantized, merged))
    answers = []
    for tree in rows:
        asked = next(expand(tree))
        prompt = asked.prompt_ids if len(asked.prompt_ids) else asked.completion_ids[:1]
        said = [_answer(each, torch.from_numpy(prompt), stops) for each in (quantized, merged)]
        texts = (tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in said)
        answers.append(Answers(asked.record, *texts))
    return Comparison(before, after, answers)


def _answer(reader: TreeModel, prompt: torch.Tensor, stops: Sequence[int]) -> list[int]:
    """The likeliest tokens after a prompt of (P,) ids, one by one."""
    ids = prompt[None].to(reader.device)  # (1, P)
    with torch.autocast(reader.device.type, torch.bfloat16, enabled=reader.bf16), quiet():
        out = reader.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=_TOKENS,
            eos_token_id=list(stops) or None,
            pad_token_id=stops[0] if stops else 0,
        )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found
