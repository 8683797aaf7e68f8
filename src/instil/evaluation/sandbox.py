"""What `execute` starts: a script of its own that runs one program within limits and says what became of it.

It takes a request as JSON on its standard input, and writes `{"outcome": ..., "detail": ...}` as JSON to its standard
output. The program runs in a child of its own, which sees neither. Only the standard library is imported.
"""

from __future__ import annotations

import json
import linecache
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn


class _TimeIsUpError(Exception):
    pass


def main() -> None:
    """Run the program of the request, and write its outcome."""
    request = json.load(sys.stdin)
    output = os.open("output", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    os.unlink("output")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(request, output, writing)
    os.close(writing)

    def ring(*_: object) -> NoReturn:
        raise _TimeIsUpError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        result = _result(request, _said(reading), code, output)
    except _TimeIsUpError:
        result = "timed out", f"it was still running after {request['seconds']:g} s"
    json.dump(dict(zip(("outcome", "detail"), result, strict=True)), sys.stdout)


def _result(request: dict[str, Any], said: list[str], code: int, output: int) -> tuple[str, str]:
    """The outcome and its detail, of what the child said and its exit code (a signal's is negative)."""
    written = os.pread(output, request["detail"], max(0, os.fstat(output).st_size - request["detail"]))
    tail = written.decode(errors="replace").strip()
    if not said:
        return "could not run", f"the program was not started: {tail}"
    if said[-1] == request["secret"]:
        return "passed", ""
    if code == -signal.SIGXCPU:
        return "timed out", f"it took more than {request['cpu_seconds']} s of processor time"
    if said[-1] == "memory":
        return "out of memory", f"it asked for more than {request['memory'] / 2**20:g} MiB"
    if said[-1].startswith("error "):
        return "failed", said[-1].removeprefix("error ")
    how = f"was killed ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
    return "failed", f"it {how} before its tests had ended. {tail}".strip()


def _said(reading: int) -> list[str]:
    """What the child wrote, as a list of JSON strings; its own children may still hold the other end."""
    os.set_blocking(reading, False)
    said = []
    with suppress(BlockingIOError):
        for line in os.read(reading, 65536).splitlines():
            with suppress(ValueError):  # written by the program, which found the other end
                said.append(str(json.loads(line)))
    return said


def _run(request: dict[str, Any], output: int, writing: int) -> NoReturn:
    """The child: set the limits, run the program and its tests, say what happened, and end."""
    own = os.getpid()
    for number, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(number, standard)

    def say(text: str) -> None:
        if os.getpid() == own:  # a process that the program forked comes here as well
            os.write(writing, json.dumps(text).encode() + b"\n")

    try:
        for limit, most in (
            (resource.RLIMIT_AS, request["memory"]),
            (resource.RLIMIT_CPU, request["cpu_seconds"]),
            (resource.RLIMIT_FSIZE, request["output"]),
            (resource.RLIMIT_CORE, 0),
        ):
            # The soft limit of time sends a signal that says so, the hard one kills whoever ignores that.
            resource.setrlimit(limit, (most, most + 1 if limit == resource.RLIMIT_CPU else most))
        say("ready")
        say(_outcome(request))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _outcome(request: dict[str, Any]) -> str:
    """Run the program and then its tests: the secret where they ended, else what was raised."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    try:
        for name in ("program.py", "tests.py"):
            source = request.pop(name)
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            exec(compile(source, name, "exec"), module.__dict__)
        return str(request["secret"])
    except MemoryError:
        module.__dict__.clear()
        return "memory"
    except BaseException as error:
        trace = error.__traceback__ and error.__traceback__.tb_next
        if isinstance(error, SystemExit):
            return f"error it left by SystemExit({error.code!r}) before its tests had ended"
        lines = traceback.format_exception(type(error), error, trace)
        return "error " + "".join(lines).strip()[-request["detail"] :]


if __name__ == "__main__":
    main()
