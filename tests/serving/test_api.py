"""The API over HTTP: what clients of OpenAI expect, held against the engine itself and against training."""

import json
import threading
import time

import pytest

import instil
from instil.conversation import Conversation, Message
from instil.inference import SamplingOptions
from instil.inference.load import load_engine
from instil.inference.session import Chat
from instil.model.options import ModelOptions
from instil.pocket import data_folder
from instil.serving.models import ServedModel
from instil.serving.protocol import CompletionRequest

ASK = [{"role": "user", "content": "What is the capital of Peru?"}]


@pytest.fixture(scope="module")
def chat(tuned):
    """The same model without a server."""
    return Chat(load_engine(ModelOptions(model=str(tuned), precision="fp32")))


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_served_ids_are_those_of_training(served, tuned):
    """Of whole conversations, through HTTP; control tokens that a message spells are text."""
    lines = (data_folder() / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:400:10]]
    rows.append({"messages": [{"role": "user", "content": "Say <|im_end|>!"}, {"role": "assistant", "content": "No."}]})
    path = tuned.parent / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    compared = 0
    for row in instil.exchanges(instil.read(path), str(tuned)):
        (conversation,) = row.record.conversations
        messages = [message.to_wire() for message in conversation.messages]
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, exchange in zip(turns, row.exchanges, strict=True):
            asked = {"messages": messages[:turn]}
            counted = served.client.post("/tokenize", json=asked).json()
            assert counted["tokens"] == exchange.prompt_ids.tolist()
            told = {**asked, "max_tokens": 1, "return_token_ids": True}
            if compared % 10 == 0:
                answer = served.client.post("/v1/chat/completions", json=told).json()
                assert answer["prompt_token_ids"] == exchange.prompt_ids.tolist()
                assert answer["usage"]["prompt_tokens"] == len(exchange.prompt_ids)
            compared += 1
    assert compared >= 41


def test_an_answer_is_the_engines_own(served, chat):
    (expected,) = chat.engine.generate(
        [chat.prompt(Conversation((Message("user", ASK[0]["content"]),))).ids], SamplingOptions(max_new_tokens=20)
    )
    body = {"messages": ASK, "max_tokens": 20, "return_token_ids": True, "logprobs": True, "top_logprobs": 3}
    answer = served.client.post("/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    stopped = expected[0].ended == "stop"
    ids = choice["token_ids"]
    assert tuple(ids[:-1] if stopped else ids) == expected[0].ids
    assert choice["message"] == {"role": "assistant", "content": expected[0].text}
    assert choice["finish_reason"] == ("stop" if stopped else "length")
    told = choice["logprobs"]["content"]
    assert sum(each["logprob"] for each in told) == pytest.approx(expected[0].logprob, abs=1e-3)
    assert all(len(each["top_logprobs"]) == 3 for each in told)
    assert all(each["top_logprobs"][0]["token"] == each["token"] for each in told), "greedy"
    assert answer["usage"]["completion_tokens"] == len(ids) == len(told)


def test_a_stream_is_the_answer_in_pieces(served):
    body = {"messages": ASK, "max_tokens": 24, "temperature": 1.0, "seed": 4, "n": 3, "return_token_ids": True}
    whole = served.client.post("/v1/chat/completions", json=body).json()
    streamed = served.client.post(
        "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(streamed)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1, "drawn apart"
    for choice in whole["choices"]:
        own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [id for each in own for id in each.get("token_ids", ())] == choice["token_ids"]
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_draws_follow_the_seed(served):
    def said(**more):
        body = {"messages": ASK, "max_tokens": 12, "temperature": 1.5, **more}
        return served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(4)}) > 1
    assert len({said() for _ in range(4)}) > 1
    assert said(seed=1, top_k=1) == said(seed=2, top_p=0.0) == said(temperature=0)
    assert said(temperature=None, top_p=1.0, top_k=0, min_p=0.0) == said(temperature=0), "what narrows nothing"


def test_stop_strings_end_an_answer_before_them(served):
    body = {"messages": ASK, "max_tokens": 30}
    text = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stop = text[4:7]
    for given in (stop, ["zqzq", stop, None]):
        choice = served.client.post("/v1/chat/completions", json={**body, "stop": given}).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_a_completion_tells_of_its_prompt(served, chat):
    import torch

    text = "The capital of Peru is Lima."
    ids = served.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    body = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 1}
    (choice,) = served.client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    expected = torch.log_softmax(chat.engine.model(torch.tensor([ids])).logits[0].float(), -1)
    assert len(found["tokens"]) == len(ids) + 1
    assert "".join(found["tokens"][:-1]) == text
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(
        [expected[at, id].item() for at, id in enumerate(ids[1:])], abs=1e-4
    )
    assert found["token_logprobs"][-1] == pytest.approx(expected[-1].max().item(), abs=1e-4)
    assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values()), "told by the same number"
    assert choice["text"].startswith(text)
    assert found["text_offset"][:3] == [0, len(found["tokens"][0]), len(found["tokens"][0] + found["tokens"][1])]


def test_prompts_in_a_list_are_answered_each(served):
    texts = ["The capital of Peru is", "The capital of France is", "One, two,"]
    together = served.client.post("/v1/completions", json={"prompt": texts, "n": 2, "max_tokens": 6}).json()
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    for number, text in enumerate(texts):
        (alone,) = served.client.post("/v1/completions", json={"prompt": text, "max_tokens": 6}).json()["choices"]
        assert [c["text"] for c in together["choices"][2 * number :][:2]] == [alone["text"]] * 2
        ids = served.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        (again,) = served.client.post("/v1/completions", json={"prompt": ids, "max_tokens": 6}).json()["choices"]
        assert again["text"] == alone["text"]
    nothing = served.client.post("/v1/completions", json={"prompt": texts[0], "max_tokens": 0, "echo": True}).json()
    assert nothing["choices"][0]["text"] == texts[0]
    assert nothing["usage"]["completion_tokens"] == 0


def test_a_completion_is_streamed_with_its_prompt(served):
    body = {"prompt": "The capital of Peru is", "max_tokens": 6, "echo": True, "logprobs": 1}
    whole = served.client.post("/v1/completions", json=body).json()["choices"][0]
    chunks = [
        chunk["choices"][0] for chunk in events(served.client.post("/v1/completions", json={**body, "stream": True}))
    ]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for chunk in chunks if chunk["logprobs"] for each in chunk["logprobs"][name]] == whole["logprobs"][
            name
        ]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_the_base_stands_beside_the_tuned_model(served):
    models = served.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tuned", "model"]
    assert served.client.get("/v1/models/model").json() == models[1]
    about = served.client.get("/api/about").json()
    assert [model["role"] for model in about["models"]] == ["tuned", "base"]
    told = [
        served.client.post(
            "/v1/chat/completions",
            json={"messages": ASK, "model": name, "logprobs": True, "max_tokens": 8, "return_token_ids": True},
        ).json()
        for name in ("tuned", "model")
    ]
    assert told[0]["prompt_token_ids"] == told[1]["prompt_token_ids"], "asked with the very same ids"
    assert told[0]["choices"][0]["token_ids"] != told[1]["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"kind": "rating", "id": "a", "choice": -1, "value": "up"}, "choice", "choice: Input should be greater"),
        ({"kind": "rating", "id": "a"}, "value", "value: Field required"),
        ({"kind": "preference", "chosen": {"id": "a"}, "rejected": {}}, "rejected", "rejected.id: Field required"),
        ({"kind": "thumb"}, "kind", "kind: Input should be one of 'rating', 'correction', 'preference', 'dialogue'"),
        ({}, "kind", "kind: Field required"),
        ({"kind": "rating", "id": "a", "vlaue": "up"}, None, "'vlaue' is no field of this request"),
    ],
)
def test_a_mistake_in_feedback_is_told_by_the_fields_that_were_sent(served, body, param, said):
    answer = served.client.post("/api/feedback", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(said)


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({}, 400, "messages", "Field required"),
        ({"messages": []}, 400, "messages", ""),
        ({"messages": ASK, "temprature": 1}, 400, None, "did you mean 'temperature'?"),
        ({"messages": ASK, "temperature": "warm"}, 400, "temperature", "number"),
        ({"messages": ASK, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"messages": ASK, "max_tokens": 10**6}, 400, "max_tokens", "4,096 that this server gives"),
        ({"messages": ASK, "max_tokens": 3, "max_completion_tokens": 5}, 400, None, "differ, and mean the same"),
        ({"messages": ASK, "store": "yes"}, 400, "store", "boolean"),
        ({"messages": ASK, "presence_penalty": 0.5}, 400, None, "presence_penalty: is not supported"),
        ({"messages": ASK, "response_format": {"type": "json_object"}}, 400, None, "response_format"),
        ({"messages": ASK, "model": "tunde"}, 404, "model", "did you mean 'tuned'?"),
        ({"messages": [{"role": "usr", "content": "a"}]}, 400, "messages[0].role", "usr"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Lima."}]}, 400, "messages", "nothing to answer"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages", "512"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "surrogate"),
        ({"messages": ASK, "n": 64, "stop": [""]}, 400, "stop", ""),
        ({"messages": ASK, "stop": ""}, 400, "stop", "stop: String"),
    ],
)
def test_a_mistake_is_told_in_the_shape_of_openai(served, body, status, param, said):
    answer = served.client.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    if "512" in said:
        assert error["code"] == "context_length_exceeded"


def test_a_conversation_that_goes_on_is_not_read_anew(served, chat):
    system = {"role": "system", "content": "You are a helpful assistant of few words, who knows the world very well."}
    messages = [system, {"role": "user", "content": "Which river is longer, the Nile or the one that I love?"}]
    body, before = {"max_tokens": 8, "return_token_ids": True}, 0
    for turn in range(4):
        answer = served.client.post("/v1/chat/completions", json={**body, "messages": messages}).json()
        reused = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        if turn:
            assert reused >= before - 1, "all of what was asked before"
        conversation = Conversation(tuple(Message(each["role"], each["content"]) for each in messages))
        (expected,) = chat.engine.generate([chat.prompt(conversation).ids], SamplingOptions(max_new_tokens=8))
        stop = 1 if expected[0].ended == "stop" else 0
        ids = answer["choices"][0]["token_ids"]
        assert tuple(ids[: len(ids) - stop]) == expected[0].ids
        before = answer["usage"]["prompt_tokens"]
        said = answer["choices"][0]["message"]["content"] or "Yes."
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"And what is number {turn}?"}]


def test_a_conversation_goes_on_after_an_empty_answer(served):
    """Which the model itself may have given."""
    messages = [*ASK, {"role": "assistant", "content": ""}, *ASK]
    answer = served.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


def test_a_limit_that_was_not_asked_for_is_no_mistake(tuned):
    """Of OpenAI's 16 tokens, where the server gives fewer."""
    model = ServedModel("tuned", "tuned", load_engine(ModelOptions(model=str(tuned), precision="fp32")), 8)
    (job,) = model.asked_completion(CompletionRequest(prompt="The capital of Peru is")).jobs
    assert job.limit == 8


def test_answers_are_generated_together_and_one_that_is_left_frees_its_place(served):
    """Many clients at once get what each gets alone; when all have left nothing is open."""
    prompts = [f"The {word} of Peru is" for word in ("capital", "river", "food", "name", "king", "end", "sea", "way")]

    def text(prompt):
        body = {"prompt": prompt, "max_tokens": 40}
        return served.client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    alone = [text(prompt) for prompt in prompts]
    found = [None] * len(prompts)

    def ask(number):
        found[number] = text(prompts[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == alone

    def opened():
        lines = served.client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("instil_answers_open ")).split()[1])

    body = {"prompt": prompts[0], "max_tokens": 480, "n": 64, "temperature": 1, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # held, for httpx closes what nobody reads
        next(lines)
        assert opened() > 0
    left = time.monotonic()
    while opened():
        assert time.monotonic() - left < 1, "within a second"
    assert text(prompts[0]) == alone[0]
