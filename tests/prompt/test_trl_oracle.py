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

# A family by the beginning of its templates' names (the longest counts): EOS and BOS of its real tokenizer, the stop
# tokens to be found, and control tokens that its template does not spell.
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
