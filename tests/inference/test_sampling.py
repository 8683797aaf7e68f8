"""The distribution that is drawn from is that of transformers' processors; draws follow it."""

import itertools

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
    uniform = torch.tensor(list(itertools.islice(noise(0, 0, 0), 20000)), dtype=torch.float64)
    counts = torch.bincount(draw(scores, uniform), minlength=4) / 20000
    assert counts[1] == 0
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.012, rtol=0)


def test_the_ends_of_a_draw_are_tokens_that_are_left():
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(scores, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(scores, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2


def test_noise_is_its_own_for_each_token():
    streams = [list(itertools.islice(noise(*key), 100)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({each for stream in streams for each in stream}) == 400
    assert list(itertools.islice(noise(0, 1, 0), 9)) == streams[2][:9]


def drawn(logits, how, uniform, **more):
    sampler = Sampler(len(logits))
    sampler.join([[1]] * len(logits), how, logits)
    return sampler(logits, 0, uniform, **more)


def test_a_temperature_near_0_is_greedy():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, [Sampling(temperature=1e-30)] * 4, [0.1, 0.5, 0.9, 0.999])
    assert [each.id for each in found] == logits.argmax(-1).tolist()


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, [Sampling(temperature=0.3, top_k=5)] * 2, [0.3, 0.9], top=[0, 3])
    expected = torch.log_softmax(logits, -1)
    assert [each.logprob for each in found] == pytest.approx(
        [expected[row, each.id].item() for row, each in enumerate(found)], abs=1e-6
    )
    values, ids = expected[1].topk(3)
    assert found[0].top == ()
    assert [id for id, _ in found[1].top] == ids.tolist()
    assert [value for _, value in found[1].top] == pytest.approx(values.tolist(), abs=1e-6)


def test_rows_that_are_drawn_otherwise_do_not_change_each_other():
    """Each row as if it were alone, whatever stands beside it, and after others have left."""
    draws = torch.Generator().manual_seed(0)
    how = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(repetition_penalty=5.0),
    ]
    prompts = [torch.randint(40, (9,), generator=draws).tolist() for _ in how]
    steps = [(4 * torch.randn(5, 40, generator=draws), torch.rand(5, generator=draws).tolist()) for _ in range(6)]
    together, alone = Sampler(5), [Sampler(1) for _ in how]
    rows = list(range(5))
    together.join(prompts, how, steps[0][0])
    for sampler, prompt, own in zip(alone, prompts, how, strict=True):
        sampler.join([prompt], [own], steps[0][0][:1])
    for number, (logits, uniform) in enumerate(steps):
        if number == 3:
            together.drop(1)
            rows[1] = rows.pop()
        found = together(logits[rows], 0, [uniform[row] for row in rows])
        assert [each.id for each in found] == [
            alone[row](logits[row : row + 1], 0, [uniform[row]])[0].id for row in rows
        ]
