"""Requests under load: `instil serve` beside `transformers serve`, the same model, the same questions, greedily.

    python benchmarks/bench_serve.py --model DIR [--clients 1,8,64] [--seconds 20] [--max-tokens 48]

Each client streams one chat answer after another. Printed are answers and tokens a second, and how long the first
text takes: its median and 95th percentile. A hash of what was asked (in tokens of the prompt) and said shows that both
served the same. `transformers serve` runs as it is by default, and with --continuous-batching.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THINGS = ("capital", "river", "king", "food", "sea", "flag", "language", "people")
PLACES = ("Peru", "France", "Kenya", "Japan", "Norway", "Chile", "Egypt", "India")


@dataclass(frozen=True)
class Answer:
    """What a client got, and when: seconds until the first text, and until the end."""

    text: str
    first: float | None
    whole: float
    prompt_tokens: int
    tokens: int


async def ask(port: int, path: str, body: dict[str, Any]) -> Answer:
    """Stream one answer; a raw client, for on the same cores a comfortable one would be measured with the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    begun = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    text, first, usage, lines = "", None, None, []
    while line := await reader.readline():
        lines.append(line)
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if piece:
                first = time.perf_counter() - begun if first is None else first
                text += piece
    writer.close()
    if usage is None:
        raise RuntimeError(b"".join(lines[:40]).decode(errors="replace"))
    return Answer(text, first, time.perf_counter() - begun, usage["prompt_tokens"], usage["completion_tokens"])


@dataclass(frozen=True)
class Load:
    """What many clients got, by the number of the question, and in how many seconds."""

    answers: Sequence[tuple[int, Answer]]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated for all clients together."""
        return sum(each.tokens for _, each in self.answers) / self.seconds

    def first(self, percentile: int) -> float:
        """Seconds until the first text, at a percentile."""
        firsts = [each.first for _, each in self.answers if each.first is not None]
        return statistics.quantiles(firsts, n=100)[percentile - 1]


async def load(port: int, path: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    """As many clients as that, each asking one question after another until the time is over."""
    found: list[tuple[int, Answer]] = []
    begun = time.perf_counter()

    async def client(number: int) -> None:
        at = number
        while time.perf_counter() - begun < seconds:
            found.append((at % len(bodies), await ask(port, path, bodies[at % len(bodies)])))
            at += clients if clients > 1 else 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Load(found, time.perf_counter() - begun)


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[str]:
    """A server, once it answers; the file that holds what it says."""
    log = Path(f"/tmp/bench-serve-{port}.log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                if process.poll() is not None:
                    break
                time.sleep(0.2)
            yield str(log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            log.unlink(missing_ok=True)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def main() -> None:
    """Measure both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max-tokens", type=int, default=48)
    chosen = parser.parse_args()
    folder = str(Path(chosen.model).resolve())
    bin = Path(sys.executable).parent
    instil = [sys.executable, "-m", "instil", "serve", "--model", folder, "--precision", "fp32", "--port"]
    peer = [str(bin / "transformers"), "serve", folder, "--device", "cpu", "--dtype", "float32", "--port"]
    for name, command, model, more in (
        ("instil serve", instil, None, []),
        ("transformers serve", peer, folder, []),
        ("transformers serve, continuous batching", peer, folder, ["--continuous-batching"]),
    ):
        port = free_port()
        bodies = [
            {
                "messages": [{"role": "user", "content": f"What is the {thing} of {place}?"}],
                "temperature": 0,
                "max_tokens": chosen.max_tokens,
                **({"model": model} if model else {}),
            }
            for thing in THINGS
            for place in PLACES
        ]
        with running([*command, str(port), *more], port) as log:
            try:
                asyncio.run(ask(port, "/v1/chat/completions", bodies[0]))  # loads what is loaded at the first request
            except (OSError, RuntimeError, KeyError) as error:
                said = re.sub(r"\s+", " ", Path(log).read_text()[-300:] or str(error))
                print(f"{name}: does not run here: {str(error)[:200]} {said}")
                continue
            for clients in map(int, chosen.clients.split(",")):
                try:
                    found = asyncio.run(load(port, "/v1/chat/completions", bodies, clients, chosen.seconds))
                except (OSError, RuntimeError, KeyError) as error:
                    print(f"{name:40} {clients:3} clients: failed: {str(error)[:200]}")
                    continue
                said = {number: (answer.prompt_tokens, answer.text) for number, answer in found.answers}
                digest = hashlib.sha256(json.dumps(sorted(said.items())).encode()).hexdigest()[:12]
                print(
                    f"{name:40} {clients:3} clients: {len(found.answers) / found.seconds:6.1f} answers/s "
                    f"{found.tokens_per_second:7.0f} tokens/s, first text after {1e3 * found.first(50):.0f} ms "
                    f"(95 %: {1e3 * found.first(95):.0f}), {len(said)} questions, {digest}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
