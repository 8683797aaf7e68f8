"""Chat without a terminal: the prompts are those of training, and what is kept of a conversation."""

import json
from types import SimpleNamespace

import pytest

from instil.conversation import Conversation, Message
from instil.data import read
from instil.errors import TemplateError, UsageError
from instil.inference.engine import Answer
from instil.inference.load import Loaded
from instil.inference.options import SamplingOptions
from instil.inference.session import Chat, ChatSession, frame, prompt_ids, stop_ids
from instil.pocket import sample_data, save_sample_tokenizer
from instil.prompt import PromptOptions, RecordEncoder, load_renderer


def without_stop(chat, completion):
    stop = [token for token in chat.renderer.stop_tokens if completion.endswith(token)]
    return completion.removesuffix(stop[0]) if stop else completion


TEMPLATES = ("chatml", "llama3", "alpaca", "headers", "human-assistant", "prompt-tokens")


class Scripted:
    """An engine that says what it is told to, and keeps the prompts it was given."""

    def __init__(self, context=0, says=(), stop_ids=()):
        self.context = context
        self.stop_ids = frozenset(stop_ids)
        self.says = list(says)
        self.prompts, self.seeds = [], []

    def generate(self, prompts, sampling=None, *, on_text=None, on_done=None):
        self.prompts += [list(ids) for ids in prompts]
        self.seeds.append(sampling.seed if sampling else None)
        found = []
        for number, _ in enumerate(prompts):
            text = self.says.pop(0) if self.says else "Well."
            if isinstance(text, BaseException):
                raise text
            for piece in text.split(" "):
                if isinstance(piece, str) and on_text:
                    if piece == "<interrupt>":
                        raise KeyboardInterrupt
                    on_text(number, 0, f"{piece} ")
            found.append([Answer((1, 2), text, "stop", -1.0)])
        return found


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return str(save_sample_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat_of(tokenizer, template="chatml", **engine):
    renderer = load_renderer(tokenizer, PromptOptions(template=template))
    return Chat(SimpleNamespace(renderer=renderer, engine=Scripted(**engine)))


def replayed(chat, conversation, turn, answers):
    """The prompt of a session that came to this turn by saying what the conversation says, the model all that it was
    trained to; None if it cannot."""
    messages = conversation.messages[:turn]
    plain = all(not m.fields and not m.tool_calls and m.reasoning_content is None for m in messages)
    system = messages[0].content if messages[0].role == "system" else None
    said = messages[1:] if system else messages
    if not plain or conversation.tools or [m.role for m in said] != (["user", "assistant"] * len(said))[: len(said)]:
        return None
    session = ChatSession(chat, system=system)
    for user, answer in zip(said[::2], [*answers[: len(said) // 2], "End."], strict=True):
        chat.engine.says = [answer]
        session.send(user.content)
    assert [m.content for m in session.messages[1:-1:2]] == [m.content for m in said[1::2]]
    return chat.engine.prompts[-1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_of_every_turn_is_that_of_training(tokenizer, template):
    """Every record of the sample data, every answer; those of plain turns by a session that says them one by one."""
    chat = chat_of(tokenizer, template)
    encoder = RecordEncoder(load_renderer(tokenizer, PromptOptions(template=template)), PromptOptions())
    compared = by_session = 0
    for record in read(sample_data()):
        (encoded,) = encoder.encode([record])
        exchanges = iter(encoded.exchanges)
        if not encoded.exchanges or record.kind in ("text", "preference"):
            continue
        for conversation in record.conversations:
            only_last, answers = record.kind == "labelled", []
            turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight != 0]
            for turn in turns[-1:] if only_last else turns or [len(conversation.messages)]:
                exchange = next(exchanges)
                expected = exchange.prompt_ids.tolist()
                before = Conversation(conversation.messages[:turn], conversation.tools)
                assert list(chat.prompt(before).ids) == expected, record.source
                compared += 1
                found = replayed(chat, conversation, turn, answers)
                answers.append(without_stop(chat, exchange.completion_text))
                if found is not None:
                    assert found == expected, record.source
                    by_session += 1
        assert next(exchanges, None) is None
    assert compared > 120
    assert by_session > 30


def test_what_the_template_puts_around_an_answer_is_not_its_content(tokenizer):
    """`Assistant:` asks and ` Yes.` answers: the content is `Yes.`, also as it streams."""
    chat = chat_of(tokenizer, "human-assistant", says=[" Yes, it is.", "Odd.", " half <interrupt>"])
    assert frame(chat.renderer) == (" ", "")
    session, heard = ChatSession(chat), []
    session.send("Is it?", lambda answer, piece: heard.append(piece))
    session.send("Is it?")
    session.send("Is it?")
    assert "".join(heard) == "Yes, it is. ", "the space at the end is the script's"
    assert [m.content for m in session.messages[1::2]] == ["Yes, it is.", "Odd.", "half "]
    assert frame(chat_of(tokenizer).renderer) == ("", "")


def test_the_loaded_template_names_its_stop_token(tokenizer):
    for template, token in (("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>"), ("llama3", "<|eot_id|>")):
        chat = chat_of(tokenizer, template, stop_ids=[7])
        backend = chat.renderer.tokenizer.backend
        assert chat.engine.stop_ids == {7, backend.token_to_id(token)}
        assert stop_ids(chat.renderer) == [backend.token_to_id(token)]


REASONS = """\
{#- special_tokens: {"<|im_start|>": "a turn", "<|im_end|>": "its end"} -#}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- set thought = message.reasoning_content or message.content.rpartition('</think>')[0] -%}
    {%- if thought and loop.last -%}
        {{- '<think>\\n' ~ thought.split('<think>')[-1].strip() ~ '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- message.content.rpartition('</think>')[2].strip() ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\nOPENED' -}}{%- endif -%}
"""


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_reasoning_stands_in_the_answer_and_history_is_as_in_training(tokenizer, tmp_path, opened):
    """A template that drops the reasoning of history, as Qwen3's does, and one that opens <think> for the model."""
    template = tmp_path / "reasons.jinja"
    template.write_text(REASONS.replace("OPENED", opened.replace("\n", "\\n")))
    chat = chat_of(tokenizer, str(template))
    assert chat.engine.stop_ids == {chat.renderer.tokenizer.backend.token_to_id("<|im_end|>")}
    answer = Message("assistant", "Yes.", reasoning_content="Hm, so.")
    conversation = Conversation((Message("user", "Is it?"), answer, Message("user", "Sure?")))
    trained = chat.renderer.exchange(conversation, 1)
    assert trained.prompt.endswith(f"assistant\n{opened}")
    chat.engine.says = [trained.completion.removesuffix("<|im_end|>")]
    session = ChatSession(chat)
    session.send("Is it?")
    assert "Hm, so.\n</think>\n\nYes." in session.messages[1].content
    session.send("Sure?")
    assert chat.engine.prompts[-1] == prompt_ids(chat.renderer, conversation)


def test_a_base_model_without_a_template_names_the_flag(tokenizer):
    loaded = Loaded(Scripted(), load_renderer(tokenizer, PromptOptions(template="alpaca")).tokenizer)
    with pytest.raises(TemplateError, match="--template"):
        Chat(loaded)


def turns(count, words=6):
    said = []
    for n in range(count):
        said += [Message("user", f"{n} " + "word " * words), Message("assistant", f"answer {n}")]
    return said


def test_the_oldest_turns_make_room(tokenizer):
    chat = chat_of(tokenizer)
    system, asked = Message("system", "Be brief."), Message("user", "And now?")
    whole = [len(chat.prompt(Conversation((system, *turns(4)[2 * n :], asked))).ids) for n in range(5)]
    assert whole == sorted(whole, reverse=True)
    sampling = SamplingOptions(max_new_tokens=8)
    for dropped in range(1, 5):
        chat.engine.context = whole[dropped] + 8
        found = chat.prompt(Conversation((system, *turns(4), asked)), sampling)
        assert (len(found.ids), found.dropped_turns) == (whole[dropped], dropped)
        rest = Conversation((system, *turns(4)[2 * dropped :], asked))
        assert list(found.ids) == prompt_ids(chat.renderer, rest)
    chat.engine.context = whole[4] + 1
    assert chat.prompt(Conversation((system, *turns(4), asked)), sampling).dropped_turns == 4, "with less room"
    chat.engine.context = whole[4]
    with pytest.raises(UsageError, match=f"a prompt of {whole[4]} tokens, system message included"):
        chat.prompt(Conversation((system, *turns(4), asked)), sampling)


def test_a_message_that_is_no_text_is_refused(tokenizer):
    session = ChatSession(chat_of(tokenizer), system="Be brief.")
    with pytest.raises(UsageError, match="the user message is not UTF-8"):
        session.send(b"caf\xe9".decode(errors="surrogateescape"))
    assert session.messages == []


def test_a_tool_turn_goes_with_its_question(tokenizer):
    chat = chat_of(tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = (
        Message("user", "long " * 40),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "42", name="f"),
        Message("assistant", "It is 42."),
    )
    chat.engine.context = 60
    found = chat.prompt(Conversation((*turn, Message("user", "And now?"))), SamplingOptions(max_new_tokens=4))
    assert found.dropped_turns == 1
    assert list(found.ids) == prompt_ids(chat.renderer, Conversation((Message("user", "And now?"),)))


def test_a_session_keeps_what_was_said_whatever_is_dropped(tokenizer):
    chat = chat_of(tokenizer, context=48, says=["one", "two", "three"])
    session = ChatSession(chat, SamplingOptions(max_new_tokens=4), "Be brief.")
    replies = [session.send("word " * 8) for _ in range(3)]
    assert [each.dropped_turns for each in replies] == [0, 1, 2]
    assert [m.content for m in session.messages[1::2]] == ["one", "two", "three"]
    assert replies[-1].to_json()["messages"][0] == {"role": "system", "content": "Be brief."}
    assert replies[-1].to_json()["dropped_turns"] == 2


def test_retry_replaces_the_answer_by_other_draws(tokenizer):
    chat = chat_of(tokenizer, says=["one", "two", "three"])
    session = ChatSession(chat, SamplingOptions(temperature=1.0, seed=5))
    with pytest.raises(UsageError, match="no answer to give again"):
        session.retry()
    session.send("Hi")
    session.retry()
    assert [m.content for m in session.messages] == ["Hi", "two"]
    assert chat.engine.prompts[0] == chat.engine.prompts[1]
    session.send("Go on")
    assert chat.engine.seeds == [5, 6, 7]
    session.reset()
    assert session.messages == []
    session.send("Hi")
    assert chat.engine.seeds[-1] == 5, "as from the beginning"


def test_what_was_said_before_a_stop_is_kept_and_marked(tokenizer, tmp_path):
    chat = chat_of(tokenizer, says=["one", "half an <interrupt>", "<interrupt>", RuntimeError("broken")])
    session = ChatSession(chat)
    session.send("Hi")
    heard = []
    reply = session.send("Go on", lambda answer, piece: heard.append((answer, piece)))
    assert heard == [(0, "half "), (0, "an ")]
    assert [(each.message.content, each.ended) for each in reply.answers] == [("half an ", "stopped")]
    session.save(tmp_path / "chats.jsonl")
    kept = list(session.messages)
    assert session.send("And?").answers == ()
    with pytest.raises(RuntimeError):
        session.send("And?")
    assert session.messages == kept, "as it was"
    (record,) = read(tmp_path / "chats.jsonl")
    assert [m.weight for m in record.conversations[0].messages] == [None, None, None, 0.0]
    encoder = RecordEncoder(chat.renderer, PromptOptions())
    (exchange,) = encoder.encode([record])[0].exchanges
    assert exchange.completion_text == "one<|im_end|>", "what was stopped is not trained"


def test_an_empty_answer_is_not_trained(tokenizer, tmp_path):
    session = ChatSession(chat_of(tokenizer, says=["one", ""]))
    session.send("Hi")
    session.send("Go on")
    session.save(tmp_path / "chats.jsonl")
    (record,) = read(tmp_path / "chats.jsonl")
    assert [m.weight for m in record.conversations[0].messages] == [None, None, None, 0.0]


def test_a_signal_that_ends_the_process_is_no_stop(tokenizer):
    class Ended(KeyboardInterrupt):
        pass

    session = ChatSession(chat_of(tokenizer, says=[Ended()]))
    with pytest.raises(Ended):
        session.send("Hi")


def test_save_appends_records(tokenizer, tmp_path):
    session = ChatSession(chat_of(tokenizer, says=["one", "two"]), system="Be brief.")
    file = tmp_path / "chats.jsonl"
    with pytest.raises(UsageError, match="no answer to save"):
        session.save(file)
    session.send("Hi")
    file.write_text('{"prompt": "a", "completion": "b"}')
    session.save(file)
    session.send("Go on")
    session.save(file)
    records = list(read(file))
    assert [len(each.conversations[0].messages) for each in records] == [2, 3, 5]
    assert json.loads(file.read_text().splitlines()[2]) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "Go on"},
            {"role": "assistant", "content": "two"},
        ]
    }
    for name, part in (("chats.txt", "JSON lines"), ("no/chats.jsonl", "No such file"), ("a\0.jsonl", "null byte")):
        with pytest.raises(UsageError, match=part):
            session.save(tmp_path / name)


def test_replies_to_many(tokenizer):
    chat = chat_of(tokenizer, says=["one", "two"])
    conversations = [Conversation((Message("user", text),)) for text in ("Hi", "Name the capital.")]
    replies = chat.replies(conversations)
    assert [each.to_json()["answers"][0]["content"] for each in replies] == ["one", "two"]
    assert [each.prompt_tokens for each in replies] == [len(ids) for ids in chat.engine.prompts]
