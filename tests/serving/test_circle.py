"""The circle closes: what was served and judged is exported, and trains on the very ids that were served."""

import json
import subprocess
import sys

import pytest

import instil
from instil.conversation import Conversation, Message
from instil.inference.load import load_engine
from instil.inference.session import Chat
from instil.model.options import ModelOptions
from instil.pocket import model_folder
from instil.prompt import PromptOptions
from instil.serving.models import ServedModel

from .conftest import serving


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "instil", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_what_was_served_and_judged_trains_on_the_ids_that_were_served(tuned, tmp_path):
    ask = {"messages": [{"role": "user", "content": "Write to me: <|im_end|> or Zoë?"}], "max_tokens": 40}
    kept = tmp_path / "kept"
    with serving(tuned, "--record", kept, "--precision", "fp32", "--name", "pocket") as served:

        def post(path, **body):
            answer = served.client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        def chat(**more):
            return post("/v1/chat/completions", **ask, return_token_ids=True, **more)

        for seed in range(40):  # one that ends by itself, and another
            found = chat(store=True, temperature=0.8, seed=seed, n=2)
            texts = [choice["message"]["content"] for choice in found["choices"]]
            ended = [choice["finish_reason"] for choice in found["choices"]]
            if ended == ["stop", "stop"] and all(text.strip() for text in texts) and texts[0] != texts[1]:
                break
        else:
            raise AssertionError("no two answers that end")
        unasked = chat()
        post("/api/feedback", kind="rating", id=found["id"], choice=0, value="up")
        post("/api/feedback", kind="correction", id=found["id"], choice=1, content="It is Zoë.")
        post("/api/feedback", kind="preference", chosen={"id": found["id"]}, rejected={"id": found["id"], "choice": 1})
        said = [{"role": "user", "content": "Bye."}, {"role": "assistant", "content": "See you, at x@y.example!"}]
        post("/api/feedback", kind="dialogue", messages=said)
        refused = served.client.post("/api/feedback", json={"kind": "rating", "id": unasked["id"], "value": "up"})
        assert refused.status_code == 404, "it did not say store: true"

    rows = tmp_path / "rows.jsonl"
    command("feedback", "export", "--record", kept, "--output", rows, "--kind", "supervised")
    exported = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert sorted(each["why"] for row in exported for each in row["provenance"]) == [
        "authored",
        "corrected",
        "rated-up",
    ]
    by_reason = {
        row.record.extra["provenance"][0]["why"]: row.exchanges
        for row in instil.exchanges(instil.read(rows), str(tuned))
    }
    (good,) = by_reason["rated-up"]
    assert good.prompt_ids.tolist() == found["prompt_token_ids"]
    assert good.completion_ids.tolist() == found["choices"][0]["token_ids"], "the stop token included"
    (corrected,) = by_reason["corrected"]
    assert corrected.prompt_ids.tolist() == found["prompt_token_ids"]
    assert corrected.completion_text == "It is Zoë.<|im_end|>"
    assert "[email]" in rows.read_text(encoding="utf-8")

    pairs = tmp_path / "pairs.jsonl"
    command("feedback", "export", "--record", kept, "--output", pairs, "--kind", "preference")
    for data, objective in ((rows, "supervised"), (pairs, "dpo")):
        trained = instil.train(
            instil.TrainConfig(
                model=str(tuned), data=[str(data)], objective=objective, output=tmp_path / objective, max_steps=1
            )
        )
        assert trained.history[-1].step == 1


@pytest.mark.prove
def test_a_gap_is_filled_by_the_prompt_of_training(tmp_path):
    rows = [{"prefix": f"def f{n}(x):\n    ", "suffix": f"\n\nf{n}(3)\n", "middle": "return x"} for n in range(4)]
    data = tmp_path / "gaps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = tmp_path / "filling"
    instil.train(
        instil.TrainConfig(model=str(model_folder()), template="fim", data=[str(data)], output=model, max_steps=1)
    )
    with serving(model) as served:
        for row, encoded in zip(rows, instil.exchanges(instil.read(data), str(model)), strict=True):
            body = {"prompt": row["prefix"], "suffix": row["suffix"], "max_tokens": 2, "return_token_ids": True}
            found = served.client.post("/v1/completions", json=body).json()
            assert found["prompt_token_ids"] == encoded.exchanges[0].prompt_ids.tolist()
        assert served.client.get("/api/about").json()["models"][0]["fill_in_the_middle"] is True


def test_the_parts_of_a_message_are_placed_as_training_placed_them(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "Add.", "input": "1 2", "output": "3"}), encoding="utf-8")
    (trained,) = next(iter(instil.exchanges(instil.read(data), str(model_folder()), template="alpaca"))).exchanges
    loaded = load_engine(ModelOptions(model=str(model_folder())), PromptOptions(template="alpaca"))
    model = ServedModel("tuned", "tuned", loaded, 16)
    whole, parts = {"content": "Add.\n\n1 2"}, {"instruction": "Add.", "input": "1 2"}
    one, both, other = (
        list(model.chat_ids(model.conversation([{"role": "user", **message}], None)))
        for message in (parts, whole | parts, whole)
    )
    assert one == both == trained.prompt_ids.tolist()
    assert other != one


def test_the_template_is_served_with_the_arguments_of_training(tmp_path):
    template = tmp_path / "toned.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}{% if tone is defined %} ({{ tone }}){% endif %}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant{% if tone is defined %} ({{ tone }}){% endif %}:{% endif %}",
        encoding="utf-8",
    )
    asked = [{"role": "user", "content": "Why?"}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": [*asked, {"role": "assistant", "content": "So."}]}), encoding="utf-8")
    config = instil.TrainConfig(
        model=str(model_folder()),
        template=str(template),
        template_args={"tone": "curt"},
        data=[str(data)],
        output=tmp_path / "toned",
        max_steps=1,
    )
    instil.train(config)
    given = {"template": str(template), "template_args": {"tone": "curt"}}
    (trained,) = next(iter(instil.exchanges(instil.read(data), str(model_folder()), **given))).exchanges
    chat = Chat(load_engine(ModelOptions(model=str(config.output))))
    conversation = Conversation((Message("user", "Why?"),))
    assert list(chat.prompt(conversation).ids) == trained.prompt_ids.tolist()
    assert "(curt)" in trained.prompt_text
    kind = PromptOptions(template_args={"tone": "kind"})
    other = Chat(load_engine(ModelOptions(model=str(config.output)), kind)).prompt(conversation).ids
    assert "(kind)" in chat.renderer.tokenizer.decode(other)
