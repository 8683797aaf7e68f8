"""Bad and adversarial rows: what each file yields, and exactly what is said of it."""

import gzip
import json

import pytest

from instil.conversation import Message
from instil.data import files, read
from instil.errors import DataError, RowProblem

GOOD = b'{"instruction": "Add.", "output": "3"}\n'
U = {"role": "user", "content": "Why?"}
A = {"role": "assistant", "content": "So."}


def row(**columns):
    return json.dumps(columns).encode() + b"\n"


def chat(*messages, **columns):
    return row(messages=list(messages), **columns)


# name: (suffix, the file, the answers of its good rows, [(place, field, part of the reason or remedy), ...])
CORPUS = {
    # The file
    "malformed": (".jsonl", GOOD + b'{"instruction": "x" "output": "y"}\n' + GOOD, 2, [(2, "", "at column 21")]),
    "cut short": (".jsonl", GOOD + b'{"instruction": "Add.", "outp', 1, [(2, "", "ends early")]),
    "cut short in an object": (".jsonl", GOOD + b'{"instruction": "Add."', 1, [(2, "", "cut short: write it anew")]),
    "two rows on a line": (".jsonl", GOOD + GOOD.strip() + GOOD, 1, [(2, "", "one line holds one row")]),
    "NaN": (".jsonl", GOOD + b'{"instruction": "a", "output": "b", "score": NaN}\n', 1, [(2, "", "NaN is not JSON")]),
    "Infinity": (".jsonl", GOOD + b'{"output": "b", "score": -Infinity}\n', 1, [(2, "", "-Infinity is not JSON")]),
    "too large": (".jsonl", GOOD + b'{"output": "b", "score": 1e999}\n', 1, [(2, "", "1e999 is too large")]),
    "too many digits": (".jsonl", GOOD + b'{"n": ' + b"9" * 5000 + b"}\n", 1, [(2, "", "too many digits")]),
    "key twice": (".jsonl", GOOD + b'{"output": "a", "output": "b"}\n', 1, [(2, "", "'output' stands twice")]),
    "key twice below": (".jsonl", GOOD + b'{"output": {"a": 1, "a": 2}}\n', 1, [(2, "", "'a' stands twice")]),
    "lone surrogate": (
        ".jsonl",
        GOOD + b'{"instruction": "a", "output": "\\ud83d"}\n',
        1,
        [(2, "", "\\ud83d is half of a surrogate pair")],
    ),
    "lone surrogate in a key": (".jsonl", GOOD + b'{"\\udE00": 1}\n', 1, [(2, "", "\\ude00 is half")]),
    "surrogate pair": (".jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"], []),
    "escaped backslash before u": (".jsonl", b'{"text": "\\\\ud83d"}\n', ["\\ud83d"], []),
    "not UTF-8": (".jsonl", GOOD + b'{"output": "\xff"}\n' + GOOD, 2, [(2, "", "byte 0xff at offset 51 of the file")]),
    "UTF-16": (".jsonl", '{"text": "x"}\n'.encode("utf-16"), 0, [(1, "", "byte 0xff at offset 0"), (2, "", "")]),
    "byte order mark": (".jsonl", b'\xef\xbb\xbf{"text": "x"}\n', ["x"], []),
    "mark, then not UTF-8": (
        ".jsonl",
        b'\xef\xbb\xbf{"text": "\xff"}\n{"text": "x"}\n',
        ["x"],
        [(1, "", "offset 13")],
    ),
    "carriage returns": (".jsonl", b'{"text": "x"}\r\n{"text": "y\\r\\n"}\r\n', ["x", "y\r\n"], []),
    "blank lines": (".jsonl", b'\n  \n{"text": "x"}\n\n{"text": 7}\n', ["x"], [(5, "text", "the number 7")]),
    "NUL": (".jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"], []),
    "raw control character": (".jsonl", GOOD + b'{"output": "a\x01"}\n', 1, [(2, "", "invalid control character")]),
    "line separator in a string": (".jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"], []),
    "not an object": (".jsonl", GOOD + b'["a"]\n7\nnull\n', 1, [(2, "", "the list"), (3, "", "7"), (4, "", "null")]),
    "array in .jsonl": (".jsonl", b"[\n" + GOOD + b"]\n", 1, [(1, "", "belongs into a .json"), (3, "", "malformed")]),
    "nested too deeply": (".jsonl", GOOD + b'{"a":' * 9999 + b"1" + b"}" * 9999, 1, [(2, "", "nested too deeply")]),
    # .json
    "array, key twice": (".json", b'[{"text": "x"},\n{"a": 1, "a": 2},\n{"text": "y"}]', ["x", "y"], [(2, "", "'a'")]),
    "array, not UTF-8": (
        ".json",
        b'[{"text": "\xc3\xa9"},\n{"text": "\xe9"},\n{"text": "y"}]',
        ["é", "y"],
        [(2, "", "byte 0xe9 at offset 27 of the file")],
    ),
    "array, malformed": (
        ".json",
        b'[{"text": "x"},\n {"text": "y",,},\n {"text": "z"}]',
        ["x"],
        [(2, "", "at line 2, column 15: expecting property name")],
    ),
    "array, not closed": (".json", b'[{"text": "x"},\n{"text": "y"}\n', ["x", "y"], [(3, "", "not closed")]),
    "array, cut short": (".json", b'[{"text": "x"},\n{"text": "y', ["x"], [(2, "", "ends in the middle of this row")]),
    "array, comma at the end": (".json", b'[{"text": "x"},\n]', ["x"], [(2, "", "a row must follow a comma")]),
    "array, no comma": (".json", b'[{"text": "x"}\n {"text": "y"}]', ["x"], [(2, "", "column 2: expected a comma")]),
    "array, text behind": (".json", b'[{"text": "x"}]\n{}', ["x"], [(2, "", "text follows the array")]),
    "array, number": (".json", b'[{"text": "x"}, 12, {"text": "y"}]', ["x", "y"], [("1:17", "", "the number 12")]),
    "array, mark": (".json", b'\xef\xbb\xbf[{"text": "x"}]', ["x"], []),
    "lines in .json": (".json", b'{"text": "x"}\n{"text": }\n{"text": "y"}', ["x", "y"], [(2, "", "expecting value")]),
    "objects over lines": (".json", b'{\n"text": "x"\n}\n{\n"text": 7}', ["x"], [(4, "text", "must be a string")]),
    # .csv and .tsv
    "ragged": (".csv", b"question,answer\na,b\na,b,c\na\na,b\n", 2, [(3, "", "3 cells"), (4, "", "has 1 cells")]),
    "quoted line breaks": (".csv", b'text\n"a\r\nb"\n"c""d"\n', ["a\r\nb", 'c"d'], []),
    "line of a record": (".csv", b'question,answer\n"a\n\nb",c\n\n"d\n",\n', 1, [(6, "answer", "is empty")]),
    "open quote": (".csv", b'question,answer\na,b\n"a,b\na,b\n', 1, [(3, "", "unexpected end of data")]),
    "csv, not UTF-8": (".csv", b"text\nx\n\xe9\ny\n", ["x", "y"], [(3, "", "byte 0xe9 at offset 7")]),
    "header twice": (".csv", b"text,text\na,b\n", 0, [(1, "", "'text' stands twice in the header")]),
    "csv, broken messages": (".csv", b'messages\n"[{""role"": "\n', 0, [(2, "messages", "malformed JSON")]),
    "tsv": (".tsv", b'question\tanswer\na,b\tc\n"d\te"\tf\n', ["c", "f"], []),
    "csv, mark and returns": (".csv", b'\xef\xbb\xbf"text"\r\nx\r\n', ["x"], []),
    # .yaml
    "yaml, unquoted": (".yaml", b"- text: x\n- text: 7\n- text: yes\n", ["x"], [(2, "text", "7"), (3, "text", "true")]),
    "yaml, key twice": (".yml", b"- text: x\n- text: a\n  text: b\n- text: y\n", ["x", "y"], [(2, "", "'text'")]),
    "yaml, malformed": (
        ".yaml",
        b"- text: x\n- {text: y\n- z",
        ["x"],
        [(2, "", "at line 4, column 1: ")],
    ),
    "yaml, broken behind a row": (
        ".yaml",
        b"[{text: x}, {text: y} {text: z}]",
        ["x", "y"],
        [("1:14", "", "malformed")],
    ),
    "yaml, no list": (".yaml", b"rows:\n- text: x\n", 0, [(1, "", "must be a list of rows")]),
    "yaml, python": (".yaml", b"- text: x\n- !!python/name:os.system {}\n", ["x"], [(2, "", "could not determine")]),
    "yaml, many aliases": (
        ".yaml",
        b"- text: x\n- a: &a [1,2,3,4,5,6,7,8,9,0]\n  b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        b"  c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n  d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
        b"  e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n  f: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
        ["x"],
        [(2, "", "unfolds into more than")],
    ),
    "yaml, recursive": (".yaml", b"- text: x\n- text: y\n  a: &a [*a]\n", ["x"], [(2, "", "unfolds into")]),
    # Columns
    "answer missing": (".jsonl", GOOD + row(instruction="Add."), 1, [(2, "output", "is missing")]),
    "answer mistyped": (".jsonl", GOOD + row(instruction="a", outptu="b"), 1, [(2, "output", "mean 'outptu'?")]),
    "answer null": (".jsonl", GOOD + row(instruction="a", output=None), 1, [(2, "output", "is null")]),
    "answer a list": (".jsonl", GOOD + row(instruction="a", output=["b"]), 1, [(2, "output", "the list ['b']")]),
    "answer white": (".jsonl", GOOD + row(instruction="a", output=" \n"), 1, [(2, "output", "is empty")]),
    "question missing": (".jsonl", GOOD + row(output="b"), 1, [(2, "instruction", "is missing")]),
    "question white": (".jsonl", row(instruction=" ", input="", output="b"), 0, [(1, "instruction", "is empty")]),
    "everything at once": (
        ".jsonl",
        row(instruction=1, input=2, output="", system=3, history=[["a"]], tools="{"),
        0,
        [(1, each, "") for each in ("system", "history[0]", "instruction", "input", "output", "tools")],
    ),
    "prompt among answers": (".jsonl", GOOD + row(prompt="x"), 1, [(2, "instruction", ""), (2, "output", "")]),
    "unknown among known": (".jsonl", GOOD + row(id=1), 1, [(2, "", "no known shape has the columns 'id'")]),
    "answer beside a prompt": (
        ".jsonl",
        row(text="x") + row(prompt="a", reply="b", output="c"),
        ["x"],
        [(2, "", "no known")],
    ),
    "instances": (
        ".jsonl",
        row(instruction="a", instances=[{"input": 1, "output": "b"}, {"output": " "}, 3]),
        0,
        [(1, "instances[0].input", "1"), (1, "instances[1].output", "empty"), (1, "instances[2]", "3")],
    ),
    "no instances": (".jsonl", row(instruction="a", instances=[]), 0, [(1, "instances", "the list []")]),
    "empty middle": (".jsonl", row(prefix="", suffix="", middle=""), 0, [(1, "middle", "is empty")]),
    "turns": (".jsonl", row(turns=["a", 2]), 0, [(1, "turns[1]", "the number 2")]),
    # Messages
    "role unknown": (".jsonl", chat(U, A | {"role": "asistant"}), 0, [(1, "messages[1].role", "mean 'assistant'?")]),
    "role missing": (".jsonl", chat({"content": "x"}, A), 0, [(1, "messages[0].role", "is missing")]),
    "role a list": (".jsonl", chat(U | {"role": ["user"]}, A), 0, [(1, "messages[0].role", "the list ['user']")]),
    "content missing": (".jsonl", chat({"role": "user"}, A), 0, [(1, "messages[0].content", "is missing")]),
    "content null": (".jsonl", chat(U, A | {"content": None}), 0, [(1, "messages[1].content", "is null")]),
    "content a number": (".jsonl", chat(U | {"content": 1}, A), 0, [(1, "messages[0].content", "the number 1")]),
    "answer empty": (".jsonl", chat(U, A | {"content": " "}), 0, [(1, "messages[1].content", "the answer is empty")]),
    "user empty": (".jsonl", chat(U | {"content": ""}, A), 0, [(1, "messages[0].content", "message is empty")]),
    "no answer": (".jsonl", chat(U), 0, [(1, "messages", "no assistant turn")]),
    "no messages": (".jsonl", row(messages=[]), 0, [(1, "messages", "is empty")]),
    "messages null": (".jsonl", chat(U, A) + row(messages=None), ["So."], [(2, "messages", "null")]),
    "messages text": (".jsonl", row(messages="hello"), 0, [(1, "messages", "the string 'hello'")]),
    "message a string": (".jsonl", row(messages=["hello", A]), 0, [(1, "messages[0]", "must be a message")]),
    "user after user": (".jsonl", chat(U, U, A), 0, [(1, "messages[1].role", "join the two")]),
    "answer after answer": (".jsonl", chat(U, A, A), 0, [(1, "messages[2].role", "assistant follows assistant")]),
    "answer first": (".jsonl", chat(A, U, A), 0, [(1, "messages[0].role", "assistant comes first")]),
    "system late": (".jsonl", chat(U, A, U | {"role": "system"}), 0, [(1, "messages[2].role", "belongs at the start")]),
    "tool uncalled": (".jsonl", chat(U, A, A | {"role": "tool"}), 0, [(1, "messages[2].role", "called no tool")]),
    "user after tool": (
        ".jsonl",
        chat(U, {"role": "assistant", "tool_calls": [{"name": "f"}]}, A | {"role": "tool"}, U, A),
        0,
        [(1, "messages[3].role", "user follows tool")],
    ),
    "two system prompts": (
        ".jsonl",
        chat(U | {"role": "system"}, U, A, system="x"),
        0,
        [(1, "system", "given in the")],
    ),
    "user at the end": (".jsonl", chat(U, A, U), 1, []),
    "content not its parts": (
        ".jsonl",
        chat(U | {"content": "Add.", "instruction": "Add.", "input": "1 2"}, A),
        0,
        [(1, "messages[0].content", "is not what instruction and input make")],
    ),
    "content not its part": (
        ".jsonl",
        chat(U | {"content": "Add 1.", "instruction": "Add."}, A),
        0,
        [(1, "messages[0].content", "is not what instruction makes")],
    ),
    "part no text": (".jsonl", chat(U | {"instruction": "Add.", "input": 3}, A), 0, [(1, "messages[0].input", "3")]),
    "weight below 0": (".jsonl", chat(U, A | {"weight": -1}), 0, [(1, "messages[1].weight", "-1")]),
    "weight true": (".jsonl", chat(U, A | {"weight": True}), 0, [(1, "messages[1].weight", "true")]),
    "weight text": (".jsonl", chat(U, A | {"loss_weight": "1"}), 0, [(1, "messages[1].loss_weight", "'1'")]),
    "image": (
        ".jsonl",
        chat(U | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A),
        0,
        [(1, "messages[0].content[0].type", "image_url is not supported")],
    ),
    "part unknown": (
        ".jsonl",
        chat(U | {"content": [{"type": "x"}]}, A),
        0,
        [(1, "messages[0].content[0].type", "'x'")],
    ),
    "part a string": (".jsonl", chat(U | {"content": ["x"]}, A), 0, [(1, "messages[0].content[0]", "must be a part")]),
    "arguments": (
        ".jsonl",
        chat(U, A | {"tool_calls": [{"function": {"name": "f", "arguments": "{a: 1}"}}]}),
        0,
        [(1, "messages[1].tool_calls[0].function.arguments", "malformed JSON at column 2")],
    ),
    "arguments a list": (
        ".jsonl",
        chat(U, A | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}),
        0,
        [(1, "messages[1].tool_calls[0].arguments", "must be an object")],
    ),
    "call without a name": (
        ".jsonl",
        chat(U, A | {"tool_calls": [{"function": {"arguments": {}}}]}),
        0,
        [(1, "messages[1].tool_calls[0]", "with name and arguments")],
    ),
    "call by a user": (
        ".jsonl",
        chat(U | {"tool_calls": [{"name": "f"}]}, A),
        0,
        [(1, "messages[0].tool_calls", "only an assistant calls tools, and this is user")],
    ),
    "tools": (".jsonl", chat(U, A, tools=[{"x": 1}]), 0, [(1, "tools[0]", "must be a function with its name")]),
    "tools not JSON": (".jsonl", chat(U, A, tools="[{]"), 0, [(1, "tools", "malformed JSON")]),
    # Transcripts and pairs
    "transcript unanswered": (".jsonl", row(text="Human: a"), 0, [(1, "text", "without an assistant turn")]),
    "transcript empty answer": (
        ".jsonl",
        row(text="Human: a\n\nAssistant: "),
        0,
        [(1, "text, turn 2", "the answer is empty")],
    ),
    "transcript goes on": (".jsonl", row(text="Human: a\n\nAssistant: b\n\nAssistant: c"), ["b\n\nc"], []),
    "transcript with headings, nothing answered": (
        ".jsonl",
        row(text="### Instruction: a\n### Response:\n### Response: "),
        0,
        [(1, "text, turn 2", "the answer is empty")],
    ),
    "pair with an empty answer": (
        ".jsonl",
        row(chosen="Human: a\n\nAssistant:", rejected="Human: a\n\nAssistant: b")
        + row(prompt="a", chosen="b", rejected=""),
        ["", "b"],
        [],
    ),
    "prompts differ": (
        ".jsonl",
        row(chosen="Human: a\n\nAssistant: b", rejected="Human: c\n\nAssistant: b"),
        0,
        [(1, "chosen, turn 1", "the prompts of chosen and rejected differ: the string 'a' against the string 'c'")],
    ),
    "pair ends in a question": (
        ".jsonl",
        row(chosen="Human: a\n\nAssistant: b\n\nHuman: c", rejected="Human: a\n\nAssistant: b"),
        0,
        [(1, "chosen", "must end in an assistant turn")],
    ),
    "pair without a prompt": (".jsonl", row(chosen="a", rejected="b"), 0, [(1, "chosen", ""), (1, "rejected", "")]),
    "rejected empty": (".jsonl", row(prompt="a", chosen="b", rejected=[]), 0, [(1, "rejected", "the list []")]),
    "rejected other prompt": (
        ".jsonl",
        row(prompt="a", chosen="b", rejected=[{"role": "user", "content": "c"}, A]),
        0,
        [(1, "rejected[0]", "does not begin with the prompt")],
    ),
    "verdict no bool": (
        ".jsonl",
        row(prompt="a", completion="b", label=True) + row(prompt="a", label="good"),
        ["b"],
        [(2, "label", "the string 'good'"), (2, "completion", "is missing")],
    ),
    "verdict null": (
        ".jsonl",
        row(prompt="a", completion="b", label=True) + row(prompt="a", completion="c", label=None) + chat(U, A, label=2),
        ["b"],
        [(2, "label", "must be true or false, and is null"), (3, "label", "the number 2")],
    ),
    "verdict in words": (
        ".csv",
        b"prompt,completion,label\na,b,True\na,c,\na,d,good\n",
        ["b"],
        [(3, "label", "the string ''"), (4, "label", "the string 'good'")],
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(tmp_path, name):
    suffix, content, good, bad = CORPUS[name]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    records = read(file, on_bad_row="skip")
    answers = [record.conversations[0].messages[-1].content for record in records]
    said = [(problem.source, problem.field) for problem in records.report.problems]
    assert said == [(f"{file}:{line}", field) for line, field, _ in bad], records.report.problems
    for problem, (_, _, part) in zip(records.report.problems, bad, strict=True):
        assert part in f"{problem.reason} {problem.remedy}"
    assert answers == good if isinstance(good, list) else len(answers) == good
    assert records.report.records == len(answers)
    assert records.report.rows == len(answers) + records.report.rejected


def test_the_corpus_is_large():
    assert sum(bool(bad) for *_, bad in CORPUS.values()) >= 80


def test_all_bad_rows_are_raised_together(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_bytes(GOOD + b"{\n" + GOOD + row(instruction=1, output=2))
    other.write_bytes(GOOD + row(instruction="x"))
    records = read([file, other])
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(records)
    assert [str(record.source) for record in seen] == [f"{file}:1"]
    assert [(problem.source, problem.field) for problem in caught.value.problems] == [
        (f"{file}:2", ""),
        (f"{file}:4", "instruction"),
        (f"{file}:4", "output"),
        (f"{other}:2", "output"),
    ]
    assert str(caught.value).startswith("3 of 6 rows cannot be used\n")
    with pytest.raises(DataError):
        records.check()


def test_rejects_take_each_bad_row_whole(tmp_path):
    file, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    file.write_bytes(GOOD + b'{"output": \xff}\n{"a": NaN}\n' + row(instruction="é", output=None, id=3) + b"[1]\n")
    records = read(file, on_bad_row="skip", rejects=rejects)
    assert not rejects.exists()
    report = records.check()
    written = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [entry["source"] for entry in written] == [f"{file}:{line}" for line in (2, 3, 4, 5)]
    rows = [{"base64": "eyJvdXRwdXQiOiD/fQo="}, '{"a": NaN}', {"instruction": "é", "output": None, "id": 3}, [1]]
    assert [entry["row"] for entry in written] == rows
    assert written[2]["problems"] == [
        {"field": "output", "reason": "must be a string, and is null", "remedy": ""},
    ]
    assert report.rejected == 4
    assert report.records == 1
    assert list(tmp_path.iterdir()) == [file, rejects] or sorted(tmp_path.iterdir()) == [rejects, file]


MINIFIED = {
    ".json": b'[{"text": "a"}, {"text": "b"}, {"text": "c"}] x',
    ".yaml": b"[{text: a}, {text: b}, {text: c}, {text: }]",
}


@pytest.mark.parametrize("suffix", MINIFIED)
def test_a_row_that_a_later_stage_rejects_takes_no_other_of_its_line_along(tmp_path, suffix):
    file, rejects = tmp_path / f"rows{suffix}", tmp_path / "rejects.jsonl"
    file.write_bytes(MINIFIED[suffix])
    records = read(file, on_bad_row="skip", rejects=rejects)
    later = RowProblem(str(list(records)[1].source), "", "is too long")
    records.reject([*records.report.problems, later])
    written = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert written[0]["row"] == {"text": "b"}
    assert len({entry["source"] for entry in written}) == len(written) == 2
    assert written[0]["problems"] == [{"field": "", "reason": "is too long", "remedy": ""}]


def test_few_problems_of_skipped_rows_are_kept(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"{\n" * 2500 + GOOD)
    records = read(file, on_bad_row="skip")
    told = [(len(rows), len(problems)) for rows, problems in records.shared(0, 1, 600)]
    assert told == [(1, 599), (0, 600), (0, 600), (0, 600), (1, 101)]
    assert (records.report.rows, records.report.rejected, len(records.report.problems)) == (2502, 2500, 1000)
    strict = read(file)
    assert sum(len(problems) for _, problems in strict.shared(0, 1, 600)) == len(strict.report.problems) == 2500


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_too_long_to_hold_is_one_bad_row(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(files, "MAX_LINE", 50)
    file, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    long = row(text="x" * 3_000_000)
    file.write_bytes(pack(GOOD + long + b'{"text": "\xff"}\n' + GOOD + long.strip()))
    records = read(file, on_bad_row="skip", rejects=rejects)
    assert [record.source.line for record in records] == [1, 4]
    assert [(problem.source, problem.reason) for problem in records.report.problems] == [
        (f"{file}:2", "is a line of 50 bytes or more"),
        (f"{file}:3", f"byte 0xff at offset {len(GOOD + long) + 10} of the file is not UTF-8"),
        (f"{file}:5", "is a line of 50 bytes or more"),
    ]
    assert json.loads(rejects.read_text(encoding="utf-8").splitlines()[0])["row"] == long[:50].decode()


def test_rejects_stay_away_when_reading_stops_early(tmp_path):
    file, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    file.write_bytes(b"{\n" + GOOD + GOOD)
    rejects.write_bytes(b"old")
    iterator = iter(read(file, on_bad_row="skip", rejects=rejects))
    assert next(iterator).conversations[0].messages[1] == Message("assistant", "3")
    iterator.close()
    assert rejects.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [rejects, file]
