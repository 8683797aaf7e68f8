"""Judgements to data: what is trained, what is left out and why, and that it is the tokens that were served."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from scipy.stats import binomtest

import instil
from instil.conversation import Conversation, Message
from instil.inference.options import SamplingOptions
from instil.serving.feedback import Given, Interaction, Store
from instil.serving.feedback.export import export
from instil.serving.feedback.verdicts import statistics, wilson

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
PLAIN = Interaction("", NOW, "tuned", "ab12", "chatml", "cd34", "chat", (), (), {}, None, ())


def user(content):
    return {"role": "user", "content": content}


def says(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def record(store, id, messages, *answers, hours=0, **changes):
    given = tuple(each if isinstance(each, Given) else Given(each) for each in answers)
    kept = replace(PLAIN, id=id, messages=tuple(messages), answers=given, time=NOW + timedelta(hours=hours), **changes)
    store.record(kept)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "kept") as opened:
        yield opened


def bare(rows):
    """The rows without the columns that say where they come from."""
    return [{name: value for name, value in row.items() if name != "provenance"} for row in rows]


def reasons(rows):
    return [[each["why"] for each in row["provenance"]] for row in rows]


def test_what_is_good_is_trained_and_nothing_else(store):
    record(store, "up", [user("One?")], "1.", "I.")
    record(store, "down", [user("Two?")], "3.", hours=1)
    record(store, "corrected", [user("Three?")], "4.", hours=2)
    record(store, "silent", [user("Four?")], "4.", hours=3)
    record(store, "taken back", [user("Five?")], "5.", hours=4)
    store.rate("up", 1, "up")
    store.rate("down", 0, "down")
    store.correct("corrected", 0, "It is four.")
    store.correct("corrected", 0, "3.")
    store.rate("corrected", 0, "up")
    store.rate("taken back", 0, "up")
    store.rate("taken back", 0, None)
    written = [user("Hi."), says("Hello.", weight=0.5), user("Bye."), says("Bye!")]
    store.author([{"role": "system", "content": "Be kind."}, *written])
    found = export(store, "supervised")
    assert bare(found.rows) == [
        {"messages": [user("One?"), says("I.")]},
        {"messages": [user("Three?"), says("3.")]},
        {"messages": [{"role": "system", "content": "Be kind."}, *written]},
    ]
    assert found.used == {"rated-up": 1, "corrected": 1, "authored": 2}
    assert +found.left_out == {}


def test_provenance(store):
    record(store, "one", [user("One?")], "1.", "I.")
    judged = store.rate("one", 1, "up")
    (row,) = export(store, "supervised").rows
    (said,) = row["provenance"]
    assert abs(datetime.fromisoformat(said.pop("judged")) - datetime.now(UTC)) < timedelta(minutes=5)
    assert said == {
        "why": "rated-up",
        "judgement": judged,
        "interaction": "one",
        "choice": 1,
        "message": 1,
        "time": "2026-05-04T12:00:00+00:00",
        "model": "tuned",
        "model_hash": "ab12",
        "template": "chatml",
        "template_hash": "cd34",
    }


def test_a_conversation_that_went_on_is_one_row(store):
    """Of its answers those are trained that were good where they were given, each once."""
    first, bad, third = says("1."), says("no idea"), says("3.")
    record(store, "a", [user("One?")], "1.")
    record(store, "b", [user("One?"), first, user("Two?")], "no idea", hours=1)
    record(store, "c", [user("One?"), first, user("Two?"), bad, user("Three?")], "3.", hours=2)
    record(store, "d", [user("One?"), first, user("Else?")], "Else.", hours=3)
    record(store, "e", [user("Other?"), first, user("Two?")], "2.", hours=4)
    for name in ("a", "c", "d", "e"):
        store.rate(name, 0, "up")
    store.rate("b", 0, "down")
    found = export(store, "supervised")
    zero = {"weight": 0}
    assert bare(found.rows) == [
        {"messages": [user("One?"), first, user("Two?"), bad | zero, user("Three?"), third]},
        {"messages": [user("One?"), first | zero, user("Else?"), says("Else.")]},
        {"messages": [user("Other?"), first | zero, user("Two?"), says("2.")]},
    ]
    assert [[each["interaction"] for each in row["provenance"]] for row in found.rows] == [["a", "c"], ["d"], ["e"]]
    assert [each["message"] for each in found.rows[0]["provenance"]] == [1, 5]
    assert found.used == {"rated-up": 4}


def test_a_conversation_that_goes_on_from_a_correction(store):
    record(store, "a", [user("One?")], "2.")
    store.correct("a", 0, "1.")
    record(store, "b", [user("One?"), says("1."), user("Two?")], "2.", hours=1)
    store.rate("b", 0, "up")
    record(store, "c", [user("One?"), says("2."), user("Two?")], "3.", hours=2)
    store.rate("c", 0, "up")
    found = export(store, "supervised")
    assert bare(found.rows) == [
        {"messages": [user("One?"), says("1."), user("Two?"), says("2.")]},
        {"messages": [user("One?"), says("2.", weight=0), user("Two?"), says("3.")]},
    ]
    assert reasons(found.rows) == [["corrected", "rated-up"], ["rated-up"]]


def test_what_is_left_out_of_supervised_rows_is_counted(store):
    record(store, "whole", [user("One?")], "1.")
    record(store, "again", [user("One?")], "1.", hours=1)
    record(store, "cut", [user("Two?")], Given("2", (), "length"), Given("2", (), "stopped"), Given("2", (), "context"))
    record(store, "string", [user("Three?")], Given("3", (), "stop-string"), hours=2)
    record(store, "empty", [user("Four?")], " ")
    record(store, "order", [user("Five?"), user("Five!")], "5.", "V.")
    record(store, "text", [user("Six is")], " 6.", kind="completion")
    record(store, "hated", [user("Seven?")], "7.", "7.")
    record(store, "mended", [user("Eight?")], Given("8", (), "length"), hours=3)
    for name, choices in (
        ("whole", 1),
        ("again", 1),
        ("cut", 3),
        ("string", 1),
        ("empty", 1),
        ("order", 1),
        ("text", 1),
    ):
        for choice in range(choices):
            store.rate(name, choice, "up")
    store.rate("order", 1, "down")  # and so it would not be trained anyway
    store.rate("hated", 0, "up")
    store.rate("hated", 1, "down")
    store.correct("mended", 0, "8.")
    store.author([user("One?"), says("1."), user("And?"), says("2.")])
    found = export(store, "supervised")
    assert bare(found.rows) == [
        {"messages": [user("Three?"), says("3")]},
        {"messages": [user("Eight?"), says("8.")]},
        {"messages": [user("One?"), says("1."), user("And?"), says("2.")]},
    ]
    assert +found.left_out == {
        "there already": 2,
        "cut off, stopped or empty": 4,
        "refused by training: turns out of order: user follows user": 1,
        "of /v1/completions, which holds no conversation": 1,
        "rated both up and down": 1,
    }


def test_model_and_time(store):
    record(store, "old", [user("One?")], "1.")
    record(store, "base", [user("Two?")], "2.", model="base", hours=2)
    record(store, "new", [user("Three?")], "3.", hours=2)
    for name in ("old", "base", "new"):
        store.rate(name, 0, "up")
    store.author([user("Hi."), says("Hello.")])

    def chosen(**which):
        return [row["messages"][0]["content"] for row in export(store, "supervised", **which).rows]

    assert chosen() == ["One?", "Two?", "Three?", "Hi."]
    assert chosen(model="tuned") == ["One?", "Three?"]
    assert chosen(since=NOW + timedelta(hours=1)) == ["Two?", "Three?", "Hi."]
    assert chosen(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert +export(store, "supervised", model="tuned").left_out == {"written by a person, of no model": 1}


def test_an_answer_that_was_bad_elsewhere_is_no_good_one(store):
    """Also where the one that was rated down is of another model, or of another time."""
    record(store, "a", [user("One?")], "1.", model="base")
    record(store, "b", [user("One?")], "1.", hours=5)
    store.rate("a", 0, "down")
    store.rate("b", 0, "up")
    found = export(store, "supervised", model="tuned", since=NOW + timedelta(hours=1))
    assert (found.rows, +found.left_out) == ([], {"rated both up and down": 1})


def test_labelled_rows(store):
    record(store, "a", [user("One?"), says("Which?"), user("That.")], "1.", "I.", "one", Given("o", (), "length"))
    record(store, "b", [user("One?"), says("Which?"), user("That.")], "1.", "I.")
    for choice, value in enumerate(("up", "down", "up", "down")):
        store.rate("a", choice, value)
    store.rate("b", 0, "up")
    store.rate("b", 1, "up")
    record(store, "c", [user("Three?")], "5")
    store.rate("c", 0, "up")
    store.correct("c", 0, "3")
    found = export(store, "labelled")
    asked = [user("One?"), says("Which?", weight=0), user("That.")]
    assert bare(found.rows) == [
        {"messages": [*asked, says("1.")], "label": True},
        {"messages": [*asked, says("one")], "label": True},
    ]
    assert +found.left_out == {
        "there already": 1,
        "rated both up and down": 1,
        "cut off, stopped or empty": 1,
        "rated up, but corrected": 1,
    }
    records = list(instil.read(found.rows, objective="kto"))
    assert [each.labels for each in records] == [("good",), ("good",)]


def test_pairs(store):
    record(store, "a", [user("One?")], "1.", "I.")
    record(store, "b", [user("One?")], "one", "1.", model="base", hours=1)
    record(
        store,
        "c",
        [user("Two?"), says("?"), user("Two!")],
        "3.",
        tools=({"type": "function", "function": {"name": "f"}},),
    )
    store.prefer(("b", 0), ("a", 0))
    store.prefer(("a", 0), ("b", 0))
    store.prefer(("b", 0), ("a", 1))
    store.correct("c", 0, "2.")
    found = export(store, "preference")
    assert bare(found.rows) == [
        {"prompt": [user("One?")], "chosen": [says("1.")], "rejected": [says("one")]},
        {"prompt": [user("One?")], "chosen": [says("one")], "rejected": [says("I.")]},
        {
            "prompt": [user("Two?"), says("?", weight=0), user("Two!")],
            "chosen": [says("2.")],
            "rejected": [says("3.")],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    ]
    assert found.used == {"better-of-two": 2, "corrected": 1}
    sides = [(each["answer"], each["interaction"], each["model"]) for each in found.rows[0]["provenance"]]
    assert sides == [("chosen", "a", "tuned"), ("rejected", "b", "base")]
    records = list(instil.read(found.rows, objective="dpo"))
    assert [each.labels for each in records] == [("chosen", "rejected")] * 3
    assert records[2].conversations[0].messages[-1] == Message("assistant", "2.")
    assert len(export(store, "preference", model="base").rows) == 2


def test_what_is_left_out_of_pairs_is_counted(store):
    record(store, "a", [user("One?")], "1.", "I.", Given("o", (), "length"))
    record(store, "b", [user("One?")], "1.", "I.")
    store.prefer(("a", 0), ("a", 1))
    store.prefer(("b", 1), ("b", 0))
    store.prefer(("a", 0), ("b", 0))
    store.prefer(("a", 0), ("a", 2))
    store.correct("b", 0, "1.")
    store.correct("a", 2, "one")
    found = export(store, "preference")
    assert found.rows == []
    assert +found.left_out == {
        "judged both ways": 2,
        "with the same answer twice": 2,
        "cut off, stopped or empty": 2,
    }


def test_pairs_from_ratings(store):
    record(store, "a", [user("One?")], "1.", "I.")
    record(store, "b", [user("One?")], "one")
    record(store, "c", [user("Two?")], "2.")
    for name, choice, value in (("a", 0, "up"), ("a", 1, "down"), ("b", 0, "down"), ("c", 0, "up")):
        store.rate(name, choice, value)
    store.prefer(("a", 0), ("a", 1))
    record(store, "d", [user("One?")], "uno")
    store.rate("d", 0, "up")
    store.correct("d", 0, "1.")
    assert len(export(store, "preference").rows) == 2
    found = export(store, "preference", pairs_from_ratings=True)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found.rows] == [
        ("1.", "I."),
        ("1.", "uno"),
        ("1.", "one"),
    ]
    assert found.used == {"better-of-two": 1, "corrected": 1, "up-and-down": 1}
    assert +found.left_out == {"there already": 1}


def test_tool_calls(store):
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": '{"z": 1, "a": "ä"}'}}
    tools = ({"type": "function", "function": {"name": "f"}},)
    record(store, "a", [user("One?")], Given("", (call,)), tools=tools)
    result = {"role": "tool", "content": "1", "tool_call_id": "call-1"}
    record(store, "b", [user("One?"), says("", tool_calls=[call]), result], "1.", tools=tools, hours=1)
    store.rate("a", 0, "up")
    store.rate("b", 0, "up")
    (row,) = export(store, "supervised").rows
    called = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": "ä"}}}
    assert row["messages"] == [user("One?"), says("", tool_calls=[called]), result, says("1.")]
    assert list(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]
    assert row["tools"] == list(tools)


def test_the_tokens_are_those_that_were_served(store, tuned, tmp_path):
    """Two good answers of one conversation and one that was corrected, as the engine gave them."""
    from instil.inference.load import load_engine
    from instil.inference.session import Chat
    from instil.model.options import ModelOptions

    chat = Chat(load_engine(ModelOptions(model=str(tuned), precision="fp32")))
    sampling = SamplingOptions(temperature=0, max_new_tokens=200)
    served = {}

    def ask(id, messages):
        conversation = Conversation(tuple(Message(each["role"], each["content"]) for each in messages))
        prompt = chat.prompt(conversation, sampling)
        ((answer,),) = chat.engine.generate([prompt.ids], sampling)
        assert answer.ended == "stop", answer.text
        record(store, id, messages, Given(answer.text, (), answer.ended, answer.ids), prompt_ids=prompt.ids)
        served[id] = list(prompt.ids), list(answer.ids)
        return says(answer.text)

    system = {"role": "system", "content": "You know the world."}
    first = ask("first", [system, user("Which animals are there?")])
    ask("second", [system, user("Which animals are there?"), first, user("And what else?\n")])
    wrong = ask("third", [user("Name a city.")])
    store.rate("first", 0, "up")
    store.rate("second", 0, "up")
    store.correct("third", 0, "It is called so.")

    def exchanges(kind, objective):
        rows = export(store, kind).rows
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return [list(each.exchanges) for each in instil.exchanges(instil.read(file, objective=objective), str(tuned))]

    went_on, corrected = exchanges("supervised", None)
    assert len(went_on) == 2
    for exchange, id in zip([*went_on, *corrected], ("first", "second", "third"), strict=True):
        assert exchange.prompt_ids.tolist() == served[id][0]
        assert not exchange.prompt_weights.any()
        assert exchange.completion_weights.all()
        if id != "third":
            assert exchange.completion_ids.tolist()[:-1] == served[id][1]
            assert exchange.completion_ids[-1] in chat.engine.stop_ids
    kept = {each.id: each for each in store.interactions()}
    assert {id: (list(kept[id].prompt_ids), list(kept[id].answers[0].token_ids)) for id in kept} == served
    ((better, worse),) = exchanges("preference", "dpo")
    assert (better.label, worse.label) == ("chosen", "rejected")
    assert better.prompt_ids.tolist() == worse.prompt_ids.tolist() == served["third"][0]
    assert worse.completion_ids.tolist()[:-1] == served["third"][1]
    assert worse.completion_text.startswith(wrong["content"])


def test_statistics(store):
    record(store, "a", [user("One?")], "1.", "I.")
    record(store, "b", [user("One?")], "1.", model="base", hours=7 * 24)
    record(store, "c", [user("Two?")], "2.", hours=-24 * 5)
    store.rate("a", 0, "down")
    store.rate("a", 0, "up")
    store.rate("a", 1, "down")
    store.rate("b", 0, "up")
    store.prefer(("a", 0), ("a", 1))
    store.correct("a", 1, "1.")
    store.author([user("Hi."), says("Hello.")])
    found = statistics(store.overview(), store.judgements())
    assert {name: found[name] for name in ("interactions", "answers", "up", "down")} == {
        "interactions": 3,
        "answers": 4,
        "up": 2,
        "down": 1,
    }
    assert (found["corrections"], found["preferences"], found["dialogues"]) == (1, 1, 1)
    assert found["satisfaction"] == pytest.approx(2 / 3)
    models = {each["model"]: (each["interactions"], each["up"], each["down"]) for each in found["models"]}
    assert models == {"base": (1, 1, 0), "tuned": (2, 1, 1)}
    weeks = [(each["week"], each["interactions"], each["up"], each["satisfaction"]) for each in found["weeks"]]
    assert weeks == [("2026-W18", 1, 0, None), ("2026-W19", 1, 1, 0.5), ("2026-W20", 1, 1, 1.0)]
    only_base = statistics(store.overview(model="base"), store.judgements())
    assert (only_base["up"], only_base["down"], only_base["corrections"], only_base["preferences"]) == (1, 0, 0, 0)


@pytest.mark.parametrize(("successes", "of"), [(0, 1), (1, 1), (3, 7), (0, 40), (40, 40), (499, 1000)])
def test_the_interval_is_that_of_scipy(successes, of):
    expected = binomtest(successes, of).proportion_ci(0.95, method="wilson")
    assert wilson(successes, of) == pytest.approx((expected.low, expected.high), abs=1e-12)
