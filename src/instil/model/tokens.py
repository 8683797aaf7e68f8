"""New tokens: a row of the embedding and of the head for each, begun from the words that describe it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from instil.errors import ModelError
from instil.model.load import grow
from instil.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Growth:
    """What new tokens did to a model.

    Args:
        ids: The ids of the new tokens, ascending.
        rows_before: Rows of the embedding before.
        rows_after: Rows of the embedding after; as many as before where spare ones were left.
    """

    ids: tuple[int, ...]
    rows_before: int
    rows_after: int

    @property
    def grown(self) -> bool:
        """Whether the embedding has more rows than the model had."""
        return self.rows_after > self.rows_before


def reserve_tokens(model: nn.Module, tokenizer: Tokenizer, descriptions: Mapping[str, str]) -> Growth:
    """Give the tokens that were added to a tokenizer their rows in the embedding and the head of a model.

    Spare rows, which many models have, are used first; beyond them the matrices grow, tied ones as one, and the head's
    bias with them. A new row begins as the mean of the rows of the words that describe the token, or of all rows that
    belong to tokens: a random one would stand out of the others, and a spare one may never have been trained.

    Args:
        model: A causal language model without an adapter; changed in place.
        tokenizer: Its tokenizer; `tokenizer.added` are the new tokens.
        descriptions: A few words for what a token means.

    Raises:
        ModelError: The model has an adapter already, or cannot grow.
    """
    base = cast(Any, model)
    before = base.get_input_embeddings().weight.shape[0]
    new = {token: cast(int, tokenizer.backend.token_to_id(token)) for token in tokenizer.added}
    if not new:
        return Growth((), before, before)
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"the model's adapter is kept, and its vocabulary has no {', '.join(new)}",
            "Merge the adapter: --base-adapter merge.",
        )
    ids = tuple(sorted(new.values()))
    if ids[-1] >= before:
        grow(model, ids[-1] + 1)
    like = _like(tokenizer, new, descriptions, before)
    for rows in _rows(base):
        _begin(rows, like, known=_known(tokenizer, ids, before))
    embedding = base.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) in ids:
        embedding.padding_idx = None  # the row for padding gets no gradient
    return Growth(ids, before, int(embedding.weight.shape[0]))


def _like(
    tokenizer: Tokenizer, new: Mapping[str, int], descriptions: Mapping[str, str], rows: int
) -> dict[int, list[int]]:
    """For each new id, the ids of the words that describe it; none where there is no description."""
    ids = set(new.values())
    found = {}
    for token, at in new.items():
        words = tokenizer.backend.encode(descriptions.get(token, ""), add_special_tokens=False).ids
        found[at] = [word for word in words if word < rows and word not in ids]
    return found


def _known(tokenizer: Tokenizer, new: Iterable[int], rows: int) -> list[int]:
    """The rows that belong to tokens the model knows."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return sorted({i for i in vocabulary.values() if i < rows} - set(new))


def _rows(base: Any) -> list[Tensor]:
    """What has a row for each token: the embedding (V, D), an untied head (V, D) and the head's bias (V,)."""
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    found = [embedding]
    if head is not None:
        if head.weight is not embedding:
            found.append(head.weight)
        if getattr(head, "bias", None) is not None:
            found.append(head.bias)
    return found


@torch.no_grad()
def _begin(rows: Tensor, like: Mapping[int, list[int]], known: list[int]) -> None:
    """Set each new row to the mean of the rows it is like, in place, computed in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    of_all = None if all(like.values()) else rows[known].mean(0, dtype=wide)
    means = [rows[words].mean(0, dtype=wide) if words else of_all for words in like.values()]
    for at, mean in zip(like, means, strict=True):
        rows[at] = cast(Tensor, mean)
