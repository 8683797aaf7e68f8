"""The real command in a subprocess: rows, summaries, pages, and one clear error for every mistake."""

import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from instil.pocket import sample_data, save_sample_tokenizer

ROWS = [
    {"instruction": "Name the capital.", "input": "Peru", "output": "Lima."},
    {"instruction": "Say hello.", "input": "", "output": "Hello there."},
    {
        "messages": [
            {"role": "user", "content": "I type <|im_end|> here"},
            {"role": "assistant", "content": "Ah."},
        ]
    },
]
CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic --dump-dom"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return str(save_sample_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_json_holds_what_is_trained(instil, tokenizer, rows):
    done = instil("inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "alpaca", "--json")
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["source"], row["status"], row["reason"]) for row in shown] == [
        (f"{rows}:{line}", "kept", "") for line in (1, 2, 3)
    ]
    exchange = shown[0]["exchanges"][0]
    assert exchange["prompt_text"].endswith(
        "### Instruction:\nName the capital.\n\n### Input:\nPeru\n\n### Response:\n"
    )
    assert exchange["completion_text"] == "Lima.<|endoftext|>"
    assert exchange["weights"] == [1.0] * len(exchange["completion_ids"])
    assert exchange["prompt_weights"] == [0.0] * len(exchange["prompt_ids"])
    assert exchange["boundary"] == "compared"
    assert shown[0].keys() >= {"source", "status", "reason", "exchanges"}


def test_text_marks_what_is_trained(instil, tokenizer, rows):
    done = instil("inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "chatml", "--rows", "2:3")
    first, second = done.stdout.strip().split("\n\n")
    assert first.startswith(f"{rows}:2  alpaca, kept\n")
    assert "seam: compared" in first
    trained = first[first.index("⟦") + 1 : first.index("⟧")]
    assert trained.replace("│", "").replace("·", " ") == "Hello there.<|im_end|>"
    assert "│<|im_end|>│" in first
    assert "│<│|│im│_│end│|│>│" in second.replace("·", ""), "spelled, not the control token"
    assert "\x1b[" not in done.stdout


def test_colour_where_it_is_wanted(instil, tokenizer, rows):
    done = instil(
        "inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "chatml", "--row", "1", FORCE_COLOR="1"
    )
    assert "\x1b[32m" in done.stdout


def test_rows_are_chosen(instil, tokenizer, rows):
    common = ["inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "chatml", "--json"]

    def lines(*arguments):
        return [
            int(json.loads(line)["source"].rpartition(":")[2])
            for line in instil(*common, *arguments).stdout.splitlines()
        ]

    assert lines("--row", "2") == [2]
    assert lines("--rows", "2:3") == [2, 3]
    assert lines("--rows", "2:") == [2, 3]
    assert lines("--rows", ":2") == [1, 2]
    assert "the data has 3 rows" in instil(*common, "--row", "4", code=2).stderr


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tokens, self.links, self.inside = [], [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "span" and "title" in attributes:
            self.inside = attributes
            self.tokens.append([attributes["class"].split(), attributes["title"], ""])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][2] += data


def test_the_page_is_self_contained_and_marks_the_same(instil, tokenizer, tmp_path):
    file = tmp_path / "hostile.jsonl"
    file.write_text(json.dumps({"instruction": '<script>alert(1)</script> & "quotes"', "output": "<b>no</b>"}) + "\n")
    common = ["inspect", "--tokenizer", tokenizer, "--data", str(file), "--template", "chatml"]
    instil(*common, "--html", "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    (exchange,) = json.loads(instil(*common, "--json").stdout)["exchanges"]
    ids = exchange["prompt_ids"] + exchange["completion_ids"]
    weights = exchange["prompt_weights"] + exchange["weights"]
    assert [title for _, title, _ in page.tokens] == [
        f"id {token}, weight {weight:g}" for token, weight in zip(ids, weights, strict=True)
    ]
    assert ["t" in kinds for kinds, _, _ in page.tokens] == [weight == 1 for weight in weights]
    said = "".join(text for _, _, text in page.tokens).replace("⏎\n", "\n").replace("·", " ")
    assert said == exchange["prompt_text"] + exchange["completion_text"]
    assert page.links == []
    assert "<script" not in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_the_page_in_a_browser(instil, tokenizer, rows, tmp_path):
    instil("inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "chatml", "--html", "page.html")
    done = subprocess.run(
        [*CHROMIUM.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    page = Page()
    page.feed(done.stdout)
    trained = "".join(text for kinds, _, text in page.tokens if "t" in kinds)
    assert trained.replace("·", " ") == "Lima.<|im_end|>Hello there.<|im_end|>Ah.<|im_end|>"


def test_summary_counts_what_the_rows_show(instil, tokenizer, rows):
    common = ["inspect", "--tokenizer", tokenizer, "--data", rows, "--template", "chatml", "--json"]
    shown = [json.loads(line)["exchanges"][0] for line in instil(*common).stdout.splitlines()]
    summary = json.loads(instil(*common, "--summary").stdout)
    tokens = [len(each["prompt_ids"]) + len(each["completion_ids"]) for each in shown]
    trained = sum(len(each["completion_ids"]) for each in shown)
    assert summary["rows"] == {"read": 3, "kept": 3, "cut": 0, "dropped": 0, "rejected": 0}
    assert summary["shapes"] == {"alpaca": 2, "messages": 1}
    assert (summary["exchanges"], summary["ending_in_stop_token"]) == (3, 3)
    assert summary["tokens"] == {"total": sum(tokens), "trained": trained, "share": trained / sum(tokens)}
    assert sum(role["total"] for role in summary["roles"].values()) == sum(tokens)
    assert summary["roles"]["assistant"] == {"total": trained, "trained": trained, "share": 1.0}
    assert summary["roles"]["user"]["trained"] == 0
    assert (summary["lengths"]["min"], summary["lengths"]["max"]) == (min(tokens), max(tokens))
    assert sum(each["exchanges"] for each in summary["lengths"]["histogram"]) == 3
    assert summary["packs"]["batches"] == 1
    assert summary["packs"]["unshared"] == sum(tokens) - 3, "the last token of a path is only a target"
    assert summary["control_tokens_in_text"] == [{"what": "<|im_end|>", "rows": 1, "first": [f"{rows}:3"]}]
    assert summary["history_rewritten"] == []
    text = instil(*common[:-1], "--summary").stdout
    for part in ("3 read", "end in a stop token (<|im_end|>)", "alpaca 2, messages 1", "warning: messages spell"):
        assert part in text


def test_standard_input_and_skipped_rows(instil, tokenizer, tmp_path):
    given = json.dumps(ROWS[0]) + "\n{broken\n" + json.dumps(ROWS[1]) + "\n" + '{"instruction": "x"}\n'
    common = ["inspect", "--tokenizer", tokenizer, "--data", "-", "--template", "chatml", "--json"]
    failed = instil(*common, stdin=given, code=2)
    assert failed.stdout == ""
    assert "2 of 4 rows cannot be used" in failed.stderr
    assert "stdin:2" in failed.stderr
    assert "stdin:4" in failed.stderr
    done = instil(*common, "--on-bad-row", "skip", "--rejects", "rejects.jsonl", stdin=given)
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["kept", "rejected", "kept", "rejected"]
    rejects = [json.loads(line)["row"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["{broken", {"instruction": "x"}]


def test_configuration_file_and_flags_are_one_thing(instil, tokenizer, rows, tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"tokenizer: {tokenizer}\ndata: [{rows}]\ntemplate: chatml\nprompt_weight: 0.25\n")
    row = json.loads(instil("inspect", "--config", str(settings), "--row", "2", "--json").stdout)
    assert set(row["exchanges"][0]["prompt_weights"]) == {0.0, 0.25}
    row = json.loads(
        instil("inspect", "--config", str(settings), "--prompt-weight", "1", "--row", "2", "--json").stdout
    )
    assert set(row["exchanges"][0]["prompt_weights"]) == {0.0, 1.0}


MISTAKES = {
    "unknown flag": (["--tempalte", "x"], "--template"),
    "unknown template": (["--template", "alpacca"], "alpaca"),
    "no template": ([], "has no chat template of its own"),
    "unknown format": (["--format", "alpca"], "alpaca"),
    "unknown column": (["--columns", "instrction=question"], "instruction"),
    "column of no row": (["--columns", "instruction=query"], "no row has a column 'query'"),
    "half a column": (["--columns", "instruction"], "name=value"),
    "negative weight": (["--prompt-weight", "-1"], "--prompt-weight -1"),
    "weight that is no number": (["--prompt-weight", "high"], "--prompt-weight high"),
    "weight that is not finite": (["--prompt-weight", "nan"], "--prompt-weight nan"),
    "unknown choice": (["--train-on", "lst"], "--train-on lst"),
    "too short": (["--max-length", "1"], "--max-length 1"),
    "row nought": (["--row", "0"], "--row 0"),
    "rows the wrong way round": (["--rows", "3:2"], "--rows 3:2"),
    "row and rows": (["--row", "1", "--rows", "1:2"], "exclude each other"),
    "row and summary": (["--row", "1", "--summary"], "--summary counts all rows"),
    "no such tokenizer": (["--tokenizer", "./nowhere"], "no such folder"),
    "model and tokenizer": (["--model", "."], "--model and --tokenizer: both were given"),
    "page into no folder": (["--template", "chatml", "--html", "nowhere/page.html"], "--html nowhere/page.html"),
    "page into a folder": (["--template", "chatml", "--html", "."], "--html .: is no file"),
    "page and JSON": (["--html", "page.html", "--json"], "--html and --json exclude each other"),
    "no template named": (["--template", ""], "--template '': is empty"),
    "mistyped choice": (["--on-too-long", "drp"], "did you mean 'drop'?"),
    "row that is no number": (["--row", "x"], "--row x: must be a whole number"),
    "no such rows": (["--template", "chatml", "--rows", "20:21"], "there are no rows 20:21"),
    "rejects of some rows": (["--on-bad-row", "skip", "--rejects", "bad.jsonl"], "--rejects needs all rows"),
    "no configuration": (["--config", "none.yaml"], "none.yaml: no such file"),
    "configuration of what": (["--config"], "names no file"),
    "a word too many": (["words"], "words: belongs to no flag\n  See what there is with --help."),
    "template argument": (["--template", "fim", "--template-args", "order=abc"], "it may be psm or spm"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error(instil, tokenizer, rows, tmp_path, name):
    arguments, part = MISTAKES[name]
    given = ["--data", rows] if "--tokenizer" in arguments else ["--data", rows, "--tokenizer", tokenizer]
    before = set(os.listdir(tmp_path))
    done = instil("inspect", *given, *arguments, code=2)
    assert part in done.stderr
    assert done.stdout == ""
    assert set(os.listdir(tmp_path)) == before, "nothing was written"


def test_more_mistakes(instil, tokenizer, rows, tmp_path):
    assert "inspect" in instil("inspct", code=2).stderr
    assert "rows.jsonl" in instil("inspect", "--tokenizer", tokenizer, "--data", "row.jsonl", code=2).stderr
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in instil("inspect", "--tokenizer", tokenizer, "--data", "empty.jsonl", code=2).stderr
    (tmp_path / "run.yaml").write_text("prompt_wieght: 1\n")
    assert "did you mean 'prompt-weight'" in instil("inspect", "--config", "run.yaml", code=2).stderr
    (tmp_path / "run.yaml").write_text("a: [\n")
    assert "not YAML" in instil("inspect", "--config", "run.yaml", code=2).stderr
    (tmp_path / "bad.jinja").write_text("{% if %}")
    common = ["inspect", "--tokenizer", tokenizer, "--data", rows]
    assert "bad.jinja:1: not a Jinja template" in instil(*common, "--template", "bad.jinja", code=2).stderr
    done = instil(
        *common, "--template", "chatml", "--tokens-per-batch", "8", "--max-length", "500", "--summary", code=2
    )
    assert f"{rows}:1" in done.stderr


def test_flags_that_are_missing_or_mistyped(instil, tokenizer, rows):
    assert "did you mean '--tokenizer'?" in instil("inspect", "--tokeniser", "x", code=2).stderr
    assert "--data: is missing\n  Name a file" in instil("inspect", "--tokenizer", tokenizer, code=2).stderr
    assert "--tokenizer: is missing" in instil("inspect", "--data", rows, code=2).stderr


CONFIGURATIONS = {
    "1: 2\n": "1 is no name of a setting",
    "on: x\n": "on: there is no such setting",
    "row: 1\nrow: 2\n": "'row' stands there twice, again in line 2",
    "max-length: 9\nmax_length: 8\n": "written twice",
    "inspect:\n  row: 1\n": "inspect: there is no such setting",
    "row:\n  first: 1\n": "row: takes no settings of its own",
    "prompt_wieght: 1\n": "did you mean 'prompt-weight'?",
    "prompt_weight: -1\n": "run.yaml: --prompt-weight -1: must be 0 or more",
    "tokenizer: ./nowhere\n": "run.yaml: ./nowhere: no such folder",
    "when: 2024-99-99\n": "not YAML",
    "- row\n": "holds no settings",
}


def test_a_mistake_in_the_configuration_names_the_file(instil, rows, tmp_path):
    for settings, part in CONFIGURATIONS.items():
        (tmp_path / "run.yaml").write_text(settings)
        done = instil("inspect", "--config=run.yaml", "--data", rows, code=2)
        assert part in done.stderr
        assert "run.yaml" in done.stderr
    assert "Is a directory" in instil("inspect", "--config", ".", code=2).stderr
    assert "given twice" in instil("inspect", "--config", "a", "--config=b", code=2).stderr
    assert "names no file" in instil("inspect", "--config=", code=2).stderr


def test_a_page_replaces_nothing_but_a_page(instil, tokenizer, tmp_path):
    data = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    data.write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "link.html").symlink_to(data)
    (tmp_path / "run.yaml").write_text("row: 1\n")
    common = ["inspect", "--tokenizer", tokenizer, "--data", str(data), "--template", "chatml"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for page in (str(data), "link.html", "run.yaml", f"{tokenizer}/tokenizer.json", "/dev/null"):
        done = instil(*common, "--config", "run.yaml", "--html", page, code=2)
        assert "is no" in done.stderr
    rejects = ["--on-bad-row", "skip", "--rows", "1:", "--rejects", "page.html"]
    assert "names the same file" in instil(*common, *rejects, "--html", "./page.html", code=2).stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    instil(*common, "--html", "page.html")
    instil(*common, "--html", "page.html")
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == {"page.html"}


def test_rejects_hold_what_encoding_refused(instil, tokenizer, tmp_path):
    refused = {"messages": [{"role": "assistant", "content": "x" * 400}, {"role": "user", "content": "y"}]}
    given = [ROWS[0], "{broken", {"instruction": "long " * 200, "output": "no"}, refused]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
    (tmp_path / "mixed.jsonl").write_text("".join(line + "\n" for line in lines))
    common = ["inspect", "--tokenizer", tokenizer, "--data", "mixed.jsonl", "--template", "chatml"]
    common += ["--max-length", "50", "--on-too-long", "error", "--on-bad-row", "skip", "--rejects"]
    shown = instil(*common, "shown.jsonl", "--rows", "1:")
    instil(*common, "json.jsonl", "--json")
    instil(*common, "summary.jsonl", "--summary", "--no-cache")
    rejects = (tmp_path / "shown.jsonl").read_text()
    assert [json.loads(line)["row"] for line in rejects.splitlines()] == given[1:]
    assert (tmp_path / "json.jsonl").read_text() == (tmp_path / "summary.jsonl").read_text() == rejects
    assert "mixed.jsonl:2  unread, rejected" in shown.stdout


@pytest.mark.prove
def test_output_that_cannot_be_written_or_shown(instil, tokenizer, rows, tmp_path):
    common = [sys.executable, "-m", "instil", "inspect", "--tokenizer", tokenizer, "--data", rows]
    common += ["--template", "chatml", "--row", "1"]

    def shell(redirected, **env):
        command = ["sh", "-c", f'"$@" {redirected}', "sh", *common]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, **env})
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    for redirected in (">/dev/full", "--json >/dev/full", ">&-"):
        code, _, said = shell(redirected)
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith("instil: the output cannot be written: ")
    assert shell("2>&-")[0] == 0
    assert shell("--seed x 2>&-")[0] == 2
    assert shell("--seed x 2>/dev/full")[0] == 2
    for env in ({"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        code, shown, said = shell("", **env)
        assert (code, said) == (0, "")
        assert "⟦L│im" in shown
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[0]) + "\n") * 2000)
    common[-2:] = ["--rows", "1:"]
    for way in ([], ["--json"]):
        running = subprocess.Popen([*common, *way], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.stdout.readline()
        running.stdout.close()
        assert (running.wait(), running.stderr.read()) == (141, "")
        running.stderr.close()


@pytest.mark.prove
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_behind(tokenizer, tmp_path, number, code):
    data, folder = tmp_path / "rows.jsonl", tmp_path / "tmp"
    folder.mkdir()
    with data.open("w") as file:
        for n in range(20_000):
            file.write(
                json.dumps({"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1 + n % 90)))}) + "\n"
            )
    command = [sys.executable, "-m", "instil", "inspect", "--tokenizer", tokenizer, "--data", str(data)]
    running = subprocess.Popen(
        [*command, "--template", "chatml", "--summary", "--no-cache", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    for _ in range(500):
        if any(folder.glob(".instil-*")):
            break
        time.sleep(0.02)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (code, "instil: ended by a signal\n")
    assert os.listdir(folder) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


def test_templates_lists_and_shows(instil):
    listed = instil("templates").stdout
    for name in ("alpaca", "human-assistant", "prompt-tokens", "headers", "llama3", "chatml", "fim"):
        assert name in listed
        assert "┃" in instil("templates", name).stdout
    assert instil("templates", "chatml").stdout.strip() == (
        "<|im_start|>user\nName the capital.\n\nPeru<|im_end|>\n<|im_start|>assistant\n┃Lima<|im_end|>"
    )
    assert "{%- for message in messages -%}" in instil("templates", "chatml", "--source").stdout
    assert "chatml" in instil("templates", "chatlm", code=2).stderr
    assert "did you mean 'chatml'?" in instil("templates", "ChatML", code=2).stderr


def test_the_sample_data_is_read_whole(instil, tokenizer):
    data = [str(path) for path in sample_data()]
    summary = json.loads(
        instil(
            "inspect", "--tokenizer", tokenizer, "--template", "chatml", "--data", *data, "--summary", "--json"
        ).stdout
    )
    assert summary["rows"]["kept"] == summary["rows"]["read"] == 143
    assert summary["ending_in_stop_token"] == summary["exchanges"]
