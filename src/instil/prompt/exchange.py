"""The exchange: a prompt, token for token as it will be served, and the completion it should give to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Boundary = Literal["special", "compared", "split", "none"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the model is taught.

    Args:
        prompt_text: The rendering up to where the model answers.
        completion_text: The answer and what ends it.
        prompt_ids: (P,) int32, as the server computes them.
        prompt_weights: (P,) float32, the weight of each prompt token in the loss.
        completion_ids: (C,) int32, C >= 1 unless the row is a prompt for evaluation.
        completion_weights: (C,) float32.
        boundary: How the seam was proved. `special`: a special token stands at it, so the tokenizer cuts there.
            `compared`: the tokens of the whole begin with those of the prompt. `split`: a token would straddle it,
            so the completion was encoded by itself and the whole decodes to the same text. `none`: there is no
            completion, as in a prompt for evaluation.
        label: "", `chosen`, `rejected`, `good` or `bad`; `more` for a later turn of the answer before it.
    """

    prompt_text: str
    completion_text: str
    prompt_ids: NDArray[np.int32]
    prompt_weights: NDArray[np.float32]
    completion_ids: NDArray[np.int32]
    completion_weights: NDArray[np.float32]
    boundary: Boundary
    label: str = ""

    def __len__(self) -> int:
        """The tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)
