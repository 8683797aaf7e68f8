"""Forests of tokens, and what separate sequences through an unmodified model give: the reference of these tests."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from instil.packing import TokenTree, concatenate, merge
from instil.prompt.exchange import Exchange

VOCABULARY = 48


@dataclass
class Sequence:
    """An exchange as a naive program holds it: tokens, their weights, and how many of them are the prompt."""

    ids: list[int]
    weights: list[float]
    prompt: int

    @property
    def targets(self):
        """The places that Instil gives a loss to: trained ones and the last, never the first."""
        last = len(self.ids) - 1
        return [at for at in range(1, last + 1) if self.weights[at] > 0 or at == last]


def tree_of(sequences, record=0):
    def exchange(each):
        ids, weights, cut = np.array(each.ids, np.int32), np.array(each.weights, np.float32), each.prompt
        return Exchange("", "", ids[:cut], weights[:cut], ids[cut:], weights[cut:], "compared")

    return TokenTree.from_exchanges([exchange(each) for each in sequences], record=record)


def forest_of(records, shared=True):
    trees = [tree_of(sequences, record) for record, sequences in enumerate(records)]
    return merge(trees) if shared else concatenate(trees)


def branching(vocabulary=VOCABULARY, seed=0):
    """Records that branch within and across themselves; several targets at a row, weights of all sizes, paths of 4
    to 30 tokens, branches longer than a window of 4."""
    draw = np.random.default_rng(seed)

    def ids(count):
        return draw.integers(1, vocabulary, count).tolist()

    def sequence(prompt, answer, trained=(0.0,)):
        weights = [*draw.choice(trained, len(prompt)).tolist(), *draw.choice([0.25, 1.0, 3.0], len(answer)).tolist()]
        return Sequence([*prompt, *answer], weights, len(prompt))

    trunk, limb, twig, other = ids(7), ids(6), ids(3), ids(9)
    again = ids(5)
    return [
        [sequence(trunk, ids(6)), sequence(trunk, ids(4)), sequence(trunk + limb, ids(9))],
        # The next record begins as the one before it; both an answer and its beginning are taught.
        [
            sequence(trunk + limb + twig, ids(5), (0.0, 0.5)),
            sequence(trunk + limb, again),
            sequence(trunk + limb, again[:2]),
        ],
        [sequence(other, ids(8), (0.0, 2.0))],
        [sequence(trunk + limb, again), sequence(other[:4], ids(1)), sequence(other + ids(10), ids(11))],
    ]


def logits_of(model, sequence):
    ids = torch.tensor([sequence.ids[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0]


def separately(model, records):
    """The losses of all targets, and the gradients of their weighted sum: one sequence after another."""
    model.zero_grad()
    losses = []
    for sequence in (each for sequences in records for each in sequences):
        logits = logits_of(model, sequence)
        at = torch.tensor(sequence.targets, device=logits.device)
        ids, weights = torch.tensor(sequence.ids)[at], torch.tensor(sequence.weights)[at]
        found = cross_entropy(logits[at - 1].to(wide(logits.dtype)), ids, reduction="none")
        (found * weights.to(found)).sum().backward()
        losses.append(found.detach())
    return torch.cat(losses), gradients(model)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def check_same(found, expected, tolerance):
    """Losses and every gradient, each relative to its own norm; one that is 0 but for rounding (a bias of keys moves
    all scores of a query alike), to the largest's."""
    losses, grads = found
    expected_losses, expected_grads = expected
    assert losses.shape == expected_losses.shape
    torch.testing.assert_close(losses, expected_losses.to(losses), rtol=tolerance, atol=0)
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.norm()) for grad in expected_grads.values())
    for name, expected_grad in expected_grads.items():
        size = float(expected_grad.norm())
        off = float((grads[name] - expected_grad).norm()) / (size if size > 1e-5 * largest else largest)
        assert off <= tolerance, f"{name}: {off:.1e}"


class Float64(TorchFunctionMode):
    """Keeps models from rounding float64 to float32, as their norms and softmaxes do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func is torch.Tensor.float:
                return first
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@st.composite
def forests(draw, most=40):
    """Random forests, their chains of 1 to 9 tokens."""
    small = st.integers(0, 2)
    paths = draw(st.lists(st.lists(small, min_size=2, max_size=9), min_size=1, max_size=5))
    records = [[Sequence(ids, [1.0] * len(ids), draw(st.integers(0, len(ids) - 1)))] for ids in paths]
    for _ in range(draw(st.integers(0, 4))):  # longer ones, which begin as others do
        source = records[draw(st.integers(0, len(records) - 1))][0].ids
        ids = source[: draw(st.integers(1, len(source)))] + draw(st.lists(small, min_size=1, max_size=9))
        if sum(len(each[0].ids) for each in records) + len(ids) <= most * 2:
            records.append([Sequence(ids, [1.0] * len(ids), 1)])
    return records


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
_GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 24,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
}
_BOTH = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 7.0],
    "original_max_position_embeddings": 12,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

KINDS = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            **_BOTH,
            "head_dim": 8,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma3": ("Gemma3Text", {**_BOTH, "head_dim": 8, "query_pre_attn_scalar": 3}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "phi3-longrope": ("Phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 12}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", _GPT),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-projected": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "gpt-bigcode": ("GPTBigCode", _GPT),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 2}),
    "bloom": ("Bloom", {}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**_BOTH, "logit_scale": 0.3}),
    "granite": (
        "Granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    ),
    "gpt-oss": ("GptOss", {**_BOTH, **_EXPERTS, "head_dim": 8}),
    "mixtral": ("Mixtral", {**_EXPERTS, "sliding_window": 4}),
}
"""Kinds of models: the branches are longer than the windows, caps and scales far from doing nothing."""


def random_model(kind, dtype=torch.float64, **changes):
    """A model whose weights, biases and sinks included, are all random, with transformers' plainest attention."""
    name, own = KINDS[kind]
    sizes = {} if own.keys() >= _GPT.keys() else _SIZES
    config = getattr(transformers, f"{name}Config")(**{**sizes, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        return shaken(model).to(dtype).eval()


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
