"""The thread that generates, and those who hear it: memory may run out at any time, and either may be ahead."""

import asyncio

import pytest
from starlette.requests import Request

from instil.inference.batch import Job
from instil.inference.load import load_engine
from instil.inference.options import Sampling
from instil.inference.reading import SlotReader
from instil.model.options import ModelOptions
from instil.serving.answering import ChatAnswering, CompletionAnswering
from instil.serving.metrics import Metrics
from instil.serving.models import ServedModel
from instil.serving.protocol import ChatRequest, CompletionRequest
from instil.serving.worker import FailedError, Heard, Worker

ASK = [{"role": "user", "content": "What is the capital of Peru?"}]


@pytest.fixture(scope="module")
def model(tuned):
    return ServedModel("tuned", "tuned", load_engine(ModelOptions(model=str(tuned), precision="fp32")), 100)


def out_of_memory(*_, **__):
    raise MemoryError


async def all_of(stream):
    async with stream:
        return [each async for heard in stream for each in heard]


@pytest.mark.parametrize("fails", ["reader", "drop"])
def test_memory_that_runs_out_as_clients_come_or_leave(model, monkeypatch, fails):
    """Those under way are told, and the next is answered: steps of the thread one by one."""

    async def main():
        worker = Worker({"tuned": model.engine}, 4, 4, 1000)
        jobs = [model.engine.job([3, 4, 5], Sampling(), 20) for _ in range(3)]
        with monkeypatch.context() as patched:
            if fails == "reader":
                patched.setattr(model.engine, "reader", out_of_memory)
                streams = [worker.stream("tuned", jobs)]
                worker._receive()
            else:
                streams = [worker.stream("tuned", [job]) for job in jobs]
                worker._receive()
                worker._batches["tuned"].advance()
                patched.setattr(SlotReader, "drop", out_of_memory)
                async with streams.pop():
                    pass
                worker._receive()
        for stream in streams:
            with pytest.raises(FailedError):
                await asyncio.wait_for(all_of(stream), 10)
        assert (worker.open, worker._streams) == (0, {})
        worker.start()
        heard = await asyncio.wait_for(all_of(worker.stream("tuned", [model.engine.job([3], Sampling(), 4)])), 10)
        assert heard[-1].ended
        worker.stop()

    asyncio.run(main())


def test_models_share_the_memory(model):
    alone = Worker({"tuned": model.engine}, 4, 4, 0)._batches["tuned"]
    both = Worker({"tuned": model.engine, "base": model.engine}, 4, 4, 0)._batches.values()
    assert sum(each._fitting for each in both) < 1.5 * alone._fitting, "not all that is free for each"


def generated(model, jobs: list[Job]):
    """All that is told of answers, when they have ended."""
    heard = []
    for each in jobs:
        each.hear = lambda job, text: heard.append(Heard(job, text, job.drawn[-1], job.ended is not None))
    batch = model.engine.batch(4)
    batch.add(jobs)
    while batch.busy:
        batch.advance()
    batch.close()
    assert len(heard) > 3
    return heard


async def one_by_one(heard):
    for each in heard:
        yield [each]


def answering(model, kind, body):
    """A request that is answered, and what is recorded of it."""
    recorded = []

    async def record(answering):
        recorded.extend(answering.interactions())

    asked = model.asked_chat(body) if kind is ChatAnswering else model.asked_completion(body)
    http = Request({"type": "http", "headers": []})
    return kind(model, body, asked, http, Metrics(lambda: 0, lambda: 0), record), recorded


def test_a_stream_begins_with_its_prompt_however_far_the_thread_is(model):
    body = CompletionRequest(prompt="The capital of Peru is", max_tokens=6, echo=True, logprobs=0)
    own, _ = answering(model, CompletionAnswering, body)
    heard = generated(model, own.asked.jobs)

    async def events():
        return [each["choices"][0] async for part in own.events(one_by_one(heard)) for each in part]

    choices = asyncio.run(events())
    assert "".join(each["text"] for each in choices) == body.prompt + "".join(each.text for each in heard)
    assert sum(len(each["logprobs"]["tokens"]) for each in choices) == len(own.asked.jobs[0].ids) + len(heard)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatAnswering, ChatRequest(messages=ASK, max_tokens=8)),
        (CompletionAnswering, CompletionRequest(prompt="The capital of Peru is", max_tokens=8)),
    ],
    ids=["chat", "completion"],
)
def test_an_answer_is_recorded_as_far_as_it_was_heard(model, kind, body):
    """The client leaves when the thread has ended the answer and half of it was taken: that is no whole answer."""
    own, recorded = answering(model, kind, body)
    heard = generated(model, own.asked.jobs)

    async def leave():
        async def until_it_leaves():
            async for each in one_by_one(heard[:3]):
                yield each
            raise asyncio.CancelledError

        async for _ in own.events(until_it_leaves()):
            pass

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
    (answer,) = recorded[0].answers
    assert answer.ended == "stopped"
    assert answer.token_ids == tuple(each.token.id for each in heard[:3])
    assert answer.content.strip() == "".join(each.text for each in heard[:3]).strip()
