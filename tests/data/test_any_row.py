"""No row, however odd, does anything but become a record or name what is wrong with it."""

import json

from hypothesis import given
from hypothesis import strategies as st

from instil.conversation import Record, Source
from instil.data.row import Row
from instil.data.shapes import OBJECTIVES, SHAPES, build, known_columns, recognize

WORDS = st.sampled_from(
    ["", " ", "a", "Human: a\n\nAssistant: b", "### Human: a### Assistant: b", "[", "{}", "[[]]", "true"]
)
ATOMS = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORDS
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "x", 1])
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "reasoning", "tool_call", "image", None])},
    optional={"text": ATOMS, "value": ATOMS},
)
CALLS = st.fixed_dictionaries({}, optional={"name": ATOMS, "arguments": ATOMS, "function": ATOMS, "id": ATOMS})
CONTENT = ATOMS | st.lists(PARTS | ATOMS, max_size=2)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES,
        "from": ROLES,
        "content": CONTENT,
        "value": CONTENT,
        "tool_calls": st.lists(CALLS, max_size=2) | ATOMS,
        "function_call": CALLS | ATOMS,
        "weight": ATOMS,
        "thinking": ATOMS,
    },
)
CHAT = st.lists(st.fixed_dictionaries({"role": ROLES, "content": WORDS}) | MESSAGES, max_size=4)
VALUES = CHAT | st.recursive(ATOMS | MESSAGES | CALLS, lambda inner: st.lists(inner, max_size=4), max_leaves=6)


@st.composite
def rows(draw):
    """A row with the columns that some shape needs, and others, whatever they hold."""
    needs = SHAPES[draw(st.sampled_from(sorted(SHAPES)))].needs
    needed = {draw(st.sampled_from(group)): draw(VALUES) for group in needs}
    return needed | draw(st.dictionaries(st.sampled_from(sorted(known_columns())), VALUES, max_size=3))


@given(rows(), st.sampled_from([None, *OBJECTIVES]), st.sampled_from([None, *SHAPES]))
def test_any_row(values, objective, named):
    shape = named or recognize(values, objective)
    if shape is None:
        return
    row = Row(Source("rows.jsonl", 1), values)
    record = build(row, shape, objective)
    if record is None:
        assert row.problems
        assert len({problem.field for problem in row.problems}) == len(row.problems)
        return
    assert isinstance(record, Record)
    assert not row.problems
    assert record.conversations
    assert len(record.labels) == len(record.conversations)
    for conversation in record.conversations:
        assert conversation.messages
        json.dumps(conversation.to_wire())
        if record.kind != "prompt":
            assert any(message.role == "assistant" for message in conversation.messages)
