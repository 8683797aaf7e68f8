"""Each shape of rows, held against the exact Record it must become."""

import json
from dataclasses import replace

import pytest

from instil.conversation import Conversation, Message, Record, Source
from instil.data import read
from instil.errors import DataError, UsageError
from instil.pocket import sample_data

SYSTEM = Message("system", "Be brief.")
ASK = Message("user", "Why?")
SAY = Message("assistant", "Because.")
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def only(tmp_path, row, **options):
    """The record of a file that holds one row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    records = list(read(file, **options))
    assert len(records) == 1
    assert records[0].source == Source(str(file), 1)
    return records[0]


def same(record, shape, kind, *conversations, labels=("",), later=(), extra=None):
    wanted = tuple(each if isinstance(each, Conversation) else Conversation(tuple(each)) for each in conversations)
    assert record == Record(record.source, shape, kind, wanted, labels, later, extra or {})


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
ADD_ASK = Message("user", "Add.\n\n1 2", fields={"instruction": "Add.", "input": "1 2"})
BARE_ASK = Message("user", "Add.", fields={"instruction": "Add."})

CONVERSATIONS = {
    "alpaca": (ALPACA, "alpaca", [ADD_ASK, Message("assistant", "3")]),
    "alpaca, empty input": (ALPACA | {"input": " "}, "alpaca", [BARE_ASK, Message("assistant", "3")]),
    "alpaca, input alone": (
        ALPACA | {"instruction": ""},
        "alpaca",
        [Message("user", "1 2", fields={"instruction": "", "input": "1 2"}), Message("assistant", "3")],
    ),
    "alpaca, the names of Dolly": (
        {"instruction": "Add.", "context": "1 2", "response": "3"},
        "alpaca",
        [ADD_ASK, Message("assistant", "3")],
    ),
    "alpaca, system and history": (
        ALPACA | {"system": "Be brief.", "history": [["Why?", "Because."]]},
        "alpaca",
        [SYSTEM, ASK, SAY, ADD_ASK, Message("assistant", "3")],
    ),
    "alpaca, nulls": (
        ALPACA | {"input": None, "system": None, "history": None, "tools": None},
        "alpaca",
        [BARE_ASK, Message("assistant", "3")],
    ),
    "prompt-completion": ({"prompt": "Why?", "completion": "Because."}, "prompt-completion", [ASK, SAY]),
    "prompt-completion, messages": (
        {
            "prompt": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because."},
                {"role": "user", "content": "Why?"},
            ],
            "completion": [{"role": "assistant", "content": "Because."}],
        },
        "prompt-completion",
        [ASK, Message("assistant", "Because.", weight=0.0), ASK, SAY],
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Now."},
                {"role": "user", "content": "Why?", "weight": 0},
                {"role": "assistant", "content": "Because.", "reasoning_content": "Hm.", "loss_weight": 0.5},
            ]
        },
        "messages",
        [
            SYSTEM,
            Message("developer", "Now."),
            Message("user", "Why?", weight=0.0),
            Message("assistant", "Because.", reasoning_content="Hm.", weight=0.5),
        ],
    ),
    "messages, parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "value": "y?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Because."}],
                },
            ]
        },
        "messages",
        [ASK, Message("assistant", "Because.", reasoning_content="Hm.")],
    ),
    "messages as JSON text": (
        {"messages": '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]'},
        "messages",
        [ASK, SAY],
    ),
    "messages, think tags stay": (
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "<think>Hm.</think>Because."},
            ]
        },
        "messages",
        [ASK, Message("assistant", "<think>Hm.</think>Because.")],
    ),
    "messages, empty answer of no weight": (
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "", "weight": 0}] * 2},
        "messages",
        [ASK, Message("assistant", "", weight=0.0)] * 2,
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
        },
        "sharegpt",
        [SYSTEM, ASK, SAY],
    ),
    "sharegpt with roles": (
        {"conversation": [{"role": "user", "content": "Why?"}, {"role": "model", "content": "Because."}]},
        "sharegpt",
        [ASK, SAY],
    ),
    "question-answer": ({"question": "Why?", "answer": "Because."}, "question-answer", [ASK, SAY]),
    "transcript": (
        {"text": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: I said Human: twice\n\nAssistant: \n  So?  "},
        "transcript",
        [ASK, SAY, Message("user", "I said Human: twice"), Message("assistant", "So?")],
    ),
    "transcript with headings": (
        {"text": "### Human: Why?### Assistant: Because.\n### User: #### Human: no\n### Assistant: So?"},
        "transcript",
        [ASK, SAY, Message("user", "#### Human: no"), Message("assistant", "So?")],
    ),
    "transcript of an Alpaca prompt": (
        {"text": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"},
        "transcript",
        [ADD_ASK, Message("assistant", "3")],
    ),
    "fim": (
        {"prefix": "a = ", "suffix": "", "middle": "\n"},
        "fim",
        [Message("user", "a = ", fields={"prefix": "a = ", "suffix": ""}), Message("assistant", "\n")],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation(tmp_path, name):
    row, shape, messages = CONVERSATIONS[name]
    same(only(tmp_path, row), shape, "conversation", messages)
    same(only(tmp_path, row, format=shape), shape, "conversation", messages)
    same(only(tmp_path, row | {"id": 7}), shape, "conversation", messages, extra={"id": 7})


def test_self_instruct_has_a_conversation_for_each_instance(tmp_path):
    row = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]}
    first, second = [ADD_ASK, Message("assistant", "3")], [BARE_ASK, Message("assistant", "0")]
    same(only(tmp_path, row), "self-instruct", "conversation", first, second, labels=("", ""))


CALLS = {
    "wrapped": {"tool_calls": [CALL], "content": None},
    "arguments as JSON text": {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}], "content": ""},
    "bare": {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
    "legacy": {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": None},
    "part": {"content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
}


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("tools", [[ADD], [ADD["function"]], json.dumps([ADD["function"]])])
def test_tool_calls(tmp_path, form, tools):
    messages = [
        {"role": "user", "content": "1 + ?"},
        {"role": "assistant", **CALLS[form]},
        {"role": "function", "name": "add", "content": "1"},
        {"role": "assistant", "content": "1"},
    ]
    wanted = (
        Message("user", "1 + ?"),
        Message("assistant", tool_calls=(CALL,)),
        Message("tool", "1", name="add"),
        Message("assistant", "1"),
    )
    record = only(tmp_path, {"messages": messages, "tools": tools})
    same(record, "messages", "conversation", Conversation(wanted, (ADD,)))


def test_tool_calls_keep_their_ids(tmp_path):
    messages = [
        {"role": "user", "content": "1 + ?"},
        {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}], "content": "Let me see."},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    said = only(tmp_path, {"messages": messages}).conversations[0].messages
    assert said[1] == Message("assistant", "Let me see.", tool_calls=({"type": "function", "id": "c1", **CALL},))
    assert said[2] == Message("tool", "1", tool_call_id="c1")


def test_sharegpt_calls(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "1 + ?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "1"},
        ],
        "tools": json.dumps([ADD["function"]]),
    }
    said = (
        Message("user", "1 + ?"),
        Message("assistant", tool_calls=(CALL,)),
        Message("tool", "1"),
        Message("assistant", "1"),
    )
    same(only(tmp_path, row), "sharegpt", "conversation", Conversation(said, (ADD,)))


NO = Message("assistant", "No.")
MORE = [ASK, SAY, ASK]
HISTORY = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Why?"},
]


def wire(*messages):
    return [{"role": message.role, "content": message.content} for message in messages]


PAIRS = {
    "strings": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [ASK]),
    "question": ({"question": "Why?", "system": "Be brief.", "chosen": "Because.", "rejected": "No."}, [SYSTEM, ASK]),
    "messages": ({"prompt": HISTORY, "chosen": wire(SAY), "rejected": wire(NO)}, MORE),
    "repeated prompt": (
        {"prompt": HISTORY, "chosen": wire(*MORE, SAY), "rejected": wire(*MORE, NO)},
        MORE,
    ),
    "implicit prompt": ({"chosen": wire(*MORE, SAY), "rejected": wire(*MORE, NO)}, MORE),
    "prompt as text, whole conversations": (
        {"prompt": "Why?", "chosen": wire(SYSTEM, ASK, SAY), "rejected": wire(SYSTEM, ASK, NO)},
        [SYSTEM, ASK],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        [ASK],
    ),
    "instruction": (
        {"instruction": "Add.", "input": "1 2", "chosen": "Because.", "rejected": "No."},
        [ADD_ASK],
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Why?\n\nAssistant: No.",
        },
        MORE,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference(tmp_path, name):
    row, prompt = PAIRS[name]
    chosen, rejected = [*prompt, SAY], [*prompt, NO]
    for objective in (None, "preference"):
        record = only(tmp_path, row, objective=objective)
        same(record, "preference", "preference", chosen, rejected, labels=("chosen", "rejected"))
    trained = only(tmp_path, row, objective="supervised")
    same(trained, "preference", "conversation", chosen, extra={"rejected": row["rejected"]})


@pytest.mark.parametrize("rejected", [["No.", "Never."], [wire(NO), wire(Message("assistant", "Never."))]])
def test_preference_with_several_rejected(tmp_path, rejected):
    record = only(tmp_path, {"prompt": "Why?", "chosen": "Because.", "rejected": rejected})
    never = Message("assistant", "Never.")
    labels = ("chosen", "rejected", "rejected")
    same(record, "preference", "preference", [ASK, SAY], [ASK, NO], [ASK, never], labels=labels)


def test_identical_transcripts_keep_their_last_answer(tmp_path):
    text = "\n\nHuman: Why?\n\nAssistant: Because."
    record = only(tmp_path, {"chosen": text, "rejected": text})
    same(record, "preference", "preference", [ASK, SAY], [ASK, SAY], labels=("chosen", "rejected"))


def test_two_readings_of_output_beside_a_pair(tmp_path):
    row = ALPACA | {"chosen": "3", "rejected": "4"}
    for objective in (None, "supervised"):
        record = only(tmp_path, row, objective=objective)
        extra = {"chosen": "3", "rejected": "4"}
        same(record, "alpaca", "conversation", [ADD_ASK, Message("assistant", "3")], extra=extra)
    record = only(tmp_path, row, objective="preference")
    answers = [ADD_ASK, Message("assistant", "3")], [ADD_ASK, Message("assistant", "4")]
    same(record, "preference", "preference", *answers, labels=("chosen", "rejected"), extra={"output": "3"})


LABELLED = {
    "prompt and completion": {"prompt": "Why?", "completion": "Because.", "label": True},
    "messages": {"messages": wire(ASK, SAY), "label": True},
    "kto_tag": {"conversations": wire(ASK, SAY), "kto_tag": True},
    "a cell of text": {"prompt": "Why?", "completion": "Because.", "label": "True"},
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled(tmp_path, name):
    good = LABELLED[name]
    bad = {column: False if value in (True, "True") else value for column, value in good.items()}
    same(only(tmp_path, good), "labelled", "labelled", [ASK, SAY], labels=("good",))
    same(only(tmp_path, bad), "labelled", "labelled", [ASK, SAY], labels=("bad",))
    same(only(tmp_path, good, objective="supervised"), "labelled", "conversation", [ASK, SAY])
    same(only(tmp_path, bad, objective="supervised"), "labelled", "labelled", [ASK, SAY], labels=("bad",))


def test_numbers_are_verdicts_where_rows_are_known_to_have_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Why?", "completion": "Because.", "label": label} for label in (True, 1, 0, 1.0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [record.labels for record in read(file)] == [("good",), ("good",), ("bad",), ("good",)]
    numbered = {"messages": [WHY, {"role": "assistant", "content": "Because."}], "label": 0}
    same(only(tmp_path, numbered, format="labelled"), "labelled", "labelled", [ASK, SAY], labels=("bad",))
    same(only(tmp_path, numbered), "messages", "conversation", [ASK, SAY], extra={"label": 0})


def test_a_label_in_words_makes_no_labelled_row(tmp_path):
    row = {"prompt": "Why?", "label": "safe"}
    same(only(tmp_path, row), "prompt", "prompt", [ASK], extra={"label": "safe"})


def test_text(tmp_path):
    same(only(tmp_path, {"text": "A Human: said"}), "text", "text", [Message("assistant", "A Human: said")])
    transcript = "Human: Why?\n\nAssistant: Because."
    same(only(tmp_path, {"text": transcript}), "transcript", "conversation", [ASK, SAY])
    same(only(tmp_path, {"text": transcript}, objective="pretrain"), "text", "text", [Message("assistant", transcript)])


WHY = {"role": "user", "content": "Why?"}
PROMPTS = {
    "prompt": ({"prompt": "Why?"}, [ASK], ()),
    "prompt, messages": ({"prompt": HISTORY}, MORE, ()),
    "question": ({"question": "Why?"}, [ASK], ()),
    "instruction": ({"instruction": "Add.", "input": "1 2"}, [ADD_ASK], ()),
    "turns": ({"turns": ["Why?", "How?"]}, [ASK], ((Message("user", "How?"),),)),
    "gap": (
        {"prompt": "a", "suffix": "c"},
        [Message("user", "a", fields={"prefix": "a", "suffix": "c"})],
        (),
    ),
    "empty prefix": (
        {"prefix": "", "suffix": "c"},
        [Message("user", "", fields={"prefix": "", "suffix": "c"})],
        (),
    ),
}


def test_what_a_conversation_is_written_as_is_read_as_that_conversation(tmp_path):
    """The named parts of its messages included, which a template may place apart."""
    records = [each for each in read(sample_data()) if each.kind == "conversation"]
    records += [only(tmp_path, row) for row in (ALPACA, {"prefix": "", "suffix": "c", "middle": "b"})]
    named = 0
    for conversation in (each for record in records for each in record.conversations):
        (found,) = only(tmp_path, conversation.to_wire(), format="messages").conversations
        assert [replace(each, weight=None) for each in conversation.messages] == list(found.messages)
        assert found.tools == conversation.tools
        named += sum(bool(each.fields) for each in found.messages)
    assert named > 9


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt(tmp_path, name):
    row, messages, later = PROMPTS[name]
    same(only(tmp_path, row), "prompt", "prompt", messages, later=later)
    same(only(tmp_path, row, format="prompt"), "prompt", "prompt", messages, later=later)


def test_prompt_of_turns_with_tools(tmp_path):
    row = {"question": [[WHY], [], [WHY]], "function": [ADD["function"]], "id": "x"}
    record = only(tmp_path, row)
    same(record, "prompt", "prompt", Conversation((ASK,), (ADD,)), later=((), (ASK,)), extra={"id": "x"})


def test_format_prompt_leaves_the_answer_out(tmp_path):
    record = only(tmp_path, {"question": "Why?", "answer": "Because."}, format="prompt")
    same(record, "prompt", "prompt", [ASK], extra={"answer": "Because."})
    same(only(tmp_path, {"messages": [WHY]}, format="prompt"), "prompt", "prompt", [ASK])


def test_columns_are_renamed_first(tmp_path):
    row = {"query": "Why?", "reply": "Because.", "id": 1}
    record = only(tmp_path, row, columns={"question": "query", "answer": "reply"})
    same(record, "question-answer", "conversation", [ASK, SAY], extra={"id": 1})
    swapped = {"prompt": "Why?", "chosen": "No.", "rejected": "Because."}
    record = only(tmp_path, swapped, columns={"chosen": "rejected", "rejected": "chosen"})
    same(record, "preference", "preference", [ASK, SAY], [ASK, NO], labels=("chosen", "rejected"))


def test_a_null_column_tips_no_balance(tmp_path):
    row = {"prompt": "Why?", "completion": "Because.", "messages": None, "chosen": None, "rejected": None}
    same(only(tmp_path, row), "prompt-completion", "conversation", [ASK, SAY])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "alpacca"}, "did you mean 'alpaca'?"),
        ({"objective": "preferences"}, "did you mean 'preference'?"),
        ({"on_bad_row": "skipp"}, "did you mean 'skip'?"),
        ({"columns": {"instructon": "query"}}, "did you mean 'instruction'?"),
        ({"columns": {"question": "qurey"}}, "did you mean 'query'?"),
        ({"rejects": "rejects.jsonl"}, "add --on-bad-row skip"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, said):
    with pytest.raises(UsageError) as caught:
        only(tmp_path, {"query": "Why?", "text": "Because."}, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (
            {"query": "Why?", "response": "So."},
            {},
            "alpaca: name its columns with --columns instruction=query",
        ),
        ({"prompt": "Why?", "response": "So."}, {}, "--columns instruction=prompt"),
        ({"data": [{"text": "x"}]}, {}, "jq -c '.data[]'"),
        ({"question": "Why?", "answr": "So."}, {"format": "question-answer"}, "did you mean 'answr'?"),
        ({"id": 1}, {"format": "labelled"}, "the first lacks 'label', 'messages'"),
    ],
)
def test_a_file_of_no_known_shape_is_one_error(tmp_path, row, options, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) * 1, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(file, **options)
    assert len(caught.value.problems) == 1
    assert said in str(caught.value)
