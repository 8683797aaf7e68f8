"""Scores of packed rows against each exchange alone through an unmodified model of transformers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from instil.conversation import Conversation, Message, Record, Source
from instil.errors import ModelError
from instil.inference.score import Likelihood, score_exchanges, score_rows
from instil.model.forward import TreeModel
from instil.objectives import supervised
from instil.packing import TokenTree, merge
from instil.prompt import EncodedRecord

from ..model.forests import KINDS, VOCABULARY, Float64, random_model
from ..training.tiny import exchange, make_rows


def alone(model, ids):
    """The log-probability and the rank of every token but the first, naively."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1].double()
    taken = log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
    at = logits[range(len(ids) - 1), ids[1:]]
    return taken.numpy(), 1 + (logits > at[:, None]).sum(-1).numpy()


def rows(count=7, **settings):
    """Rows whose answers branch and whose prompts share a beginning; ids within the vocabulary."""
    made = make_rows(count, seed=3, branches=2, system=6, prompt_weight=0.25, **settings)
    return [
        [
            replace(each, prompt_ids=each.prompt_ids % VOCABULARY, completion_ids=each.completion_ids % VOCABULARY)
            for each in row
        ]
        for row in made
    ]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_scores_are_those_of_each_exchange_alone(kind):
    """To rounding, in float64 where the model can; gpt-oss and Mixtral compute their experts in float32 alone."""
    dtype = torch.float32 if kind in ("gpt-oss", "mixtral") else torch.float64
    model, reader = random_model(kind, dtype), TreeModel(random_model(kind, dtype))
    exchanges = [each for row in rows() for each in row]
    with Float64():
        scored = score_exchanges(reader, exchanges)
        for each in scored:
            ids = [*each.exchange.prompt_ids.tolist(), *each.exchange.completion_ids.tolist()]
            log_probs, ranks = alone(model, ids)
            assert math.isnan(each.log_probs[0])
            assert each.ranks[0] == 0
            np.testing.assert_allclose(each.log_probs[1:], log_probs, rtol=0, atol=1e-5)
            assert each.ranks[1:].tolist() == ranks.tolist()


def record_of(exchanges, line):
    messages = (Message("user", "a"), Message("assistant", "b"))
    return EncodedRecord(Record(Source("x", line), "messages", "conversation", (Conversation(messages),)), exchanges)


def test_rows_come_back_in_their_order_however_they_are_batched():
    reader = TreeModel(random_model("llama"), one_by_one="")
    given = [record_of(tuple(row), line) for line, row in enumerate(rows(), 1)]
    given.insert(3, replace(given[0], exchanges=(), status="dropped", reason="too long"))
    together = list(score_rows(reader, given))
    for tokens in (2, 40, 100):
        found = list(score_rows(reader, given, tokens))
        assert [each.row for each in found] == given
        for one, other in zip(found, together, strict=True):
            assert len(one.exchanges) == len(one.row.exchanges)
            for scored, expected in zip(one.exchanges, other.exchanges, strict=True):
                assert scored.exchange is expected.exchange
                np.testing.assert_allclose(scored.log_probs, expected.log_probs, rtol=0, atol=1e-6)
                np.testing.assert_array_equal(scored.ranks, expected.ranks)


def test_the_loss_is_that_of_training():
    """Weights, sharing and all: the objective's sum over the batch that training would pack."""
    reader = TreeModel(random_model("llama"), one_by_one="")
    exchanges = [each for row in rows() for each in row]
    batch = merge([TokenTree.from_exchanges([each]) for each in exchanges])
    with torch.no_grad():
        expected = float(supervised.loss(reader, batch)[0]) / supervised.weight(batch)
    total = sum((each.likelihood.whole for each in score_exchanges(reader, exchanges)), Likelihood())
    assert total.loss == pytest.approx(expected, rel=1e-6)
    assert total.weight == pytest.approx(supervised.weight(batch))


def test_a_likelihood_is_the_sum_of_its_tokens():
    reader = TreeModel(random_model("llama"), one_by_one="")
    (scored,) = score_exchanges(reader, [exchange([5, 3, 9], [4, 4, 1])])
    prompt, completion = scored.likelihood
    assert (prompt.tokens, completion.tokens) == (2, 3)
    assert prompt.log_likelihood == scored.log_probs[1:3].sum()
    assert completion.log_likelihood == scored.log_probs[3:].sum()
    assert completion.perplexity == math.exp(-scored.log_probs[3:].mean())
    assert (prompt.weight, completion.weight) == (0, 3)
    assert prompt.loss is None
    assert completion.top1 == (scored.ranks[3:] == 1).sum()


def test_a_prompt_alone_and_a_token_alone():
    reader = TreeModel(random_model("gpt2"), one_by_one="")
    prompt, single = score_exchanges(reader, [exchange([5, 3, 9], []), exchange([], [7])])
    log_probs, ranks = alone(random_model("gpt2"), [5, 3, 9])
    np.testing.assert_allclose(prompt.log_probs[1:], log_probs, atol=1e-6)
    assert prompt.ranks[1:].tolist() == ranks.tolist()
    assert prompt.likelihood.completion.perplexity is None
    assert (len(single.log_probs), single.likelihood.whole.tokens) == (1, 0)
    assert score_exchanges(reader, []) == []


def test_what_the_model_cannot_read_is_refused():
    reader = TreeModel(random_model("gpt2"), one_by_one="")
    with pytest.raises(ModelError, match="66 tokens is longer than the 64 positions"):
        score_exchanges(reader, [exchange([1] * 60, [2] * 6)])
    assert len(score_exchanges(reader, [exchange([1] * 60, [2] * 5)])[0].ranks) == 65, "the last is only a target"
    with pytest.raises(ModelError, match="exchange 1: holds the token id 99"):
        score_exchanges(reader, [exchange([1], [2]), exchange([1], [99])])
    with pytest.raises(ModelError, match="x:7: an exchange of 66 tokens"):
        list(score_rows(reader, [record_of((exchange([1] * 60, [2] * 6),), 7)]))
