"""Tool calls read back from answers: in the formats that templates write, and in no other."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from instil.conversation import Conversation, Message
from instil.inference.tools import CallStream, ToolCall, call_format
from instil.prompt import Renderer, builtin_templates, load_template

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|calls|>",
    "<|sep|>",
    "<|end|>",
)
TURNS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\nANSWER<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral writes them: one list behind a special token; an id of nine characters is asked for; no text beside it.
LIST = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] ~ ', \"id\": \"' ~ c.id ~ '\"}' }}{{ '' if loop.last else ', ' }}{% endfor %}]</s>"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)


def answered(calls, around="{{ m.content }}CALLS"):
    """A template whose assistant says its content, and then each call as given here."""
    each = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + calls + "{% endfor %}"
    return TURNS.replace("ANSWER", around.replace("CALLS", each))


STYLES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "list": LIST,
    # the name stands outside of the JSON
    "function": answered("<function={{ f.name }}>{{ f.arguments | tojson }}</function>"),
    "args": answered("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}"),
    "fenced": answered(
        "{{ '<|calls|>' if loop.first else '\n' }}<|sep|>{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```<|end|>"
        "{{ '<|calls|>' if loop.last else '' }}"
    ),
    # other keys, the arguments as JSON text, a wrapper
    "text": answered("<|calls|>{{ {'tool': f.name, 'input': f.arguments | tojson} | tojson }}<|end|>"),
    "wrapped": answered('\n<|calls|>{"type": "function", "function": {{ f | tojson }}}'),
    # no marks but brackets
    "brackets": answered(
        "{{ '[' if loop.first else ', ' }}{{ f | tojson }}{{ ']' if loop.last else '' }}",
        around="{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}",
    ),
    # the prompt opens the reasoning
    "opened": answered(
        "<|calls|>{{ f | tojson }}<|end|>",
        around="<think>\n{{ m.reasoning_content }}</think>{{ m.content }}CALLS",
    ).replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"),
}  # fmt: skip
TAKES_TEXT = set(STYLES) - {"llama3", "list", "brackets"}
TAKES_SEVERAL = set(STYLES) - {"llama3"}


@pytest.fixture(scope="module")
def renderer_of(tokenizer_of):
    made = {}

    def renderer(template):
        if template not in made:
            tokenizer = tokenizer_of("byte_level_bos")
            tokenizer.backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
            name = template if template in builtin_templates() else None
            tokenizer.chat_template = template
            made[template] = Renderer(load_template(name, tokenizer), tokenizer)
        return made[template]

    return renderer


@pytest.fixture(scope="module")
def format_of(renderer_of):
    made = {}

    def found(style):
        if style not in made:
            made[style] = call_format(renderer_of(STYLES[style]))
        return made[style]

    return found


def tools_of(names):
    return tuple({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names)


def rendered(renderer, calls, content="", reasoning=None):
    """What the model would say, as training renders it."""
    message = Message("assistant", content, reasoning, tuple(call.to_wire() for call in calls))
    conversation = Conversation((Message("user", "a"), message), tools_of(call.name for call in calls))
    text = renderer.exchange(conversation, 1).completion
    (stop,) = [token for token in renderer.stop_tokens if text.endswith(token)]
    return text.removesuffix(stop)


REASONED = {"opened": "so</think>", "chatml": "<think>\nso\n</think>\n\n"}


MARKS = [
    "</tool_call>",
    "<tool_call>\n{",
    "[TOOL_CALLS]",
    "</function>",
    "<|end|>",
    "```",
    "</think>",
    "]",
    "}",
    '"',
    "\\",
    "\n",
]
TEXTS = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(MARKS)), max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True),
    st.dictionaries(TEXTS, VALUES, max_size=3),
    st.from_regex(r"[A-Za-z0-9]{9}", fullmatch=True),
)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, deadline=None)
@given(calls=st.lists(CALLS, min_size=1, max_size=3), content=TEXTS)
def test_calls_come_back_as_they_were_rendered(style, calls, content, renderer_of, format_of):
    form = format_of(style)
    calls = calls if style in TAKES_SEVERAL else calls[:1]
    content = content if style in TAKES_TEXT else ""
    assume(form.bare or form.opening not in content)
    assume(content.strip() or not content)
    text = rendered(renderer_of(STYLES[style]), calls, content, "so" if style in REASONED else None)
    content = REASONED.get(style, "") + content
    names = {call.name for call in calls}
    wanted = [call if style == "list" else ToolCall(call.name, call.arguments) for call in calls]
    assert form.parse(text, names) == (content, wanted)
    assert form.parse(text + "\n", names)[1] == wanted
    for said in (text + "x", text[: -len(form.closing) or None].rstrip()[:-1]):  # text behind the calls; cut off
        assert form.parse(said, names) == (said, [])
    stream = CallStream(form, names)
    given_out = "".join(stream.push(letter) for letter in text)
    rest, found = stream.finish()
    assert (given_out + rest, found) == (content, wanted)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), style=st.sampled_from(sorted(STYLES)))
def test_a_stream_says_what_the_whole_answer_says(data, style, format_of):
    form = format_of(style)
    letters = [form.opening, form.between or "", form.closing, form.middle or "", form.separator, "<think>", "</think>"]
    call = '{"name": "f", "arguments": {"a": "b"}, "parameters": {}}'
    parts = st.sampled_from([*letters, call, "f", "{", "}", "<", "[", " ", "\n", "Well."])
    pieces = data.draw(st.lists(parts, max_size=8))
    cuts = "".join(pieces)
    pieces = data.draw(st.sampled_from([pieces, list(cuts), [cuts]]))
    stream = CallStream(form, ["f"])
    given_out = "".join(map(stream.push, pieces))
    rest, calls = stream.finish()
    assert (given_out + rest, calls) == form.parse(cuts, ["f"])


def test_what_is_read_off(format_of):
    assert [style for style in STYLES if format_of(style) is None] == []
    chatml, llama3, listed, args = (format_of(style) for style in ("chatml", "llama3", "list", "args"))
    assert (chatml.opening, chatml.between, chatml.closing) == (
        "<tool_call>",
        "</tool_call>\n<tool_call>",
        "</tool_call>",
    )
    assert (chatml.separator, chatml.tokens, chatml.stop, chatml.bare) == ("\n", (), "<|im_end|>", False)
    assert (llama3.opening, llama3.between, llama3.arguments_key, llama3.bare) == ("", None, "parameters", True)
    assert (listed.opening, listed.between, listed.closing) == ("[TOOL_CALLS] [", ",", "]")
    assert (listed.id_key, listed.tokens, listed.stop) == ("id", ("[TOOL_CALLS]",), "</s>")
    assert (args.opening, args.middle, args.tokens) == ("[TOOL_CALLS]", "[ARGS]", ("[TOOL_CALLS]", "[ARGS]"))
    assert (format_of("text").name_key, format_of("text").arguments_key) == ("tool", "input")
    assert [style for style in STYLES if format_of(style).bare] == ["llama3", "brackets"]
    assert [style for style in STYLES if format_of(style).thinks] == ["opened"]


def test_a_marker_that_is_no_special_token_need_not_be_kept(renderer_of, format_of):
    tokenizer = renderer_of("chatml").tokenizer
    tokenizer.backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    plain = call_format(Renderer(load_template("chatml", tokenizer), tokenizer))
    assert plain == format_of("chatml")


@pytest.mark.parametrize(
    "template",
    [
        # as Python
        answered("[{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})]"),
        # arguments apart, as XML; a number is no number any more
        answered("<c>{{ f.name }}{% for k, v in f.arguments.items() %}<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}</c>"),
        # Python's rendering of an object
        answered('<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | string }}}</tool_call>'),
        # the id stands in the marks
        answered("<call {{ c.id }}>{{ f | tojson }}</call>"),
        # the arguments are cut
        answered("<c>{\"name\": \"{{ f.name }}\", \"arguments\": {{ (f.arguments | tojson)[:40] }}}</c>"),
        # what is said stands behind the calls, or between words of the template's own
        answered("<c>{{ f | tojson }}</c>", around="CALLS{{ m.content }}"),
        answered("<c>{{ f | tojson }}</c>", around="{{ m.content ~ ' and so ' if m.content else '' }}CALLS"),
        # the middle cannot be told from the name
        answered("<c>{{ f.name }}with{{ f.arguments | tojson }}</c>"),
        # no calls at all
        TURNS.replace("ANSWER", "{{ m.content }}"),
        "headers",
        "plain",
        "fim",
    ],
)  # fmt: skip
def test_formats_that_are_not_known(template, renderer_of):
    assert call_format(renderer_of(template)) is None


CUT_OFF = '<function=write>{"text": "<function=remove>{}</function>'


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("chatml", ""),
        ("chatml", "Well."),
        ("chatml", "I would write <tool_call> here."),
        ("chatml", '<tool_call>{"name": "f", "arguments": {}}'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>'),
        ("chatml", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f"}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {}}</tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("chatml", '<tool_call>{"name": "f", "arguments": {"a":' + "[" * 100_000),
        ("chatml", '<think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("opened", '<|calls|>{"name": "f", "arguments": {}}<|end|>'),
        ("llama3", 'So: {"name": "f", "parameters": {}}'),
        ("llama3", '{"name": "f", "parameters": {}} {"name": "f", "parameters": {}}'),
        ("llama3", '{"name": "unknown", "parameters": {}}'),
        ("list", '[TOOL_CALLS] [{"name": "f", "arguments": {}}'),
        ("function", CUT_OFF),
        ("function", "<function=>{}</function>"),
    ],
)
def test_what_is_no_call_stays_text(style, text, format_of):
    form = format_of(style)
    names = ["f", "write", "remove"]
    assert form.parse(text, names) == (text, [])
    stream = CallStream(form, names)
    given_out = stream.push(text)
    assert (given_out + stream.finish()[0], stream.finish()[1]) == (text, [])


@pytest.mark.parametrize(
    ("style", "text", "content"),
    [
        ("chatml", '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', ""),
        ("chatml", 'Yes.\n\n<tool_call>\n\n{"arguments": {"a": 1},\n"name": "f"}\n\n\n</tool_call>\n', "Yes.\n"),
        ("chatml", 'As <tool_call>: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "As <tool_call>: "),
        ("chatml", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ""),
        (
            "chatml",
            '<think>\n<tool_call>{"name": "g", "arguments": {}}</tool_call> or f\n</think>\n\n'
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
            '<think>\n<tool_call>{"name": "g", "arguments": {}}</tool_call> or f\n</think>\n\n',
        ),
        ("list", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', ""),
        ("list", '[TOOL_CALLS] [ {"name": "f", "arguments": {"a": 1}, "id": 7} ]', ""),
        ("llama3", '\n {"type": "function", "name": "f", "parameters": {"a": 1}}\n', "\n "),
        ("fenced", "<|calls|><|sep|>f ```json {\"a\": 1}```<|end|><|calls|>", ""),
    ],
)  # fmt: skip
def test_models_may_set_white_space_as_they_like(style, text, content, format_of):
    said, calls = format_of(style).parse(text, ["f"])
    assert calls == [ToolCall("f", {"a": 1})]
    assert said.strip() == content.strip()
    assert said == content or format_of(style).bare


def test_text_is_held_only_while_it_may_be_a_call(format_of):
    stream = CallStream(format_of("chatml"), ["f"])
    assert stream.push("Hel") == "Hel"
    assert stream.push("lo <b>you</b>") == "lo <b>you</b>"
    assert stream.push(" \n") == ""
    assert stream.push("<tool") == ""
    assert stream.push("box>") == " \n<toolbox>"
    assert stream.push("<tool_call> is") == "<tool_call> is"
    assert stream.push('\n<tool_call>\n{"name": "f", ') == ""
    assert stream.push('"arguments": {}}\n</tool_call>') == ""
    assert stream.finish() == ("", [ToolCall("f", {})])

    outside = CallStream(format_of("function"), ["f"])
    assert outside.push("<function=") == ""
    assert outside.push("some_name") == ""
    assert outside.push(" else") == "<function=some_name else"

    listed = CallStream(format_of("list"), ["f"])
    assert listed.push("Well. [TOOL_CALLS]\n") == "Well."
    assert listed.push("[") == ""
    assert listed.push("x") == " [TOOL_CALLS]\n[x"

    bare = CallStream(format_of("llama3"), ["f"])
    assert bare.push(" {") == ""
    assert bare.finish() == (" {", [])
    bare = CallStream(format_of("llama3"), ["f"])
    assert bare.push("In JSON: ") == "In JSON: "
    assert bare.push('{"name"') == '{"name"'

    thinking = CallStream(format_of("opened"), ["f"])
    assert thinking.push("Shall I <|calls|>{") == "Shall I <|calls|>{"
    assert thinking.push('}</think><|calls|>{"name"') == "}</think>"


def test_the_wire_form_is_that_of_messages():
    call = ToolCall("f", {"a": 1}, "abc")
    assert call.to_wire() == {"type": "function", "id": "abc", "function": {"name": "f", "arguments": {"a": 1}}}
    assert ToolCall("f", {}).to_wire() == {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert json.dumps(call.to_wire())
