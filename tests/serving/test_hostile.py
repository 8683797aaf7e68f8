"""Requests that mean harm, or are broken: none brings the server down, none gets more than its due."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import httpx
import pytest

import instil.serving.guard
import instil.serving.http
from instil.errors import UsageError
from instil.serving.guard import HEADERS, Guards
from instil.serving.http import Connection
from instil.serving.protocol import ApiError
from instil.serving.run import listen

from .conftest import serving

ASK = [{"role": "user", "content": "What is the capital of Peru?"}]
SECRET = "zqwhisperedzq"
LONG = {"messages": ASK, "max_tokens": 400, "temperature": 100.0, "top_p": 1.0, "seed": 1, "stream": True}
JSON = {"content-type": "application/json"}
WRONG = ["Bearer", "sesame", "Bearer sesam", "Bearer sesames", "Basic sesame", "Bearer s\u00e9same"]
FOREIGN = [
    "evil.example",
    "127.0.0.1.evil.example",
    "evil.example:PORT",
    "",
    "a@127.0.0.1",
    "127.0.0.1/a",
    "127.0.0.1:a",
    "[::1",
    "[::ffff:1.2.3.4]",
    "2130706433",
    "0.0.0.0",
    "127.0.0.1, evil.example",
    "localhost\u00e9",
    "localhost:80:80",
]
ELSEWHERE = [
    "..",
    "../secret.txt",
    "%2e%2e/secret.txt",
    "%252e%252e%252fsecret.txt",
    "..%5csecret.txt",
    "..;/secret.txt",
    "%c0%ae%c0%ae/secret.txt",
    "%00",
    "a%00.html",
    "/etc/passwd",
    "//etc/passwd",
    "link/secret.txt",
    "link/reports/secret.txt",
    "link/reports/..%2fsecret.txt",
    "..%2f..%2f/reports/report.html",
    "~2E~2E",
    ".",
    "a" * 3000,
    "a/" * 3000,
]


@pytest.fixture(scope="module")
def attacked(tuned, tmp_path_factory):
    """A server that records all, and shows runs."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "runs").mkdir()
    (folder / "runs" / "link").symlink_to(folder)
    flags = ["--record", folder / "kept", "--consent", "all", "--runs", folder / "runs", "--max-waiting", 16]
    with serving(tuned, *flags, "--precision", "fp32", "--name", "tuned") as found:
        yield found
        assert still_open(found.client) == 0
        found.process.send_signal(signal.SIGINT)
        said = found.process.stderr.read()
        assert SECRET not in said, "nothing of a request is logged"
        assert "Traceback" not in said
        assert said == "instil: ending\n"


@pytest.fixture(scope="module")
def guarded(tuned):
    """A server that asks for a key."""
    with serving(tuned, "--precision", "fp32", "--record", tuned.parent / "kept", INSTIL_API_KEY="sesame") as found:
        yield found


def still_open(client):
    return int(float(re.search(r"^instil_answers_open (\S+)$", client.get("/metrics").text, re.M)[1]))


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


def port_of(served):
    return int(served.url.rpartition(":")[2])


def connect(served):
    found = socket.create_connection(("127.0.0.1", port_of(served)), timeout=20)
    return closing(found)


def say(served, data):
    """What is answered to bytes: the status, the headers, the rest."""
    with connect(served) as opened:
        opened.sendall(data.replace(b"PORT", str(port_of(served)).encode()))
        got = b""
        try:
            while piece := opened.recv(65536):
                got += piece
        except ConnectionResetError:  # there was more to say to it
            pass
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


def check_refusal(status, headers, body):
    """A refusal in OpenAI's shape, with all headers, that tells nothing."""
    assert 400 <= status < 500
    assert HEADERS.items() <= headers.items()
    assert not [name for name in headers if name.startswith("access-control")]
    assert b'"error"' in body
    assert b"Traceback" not in body
    assert b'File "' not in body


def post(served, path, content, **headers):
    answer = served.client.post(path, content=content, headers={**JSON, **headers})
    return answer.status_code, answer.headers, answer.content


# What is no request


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there is no body"),
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"null", "must be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 400 + b"}", "less than"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "not finite"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "not finite"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": -Infinity}]}', "not finite"),
        (b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', "no field"),
        (b'{"messages": [' + b"1," * 200_000 + b"1]}", "valid dictionary"),
        (b'{"messages": [' + b'{"role": "x", "content": "a"},' * 90_000 + b"{}]}", "at most 2048"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stop": [' + b'"a",' * 100_000 + b'"a"]}', "stop"),
        (b'{"messages": [{"role": "user", "content": "a"}], "' + b"x" * 1_000_000 + b'": 1}', "no field"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}',
            "text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_is_none(attacked, content, said):
    """It is refused at once, whatever it would take to read it whole."""
    begun = time.monotonic()
    status, headers, body = post(attacked, "/v1/chat/completions", content)
    check_refusal(status, headers, body)
    assert status == 400
    assert said in json.loads(body)["error"]["message"]
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "prompt",
    ['"a",' * 900_000 + '"a"', '"a",1,' * 300_000 + "1", "null," * 700_000 + "1", "1," * 100_000 + str(10**30)],
    ids=["texts", "mixed", "nulls", "ids"],
)
def test_a_list_of_prompts_that_is_too_long(attacked, prompt):
    begun = time.monotonic()
    check_refusal(*post(attacked, "/v1/completions", f'{{"prompt": [{prompt}], "n": 64}}'))
    assert time.monotonic() - begun < 10


def test_a_body_says_that_it_is_json(attacked):
    content = json.dumps({"messages": ASK}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = attacked.client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
        check_refusal(answer.status_code, answer.headers, answer.content)
        assert answer.status_code == 415
        assert "application/json" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large(attacked):
    """It is refused by its length before it is read, and where none is given when there is too much."""
    large = 5 * 2**20
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nConnection: close\r\n"
    for length in (large, 10**18):
        status, headers, body = say(attacked, head + f"Content-Length: {length}\r\n\r\n".encode())
        check_refusal(status, headers, body)
        assert status == 413

    def pieces():
        for _ in range(large // 2**16):
            yield b" " * 2**16

    try:
        status = attacked.client.post("/v1/chat/completions", content=pieces(), headers=JSON).status_code
    except httpx.WriteError:  # it is not read to its end
        status = 413
    assert status == 413
    assert attacked.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nbroken\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: %s\r\n" % (b"a" * 100) * 2000 + b"\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_request(attacked, data):
    status, headers, body = say(attacked, data)
    check_refusal(status, headers, body)
    assert status == 400
    assert headers["connection"] == "close"


def test_garbage_behind_a_request(attacked):
    """The request is answered, and the connection ends."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    status, _, body = say(attacked, request + request + b"garbage\r\n\r\n")
    assert status == 200
    assert body.count(b'{"status":"ok"}') == 2
    assert b" 400 " in body


# Who asks


@pytest.mark.parametrize(
    "host",
    FOREIGN,
)
def test_a_foreign_host(attacked, host):
    """A name that leads here by DNS is not ours."""
    told = say(attacked, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    check_refusal(*told)
    assert told[0] in (400, 403)
    assert SECRET.encode() not in told[2]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:PORT", "127.0.0.1:PORT", "[::1]:PORT", "127.0.0.1:1"])
def test_a_host_of_the_loopback(attacked, host):
    assert say(attacked, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())[0] == 200


@pytest.mark.prove
def test_the_host_that_it_listens_at_is_its_own(tuned):
    """As it says itself, whatever name the address was given by."""
    with serving(tuned, "--precision", "fp32", "--host", "127.1", INSTIL_API_KEY="sesame") as found:
        assert found.url.startswith("http://127.1:")
        assert say(found, f"GET /health HTTP/1.0\r\nHost: {found.url[7:]}\r\n\r\n".encode())[0] == 200


def test_a_request_without_a_host(attacked):
    told = say(attacked, b"GET /health HTTP/1.0\r\n\r\n")
    check_refusal(*told)
    assert told[0] == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:PORT", 200),
        ("HTTP://127.0.0.1:PORT", 200),
        ("null", 403),
        ("http://evil.example", 403),
        ("http://127.0.0.1", 403),
        ("http://127.0.0.1:1", 403),
        ("http://localhost:PORT", 403),
        ("http://127.0.0.1:PORT.evil.example", 403),
        ("http://a@127.0.0.1:PORT", 403),
        ("http://127.0.0.1:PORT/a", 403),
        ("file://127.0.0.1:PORT", 403),
        ("http://[::1", 403),
        ("", 403),
        ("\u00e9", 403),
    ],
)
def test_a_page_of_another_origin(attacked, origin, status):
    head = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nConnection: close\r\nOrigin: "
    told = say(attacked, head + f"{origin}\r\n\r\n".encode())
    assert told[0] == status
    if status == 403:
        check_refusal(*told)


def test_what_a_browser_asks_for_another_page(attacked):
    """A script or an image of a foreign page carries no Origin; it gets no data. A link leads to the page."""
    for site in ("cross-site", "same-site"):
        for path in ("/v1/models", "/metrics", "/api/about", "/api/runs", "/openapi.json", "/tokenizer_info"):
            answer = attacked.client.get(path, headers={"sec-fetch-site": site})
            check_refusal(answer.status_code, answer.headers, answer.content)
            assert answer.status_code == 403
        assert attacked.client.get("/", headers={"sec-fetch-site": site}).status_code == 200
    assert attacked.client.get("/v1/models", headers={"sec-fetch-site": "same-origin"}).status_code == 200
    asked = attacked.client.options(
        "/v1/models", headers={"origin": "http://evil.example", "access-control-request-method": "GET"}
    )
    check_refusal(asked.status_code, asked.headers, asked.content)


@pytest.mark.prove
def test_no_data_without_the_key(guarded):
    """Every path there is, but for pages and what they are made of."""
    right = {"Authorization": "Bearer sesame"}
    paths = guarded.client.get("/openapi.json", headers=right).json()["paths"]
    asked = [(method.upper(), path) for path, methods in paths.items() for method in methods if path != "/health"]
    assert {path for _, path in asked} >= {
        "/v1/models",
        "/v1/chat/completions",
        "/metrics",
        "/api/feedback",
        "/tokenize",
    }
    for method, path in [*asked, ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/api/nothing")]:
        for given in (None, *WRONG):
            headers = {} if given is None else {"Authorization": given.encode()}
            answer = guarded.client.request(method, path.replace("{model}", "tuned"), headers=headers)
            check_refusal(answer.status_code, answer.headers, answer.content)
            assert answer.status_code == 401, (method, path, given)
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert guarded.client.get("/v1/models", headers=right).status_code == 200
    assert guarded.client.get("/health").json() == {"status": "ok"}
    for path in ("/static/../v1/models", "/static/..%2fmetrics", "/static/%2e%2e/metrics", "//metrics", "/METRICS"):
        status, _, body = say(guarded, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert status in (401, 404)
        assert b"instil_" not in body


def test_a_key_is_compared_in_whole():
    guards = Guards("s\u00e9same", (), False, 1000)
    assert guards.knows_key("Bearer s\u00e9same".encode().decode("latin-1"))
    assert not guards.knows_key("Bearer s\u00e9same"[:-1].encode().decode("latin-1"))


# Paths


@pytest.mark.parametrize(
    "path",
    ELSEWHERE,
)
def test_paths_that_lead_elsewhere(attacked, path):
    for below in ("/static/", "/runs/", "/api/runs/"):
        request = f"GET {below}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        told = say(attacked, request.encode())
        if told[0] == 307:  # to where a slash less would lead
            assert told[1]["location"].startswith("http://localhost/")
            continue
        check_refusal(*told)
        assert told[0] in (400, 404)
        assert SECRET.encode() not in told[2]


@pytest.mark.parametrize(
    "target", ["http://evil.example/v1/models", "http://localhost/v1/models", "*", "evil.example:80"]
)
def test_targets_that_are_no_path(attacked, target):
    for method in ("GET", "OPTIONS", "CONNECT"):
        told = say(attacked, f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        check_refusal(*told)
        assert told[0] in (400, 404, 405)


def test_headers_are_on_every_answer(attacked):
    for path, status in (
        ("/", 200),
        ("/health", 200),
        ("/nothing", 404),
        ("/v1/models/nothing", 404),
        ("/tokenize", 405),
    ):
        answer = attacked.client.get(path)
        assert answer.status_code == status
        assert HEADERS.items() <= dict(answer.headers).items()
        assert "server" not in answer.headers
    streamed = attacked.client.post("/v1/chat/completions", json={"messages": ASK, "stream": True, "max_tokens": 2})
    assert HEADERS.items() <= dict(streamed.headers).items()


# Slow clients, and those that leave


def test_a_body_that_trickles(monkeypatch):
    """It has so long in all, not for each piece."""
    import asyncio

    monkeypatch.setattr(instil.serving.guard, "_SLOW", 0.2)
    pieces = 0

    async def trickle():
        nonlocal pieces
        pieces += 1
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def read():
        receive = instil.serving.guard._Bounded(trickle, 1000)
        while True:
            await receive()

    with pytest.raises(ApiError) as met:
        asyncio.run(read())
    assert met.value.status == 408
    assert 0 < pieces <= 4


def test_a_client_that_takes_nothing_is_let_go(monkeypatch):
    """What was written for it is thrown away; else it would be waited for with no end."""
    import asyncio

    import uvicorn

    monkeypatch.setattr(instil.serving.http, "_IDLE", 0.1)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with suppress(TimeoutError):
            await asyncio.wait_for(send({"type": "http.response.body", "body": bytes(1 << 26), "more_body": True}), 0.1)

    async def ask():
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, lifespan="off", log_level="critical"))
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            serving = asyncio.create_task(server.serve([opened]))
            while not server.started:
                await asyncio.sleep(0)
            _, writer = await asyncio.open_connection(*opened.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for there in (True, False):
                while bool(server.server_state.connections) != there:
                    await asyncio.sleep(0.01)
            server.should_exit = True
            await serving
            writer.close()

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_a_client_that_reads_nothing_stops_no_other(attacked):
    body = json.dumps({**LONG, "n": 4, "logprobs": True, "top_logprobs": 20}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with connect(attacked) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.sendall(head.encode() + body)
        until(lambda: still_open(attacked.client) >= 1)
        answer = attacked.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4})
        assert answer.status_code == 200
    until(lambda: still_open(attacked.client) == 0)


def test_clients_that_leave(attacked):
    """While they ask, while they wait, while they are answered: their places are free again."""
    stream = json.dumps(LONG).encode()
    whole = json.dumps({**LONG, "stream": False, "n": 2}).encode()
    texts = json.dumps({"prompt": ["One, two,"] * 8, "max_tokens": 300, "temperature": 2.0}).encode()
    head = "POST /v1/{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    asked = [("chat/completions", stream), ("chat/completions", whole), ("completions", texts)]
    sent = [head.format(path, len(body)).encode() + body for path, body in asked]
    for cut in (1, 30, len(sent[0]) - 5):
        for data in sent:
            with connect(attacked) as opened:
                opened.sendall(data[:cut])
    for _ in range(3):
        opened = []
        for data in sent * 4:
            opened.append(socket.create_connection(("127.0.0.1", port_of(attacked)), timeout=20))
            opened[-1].sendall(data)
        until(lambda: still_open(attacked.client) > 8)
        for number, each in enumerate(opened):
            if number % 2:  # reset rather than closed
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            each.close()
        until(lambda: still_open(attacked.client) == 0)
    answer = attacked.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 2})
    assert answer.status_code == 200


def test_too_many_at_once_are_sent_away(attacked):
    """And those within go on."""
    body = {**LONG, "n": 64}
    with attacked.client.stream("POST", "/v1/chat/completions", json=body) as under_way:
        until(lambda: still_open(attacked.client) == 64)
        status, headers, content = post(attacked, "/v1/chat/completions", json.dumps({"messages": ASK, "n": 64}))
        assert (status, headers["retry-after"]) == (429, "1")
        check_refusal(status, headers, content)
        assert under_way.status_code == 200
        few = attacked.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1})
        assert few.status_code == 200
    until(lambda: still_open(attacked.client) == 0)


def test_what_is_said_is_not_logged(attacked):
    """The server's end looks at what was written."""
    for body in ({"messages": [{"role": SECRET, "content": SECRET}]}, {SECRET: 1}, {"messages": ASK, "model": SECRET}):
        assert post(attacked, "/v1/chat/completions", json.dumps(body))[0] in (400, 404)
    said = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}
    assert post(attacked, "/v1/chat/completions", json.dumps(said))[0] == 200


def test_text_that_cannot_fit_is_refused_before_it_is_cut(attacked):
    """Megabytes of it, which take many seconds to cut; it is told in characters, for nobody knows its tokens."""
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 700_000}]}),
        ("/v1/completions", {"prompt": "word " * 700_000}),
    ):
        status, _, answer = post(attacked, path, json.dumps(body))
        error = json.loads(answer)["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "3,500,000 characters" in error["message"]


# Everything else that can be thought of


def fuzz(served, examples, seed):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--seed", str(seed)]
    command += ["--checks", "not_a_server_error", "--max-examples", str(examples), "--no-color", "--workers", "1"]
    command += ["--phases", "fuzzing", "--generation-database", "none", "--request-timeout", "60"]
    command += ["--continue-on-failure", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) generated", done.stdout)[1])


def test_what_schemathesis_thinks_of(attacked):
    assert fuzz(attacked, 15, 1) > 90


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(3))
def test_all_that_schemathesis_thinks_of(attacked, seed):
    assert fuzz(attacked, 300, seed) > 2000


# The beginning and the end


def test_a_port_is_taken_before_a_model_is_loaded():
    """Else of two servers that begin together one would fail at its end."""
    with listen("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        with pytest.raises(UsageError, match="cannot be listened on"), listen("127.0.0.1", port):
            pass


@pytest.mark.prove
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could ask the model, and no key is set"),
        (["--host", "::"], "--host ::: others could ask the model, and no key is set"),
        (["--host", "example.org"], "--host example.org: others could ask the model, and no key is set"),
        (["--port", "65536"], "--port 65536: must be 65535 or less"),
        (["--port", "TAKEN"], "cannot be listened on: Address already in use"),
        (["--host", "192.0.2.1", "--api-key", "a"], "cannot be listened on"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served(tuned, flags, said):
    """One clear error, before the model is loaded."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [str(taken.getsockname()[1]) if each == "TAKEN" else each for each in flags]
        port = [] if "--port" in flags else ["--port", "0"]
        model = [] if "--model" in flags else ["--model", str(tuned)]
        command = [sys.executable, "-m", "instil", "serve", *model, *port, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("instil: ") == 1
    assert done.stdout == ""


@pytest.mark.prove
def test_an_end_lets_answers_come_to_theirs(tuned):
    """Ctrl-C: who is being answered is answered, nobody else comes in, and it ends with 0."""
    with serving(tuned, "--precision", "fp32") as served:
        with served.client.stream("POST", "/v1/chat/completions", json={**LONG, "n": 8}) as under_way:
            lines = under_way.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGINT)
            until(lambda: refused(served))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
        ended = [each["index"] for chunk in chunks for each in chunk["choices"] if each["finish_reason"]]
        assert sorted(ended) == list(range(8))
        assert served.process.wait(20) == 0
        said = served.process.stderr.read()
        assert said == "instil: ending: answers under way are given 30 seconds (Ctrl-C again ends at once)\n"


@pytest.mark.prove
def test_a_second_signal_ends_at_once(tuned):
    with serving(tuned, "--precision", "fp32") as served:
        with served.client.stream("POST", "/v1/chat/completions", json={**LONG, "n": 64}) as under_way:
            next(under_way.iter_lines())
            served.process.send_signal(signal.SIGTERM)
            until(lambda: refused(served))
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(10) == 130
        assert served.process.stderr.read().splitlines()[1:] == ["instil: interrupted"]


def refused(served):
    try:
        socket.create_connection(("127.0.0.1", port_of(served)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.prove
@pytest.mark.parametrize("number", range(4))
def test_what_was_acknowledged_is_there_after_kill_9(tuned, tmp_path, number):
    """Clients correct as fast as they can; the server is killed; each correction that was acknowledged is kept."""
    acknowledged = []
    with serving(tuned, "--precision", "fp32", "--record", tmp_path / "kept", "--consent", "all") as served:

        def correct(client):
            with httpx.Client(base_url=served.url, timeout=20) as http:
                for at in range(1000):
                    asked = {"messages": [{"role": "user", "content": f"{client} {at}"}], "max_tokens": 1}
                    try:
                        answer = http.post("/v1/chat/completions", json=asked).json()
                        text = f"corrected {client} {at}."
                        body = {"kind": "correction", "id": answer["id"], "content": text}
                        if http.post("/api/feedback", json=body).status_code == 200:
                            acknowledged.append(text)
                    except httpx.TransportError:
                        return

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(correct, client) for client in range(4)]
            until(lambda: len(acknowledged) > 20 + 15 * number, 60)
            served.process.kill()
            for client in clients:
                client.result()
    command = [sys.executable, "-m", "instil", "feedback", "export", "--record", str(tmp_path / "kept")]
    command += ["--kind", "supervised", "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "rows.jsonl").read_text()
    assert [text for text in acknowledged if f'"{text}"' not in rows] == []
