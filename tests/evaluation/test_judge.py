"""The judge: what goes over the wire, what is kept, what it costs, and what is made of what it says."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.errors import DataError, UsageError
from instil.evaluation.judge import (
    Budget,
    Endpoint,
    Item,
    Mean,
    Pair,
    Question,
    choice,
    judge_criteria,
    judge_pairs,
    judge_single,
    length_controlled,
    rating,
    read_questions,
    win_rates,
)

from .judge_server import SILENT, completion, prefer, rate, running, verdict

QUESTIONS = [
    Question("1", "writing", ("Write of rain.", "Shorter.")),
    Question("2", "maths", ("What is 6 times 7?", "And 7 times 8?"), ("42", "")),
    Question("3", "maths", ("What is 2 and 2?", "And 3 and 3?")),
    Question("four", "writing", ("Name a bird.",)),
]
OURS = {"1": ("Rain falls.", "Rain."), "2": ("It is 42.", SILENT), "3": ("4", "six, of course"), "four": ("Owl",)}
THEIRS = {"1": ("It rains, and rains.", "Rain!!"), "2": ("I think 42.", "56"), "3": ("4", "6"), "four": ("A wren",)}


@pytest.fixture
def server():
    with running() as judge:
        yield judge


@pytest.fixture
def endpoint(server, tmp_path):
    return Endpoint(server.url, "judge", tmp_path / "kept", api_key_env="", workers=1, retries=0)


def asked(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def echo(request, number):
    return 200, {}, completion(request["messages"][-1]["content"].upper())


# The wire.


def test_a_request_is_as_it_should_be(server, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    server.answer = echo
    endpoint = replace(endpoint, api_key_env="JUDGE_KEY", extra={"seed": 3})
    reply = endpoint.complete([{"role": "user", "content": "héllo"}])
    assert (reply.text, reply.finish, reply.tokens) == ("HÉLLO", "stop", 10)
    ((path, key, request),) = server.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-key")
    messages = [{"role": "user", "content": "héllo"}]
    assert request == {"model": "judge", "messages": messages, "temperature": 0.0, "max_tokens": 2048, "seed": 3}
    (kept,) = endpoint.cache.iterdir()
    assert "secret-key" not in kept.read_text() + repr(endpoint)


def test_what_is_not_set_is_not_sent(server, endpoint):
    replace(endpoint, temperature=None, max_tokens=None).complete(
        asked("<<< begin the conversation >>>\n\na\n\n<<< end")[0]
    )
    assert set(server.requests[0][2]) == {"model", "messages"}


def test_requests_go_side_by_side_and_replies_come_in_order(server, endpoint):
    together = threading.Barrier(4, timeout=20)

    def answer(request, number):
        together.wait()  # passes only while four wait at once
        return echo(request, number)

    server.answer = answer
    words = list("abcdefgh")
    replies = replace(endpoint, workers=4).complete_all(asked(*words))
    assert [reply.text for reply in replies] == list("ABCDEFGH")


def test_a_rating_is_asked_with_all_that_came_before(server, endpoint):
    scores = judge_single(QUESTIONS, OURS, endpoint)
    shown = {
        (each.id, each.turn): request[2]["messages"]
        for each, request in zip(scores.items, server.requests, strict=True)
    }
    first, second = (shown["1", turn][1]["content"] for turn in (1, 2))
    assert "Write of rain." in first
    assert "Rain falls." in first
    assert "Shorter." not in first
    places = [second.index(text) for text in ("Write of rain.", "Rain falls.", "Shorter.", "[Answer]\nRain.")]
    assert places == sorted(places)
    # the right answer to the first turn is shown at both, and that to the second, which is none, at neither
    assert [shown["2", turn][1]["content"].count("[Answer]\n42") for turn in (1, 2)] == [1, 1]
    assert [shown["2", turn][1]["content"].count("[Answer]\n") for turn in (1, 2)] == [2, 3]
    assert "<<< begin right answers >>>" in shown["2", 1][1]["content"]
    assert "right answers" in shown["2", 1][0]["content"]
    assert "ight answers" not in json.dumps([shown["3", 1], shown["1", 2], shown["four", 1]])


def test_pairs_are_asked_in_both_orders(server, endpoint):
    ours, theirs = {"1": OURS["1"]}, {"1": THEIRS["1"]}
    (_, second) = judge_pairs(QUESTIONS[:1], ours, theirs, endpoint)
    assert second.longer_by == len("Rain.") - len("Rain!!")
    shown = [request["messages"][1]["content"] for _, _, request in server.requests]
    assert len(shown) == 4
    for one, other, turn in ((shown[0], shown[1], 0), (shown[2], shown[3], 1)):
        for text, first, then in ((one, ours, theirs), (other, theirs, ours)):
            a, b = text.split("<<< begin assistant B >>>")
            assert first["1"][turn] in a
            assert then["1"][turn] in b
            assert first["1"][turn] not in b.replace(then["1"][turn], "")


# What is made of it.


def test_scores_are_those_of_the_rule(endpoint):
    scores = judge_single(QUESTIONS, OURS, endpoint)
    ratings = {("1", 1): 2, ("1", 2): 6, ("2", 1): 10, ("2", 2): None, ("3", 1): 2, ("3", 2): 5, ("four", 1): 4}
    assert {(each.id, each.turn): each.rating for each in scores.items} == ratings
    assert all(ratings[name, turn] == rate(OURS[name][turn - 1]) for name, turn in ratings)
    assert scores.mean == Mean(pytest.approx(29 / 6), 6, 1)
    assert scores.per_turn == {1: Mean(pytest.approx(18 / 4), 4, 0), 2: Mean(pytest.approx(11 / 2), 2, 1)}
    assert scores.per_category == {"writing": Mean(4, 3, 0), "maths": Mean(pytest.approx(17 / 3), 3, 1)}
    assert [each.raw for each in scores.items if each.rating is None] == ["I cannot say."]


def test_without_a_rating_there_is_no_mean(endpoint):
    scores = judge_single([QUESTIONS[3]], {"four": (SILENT,)}, endpoint)
    assert scores.mean == Mean(None, 0, 1)


def test_pairs_are_those_of_the_rule(endpoint):
    pairs = judge_pairs(QUESTIONS, OURS, THEIRS, endpoint)
    expected = []
    for question in QUESTIONS:
        for ours, theirs in zip(OURS[question.id], THEIRS[question.id], strict=True):
            both = (prefer(ours, theirs), prefer(theirs, ours))
            agreed = {("A", "B"): "win", ("B", "A"): "loss"}
            expected.append(None if None in both else agreed.get(both, "tie"))
    assert [pair.outcome for pair in pairs] == expected == ["loss", "tie", "tie", None, "tie", "win", "tie"]
    found = win_rates(pairs)
    assert (found.wins, found.ties, found.losses, found.unparsed, found.inconsistent) == (1, 4, 1, 1, 3)
    assert found.rate == 0.5
    second = win_rates([pair for pair in pairs if pair.turn == 2])
    assert (second.wins, second.ties, second.losses, second.unparsed) == (1, 1, 0, 1)
    assert win_rates([pair for pair in pairs if pair.category == "writing"]).rate == pytest.approx(1 / 3)
    assert [pair.raw for pair in pairs if pair.outcome is None] == [("I cannot say.", "I cannot say.")]


@pytest.mark.parametrize(
    ("as_first", "as_second", "outcome"),
    [
        ("win", "win", "win"),
        ("loss", "loss", "loss"),
        ("win", "loss", "tie"),
        ("win", "tie", "tie"),
        ("tie", "loss", "tie"),
        ("tie", "tie", "tie"),
        (None, "win", None),
        ("loss", None, None),
    ],
)
def test_a_win_is_one_in_both_orders(as_first, as_second, outcome):
    assert Pair("1", "", 1, as_first, as_second, 0, ("", "")).outcome == outcome


def test_criteria_have_prompts_of_their_own(server, endpoint):
    items = [Item("a", "Say hi.", "Hello"), Item("b", "Say it.", SILENT, "odd")]
    found = judge_criteria(items, endpoint)
    assert {name: [each.rating for each in scores.items] for name, scores in found.items()} == {
        "coherence": [6, None],
        "helpfulness": [6, None],
    }
    assert found["coherence"].per_category == {"": Mean(6, 1, 0), "odd": Mean(None, 0, 1)}
    tasks = [request["messages"][0]["content"] for _, _, request in server.requests]
    assert ["coherence" in task for task in tasks] == [True, True, False, False]
    assert ["helpfulness" in task for task in tasks] == [False, False, True, True]
    judge_criteria(items[:1], endpoint, {"wit": "how {funny} it is"})
    assert "its wit: how {funny} it is" in server.requests[-1][2]["messages"][0]["content"]


PROSE = st.text(max_size=30).filter(lambda text: "[[" not in text and not text.endswith("["))


@given(PROSE, st.integers(-5, 20), st.sampled_from(["", " "]), PROSE, st.integers(1, 10))
def test_the_last_rating_counts_if_it_is_one(before, number, space, after, earlier):
    text = f"{before}[[{earlier}]]{before}[[{space}{number}{space}]]{after}"
    assert rating(text) == (number if 1 <= number <= 10 else None)
    assert choice(text) is None


@given(PROSE, st.sampled_from("ABC"), PROSE, st.sampled_from("ABC"))
def test_the_last_choice_counts(before, mark, after, earlier):
    text = f"{before}[[{earlier}]]{before}[[{mark}]]{after}"
    assert choice(text) == {"A": "A", "B": "B", "C": "tie"}[mark]
    assert rating(text) is None


@given(PROSE)
def test_prose_is_no_verdict(text):
    assert rating(text) is None
    assert choice(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[[7.5]]", 7.5), ("[[10.0]]", 10), ("[[10.5]]", None), ("[[0.9]]", None), ("[7]", None), ("[[7/10]]", None)],
)
def test_ratings_at_the_edge(text, expected):
    assert rating(text) == expected


# Win rates at equal length.


def compare(outcomes, longer):
    return [
        Pair(str(n), "", 1, each, each, d, ("", "")) for n, (each, d) in enumerate(zip(outcomes, longer, strict=True))
    ]


def test_the_length_controlled_rate_is_that_of_statsmodels():
    import statsmodels.api as sm

    draw = np.random.default_rng(5)
    for size in (30, 200, 1000):
        longer = draw.integers(-300, 900, size)
        chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / 400))))
        worth = np.where(draw.random(size) < 0.1, 0.5, draw.random(size) < chance)
        x = np.column_stack([np.ones(size), np.tanh(longer / np.std(longer))])
        fitted = sm.GLM(worth, x, family=sm.families.Binomial()).fit(tol=1e-12)
        expected = 1 / (1 + math.exp(-fitted.params[0]))
        assert length_controlled(worth.tolist(), longer.tolist()) == (pytest.approx(expected, abs=1e-7), False)
        names = {1.0: "win", 0.5: "tie", 0.0: "loss"}
        found = win_rates(compare([names[each] for each in worth.tolist()], longer.tolist()))
        assert found.rate == pytest.approx(worth.mean())
        assert found.length_controlled == pytest.approx(expected, abs=1e-7)


def test_a_judge_that_likes_length_alone_sees_no_difference_at_equal_length():
    draw = np.random.default_rng(1)
    longer = draw.normal(300, 300, 4000)
    worth = draw.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    assert worth.mean() > 0.7
    rate_then, regularized = length_controlled(worth.astype(float).tolist(), longer.tolist())
    assert abs(rate_then - 0.5) < 0.03
    assert not regularized


@pytest.mark.parametrize(
    ("worth", "longer"),
    [
        ([1.0] * 6, [1, -2, 3, 5, 8, -9]),
        ([0.0] * 6, [1, -2, 3, 5, 8, -9]),
        ([1.0, 1.0, 0.0, 0.0], [5, 4, -4, -6]),
        ([1.0, 0.5, 0.0], [-7, 2, 4]),
        ([1.0], [3]),
    ],
)
def test_what_would_be_infinite_is_regularized(worth, longer):
    spread = np.std(longer)
    x = np.tanh(np.array(longer) / spread) if spread else np.zeros(len(longer))
    y = np.array(worth)
    # every a and b on ever finer grids, by the formula alone
    middle, width = np.zeros(2), 40.0
    for _ in range(40):
        a, b = (np.linspace(-width, width, 21) + each for each in middle)
        score = a[:, None, None] + b[:, None] * x
        worst = np.sum(np.logaddexp(0, score) - y * score, -1) + (a[:, None] ** 2 + b**2) / (2 * 2.5**2)
        best = np.unravel_index(np.argmin(worst), worst.shape)
        middle, width = np.array([a[best[0]], b[best[1]]]), width * 0.6
    found = win_rates(compare([{1.0: "win", 0.5: "tie", 0.0: "loss"}[each] for each in worth], longer))
    assert found.regularized
    assert found.length_controlled == pytest.approx(1 / (1 + math.exp(-middle[0])), abs=1e-5)
    assert 0 < found.length_controlled < 1


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-2000, 2000)), min_size=1, max_size=40))
def test_the_rates_of_two_models_are_one_together(items):
    worth, longer = zip(*items, strict=True)
    ours, regularized = length_controlled(worth, longer)
    theirs, as_well = length_controlled([1 - each for each in worth], [-each for each in longer])
    assert ours + theirs == pytest.approx(1, abs=1e-5)
    assert regularized == as_well


def test_at_equal_length_the_rate_is_the_raw_one():
    assert length_controlled([1, 1, 0, 0.5], [7, 7, 7, 7]) == (pytest.approx(2.5 / 4), False)
    assert length_controlled([0.5, 0.5], [3, -9]) == (0.5, False)


def test_without_a_verdict_there_is_no_rate():
    found = win_rates(compare([None, None], [1, 2]))
    assert (found.rate, found.length_controlled, found.unparsed) == (None, None, 2)


# What is kept, and what it costs.


def test_a_second_run_asks_nothing(server, endpoint, tmp_path):
    first = judge_single(QUESTIONS, OURS, endpoint)
    count = len(server.requests)
    assert count == len(list(endpoint.cache.iterdir())) == 7
    with running() as elsewhere:
        assert judge_single(QUESTIONS, OURS, replace(endpoint, base_url=elsewhere.url)) == first
        assert elsewhere.requests == []
    assert len(server.requests) == count
    for changed in ({"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}, {"extra": {"seed": 1}}):
        replace(endpoint, **changed).complete_all([[dict(each) for each in server.requests[0][2]["messages"]]])
        count += 1
        assert len(server.requests) == count


def test_what_is_the_same_is_asked_once(server, endpoint):
    server.answer = echo
    seen = []
    replies = replace(endpoint, progress=lambda done, total: seen.append((done, total))).complete_all(
        asked("a", "b", "a")
    )
    assert [reply.text for reply in replies] == ["A", "B", "A"]
    assert len(server.requests) == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]


KILLED = """
import os, signal, sys
from instil.evaluation.judge import Endpoint
def progress(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Endpoint(sys.argv[1], "judge", __import__("pathlib").Path(sys.argv[2]), api_key_env="", workers=1, progress=progress
    ).complete_all([[{"role": "user", "content": text}] for text in "abcdefg"])
"""


def test_a_run_that_is_killed_goes_on_where_it_was(server, endpoint):
    server.answer = echo
    ended = subprocess.run([sys.executable, "-c", KILLED, server.url, str(endpoint.cache)], check=False)
    assert ended.returncode == -9
    assert len(server.requests) == 3
    seen = []
    endpoint = replace(endpoint, workers=4, progress=lambda done, total: seen.append(done))
    assert [reply.text for reply in endpoint.complete_all(asked(*"abcdefg"))] == list("ABCDEFG")
    assert seen == [3, 4, 5, 6, 7]
    assert sorted(request["messages"][0]["content"] for _, _, request in server.requests) == list("abcdefg")


@pytest.mark.parametrize("workers", [1, 8])
def test_a_budget_of_requests_is_kept_exactly(server, endpoint, workers):
    server.answer = echo
    limited = replace(endpoint, workers=workers, budget=Budget(requests=5))
    with pytest.raises(UsageError, match=r"budget of 5 requests is spent: 3 of 8 replies are missing"):
        limited.complete_all(asked(*"abcdefgh"))
    assert len(server.requests) == 5
    with pytest.raises(UsageError, match=r"3 of 8"):  # the budget is that of all calls
        limited.complete_all(asked(*"abcdefgh"))
    assert len(server.requests) == 5
    assert [reply.text for reply in endpoint.complete_all(asked(*"abcdefgh"))] == list("ABCDEFGH")
    assert len(server.requests) == 8
    assert limited.complete_all(asked(*"abcdefgh"))  # what is kept costs nothing


def test_a_budget_of_nothing_says_what_it_would_cost(server, endpoint):
    with pytest.raises(UsageError, match=r"13 of 13 replies are missing"):  # 4 against 4 is one
        judge_pairs(QUESTIONS, OURS, THEIRS, replace(endpoint, budget=Budget(requests=0)))
    assert server.requests == []


def test_a_budget_of_tokens_ends(server, endpoint):
    server.answer = echo  # ten tokens each
    budget = Budget(tokens=25)
    with pytest.raises(UsageError, match=r"budget of 25 tokens is spent: 5 of 8"):
        replace(endpoint, budget=budget).complete_all(asked(*"abcdefgh"))
    assert (budget.asked, budget.used, len(server.requests)) == (3, 30, 3)


def test_tokens_that_are_not_counted_are_no_budget(server, endpoint):
    server.answer = lambda request, number: (200, {}, completion("yes", tokens=None))
    with pytest.raises(UsageError, match="does not count tokens"):
        replace(endpoint, budget=Budget(tokens=25)).complete_all(asked(*"abc"))
    assert len(server.requests) == 1
    assert [reply.tokens for reply in endpoint.complete_all(asked(*"abc"))] == [None] * 3
    assert len(server.requests) == 3  # the first was kept all the same


# Errors.


@pytest.mark.parametrize(
    ("status", "body", "what", "remedy"),
    [
        (401, {"error": {"message": "bad key sk-123456"}}, r"the key is refused: .*bad key \*\*\*", "See what THE_KEY"),
        (403, {"error": {"message": "not yours"}}, "the key is refused: .*not yours", "See what THE_KEY"),
        (404, {"error": {"message": "no such model"}}, "does not know the model 'judge'", "often ends in /v1"),
        (
            429,
            {"error": {"message": "slow down"}},
            "still refuses for haste, with up to 2 rep.*slow down",
            "fewer workers",
        ),
        (500, {"error": {"message": "oops"}}, "still fails, with up to 2 repetitions: .*oops", "own log"),
        (503, "down", "still fails, with up to 2 repetitions", "own log"),
        (200, '{"choices": [', "what came cannot be read", "often ends in /v1"),
        (200, '"hello"', "what came is no chat completion: 'hello'", "often ends in /v1"),
        (200, "[]", "what came is no chat completion", "often ends in /v1"),
        (200, {"object": "list"}, "what came is no chat completion", "often ends in /v1"),
    ],
)
def test_an_endpoint_that_fails_is_named_with_what_to_do(server, endpoint, monkeypatch, status, body, what, remedy):
    monkeypatch.setenv("THE_KEY", "sk-123456")
    good = server.answer = echo
    endpoint = replace(endpoint, retries=2, api_key_env="THE_KEY")
    endpoint.complete_all(asked("a", "b"))
    server.answer = lambda request, number: (status, {"retry-after-ms": "1"}, body)
    with pytest.raises(UsageError, match=f"(?s){what}") as caught:
        endpoint.complete_all(asked(*"abcde"))
    assert server.url in str(caught.value)
    assert "(3 of 5 replies are missing)" in caught.value.message
    assert remedy in caught.value.remedy
    assert "sk-123456" not in str(caught.value)
    # one request alone is tried, and again only where that may help
    assert len(server.requests) == 2 + (3 if status in (429, 500, 503) else 1)
    server.answer, server.requests = good, []
    assert len(endpoint.complete_all(asked(*"abcde"))) == 5
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (400, {"error": {"message": "too long"}}, "the message that begins 'b' is refused: .*too long"),
        (200, {**completion(""), "choices": []}, "an empty reply came to the message that begins 'b'"),
        (200, completion(None), "an empty reply came to the message that begins 'b'"),
    ],
)
def test_what_one_request_is_refused_the_others_get(server, endpoint, status, body, what):
    def answer(request, number):
        return (status, {}, body) if request["messages"][0]["content"] == "b" else echo(request, number)

    server.answer = answer
    with pytest.raises(UsageError, match=f"{what}.*1 of 4 replies are missing"):
        endpoint.complete_all(asked(*"abcd"))
    assert len(list(endpoint.cache.iterdir())) == 3


def test_an_empty_message_is_a_reply_without_a_verdict(server, endpoint):
    server.answer = lambda request, number: (200, {}, completion("", finish="length"))
    assert judge_single([QUESTIONS[3]], {"four": ("Owl",)}, endpoint).mean == Mean(None, 0, 1)


def test_it_waits_as_long_as_it_is_told(server, endpoint):
    server.answer = lambda request, number: (
        echo(request, number) if number else (429, {"Retry-After": "1"}, {"error": {"message": "wait"}})
    )
    begin = time.monotonic()
    assert replace(endpoint, retries=1).complete(asked("a")[0]).text == "A"
    assert time.monotonic() - begin >= 1  # the client's own first wait is half a second at most


def test_an_endpoint_that_is_not_there(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UsageError, match=r"it cannot be reached: .*refused") as caught:
            replace(endpoint, base_url=url).complete_all(asked(*"abc"))
    assert "See that it runs" in caught.value.remedy


def test_an_endpoint_that_never_answers(server, endpoint):
    done = threading.Event()

    def answer(request, number):
        done.wait(20)
        return echo(request, number)

    server.answer = answer
    try:
        with pytest.raises(UsageError, match=r"no reply within 0\.2 s, with up to 0 repetitions") as caught:
            replace(endpoint, timeout=0.2).complete_all(asked(*"abc"))
    finally:
        done.set()
    assert "longer timeout" in caught.value.remedy
    assert len(server.requests) == 1


def test_a_key_that_is_not_set(endpoint, server, monkeypatch):
    monkeypatch.delenv("NO_KEY_HERE", raising=False)
    with pytest.raises(UsageError, match="the environment variable NO_KEY_HERE"):
        replace(endpoint, api_key_env="NO_KEY_HERE").complete_all(asked("a"))
    assert server.requests == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000"},
        {"model": ""},
        {"workers": 0},
        {"retries": -1},
        {"timeout": 0},
        {"max_tokens": 0},
        {"extra": {"stream": True}},
    ],
)
def test_an_argument_that_cannot_be(endpoint, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(endpoint, **wrong)


def test_a_folder_that_cannot_be_used(server, endpoint, tmp_path):
    server.answer = echo
    endpoint.complete_all(asked("a"))
    (kept,) = endpoint.cache.iterdir()
    kept.write_text("{")
    with pytest.raises(UsageError, match=f"{kept.name}: a reply that was kept cannot be read") as caught:
        endpoint.complete_all(asked("a"))
    assert caught.value.remedy == "Delete the file."
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: cannot be made a folder"):
        replace(endpoint, cache=tmp_path / "file").complete_all(asked("b"))


# Files.


def write(path: Path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_questions_are_read(tmp_path):
    path = write(
        tmp_path / "questions.jsonl",
        {"question_id": 81, "category": "maths", "turns": ["One?", "Two?"], "reference": ["1", "2"]},
        {"question_id": "b", "category": "writing", "turns": ["Write."], "other": 1},
        {"question_id": 3, "category": "writing", "turns": ["Write.", "On."], "reference": None},
    )
    right = write(
        tmp_path / "right.jsonl",
        {"question_id": 3, "choices": [{"index": 0, "turns": ["x", ""]}]},
        {"question_id": 99, "choices": [{"turns": ["of another file"]}]},
    )
    expected = [
        Question("81", "maths", ("One?", "Two?"), ("1", "2")),
        Question("b", "writing", ("Write.",)),
        Question("3", "writing", ("Write.", "On.")),
    ]
    assert read_questions(path) == expected
    assert read_questions(path, right) == [*expected[:2], replace(expected[2], references=("x", ""))]
    plain = write(tmp_path / "a.jsonl", {"question_id": 81, "turns": ["", "b"]})
    assert read_questions(path, plain)[0].references == ("", "b")


def test_all_bad_rows_are_named(tmp_path):
    good = {"question_id": 1, "category": "c", "turns": ["a", "b"]}
    path = write(
        tmp_path / "questions.jsonl",
        good,
        "{",
        good,
        {"question_id": True, "category": "c", "turns": ["a"]},
        {"question_id": 5, "categories": "c", "turns": "a"},
        {"question_id": 6, "category": " ", "turns": []},
        {"question_id": 7, "category": "c", "turns": ["a", 3]},
        {"question_id": 8, "category": "c", "turns": ["a", ""], "reference": ["x"]},
        {"category": 3, "turns": ["a"]},
    )
    with pytest.raises(DataError) as caught:
        read_questions(path)
    found = [(problem.source.rpartition(":")[2], problem.field) for problem in caught.value.problems]
    assert found == [
        ("2", ""),
        ("3", "question_id"),
        ("4", "question_id"),
        ("5", "category"),
        ("5", "turns"),
        ("6", "category"),
        ("6", "turns"),
        ("7", "turns[1]"),
        ("8", "turns[1]"),
        ("8", "reference"),
        ("9", "question_id"),
        ("9", "category"),
    ]
    assert f"{path}:1 already" in str(caught.value)
    assert "did you mean 'categories'?" in str(caught.value)


def test_bad_answers_are_named(tmp_path):
    path = write(
        tmp_path / "answers.jsonl",
        {"question_id": 1, "choices": []},
        {"question_id": 2, "choices": [{"turns": ["a"]}, {"turns": ["b"]}]},
        {"question_id": 3, "choices": [{"turn": ["a"]}]},
        {"question_id": 4},
    )
    questions = write(tmp_path / "q.jsonl", {"question_id": 1, "category": "c", "turns": ["a", "b"]})
    with pytest.raises(DataError) as caught:
        read_questions(questions, path)
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["choices", "choices", "choices[0].turns", "turns"]
    right = write(tmp_path / "right.jsonl", {"question_id": 1, "turns": ["a"]})
    with pytest.raises(DataError, match="answers 1 turns, and the question 1 has 2"):
        read_questions(questions, right)
    with pytest.raises(DataError, match="holds no rows"):
        read_questions(write(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "body",
    [
        "{nope",
        "[1]",
        {"choices": [3]},
        {"choices": "none"},
        completion(5),
        completion("[[3]]", finish=7),
        {**completion("[[3]]"), "usage": {"total_tokens": "many"}},
        {**completion("[[3]]"), "usage": [1]},
    ],
)
def test_what_is_no_completion_is_told_of_and_not_kept(server, endpoint, body):
    server.answer = lambda request, number: (200, {}, body)
    with pytest.raises(UsageError, match=r"what came (is no chat completion|cannot be read)"):
        judge_single([QUESTIONS[3]], {"four": ("a",)}, endpoint)
    assert not [*endpoint.cache.glob("*")]


def test_a_place_that_keeps_no_replies_is_refused_before_anything_is_asked(server, endpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is no folder"):
        replace(endpoint, cache=tmp_path / "file").check()
    with pytest.raises(UsageError, match="NO_SUCH_KEY"):
        replace(endpoint, api_key_env="NO_SUCH_KEY").check()
    endpoint.check()
    assert server.requests == []


def test_answers_that_do_not_fit_the_questions(server, endpoint):
    with pytest.raises(UsageError, match=r"the model has not .*2 questions: 1 \(1 answers to 2 turns\), four \(0"):
        judge_single(QUESTIONS, {"1": ("a",), "2": ("a", "b"), "3": ("a", "b")}, endpoint)
    with pytest.raises(UsageError, match=r"the baseline has answered questions that are not among these: five"):
        judge_pairs(QUESTIONS, OURS, {**THEIRS, "five": ("a",)}, endpoint)
    assert server.requests == []


def test_the_server_reads_the_prompts():
    """The rule of the tests is applied to the answers themselves, so it must find them."""
    from instil.evaluation.judge import prompts

    shown = prompts.pair(("q", "r"), ("one", "two"), ("three", "fourteen"), ("x", "y"))
    assert verdict(shown).endswith(f"[[{prefer('two', 'fourteen')}]]")
    assert verdict(prompts.single(("q",), ("12345",))).endswith("[[6]]")
