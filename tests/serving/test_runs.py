"""The page of the training runs: what it is told over HTTP, and what a real browser makes of it."""

import fcntl
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'instil[serve]')")

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient

from instil.errors import UsageError
from instil.serving import runs as serving
from instil.serving.guard import Guard, Guards
from instil.serving.runs import POINTS, router, smooth, thin
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Step
from instil.training.metrics import to_line, write_metrics

from ..cli.small import environment, make_folder

CHROMIUM = "/usr/bin/chromium"


def step(number, loss=None, **measures):
    return Step(
        number, 2.0 + 1.0 / number if loss is None else loss, 1e-4, 0.5, 100, 40, 1234.5, 0.5 * number, measures
    )


def make(folder, *, steps=12, evaluations=(), started="2026-03-01T10:00:00+00:00", state="finished", **chosen):
    """A run's folder; `steps` are steps, or how many."""
    config = TrainConfig(model="base/model", data=["rows.jsonl"], output=folder, **chosen)
    record = {
        "base_model": "base/model",
        "config": config.model_dump(mode="json"),
        "resolved": {"steps": 1200},
        "versions": {"instil": "0.1.0"},
        "outcome": None,
        "notes": [],
        "state": state,
        "ended": None,
        "started": started,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instil.json").write_text(json.dumps(record))
    write_metrics(
        folder / "metrics.jsonl", map(step, range(1, steps + 1)) if isinstance(steps, int) else steps, evaluations
    )
    return folder


def make_report(folder, text="<h1>Measured</h1>"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(text)
    (folder / "results.json").write_text("{}")


@contextmanager
def training(folder):
    """As a process holds the folder that trains there."""
    number = os.open(folder, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(number)


def application(folder, key=None):
    """The page behind the server's own guard."""
    app = FastAPI()
    app.include_router(router(folder, key))
    app.mount("/static", StaticFiles(directory=Path(serving.__file__).parent / "static"))
    return Guard(app, Guards(key, (), False, 1000), lambda path, status: None)


def client(folder, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(application(folder, key), base_url="http://127.0.0.1", headers=headers)


def ids(http):
    return {run["name"]: run["id"] for run in http.get("/api/runs").json()["runs"]}


# What is told


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of the real command: one step."""
    root = tmp_path_factory.mktemp("trained")
    make_folder(root, 8)
    flags = ["--init", "base", "--template", "chatml", "--adapter", "none", "--max-steps", "1", "--output", "runs/one"]
    done = subprocess.run(
        [sys.executable, "-m", "instil", "train", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", *flags],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment(root),
    )
    assert done.returncode == 0, done.stderr
    return root / "runs"


def test_a_run_of_the_real_command(trained):
    http = client(trained)
    (run,) = http.get("/api/runs").json()["runs"]
    record = json.loads((trained / "one" / "instil.json").read_text())
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("one", "finished", 1, 1)
    assert run["loss"] == record["outcome"]["final_loss"]
    assert run["best_eval_loss"] == record["outcome"]["best_eval_loss"]
    told = http.get(f"/api/runs/{run['id']}").json()
    assert {name: told[name] for name in run} == run
    assert told["losses"] == [[1, run["loss"]]]
    assert told["eval_losses"][-1] == [1, record["outcome"]["final_eval_loss"]]
    assert told["record"] == record
    assert told["changed"]["template"] == "chatml"
    assert "seed" not in told["changed"]


def test_the_list_is_in_the_order_of_time_and_says_what_cannot_be_read(tmp_path):
    make(tmp_path / "b" / "late", started="2026-03-02T10:00:00+00:00", state="running")
    make(tmp_path / "early")
    (make(tmp_path / "bad") / "metrics.jsonl").write_text("{}\n")
    make(tmp_path / ".hidden")
    make(tmp_path / "early" / "checkpoints" / "within")
    runs = client(tmp_path).get("/api/runs").json()["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [
        ("bad", "unreadable"),
        ("early", "finished"),
        ("b/late", "killed"),
    ]
    assert runs[0]["reason"] == "metrics.jsonl:1: no step and no evaluation: {}"
    told = client(tmp_path).get(f"/api/runs/{runs[0]['id']}").json()
    assert (told["losses"], told["record"], told["changed"]) == ([], {}, {})


def test_every_series_by_its_name(tmp_path):
    steps = [step(1, 3.0, reward_margin=0.25), step(2, 2.0, reward_margin=0.5)]
    evaluations = [
        Evaluation(0, 3.5, True, 0.0, "exact_match", 0.125),
        Evaluation(2, 2.5, True, 1.0, "exact_match", 0.75, {"kl": 0.5}),
    ]
    make(tmp_path / "one", steps=steps, evaluations=evaluations)
    told = client(tmp_path).get("/api/runs/one").json()
    assert told["losses"] == [[1, 3.0], [2, 2.0]]
    assert told["measures"] == {"reward_margin": [[1, 0.25], [2, 0.5]]}
    assert told["eval_losses"] == [[0, 3.5], [2, 2.5]]
    assert told["eval_metrics"] == {"exact_match": [[0, 0.125], [2, 0.75]]}
    assert told["eval_measures"] == {"kl": [[2, 0.5]]}
    assert told["optimizer"]["learning_rate"] == [[1, 1e-4], [2, 1e-4]]
    assert told["thinned"] == {}


def test_what_is_no_number_is_null(tmp_path):
    make(
        tmp_path / "one",
        steps=[step(1, math.nan), step(2, math.inf)],
        evaluations=[Evaluation(2, -math.inf, False, 1.0)],
    )
    answer = client(tmp_path).get("/api/runs/one")
    told = json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["losses"] == [[1, None], [2, None]]
    assert told["eval_losses"] == [[2, None]]
    assert (told["loss"], told["best_eval_loss"]) == (None, None)


def test_what_has_not_changed_is_not_sent_again(tmp_path):
    folder = make(tmp_path / "one", state="running", steps=3)
    http = client(tmp_path)
    with training(folder):
        for path in ("/api/runs", "/api/runs/one"):
            first = http.get(path)
            again = http.get(path, headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(to_line(step(4, 1.5)))
        changed = http.get("/api/runs/one", headers={"If-None-Match": first.headers["etag"]})
        assert changed.json()["losses"][-1] == [4, 1.5]
    assert http.get("/api/runs/one").json()["state"] == "killed", "no file has changed, and no one trains there"


def test_a_long_run_is_thinned_and_smoothed_over_all_of_its_steps(tmp_path):
    drawn = random.Random(0)
    steps = [step(number, 2.0 + drawn.random()) for number in range(1, 5001)]
    steps[2345], steps[3456] = step(2346, 9.0), step(3457, 0.5)
    make(tmp_path / "one", steps=steps)
    http = client(tmp_path)
    told = http.get("/api/runs/one").json()
    assert told["thinned"] == {"loss": 5000, "learning_rate": 5000, "grad_norm": 5000, "tokens_per_second": 5000}
    assert POINTS / 2 < len(told["losses"]) <= POINTS
    assert [2346, 9.0] in told["losses"]
    assert [3457, 0.5] in told["losses"]
    smoothed = http.get("/api/runs/one?smooth=50").json()
    assert smoothed["smooth"] == 50
    fading = 1 - 2 / 51
    weights = [fading ** (4999 - at) for at in range(5000)]
    expected = sum(weight * each.loss for weight, each in zip(weights, steps, strict=True)) / sum(weights)
    assert smoothed["losses"][-1] == [5000, pytest.approx(expected)]
    assert http.get("/api/runs/one?smooth=7").status_code == 422


@given(st.lists(st.floats() | st.integers(-5, 5).map(float), max_size=300), st.integers(8, 60))
def test_thinned_points_keep_the_ends_and_the_extremes(values, most):
    points = list(enumerate(values, 1))
    kept = thin(points, most)
    assert len(kept) <= most
    steps = [at for at, _ in kept]
    assert steps == sorted(set(steps))
    assert all(points[at - 1][1] is value for at, value in kept)
    if values:
        assert (kept[0][0], kept[-1][0]) == (1, len(values))
        for extreme in (min, max):
            finite = [list(filter(math.isfinite, each)) for each in (values, [value for _, value in kept])]
            assert extreme(finite[0], default=None) == extreme(finite[1], default=None)
        assert all(map(math.isfinite, values)) == all(math.isfinite(value) for _, value in kept)


def test_running_means_leave_out_what_is_no_number():
    assert smooth([(1, 4.0), (2, math.nan), (3, 1.0)], 3)[0] == (1, 4.0)
    assert math.isnan(smooth([(1, 4.0), (2, math.nan)], 3)[1][1])
    assert smooth([(1, 4.0), (2, math.nan), (3, 1.0)], 3)[2] == (3, pytest.approx((0.5 * 4.0 + 1.0) / 1.5))


def test_names_that_mean_something_in_a_url(tmp_path):
    names = ["a b", "lora/rank=8", "50%", "x~2Fy", "x/y", "ü?#&", "..."]
    for name in names:
        make(tmp_path / name, started=None)
    os.makedirs(os.fsencode(tmp_path) + b"/\xff")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")) / "instil.json").write_text("{")
    http = client(tmp_path)
    found = ids(http)
    assert set(found) == {*names, "\N{REPLACEMENT CHARACTER}"} - {"..."}, "what begins with a dot is hidden"
    assert len(set(found.values())) == len(found)
    for name, each in found.items():
        assert http.get(f"/api/runs/{each}").json()["name"] == name
        assert set(each) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-~")


def test_the_folder_may_be_a_run_itself(tmp_path):
    make(tmp_path / "tuned")
    http = client(tmp_path / "tuned")
    assert ids(http) == {"tuned": "~2E"}
    assert http.get("/api/runs/~2E").json()["step"] == 12


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UsageError, match=r"--runs .*nowhere: is no folder"):
        router(tmp_path / "nowhere")


# Reports


def test_reports_of_runs_and_of_evaluations(tmp_path):
    make_report(make(tmp_path / "one"))
    make_report(tmp_path / "one" / "measured", "<h1>Of one</h1>")
    make_report(tmp_path / "elsewhere" / "two", "<h1>Of two</h1>")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("not one that Instil wrote")
    http = client(tmp_path)
    told = http.get("/api/runs").json()
    (run,) = told["runs"]
    assert [report["name"] for report in run["reports"]] == ["report.html", "measured/report.html"]
    assert [each["name"] for each in told["evaluations"]] == ["elsewhere/two"]
    pages = [http.get(report["href"]) for each in (run, *told["evaluations"]) for report in each["reports"]]
    assert [page.text for page in pages] == ["<h1>Measured</h1>", "<h1>Of one</h1>", "<h1>Of two</h1>"]
    for page in pages:
        policy = page.headers["content-security-policy"].split("; ")
        assert "sandbox" in policy, "and nothing after it: no script, no origin"
        assert "default-src 'none'" in policy
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["x-content-type-options"] == "nosniff"
    assert http.get("/api/runs/elsewhere~2Ftwo").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/..",
        "/api/runs/%2e%2e",
        "/api/runs/..%2fsecret",
        "/api/runs/~2E~2E~2Fsecret",
        "/api/runs/one%2f..%2fone",
        "/api/runs/link",
        "/api/runs/%00",
        "/api/runs/%ff",
        "/api/runs/.hidden",
        "/runs/one/reports/..%2f..%2fsecret%2freport.html",
        "/runs/one/reports/~2E~2E~2F~2E~2E~2Fsecret~2Freport.html",
        "/runs/one/reports/instil.json",
        "/runs/one/reports/%2fetc%2fpasswd",
        "/runs/one/reports/link~2Freport.html",
        "/runs/linked/reports/report.html",
        "/runs/link/reports/report.html",
        "/runs/..%2fsecret/reports/report.html",
    ],
)
def test_no_path_leads_out(tmp_path, path):
    root = tmp_path / "runs"
    make_report(make(tmp_path / "secret"), "not to be read")
    make(root / "one")
    make_report(root / ".hidden")
    make(root / ".hidden")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "one" / "link").symlink_to(tmp_path / "secret")
    make(root / "linked")
    (root / "linked" / "report.html").symlink_to(tmp_path / "secret" / "report.html")
    answer = client(root).get(path)
    assert answer.status_code == 404
    assert "not to be read" not in answer.text


def test_files_that_are_links_out_are_not_read(tmp_path):
    make(tmp_path / "secret")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "instil.json").symlink_to(tmp_path / "secret" / "instil.json")
    told = client(tmp_path / "runs").get("/api/runs/one").json()
    assert (told["state"], told["reason"], told["record"]) == ("unreadable", "instil.json leads out of the folder", {})


def test_with_a_key_the_address_of_a_report_holds_a_ticket(tmp_path):
    make_report(make(tmp_path / "one"))
    make_report(make(tmp_path / "two"))
    one, two = (run["reports"][0]["href"] for run in client(tmp_path, "key").get("/api/runs").json()["runs"])
    http = TestClient(application(tmp_path, "key"), base_url="http://127.0.0.1")
    assert http.get("/api/runs").status_code == 401
    assert http.get(one).status_code == 200, "also after the server was started anew"
    bare, ticket = one.split("?")
    assert [http.get(path).status_code for path in (bare, f"{bare}?ticket=", f"{two.split('?')[0]}?{ticket}")] == [
        404
    ] * 3
    assert client(tmp_path, "another").get(one).status_code == 404
    assert "?" not in client(tmp_path).get("/api/runs").json()["runs"][0]["reports"][0]["href"]


# The page in a real browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


def expect(found):
    """Playwright's, which waits until it is so."""
    from playwright.sync_api import expect

    return expect(found)


@contextmanager
def served(app):
    """Serve at a free port, from a thread; gives the address."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'instil[serve]')")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def watched(browser, address, **options):
    """A page; at the end nothing was said on its console, nothing went wrong, and nothing was asked of another host."""
    context = browser.new_context(**options)
    page = context.new_page()
    said, elsewhere = [], []

    def route(handled):
        if handled.request.url.startswith((f"{address}/", "data:")):
            handled.continue_()
        else:
            elsewhere.append(handled.request.url)
            handled.abort()

    page.route("**/*", route)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        yield page
        assert (said, elsewhere) == ([], [])
    finally:
        context.close()


def cells(page, table):
    """The texts of a table, row by row."""
    return page.locator(table).evaluate(
        "table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText))"
    )


def at_end(page, run):
    """Where the line of a run ends in the drawing: x and y."""
    line = page.locator("svg.plot g").nth(run).locator("path.line").first.get_attribute("d")
    return [float(number) for number in line.rsplit("L", 1)[1].split()]


def test_curves_are_drawn_and_drawn_again_as_the_run_goes_on(tmp_path, browser):
    make(tmp_path / "done", steps=20, evaluations=[Evaluation(n, 3.0 - n / 10, True, 1.0) for n in (5, 10, 20)])
    going = make(tmp_path / "going", steps=5, state="running", started="2026-03-02T10:00:00+00:00")
    with training(going), served(application(tmp_path)) as address, watched(browser, address) as page:
        page.goto(f"{address}/runs")
        page.wait_for_selector("svg.plot")
        assert page.locator("#state").inner_text() == "1 running"
        assert page.locator("svg.plot g").count() == 1, "that which runs is chosen"
        assert cells(page, "#readout") == [["At step 5", "Training", "Held out, last"], ["going", "2.2000", ""]]
        page.get_by_label("done").check()
        expect(page.locator("svg.plot g")).to_have_count(2)
        before = at_end(page, 0)
        assert page.locator("svg.plot .hollow").count() == 3
        with (going / "metrics.jsonl").open("a") as metrics:
            metrics.writelines(to_line(step(number, 1.0)) for number in range(6, 31))
        expect(page.locator("#at")).to_have_attribute("max", "30", timeout=20_000)
        after = at_end(page, 0)
        assert after[0] > before[0], "further to the right"
        assert after[1] > before[1], "and lower"
        assert "going 1.0000" in page.locator("#at").get_attribute("aria-valuetext")
        row = page.get_by_role("row", name="going").first.inner_text()
        assert "30 / 1,200" in row.replace("\n", "")


@pytest.mark.prove
def test_runs_beside_each_other(tmp_path, browser):
    make(
        tmp_path / "one",
        lora_rank=8,
        adapter="lora",
        steps=[step(n, 4.0 / n, reward_margin=n / 4) for n in (1, 2, 3, 4)],
    )
    make(tmp_path / "two", lora_rank=64, adapter="lora", steps=4, started="2026-03-02T10:00:00+00:00")
    with served(application(tmp_path)) as address, watched(browser, address) as page:
        page.goto(f"{address}/runs#one,two")
        page.wait_for_selector("svg.plot")
        assert cells(page, "#settings") == [["Setting", "one", "two"], ["lora_rank", "8", "64"]]
        page.locator("#at").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert cells(page, "#readout")[1:] == [["one", "2.0000", ""], ["two", "2.5000", ""]]
        box = page.locator("svg.plot").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 25, box["y"] + 50)
        assert cells(page, "#readout")[0][0] == "At step 4"
        page.get_by_text("The curves as a table").click()
        values = cells(page, "#values")
        assert values[0] == ["Step", "one", "two"]
        assert values[3] == ["3", "1.3333", "2.3333"]
        straight = at_end(page, 0)
        page.get_by_label("Log scale").check()
        assert at_end(page, 0)[1] == straight[1], "the least stays at the foot"
        middle = "document.querySelector('svg.plot g path.line').getAttribute('d').split('L')[1].split(' ')[1]"
        assert float(page.evaluate(middle)) == pytest.approx((10 + straight[1]) / 2, abs=0.2), (
            "2 is halfway from 1 to 4"
        )
        page.get_by_label("Shown").select_option("Reward margin")
        assert cells(page, "#readout")[1:] == [["one", "1.0000", ""]]
        assert page.locator("#remarks").inner_text() == "Not measured: two."
        page.get_by_label("Smoothing").select_option("Over 10 steps")
        page.wait_for_selector("svg.plot .faint")
        page.get_by_label("two").uncheck()
        expect(page.locator("svg.plot g")).to_have_count(1)
        assert page.locator("#settings-name").inner_text() == "Settings that are not the default"
        assert page.url.endswith("#one")


def test_a_report_runs_nothing(tmp_path, browser):
    page_of_report = "<title>Report</title><h1>Measured</h1><script>document.title = 'ran'; fetch('/api/runs')</script>"
    make_report(make(tmp_path / "one"), page_of_report)
    with served(application(tmp_path)) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}/runs")
        with context.expect_page() as opened:
            page.get_by_role("link", name="report of one").click()
        report = opened.value
        report.wait_for_load_state()
        assert report.locator("h1").inner_text() == "Measured"
        assert report.title() == "Report"
        assert report.evaluate("self.origin") == "null"
        context.close()


@pytest.mark.prove
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_hangs_over_and_all_can_be_read(tmp_path, browser, scheme):
    make(tmp_path / "a-run-with-quite-a-long-name-in-one-piece")
    (make(tmp_path / "bad") / "instil.json").write_text("{")
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with served(application(tmp_path)) as address, watched(browser, address, **phone) as page:
        page.goto(f"{address}/runs")
        page.wait_for_selector("svg.plot")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for text in ("body", "td .soft", "thead th", "summary"):
            assert contrast(page, text) >= 4.5, text
        for drawn in range(6):
            page.evaluate(f"document.querySelector('svg.plot g').setAttribute('class', 'colour-{drawn}')")
            assert contrast(page, "svg.plot g .line", "stroke") >= 3, drawn


COLOUR_BLIND = {  # what light becomes, by Machado, Oliveira and Fernandes (2009), at full severity
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_the_colours_of_the_curves_are_told_apart_by_all_eyes(eyes):
    """Their distance in CIELAB: 2.3 is just seen."""
    style = (Path(serving.__file__).parent / "static" / "runs.css").read_text()
    pairs = re.findall(r"--colour-\d: light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", style)
    assert len(pairs) == 6
    for theme in zip(*pairs, strict=True):
        seen = [lab(np.clip(np.array(COLOUR_BLIND[eyes]) @ light(colour), 0, 1)) for colour in theme]
        assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 25


def light(colour):
    """What a screen shines in red, green and blue."""
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x, y, z = xyz / [0.9505, 1.0, 1.089]
    x, y, z = (part ** (1 / 3) if part > (6 / 29) ** 3 else part * (29 / 6) ** 2 / 3 + 4 / 29 for part in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(page, selector, of="color"):
    """The contrast of what is drawn with its ground, as WCAG 2 defines it."""
    colours = page.evaluate(
        """([selector, of]) => {
            const element = document.querySelector(selector);
            let ground = element;
            while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
            return [getComputedStyle(element)[of], getComputedStyle(ground).backgroundColor];
        }""",
        [selector, of],
    )
    one, other = sorted(map(luminance, colours))
    return (other + 0.05) / (one + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.prove
def test_the_key_is_asked_for_and_kept_for_the_tab(tmp_path, browser):
    make_report(make(tmp_path / "one"))
    with served(application(tmp_path, "right")) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}/runs")
        for given in ("wrong", "right"):
            page.get_by_role("textbox", name="API key").fill(given)
            page.get_by_role("button", name="Go on").click()
            if given == "wrong":
                page.wait_for_selector("#key-wrong", state="visible")
        page.wait_for_selector("svg.plot")
        page.reload()
        page.wait_for_selector("svg.plot")
        assert page.evaluate("localStorage.length") == 0
        with context.expect_page() as opened:
            page.get_by_role("link", name="report of one").click()
        assert opened.value.locator("h1").inner_text() == "Measured"
        context.close()
