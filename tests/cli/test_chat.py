"""`instil chat`: prompts answered once, files of prompts, and a conversation in a real terminal."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from instil.cli import chat as command
from instil.cli.generating import inert
from instil.data import read
from instil.errors import DataError, TemplateError, UsageError

from .small import make_folder

if sys.platform != "win32":
    import fcntl
    import pty
    import termios

READY = b"\x1b[?2004h"  # the terminal is asked to mark what is pasted: a line is about to be read
SENT = b"\x1b[?2004l"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that says " The capital of" over and over again: its embeddings are marks, its head looks up the next."""
    root = tmp_path_factory.mktemp("chat")
    config = make_folder(root, 3, max_position_embeddings=2048, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    says = tokenizer.encode(" The capital of", add_special_tokens=False)
    assert len(says) == 3
    built = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        mark = torch.zeros(len(tokenizer), dtype=torch.int64)
        mark[says] = torch.tensor([1, 2, 0])
        built.model.embed_tokens.weight[range(len(tokenizer)), mark] = 1.0
        built.lm_head.weight[says, [0, 1, 2]] = 1.0
    built.save_pretrained(root / "base")
    return str(root / "base")


@pytest.fixture
def chat(model, capsys, monkeypatch, tmp_path):
    """The command in this process, which has loaded torch already; what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        given = {"model": model, "template": "human-assistant", "max_new_tokens": 4, **settings}
        command.chat(options=command.ChatOptions(**given))
        return capsys.readouterr()

    return run


def test_a_prompt_is_answered_once(chat):
    done = chat(prompt="Say it.")
    assert done.out == "The capital of The\n"
    assert "instil: note: an answer was cut off (--max-new-tokens)" in done.err
    found = json.loads(chat(prompt="Say it.", as_json=True, answers=2, system="Be brief.", stop=[" of"]).out)
    assert found["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "The capital"},
    ]
    assert found["answers"] == [{"content": "The capital", "ended": "stop-string", "tokens": 3}] * 2
    assert (found["answer_tokens"], found["dropped_turns"]) == (6, 0)
    assert "[answer 2]\nThe capital" in chat(prompt="Say it.", answers=2).out


def test_standard_input_is_answered_once(chat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say\nit.\n")))
    found = json.loads(chat(as_json=True).out)
    assert found["messages"][0] == {"role": "user", "content": "Say\nit."}
    assert found["answers"][0]["ended"] == "length"
    assert found["messages"][1] == {"role": "assistant", "content": "The capital of The", "weight": 0.0}


def test_files_of_prompts(chat, tmp_path):
    rows = [
        {"prompt": "One"},
        {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "Two"}]},
        {"turns": ["Three", "And four"]},
        {"instruction": "Add.", "input": "5"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "wrote answers.jsonl" in chat(prompts="prompts.jsonl", system="Be brief.", output="answers.jsonl").err
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [each["source"] for each in found] == [f"prompts.jsonl:{n}" for n in (1, 2, 3, 4)]
    said = [[message["content"] for message in each["messages"]] for each in found]
    answer = "The capital of The"
    assert said[:2] == [["Be brief.", "One", answer], ["Own.", "Two", answer]]
    assert said[2] == ["Be brief.", "Three", answer, "And four", answer]
    assert len(list(read(tmp_path / "answers.jsonl"))) == 4
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\n")
    assert chat(prompts="prompts.txt").out == f"[prompts.txt:1]\n{answer}\n\n[prompts.txt:3]\n{answer}\n\n"


def test_prompts_that_cannot_be_answered_are_told_together(chat, tmp_path):
    (tmp_path / "prompts.txt").write_text("One\n" + "word " * 3000 + "\nTwo\n" + "word " * 4000)
    with pytest.raises(DataError) as error:
        chat(prompts="prompts.txt")
    assert re.findall(r"prompts.txt:(\d): the last message makes a prompt of", str(error.value)) == ["2", "4"]
    (tmp_path / "answered.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}] * 1}) + "\n")
    with (tmp_path / "answered.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    with pytest.raises(DataError, match="this ends in an assistant turn"):
        chat(prompts="answered.jsonl")


def test_a_base_model_needs_a_template(chat):
    with pytest.raises(TemplateError, match="no chat template of its own") as error:
        chat(prompt="a", template=None)
    assert "--template" in str(error.value)


MISTAKES = {
    "no model": (["--prompt", "a"], "--model: is missing"),
    "both": (["--prompt", "a", "--prompts", "b"], "--prompt and --prompts: both were given"),
    "nothing": ([], "nothing stands on standard input"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature -1: must be 0 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error(instil, name):
    arguments, part = MISTAKES[name]
    done = instil("chat", *([] if name == "no model" else ["--model", "x"]), *arguments, code=2, stdin="")
    assert part in done.stderr
    assert done.stdout == ""


def test_more_mistakes(chat, tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    for settings, part in (
        ({"prompt": "a", "output": "there.jsonl"}, "is there already"),
        ({"prompt": " "}, "--prompt: says nothing"),
        ({"prompts": "none.txt"}, "none.txt: cannot be read"),
        ({"prompts": "there.jsonl"}, "there.jsonl"),
        ({"prompt": "word " * 3000}, "and the model takes 2,048"),
    ):
        with pytest.raises((UsageError, DataError)) as error:
            chat(**settings)
        assert part in str(error.value)


def test_an_answer_does_not_act_on_the_terminal():
    assert inert("a\x1b[2Jb \u202e\t\n") == "a␛[2Jb ⊡\t\n"


class Terminal:
    """The command at the other end of a pseudo-terminal; what it writes is waited for, never slept for."""

    def __init__(self, folder, *arguments):
        self.end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, b"\x28\0\xc8\0\0\0\0\0")  # 40 lines of 200 columns
        self.running = subprocess.Popen(
            [sys.executable, "-c", _IN_ITS_TERMINAL, "chat", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(other)
        self.unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.running.poll() is None:
            self.running.kill()
            self.running.wait()
        os.close(self.end)

    def until(self, mark=READY):
        """All that is written before the mark, as text without what steers the terminal."""
        end = time.monotonic() + 120
        while mark not in self.unread:
            assert select.select([self.end], [], [], max(0, end - time.monotonic()))[0], self.unread
            self.unread += os.read(self.end, 1 << 16)
        seen, _, self.unread = self.unread.partition(mark)
        return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode().replace("\r\n", "\n")

    def type(self, keys):
        os.write(self.end, keys.encode())

    def ask(self, line):
        """Send a line; what is answered before the next is read."""
        self.type(f"{line}\r")
        self.until(SENT)
        return self.until()


_IN_ITS_TERMINAL = (
    "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfrom instil.cli.main import main\nmain()"
)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_conversation_in_a_terminal(model, tmp_path):
    settings = ["--template", "human-assistant", "--max-new-tokens", "1500", "--stop", " of", "--system", "Be brief."]
    with Terminal(tmp_path, "--model", model, *settings) as there:
        assert 'stop [" of"]' in there.until()
        assert "The capital\n" in there.ask("Say it.")
        assert "/retry" in there.ask("/help")
        assert "did you mean '/retry'?" in there.ask("/rety")
        assert "did you mean 'temperature'?" in there.ask("/params temprature=1")
        assert "/params temperature warm: must be a number" in there.ask("/params temperature=warm")
        assert "System message: Be brief." in there.ask("/system")
        assert "System message: Be kind." in there.ask("/system Be kind.")
        assert "Appended to chats.jsonl." in there.ask("/save chats.jsonl")
        assert "the answer is the same" in there.ask("/retry")
        there.type("one\\\rtwo\x1b\rthree")  # a backslash before Enter, and Alt-Enter
        assert "The capital\n" in there.ask("")
        there.type("thrown away\x03")
        there.until()
        assert "stop []" in there.ask("/params stop=")
        there.type("Go on.\r")
        there.until(SENT)
        there.until(b"The capital of")
        there.type("\x03")
        assert "(stopped; what was said is kept" in there.until()
        assert "Appended to chats.jsonl." in there.ask("/save chats.jsonl")
        assert "The conversation is forgotten." in there.ask("/reset")
        assert "there is no answer to save" in there.ask("/save chats.jsonl")
        there.ask("/params max_new_tokens=8 answers=2")
        assert "[answer 2]\nThe capital of" in there.ask("Say it.")
        there.ask("/params answers=")
        pasted = f"\x1b[200~{'The oldest 3 words. ' * 110}\x1b[201~"
        said = [there.ask(pasted) for _ in range(4)][-1]
        assert "left out, so that the prompt fits into the model's context" in said
        there.type("\x04")
        assert there.running.wait(60) == 0
    first, second = read(tmp_path / "chats.jsonl")
    said = [(message.role, message.content) for message in second.conversations[0].messages]
    assert [message.role for message in first.conversations[0].messages] == ["system", "user", "assistant"]
    assert said[:5] == [
        ("system", "Be kind."),
        ("user", "Say it."),
        ("assistant", "The capital"),
        ("user", "one\ntwo\nthree"),
        ("assistant", "The capital"),
    ]
    assert said[6][1].startswith("The capital of")
    assert [message.weight for message in second.conversations[0].messages] == [None] * 6 + [0.0]
