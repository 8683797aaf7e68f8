"""What is trained, held against TRL: from a model's own chat template, the text that TRL's patched twin marks with
`{% generation %}`, or a difference that has a name.
"""

import importlib.util
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from instil.conversation import Conversation, Message, Record, Source
from instil.errors import TemplateError
from instil.prompt.encode import RecordEncoder
from instil.prompt.options import PromptOptions
from instil.prompt.render import Renderer
from instil.prompt.template import load_template
from instil.prompt.tokenizer import Tokenizer

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
ORIGINALS = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))


@cache
def source(name):
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def twin(name):
    """The template that marks what is trained: the patched one, or the original if that does."""
    if (FOLDER / f"{name}_training.jinja").exists():
        return source(f"{name}_training")
    return source(name) if re.search(r"{%-?\s*generation", source(name)) else None


PAIRS = [name for name in ORIGINALS if twin(name)]

# A family by the beginning of its templates' names (the longest counts): EOS and BOS of its real tokenizer, and the
# stop tokens to be found.
FAMILIES = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", {"<|END_OF_TURN_TOKEN|>"}),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", {"<｜end▁of▁sentence｜>"}),
    "diffusion_gemma": ("<turn|>", "<bos>", {"<turn|>", "<|tool_response>"}),
    "gemma": ("<eos>", "<bos>", {"<end_of_turn>"}),
    "gemma4": ("<turn|>", "<bos>", {"<turn|>", "<|tool_response>"}),
    "gemma4_v2": ("<turn|>", "<bos>", {"<turn|>"}),
    "glm4moe": ("<|endoftext|>", None, {"<|user|>", "<|observation|>"}),
    "gptoss": ("<|return|>", "<|startoftext|>", {"<|return|>", "<|call|>"}),
    "idefics3": ("<end_of_utterance>", "<|begin_of_text|>", {"<end_of_utterance>"}),
    "lfm2": ("<|im_end|>", "<|startoftext|>", {"<|im_end|>"}),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", {"<|eot_id|>"}),
    "llava": ("</s>", "<s>", {"</s>"}),
    "muse": ("<|eot|>", "<|begin_of_text|>", {"<|eot|>"}),
    "nemotron": ("<|im_end|>", "<s>", {"<|im_end|>"}),
    "phi3": ("<|endoftext|>", "<s>", {"<|end|>"}),
    "qwen": ("<|im_end|>", None, {"<|im_end|>"}),
    "smolvlm": ("<end_of_utterance>", "<|im_start|>", {"<end_of_utterance>"}),
}
SPELLED = re.compile(
    r"<\|[^|<>\s']{1,40}\|>|<｜[^｜<>\s']{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|\[/?INST\]|</?s>|<sop>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance)>|</?(?:think|tool_call|tool_response)>"
)
MARKERS = re.compile(r"</?(?:think|tool_call|tool_response)>")


def family(name):
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def tokenizer_for(name, special_markers=False):
    """A byte-level tokenizer with the control tokens of a template; think and tool markers are added, not special."""
    eos, bos, stops = family(name)
    backend = tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = sorted({*SPELLED.findall(source(name)), *stops, eos} | ({bos} if bos else set()))
    markers = [] if special_markers else [token for token in names if MARKERS.fullmatch(token)]
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names if n not in markers])
    backend.add_tokens([AddedToken(n, special=False, normalized=False) for n in markers])
    return Tokenizer(backend, {"eos_token": eos} | ({"bos_token": bos} if bos else {}), source(name), name=name)


def renderer_for(name, arguments=None, **more):
    tokenizer = tokenizer_for(name, **more)
    return Renderer(load_template(None, tokenizer, arguments), tokenizer)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "id": "call_1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def user(text):
    return Message("user", text)


def assistant(text, reasoning=None, **more):
    return Message("assistant", text, reasoning, **more)


CONVERSATIONS = {
    "single": Conversation((user("What is two plus two?"), assistant("It is four."))),
    "multi": Conversation((user("Hi there"), assistant("Hello!"), user("How are you?"), assistant("Fine."))),
    "system": Conversation((Message("system", "Be brief."), user("Hi there"), assistant("Hello!"))),
    "tool": Conversation(
        (
            user("Weather in Paris?"),
            assistant("", tool_calls=(CALL,)),
            Message("tool", "Sunny.", name="get_weather", tool_call_id="call_1"),
            assistant("It is sunny."),
        ),
        (WEATHER,),
    ),
    "reasoning": Conversation((user("What is two plus two?"), assistant("It is four.", "Two and two make four."))),
    "reasoning_multi": Conversation(
        (
            user("Hi there"),
            assistant("Hello!", "A greeting."),
            user("What is two plus two?"),
            assistant("It is four.", "Two and two make four."),
        )
    ),
}


def reasoned(conversation):
    """The conversation with a reasoning for each answer that has none."""
    return replace(
        conversation,
        messages=tuple(
            replace(message, reasoning_content=message.reasoning_content or "Hm.")
            if message.role == "assistant"
            else message
            for message in conversation.messages
        ),
    )


def turns_of(conversation):
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]


def oracle(name, renderer, conversation):
    """The text that TRL trains, one stretch for each answer, each with the text before it."""
    messages, tools = renderer.wire(conversation)
    for message, original in zip(messages, conversation.messages, strict=True):
        if original.tool_calls:
            message["tool_calls"] = list(original.tool_calls)  # TRL's twins take arguments as objects
    (text,), (spans,) = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=twin(name),
        return_assistant_tokens_mask=True,
        **renderer.template.special_tokens,
        **renderer.template.arguments,
    )
    joined = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif end > start:
            joined.append([start, end])
    return [(text[:start], text[start:end]) for start, end in joined]


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation, and how the original template renders it."""

    name: str
    renderer: Renderer
    conversation: Conversation
    number: int

    @property
    def message(self):
        return self.conversation.messages[self.number]

    @property
    def last(self):
        return self.number == len(self.conversation.messages) - 1

    def rendered(self, *following, prompt=False):
        """The messages up to this answer, as the last or with others behind it; for a prompt, those before it."""
        shown = self.conversation.messages[: self.number + (not prompt)] + following
        messages, tools = self.renderer.wire(replace(self.conversation, messages=shown))
        return self.renderer.template.render(messages, tools, answer=prompt)


# The ways to differ. Each gets what stands before the trained text and that text, as far as they are accounted for,
# changes one thing of ours into the oracle's, and checks that it is the thing it claims to be.


def prompt_holds_it(turn, before, trained):
    """The oracle also trains what the serving prompt holds already: a header, an opened think block."""
    held = next(held for held in HELD[turn.name] if before.endswith(held))
    return before.removesuffix(held), held + trained


def reasoning_is_never_rendered(turn, before, trained):
    """DeepSeek: the serving prompt opens <think>, but no rendering holds the reasoning; the oracle trains neither."""
    thought = f"{turn.message.reasoning_content}\n</think>\n\n"
    assert before.endswith("<think>\n")
    assert trained.startswith(thought)
    assert "think>" not in turn.rendered()
    return before.removesuffix("<think>\n"), trained.removeprefix(thought)


def earlier_reasoning_is_dropped(turn, before, trained):
    """The oracle renders once, so it trains an earlier answer as history: without its reasoning."""
    dropped = DROPPED[turn.name].format(turn.message.reasoning_content)
    assert not turn.last
    assert dropped in turn.rendered()
    assert dropped not in turn.rendered(user("And now?"))
    assert trained.count(dropped) == 1
    return before, trained.replace(dropped, "<think></think>" if turn.name in NEMOTRON else "")


def earlier_answer_ends_as_history(turn, before, trained):
    """gpt-oss: what `<|return|>` ends is ended by `<|end|>` in the history, which stops no generation."""
    assert not turn.last
    assert turn.rendered().endswith("<|return|>")
    return before, trained.removesuffix("<|return|>") + "<|end|>"


def history_keeps_thinking(turn, before, trained):
    """Qwen3: TRL's template keeps a think block in the earlier answer, the original (and its server) does not."""
    header, earlier = "<|im_start|>assistant\n", turn.conversation.messages[1]
    thought = f"<think>\n{earlier.reasoning_content or ''}\n</think>\n\n"
    head, _, tail = before.partition(header)
    assert not tail.startswith("<think>")
    return head + header + thought + tail, trained


def eos_after_the_last_message(turn, before, trained):
    """Phi-3: a turn ends in `<|end|>`; the EOS after the last message belongs to no answer."""
    assert turn.last
    assert trained.endswith("<|end|>")
    assert turn.rendered() == before + trained + "\n<|endoftext|>"
    assert turn.rendered(user("And now?")).startswith(before + trained + "\n<|user|>")
    return before, trained + "\n<|endoftext|>"


def next_role_ends_it(turn, before, trained):
    """GLM-4: a turn ends where the next role's token stands, which the original renders with the next turn only."""
    stop = "<|observation|>" if turn.message.tool_calls else "<|user|>"
    follower = Message("tool", "Sunny.", name="get_weather") if turn.message.tool_calls else user("And now?")
    assert trained.endswith(stop)
    assert turn.rendered() == before + trained.removesuffix(stop)
    dropped = turn.message.reasoning_content or "<nothing>"
    assert turn.rendered(follower).startswith((before + trained).replace(dropped, ""))
    return before, trained


def tool_response_is_opened(turn, before, trained):
    """Diffusion Gemma: a call ends in the token that opens the tool's response, which the oracle leaves out."""
    assert turn.rendered() == before + trained
    assert trained.endswith("<tool_call|><|tool_response>")
    return before, trained.removesuffix("<|tool_response>")


def model_writes_its_header(turn, before, trained):
    """Diffusion Gemma: behind a tool's response the serving prompt holds no header, so the model must write it."""
    header = "<|turn>model\n"
    assert before.endswith("<tool_response|>")
    assert trained.startswith(header)
    return before + header, trained.removeprefix(header)


DEEPSEEK = ["deepseek_r1_distill", "deepseekv3"]
LFM2_5 = ["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"]
NEMOTRON = ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"]
PHI3 = ["phi3", "phi3_5"]
QWEN3_5 = ["qwen3_5_think", "qwen3_6"]
HELD = {
    **dict.fromkeys(["gptoss", "muse_glimmer"], ("<|start|>assistant",)),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "<think>\n"),
    **dict.fromkeys([*QWEN3_5, "qwen3_8"], ("<think>\n",)),
    **dict.fromkeys(NEMOTRON, ("<think>\n", "<think></think>")),
    **dict.fromkeys(DEEPSEEK, ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")),
}
DROPPED = {
    "diffusion_gemma": "<|channel>thought\n{}\n<channel|>",
    "glm4moe": "{}",
    "gptoss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
    **dict.fromkeys(LFM2_5, "<think>{}</think>"),
    **dict.fromkeys(["nemotron_3_nano", "nemotron_3_super"], "{}\n</think>"),
    **dict.fromkeys(["nemotron_3_5_lightning", "nemotron_3_ultra"], "{}</think>"),
}
DROPPED |= {name: "<think>\n" + DROPPED[name] for name in NEMOTRON}
EVERY, TWO = list(CONVERSATIONS), ["multi", "reasoning_multi"]
# (templates, conversations, answers, way), made one after the other; an answer of which nothing is said here is equal.
DIFFERENCES = [
    (DEEPSEEK, ["single", "multi", "system", "reasoning", "reasoning_multi"], [0, 1], reasoning_is_never_rendered),
    (["deepseekv3"], ["tool"], [0], reasoning_is_never_rendered),
    (["qwen3", "qwen3_5_nothink", *QWEN3_5], TWO, [1], history_keeps_thinking),
    (["qwen3"], ["tool"], [1], history_keeps_thinking),
    (list(HELD), EVERY, [0, 1], prompt_holds_it),
    (["glm4moe"], EVERY, [0, 1], next_role_ends_it),
    (
        ["diffusion_gemma", "glm4moe", "gptoss", *LFM2_5, *NEMOTRON],
        ["reasoning_multi"],
        [0],
        earlier_reasoning_is_dropped,
    ),
    (["gptoss"], TWO, [0], earlier_answer_ends_as_history),
    (["diffusion_gemma"], ["tool"], [0], tool_response_is_opened),
    (["diffusion_gemma"], ["tool"], [1], model_writes_its_header),
    (PHI3, ["single", "system", "reasoning"], [0], eos_after_the_last_message),
    (PHI3, TWO, [1], eos_after_the_last_message),
]
# What Nemotron forgets of a row whose reasoning was put in for it (`multi`, mended).
MENDED_DIFFERENCES = [(NEMOTRON, ["multi"], [0], earlier_reasoning_is_dropped)]

REFUSED = {
    ("gemma", "system"): "System role not supported",
    **dict.fromkeys(
        [(name, "tool") for name in ("cohere", "cohere2", "gemma", "gemma3")],
        "Conversation roles must alternate user/assistant/user/assistant/...",
    ),
    ("llava_next", "tool"): "Only user and assistant roles are supported!",
}
DROPS_CALLS = ["idefics3", "lfm2", "llama3", *PHI3, "qwen2_5_vl", "smolvlm"]
OPENS_THINKING = [*DEEPSEEK, *NEMOTRON]


# Of all templates and conversations; one may differ in several ways.
COUNTS = {
    "equal": 89,
    "prompt_holds_it": 52,
    "reasoning_is_never_rendered": 4,
    "earlier_reasoning_is_dropped": 10,
    "earlier_answer_ends_as_history": 2,
    "history_keeps_thinking": 8,
    "eos_after_the_last_message": 10,
    "next_role_ends_it": 6,
    "tool_response_is_opened": 1,
    "model_writes_its_header": 1,
    "<think> opened": 24,
    "<think> closed": 2,
    "refused by the template": 6,
    "call left out by the template": 8,
}


def held_against_the_oracle(name, key, renderer, conversation, differences=DIFFERENCES):
    """Assert that each answer is the oracle's but for the named differences; give their names."""
    names = set()
    marked = oracle(name, renderer, conversation)
    answers = turns_of(conversation)
    assert len(marked) == len(answers)
    for answer, (number, (before, trained)) in enumerate(zip(answers, marked, strict=True)):
        turn, exchange = Turn(name, renderer, conversation, number), renderer.exchange(conversation, number)
        assert exchange.prompt == turn.rendered(prompt=True)
        ours = exchange.prompt, exchange.completion
        for templates, conversations, which, way in differences:
            if name in templates and key in conversations and answer in which:
                ours = way(turn, *ours)
                names.add(way.__name__)
        assert ours[0] == before
        assert trained.startswith(ours[1])
        assert not trained[len(ours[1]) :].strip()
        if not names & {"reasoning_is_never_rendered", "next_role_ends_it"}:
            assert turn.rendered().startswith(exchange.full)
    return sorted(names) or ["equal"]


def refused_in_its_own_words(name, renderer, conversation, words):
    """The row is rejected with the message that the template itself raises."""
    row = Record(Source("chats.jsonl", 7), "messages", "conversation", (conversation,))
    (encoded,) = RecordEncoder(renderer, PromptOptions()).encode([row])
    (problem,) = encoded.problems
    assert encoded.status == "rejected"
    assert not encoded.exchanges
    assert problem.source == "chats.jsonl:7"
    assert problem.reason == f"the template 'tokenizer' refuses this conversation: {words}"


@cache
def outcome(name, key):
    """What becomes of a conversation: `equal`, the names of its differences, or the kind of error; all asserted."""
    renderer, conversation = renderer_for(name), CONVERSATIONS[key]
    first = turns_of(conversation)[0]
    if (name, key) in REFUSED:
        with pytest.raises(Exception, match=re.escape(REFUSED[name, key])):
            oracle(name, renderer, conversation)
        refused_in_its_own_words(name, renderer, conversation, REFUSED[name, key])
        return ["refused by the template"]
    if key == "tool" and name in DROPS_CALLS:
        empty = oracle(name, renderer, conversation)[0][1]
        assert "get_weather" not in empty
        with pytest.raises(TemplateError, match="leaves out the tool call"):
            renderer.exchange(conversation, first)
        return ["call left out by the template"]
    if name in OPENS_THINKING and "reasoning" not in key:
        with pytest.raises(TemplateError) as error:
            renderer.exchange(conversation, first)
        opened_thinking(error.value, Turn(name, renderer, conversation, first))
        if (name, key) == ("deepseek_r1_distill", "tool"):
            with pytest.raises(TemplateError, match="leaves out the tool call"):
                renderer.exchange(reasoned(conversation), first)
            return ["<think> opened", "call left out by the template"]
        mended = held_against_the_oracle(name, key, renderer, reasoned(conversation), DIFFERENCES + MENDED_DIFFERENCES)
        assert "equal" not in mended
        if name in NEMOTRON:
            off = renderer_for(name, {"enable_thinking": False})
            assert held_against_the_oracle(name, key, off, conversation) == ["prompt_holds_it"]
        return ["<think> opened"]
    if name == "qwen3_5_nothink" and "reasoning" in key:
        with pytest.raises(TemplateError) as error:
            renderer.exchange(conversation, first)
        assert error.value.remedy == (
            "This template closes <think> before the model answers: leave the reasoning out, or set --template-args "
            "enable_thinking=true."
        )
        on = renderer_for(name, {"enable_thinking": True})
        assert "prompt_holds_it" in held_against_the_oracle(name, key, on, conversation)
        return ["<think> closed"]
    return held_against_the_oracle(name, key, renderer, conversation)


def opened_thinking(error, turn):
    """The error of a prompt that opens <think> for an answer without reasoning."""
    prompt, rendered = turn.rendered(prompt=True), turn.rendered()
    goes_on, instead = re.fullmatch(
        "the serving prompt is not a prefix of the rendering: the prompt goes on (.*), the rendering (.*)",
        error.message,
    ).groups()
    assert goes_on.endswith(repr("<think>\n")[1:])
    assert goes_on[1:-1] in repr(prompt)
    assert instead[1:-1] in repr(rendered)
    assert goes_on != instead
    assert error.remedy == (
        "This template opens <think> for the model: give the answer's `reasoning_content`"
        + (", or set --template-args enable_thinking=false." if turn.name in NEMOTRON else ".")
    )


@pytest.mark.parametrize("key", CONVERSATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, key):
    assert outcome(name, key)


def test_counts():
    counted = Counter(found for name in PAIRS for key in CONVERSATIONS for found in outcome(name, key))
    assert len(PAIRS) == 34
    assert counted == COUNTS


@pytest.mark.parametrize("special_markers", [False, True])
@pytest.mark.parametrize("name", ORIGINALS)
def test_stop_tokens(name, special_markers):
    renderer = renderer_for(name, special_markers=special_markers)
    for conversation in CONVERSATIONS.values():
        for shown in (conversation, reasoned(conversation)):
            for number in turns_of(shown):
                try:
                    exchange = renderer.exchange(shown, number)
                except TemplateError:
                    continue
                assert exchange.completion.endswith(tuple(family(name)[2]))
    assert set(renderer.stop_tokens) == family(name)[2]
