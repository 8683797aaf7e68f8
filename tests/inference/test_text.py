"""Streamed text: whole characters, the whole text, nothing of stop strings or special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.inference.text import Decoder, TextStream

KINDS = ["gpt2", "llama2", "phi3", "metaspace_first", "metaspace_always", "cl100k", "byte_level_bos"]
WORDS = st.sampled_from(["prime ", "é", "日本", "🦊", "\n", " ", "don't", "x", "<0x41>", "👩‍🚀", "Ελ", "  tab\t"])
TEXTS = st.lists(WORDS, min_size=1, max_size=8).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tokenizer_of):
    return tokenizer_of(request.param)


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return Decoder(tokenizer)


def ids_of(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def stream(decoder, prompt, ids, stop=()):
    """The pieces, the stream, and how many tokens it took."""
    found = TextStream(decoder, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(found.push(token))
        if found.stopped:
            break
    return [*pieces, found.finish()], found


@given(data=st.data())
def test_a_text_comes_as_it_is_behind_its_prompt(tokenizer, decoder, data):
    text = data.draw(TEXTS)
    whole = ids_of(tokenizer, "A " + text)
    at = data.draw(st.integers(1, len(whole)))
    pieces, found = stream(decoder, whole[:at], whole[at:])
    everything = decoder.decode(whole)
    assert "".join(pieces) == found.text
    assert everything.endswith(found.text)
    if "\ufffd" not in decoder.decode(whole[:at]):
        assert decoder.decode(whole[:at]) + found.text == everything
    assert "\ufffd" not in "".join(pieces)


@given(ids=st.lists(st.integers(0, 400), max_size=30), stop=st.lists(st.sampled_from(["e", "in", " a", "the"])))
def test_any_tokens_stream_to_their_text(tokenizer, decoder, ids, stop):
    known = [each for each in ids if each < len(tokenizer)]
    pieces, found = stream(decoder, ids_of(tokenizer, "A prime"), known, stop)
    assert "".join(pieces) == found.text
    assert not any(each in found.text for each in stop)


@given(text=TEXTS, stop=st.lists(st.sampled_from(["me d", "n't", "\n", "本🦊", "xx", " x"]), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_wherever_tokens_part(tokenizer, decoder, text, stop):
    prompt = ids_of(tokenizer, "A")
    ids = ids_of(tokenizer, "A" + text)[len(prompt) :]
    complete = stream(decoder, prompt, ids)[1].text
    pieces, found = stream(decoder, prompt, ids, stop)
    ends = [at for each in stop if (at := complete.find(each)) >= 0]
    assert found.stopped == bool(ends)
    assert "".join(pieces) == found.text == complete[: min(ends, default=len(complete))]


def test_what_may_begin_a_stop_string_waits(tokenizer_of):
    tokenizer = tokenizer_of("gpt2")
    found = TextStream(Decoder(tokenizer), ids_of(tokenizer, "A"), ["\nUser:"])
    pushed = [[found.push(token) for token in ids_of(tokenizer, text)] for text in ("one\n", "U", "x\nUs")]
    assert ["".join(each) for each in pushed] == ["one", "", "\nUx"]
    assert (found.finish(), found.text) == ("\nUs", "one\nUx\nUs")


def test_special_tokens_are_no_text(tokenizer_of):
    tokenizer = tokenizer_of("cl100k")
    ids = tokenizer.backend.encode("so<|im_start|> be<think> it<|endoftext|>", add_special_tokens=False).ids
    pieces, _ = stream(Decoder(tokenizer), ids_of(tokenizer, "A"), ids)
    assert "".join(pieces) == "so be<think> it"


def test_half_a_character_is_never_given(tokenizer_of):
    for kind in ("gpt2", "llama2"):
        tokenizer = tokenizer_of(kind)
        ids, at = ids_of(tokenizer, "A🦊"), len(ids_of(tokenizer, "A"))
        assert set(stream(Decoder(tokenizer), ids[:at], ids[at:-1])[0]) == {""}
        assert "".join(stream(Decoder(tokenizer), ids[:at], ids[at:])[0]) == "🦊"
        assert "".join(stream(Decoder(tokenizer), ids[: at + 1], ids[at + 1 :])[0]) == "🦊", "which the prompt began"


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "phi3", "metaspace_always"])
def test_the_space_that_begins_an_answer_is_kept_where_it_is_one(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    decoder = Decoder(tokenizer)
    prompt, ids = ids_of(tokenizer, "Name"), ids_of(tokenizer, "Name a prime")
    assert "".join(stream(decoder, prompt, ids[len(prompt) :])[0]) == " a prime"


@pytest.mark.parametrize(("kind", "control"), [("phi3", "<|assistant|>"), ("llama2", "</s>"), ("cl100k", "<|im_end|>")])
def test_the_dummy_space_behind_a_control_token_is_none(tokenizer_of, kind, control):
    tokenizer = tokenizer_of(kind)
    whole = tokenizer.backend.encode(f"{control}prime", add_special_tokens=False).ids
    assert "".join(stream(Decoder(tokenizer), whole[:1], whole[1:])[0]) == "prime"
