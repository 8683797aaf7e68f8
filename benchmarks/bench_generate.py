"""Tokens a second in generation: Instil's engine beside transformers' `generate`, the same model, greedily.

    python benchmarks/bench_generate.py [--model DIR] [--repeats N] [--threads N] [--only one|many] [--cpu-time]

one: prompts one at a time. many: prompts of mixed lengths with answers of mixed lengths, transformers sorted by
length, in its best of several batch sizes and caches. Both must give the same tokens, whose hash is printed. On a
machine that others use as well, --cpu-time with --threads 1 measures the processor's time in place of the clock's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria

from instil.inference.engine import Engine
from instil.inference.options import SamplingOptions
from instil.prompt.tokenizer import Tokenizer, load_tokenizer

Tokens = list[tuple[int, ...]]


def small_model() -> tuple[Any, Tokenizer]:
    """A random Llama of about 5.5 million parameters, and a tokenizer that its random tokens have a text in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn_like(each))  # so that its answers are not one token again and again
    words = {f"w{number}": number for number in range(4096)}
    return model.eval(), Tokenizer(Backend(models.WordLevel(words, unk_token="w0")), {}, name="words")


def work(count: int, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 8 to 200 tokens, and how long their answers are: 4 to 128, evenly on a logarithmic scale."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, vocabulary, size).tolist() for size in rng.integers(8, 201, count)]
    return prompts, np.exp(rng.uniform(np.log(4), np.log(129), count)).astype(int).clip(4, 128).tolist()


class Enough(StoppingCriteria):
    """Ends each row at its own length, as a stop token would."""

    def __init__(self, prompt: int, limits: list[int]) -> None:
        self.prompt, self.limits = prompt, torch.tensor(limits)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return (input_ids.shape[1] - self.prompt >= self.limits.to(input_ids.device)).to(torch.bool)


def by_transformers(model: Any, prompts: list[list[int]], limits: list[int], size: int, static: bool) -> Tokens:
    """Answers in batches of `size`, of which each holds prompts of like length, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), limits[number]))
    found: Tokens = [()] * len(prompts)
    more = {"cache_implementation": "static", "disable_compile": True} if static else {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(prompts[each]) for each in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(chosen):
            ids[row, longest - len(prompts[each]) :] = torch.tensor(prompts[each])
            mask[row, longest - len(prompts[each]) :] = 1
        own = [limits[each] for each in chosen]
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max(own),
            pad_token_id=0,
            stopping_criteria=[Enough(longest, own)] if len(set(own)) > 1 else None,
            **more,
        )
        for row, each in enumerate(chosen):
            found[each] = tuple(made[row, longest : longest + limits[each]].tolist())
    return found


def by_instil(engine: Engine, prompts: list[list[int]], limits: list[int]) -> Tokens:
    answers = engine.generate(prompts, SamplingOptions(temperature=0), max_new_tokens=limits)
    return [own[0].ids for own in answers]


def one_at_a_time(generate: Callable[[list[list[int]], list[int]], Tokens], prompts: Any, limits: Any) -> Tokens:
    return [generate([ids], [limit])[0] for ids, limit in zip(prompts, limits, strict=True)]


def compared(runs: dict[str, Callable[[], Tokens]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The median seconds of each run, taken in turns; all must give the same tokens."""
    expected: Tokens | None = None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            gc.collect()
            begin = clock()
            found = run()
            if turn:  # the first is to warm up
                seconds[name].append(clock() - begin)
            expected = expected or found
            assert found == expected, f"{name} gave other tokens"
    assert expected is not None
    digest = hashlib.sha256(repr(expected).encode()).hexdigest()[:16]
    print(f"  tokens {sum(map(len, expected)):,}, sha256 {digest}")
    made = sum(map(len, expected))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        shown = ", ".join(f"{each:.2f}" for each in seconds[name])
        print(f"  {name:34} {made / median:8,.0f} tokens/s  {median:6.2f} s ({shown})", flush=True)
    return medians


def ratio(medians: dict[str, float]) -> None:
    best = min((name for name in medians if name != "Instil"), key=medians.__getitem__)
    print(f"  Instil / {best}: {medians[best] / medians['Instil']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("one", "many"))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(args.model)
    else:
        model, tokenizer = small_model()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = None
    engine = Engine(model, tokenizer, [])
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {sum(p.numel() for p in model.parameters()):,} parameters")
    if args.only != "many":
        prompts, limits = work(6, model.config.vocab_size)
        print("one prompt at a time")
        runs = {
            "transformers": lambda: one_at_a_time(
                lambda p, n: by_transformers(model, p, n, 1, static=False), prompts, limits
            ),
            "Instil": lambda: one_at_a_time(lambda p, n: by_instil(engine, p, n), prompts, limits),
        }
        ratio(compared(runs, args.repeats, clock))
    if args.only != "one":
        prompts, limits = work(64, model.config.vocab_size)
        print("64 prompts of 8 to 200 tokens, answers of 4 to 128")
        runs = {"Instil": lambda: by_instil(engine, prompts, limits)}
        for size in args.sizes:
            for static in (False, True):
                name = f"transformers, {size} at once, {'static' if static else 'dynamic'}"
                runs[name] = lambda size=size, static=static: by_transformers(model, prompts, limits, size, static)
        ratio(compared(runs, args.repeats, clock))


if __name__ == "__main__":
    main()
