"""Run programs that a model wrote, with their tests, each in a process of its own and within limits."""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from instil.errors import UsageError

Outcome = Literal["passed", "failed", "timed out", "out of memory", "could not run"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_SANDBOX = str(Path(__file__).with_name("sandbox.py"))
_NAMESPACES = ("--user", "--net", "--pid", "--ipc", "--fork", "--kill-child")
_DETAIL = 2000  # characters of an error that are kept, from its end
_START = 10.0  # seconds that a process may take to start and to end, beside those of the program


@dataclass(frozen=True, slots=True)
class Program:
    """A program and its tests, in Python.

    Args:
        code: Runs first, as the module `__main__`.
        tests: Run after it in the same module, and pass by coming to their end: an `assert` that fails, or
            whatever else is raised, is a failure.
    """

    code: str
    tests: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take.

    Args:
        seconds: Of wall time.
        cpu_seconds: Of processor time, all threads of a process together; rounded up to whole seconds.
        memory: Bytes of address space of a process.
        output: Bytes of each file that it writes, standard output and standard error together being one of them.
        allow_network: Whether it may run where the machine lets it have no namespaces of its own. It can then reach
            the network, see other processes, and leave behind a process that began a session of its own.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory: int = 2 * 2**30
    output: int = 2**20
    allow_network: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "cpu_seconds", "memory", "output"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} of {value!r} is no limit", "Give a number above 0.")


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a program.

    Args:
        outcome: "passed" only where the tests came to their end.
        detail: Why not: the last lines of the error; "" where it passed.
        seconds: The wall time it took, start and end included.
    """

    outcome: Outcome
    detail: str
    seconds: float


def why_not_isolated() -> str:
    """Why this machine cannot keep a program off its network and among its own processes; "" where it can."""
    return _isolation()[1]


def check_isolation() -> None:
    """See that this machine can keep a program off its network and among its own processes.

    Raises:
        UsageError: It cannot.
    """
    if why_not := why_not_isolated():
        raise UsageError(
            f"programs cannot be kept off the network on this machine: {why_not}",
            "Run this where user namespaces are allowed, or allow the network (allow_network=True).",
        )


def run(program: Program, limits: Limits | None = None) -> Ran:
    """Run one program, and its tests after it.

    It has an empty standard input, no variable of this process's environment, an empty folder as its working folder,
    and, in namespaces of its own (Linux), no network. The folder and every process it started are gone when this
    returns. Files of the machine are not hidden from it: what the user may read and write, it may.
    That the tests came to their end is shown by a secret drawn for this run. This stops a program that leaves early
    or prints what a test would print; it cannot stop one that looks for the secret in its own process's memory.

    Args:
        program: The code and its tests.
        limits: What it may take; the defaults where None.

    Raises:
        UsageError: The machine cannot keep it off the network, and the limits do not allow that.
    """
    limits = limits or Limits()
    if not limits.allow_network:
        check_isolation()
    isolated, _ = _isolation()
    request = {
        "program.py": program.code,
        "tests.py": program.tests,
        "secret": secrets.token_hex(16),
        "seconds": limits.seconds,
        "cpu_seconds": math.ceil(limits.cpu_seconds),
        "memory": limits.memory,
        "output": limits.output,
        "detail": _DETAIL,
    }
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="instil-", ignore_cleanup_errors=True) as folder:
        outcome, detail = _start(json.dumps(request), folder, isolated, limits)
    return Ran(outcome, detail, time.perf_counter() - begin)


def run_all(programs: Sequence[Program], workers: int | None = None, limits: Limits | None = None) -> list[Ran]:
    """Run programs, several at once, each as `run` does.

    Args:
        programs: The programs.
        workers: How many run at once; as many as there are processors where None.
        limits: What each may take.

    Returns:
        What became of each, in the order of the programs.

    Raises:
        UsageError: As `run`, or there are less than one worker.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers run nothing", "Give 1 or more.")
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


@functools.cache
def _isolation() -> tuple[tuple[str, ...], str]:
    """The command that runs another in namespaces of its own, and why there is none."""
    found = shutil.which("unshare")
    if found is None:
        return (), "there is no command unshare"
    command = (found, *_NAMESPACES)
    tried = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if tried.returncode:
        return (), tried.stderr.strip() or f"unshare ended with exit code {tried.returncode}"
    return command, ""


def _start(request: str, folder: str, isolated: Sequence[str], limits: Limits) -> tuple[Outcome, str]:
    """Have the sandbox run a request in a folder."""
    environment = {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the same order of a set in every run
        "OPENBLAS_NUM_THREADS": "1",  # each thread takes address space
    }
    with subprocess.Popen(
        [*isolated, sys.executable, "-s", "-P", "-B", "-X", "utf8", _SANDBOX],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=folder,
        start_new_session=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            written, error = process.communicate(request, timeout=limits.seconds + _START)
        except subprocess.TimeoutExpired:
            return "timed out", f"it could not be ended within {_START:g} s after its time was up"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        result = json.loads(written)
        return result["outcome"], result["detail"]
    except ValueError:
        return "could not run", f"exit code {process.returncode}: {error[-_DETAIL:].strip()}"
