"""The distribution that is drawn from is that of transformers' processors; draws follow it."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from instil.inference import Sampling
from instil.inference.sampling import Sampler, candidates, draw, noise, penalize

VOCABULARY = 3000
GRID = list(itertools.product((0.6, 1.0, 1.7), (0, 7), (0.5, 0.97, 1.0), (0.0, 0.05)))


def expected(ids, logits, sampling):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(processors(ids, logits), -1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), GRID)
@pytest.mark.parametrize("spread", [4.0, 0.01])  # nearly even: more tokens than are looked at first
def test_as_transformers_processes_logits(temperature, top_k, top_p, min_p, spread):
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty=1.3)
    draws = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(3, VOCABULARY, generator=draws)
    ids = torch.randint(VOCABULARY, (3, 40), generator=draws)
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter_(1, ids, True)
    scores, places = candidates(penalize(logits, seen, 1.3), sampling)
    found = torch.softmax(scores, -1)
    if places is not None:
        found = torch.zeros(3, VOCABULARY).scatter_(1, places, found)
    reference = expected(ids, logits, sampling)
    assert torch.equal(found > 0, reference > 0)
    torch.testing.assert_close(found, reference, atol=1e-7, rtol=1e-4)


def test_draws_follow_the_distribution():
    scores = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).log().expand(20000, -1)
    counts = torch.bincount(draw(scores, torch.from_numpy(noise(0, 0, 0, 20000))), minlength=4) / 20000
    assert counts[1] == 0
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.012, rtol=0)


def test_the_ends_of_a_draw_are_tokens_that_are_left():
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(scores, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(scores, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2


def test_noise_is_its_own_for_each_token():
    streams = [noise(*key, 5) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(np.unique(np.concatenate(streams))) == 20
    assert (noise(0, 1, 0, 9)[:5] == streams[2]).all()


def test_a_temperature_near_0_is_greedy():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    tokens, _ = Sampler(Sampling(temperature=1e-30), 4)(logits, 0, [0.1, 0.5, 0.9, 0.999])
    assert tokens == logits.argmax(-1).tolist()


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = Sampler(Sampling(temperature=0.3, top_k=5), 2)(logits, 0, [0.3, 0.9])
    assert logprobs == pytest.approx(torch.log_softmax(logits, -1)[range(2), tokens].tolist(), abs=1e-6)
