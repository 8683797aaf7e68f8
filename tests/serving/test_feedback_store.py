"""The store of interactions and judgements: nothing acknowledged is lost, nothing deleted is left."""

import asyncio
import contextlib
import glob
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from instil.errors import UsageError
from instil.serving import run
from instil.serving.feedback import Deleted, Given, Interaction, NotRecordedError, Store, StoreError
from instil.serving.feedback.values import Overview

NOW = datetime(2026, 5, 4, 12, 30, 15, 123456, tzinfo=UTC)
ASKED = Interaction(
    id="chatcmpl-1",
    time=NOW,
    model="tuned",
    model_hash="ab12",
    template="chatml",
    template_hash="cd34",
    kind="chat",
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}),
    tools=({"type": "function", "function": {"name": "look", "parameters": {"z": 1, "a": 2}}},),
    sampling={"temperature": 0.7, "stop": ["END"]},
    prompt_ids=(5, 6, 7),
    answers=(Given("Because.", (), "stop", (8, 9)), Given("No", (), "length", (8,))),
    client="page",
)


def asked(id, **changes):
    return replace(ASKED, id=id, **changes)


@pytest.fixture(scope="session")
def postgresql():
    """The URL of a PostgreSQL that runs on a temporary folder."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(path.split("/")[4]))
    initdb = found[-1] if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (initdb)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if os.getuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    as_other = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    pg_ctl = str(Path(initdb).with_name("pg_ctl"))
    folder = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # short: a socket's path has 107 bytes at most
    try:
        if as_other:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"

        def run(*command):
            done = subprocess.run([*as_other, *command], cwd="/", capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

        run(initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "-E", "UTF8")
        quick = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(pg_ctl, "-D", data, "-w", "-o", quick, "-l", f"{data}/log", "start")
        try:
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request, tmp_path):
    """A folder, or the URL of a database in which nothing stands."""
    if request.param == "sqlite":
        return str(tmp_path / "kept")
    url = request.getfixturevalue("postgresql")
    import psycopg

    name = f"of_{os.getpid()}_{random.randrange(10**9)}"
    host = url.partition("host=")[2]
    with psycopg.connect(f"host={host} user=tester dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.replace("/postgres?", f"/{name}?")


@pytest.fixture
def store(target):
    with Store(target) as opened:
        yield opened


def test_what_is_recorded_comes_back(store, target):
    assert store.record(ASKED) == "chatcmpl-1"
    odd = Given(
        "half \ud83d, and \x00", ({"id": "1", "function": {"name": "f", "arguments": "{}"}},), "stop-string", ()
    )
    store.record(asked("chatcmpl-2", time=NOW - timedelta(hours=1), tools=(), prompt_ids=None, answers=(odd,)))
    with Store(target, create=False) as again:
        second, first = again.interactions()
    assert first == ASKED
    assert list(first.tools[0]["function"]["parameters"]) == ["z", "a"], "a template writes keys in their order"
    assert second.answers == (odd,)
    assert second.prompt_ids is None
    assert second.time == NOW - timedelta(hours=1)


def test_times_of_other_zones(store):
    east = NOW.astimezone(tz=datetime.strptime("+0530", "%z").tzinfo)
    store.record(asked("a", time=east))
    store.record(asked("b", time=NOW + timedelta(minutes=1), model="base"))
    assert [each.time for each in store.interactions()] == [NOW, NOW + timedelta(minutes=1)]
    assert [each.id for each in store.interactions(since=NOW + timedelta(seconds=1))] == ["b"]
    assert [each.id for each in store.interactions(model="tuned")] == ["a"]
    assert [each.id for each in store.interactions(last=1)] == ["b"]
    assert store.overview(model="base") == [Overview("b", NOW + timedelta(minutes=1), "base", 2)]


def test_judgements_are_kept_in_order(store):
    store.record(ASKED)
    store.record(asked("chatcmpl-2"))
    ids = [
        store.rate("chatcmpl-1", 0, "down", "too short"),
        store.rate("chatcmpl-1", 0, None),
        store.correct("chatcmpl-1", 1, "No, it is not."),
        store.prefer(("chatcmpl-2", 1), ("chatcmpl-1", 0)),
        store.author([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]),
    ]
    kept = store.judgements()
    assert [each.id for each in kept] == ids
    assert [each.kind for each in kept] == ["rating", "rating", "correction", "preference", "dialogue"]
    assert kept[0].body == {"value": "down", "comment": "too short"}
    assert kept[1].body == {"value": None}
    assert (kept[2].interaction, kept[2].choice, kept[2].body) == ("chatcmpl-1", 1, {"content": "No, it is not."})
    assert (kept[3].interaction, kept[3].choice, kept[3].rejected, kept[3].rejected_choice) == (
        *("chatcmpl-2", 1),
        *("chatcmpl-1", 0),
    )
    assert kept[4].body["messages"][1] == {"role": "assistant", "content": "Hello."}
    assert all(abs(each.time - datetime.now(UTC)) < timedelta(minutes=5) for each in kept)
    assert {each.id for each in store.interactions(judged=True)} == {"chatcmpl-1", "chatcmpl-2"}


def test_what_is_not_there_cannot_be_judged(store):
    store.record(ASKED)
    for call in (
        lambda: store.rate("chatcmpl-9", 0, "up"),
        lambda: store.rate("chatcmpl-1", 2, "up"),
        lambda: store.rate("chatcmpl-1", -1, "up"),
        lambda: store.correct("chatcmpl-9", 0, "Yes."),
        lambda: store.prefer(("chatcmpl-1", 0), ("chatcmpl-1", 2)),
    ):
        with pytest.raises(NotRecordedError, match="chatcmpl-"):
            call()
    store.record(asked("chatcmpl-2", messages=({"role": "user", "content": "Else?"},)))
    with pytest.raises(UsageError, match="chatcmpl-1 and chatcmpl-2 answer different conversations"):
        store.prefer(("chatcmpl-1", 0), ("chatcmpl-2", 0))
    with pytest.raises(UsageError, match="better than itself"):
        store.prefer(("chatcmpl-1", 0), ("chatcmpl-1", 0))
    with pytest.raises(UsageError, match="'better'"):
        store.rate("chatcmpl-1", 0, "better")
    with pytest.raises(UsageError, match="empty"):
        store.correct("chatcmpl-1", 0, " \n")
    with pytest.raises(UsageError, match="200,001 characters, and may have 200,000"):
        store.correct("chatcmpl-1", 0, "x" * 200_001)
    with pytest.raises(StoreError, match="chatcmpl-1 is recorded already"):
        store.record(ASKED)
    assert store.judgements() == []


def test_a_dialogue_is_kept_in_one_way_whichever_it_came_in(store):
    asks = [{"from": "human", "value": "Hi."}, {"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    for ask in asks:
        store.author([ask, {"from": "gpt", "value": "Hello.", "weight": 0.5}])
    store.author([{"role": "user", "content": "字" * 190_000}, {"role": "assistant", "content": "Hello."}])
    first, second, _ = store.judgements()
    assert first.body == second.body
    assert first.body["messages"] == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello.", "weight": 0.5},
    ]


def test_a_dialogue_that_training_would_refuse(store):
    messages = [{"role": "user", "content": "Hi."}, {"role": "usr", "content": "?"}]
    with pytest.raises(UsageError, match=r"messages\[1\].role: no such role: the string 'usr'"):
        store.author(messages)
    with pytest.raises(UsageError, match="has no assistant turn"):
        store.author(messages[:1])
    with pytest.raises(UsageError, match="turns out of order: user follows user"):
        store.author([messages[0], messages[0], {"role": "assistant", "content": "Hello."}])
    assert store.judgements() == []


def test_redaction(target):
    said = ASKED.messages[1] | {
        "content": [{"type": "text", "text": "I am ann@ex"}, {"type": "text", "text": "ample.org"}]
    }
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"to":"+1 415 555 2671", "n": 1}'}}
    with Store(target) as store:
        store.record(asked("plain"))
        store.record(asked("prompt", messages=(said,)))
        store.record(asked("answer", answers=(Given("Pay 4111 1111 1111 1111.", (call,), "stop", (1, 2)),)))
        store.record(asked("stop", sampling={"stop": ["ann@example.org"], "seed": 4155552671}))
        store.rate("plain", 0, "up", "tell ann@example.org")
        store.correct("plain", 0, "Write to ann@example.org")
        store.author([{"role": "user", "content": "415-555-2671"}, {"role": "assistant", "content": "Yes?"}])
        kept = {each.id: each for each in store.interactions()}
        judged = store.judgements()
    assert kept["plain"].prompt_ids == (5, 6, 7)
    assert not kept["plain"].redacted
    assert kept["prompt"].messages[0]["content"] == "I am [email]"
    assert kept["answer"].answers[0].content == "Pay [card]."
    arguments = kept["answer"].answers[0].tool_calls[0]["function"]["arguments"]
    assert json.loads(arguments) == {"to": "[phone]", "n": 1}
    assert kept["stop"].sampling == {"stop": ["[email]"], "seed": 4155552671}
    for name in ("prompt", "answer", "stop"):
        assert kept[name].redacted
        assert kept[name].prompt_ids is None
        assert {each.token_ids for each in kept[name].answers} == {None}
    assert judged[0].body["comment"] == "tell [email]"
    assert judged[1].body["content"] == "Write to [email]"
    assert judged[2].body["messages"][0]["content"] == "[phone]"
    assert all(each.redacted for each in judged)


def test_redaction_may_be_off(target):
    with Store(target, redact=False) as store:
        store.record(asked("a", messages=({"role": "user", "content": "I am ann@example.org"},)))
        (kept,) = store.interactions()
    assert kept.messages[0]["content"] == "I am ann@example.org"
    assert (kept.prompt_ids, kept.redacted) == ((5, 6, 7), False)


def test_deleting(store):
    for name in ("a", "b", "c"):
        store.record(asked(name))
    store.rate("a", 0, "up")
    second = store.prefer(("b", 0), ("a", 0))
    third = store.rate("b", 0, "down")
    store.rate("c", 0, "up")
    with pytest.raises(NotRecordedError, match="nothing, feedback-99: not recorded"):
        store.delete(["feedback-99", "b", "nothing"])
    assert len(store.interactions()) == 3, "nothing is deleted where one is not there"
    assert store.delete(["a"]) == Deleted(1, 2), "the comparison with it goes with it"
    assert second not in [each.id for each in store.judgements()]
    assert store.delete([third]) == Deleted(0, 1)
    assert [each.id for each in store.interactions()] == ["b", "c"]
    new = store.rate("b", 0, "up")
    assert new not in (second, third), "the id of a deleted one is not given again"
    assert store.delete_before(None) == Deleted(2, 2)
    assert (store.interactions(), store.judgements()) == ([], [])


def test_retention(target):
    with Store(target, retention_days=30) as store:
        now = datetime.now(UTC)
        store.record(asked("old", time=now - timedelta(days=30, minutes=1)))
        store.record(asked("new", time=now - timedelta(days=29, hours=23)))
        store.rate("old", 0, "up")
        store.rate("new", 0, "up")
        store.author([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
        assert store.expire() == Deleted(1, 1)
        assert store.expire() == Deleted(0, 0)
        assert [each.id for each in store.interactions()] == ["new"]
        assert [each.kind for each in store.judgements()] == ["rating", "dialogue"]
        assert store.delete_before(datetime.now(UTC) + timedelta(minutes=1)) == Deleted(1, 2)
    with Store(target) as store:
        store.record(asked("old", time=NOW - timedelta(days=9999)))
        assert store.expire() == Deleted(0, 0)
    with pytest.raises(UsageError, match="a retention of 0 days"):
        Store(target, retention_days=0)


def test_the_bytes_of_what_was_deleted_are_gone(tmp_path):
    """Of long and short texts, in whatever page they came to stand, with another connection open."""
    draw = random.Random(5)
    folder = tmp_path / "kept"

    def held():
        return b"".join(path.read_bytes() for path in folder.iterdir())

    with Store(folder) as store, Store(folder) as other:
        kept, number = {}, 0
        for _ in range(4):
            for _ in range(60):
                number += 1
                mark = f"<mark{number:06d}>"
                content = mark * draw.choice([1, 3, 40, 300, 2000])
                store.record(asked(f"id{mark}", messages=({"role": "user", "content": content},)))
                store.correct(f"id{mark}", 0, f"{mark} is better")
                kept[f"id{mark}"] = mark
            gone = draw.sample(sorted(kept), 30)
            assert all(kept[each].encode() in held() for each in gone)
            assert len(other.interactions()) == len(kept)
            store.delete(gone)
            after = held()
            assert [each for each in gone if kept.pop(each).encode() in after] == []
            assert all(mark.encode() in after for mark in kept.values())
        store.delete_before(None)
        assert b"<mark" not in held()


async def expired_once(store, monkeypatch):
    """What a server does from time to time, once."""

    async def end(_):
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", end)
    with contextlib.suppress(asyncio.CancelledError):
        await run._expire(store)


def test_bytes_that_a_reader_holds_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("instil.serving.feedback.database._BUSY_SECONDS", 0.05)
    with Store(tmp_path, retention_days=1) as store:
        store.record(asked("a", time=NOW - timedelta(days=9000)))
        reader = sqlite3.connect(tmp_path / "interactions.sqlite3", isolation_level=None)
        with contextlib.closing(reader):
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM instil_interactions").fetchone()
            with pytest.raises(StoreError, match="the rows are deleted, but the files still hold their bytes"):
                store.expire()
            asyncio.run(expired_once(store, monkeypatch))
            assert "instil: what is older than --retention-days is not all deleted: " in capsys.readouterr().err
        assert store.expire() == Deleted(0, 0)
        assert b"chatml" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_only_the_owner_may_read_it(tmp_path):
    with Store(tmp_path / "new" / "kept") as store:
        store.record(ASKED)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "kept").iterdir()}
    assert modes["interactions.sqlite3"] == modes["interactions.sqlite3-wal"] == 0o600
    assert stat.S_IMODE((tmp_path / "new" / "kept").stat().st_mode) == 0o700


def test_a_later_version_is_refused(target, tmp_path):
    with Store(target) as store, store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE instil_schema SET version = 2")
    with pytest.raises(StoreError, match="tables are of version 2, and this Instil knows version 1"):
        Store(target)


def test_targets_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "interactions.sqlite3").write_text("this is no database, but a text of some length" * 30)
    for target, reason in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "no", "file is not a database"),
        ("mysql://user:secret@host/name", r"mysql://user:\*\*\*@host/name: is no database that is known here"),
        ("sqlite://", "would be lost with the process"),
        ("nonsense://", "is no (URL|database)"),
        ("postgresql://nobody@127.0.0.1:1/none", "(refused|needs the package)"),
    ):
        with pytest.raises((UsageError, StoreError), match=reason) as caught:
            Store(target)
        assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="--phone-region de: is no country code\n  did you mean 'DE'"):
        Store(tmp_path / "kept", phone_region="de")
    for target in (tmp_path / "nowhere", f"sqlite:///{tmp_path}/nowhere/file.sqlite3"):
        with pytest.raises(UsageError, match="nothing was recorded there"):
            Store(target, create=False)
    assert not (tmp_path / "nowhere").exists()
    with Store(f"sqlite:///{tmp_path}/named/file.sqlite3") as store:
        store.record(ASKED)
    assert (tmp_path / "named" / "file.sqlite3").exists()


def test_errors_tell_nothing_of_the_texts(tmp_path):
    with Store(tmp_path) as store:
        with store._engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE instil_interactions")
        with pytest.raises(StoreError) as caught:
            store.record(asked("a", messages=({"role": "user", "content": "a secret"},)))
    shown, cause = str(caught.value), str(caught.value.__cause__)
    assert "no such table" in shown
    assert "secret" not in shown + cause


def test_threads_share_a_store(store):
    store.record(ASKED)

    def work(n):
        store.record(asked(f"by-{n}"))
        store.rate("chatcmpl-1", 0, "up")
        return len(store.judgements())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert len(store.interactions()) == 41
    assert len({each.number for each in store.judgements()}) == 40


WORKER = """
import sys
from dataclasses import replace
from instil.serving.feedback import Given, Interaction, Store
from datetime import UTC, datetime
target, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
asked = Interaction("", datetime.now(UTC), "tuned", "ab", "chatml", "cd", "chat",
    ({"role": "user", "content": "Why?"},), (), {}, (1, 2), (Given("Because.", (), "stop", (3,)),))
store = Store(target)
for n in range(count):
    store.record(replace(asked, id=f"{name}-{n}"))
    print(f"{name}-{n}", store.rate(f"{name}-{n}", 0, "up"), flush=True)
"""


def worker(target, name, count):
    command = [sys.executable, "-c", WORKER, target, name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_store_that_none_of_them_found(target):
    started = [worker(target, name, 20) for name in ("a", "b", "c")]
    told = []
    for each in started:
        out, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
        told += [line.split() for line in out.splitlines()]
    with Store(target, create=False) as store:
        assert {each.id for each in store.interactions()} == {name for name, _ in told}
        assert {each.id: each.interaction for each in store.judgements()} == {rating: name for name, rating in told}
    assert len(told) == 60


@pytest.mark.parametrize("after", [1, 23, *(pytest.param(each, marks=pytest.mark.prove) for each in (2, 7, 40, 111))])
def test_what_was_acknowledged_survives_a_kill(target, after):
    """Killed while it writes, at whatever it is at when it has acknowledged so many."""
    told = []
    with worker(target, "killed", 100_000) as running:
        killer = threading.Timer(60, running.kill)
        killer.start()
        for line in running.stdout:
            told.append(line.split())
            if len(told) == after:
                running.send_signal(signal.SIGKILL)  # the pipe may hold more of them, and they count as well
        killer.cancel()
    assert running.returncode == -signal.SIGKILL
    told = [each for each in told if len(each) == 2]
    assert len(told) >= after
    with Store(target, create=False) as store:
        assert {name for name, _ in told} <= {each.id for each in store.interactions()}
        kept = {each.id: (each.interaction, each.body["value"]) for each in store.judgements()}
        assert {rating: (name, "up") for name, rating in told}.items() <= kept.items()
        assert store.rate(told[0][0], 0, "down") not in kept, "it goes on from there"
