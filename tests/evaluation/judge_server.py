"""A server that speaks OpenAI's chat completions, and judges by a rule that can be computed without it."""

import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SILENT = "mumble"


def rate(answer):
    """The rating of an answer: by its length; None where it says `mumble`."""
    return None if SILENT in answer else 1 + len(answer) % 10


def prefer(first, second):
    """The longer answer by more than three characters, else the one shown first; a tie of what is the same."""
    if SILENT in first + second:
        return None
    if first == second:
        return "C"
    return "B" if len(second) > len(first) + 3 else "A"


def verdict(messages):
    """What the judge says to a request."""
    shown = messages[-1]["content"]
    last = [
        part.rpartition("[Answer]\n")[2]
        for part in re.findall(r"<<< begin (?:the conversation|assistant \w) >>>\n\n(.*?)\n\n<<< end", shown, re.DOTALL)
    ]
    found = prefer(*last) if len(last) == 2 else rate(last[0])
    return "I cannot say." if found is None else f"It could be [[1]] or [[A]], but:\nVerdict: [[{found}]]"


def completion(text, tokens=10, finish="stop"):
    """The body of a reply."""
    message = {"role": "assistant", "content": text}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    body["choices"] = [{"index": 0, "message": message, "finish_reason": finish}]
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    return body


class Judge(ThreadingHTTPServer):
    """The server. `answer` makes of a request and its number, from 0, the status, the headers and the body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = []
        self.lock = threading.Lock()
        self.answer: Callable = lambda request, number: (200, {}, completion(verdict(request["messages"])))
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has left is no error."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, self.headers["Authorization"], request))
        status, headers, body = self.server.answer(request, number)
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def running():
    """A judge, while it listens."""
    with Judge() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
