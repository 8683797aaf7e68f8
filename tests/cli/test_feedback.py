"""`instil feedback` through the real command."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

import instil as library
from instil.serving.feedback import Given, Interaction, Store

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
ASKED = Interaction(
    "chatcmpl-1",
    NOW,
    "tuned",
    "ab12",
    "chatml",
    "cd34",
    "chat",
    ({"role": "user", "content": "Why \x1b[31mis\n that?"},),
    (),
    {"temperature": 0.5},
    (1, 2),
    (Given("Because.", (), "stop", (3,)), Given("No idea", (), "length", (4,))),
)


@pytest.fixture
def record(tmp_path):
    """Three interactions and a dialogue, judged; the folder that holds them."""
    with Store(tmp_path / "kept") as store:
        store.record(ASKED)
        store.record(replace(ASKED, id="chatcmpl-2", model="base", answers=(Given("Ask ann@example.com."),)))
        store.record(replace(ASKED, id="chatcmpl-3", time=NOW + timedelta(days=7)))
        store.rate("chatcmpl-1", 0, "up")
        store.rate("chatcmpl-1", 1, "up")
        store.rate("chatcmpl-2", 0, "down")
        store.correct("chatcmpl-3", 0, "So it is.")
        store.prefer(("chatcmpl-1", 0), ("chatcmpl-2", 0))
        store.author([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    return "kept"


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_export(instil, record, tmp_path):
    done = instil("feedback", "export", "--record", record, "--output", "good.jsonl", "--kind", "supervised")
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "instil: left out: 1 cut off, stopped or empty",
        "instil: wrote good.jsonl: 3 rows (1 rated up, 1 corrected, 1 authored)",
    ]
    records = list(library.read(tmp_path / "good.jsonl"))
    assert [each.conversations[0].messages[-1].content for each in records] == ["Because.", "So it is.", "Hello."]
    assert [each.extra["provenance"][0]["why"] for each in records] == ["rated-up", "corrected", "authored"]
    again = instil("feedback", "export", "--record", record, "--output", "good.jsonl", "--kind", "supervised", code=2)
    assert again.stderr.startswith("instil: --output good.jsonl: is there already")


def test_export_of_pairs_and_labels(instil, record, tmp_path):
    def export(name, *flags):
        return instil("feedback", "export", "--record", record, "--output", name, *flags).stderr.splitlines()

    assert export("pairs.jsonl", "--kind", "preference") == [
        "instil: wrote pairs.jsonl: 2 rows (1 better of two, 1 corrected)"
    ]
    assert {each.kind for each in library.read(tmp_path / "pairs.jsonl", objective="dpo")} == {"preference"}
    assert export("more.jsonl", "--kind", "preference", "--pairs-from-ratings") == [
        "instil: left out: 1 cut off, stopped or empty",
        "instil: left out: 1 there already",
        "instil: wrote more.jsonl: 2 rows (1 better of two, 1 corrected)",
    ]
    assert export("one.jsonl", "--kind", "labelled", "--model", "base") == [
        "instil: wrote one.jsonl: 1 row (1 rated down)"
    ]
    (row,) = rows(tmp_path / "one.jsonl")
    assert (row["label"], row["messages"][-1]["content"]) == (False, "Ask [email].")
    export("late.jsonl", "--kind", "supervised", "--since", "2026-05-05", "--model", "tuned")
    assert [each["messages"][-1]["content"] for each in rows(tmp_path / "late.jsonl")] == ["So it is."]


def test_nothing_to_export(instil, record, tmp_path):
    flags = ("--record", record, "--output", "none.jsonl", "--kind", "labelled", "--model", "other")
    told = instil("feedback", "export", *flags, code=2).stderr
    assert told == "instil: kept: nothing in it makes a row of kind labelled\n  See what is: instil feedback stats\n"
    assert not (tmp_path / "none.jsonl").exists()


WRONG = [
    (
        "export --record kept --output a.jsonl --kind labelled --pairs-from-ratings",
        "makes no rows of kind labelled",
    ),
    (
        "export --record kept --output no/a.jsonl --kind labelled",
        "--output no/a.jsonl: the folder no does not exist",
    ),
    ("export --record kept --output a.jsonl --kind labeled", '"labeled"'),
    (
        "export --record kept --output a.jsonl --knid labelled",
        "--knid: there is no such flag\n  did you mean '--kind'?",
    ),
    ("list --record kpet", "kpet: nothing was recorded there"),
    ("list", "--record: is missing\n  Name the folder, or the URL"),
    ("list --record kept --since yesterday", "--since yesterday: is no day\n  Write it as 2026-05-31."),
    ("list --record kept --last -1", "--last -1: must be 0 or more"),
    ("lst --record kept", "feedback lst: there is no such command\n  did you mean 'list'?"),
    ("delete --record kept", "what is to be deleted is not said"),
    ("delete chatcmpl-1 --record kept --all", "said twice"),
    ("delete chatcmpl-1 --record kept", "there is no terminal to ask in\n  Say --yes"),
    ("delete chatcmpl-9 feedback-1 --record kept --yes", "chatcmpl-9: not recorded"),
    ("stats --record mysql://ann:secret@host/name", "mysql://ann:***@host/name: is no database that is known here"),
]
RUN = """
import contextlib, io, json, sys
from instil.cli.main import main
told = []
for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(command.split())
        except SystemExit as error:
            told.append([error.code, said.getvalue()])
json.dump(told, sys.stdout)
"""


def test_what_cannot_be(record, tmp_path):
    """All in one process, which takes long to start."""
    given = json.dumps([f"feedback {command}" for command, _ in WRONG])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=given, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for (command, reason), (code, told) in zip(WRONG, json.loads(done.stdout), strict=True):
        assert code == 2, command
        assert reason in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    with Store(tmp_path / "kept") as store:
        assert (len(store.interactions()), len(store.judgements())) == (3, 6)


def test_list(instil, record):
    shown = instil("feedback", "list", "--record", record).stdout
    assert "\x1b" not in shown
    lines = [line.rstrip() for line in shown.splitlines()]
    assert lines[0].split() == ["Time", "Id", "Model", "Asked", "Answered", "Judged"]
    assert "chatcmpl-1" in lines[2]
    assert "Why ␛[31mis that?" in lines[2]
    assert lines[2].endswith("Because. (and 1 more)   up 2, compared")
    assert lines[3].split()[-4:] == ["Ask", "[email].", "down,", "compared"]
    assert lines[4].startswith("2026-05-11 12:00")
    assert lines[5].endswith("written")
    assert len(lines) == 6
    assert "chatcmpl-1" not in instil("feedback", "list", "--record", record, "--last", "3").stdout


def test_ids_are_whole_in_a_narrow_terminal(record, tmp_path):
    """One that shows no styles is 80 columns wide to Rich."""
    long = f"chatcmpl-{'0123456789abcdef' * 2}"
    with Store(tmp_path / "kept") as store:
        store.record(replace(ASKED, id=long))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "instil", "feedback", "list", "--record", record]
    subprocess.run(command, stdout=theirs, cwd=tmp_path, check=True, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # so ends what nobody writes to
        while piece := screen.read(4096):
            shown += piece
    head, *lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    column = slice(head.index("Id"), head.index("Model"))
    assert long in "".join(line[column].strip() for line in lines)


def test_list_as_json(instil, record, tmp_path):
    def listed(*flags):
        lines = instil("feedback", "list", "--record", record, "--json", *flags).stdout.splitlines()
        return [json.loads(line) for line in lines]

    first, second, third, written = listed("--last", "0")
    assert first == {
        "id": "chatcmpl-1",
        "time": "2026-05-04T12:00:00+00:00",
        "model": "tuned",
        "kind": "chat",
        "client": "api",
        "redacted": False,
        "messages": [{"role": "user", "content": "Why \x1b[31mis\n that?"}],
        "tools": [],
        "answers": [
            {"role": "assistant", "content": "Because.", "ended": "stop"},
            {"role": "assistant", "content": "No idea", "ended": "length"},
        ],
        "judged": {"up": 2, "compared": 1},
    }
    assert second["redacted"]
    assert written["messages"][1]["content"] == "Hello."
    assert [each["id"] for each in listed("--only", "corrected")] == [third["id"]] == ["chatcmpl-3"]
    assert listed("--only", "written") == [written]
    assert [each["id"] for each in listed("--model", "tuned")] == ["chatcmpl-1", "chatcmpl-3"]
    assert [each["id"] for each in listed("--since", "2026-05-11", "--only", "corrected")] == ["chatcmpl-3"]
    with Store(tmp_path / record) as store:
        store.prefer(("chatcmpl-3", 0), ("chatcmpl-3", 1))
    assert listed("--model", "tuned", "--last", "1")[0]["judged"] == {"corrected": 1, "compared": 1}


def test_delete(instil, record, tmp_path):
    done = instil("feedback", "delete", "chatcmpl-2", "feedback-1", "--record", record, "--yes")
    assert done.stderr == "instil: deleted 1 interaction and 3 judgements\n"
    assert b"Ask [email]" not in b"".join(path.read_bytes() for path in (tmp_path / "kept").iterdir())
    with Store(tmp_path / record) as store:
        store.record(replace(ASKED, id="new", time=datetime.now(UTC)))
    done = instil("feedback", "delete", "--older-than", "1", "--record", record, "--yes")
    assert done.stderr == "instil: deleted 2 interactions and 2 judgements\n"
    done = instil("feedback", "delete", "--older-than", "1000000", "--record", record, "--yes")
    assert done.stderr == "instil: deleted 0 interactions and 0 judgements\n"
    done = instil("feedback", "delete", "--all", "--record", record, "--yes")
    assert done.stderr == "instil: deleted 1 interaction and 1 judgement\n"
    assert "nothing of that kind is recorded there" in instil("feedback", "list", "--record", record).stdout


@pytest.mark.parametrize(("said", "left"), [("\n", 3), ("y\n", 2)])
def test_it_asks_before_it_deletes(record, tmp_path, said, left):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "instil", "feedback", "delete", "chatcmpl-2", "--record", record]
    with (
        os.fdopen(ours, "wb", buffering=0) as keyboard,
        subprocess.Popen(command, stdin=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running,
    ):
        os.close(theirs)
        keyboard.write(said.encode())
        told = running.stderr.read()
    assert told.startswith("Delete chatcmpl-2 from kept for good? [y/N] ")
    assert running.returncode == (0 if left == 2 else 2)
    with Store(tmp_path / "kept") as store:
        assert len(store.interactions()) == left


def test_stats(instil, record):
    found = json.loads(instil("feedback", "stats", "--record", record, "--json").stdout)
    assert {name: found[name] for name in ("interactions", "answers", "up", "down", "corrections")} == {
        "interactions": 3,
        "answers": 5,
        "up": 2,
        "down": 1,
        "corrections": 1,
    }
    assert [(each["model"], each["up"], each["down"]) for each in found["models"]] == [("base", 0, 1), ("tuned", 2, 0)]
    lines = [line.split() for line in instil("feedback", "stats", "--record", record).stdout.splitlines()]
    assert ["interactions", "3"] in lines
    assert ["tuned", "2", "2", "0", "100%", "(34%", "to", "100%)"] in lines
    assert ["2026-W20", "1", "0", "0"] in lines
    assert ["all", "3", "2", "1", "67%", "(21%", "to", "94%)"] in lines


def test_stats_of_a_part(instil, record):
    def counted(*flags):
        found = json.loads(instil("feedback", "stats", "--record", record, "--json", *flags).stdout)
        return found["interactions"], found["preferences"], found["dialogues"]

    assert counted() == (3, 1, 1)
    assert counted("--since", "2099-01-01") == (0, 0, 0)
    # A dialogue is of no model; what was compared with an answer of this one is made of it, as in an export.
    assert counted("--model", "base") == (1, 1, 0)


def test_no_model_library_is_loaded(record, tmp_path):
    code = (
        "import sys\nfrom instil.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "feedback", "stats", "--record", record]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
