"""Every kind of file, in every wrapping, gives the same records; and what cannot be found is named."""

import csv
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from types import MappingProxyType

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from instil.conversation import Source
from instil.data import read
from instil.errors import DataError, UsageError

ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "3", "id": "a"},
    {"instruction": 'Say "é"\n\nand 😀', "input": "", "output": 'é\t😀\n"', "id": "b"},
    {"instruction": "Quote", "input": "'", "output": "''", "id": "c"},
]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_arrow(rows, opened):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows)
    with opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def as_yaml(rows):
    return ("# rows\n" + "".join(f"- {json.dumps(row, ensure_ascii=False)}\n" for row in rows)).encode()


WRITERS = {
    "a.jsonl": as_jsonl,
    "a.ndjson": lambda rows: as_jsonl(rows).replace(b"\n", b"\r\n"),
    "lines.json": as_jsonl,
    "plain.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False).encode(),
    "mark.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode(),
    "a.csv": as_csv,
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": as_parquet,
    "a.arrow": lambda rows: as_arrow(rows, ipc.new_file),
    "stream.arrow": lambda rows: as_arrow(rows, ipc.new_stream),
    "a.yaml": as_yaml,
    "a.yml": as_yaml,
}
TEXTS = [name for name in WRITERS if not name.endswith((".parquet", ".arrow"))]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def plain(records):
    """Records without their places."""
    return [(each.shape, each.kind, each.conversations, each.labels, dict(each.extra)) for each in records]


class Again:
    """Rows that can be iterated again and again, and are no sequence."""

    def __init__(self, rows):
        self._rows = rows

    def __iter__(self):
        return iter(self._rows)


@pytest.fixture
def wanted(tmp_path):
    file = tmp_path / "wanted.jsonl"
    file.write_bytes(as_jsonl(ROWS))
    return plain(read(file))


@pytest.mark.parametrize("name", [name + suffix for suffix in PACKERS for name in (TEXTS if suffix else list(WRITERS))])
def test_every_kind_gives_the_same_records(tmp_path, wanted, name):
    suffix = next(suffix for suffix in (".gz", ".zst", "") if name.endswith(suffix))
    file = tmp_path / name
    file.write_bytes(PACKERS[suffix](WRITERS[name.removesuffix(suffix)](ROWS)))
    records = read(file)
    assert plain(records) == wanted
    assert plain(records) == wanted
    assert records.report.notes == ({f"{file} begins with a byte order mark": 1} if "mark" in name else {})


def test_messages_in_every_kind(tmp_path):
    call = {"name": "f", "arguments": {"a": 1}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call], "content": None}]
    rows = [{"messages": messages, "tools": [{"name": "f", "parameters": {}}]}]
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    found = {}
    for name, content in WRITERS.items():
        file = tmp_path / name
        file.write_bytes(content(texts if name.endswith(("csv", "tsv", "parquet")) or "arrow" in name else rows))
        found[name] = plain(read(file))
    assert all(each == found["a.jsonl"] for each in found.values())
    assert found["a.jsonl"][0][2][0].messages[1].tool_calls[0]["function"] == call


def test_nested_columns_of_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    file.write_bytes(as_parquet([{"messages": messages, "text": None}]))
    (record,) = read(file)
    assert [message.weight for message in record.conversations[0].messages] == [None, 0.5]
    assert record.extra == {}


def test_several_frames_and_members(tmp_path):
    lines = [as_jsonl([row]) for row in ROWS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    assert [record.source.line for record in read(tmp_path)] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_cut_short(tmp_path, suffix):
    file = tmp_path / f"rows.jsonl{suffix}"
    packed = PACKERS[suffix](b"".join(as_jsonl([row | {"id": str(n)}]) for n in range(9999) for row in ROWS))
    file.write_bytes(packed[: len(packed) * 9 // 10])
    with pytest.raises(DataError) as caught:
        read(file).check()
    assert "the file cannot be read on from here" in caught.value.problems[-1].reason


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet:1: the file cannot be read"):
        read(tmp_path).check()


def test_a_cell_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    cells = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *cells.buffers()[1:])
    with ipc.new_file(tmp_path / "a.arrow", pyarrow.schema([("text", pyarrow.string())])) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_arrays([text], ["text"]))
    records = read(tmp_path, on_bad_row="skip")
    assert [record.conversations[0].messages[0].content for record in records] == ["a", "c"]
    assert records.report.problems[0].source == f"{tmp_path / 'a.arrow'}:2"
    assert "can't decode byte 0xff" in records.report.problems[0].reason


def test_lines_of_elements(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('\n\n[\n  {"text": "a"},{"text": "b"},\n\n  {\n"text":\n"c"},\n{"text": "d"}\n]\n')
    assert [str(record.source).removeprefix(f"{file}:") for record in read(file)] == ["4", "4:17", "6", "9"]


@pytest.mark.parametrize("name", ["rows.json", "rows.yaml"])
def test_places_of_rows_on_one_line(tmp_path, name):
    file = tmp_path / name
    text = json.dumps([{"text": f"é{number}"} for number in range(40_000 if name == "rows.json" else 200)])
    file.write_text(text.replace("\\u00e9", "é"), encoding="utf-8")
    first, *others = read(file)
    assert first.source == Source(str(file), 1)
    said = [f'{{"text": "{other.conversations[0].messages[0].content}"}}' for other in others]
    begins = [other.source.column - 1 for other in others]
    found = file.read_text(encoding="utf-8")
    assert [found[begin : begin + len(row)] for begin, row in zip(begins, said, strict=True)] == said
    assert str(others[0].source) == f"{file}:1:18"


def test_lines_of_elements_in_a_long_file(tmp_path):
    file = tmp_path / "rows.json"
    rows = [{"text": f"{number} é " + "x" * (number % 97)} for number in range(20_000)]
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    lines = [2 + 3 * number for number in range(20_000)]
    assert [record.source.line for record in read(file)] == lines
    assert [record.conversations[0].messages[0].content for record in read(file)] == [row["text"] for row in rows]


def test_an_element_longer_than_the_window(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "é" * 3_000_000}, {"text": "b"}]), encoding="utf-8")
    assert [len(record.conversations[0].messages[0].content) for record in read(file)] == [3_000_000, 1]


def test_line_of_a_csv_record_is_its_first(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'text\n"a\n\nb"\n"c\r\nd"\ne\n')
    assert [record.source.line for record in read(file)] == [2, 5, 7]


def test_long_cells(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(next(iter(read(file))).conversations[0].messages[0].content) == 300_000


def test_folder_glob_and_list(tmp_path, wanted):
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.jsonl").write_bytes(as_jsonl(ROWS[2:]))
    (folder / "a.csv").write_bytes(as_csv(ROWS[:1]))
    (folder / "below" / "c.json").write_bytes(as_jsonl(ROWS[:1]))
    (folder / "README.md").write_text("none of the data")
    (folder / ".hidden" / "d.jsonl").write_bytes(b"{")
    first, second, third = wanted[0], wanted[2], wanted[0]
    assert plain(read(folder)) == [first, second, third]
    assert plain(read(str(folder / "*"))) == [first, second]
    assert plain(read([folder / "b.jsonl", str(folder / "**" / "*.json")])) == [second, third]
    assert read(folder).check().files == {
        str(folder / name): {"alpaca": 1} for name in ("a.csv", "b.jsonl", "below/c.json")
    }


PRINT = "from instil.data import read; r = read('-'); print([str(x.source) for x in r], len(list(r)), *r.report.notes)"


@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "a.jsonl.gz"])
def test_standard_input_can_be_read_twice(name):
    content = WRITERS[name.removesuffix(".gz")](ROWS)
    content = gzip.compress(content) if name.endswith(".gz") else content
    done = subprocess.run([sys.executable, "-c", PRINT], input=content, capture_output=True, check=True)
    lines = (2, 8, 14) if "pretty" in name else (1, 2, 3)
    assert done.stdout.decode() == f"{[f'stdin:{line}' for line in lines]} 3\n"


def test_hub_needs_datasets():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from instil.data import read; from instil.errors import DataError\n"
        "try: read('hf://owner/name:test')\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "hf://owner/name:test: needs the package `datasets`\n  pip install 'instil[hf]'\n"


def test_all_that_cannot_be_found_is_named_together(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "none").mkdir()
    names = ["trian.jsonl", "notes.txt", "none", "*.csv", "no/where.json"]
    with pytest.raises(DataError) as caught:
        read([*(tmp_path / name for name in names), tmp_path / "train.jsonl", "hf://a/b/c"])
    problems = caught.value.problems
    assert [problem.source for problem in problems] == [str(tmp_path / name) for name in names] + ["hf://a/b/c"]
    said = [
        f"did you mean '{tmp_path / 'train.jsonl'}'?",
        "'.txt' are not known",
        "holds no file of a known kind",
        "no file of a known kind fits",
        f"the folder {tmp_path / 'no'} does not exist",
        "write hf://owner/name",
    ]
    assert [part in str(problem) for part, problem in zip(said, problems, strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.json", b" [ ] "), ("a.csv", b"text\n"), ("a.yaml", b"")]
)
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path)


@pytest.mark.parametrize("rows", [list, tuple, iter, Again])
def test_rows_in_memory(wanted, rows):
    records = read(rows(ROWS))
    assert plain(records) == wanted
    assert [str(record.source) for record in records] == ["rows:1", "rows:2", "rows:3"]
    assert records.paths == ["rows"]
    assert records.bytes_on_disk is None
    assert records.fingerprint() is None


def test_bad_rows_in_memory(tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    rows = [{"text": "x"}, {"text": float("nan")}, 7, {"text": "\ud83d"}, {1: 2}, MappingProxyType({"text": 3})]
    records = read(rows, on_bad_row="skip", rejects=rejects)
    assert len(list(records)) == 1
    said = ["nan is not finite", "the number 7", "half of a surrogate", "must be a string", "must be a string"]
    problems = records.report.problems
    assert [part in str(problem) for part, problem in zip(said, problems, strict=True)] == [True] * 5
    assert [problem.source for problem in problems] == [f"rows:{number}" for number in (2, 3, 4, 5, 6)]
    assert json.loads(rejects.read_text(encoding="utf-8").splitlines()[4])["row"] == {"text": 3}


@pytest.mark.parametrize(
    ("data", "said"), [([ROWS[0], "a.jsonl"], "rows and paths in one list"), (ROWS[0], "is one mapping")]
)
def test_rows_in_memory_stand_in_a_list_of_their_own(data, said):
    with pytest.raises(UsageError, match=said):
        read(data)


def test_no_rows_in_memory():
    with pytest.raises(DataError, match="no data is given"):
        read([])


def test_rejects_may_not_be_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    with pytest.raises(UsageError, match="is part of the data"):
        read(tmp_path, on_bad_row="skip", rejects=tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path, on_bad_row="skip", rejects=tmp_path / "no" / "a.jsonl")


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 0, 3]))
def test_json_round_trip(tmp_path_factory, pairs, ascii_only, indent):
    folder = tmp_path_factory.mktemp("round")
    rows = [{"question": ask, "answer": say} for ask, say in pairs]
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    (folder / "a.jsonl").write_bytes(lines.encode())
    (folder / "b.json").write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode())
    said = [tuple(message.content for message in record.conversations[0].messages) for record in read(folder)]
    assert said == pairs * 2


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_table_round_trip(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("round")
    rows = [{"question": ask, "answer": say} for ask, say in pairs]
    (folder / "a.csv").write_bytes(as_csv(rows))
    (folder / "b.parquet").write_bytes(as_parquet(rows))
    (folder / "c.tsv").write_bytes(as_csv(rows, "\t"))
    said = [tuple(message.content for message in record.conversations[0].messages) for record in read(folder)]
    assert said == pairs * 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.yaml"])
def test_memory_stays_constant(tmp_path, name):
    count = 2_000 if name.endswith("yaml") else 20_000
    rows = ({"question": f"What is {number}?", "answer": "A number. " * 90} for number in range(count))
    file = tmp_path / name
    if name.endswith("parquet"):
        table = pyarrow.Table.from_pylist(list(rows))
        parquet.write_table(table, file, row_group_size=10_000)
    else:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write({"json": "[", "csv": "question,answer\n"}.get(name.rsplit(".")[1], ""))
            for number, row in enumerate(rows):
                if name.endswith("csv"):
                    stream.write(f"{row['question']},{row['answer']}\n")
                elif name.endswith("yaml"):
                    stream.write(f"- {json.dumps(row)}\n")
                else:
                    stream.write((",\n" if number and name.endswith("json") else "") + json.dumps(row))
                    stream.write("\n" if name.endswith("jsonl") else "")
            stream.write("]" if name.endswith(".json") else "")
    records = read(file)
    tracemalloc.start()
    try:
        assert sum(1 for _ in records) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = count * 900
    assert peak < size / (3 if name.endswith("yaml") else 5)


def test_a_row_that_holds_itself_is_among_the_rejects(tmp_path):
    file, rejects = tmp_path / "rows.yaml", tmp_path / "rejects.jsonl"
    file.write_text("- &a {instruction: x, output: y, z: *a}\n- {instruction: a, output: b}\n")
    assert len(list(read(file, on_bad_row="skip", rejects=rejects))) == 1
    (entry,) = map(json.loads, rejects.read_text().splitlines())
    assert entry["source"] == f"{file}:1"
    assert isinstance(entry["row"], str)


def test_a_file_name_that_is_no_utf8_has_a_fingerprint(tmp_path):
    file = tmp_path / "caf\udce9.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n')
    assert read(file).fingerprint() != read([file, file]).fingerprint()
