"""Many clients at once: each is told what it alone can be told, none waits long, and together they get more."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import httpx
import pytest

from instil.pocket import data_folder

from .conftest import serving

CLIENTS = 64
SURE = 0.002  # nats between the two likeliest tokens: a hundred times what rounding in another batch changes
BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_serve.py"


def bench():
    spec = importlib.util.spec_from_file_location("bench_serve", BENCH)
    module = sys.modules["bench_serve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_sure(choice):
    """Whether no token of an answer was nearly another one."""
    tops = [sorted(each.values())[-2:] for each in choice["logprobs"]["top_logprobs"]]
    return all(high - low > SURE for low, high in tops)


@pytest.mark.load
def test_many_clients_for_two_minutes(tuned):
    measure = bench()
    things = (data_folder().parent / "facts" / "countries.tsv").read_text(encoding="utf-8").splitlines()[1:]
    places = [line.split("\t")[0] for line in things]
    prompts = [f"The {what} of {place} is" for what in ("capital", "people", "sea") for place in places]
    with serving(tuned, "--precision", "fp32") as served:
        bodies, expected = [], []
        for prompt in prompts:
            body = {"prompt": prompt, "max_tokens": 16}
            (choice,) = served.client.post("/v1/completions", json={**body, "logprobs": 2}).json()["choices"]
            if is_sure(choice):
                bodies.append(body)
                expected.append(choice["text"])
            if len(bodies) == 2 * CLIENTS:
                break
        assert len(bodies) >= CLIENTS
        assert len(set(expected)) > 0.9 * len(expected), "answers tell the prompts apart"
        port = int(served.url.rpartition(":")[2])
        alone = asyncio.run(measure.load(port, "/v1/completions", bodies, 1, 20))
        together = asyncio.run(measure.load(port, "/v1/completions", bodies, CLIENTS, 120))
        for number, answer in [*alone.answers, *together.answers]:
            assert answer.text == expected[number]
        assert {number for number, _ in together.answers} == set(range(len(bodies)))
        gain = together.tokens_per_second / alone.tokens_per_second
        sys.stderr.write(
            f"\n{CLIENTS} clients: {together.tokens_per_second:.0f} tokens/s, {gain:.1f} times one alone; "
            f"first text after {1e3 * together.first(50):.0f} ms, 95 %: {1e3 * together.first(95):.0f} ms\n"
        )
        assert gain >= 3
        metrics = httpx.get(f"{served.url}/metrics").text.splitlines()
        assert "instil_answers_open 0.0" in metrics
        served_ok = 'instil_requests_total{path="/v1/completions",status="200"}'
        assert not [line for line in metrics if "instil_requests_total{" in line and 'status="5' in line]
        assert float(next(line for line in metrics if line.startswith(served_ok)).split()[1]) >= len(together.answers)
