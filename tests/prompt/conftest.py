"""Tokenizers of every kind that base models have, trained on the spot."""

import json
from collections.abc import Callable

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from instil.prompt import Tokenizer

CORPUS = [
    "Name a prime. Seven is a prime, and so is eleven.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "user assistant system Human: Assistant: ### Instruction: ### Response: ### Input:",
    "it's don't we'll 2026 12345 café naïve Ελληνικά 日本語 e\u0301",
    "def f(x):\n    return x  +  1\n\n\n\tpass",
] * 4
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()


def _special(content, **more):
    return AddedToken(content, special=True, **{"normalized": False, **more})


def _trained(model, trainer, *, pre=None, normalizer=None, decoder=None):
    backend = Backend(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _byte_level(vocab_size=420, *, pre=None, normalizer=None):
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=BYTES, show_progress=False)
    pre = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, pre=pre, normalizer=normalizer, decoder=decoders.ByteLevel())


def _with_bos(backend, bos):
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def gpt2():
    backend = _byte_level()
    backend.add_special_tokens([_special("<|endoftext|>", normalized=True)])
    return backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def cl100k():
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    pre = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend = _byte_level(pre=pre, normalizer=normalizers.NFC())
    backend.add_special_tokens([_special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return backend, {"eos_token": "<|im_end|>"}


def byte_level_bos():
    backend = _byte_level()
    backend.add_special_tokens([_special("<s>"), _special("</s>")])
    return _with_bos(backend, "<s>"), {"bos_token": "<s>", "eos_token": "</s>"}


def neox():
    backend = _byte_level(normalizer=normalizers.NFC())
    backend.add_special_tokens([_special("<|endoftext|>")])
    backend.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(8, 1, -1)])
    return backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def phi4():
    backend = _byte_level()
    backend.add_special_tokens(
        [_special(t, lstrip=True, rstrip=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return backend, {"eos_token": "<|endoftext|>"}


def _sentencepiece(pre, normalizer, *, rstrip=False):
    named = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*named, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if pre is None:  # learn the merges with words marked, as the normalizer will mark them
        backend = _trained(model, trainer, pre=pre_tokenizers.Metaspace(prepend_scheme="always"), decoder=decoder)
        backend.pre_tokenizer, backend.normalizer = None, normalizer
    else:
        backend = _trained(model, trainer, pre=pre, decoder=decoder)
    plain = Backend.from_str(_without_byte_specials(backend.to_str()))
    plain.add_special_tokens([_special(name) for name in named])
    if rstrip:
        plain.add_special_tokens([_special(t, rstrip=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")])
    return plain, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _without_byte_specials(state):
    changed = json.loads(state)
    changed["added_tokens"] = []
    return json.dumps(changed)


def metaspace_first():
    backend, special = _sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None)
    return _with_bos(backend, "<s>"), special


def metaspace_always():
    return _sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="always"), None)


def llama2():
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend, special = _sentencepiece(None, normalizer)
    return _with_bos(backend, "<s>"), special


def phi3():
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(None, normalizer, rstrip=True)


def t5():
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    return _unigram(pre, normalizers.NFKC())


def unigram():
    return _unigram(pre_tokenizers.Metaspace(prepend_scheme="always"), normalizers.NFKC())


def _unigram(pre, normalizer):
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    decoder = decoders.Metaspace(prepend_scheme="always")
    backend = _trained(models.Unigram(), trainer, pre=pre, normalizer=normalizer, decoder=decoder)
    return backend, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


KINDS: dict[str, Callable] = {
    made.__name__: made
    for made in (
        gpt2,
        cl100k,
        byte_level_bos,
        neox,
        phi4,
        metaspace_first,
        metaspace_always,
        llama2,
        phi3,
        unigram,
        t5,
    )
}


@pytest.fixture(scope="session")
def tokenizer_of():
    """A fresh tokenizer of a kind, trained once: `tokenizer_of("gpt2")`."""
    states: dict[str, tuple[str, dict[str, str]]] = {}

    def fresh(kind):
        if kind not in states:
            backend, special = KINDS[kind]()
            states[kind] = backend.to_str(), special
        state, special = states[kind]
        return Tokenizer(Backend.from_str(state), special, name=kind)

    return fresh


@pytest.fixture(scope="session", params=sorted(KINDS))
def kind(request):
    return request.param
