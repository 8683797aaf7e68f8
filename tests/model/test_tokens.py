"""New tokens: their rows, and nobody else's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from instil.errors import ModelError
from instil.model.tokens import Growth, reserve_tokens

from .conftest import KINDS, WORDS, fresh_tokenizer, logits_of, random_model

TOKENS = ["<|end|>", "<|bare|>", "<|unlike|>"]
DESCRIPTIONS = {"<|end|>": "the end of a turn", "<|unlike|>": "<|end|>"}  # the last has no known word in it
LIKE = {WORDS: [2, 3, 4, 5, 6], WORDS + 1: range(WORDS), WORDS + 2: range(WORDS)}


def matrices(model):
    head = model.get_output_embeddings()
    found = {"embedding": model.get_input_embeddings().weight, "head": head.weight}
    return {**found, "bias": head.bias} if head.bias is not None else found


@pytest.mark.parametrize("kind", KINDS)
def test_each_new_row_is_the_mean_of_what_it_is_like(kind):
    model = random_model(kind)
    before = {name: each.detach().clone() for name, each in matrices(model).items()}
    logits = logits_of(model)
    rows = len(before["embedding"])
    growth = reserve_tokens(model, fresh_tokenizer(TOKENS), DESCRIPTIONS)
    assert growth == Growth((WORDS, WORDS + 1, WORDS + 2), rows, max(rows, WORDS + 3))
    assert growth.grown == (kind not in ("qwen2", "phi"))
    assert model.config.vocab_size == growth.rows_after
    after = matrices(model)
    for name, old in before.items():
        assert len(after[name]) == growth.rows_after
        for i, row in enumerate(after[name]):
            if i in LIKE:
                naive = sum(old[k].double() for k in LIKE[i]) / len(LIKE[i])
                torch.testing.assert_close(row.double(), naive, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(row, old[i])
    assert (after["head"] is after["embedding"]) == (kind in ("gpt2", "qwen2-tied", "phi-tied"))
    assert torch.equal(logits_of(model)[..., :WORDS], logits[..., :WORDS])


def test_nothing_happens_without_new_tokens():
    model = random_model("llama")
    before = logits_of(model)
    assert reserve_tokens(model, fresh_tokenizer(), {}) == Growth((), WORDS, WORDS)
    assert torch.equal(logits_of(model), before)


def test_rows_in_bf16_are_means_in_float32():
    model = random_model("llama").to(torch.bfloat16)
    old = model.get_input_embeddings().weight.detach().clone()
    reserve_tokens(model, fresh_tokenizer(TOKENS), DESCRIPTIONS)
    new = model.get_input_embeddings().weight
    assert new.dtype == torch.bfloat16
    assert torch.equal(new[WORDS + 1], old.float().mean(0).to(torch.bfloat16))


def test_a_new_token_in_the_place_of_padding_is_trained():
    model = random_model("qwen2")
    model.get_input_embeddings().padding_idx = WORDS
    reserve_tokens(model, fresh_tokenizer(TOKENS), {})
    ids = torch.tensor([[3, WORDS, 5]])
    model(ids).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[WORDS].any()


def test_a_kept_adapter_takes_no_new_tokens():
    model = random_model("llama")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    with pytest.warns(FutureWarning):
        adapted = get_peft_model(model, config)
    reserve_tokens(adapted, fresh_tokenizer(), {})
    with pytest.raises(ModelError, match=r"no <\|end\|>") as caught:
        reserve_tokens(adapted, fresh_tokenizer(TOKENS), {})
    assert "--base-adapter merge" in str(caught.value)


class OwnHead(torch.nn.Module):
    """A head as a model's own code may have it."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight


def test_a_model_that_cannot_grow_says_so():
    model = random_model("llama")
    model.lm_head = OwnHead(model.lm_head)
    said = "LlamaForCausalLM: its vocabulary cannot grow to 43 tokens: Old language model head is of type .*OwnHead"
    with pytest.raises(ModelError, match=said):
        reserve_tokens(model, fresh_tokenizer(TOKENS), {})
