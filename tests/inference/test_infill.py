"""Prompts that ask for the text in a gap: those of training, else those of the tokens a model has."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import instil
from instil.errors import UsageError
from instil.inference.infill import Infill
from instil.inference.load import Loaded
from instil.prompt import PromptOptions

from ..prompt.conftest import kind  # noqa: F401 (a fixture)

GAPS = [
    ("def f(x):\n    return ", "\n\nprint(f(1))\n"),
    (" a", " b "),
    ("", "end"),
    ("start", ""),
    ("[mid] [pre]", "</s>"),
]
PIPES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def infill_of(tokenizer, **options):
    return Infill(Loaded(None, tokenizer, PromptOptions(**options)))


def with_tokens(tokenizer, *names, special=True):
    tokenizer.backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_the_prompts_of_the_fim_template_are_those_of_training(kind, order, tokenizer_of, tmp_path):  # noqa: F811
    tokenizer = tokenizer_of(kind)
    tokenizer.add_special_tokens(["[pre]", "[post]", "[mid]"])  # as training does
    rows = [{"prefix": prefix, "suffix": suffix, "middle": "x + 1"} for prefix, suffix in GAPS]
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {"template": "fim", "template_args": {"order": order}}
    infill = infill_of(tokenizer, **options)
    records = list(instil.exchanges(instil.read(tmp_path / "gaps.jsonl"), tokenizer, **options))
    assert len(records) == len(GAPS)
    for (prefix, suffix), record in zip(GAPS, records, strict=True):
        (exchange,) = record.exchanges
        assert infill.ids(prefix, suffix) == exchange.prompt_ids.tolist()
        assert infill.stop_ids == [exchange.completion_ids[-1]]


def test_a_template_of_ones_own_is_preferred_to_the_tokens(tokenizer_of):
    tokenizer = with_tokens(tokenizer_of("gpt2"), *PIPES, "<a>", "<b>", "<c>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<a>' ~ m.suffix ~ '<b>' ~ m.prefix if m.role == 'user' else '<c>' ~ m.content }}"
        "{% endfor %}{{ '<c>' if add_generation_prompt else eos_token }}"
    )
    assert tokenizer.decode(infill_of(tokenizer).ids("one", "two")) == "<a>two<b>one<c>"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (PIPES, "<|fim_prefix|>one <|fim_suffix|> two<|fim_middle|>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_prefix>one <fim_suffix> two<fim_middle>"),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<fim-prefix>one <fim-suffix> two<fim-middle>"),
        (
            ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
            "<｜fim▁begin｜>one <｜fim▁hole｜> two<｜fim▁end｜>",
        ),
        (
            ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),
            "<[fim-suffix]> two<[fim-prefix]>one <[fim-middle]>",
        ),
        (("[PREFIX]", "[MIDDLE]", "[SUFFIX]"), "[SUFFIX] two[PREFIX]one "),
    ],
)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("template", [None, "chatml"])
def test_the_tokens_of_known_models(tokens, expected, special, template, tokenizer_of):
    tokenizer = with_tokens(tokenizer_of("cl100k"), *tokens, special=special)
    infill = infill_of(tokenizer, template=template)  # chatml has no place for a suffix
    ids = infill.ids("one ", " two")
    assert tokenizer.decode(ids) == expected
    assert ids == tokenizer.backend.encode(expected, add_special_tokens=False).ids


def test_bos_stands_where_the_tokenizer_itself_puts_it(tokenizer_of):
    for kind_of, first in (("byte_level_bos", ["<s>", "<|fim_prefix|>"]), ("gpt2", ["<|fim_prefix|>"])):
        tokenizer = with_tokens(tokenizer_of(kind_of), *PIPES)
        ids = infill_of(tokenizer).ids("one", "two")
        tokens = [tokenizer.backend.id_to_token(i) for i in ids]
        assert tokens[: len(first)] == first
        assert tokens.count("<s>") == first.count("<s>")


def test_only_the_prefix_of_code_llama_begins_with_a_dummy_space(tokenizer_of):
    tokenizer = with_tokens(tokenizer_of("llama2"), "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    infill = infill_of(tokenizer)
    tokens = [tokenizer.backend.id_to_token(i) for i in infill.ids("is", "is")]
    assert tokens == ["<s>", "▁<PRE>", "▁is", "▁<SUF>", "is", "▁<MID>"]
    assert tokenizer.backend.token_to_id("▁<EOT>") in infill.stop_ids


def test_what_ends_a_middle(tokenizer_of):
    ends = ["<|endoftext|>", "<|file_sep|>", "<|fim_pad|>"]
    tokenizer = with_tokens(tokenizer_of("cl100k"), *PIPES, *ends, "<|other|>", special=False)
    stops = {tokenizer.backend.id_to_token(i) for i in infill_of(tokenizer).stop_ids}
    assert stops == {*PIPES, *ends}


TEXTS = st.lists(st.one_of(st.text(max_size=5), st.sampled_from([*PIPES, "<|im_end|>", " ", "\n"]))).map("".join)


@settings(max_examples=50, deadline=None)
@given(prefix=TEXTS, suffix=TEXTS)
def test_texts_that_spell_control_tokens_stay_text(prefix, suffix, piped):
    infill, tokenizer = piped
    ids = infill.ids(prefix, suffix)
    assert tokenizer.decode(ids) == f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"
    for name in (*PIPES, "<|im_end|>"):
        assert ids.count(tokenizer.backend.token_to_id(name)) == (name in PIPES)


@pytest.fixture(scope="module")
def piped(tokenizer_of):
    tokenizer = with_tokens(tokenizer_of("gpt2"), *PIPES, "<|im_end|>", special=False)
    tokenizer.backend.add_special_tokens(["<|im_end|>"])
    return infill_of(tokenizer), tokenizer


@pytest.mark.parametrize(
    ("tokens", "template", "reason"),
    [
        (
            (),
            None,
            "it has no chat template that takes a prefix and a suffix, and its tokenizer has none of the tokens",
        ),
        ((), "chatml", "its chat template has no place for a prefix and a suffix, and its tokenizer has none"),
        (PIPES[:2], "chatml", "its chat template has no place"),
    ],
)
def test_a_model_that_cannot_is_told_why(tokens, template, reason, tokenizer_of):
    with pytest.raises(UsageError, match=reason) as error:
        infill_of(with_tokens(tokenizer_of("cl100k"), *tokens), template=template)
    assert "--template fim" in error.value.remedy


@pytest.mark.parametrize(("prefix", "suffix", "named"), [("\ud800", "", "prefix"), ("", "\udc80", "suffix")])
def test_half_a_character_is_refused(prefix, suffix, named, piped):
    with pytest.raises(UsageError, match=f"the {named} holds half of a surrogate pair"):
        piped[0].ids(prefix, suffix)
