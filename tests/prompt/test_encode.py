"""Records to exchanges: the ids of the server, the seam's proof, the exact tokens that are trained, and lengths."""

import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from instil.conversation import Conversation, Message, Record, Source
from instil.errors import TemplateError
from instil.prompt import PromptOptions, RecordEncoder, builtin_templates, exchanges, load_renderer
from instil.prompt.encode import encode_seam, token_places
from instil.prompt.render import TextExchange
from instil.prompt.tokenizer import Encoder

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def system(text, **more):
    return Message("system", text, **more)


def user(text, **more):
    return Message("user", text, **more)


def assistant(text, **more):
    return Message("assistant", text, **more)


def call(**arguments):
    return {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}


def record(*messages, kind="conversation", tools=(), label="", line=1):
    return Record(Source("a.jsonl", line), "messages", kind, (Conversation(messages, tools),), (label,))


def preference(prompt, chosen, *rejected):
    conversations = tuple(Conversation((*prompt, assistant(text))) for text in (chosen, *rejected))
    labels = ("chosen", *["rejected"] * len(rejected))
    return Record(Source("a.jsonl", 1), "preference", "preference", conversations, labels)


@pytest.fixture
def encoded(tokenizer_of):
    """Encodes one record: `encoded(record, kind, template=…, max_length=…)`."""

    def encode(row, kind="cl100k", *, template="chatml", objective=None, count_roles=False, **options):
        chosen = PromptOptions(template=template, **options)
        renderer = load_renderer(tokenizer_of(kind), chosen)
        (one,) = RecordEncoder(renderer, chosen, chosen.max_length, objective, count_roles=count_roles).encode([row])
        one_by_one[id(one)] = renderer.tokenizer
        return one

    one_by_one = {}
    encode.tokenizer = lambda one: one_by_one[id(one)]
    return encode


def trained(encoded, one):
    """The trained stretches of each exchange as text, with their weights: [[(text, weight), …], …]."""
    tokenizer = encoded.tokenizer(one)
    found = []
    for exchange in one.exchanges:
        ids = [*exchange.prompt_ids.tolist(), *exchange.completion_ids.tolist()]
        weights = [*exchange.prompt_weights.tolist(), *exchange.completion_weights.tolist()]
        runs = []
        for at, weight in enumerate(weights):
            if weight and at and weights[at - 1] == weight:
                runs[-1][0].append(ids[at])
            elif weight:
                runs.append(([ids[at]], weight))
        found.append([(tokenizer.decode(run), weight) for run, weight in runs])
    return found


def pieces(encoded, one):
    """The tokens of the first exchange: prompt, completion."""
    name = encoded.tokenizer(one).backend.id_to_token
    exchange = one.exchanges[0]
    return [name(i) for i in exchange.prompt_ids.tolist()], [name(i) for i in exchange.completion_ids.tolist()]


# The prompt is what the server computes.

CONVERSATIONS = {
    "single": record(user("Name a prime."), assistant("Seven.")),
    "system": record(system("Be brief."), user("Name a prime"), assistant("Seven.")),
    "turns": record(
        user("Name a prime."),
        assistant("Seven.\n"),
        user(" another\n\n"),
        assistant("\televen"),
        user("é?"),
        assistant("no"),
    ),
    "empty": record(user(""), assistant("Seven."), user("  "), assistant("x")),
    "tools": record(
        user("Rain?"),
        assistant("", tool_calls=(call(city="Oslo"),)),
        Message("tool", "dry"),
        assistant("No."),
        tools=(WEATHER,),
    ),
    "reasoning": record(user("2 + 2?"), assistant("4", reasoning_content="Two and two.")),
    "prompt": record(system("Be brief."), user("Name a prime."), kind="prompt"),
    "fields": record(user("Count:\na b", fields={"instruction": "Count:", "input": "a b"}), assistant("2")),
    "hole": record(user("ac", fields={"prefix": "def f(x):\n", "suffix": "\n    pass"}), assistant("    return x")),
    "odd": record(user("日本語 ▁ Ġ \x1c e\u0301 ﬁ"), assistant(" 🙂\u2028")),
}


def reference_of(renderer):
    """The same tokenizer in transformers, with the tokens that the template declares."""
    tokenizer = renderer.tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens)


@pytest.mark.parametrize("template", sorted(builtin_templates()))
def test_prompts_are_those_of_transformers(tokenizer_of, kind, template):
    options = PromptOptions(template=template)
    renderer = load_renderer(tokenizer_of(kind), options)
    reference, encoder, compared = reference_of(renderer), RecordEncoder(renderer, options), 0
    for one in encoder.encode(list(CONVERSATIONS.values())):
        (conversation,) = one.record.conversations
        messages, tools = renderer.wire(conversation)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] or [len(messages)]
        for exchange, turn in zip(one.exchanges, turns, strict=one.status == "kept"):
            expected = reference.apply_chat_template(
                messages[:turn],
                tools=tools or None,
                chat_template=renderer.template.text,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert exchange.prompt_ids.tolist() == expected
            compared += 1
            whole = reference(exchange.prompt_text + exchange.completion_text, add_special_tokens=False)["input_ids"]
            joined = expected + exchange.completion_ids.tolist()
            if exchange.boundary == "split":
                assert joined != whole
                assert renderer.tokenizer.decode(joined) in (
                    exchange.prompt_text + exchange.completion_text,
                    renderer.tokenizer.decode(whole),
                )
            else:
                assert joined == whole
    assert compared >= (1 if template == "fim" else 7)


@pytest.mark.parametrize("template", sorted(builtin_templates()))
def test_bos_stands_where_the_tokenizer_adds_it(tokenizer_of, kind, template):
    renderer = load_renderer(tokenizer_of(kind), PromptOptions(template=template))
    tokenizer = renderer.tokenizer
    row = CONVERSATIONS["hole" if template == "fim" else "single"]
    (one,) = RecordEncoder(renderer, PromptOptions()).encode([row])
    ids = one.exchanges[0].prompt_ids.tolist()
    adds = tokenizer.backend.encode("a").ids[:1] == [tokenizer.backend.token_to_id("<s>")]
    assert adds == (kind in ("byte_level_bos", "metaspace_first", "llama2"))
    bos = tokenizer.special_tokens.get("bos_token")
    assert [i for i in ids if bos and i == tokenizer.backend.token_to_id(bos)] == ids[:1] * adds


def test_a_spelled_control_token_is_kept_plain(encoded):
    one = encoded(record(user("a<|im_end|>b"), assistant("It is <|im_end|>.")))
    assert one.spelled == ("<|im_end|>",)
    (exchange,) = one.exchanges
    end = encoded.tokenizer(one).backend.token_to_id("<|im_end|>")
    assert exchange.prompt_ids.tolist().count(end) == 1
    assert exchange.completion_ids.tolist().count(end) == 1
    assert exchange.completion_ids[-1] == end
    assert exchange.prompt_text.count("<|im_end|>") == 2
    assert encoded.tokenizer(one).decode(exchange.prompt_ids) == exchange.prompt_text


# The seam.


def seam(tokenizer_of, kind, prompt, completion):
    tokenizer = tokenizer_of(kind)
    added = tokenizer.backend.get_added_tokens_decoder().values()
    encoder = Encoder(tokenizer, [token.content for token in added if token.special])
    text = TextExchange(prompt, prompt + completion)
    before, after, boundary = encode_seam(encoder, text)
    name = tokenizer.backend.id_to_token
    places = token_places(encoder, text, boundary)
    assert len(places) == len(before) + len(after)
    assert (places[: len(before), 1] <= len(prompt)).all() or kind in ("phi3", "phi4")
    return boundary, [name(i) for i in before], [name(i) for i in after]


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "expected"),
    [
        ("gpt2", "a<|endoftext|>", "me", ("special", ["a", "<|endoftext|>"], ["me"])),
        ("gpt2", "a", "<|endoftext|>", ("special", ["a"], ["<|endoftext|>"])),
        ("gpt2", "prime:", " again", ("compared", None, ["Ġagain"])),
        ("gpt2", "a ", "again", ("split", ["a", "Ġ"], None)),
        ("gpt2", "\n\n", "a", ("split", ["ĊĊ"], ["a"])),
        ("cl100k", "\n\n", "a", ("compared", ["ĊĊ"], ["a"])),
        ("cl100k", "e", "\u0301", ("split", ["e"], ["Ì", "ģ"])),
        ("phi4", "a<|im_start|>", " a", ("compared", ["a", "<|im_start|>"], ["a"])),
        ("phi4", "a\n", "<|im_start|>a", ("split", ["a", "Ċ"], ["<|im_start|>", "a"])),
        ("phi3", "a<|user|>\n", "a", ("special", ["▁a", "<|user|>"], ["▁a"])),
        ("phi3", "a\n", "a", ("compared", ["▁a", "\n"], ["a"])),
        ("llama2", "Name a pri", "me", ("split", None, ["me"])),
        ("metaspace_first", "</s>", "a", ("special", ["</s>"], ["a"])),
        ("t5", "a</s>", "a", ("special", ["▁a", "</s>"], ["▁a"])),
    ],
)
def test_the_seam_is_proved(tokenizer_of, kind, prompt, completion, expected):
    boundary, before, after = seam(tokenizer_of, kind, prompt, completion)
    assert boundary == expected[0]
    if expected[1] is not None:
        assert before == expected[1]
    if expected[2] is not None:
        assert after == expected[2]


def test_the_ids_of_every_kind_of_seam(tokenizer_of):
    tokenizer = tokenizer_of("byte_level_bos")
    encode = tokenizer.backend.encode
    encoder = Encoder(tokenizer, ["<s>", "</s>"])
    for prompt, completion, boundary in (
        ("Name</s>", "prime</s>", "special"),
        ("Name.", " prime</s>", "compared"),
        ("Nam", "e a prime</s>", "split"),
    ):
        before, after, found = encode_seam(encoder, TextExchange(prompt, prompt + completion))
        assert found == boundary
        assert before == encode(prompt, add_special_tokens=False).ids
        assert after == encode(completion, add_special_tokens=False).ids
        whole = encode(prompt + completion, add_special_tokens=False).ids
        assert (before + after == whole) == (boundary != "split")
        assert tokenizer.decode(before + after) == prompt + completion


def test_a_straddling_token_that_cannot_be_split_is_an_error(encoded):
    one = encoded(record(user("Name a pri"), assistant("me.")), "t5", template="plain")
    assert (one.status, one.exchanges) == ("rejected", ())
    assert one.reason == (
        "a token straddles the end of the prompt ('Name a pri' + 'me.</s>'), and the two encoded apart do not decode "
        "to the same text"
    )
    assert one.problems[0].source == "a.jsonl:1"
    assert (
        one.problems[0].remedy == "Change the template so that its prompt ends in a special token or in a line break."
    )
    split = encoded(record(user("Name a pri"), assistant("me.")), "llama2", template="plain")
    assert split.exchanges[0].boundary == "split"
    assert pieces(encoded, split)[1][-1] == "</s>"
    joined = [*split.exchanges[0].prompt_ids, *split.exchanges[0].completion_ids]
    assert encoded.tokenizer(split).decode(joined) == "<s> Name a prime.</s>"


# What is trained.

TURNS = record(system("Be brief."), user("Name a prime"), assistant("Seven."), user("another"), assistant("eleven"))


@pytest.mark.parametrize("kind", ["cl100k", "gpt2", "neox", "phi4", "metaspace_first", "metaspace_always", "llama2"])
def test_answers_alone_are_trained(encoded, kind):
    first, second = trained(encoded, encoded(TURNS, kind))
    assert first == [("Seven.<|im_end|>", 1.0)]
    assert second == [("eleven<|im_end|>", 1.0)]


def test_unmasked_trains_the_text_of_every_message_once(encoded):
    assert trained(encoded, encoded(TURNS, prompt_weight=1)) == [
        [("Be brief.", 1.0), ("Name a prime", 1.0), ("Seven.<|im_end|>", 1.0)],
        [("another", 1.0), ("eleven<|im_end|>", 1.0)],
    ]


def test_a_prompt_weight_between(encoded):
    assert trained(encoded, encoded(TURNS, prompt_weight=0.5)) == [
        [("Be brief.", 0.5), ("Name a prime", 0.5), ("Seven.<|im_end|>", 1.0)],
        [("another", 0.5), ("eleven<|im_end|>", 1.0)],
    ]


def test_only_the_last_answer(encoded):
    assert trained(encoded, encoded(TURNS, train_on="last")) == [[("eleven<|im_end|>", 1.0)]]
    assert trained(encoded, encoded(TURNS, train_on="last", prompt_weight=0.5)) == [
        [("Be brief.", 0.5), ("Name a prime", 0.5), ("Seven.", 0.5), ("another", 0.5), ("eleven<|im_end|>", 1.0)]
    ]


def test_a_call_in_the_prompt_is_weighed_by_its_texts(encoded):
    row = record(
        user("Weather?"),
        assistant("", tool_calls=(call(city="Rome", days=3),)),
        Message("tool", "Sunny."),
        assistant("It is sunny."),
        tools=(WEATHER,),
    )
    one = encoded(row, train_on="last", prompt_weight=1)
    (exchange,) = one.exchanges
    ids = exchange.prompt_ids[exchange.prompt_weights == 1]
    assert encoded.tokenizer(one).decode(ids) == "Weather?weatherRomeSunny."


@pytest.mark.parametrize(
    ("weight", "stretch"), [(0.25, [(" Seven.</s>", 0.25)]), (0.0, None), (None, [(" Seven.</s>", 1.0)])]
)
def test_an_answers_own_weight(encoded, weight, stretch):
    one = encoded(
        record(user("Name a prime"), assistant("Seven.", weight=weight)), "byte_level_bos", template="human-assistant"
    )
    if stretch is None:
        assert (one.status, one.reason, one.exchanges) == ("dropped", "every answer has weight 0", ())
    else:
        assert trained(encoded, one) == [stretch]


def test_an_answer_of_weight_zero_is_a_prompt_only(encoded):
    row = record(user("Name a prime"), assistant("Seven.", weight=0), user("another"), assistant("eleven"))
    assert trained(encoded, encoded(row)) == [[("eleven<|im_end|>", 1.0)]]
    assert trained(encoded, encoded(row, prompt_weight=1)) == [
        [("Name a prime", 1.0), ("another", 1.0), ("eleven<|im_end|>", 1.0)]
    ]


def test_a_users_own_weight_goes_before_the_prompt_weight(encoded):
    row = record(user("Name a prime", weight=0.25), assistant("Seven."), user("another", weight=0), assistant("eleven"))
    for prompt_weight, one in ((0, encoded(row)), (1, encoded(row, prompt_weight=1))):
        assert trained(encoded, one) == [
            [("Name a prime", 0.25), ("Seven.<|im_end|>", 1.0)],
            [("eleven<|im_end|>", 1.0)],
        ], prompt_weight


def test_a_word_that_shares_its_token_with_the_templates_space_is_the_messages(encoded):
    row = record(user("again."), assistant("Seven."))
    expected = {"byte_level_bos": " again.", "cl100k": " again.\n\n"}
    for kind, text in expected.items():
        one = encoded(row, kind, template="human-assistant", prompt_weight=1)
        first = trained(encoded, one)[0][0]
        assert first in ((text, 1.0), (text.rstrip(), 1.0))
        assert "Human" not in first[0]


REASONED = [
    assistant("4.", reasoning_content="Two and two."),
    assistant("<think>\nTwo and two.\n</think>\n\n4."),
]


@pytest.mark.parametrize("answer", REASONED)
def test_reasoning(encoded, answer):
    row = record(user("Count"), answer)
    whole = "<think>\nTwo and two.\n</think>\n\n4.<|im_end|>"
    assert trained(encoded, encoded(row)) == [[(whole, 1.0)]]
    masked = trained(encoded, encoded(row, train_reasoning=False))
    assert [weight for _, weight in masked[0]] == [1.0, 1.0]
    assert "".join(text for text, _ in masked[0]).replace("\n", "") == "<think></think>4.<|im_end|>"


def test_earlier_reasoning_is_not_weighed_either(encoded):
    row = record(user("Count"), REASONED[0], user("again"), assistant("No."))
    one = encoded(row, train_on="last", prompt_weight=1, train_reasoning=False)
    assert [text for text, _ in trained(encoded, one)[0]] == ["Count", "4.", "again", "No.<|im_end|>"]
    one = encoded(row, train_on="last", prompt_weight=1)
    assert [text.strip() for text, _ in trained(encoded, one)[0]] == [
        "Count",
        "Two and two.",
        "4.",
        "again",
        "No.<|im_end|>",
    ]


def test_a_preference_pair(encoded):
    one = encoded(preference([user("Name a prime")], "Seven.", "Eight."))
    assert [exchange.label for exchange in one.exchanges] == ["chosen", "rejected"]
    assert trained(encoded, one) == [[("Seven.<|im_end|>", 1.0)], [("Eight.<|im_end|>", 1.0)]]
    assert one.exchanges[0].prompt_ids.tolist() == one.exchanges[1].prompt_ids.tolist()


def test_only_the_last_answer_of_a_preference_is_judged(encoded):
    one = encoded(preference([user("Name a prime"), assistant("Seven."), user("another")], "eleven", "twelve"))
    assert trained(encoded, one) == [[("eleven<|im_end|>", 1.0)], [("twelve<|im_end|>", 1.0)]]


@pytest.mark.parametrize(
    ("answers", "status", "labels", "reason"),
    [
        (("yes", "no", "never"), "kept", ["chosen", "rejected", "rejected"], ""),
        (("yes", "yes"), "dropped", [], "the rejected answer is empty, or is the chosen one"),
        (("yes", " "), "dropped", [], "the rejected answer is empty, or is the chosen one"),
        ((" ", "no"), "dropped", [], "the chosen answer is empty"),
        (("yes", "no", "yes", ""), "cut", ["chosen", "rejected"], "a rejected answer is empty, or is the chosen one"),
    ],
)
def test_pairs_that_teach_nothing_are_dropped(encoded, answers, status, labels, reason):
    one = encoded(preference([user("Is it?")], *answers))
    assert (one.status, [exchange.label for exchange in one.exchanges], one.reason) == (status, labels, reason)


def trajectory(*turns):
    """A row whose conversations are given whole, the chosen one first."""
    conversations = tuple(Conversation(tuple(messages)) for messages in turns)
    labels = ("chosen", *["rejected"] * (len(turns) - 1))
    return Record(Source("a.jsonl", 1), "preference", "preference", conversations, labels)


def test_an_answer_of_several_turns_is_compared_whole(encoded):
    """From where the conversations part, each turn with the prompt it is served with; what is common is no answer."""
    shared = [user("Name a prime"), assistant("Seven."), user("another")]
    one = encoded(
        trajectory(
            [*shared, assistant("eleven"), user("why?"), assistant("it is prime")],
            [*shared, assistant("twelve")],
            [*shared, assistant("nine"), user("really?"), assistant("no")],
        )
    )
    assert [each.label for each in one.exchanges] == ["chosen", "more", "rejected", "rejected", "more"]
    texts = [each.completion_text for each in one.exchanges]
    assert all(
        text.startswith(said) for text, said in zip(texts, ["eleven", "it is", "twelve", "nine", "no"], strict=True)
    )
    firsts = [one.exchanges[at].prompt_ids.tolist() for at in (0, 2, 3)]
    assert firsts[0] == firsts[1] == firsts[2]
    assert "why?" in one.exchanges[1].prompt_text
    assert one.status == "kept"


def test_an_answer_that_lacks_a_turn_is_compared_with_none(encoded):
    shared = [user("Is it?")]
    long = [*shared, assistant("yes"), user("why?"), assistant("word " * 50)]
    one = encoded(trajectory([*shared, assistant("no")], long, [*shared, assistant("never")]), max_length=40)
    assert [each.label for each in one.exchanges] == ["chosen", "rejected"]
    assert one.status == "cut"
    none = encoded(trajectory(long, [*shared, assistant("no")]), max_length=40)
    assert (none.status, none.exchanges) == ("dropped", ())


@pytest.mark.parametrize(
    ("weights", "status", "reason"),
    [
        ((0.0, None, None), "dropped", "the chosen answer has weight 0"),
        ((None, 0.0, 0.0), "dropped", "a rejected answer has weight 0"),
        ((None, 0.0, None), "cut", "a rejected answer has weight 0"),
        ((0.0, 0.0, 0.0), "dropped", "every answer has weight 0"),
    ],
)
def test_answers_that_weigh_nothing_are_not_compared_and_it_is_said(encoded, weights, status, reason):
    words = zip(("yes", "no", "never"), weights, strict=True)
    one = encoded(trajectory(*([user("Is it?"), assistant(word, weight=weight)] for word, weight in words)))
    assert (one.status, one.reason) == (status, reason)
    assert [each.label for each in one.exchanges] == (["chosen", "rejected"] if status == "cut" else [])


@pytest.mark.parametrize("label", ["chosen", "good"])
def test_what_a_prompt_weighs_is_nothing_where_answers_are_compared(encoded, label):
    asked = user("Is it?", weight=1.0)
    if label == "chosen":
        one = encoded(trajectory([asked, assistant("yes")], [asked, assistant("no")]), objective="preference")
    else:
        row = record(asked, assistant("yes"), kind="labelled", label=label)
        one = encoded(row, objective="preference")
        assert encoded(row).exchanges[0].prompt_weights.any()
    assert not any(each.prompt_weights.any() for each in one.exchanges)
    assert all((each.completion_weights == 1).all() for each in one.exchanges)


def test_prompts_that_were_not_cut_alike_are_not_compared(encoded):
    asked = [user("word " * 8), assistant("yes"), user("Is it?")]
    answers = [*asked, assistant("no")], [*asked, assistant("word " * 6)]
    whole = encoded(trajectory(*answers))
    between = max(map(len, whole.exchanges)) - 1
    assert min(map(len, whole.exchanges)) <= between
    one = encoded(trajectory(*answers), max_length=between, on_too_long="cut-prompt")
    assert (one.status, one.exchanges) == ("dropped", ())
    assert "the prompts of chosen and rejected were not cut alike" in one.reason


def test_answers_of_the_same_tokens_are_not_compared(encoded, tmp_path):
    """The template strips what is around an answer."""
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = encoded(preference([user("Is it?")], "yes", "yes ", "no"), template=str(file))
    assert [each.label for each in one.exchanges] == ["chosen", "rejected"]
    assert one.reason == "the tokens of a rejected answer are those of the chosen one"


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_half_a_pair_is_dropped(encoded, long):
    answers = {"chosen": "yes", "rejected": "no", long: "word " * 50}
    one = encoded(preference([user("Is it?")], *answers.values()), max_length=40)
    assert (one.status, one.exchanges) == ("dropped", ())
    assert "more than max_length 40" in one.reason


def test_a_pair_of_which_one_rejected_answer_is_too_long(encoded):
    one = encoded(preference([user("Is it?")], "yes", "word " * 50, "no"), max_length=40)
    assert (one.status, [exchange.completion_text for exchange in one.exchanges]) == (
        "cut",
        ["yes<|im_end|>", "no<|im_end|>"],
    )


def test_a_labelled_answer(encoded):
    good, bad = (record(user("Name"), assistant("Seven."), kind="labelled", label=label) for label in ("good", "bad"))
    assert encoded(good).exchanges[0].label == "good"
    assert encoded(bad).exchanges[0].label == "bad"
    assert trained(encoded, encoded(bad)) == [[("Seven.<|im_end|>", 1.0)]]
    assert encoded(good, objective="supervised").status == "kept"
    dropped = encoded(bad, objective="supervised")
    assert (dropped.status, dropped.reason, dropped.exchanges) == ("dropped", "its answer is labelled bad", ())


@pytest.mark.parametrize("kind", ["byte_level_bos", "metaspace_first", "gpt2", "llama2"])
def test_plain_text(encoded, kind):
    one = encoded(record(assistant("Name a prime.</s>"), kind="text"), kind, count_roles=True)
    (exchange,) = one.exchanges
    tokenizer = encoded.tokenizer(one)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert exchange.prompt_ids.tolist() == ([tokenizer.backend.token_to_id(bos)] if bos else [])
    assert exchange.completion_ids[-1] == tokenizer.backend.token_to_id(eos)
    assert exchange.completion_ids.tolist().count(exchange.completion_ids[-1]) == 1
    assert (exchange.completion_weights == 1).all()
    assert exchange.boundary == "special"
    serving = tokenizer.backend.encode("Name a prime.").ids
    assert exchange.completion_ids.tolist()[:2] == serving[bool(bos) :][:2]
    assert one.role_tokens["assistant"] == len(exchange.completion_ids)


@pytest.mark.parametrize("content", ["me", "Name a prime", "", " x"])
def test_plain_text_is_placed_as_it_is_encoded(tokenizer_of, kind, content):
    tokenizer = tokenizer_of(kind)
    renderer = load_renderer(tokenizer, PromptOptions(template="chatml"))
    text = renderer.document(assistant(content))
    prompt, completion, boundary = encode_seam(renderer.encoder, text)
    places = token_places(renderer.encoder, text, boundary)
    assert len(places) == len(prompt) + len(completion)
    assert places[-1].tolist() == [len(text.full) - len(tokenizer.eos_token), len(text.full)] or kind == "phi4"


def test_a_prompt_for_evaluation_has_no_seam(encoded):
    one = encoded(record(user("Why?"), kind="prompt"))
    assert [(exchange.boundary, len(exchange.completion_ids)) for exchange in one.exchanges] == [("none", 0)]


def test_a_prompt_for_evaluation(encoded):
    one = encoded(record(user("Name a prime"), kind="prompt"), prompt_weight=1)
    (exchange,) = one.exchanges
    assert (len(exchange.completion_ids), exchange.completion_text, exchange.prompt_weights.sum()) == (0, "", 0)
    assert exchange.prompt_text.endswith("<|im_start|>assistant\n")


def test_roles_are_counted(encoded):
    one = encoded(TURNS, prompt_weight=0.5, count_roles=True)
    lengths = [len(exchange) for exchange in one.exchanges]
    assert sum(one.role_tokens.values()) == sum(lengths)
    weighed = [(e.prompt_weights > 0).sum() + (e.completion_weights > 0).sum() for e in one.exchanges]
    assert sum(one.role_trained.values()) == sum(weighed)
    assert one.role_trained["template"] == 0
    assert one.role_tokens["system"] == 2 * one.role_trained["system"] > 0  # in both prompts, trained in one


# Lengths.

LONG = record(
    system("Be brief."),
    user("Rain?"),
    assistant("", tool_calls=(call(city="Oslo"),), weight=0),
    Message("tool", "dry"),
    assistant("No.", weight=0),
    user("Name a prime"),
    assistant("Seven.", weight=0),
    user("another"),
    assistant("eleven"),
)


def length_of(encoded, row, **options):
    return len(encoded(row, **options).exchanges[-1])


def shorter(*numbers):
    return record(*(LONG.conversations[0].messages[i] for i in numbers))


def test_what_fits_is_kept(encoded):
    length = length_of(encoded, LONG)
    for policy in ("error", "drop", "cut-prompt", "cut-completion"):
        one = encoded(LONG, max_length=length, on_too_long=policy)
        assert (one.status, one.reason, len(one.exchanges[0])) == ("kept", "", length)


def test_too_long_is_an_error(encoded):
    length = length_of(encoded, LONG)
    one = encoded(LONG, max_length=length - 1, on_too_long="error")
    assert (one.status, one.exchanges) == ("rejected", ())
    assert one.reason == f"an exchange of {length} tokens, more than max_length {length - 1}"
    assert one.problems[0].remedy == "Raise --max-length, or choose --on-too-long drop, cut-prompt or cut-completion."


def test_too_long_is_dropped(encoded):
    length = length_of(encoded, LONG)
    one = encoded(LONG, max_length=length - 1)
    assert (one.status, one.exchanges) == ("dropped", ())
    assert one.reason == f"dropped: {length} tokens, more than max_length {length - 1}"


def test_one_of_two_exchanges_is_dropped(encoded):
    short, long = (len(exchange) for exchange in encoded(TURNS).exchanges)
    one = encoded(TURNS, max_length=short)
    assert trained(encoded, one) == [[("Seven.<|im_end|>", 1.0)]]
    assert (one.status, one.reason) == ("cut", f"dropped: {long} tokens, more than max_length {short}")


def test_the_oldest_turns_go_first_with_their_tools(encoded):
    without_first, without_two = shorter(0, 5, 6, 7, 8), shorter(0, 7, 8)
    length = length_of(encoded, LONG)
    for rest, most in ((without_first, length - 1), (without_two, length_of(encoded, without_first) - 1)):
        one = encoded(LONG, max_length=most, on_too_long="cut-prompt")
        assert (one.status, one.reason) == ("cut", f"prompt cut: {length} tokens, more than max_length {most}")
        expected = encoded(rest).exchanges[-1]
        assert one.exchanges[0].prompt_text == expected.prompt_text
        assert one.exchanges[0].prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert one.exchanges[0].completion_ids.tolist() == expected.completion_ids.tolist()


def test_nothing_left_to_cut_is_dropped(encoded):
    length = length_of(encoded, LONG)
    most = length_of(encoded, shorter(0, 7, 8)) - 1
    one = encoded(LONG, max_length=most, on_too_long="cut-prompt")
    assert (one.status, one.exchanges) == ("dropped", ())
    assert one.reason == f"dropped: {length} tokens, more than max_length {most}"


def test_a_cut_prompt_weighs_what_it_still_holds(encoded):
    row = record(system("Be brief."), user("Name a prime"), assistant("Seven."), user("another"), assistant("eleven"))
    short = length_of(encoded, record(system("Be brief."), user("another"), assistant("eleven")))
    one = encoded(row, max_length=max(short, len(encoded(row).exchanges[0])), on_too_long="cut-prompt", prompt_weight=1)
    assert trained(encoded, one) == [
        [("Be brief.", 1.0), ("Name a prime", 1.0), ("Seven.<|im_end|>", 1.0)],
        [("another", 1.0), ("eleven<|im_end|>", 1.0)],
    ]


def test_what_a_cut_prompt_lost_is_not_held_to_be_trained(encoded):
    row = record(
        user("Name a prime. Name a prime. Name a prime. Name a prime."),
        assistant("Seven.", weight=0),
        user("another"),
        assistant("eleven"),
        user("again"),
        assistant("No."),
    )
    rest = record(*row.conversations[0].messages[2:])
    most = length_of(encoded, rest)
    assert most < len(encoded(row).exchanges[0])
    assert trained(encoded, encoded(row, max_length=most, on_too_long="cut-prompt", prompt_weight=1)) == [
        [("another", 1.0), ("eleven<|im_end|>", 1.0)],
        [("again", 1.0), ("No.<|im_end|>", 1.0)],
    ]


def test_a_greeting_before_the_first_turn_is_cut_with_it(encoded):
    rest = record(system("Be brief."), user("another"), assistant("eleven"))
    row = record(
        system("Be brief."),
        assistant("again", weight=0),
        user("Name"),
        assistant("Seven.", weight=0),
        *rest.conversations[0].messages[1:],
    )
    one = encoded(row, max_length=length_of(encoded, rest), on_too_long="cut-prompt")
    assert one.exchanges[0].prompt_text == encoded(rest).exchanges[0].prompt_text


def test_a_system_message_between_the_turns_stays(encoded):
    row = record(user("Name"), assistant("Seven.", weight=0), system("Be brief."), user("another"), assistant("eleven"))
    rest = record(system("Be brief."), user("another"), assistant("eleven"))
    one = encoded(row, max_length=length_of(encoded, rest), on_too_long="cut-prompt")
    assert one.exchanges[0].prompt_text == encoded(rest).exchanges[0].prompt_text


def test_a_prompt_for_evaluation_is_cut_too(encoded):
    row = record(user("Name a prime"), assistant("Seven."), user("another"), kind="prompt")
    rest = encoded(record(user("another"), kind="prompt")).exchanges[0]
    one = encoded(row, max_length=len(rest), on_too_long="cut-prompt")
    assert (one.status, one.exchanges[0].prompt_text) == ("cut", rest.prompt_text)
    assert encoded(row, max_length=len(rest), on_too_long="cut-completion").status == "dropped"


@pytest.mark.parametrize("kind", ["cl100k", "metaspace_first", "llama2", "gpt2"])
def test_a_cut_completion_has_no_stop_token(encoded, kind):
    row = record(user("Name a prime"), assistant("Seven and eleven again."))
    whole = encoded(row, kind, template="human-assistant").exchanges[0]
    most = len(whole) - 2
    one = encoded(row, kind, template="human-assistant", max_length=most, on_too_long="cut-completion")
    (exchange,) = one.exchanges
    assert (one.status, one.reason) == ("cut", f"completion cut: {len(whole)} tokens, more than max_length {most}")
    assert exchange.prompt_ids.tolist() == whole.prompt_ids.tolist()
    assert exchange.completion_ids.tolist() == whole.completion_ids.tolist()[:-2]
    assert exchange.completion_weights.tolist() == [1.0] * (len(whole.completion_ids) - 2)
    assert whole.completion_text.startswith(exchange.completion_text)
    assert " Seven" in exchange.completion_text
    assert encoded.tokenizer(one).eos_token not in exchange.completion_text


def test_a_completion_without_room_is_dropped(encoded):
    row = record(user("Name a prime"), assistant("Seven."))
    prompt = len(encoded(row).exchanges[0].prompt_ids)
    assert encoded(row, max_length=prompt, on_too_long="cut-completion").status == "dropped"
    (exchange,) = encoded(row, max_length=prompt + 1, on_too_long="cut-completion").exchanges
    assert exchange.completion_text == "Seven"


# What is refused, and what is observed.


def test_a_refusal_is_the_templates_own_word(encoded):
    one = encoded(record(user("a"), assistant("b"), tools=(WEATHER,)), template="alpaca")
    assert (one.status, one.exchanges) == ("rejected", ())
    assert "the alpaca template has no place for tools" in one.reason
    assert [str(problem)[:9] for problem in one.problems] == ["a.jsonl:1"]


def test_a_bad_row_leaves_the_others_alone(tokenizer_of):
    options = PromptOptions(template="alpaca")
    renderer = load_renderer(tokenizer_of("byte_level_bos"), options)
    good = record(user("a"), assistant("b"))
    bad = record(user("a"), assistant("b"), tools=(WEATHER,))
    statuses = [one.status for one in RecordEncoder(renderer, options).encode([good, bad, good])]
    assert statuses == ["kept", "rejected", "kept"]


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [("{{ m.content }}", False), ("{{ m.content if loop.last or m.role == 'user' else 'x' }}", True)],
)
def test_rewritten_history_is_told(tokenizer_of, tmp_path, text, rewritten):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>"
        + text
        + "<|im_end|>{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}",
        "utf-8",
    )
    rows = [record(user("Name"), assistant("Seven."), user("again"), assistant("eleven"))]
    (one,) = exchanges(rows, _saved(tokenizer_of("cl100k"), tmp_path), template=str(file))
    assert [exchange.completion_text for exchange in one.exchanges] == ["Seven.<|im_end|>", "eleven<|im_end|>"]
    assert one.rewritten == rewritten


def test_what_the_template_leaves_out_is_noted(tokenizer_of, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>' if add_generation_prompt }}",
        "utf-8",
    )
    (one,) = exchanges([TURNS], _saved(tokenizer_of("cl100k"), tmp_path), template=str(file))
    assert (one.status, one.notes) == ("kept", ("system content",))


def _saved(tokenizer, folder):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.special_tokens).save_pretrained(folder)
    return folder


def test_the_functions_limit_is_the_tokenizers_own(tokenizer_of, tmp_path):
    folder = _saved(tokenizer_of("cl100k"), tmp_path)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4}), "utf-8")
    (one,) = exchanges([TURNS], folder, template="chatml")
    assert one.status == "dropped"
    assert "more than max_length 4" in one.reason
    (one,) = exchanges([TURNS], folder, template="chatml", max_length=500)
    assert one.status == "kept"


def test_a_batch_is_encoded_as_its_rows_alone(tokenizer_of, kind):
    options = PromptOptions(template="human-assistant", prompt_weight=0.5)
    rows = [row for row in CONVERSATIONS.values() if row is not CONVERSATIONS["tools"]]

    def ids(encoded_rows):
        return [
            (
                one.status,
                [(e.prompt_ids.tolist(), e.completion_ids.tolist(), e.prompt_weights.tolist()) for e in one.exchanges],
            )
            for one in encoded_rows
        ]

    together = RecordEncoder(load_renderer(tokenizer_of(kind), options), options).encode(rows)
    alone = [RecordEncoder(load_renderer(tokenizer_of(kind), options), options).encode([row])[0] for row in rows]
    assert ids(together) == ids(alone)


def test_the_seams_error_is_a_template_error(tokenizer_of):
    with pytest.raises(TemplateError, match="straddles"):
        seam(tokenizer_of, "t5", "pri", "me")
