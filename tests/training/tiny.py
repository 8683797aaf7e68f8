"""Small models and rows for the tests of training, and references that know nothing of trees or packing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from instil.model.forward import TreeModel
from instil.packing import TokenTree
from instil.prompt.exchange import Exchange
from instil.training.events import Evaluation, Resolved, Step

VOCABULARY = 64
_NO_IDS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def llama(*, tied: bool = False, seed: int = 0, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        **_NO_IDS,
    )
    return LlamaForCausalLM(config)


def gpt2(*, dropout: float = 0.0, seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2: what it computes in float64 it computes in float64 throughout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **_NO_IDS,
    )
    return GPT2LMHeadModel(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One for trainers that ask for it to pad with."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")), eos_token="w0", pad_token="w0")


def exchange(prompt: Sequence[int], completion: Sequence[int], prompt_weight: float = 0.0, label: str = "") -> Exchange:
    return Exchange(
        prompt_text="",
        completion_text="",
        prompt_ids=np.array(prompt, np.int32),
        prompt_weights=np.full(len(prompt), prompt_weight, np.float32),
        completion_ids=np.array(completion, np.int32),
        completion_weights=np.ones(len(completion), np.float32),
        boundary="compared",
        label=label,
    )


Row = list[Exchange]


def make_rows(
    count: int, *, seed: int = 0, prompt_weight: float = 0.0, branches: int = 1, system: int = 0
) -> list[Row]:
    """Rows of random tokens and lengths; `system` tokens begin all of them, `branches` answers share each prompt.

    Tokens are drawn from few, the lower ones more often, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return (rng.integers(1, 8, length) ** 2 % VOCABULARY).tolist()

    shared = ids(system)
    rows = []
    for _ in range(count):
        prompt = shared + ids(int(rng.integers(1, 12)))
        answers = [ids(int(rng.integers(1, 14))) for _ in range(branches)]
        rows.append([exchange(prompt, [*answer, 0], prompt_weight) for answer in answers])
    return rows


def trees_of(rows: Iterable[Row]) -> list[TokenTree]:
    return [TokenTree.from_exchanges(row, record=number) for number, row in enumerate(rows)]


def naive_sums(model: nn.Module, exchanges: Iterable[Exchange]) -> tuple[Tensor, float]:
    """The weighted cross-entropies of exchanges, each read by itself by transformers, and their weights, summed."""
    total, weight = torch.zeros(()), 0.0
    for each in exchanges:
        ids = torch.tensor([*each.prompt_ids.tolist(), *each.completion_ids.tolist()])  # (L,)
        weights = torch.tensor([*each.prompt_weights.tolist(), *each.completion_weights.tolist()])[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # (L - 1, V)
        losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total = total + (losses * weights.to(losses)).sum()
        weight += float(weights.sum())
    return total, weight


def naive_loss(model: nn.Module, exchanges: Iterable[Exchange]) -> Tensor:
    total, weight = naive_sums(model, exchanges)
    return total / weight


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The greatest absolute difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def reader(model: nn.Module) -> TreeModel:
    """Admitted as it would be in a run."""
    found = TreeModel(model)
    assert not found.one_by_one
    return found


class Witness:
    """Keeps all it is told, in order; `on_step` and `on_evaluation` look at the run as it is then."""

    def __init__(
        self,
        on_step: Callable[[Step], Any] = lambda step: None,
        on_evaluation: Callable[[Evaluation], Any] = lambda evaluation: None,
    ) -> None:
        self.told: list[Resolved | Step | Evaluation] = []
        self.on_step = on_step
        self.on_evaluation = on_evaluation

    @property
    def resolved(self) -> Resolved:
        (found,) = [each for each in self.told if isinstance(each, Resolved)]
        return found

    def started(self, resolved: Resolved) -> None:
        self.told.append(resolved)

    def stepped(self, step: Step) -> None:
        self.told.append(step)
        self.on_step(step)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.told.append(evaluation)
        self.on_evaluation(evaluation)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order whatever the machine; and threads only slow such small models down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
