"""The built-in chat templates: their exact text, and the promises that each of them keeps."""

import json
import re
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import instil

FOLDER = Path(instil.__file__).parent / "prompt" / "templates"
TEMPLATES = {file.stem: file.read_text("utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
EOS = "</s>"
BOS = "<s>"
CHATS = sorted(set(TEMPLATES) - {"fim"})


def render(name, messages, *, tools=None, prompt=False, eos=EOS, **arguments):
    ((text,), _) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        eos_token=eos,
        bos_token=BOS,
        **arguments,
    )
    return text


def declaration(name):
    return dict(re.findall(r"\{#-\s*(\w+):\s*(.*?)\s*-#\}", TEMPLATES[name], re.DOTALL))


def stop_of(name):
    stop = declaration(name)["stop"]
    return EOS if stop == "eos_token" else stop


def system(text):
    return {"role": "system", "content": text}


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": "c1"}


def call(name, **arguments):
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WEATHER_JSON = (
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}'
)

PLAIN_TURN = [user("Name a prime."), assistant("Seven.")]
WITH_SYSTEM = [system("Be brief."), *PLAIN_TURN]
TWO_TURNS = [*PLAIN_TURN, user("Another."), assistant("Eleven.")]
WITH_INPUT = [user("Count:\na b", instruction="Count:", input="a b"), assistant("2")]
WITHOUT_INPUT = [user("Count.", instruction="Count.", input=""), assistant("0")]

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)

# (template, messages, what the last answer is asked with, what answers it)
EXACT = [
    ("alpaca", PLAIN_TURN, ALPACA + "### Instruction:\nName a prime.\n\n### Response:\n", "Seven.</s>"),
    ("alpaca", WITH_INPUT, ALPACA_INPUT + "### Instruction:\nCount:\n\n### Input:\na b\n\n### Response:\n", "2</s>"),
    ("alpaca", WITHOUT_INPUT, ALPACA + "### Instruction:\nCount.\n\n### Response:\n", "0</s>"),
    ("alpaca", WITH_SYSTEM, "Be brief.\n\n### Instruction:\nName a prime.\n\n### Response:\n", "Seven.</s>"),
    ("alpaca", [system(""), *PLAIN_TURN], "### Instruction:\nName a prime.\n\n### Response:\n", "Seven.</s>"),
    (
        "alpaca",
        TWO_TURNS,
        ALPACA + "### Instruction:\nName a prime.\n\n### Response:\nSeven.</s>\n\n"
        "### Instruction:\nAnother.\n\n### Response:\n",
        "Eleven.</s>",
    ),
    ("human-assistant", PLAIN_TURN, "\n\nHuman: Name a prime.\n\nAssistant:", " Seven.</s>"),
    ("human-assistant", WITH_INPUT, "\n\nHuman: Count:\na b\n\nAssistant:", " 2</s>"),
    ("human-assistant", WITH_SYSTEM, "Be brief.\n\nHuman: Name a prime.\n\nAssistant:", " Seven.</s>"),
    (
        "human-assistant",
        TWO_TURNS,
        "\n\nHuman: Name a prime.\n\nAssistant: Seven.</s>\n\nHuman: Another.\n\nAssistant:",
        " Eleven.</s>",
    ),
    ("prompt-tokens", PLAIN_TURN, "<|instruction|>Name a prime.<|response|>", "Seven.</s>"),
    ("prompt-tokens", WITH_INPUT, "<|instruction|>Count:<|input|>a b<|response|>", "2</s>"),
    ("prompt-tokens", WITHOUT_INPUT, "<|instruction|>Count.<|response|>", "0</s>"),
    ("prompt-tokens", WITH_SYSTEM, "<|system|>Be brief.<|instruction|>Name a prime.<|response|>", "Seven.</s>"),
    (
        "prompt-tokens",
        TWO_TURNS,
        "<|instruction|>Name a prime.<|response|>Seven.</s><|instruction|>Another.<|response|>",
        "Eleven.</s>",
    ),
    ("headers", PLAIN_TURN, "[bot][boh]user[eoh]Name a prime.[eot][boh]assistant[eoh]", "Seven.[eot]"),
    ("headers", WITH_INPUT, "[bot][boh]user[eoh]Count:\na b[eot][boh]assistant[eoh]", "2[eot]"),
    (
        "headers",
        WITH_SYSTEM,
        "[bot][boh]system[eoh]Be brief.[eot][boh]user[eoh]Name a prime.[eot][boh]assistant[eoh]",
        "Seven.[eot]",
    ),
    (
        "headers",
        TWO_TURNS,
        "[bot][boh]user[eoh]Name a prime.[eot][boh]assistant[eoh]Seven.[eot]"
        "[boh]user[eoh]Another.[eot][boh]assistant[eoh]",
        "Eleven.[eot]",
    ),
    (
        "llama3",
        PLAIN_TURN,
        "<|start_header_id|>user<|end_header_id|>\n\nName a prime.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Seven.<|eot_id|>",
    ),
    (
        "llama3",
        [system("Be brief."), *TWO_TURNS],
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a prime.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSeven.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnother.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Eleven.<|eot_id|>",
    ),
    (
        "chatml",
        PLAIN_TURN,
        "<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\n",
        "Seven.<|im_end|>\n",
    ),
    (
        "chatml",
        [{"role": "developer", "content": "Be brief."}, *TWO_TURNS],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a prime.<|im_end|>\n"
        "<|im_start|>assistant\nSeven.<|im_end|>\n<|im_start|>user\nAnother.<|im_end|>\n<|im_start|>assistant\n",
        "Eleven.<|im_end|>\n",
    ),
    (
        "chatml",
        [
            user("2 + 2?"),
            assistant("4", reasoning_content="Two and two."),
            user("3 + 3?"),
            assistant("6", reasoning_content="Twice three."),
        ],
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nTwice three.\n</think>\n\n6<|im_end|>\n",
    ),
    ("plain", PLAIN_TURN, "Name a prime.", "Seven.</s>"),
    ("plain", WITH_SYSTEM, "Be brief.\n\nName a prime.", "Seven.</s>"),
    ("plain", TWO_TURNS, "Name a prime.Seven.</s>Another.", "Eleven.</s>"),
    ("fim", [user("ac", prefix="a", suffix="c"), assistant("b")], "[pre]a[post]c[mid]", "b</s>"),
    ("fim", [user("", prefix="", suffix=""), assistant("b")], "[pre][post][mid]", "b</s>"),
]


@pytest.mark.parametrize(("name", "messages", "prompt", "completion"), EXACT)
def test_exact_text(name, messages, prompt, completion):
    assert render(name, messages[:-1], prompt=True) == prompt
    assert render(name, messages) == prompt + completion


def test_fim_takes_the_suffix_first_on_demand():
    messages = [user("ac", prefix="a", suffix="c"), assistant("b")]
    assert render("fim", messages, order="spm") == "[post]c[pre]a[mid]b</s>"
    assert render("fim", messages, order="psm") == "[pre]a[post]c[mid]b</s>"
    with pytest.raises(jinja2.TemplateError, match="order is 'mps': it may be psm or spm"):
        render("fim", messages, order="mps")


def test_chatml_tools():
    messages = [
        system("Be brief."),
        user("Rain in Oslo or Rome?"),
        assistant("I look.", tool_calls=[call("weather", city="Oslo"), call("weather", city="Röm")]),
        tool("dry"),
        tool("wet"),
        assistant("In Rome."),
    ]
    offer = (
        f"# Tools\n\nThe functions you may call, each as a JSON object:\n<tools>\n{WEATHER_JSON}\n</tools>\n\n"
        "Write a call as a JSON object between its own tags, one pair for each call:\n"
        '<tool_call>\n{"name": <the function>, "arguments": <an object>}\n</tool_call><|im_end|>\n'
    )
    asked = "<|im_start|>user\nRain in Oslo or Rome?<|im_end|>\n<|im_start|>assistant\n"
    called = (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Röm"}}\n</tool_call><|im_end|>\n'
    )
    responses = (
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response>\n<tool_response>\nwet\n</tool_response><|im_end|>\n"
    )
    text = "<|im_start|>system\nBe brief.\n\n" + offer + asked + called + responses + "<|im_start|>assistant\n"
    assert render("chatml", messages[:-1], tools=[WEATHER], prompt=True) == text
    assert render("chatml", messages, tools=[WEATHER]) == text + "In Rome.<|im_end|>\n"
    assert render("chatml", messages[1:3], tools=[WEATHER]) == (
        "<|im_start|>system\n" + offer + asked + called  # no system message, and no blank lines for it
    )
    wordless = [messages[1], assistant("", tool_calls=[call("weather")])]
    assert render("chatml", wordless).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
    )


def test_llama3_tools():
    messages = [
        system("Be brief."),
        user("Rain in Oslo?"),
        assistant("", tool_calls=[call("weather", city="Oslo")]),
        tool("dry"),
        assistant("No."),
    ]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    text = (
        head("system")
        + "You may call these functions. A call is the whole answer: one JSON object of the form "
        + '{"name": the function, "parameters": {its arguments}}.\n\n'
        + WEATHER_JSON
        + "\n\nBe brief.<|eot_id|>"
        + head("user")
        + "Rain in Oslo?<|eot_id|>"
        + head("assistant")
        + '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
        + head("ipython")
        + "dry<|eot_id|>"
        + head("assistant")
    )
    assert render("llama3", messages[:-1], tools=[WEATHER], prompt=True) == text
    assert render("llama3", messages, tools=[WEATHER]) == text + "No.<|eot_id|>"


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_arguments_already_in_json_are_not_encoded_twice(name):
    given_as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    as_text, as_object = (
        render(name, [user("?"), assistant("", tool_calls=[one])])
        for one in (given_as_text, call("weather", city="Oslo"))
    )
    assert as_text == as_object


NO_TOOLS = sorted(set(CHATS) - {"chatml", "llama3"})
NO_REASONING = sorted(set(CHATS) - {"chatml"})
ONE_SYSTEM = ["alpaca", "human-assistant", "plain"]
HOLE = user("ac", prefix="a", suffix="c")


@pytest.mark.parametrize(
    ("name", "messages", "more", "message"),
    [
        *(
            (name, PLAIN_TURN, {"tools": [WEATHER]}, "no place for tools: take them out, or use chatml")
            for name in NO_TOOLS
        ),
        *(
            (
                name,
                [user("?"), assistant("", tool_calls=[call("weather")])],
                {},
                "cannot express tool calls: use chatml",
            )
            for name in NO_TOOLS
        ),
        *(
            (name, [user("?"), tool("wet")], {}, "cannot express the role 'tool'.*use chatml or llama3")
            for name in NO_TOOLS
        ),
        *(
            (
                name,
                [user("?"), assistant("4", reasoning_content="2 and 2")],
                {},
                "no place for reasoning_content: take it",
            )
            for name in NO_REASONING
        ),
        *((name, [user("?"), system("Be brief.")], {}, "one system message, the first: join") for name in ONE_SYSTEM),
        *(
            (name, [{"role": "critic", "content": "?"}], {}, "cannot express the role 'critic': it knows")
            for name in CHATS
        ),
        *(
            (name, PLAIN_TURN, {"eos": eos}, "ends each answer with the tokenizer's eos_token, and this .* has none")
            for name in CHATS
            if declaration(name)["stop"] == "eos_token"
            for eos in (None, "")
        ),
        (
            "llama3",
            [user("?"), assistant("", tool_calls=[call("weather"), call("weather")])],
            {},
            "one tool call in a turn: split them",
        ),
        (
            "llama3",
            [user("?"), assistant("See:", tool_calls=[call("weather")])],
            {},
            "text beside a tool call: take it",
        ),
        ("fim", PLAIN_TURN, {}, "needs a user message with a prefix and a suffix: give rows with the columns"),
        ("fim", [system("Be brief."), HOLE], {}, "takes one user message.*message 1 here is of the role 'system'"),
        ("fim", [HOLE, assistant("b"), HOLE], {}, "takes one user message.*message 3 here is of the role 'user'"),
        ("fim", [HOLE], {"tools": [WEATHER]}, "no place for tools: take them out"),
        ("fim", [HOLE, assistant("b", reasoning_content="hm")], {}, "cannot express tool calls or reasoning_content"),
        ("fim", [HOLE, assistant("b")], {"eos": None}, "the tokenizer's eos_token, and this tokenizer has none"),
    ],
)
def test_what_cannot_be_expressed_is_refused(name, messages, more, message):
    with pytest.raises(jinja2.TemplateError, match=f"(?s)the {name} template.*{message}"):
        render(name, messages, **more)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_declaration(name):
    declared = declaration(name)
    assert set(declared) - {"arguments"} == {"description", "special_tokens", "stop"}
    assert len(declared["description"]) > 20
    tokens = json.loads(declared["special_tokens"])
    assert all(TEMPLATES[name].count(token) > 1 and meaning for token, meaning in tokens.items())
    assert declared["stop"] == "eos_token" or declared["stop"] in tokens
    assert all(json.loads(declared.get("arguments", "{}")).values())
    assert "bos_token" not in TEMPLATES[name]
    assert render(name, []) == ("[bot]" if name == "headers" else "" if name != "alpaca" else ALPACA)


def test_every_template_is_tried():
    assert sorted(TEMPLATES) == sorted({name for name, *_ in EXACT})


def test_no_marker_is_left_undeclared():
    for name in TEMPLATES:
        text = render(name, [HOLE, assistant("b")] if name == "fim" else TWO_TURNS).replace(EOS, "")
        tokens = json.loads(declaration(name)["special_tokens"])
        assert set(re.findall(r"<\|\w+\|>|\[\w+\]", text)) <= set(tokens)


# Text that a sloppy template would trim, escape or take for its own.
PIECES = [*" \n\t{}%<>&'\"\\", "{{", "{%- if", "### Response:\n", "Assistant:", "é", "\u2028", "𝄞"]
content = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=3), max_size=4).map("".join)


@st.composite
def conversations(draw, name):
    """A conversation that the template can express, its parts made unique so that each can be looked for."""
    count = 0

    def text():
        nonlocal count
        count += 1
        return f"{draw(content)}«{count}»{draw(content)}"

    messages = [system(text())] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        parts = name in ("alpaca", "prompt-tokens") and draw(st.booleans())
        if parts:
            fields = {"instruction": text(), "input": text() if draw(st.booleans()) else ""}
            messages.append(user("\n".join(fields.values()), **fields))
        else:
            messages.append(user(text()))
        if name in ("chatml", "llama3") and draw(st.booleans()):
            said = text() if name == "chatml" and draw(st.booleans()) else ""
            calls = [call("weather", city="Oslo")] * (draw(st.integers(1, 2)) if name == "chatml" else 1)
            messages += [assistant(said, tool_calls=calls), *(tool(text()) for _ in calls)]
        reasoning = {"reasoning_content": text()} if name == "chatml" and draw(st.booleans()) else {}
        messages.append(assistant(text(), **reasoning))
    return messages


def texts_of(message):
    parts = [message["instruction"], message["input"]] if "instruction" in message else [message["content"]]
    return [part for part in [message.get("reasoning_content"), *parts] if part]


def keeps_its_promises(name, messages, tools):
    stop = stop_of(name)
    whole = render(name, messages, tools=tools)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(name, messages[:i], tools=tools, prompt=True)
        rendered = render(name, messages[: i + 1], tools=tools)
        assert rendered.startswith(prompt)
        assert len(prompt) < len(rendered)
        assert whole.startswith(rendered)  # history stays as it was
        assert rendered.removesuffix("\n").endswith(stop)
        completion = rendered[len(prompt) :]
        if not message.get("tool_calls") and "reasoning_content" not in message:
            lead = " " if name == "human-assistant" else ""
            assert completion.removesuffix("\n") == lead + message["content"] + stop
    for message in messages:
        for text in texts_of(message):
            assert whole.count(text) == 1  # exactly, and once


@pytest.mark.parametrize("name", CHATS)
@given(data=st.data())
@settings(max_examples=60)
def test_promises(name, data):
    messages = data.draw(conversations(name))
    keeps_its_promises(name, messages, [WEATHER] if name in ("chatml", "llama3") and data.draw(st.booleans()) else None)


@pytest.mark.prove
@pytest.mark.parametrize("name", CHATS)
@given(data=st.data())
@settings(max_examples=1000)
def test_promises_at_length(name, data):
    messages = data.draw(conversations(name))
    keeps_its_promises(name, messages, [WEATHER] if name in ("chatml", "llama3") and data.draw(st.booleans()) else None)


@given(prefix=content, middle=content, suffix=content, order=st.sampled_from(["psm", "spm"]))
def test_fim_promises(prefix, middle, suffix, order):
    messages = [user(prefix + suffix, prefix=prefix, suffix=suffix), assistant(middle)]
    prompt = render("fim", messages[:1], prompt=True, order=order)
    before, after = "[pre]" + prefix, "[post]" + suffix
    assert prompt == (before + after if order == "psm" else after + before) + "[mid]"
    assert render("fim", messages, order=order) == prompt + middle + EOS
