"""Words encoded once, held against the library's encoding of the texts they stand in."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from instil.prompt import Tokenizer
from instil.prompt.tokenizer import Encoder
from instil.prompt.words import word_pattern

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII = [*string.printable, "'s", "'LL", "'ve", "   ", "\n\n", "don't", "Word", "WORD", "3.14", "</", "a\x0bb", "\x1c"]
OTHER = ["é", "日本", "\xa0", "\u2003", "ſ", "'\u017f", "İ", "²", "\u0301"]


def splits(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), BYTES])


SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": splits(LLAMA3),
    "phi4": splits(LLAMA3, "removed", True),
    "qwen2": splits(QWEN2),
    "tekken": splits(TEKKEN),
}


def texts():
    return st.lists(st.sampled_from(ASCII) | st.sampled_from(OTHER), max_size=20).map("".join)


def backend_of(splitter, normalizer=None, *added, corpus=("the quick brown fox's 12345  \n\n it'll",)):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.normalizer = splitter, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(corpus, BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    backend.add_tokens([AddedToken(content, normalized=False) for content in added])
    return backend


def pattern_of(backend):
    return word_pattern(backend, json.loads(backend.to_str()))


@pytest.fixture(scope="module", params=SPLITTERS)
def backend(request):
    return backend_of(SPLITTERS[request.param], normalizers.NFC(), "<think>", "...")


@given(data=st.data())
def test_texts_of_words_are_encoded_as_the_library_does(backend, data):
    encoder = Encoder(Tokenizer(backend, {}), [])
    several = data.draw(st.lists(texts(), max_size=6))
    for _ in range(2):  # with words met before, too
        encoder.remember((text, True) for text in several)
        for text in several:
            assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_patterns_of_well_known_tokenizers_are_used(name):
    assert pattern_of(backend_of(SPLITTERS[name]))


def test_words_are_looked_up_and_not_encoded_again(backend):
    encoder = Encoder(Tokenizer(backend, {}), [])
    asked = []

    def encode(words):
        asked.append(words)
        return known(words)

    known, encoder._words._encode = encoder._words._encode, encode
    for text in ("the fox and the fox", "a fox, the fox", "the ... fox", "é fox", "the <think> fox"):
        encoder.remember([(text, True)])
    assert asked == [["the", " fox", " and", " the"], ["a", ","], [], [], []]


@pytest.mark.parametrize(
    "splitter",
    [
        splits(r"\h+|."),  # a hexadecimal digit there, an error here
        splits(r"[a-z&&[^c]]+|[\s\S]"),  # an intersection there
        splits(r"(a|b)+|[\s\S]"),  # a group would be what is found
        splits(r"\p{L}+|\P{L}+"),
        splits(r"\p{Greek}+|."),
        splits(LLAMA3, "removed", False),
        splits(LLAMA3, "merged_with_next", False),
        splits(r"[^a]+|a", "isolated", True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        BYTES,
        pre_tokenizers.Metaspace(),
        None,
    ],
)
def test_other_splits_are_left_to_the_library(splitter):
    backend = Backend(models.BPE())
    if splitter is not None:
        backend.pre_tokenizer = splitter
    assert pattern_of(backend) is None


def test_a_pattern_that_means_something_else_here_is_found_out():
    # There (?m) lets a dot match a line break.
    assert pattern_of(backend_of(splits(r"(?m:[a-z].)|[\s\S]"))) is None
    assert pattern_of(backend_of(splits(r"[a-z]+|[\s\S]"))) is not None


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.Prepend("_"), normalizers.Strip()])
def test_a_normalizer_that_changes_ascii_rules_words_out(normalizer):
    assert pattern_of(backend_of(SPLITTERS["gpt2"], normalizer)) is None
    assert pattern_of(backend_of(SPLITTERS["gpt2"], normalizers.Sequence([normalizers.NFKC(), normalizer]))) is None
    assert pattern_of(backend_of(SPLITTERS["gpt2"], normalizers.Sequence([normalizers.NFKC()])))


def test_a_control_token_that_the_vocabulary_makes_of_a_word_stays_plain():
    backend = backend_of(SPLITTERS["gpt2"], None, corpus=["<s> " * 50])
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    control = backend.token_to_id("<s>")
    encoder = Encoder(Tokenizer(backend, {}), ["<s>"])
    encoder.remember([("a <s> b", True), ("<s>", True)])
    assert control not in encoder.encode_plain("a <s> b", first=True)
    assert control not in encoder.encode_plain("<s>", first=True)
    assert encoder.encode("a<s>b").count(control) == 1
