"""Programs that mean harm, run for real: each ends within its limits, and none passes that did not."""

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from instil.errors import UsageError
from instil.evaluation import execute
from instil.evaluation.execute import Limits, Program, run, run_all, why_not_isolated

isolated = pytest.mark.skipif(bool(why_not_isolated()), reason=f"this machine has no namespaces: {why_not_isolated()}")
LIMITS = Limits(seconds=20, memory=2**30, allow_network=bool(why_not_isolated()))
TESTS = "assert answer() == 42"
RIGHT = "def answer():\n    return 42\n"


def ran(code, tests=TESTS, **limits):
    return run(Program(code, tests), replace(LIMITS, **limits))


def gone(mark):
    """Whether no process has `mark` among its arguments, once what was killed had time to die."""
    for _ in range(500):
        if not any(mark in arguments for arguments in command_lines()):
            return True
        time.sleep(0.01)
    return False


def command_lines():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield file.read_text(errors="replace")


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert (ran(RIGHT).outcome, ran(RIGHT).detail) == ("passed", "")
    wrong = ran("def answer():\n    return 41\n", "assert answer() == 42, 'not that'")
    assert wrong.outcome == "failed"
    assert wrong.detail.splitlines()[-1] == "AssertionError: not that"
    assert "assert answer() == 42" in wrong.detail


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", r"SystemExit\(0\)"),
        ("import os; os._exit(0)", "exit code 0 before its tests"),
        ("print('passed'); print('OK'); raise SystemExit", "SystemExit"),
        ("def answer():\n    import sys; sys.exit(0)", "SystemExit"),
        ("def answer():\n    import os; os._exit(0)", "exit code 0 before its tests"),
        ("import ctypes; ctypes.string_at(0)", "Segmentation fault"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "Terminated"),
        ("input()", "EOFError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = '\ud800'", "surrogates not allowed"),
        ("while True: print('x' * 1000)", "File too large"),
        ("open('big', 'wb').write(bytes(2 ** 22))", "File too large"),
        # What a program might know of how it is told that the tests have ended.
        (
            "import os\nfor n in range(20):\n  try: os.write(n, b'\"passed\"\\n')\n  except OSError: pass\nos._exit(0)",
            "exit code 0 before its tests",
        ),
        (
            "import os\nfor n in range(20):\n  try: os.write(n, b'x\\n')\n  except OSError: pass\nraise ValueError",
            "ValueError",
        ),
        ("import json; print(json.dumps({'outcome': 'passed', 'detail': ''})); raise SystemExit", "SystemExit"),
    ],
)
def test_what_did_not_come_to_the_end_of_its_tests_failed(code, detail):
    result = ran(code)
    assert result.outcome == "failed"
    assert re.search(detail, result.detail)


def test_a_program_ends_with_its_time():
    result = ran("while True: pass", seconds=0.5)
    assert (result.outcome, result.detail) == ("timed out", "it was still running after 0.5 s")
    assert ran("import time; time.sleep(100)", seconds=0.5).outcome == "timed out"


def test_a_program_ends_with_its_processor_time():
    result = ran("while True: pass", cpu_seconds=1)
    assert (result.outcome, result.detail) == ("timed out", "it took more than 1 s of processor time")


@pytest.mark.parametrize("code", ["x = bytearray(10 * 2**30)", "x = []\nwhile True: x.append(bytearray(2**20))"])
def test_a_program_ends_with_its_memory(code):
    result = ran(code)
    assert (result.outcome, result.detail) == ("out of memory", "it asked for more than 1024 MiB")


def test_memory_that_a_program_can_do_without_is_no_failure():
    assert ran("try:\n    x = bytearray(10 * 2**30)\nexcept MemoryError:\n    pass\n" + RIGHT).outcome == "passed"


FORK = """
import os, sys
if os.fork() == 0:
    {session}
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", {mark!r}])
"""


@pytest.mark.prove
def test_a_fork_does_not_outlive_the_program():
    mark = f"instil-fork-{os.getpid()}"
    assert ran(FORK.format(session="", mark=mark) + RIGHT).outcome == "passed"
    assert ran(FORK.format(session="", mark=mark) + "while True: pass", seconds=0.5).outcome == "timed out"
    assert gone(mark)


@isolated
def test_nor_does_one_with_a_session_of_its_own():
    mark = f"instil-session-{os.getpid()}"
    assert ran(FORK.format(session="os.setsid()", mark=mark) + RIGHT).outcome == "passed"
    assert ran(FORK.format(session="os.setsid()", mark=mark) + "while True: pass", seconds=0.5).outcome == "timed out"
    assert gone(mark)


def test_a_fork_that_passes_does_not_pass_for_its_parent():
    assert ran("import os\nif os.fork():\n    os.wait()\n    raise ValueError('parent')\n" + RIGHT).outcome == "failed"


@isolated
def test_no_network_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = ran(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        assert result.outcome == "failed"
        assert re.search("unreachable|refused", result.detail)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_environment_is_inherited(monkeypatch):
    monkeypatch.setenv("INSTIL_SECRET", "a-secret")
    assert ran("import os; assert 'INSTIL_SECRET' not in os.environ\n" + RIGHT).outcome == "passed"


@isolated
def test_the_environment_of_other_processes_cannot_be_read():
    code = f"open('/proc/{os.getpid()}/environ').read()"
    result = ran(code)
    assert result.outcome == "failed"
    assert "PermissionError" in result.detail


def test_the_working_folder_is_empty_and_goes():
    result = ran("import os; open('left', 'w').close(); raise ValueError(os.getcwd(), os.listdir())")
    folder = re.search(r"\('([^']+)', \['left'\]\)", result.detail)[1]
    assert Path(folder).name.startswith("instil-")
    assert not Path(folder).exists()


def test_a_program_is_a_module_of_its_own():
    code = """
import dataclasses, inspect
@dataclasses.dataclass
class Point:
    x: int = 42
def answer():
    assert __name__ == "__main__" and "return" in inspect.getsource(answer)
    return Point().x
"""
    assert ran(code).outcome == "passed"


def test_sets_have_one_order_in_every_run():
    code = "raise ValueError(list({str(i) for i in range(50)}))"
    assert ran(code).detail == ran(code).detail


def test_several_run_at_once_and_keep_their_order():
    programs = [Program(f"def answer():\n    return {42 if i % 3 else 0}\n", TESTS) for i in range(9)]
    assert [each.outcome for each in run_all(programs, 3, LIMITS)] == ["failed", "passed", "passed"] * 3


def test_workers_run_beside_each_other(tmp_path):
    """Each waits for the other."""
    meet = """
import os, time
open({own!r}, "w").close()
while not os.path.exists({other!r}):
    time.sleep(0.01)
"""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    programs = [Program(meet.format(own=one, other=two), ""), Program(meet.format(own=two, other=one), "")]
    assert [each.outcome for each in run_all(programs, 2, LIMITS)] == ["passed", "passed"]


def test_what_cannot_be_kept_off_the_network_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    execute._isolation.cache_clear()
    mark = f"instil-allowed-{os.getpid()}"
    try:
        with pytest.raises(UsageError, match="there is no command unshare"):
            run(Program(RIGHT, TESTS))
        allowed = Limits(seconds=20, allow_network=True)
        assert run(Program(RIGHT, TESTS), allowed).outcome == "passed"
        assert run(Program(FORK.format(session="", mark=mark) + RIGHT, TESTS), allowed).outcome == "passed"
        assert gone(mark)
    finally:
        monkeypatch.undo()
        execute._isolation.cache_clear()


def test_limits_and_workers_that_cannot_be():
    with pytest.raises(UsageError, match="seconds of 0"):
        Limits(seconds=0)
    with pytest.raises(UsageError, match="0 workers"):
        run_all([], 0)


def test_too_little_memory_to_start_is_no_pass():
    assert ran(RIGHT, memory=2**20).outcome in ("could not run", "out of memory")
