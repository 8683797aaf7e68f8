"""The clients that people have, against the real server: openai, litellm, llm and EleutherAI's harness."""

import asyncio
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import httpx
import openai
import pytest

import instil
from instil.pocket import model_folder

from .conftest import serving

ASK = [{"role": "user", "content": "What is the capital of Peru?"}]
LONG = {"max_tokens": 400, "temperature": 100.0, "top_p": 1.0, "seed": 1}  # any token, and the stop token too late
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"word": "Peru"}}}
CALLED = [
    {"role": "user", "content": "Look up Peru."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "A land."},
    {"role": "assistant", "content": "Peru is a land."},
]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "none",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(tuned):
    """A server that asks for a key, and takes a single answer at once and little of everything."""
    flags = ["--max-batch", 1, "--max-waiting", 0, "--max-body", 20_000, "--precision", "fp32", "--name", "tuned"]
    with serving(tuned, *flags, INSTIL_API_KEY="sesame") as found:
        yield found


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """A model that knows one thing: to call a function when it is asked to, and what to say after."""
    folder = tmp_path_factory.mktemp("calling")
    (folder / "rows.jsonl").write_text(json.dumps({"tools": TOOLS, "messages": CALLED}) + "\n")
    instil.train(
        instil.TrainConfig(
            model=str(model_folder()),
            template="chatml",
            data=[str(folder / "rows.jsonl")],
            output=folder / "tuned",
            max_steps=30,
            learning_rate=3e-3,
            keep_checkpoints=0,
            precision="fp32",
        )
    )
    with serving(folder / "tuned", "--precision", "fp32") as found:
        yield found


def run(code, *given, **env):
    """A script in a process of its own; what it prints as JSON."""
    own = {**os.environ, **OFFLINE, **{name: str(value) for name, value in env.items()}}
    done = subprocess.run([sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def still_open(client, key="sesame"):
    """The answers that are being generated or wait."""
    told = client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return int(float(re.search(r"^instil_answers_open (\S+)$", told, re.M)[1]))


# openai


def test_openai_lists_the_models(client):
    assert [model.id for model in client.models.list()] == ["tuned", "model"]
    assert client.models.retrieve("model").owned_by == "instil"
    with pytest.raises(openai.NotFoundError) as met:
        client.models.retrieve("other")
    assert met.value.code == "model_not_found"


def test_openai_chats(client, served):
    answer = client.chat.completions.create(model="tuned", messages=ASK, max_completion_tokens=12)
    plain = served.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 12}).json()
    assert answer.choices[0].message.content == plain["choices"][0]["message"]["content"] != ""
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}]
    again = client.chat.completions.create(model="tuned", messages=parts, max_tokens=12)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_openai_streams_with_usage(client):
    asked = {"model": "tuned", "messages": ASK, "max_tokens": 12, "seed": 3, "temperature": 1.0, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    for choice in whole.choices:
        own = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason


def test_openai_stops_and_tells_probabilities(client):
    asked = {"model": "tuned", "messages": ASK, "max_tokens": 20}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stopped = client.chat.completions.create(**asked, stop=[text[5:8]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[5:8])], "stop")
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert len(content) == told.usage.completion_tokens
    assert all(each.top_logprobs[0].logprob == each.logprob <= 0 for each in content), "greedy"
    said = b"".join(bytes(each.bytes) for each in content[: len(content) - (told.choices[0].finish_reason == "stop")])
    assert said.decode() == text


def test_openai_completes(client):
    asked = {"model": "tuned", "max_tokens": 6}
    one, two = client.completions.create(prompt=["The capital of Peru is", "One, two,"], **asked).choices
    assert one.text == client.completions.create(prompt="The capital of Peru is", **asked).choices[0].text
    assert two.text == "".join(
        chunk.choices[0].text for chunk in client.completions.create(prompt="One, two,", stream=True, **asked)
    )
    with pytest.raises(openai.BadRequestError, match=r"suffix|fill|gap") as met:
        client.completions.create(prompt="One,", suffix="three", **asked)
    assert met.value.param == "suffix"


@pytest.mark.prove
def test_openai_calls_functions(calling):
    """A call comes back parsed, whole and streamed, and its result is answered."""
    with openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "tuned", "messages": CALLED[:1], "tools": TOOLS, "temperature": 0}
        choice = client.chat.completions.create(**asked).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"word": "Peru"})
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        (part,) = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
        assert (part.index, part.function) == (0, part.function.model_copy(update=call.function.to_dict()))
        assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
        assert chunks[-1].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": call.id, "content": "A land."}
        history = [*CALLED[:1], choice.message.to_dict(), result]
        said = client.chat.completions.create(**{**asked, "messages": history}).choices[0]
        assert (said.message.content, said.finish_reason) == ("Peru is a land.", "stop")
        plain = client.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0]
        assert plain.message.tool_calls is None


def test_openai_raises_its_own_errors(client, guarded):
    with pytest.raises(openai.BadRequestError) as met:
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "many words " * 400}])
    assert met.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(default_headers={"Host": "evil.example"}).models.list()
    url = f"{guarded.url}/v1"
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError) as met:
            other.models.list()
        assert met.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as other:
        assert [model.id for model in other.models.list()] == ["tuned"]
        with pytest.raises(openai.APIStatusError) as met:
            other.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "a" * 20_000}])
        assert met.value.status_code == 413


def test_openai_is_told_when_to_come_again(guarded):
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sesame", max_retries=0) as client:
        with client.chat.completions.create(model="tuned", messages=ASK, stream=True, **LONG) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as met:
                client.chat.completions.create(model="tuned", messages=ASK)
            assert met.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model="tuned", messages=ASK, max_tokens=2).choices


def test_openai_leaves_and_its_place_is_free(guarded):
    """Within a second: the only place there is is given to another."""

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key="sesame", max_retries=0) as client:
            for whole in (False, True):
                asked = {"model": "tuned", "messages": ASK, "n": 1, **LONG}
                begun = asyncio.Event()

                async def listen(asked=asked, begun=begun):
                    async for _ in await client.chat.completions.create(**asked, stream=True):
                        begun.set()

                work = client.chat.completions.create(**asked) if whole else listen()
                task = asyncio.create_task(work)
                await (_until(lambda: still_open(guarded.client) == 1) if whole else begun.wait())
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await asyncio.wait_for(_until(lambda: still_open(guarded.client) == 0), 1.0)

    asyncio.run(ask())
    asked = {"messages": ASK, "max_tokens": 1}
    headers = {"Authorization": "Bearer sesame"}
    assert guarded.client.post("/v1/chat/completions", json=asked, headers=headers).status_code == 200


def test_openai_times_out(guarded):
    url = f"{guarded.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=0.05) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(model="tuned", messages=ASK, **LONG)
    asyncio.run(asyncio.wait_for(_until(lambda: still_open(guarded.client) == 0), 10.0))


async def _until(holds):
    while not await asyncio.to_thread(holds):
        await asyncio.sleep(0.01)


# litellm

LITELLM = """
import json, sys, litellm
asked = {"model": "openai/tuned", "api_base": sys.argv[1] + "/v1", "max_tokens": 10, "temperature": 0}
ask = [{"role": "user", "content": "What is the capital of Peru?"}]
found = {"whole": litellm.completion(messages=ask, **asked).choices[0].message.content}
found["pieces"] = [
    each.choices[0].delta.content or "" for each in litellm.completion(messages=ask, stream=True, **asked)
]
asked_text = {**asked, "model": "text-completion-openai/tuned"}
found["text"] = litellm.text_completion(prompt="One, two,", **asked_text).choices[0].text
found["errors"] = []
for more in ({"messages": [{"role": "user", "content": "word " * 600}]}, {"messages": ask, "model": "openai/other"}):
    try:
        litellm.completion(**{**asked, **more})
    except Exception as error:
        found["errors"].append(type(error).__name__)
print(json.dumps(found))
"""


@pytest.mark.prove
def test_litellm(served):
    found = run(LITELLM, served.url)
    asked = {"max_tokens": 10, "temperature": 0}
    said = served.client.post("/v1/chat/completions", json={"messages": ASK, **asked}).json()["choices"][0]
    assert found["whole"] == "".join(found["pieces"]) == said["message"]["content"]
    assert sum(map(bool, found["pieces"])) > 1
    text = served.client.post("/v1/completions", json={"prompt": "One, two,", **asked}).json()["choices"][0]["text"]
    assert found["text"] == text
    assert found["errors"] == ["ContextWindowExceededError", "NotFoundError"]


# llm


@pytest.mark.prove
def test_llm_with_an_extra_model(served, tmp_path):
    extra = {"model_id": "mine", "model_name": "tuned", "api_base": f"{served.url}/v1", "api_key_name": "none"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([extra]))
    env = {**os.environ, **OFFLINE, "LLM_USER_PATH": str(tmp_path)}

    def llm(*given):
        done = subprocess.run(
            [sys.executable, "-m", "llm", *given, "-o", "temperature", "0", "-o", "max_tokens", "10", "--key", "none"],
            capture_output=True,
            text=True,
            env=env,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    def said(messages):
        body = {"messages": messages, "temperature": 0, "max_tokens": 10}
        return served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    first = llm("-m", "mine", ASK[0]["content"])
    assert first == said(ASK)
    history = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "And of France?"}]
    assert llm("-c", "And of France?", "--no-stream") == said(history)


# EleutherAI's harness

HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
kind, given, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
lm = (LocalChatCompletion if kind == "chat" else LocalCompletionsAPI)(**given)
def of(kind, several):
    return [Instance(kind, {}, tuple(each), n) for n, each in enumerate(several)]
found = {}
if "pairs" in requests:
    found["pairs"] = lm.loglikelihood(of("loglikelihood", requests["pairs"]), disable_tqdm=True)
    found["texts"] = lm.loglikelihood_rolling(of("loglikelihood_rolling", requests["texts"]), disable_tqdm=True)
if "chats" in requests:
    chats = [[lm.apply_chat_template([{"role": "user", "content": q}]), how] for q, how in requests["chats"]]
    found["chats"] = lm.generate_until(of("generate_until", chats), disable_tqdm=True)
print(json.dumps(found))
"""
PAIRS = [
    ("What is the capital of Peru?", " Lima"),
    ("What is the capital of Peru?", " The capital of Peru is Lima."),
    ("What is the color of grass? ", "green"),
    ("One, two, thr", "ee, four, five."),  # a token may straddle the seam
]
TEXTS = [("The capital of Peru is Lima.",), ("One, two, three. " * 20,)]


@pytest.fixture(scope="module")
def ours(tuned):
    """The harness's model without a server."""
    from instil.evaluation.lm_eval import HarnessModel
    from instil.inference import load_engine
    from instil.model import ModelOptions

    return HarnessModel(load_engine(ModelOptions(model=str(tuned), precision="fp32")), as_text=True)


@pytest.mark.prove
@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_the_harness_reads_likelihoods(served, tuned, ours, backend):
    """Those of the engine in process; of the harness's own tokens, and of those that the server tells of."""
    given = {
        "base_url": f"{served.url}/v1/completions",
        "model": "tuned",
        "tokenizer_backend": backend,
        "tokenizer": str(tuned) if backend == "huggingface" else None,
        "max_length": 512,
        "num_concurrent": 1,
        "batch_size": 2,
    }
    found = run(HARNESS, "text", json.dumps(given), json.dumps({"pairs": PAIRS, "texts": TEXTS}))
    requests = [[SimpleNamespace(args=each, task_name="a task") for each in some] for some in (PAIRS, TEXTS)]
    expected = ours.loglikelihood(requests[0])
    assert [each[0] for each in found["pairs"]] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found["pairs"]] == [each[1] for each in expected]
    assert found["texts"] == pytest.approx(ours.loglikelihood_rolling(requests[1]), abs=1e-3)


@pytest.mark.prove
def test_the_harness_asks_for_answers(served):
    given = {"base_url": f"{served.url}/v1/chat/completions", "model": "tuned", "num_concurrent": 1}

    def said(question, stop, most):
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": most, "stop": stop}
        return served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    whole = said("What is the capital of Peru?", None, 16)
    stop = whole[6:9]
    chats = [
        ["What is the capital of Peru?", {"until": [stop], "max_gen_toks": 16}],
        ["What is the color of grass?", {"until": ["\n"], "max_gen_toks": 5}],
    ]
    found = run(HARNESS, "chat", json.dumps(given), json.dumps({"chats": chats}))["chats"]
    assert found[0] == whole[: whole.index(stop)]
    assert found[1] == said("What is the color of grass?", "\n", 5)


def test_nothing_of_this_leaves_answers_open(served):
    with httpx.Client(base_url=served.url) as client:
        assert still_open(client) == 0
