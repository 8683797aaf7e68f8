"""How fast a model is trained on preferences, held against TRL's DPO; and what sharing the prompt gains by itself.

python benchmarks/bench_dpo.py [FILE] [--pairs-per-step 16] [--steps 2] [--repeats 3] [--runs NAME ...] [--sweep]
                               [--precision bf16|fp32] [--shape 42M] [--profile [NAME]]

All train the same model from the same saved weights with DPO (beta 0.1, references computed before) on the same pairs
in the same optimizer steps, once through, with AdamW, the same constant learning rate, no weight decay, gradients
clipped to 1. FILE holds preferences in any shape that Instil reads (chosen and rejected answers). Its rows are encoded
once, before all runs, with ChatML and a byte-level BPE made of its own texts; the pairs are drawn from those whose
longer side is at most 1,024 tokens, the limit of TRL's own settings. Without FILE the pairs are token ids made on the
spot: prompts of 100 to 300 tokens, answers of 40 to 120.

TRL        `DPOTrainer` with what `DPOConfig` gives by default: 8 pairs at once, all answers padded to the longest of
           them, gradient checkpointing, fused AdamW. Set are: references precomputed, the precision, the learning rate
           and its schedule, gradient accumulation, a log line each step, no checkpoints, and the order of the pairs,
           by length within a step: no less even than its own `group_by_length`.
TRL, best  without checkpointing, and as many pairs at once as make about 200 tokens, which was its
           fastest where it was tried (1, 2, 4 and 8 at once; `--sweep` tries them).
Instil     `fit` with `Preference("dpo")`, 8,192 tokens to a batch.
Instil, nothing shared
           the same, but each answer is a path of its own with its own copy of the prompt.

Every run is a process of its own; runs take turns, in alternating order. The first optimizer step warms up and is not
counted; time is from its end to the end of the last. The pass that computes the references is timed by itself, over
all pairs, first batch included, and is in no other figure. CPU time is that of all threads. Precision is bf16 where
the processor computes in it, else fp32, for both. Tokens are those of each answer behind its prompt, for all: what
sharing does shows as speed. `GB` is the peak resident memory of the process.

The pairs that the models were given are read back after time has stopped: those of each step (ids of prompt, chosen and
rejected answer) must be equal, and so must the weights at the start, and in fp32 the loss of every step.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_prepare import make_tokenizer
from bench_train import (
    PLAIN,
    SHAPES,
    TOKENS_PER_BATCH,
    TRL_LENGTH,
    Clock,
    facts,
    in_child,
    load_model,
    pad_tokenizer,
    peak_memory,
    profile_of,
    save_weights,
    show_profile,
    speeds,
    weights_of,
)

AT_ONCE = 200  # tokens of TRL's pairs: the fastest on two cores was 1 of about 420 tokens, and 2 of 75
RUNS: dict[str, dict[str, Any]] = {
    "TRL": {"what": "trl"},
    "TRL, best": {"what": "trl", "best": True},
    "Instil, nothing shared": {"what": "instil", "shared": False},
    "Instil": {"what": "instil", "shared": True},
}
SWEEP: dict[str, dict[str, Any]] = {
    **{
        f"TRL, {size} at once": {"what": "trl", "settings": {**PLAIN, "per_device_train_batch_size": size}}
        for size in (1, 2, 4, 8)
    },
    "TRL, compiled": {"what": "trl", "best": True, "settings": {"torch_compile": True}},
    **{f"Instil, {size:,} tokens": {"what": "instil", "shared": True, "batch": size} for size in (2048, 4096)},
    "Instil, compiled": {"what": "instil", "shared": True, "compile": "on"},
}
LEARNING_RATE = 1e-4
BETA = 0.1
LOSS = 1e-3  # by how much the losses of a step may differ in fp32

Pair = tuple[list[int], list[int], list[int]]
"""The ids of the prompt, of the chosen and of the rejected answer."""


# The data ------------------------------------------------------------------------------------------------------------


def made(count: int, vocabulary: int, scale: float) -> list[Pair]:
    """Ids from 2 on, the k-th as frequent as 1 / (k + 2.7); `scale` shortens all."""
    draw = np.random.default_rng(0)
    frequency = 1 / (np.arange(vocabulary - 2) + 2.7)
    frequency /= frequency.sum()

    def words(least: int, most: int) -> list[int]:
        size = draw.integers(int(least * scale), int(most * scale) + 1)
        return (draw.choice(vocabulary - 2, size, p=frequency) + 2).tolist()

    return [(words(100, 300), [*words(40, 120), 1], [*words(40, 120), 1]) for _ in range(count)]


def encoded(file: str, count: int, scratch: Path) -> list[Pair]:
    """As many pairs of a file as are asked for, drawn from all that are no longer than TRL's limit."""
    import instil

    records = instil.read(file, objective="dpo", on_bad_row="skip")
    texts = (message.content for record in records for each in record.conversations for message in each.messages)
    make_tokenizer(scratch / "tokenizer", texts)
    found: list[Pair] = []
    for row in instil.exchanges(records, str(scratch / "tokenizer"), template="chatml"):
        if row.problems or [each.label for each in row.exchanges] != ["chosen", "rejected"]:
            continue  # such as answers of several turns
        chosen, rejected = row.exchanges
        same = np.array_equal(chosen.prompt_ids, rejected.prompt_ids)
        if same and max(len(chosen), len(rejected)) <= TRL_LENGTH:
            ids = (chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids)
            found.append(tuple(each.tolist() for each in ids))  # type: ignore[arg-type]
    if len(found) < count:
        raise SystemExit(f"{file}: {count} pairs are needed, and {len(found)} of its rows can be used")
    return random.Random(0).sample(found, count)


def in_steps(pairs: Sequence[Pair], steps: int) -> list[Pair]:
    """The pairs of one step after the other, each step's from short to long."""
    size = len(pairs) // steps
    cut = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return [pair for step in cut for pair in sorted(step, key=lambda pair: len(pair[0]) + max(map(len, pair[1:])))]


def tokens_of(pair: Pair) -> int:
    prompt, chosen, rejected = map(len, pair)
    return 2 * prompt + chosen + rejected


def best_of(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What a person would set for TRL on this kind of machine."""
    size = AT_ONCE / statistics.mean(map(tokens_of, pairs))
    return {**PLAIN, "per_device_train_batch_size": min(8, 1 << max(0, round(math.log2(size))))}


# One run, in a process of its own ------------------------------------------------------------------------------------


def run_child(task: dict[str, Any]) -> None:
    """Do one run and write what it took and what it trained to the task's file."""
    result = {"trl": run_trl, "instil": run_instil, "save": save_weights}[task["what"]](task)
    Path(task["result"]).write_text(json.dumps(result))


class CpuClock(Clock):
    """Tells also what CPU time had been used when steps ended."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__("cpu", task["steps"], task.get("profile", False))
        self.cpu: list[float] = []

    def step(self) -> None:
        super().step()
        self.cpu.append(time.process_time())


def run_trl(task: dict[str, Any]) -> dict[str, Any]:
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    pairs = json.loads(Path(task["data"]).read_text())
    settings = {
        "per_device_train_batch_size": 8,
        **(best_of(pairs) if task.get("best") else {}),
        **task.get("settings", {}),
    }
    size = settings["per_device_train_batch_size"]
    config = DPOConfig(
        output_dir=task["scratch"],
        use_cpu=True,
        bf16=task["precision"] == "bf16",
        beta=BETA,
        precompute_ref_log_probs=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        gradient_accumulation_steps=len(pairs) // task["steps"] // size,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    model = load_model(task)
    weights = weights_of(model)
    took = []

    class OfIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments)
            took.append(time.perf_counter() - began)
            return found

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = datasets.Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in pairs])
    trainer = OfIds(model, args=config, train_dataset=table, processing_class=pad_tokenizer())
    clock = CpuClock(task)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            clock.step()

    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        clock.given.append([inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")])
        return compute(model, inputs, *arguments, **named)

    trainer.compute_loss = compute_loss
    trainer.add_callback(Watch())
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    return {
        **result_of(clock, pairs_of_tensors),
        "weights": weights,
        "reference": took[0],
        "losses": [each["loss"] for each in logged],
        "margins": [each["rewards/margins"] for each in logged],
        "note": f"{size} x {config.gradient_accumulation_steps} pairs a step",
    }


def pairs_of_tensors(given: Sequence[Any]) -> list[Pair]:
    """The pairs of what TRL's collator made: chosen answers, and below them the rejected ones."""
    rows = []
    for ids, present, completion in zip(*given, strict=True):
        rows.append((ids[(present == 1) & (completion == 0)].tolist(), ids[completion == 1].tolist()))
    half = len(rows) // 2
    both = zip(rows[:half], rows[half:], strict=True)
    found = [(prompt, chosen, rejected) for (prompt, chosen), (again, rejected) in both if again == prompt]
    if len(found) < half:
        raise SystemExit("a rejected answer stands behind another prompt than the chosen one")
    return found


def run_instil(task: dict[str, Any]) -> dict[str, Any]:
    import instil
    from instil.model.forward import TreeModel
    from instil.objectives.preference import Preference
    from instil.packing import TokenTree
    from instil.packing.tree import paths
    from instil.prompt.exchange import Exchange
    from instil.training import loop
    from instil.training.options import TrainOptions
    from instil.training.reference import with_reference
    from instil.training.steps import Steps

    pairs = json.loads(Path(task["data"]).read_text())
    budget = task.get("batch", TOKENS_PER_BATCH)
    trees = []
    for record, (prompt, *answers) in enumerate(pairs):
        exchanges = [
            Exchange(
                "",
                "",
                np.array(prompt, np.int32),
                np.zeros(len(prompt), np.float32),
                np.array(answer, np.int32),
                np.ones(len(answer), np.float32),
                "special",
                label,
            )
            for answer, label in zip(answers, ("chosen", "rejected"), strict=True)
        ]
        together = TokenTree.from_exchanges(exchanges, record=record)
        trees.append(together if task["shared"] else paths(exchanges, [record, record]))
    hf_model = load_model(task)
    weights = weights_of(hf_model)
    model = TreeModel(hf_model, bf16=task["precision"] == "bf16")
    began = time.perf_counter()
    with_references, _ = with_reference(model, trees, tokens_per_batch=budget)
    reference = time.perf_counter() - began

    class InOrder(Steps):
        """As many pairs in every step; by itself a run cuts its steps by tokens."""

        def rows(self, epoch: int) -> list[Any]:
            return np.split(np.arange(len(pairs)), task["steps"])

    loop.Steps = InOrder  # type: ignore[misc]
    clock = CpuClock(task)
    losses_of = model.losses

    def losses(batch: Any) -> Any:
        clock.given.append(batch)
        return losses_of(batch)

    class Watch:
        def started(self, resolved: Any) -> None:
            clock.given.clear()  # of what the estimate of memory looked at

        def stepped(self, step: Any) -> None:
            clock.step()

        def evaluated(self, evaluation: Any) -> None:
            pass

    model.losses = losses  # type: ignore[method-assign]
    outcome = loop.fit(
        model,
        with_references,
        TrainOptions(
            max_steps=task["steps"],
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0.0,
            compile=task.get("compile", "off"),
        ),
        tokens_per_batch=budget,
        share_prefixes="off",  # of rows, none of which have the same prompt
        watchers=[Watch()],
        objective=Preference("dpo", beta=BETA),
    )

    def read(batch: Any) -> list[Pair]:
        rows = [
            (each.prompt_ids.tolist(), each.completion_ids.tolist(), each.record, each.label)
            for each in instil.expand(batch)
        ]
        found: list[Pair] = []
        for (prompt, chosen, *one), (again, rejected, *other) in zip(rows[::2], rows[1::2], strict=True):
            if [again, one[0], one[1], other[1]] != [prompt, other[0], "chosen", "rejected"]:
                raise SystemExit("a batch does not hold its pairs one after the other")
            found.append((prompt, chosen, rejected))
        return found

    laid_out = sum(step.tokens for step in outcome.history)
    return {
        **result_of(clock, read),
        "weights": weights,
        "reference": reference,
        "losses": [step.loss for step in outcome.history],
        "margins": [step.measures["reward_margin"] for step in outcome.history],
        "note": f"{len(clock.given)} batches of {laid_out:,} tokens in all",
    }


def result_of(clock: CpuClock, read: Callable[[Any], list[Pair]]) -> dict[str, Any]:
    """What was measured, and a fingerprint of the pairs of each step; `read` gives those of what was given."""
    memory = peak_memory("cpu")
    pairs = [read(each) for each in clock.given]
    cuts = [0, *(given for _, given in clock.ends)]
    steps = [list(itertools.chain.from_iterable(pairs[a:b])) for a, b in itertools.pairwise(cuts)]
    every = [sorted(hashlib.sha256(json.dumps(pair).encode()).hexdigest() for pair in step) for step in steps]
    counted = list(itertools.chain.from_iterable(steps[1:]))
    seconds = clock.ends[-1][0] - clock.ends[0][0]
    return {
        "seconds": seconds,
        "cpu": clock.cpu[-1] - clock.cpu[0],
        "memory": memory,
        "digest": hashlib.sha256(json.dumps(every).encode()).hexdigest(),
        "pairs": len(counted),
        "all": sum(map(len, steps)),
        "tokens": sum(map(tokens_of, counted)),
        "profile": clock.profiler and profile_of(clock.profiler, seconds, "cpu"),
    }


# All runs, and the table ---------------------------------------------------------------------------------------------


def main() -> int:
    arguments = parsed()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return 0
    known = RUNS | SWEEP
    if wrong := [name for name in (*arguments.runs, *filter(None, [arguments.profile])) if name not in known]:
        raise SystemExit(f"no run is called {', '.join(wrong)}; there are: {'; '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a run under way would go on by itself
    with tempfile.TemporaryDirectory(prefix="bench-dpo-") as scratch:
        return 0 if compare(arguments, Path(scratch)) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="preferences in any shape that Instil reads")
    parser.add_argument("--shape", choices=("tiny", "42M"), default="42M")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="bf16 where the processor computes in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted after the first")
    parser.add_argument("--pairs-per-step", type=int, default=16, help="a multiple of 8")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME", help=f"of {'; '.join(RUNS | SWEEP)}")
    parser.add_argument("--sweep", action="store_true", help="other settings in place of the usual runs")
    parser.add_argument(
        "--profile", nargs="?", const="Instil", metavar="NAME", help="also say where a run's time goes: Instil's"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, scratch: Path) -> bool:
    """All runs in turns, and their table; whether they trained the same."""
    import torch

    from instil.model.load import product_dtype

    steps = 1 + arguments.steps
    count = steps * arguments.pairs_per_step
    shape = SHAPES[arguments.shape]
    small = 0.25 if arguments.shape == "tiny" else 1.0
    found = encoded(arguments.file, count, scratch) if arguments.file else made(count, shape["vocabulary"], small)
    pairs = in_steps(found, steps)
    (scratch / "pairs.json").write_text(json.dumps(pairs))
    task = {
        "device": "cpu",
        "shape": shape,
        "tuning": "full",
        "steps": steps,
        "precision": arguments.precision or ("bf16" if product_dtype("auto") is torch.bfloat16 else "fp32"),
        "data": str(scratch / "pairs.json"),
        "weights": str(scratch / "weights"),
    }
    run = functools.partial(in_child, scratch=scratch, script=__file__)
    run({**task, "what": "save", "to": task["weights"]})
    prompts, chosen, rejected = (statistics.mean(map(len, part)) for part in zip(*pairs, strict=True))
    print(
        f"{facts(False)}\n\n{arguments.shape}, {task['precision']}, {Path(arguments.file or 'made pairs').name}: "
        f"{count} pairs (on average a prompt of {prompts:.0f} tokens, answers of {chosen:.0f} and {rejected:.0f}), "
        f"{arguments.pairs_per_step} to a step, {arguments.steps} steps counted after 1 to warm up",
        flush=True,
    )
    runs = SWEEP if arguments.sweep else RUNS
    if arguments.runs:
        runs = {name: (RUNS | SWEEP)[name] for name in arguments.runs}
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for repeat in range(arguments.repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            results[name].append(run({**task, **runs[name]}))
            last = results[name][-1]
            print(f"  {repeat + 1}. {name}: {last['pairs'] / last['seconds']:.3f} pairs/s", file=sys.stderr, flush=True)
    good = show({name: results[name] for name in runs}, count, task["precision"])
    if arguments.profile:
        print(f"profile of {arguments.profile}; the profiler itself takes time too")
        show_profile(run({**task, **(RUNS | SWEEP)[arguments.profile], "profile": True})["profile"])
    return good


def show(runs: dict[str, list[dict[str, Any]]], count: int, precision: str) -> bool:
    """Print the table; whether all runs trained the same pairs in the same steps from the same weights."""
    speed = {name: statistics.median(speeds(found, "pairs")) for name, found in runs.items()}
    of_cpu = {name: statistics.median(run["pairs"] / run["cpu"] for run in found) for name, found in runs.items()}
    passes = {name: statistics.median(count / run["reference"] for run in found) for name, found in runs.items()}
    width = max(map(len, runs)) + 2
    print(
        f"{'':<{width}}{'pairs/s':>8}{'(runs)':>{6 * len(next(iter(runs.values()))) + 2}}{'pairs/CPU s':>13}"
        f"{'tokens/s':>10}{'reference pairs/s':>19}{'GB':>7}{'loss, first to last':>21}{'margin':>9}"
    )
    for name, found in runs.items():
        first = found[0]
        spread = f"({' '.join(f'{each:.2f}' for each in speeds(found, 'pairs'))})"
        tokens = statistics.median(speeds(found, "tokens"))
        memory = statistics.median(run["memory"] for run in found)
        losses = f"{first['losses'][0]:.4f} to {first['losses'][-1]:.4f}"
        print(
            f"{name:<{width}}{speed[name]:>8.2f}{spread:>{6 * len(found) + 2}}{of_cpu[name]:>13.2f}"
            f"{tokens:>10,.0f}{passes[name]:>19.2f}{memory / 1e9:>7.2f}{losses:>21}{first['margins'][-1]:>9.4f}"
        )
    ours, theirs = ([name for name in runs if name.startswith("Instil") == own] for own in (True, False))
    for one, other in [*itertools.product(ours, theirs), *itertools.combinations(ours[::-1], 2)]:
        times, cpu, reference = (each[one] / each[other] for each in (speed, of_cpu, passes))
        told = f"{times:.2f} times the pairs/s, {cpu:.2f} by CPU time; references {reference:.2f} times"
        print(f"  {one} / {other}: {told}")
    for name, found in runs.items():
        print(f"  {name}: {found[0]['note']}")
    every = [run for found in runs.values() for run in found]
    pairs = len({run["digest"] for run in every}) == 1 and every[0]["all"] == count
    weights = len({run["weights"] for run in every}) == 1
    apart = max(max(step) - min(step) for step in zip(*(run["losses"] for run in every), strict=True))
    close = precision == "bf16" or apart <= LOSS
    print(
        f"  pairs of each step {'equal' if pairs else 'DIFFER'}, weights at the start "
        f"{'equal' if weights else 'DIFFER'}, losses of a step {'agree' if close else 'DIFFER'} (to {apart:.1e})\n"
    )
    return pairs and weights and close


if __name__ == "__main__":
    sys.exit(main())
