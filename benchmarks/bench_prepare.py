"""How fast data is prepared for training, held against TRL: rows per second, packing included.

python benchmarks/bench_prepare.py [--rows 20000] [--repeats 3] [--tokenizer DIR]

Both prepare the same file of short, single-turn rows, made on the spot, with the same tokenizer and chat template, and
pack it to 8,192 tokens. Two cases: `completion` (prompt and completion as messages, the completion is trained) and
`assistant` (`messages`, the assistant's text is trained).

TRL      load the tokenizer; `datasets.load_dataset("json")` into a fresh folder; `SFTTrainer._prepare_dataset` with
         packing="bfd", in one process (its default) and in two (`dataset_num_proc=2`). Under `assistant` it swaps the
         template for its own training variant. Building the model and the trainer is not counted.
Instil   load the tokenizer; `instil.read`, `instil.prepare` without a cache on all cores, `instil.pack`, and every
         batch built. The template is the original. Also in one process (`workers=1`).

Every run is a process of its own, so nothing is left over from another; the runs take turns. Time counts from the file
to the packs: start-up of workers and of tokenizers included, imports not. CPU is the user and system time of the
process and its children. Ratios are those of the median rows per second.

Both must train the same tokens: the rows' (all ids, trained ids) are equal as multisets. One thing is put aside: the
template writes a line break after the stop token, which TRL keeps and trains and no server ever asks for; white space
after the last stop token is dropped before comparing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

BUDGET = 8192
TEMPLATE = "qwen3_instruct_2507"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CASES = ("completion", "assistant")
RUNS = {
    "TRL": {"processes": None},
    "TRL, 2 processes": {"processes": 2},
    "Instil": {},
    "Instil, 1 process": {"workers": 1},
}
VOCABULARY = 32_000
FULL = 0.995  # of the batches' budget must hold tokens


# The data ------------------------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Questions of 8 to 30 words and answers of 10 to 60: the words of Python's manual, as often as they stand there,
    and one in twenty made up, as names and rare words are in other texts.
    """
    draw = random.Random(seed)
    counts = Counter(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    manual, often = list(counts), list(itertools.accumulate(counts.values()))
    heads = [*"bcdfghklmnprstvw", "br", "gr", "pl", "st", "th"]
    parts = itertools.product(heads, [*"aeiou", "ai", "ea", "ou"], ["", "", *"nrstl"])
    syllables = ["".join(part) for part in parts]
    names = ["".join(draw.choices(syllables, k=draw.choice((2, 2, 3, 3, 4)))) for _ in range(40_000)]

    def text(least: int, most: int, end: str) -> str:
        picked = draw.choices(manual, cum_weights=often, k=draw.randint(least, most))
        for at in range(draw.randrange(20), len(picked), 20):
            picked[at] = draw.choice(names).capitalize()
        for at in range(9, len(picked) - 1, 10):
            picked[at] += draw.choice((",", ".", ";", ":", f" {draw.randint(0, 9999)}", " (so)"))
        picked[0] = picked[0].capitalize()
        return " ".join(picked) + end

    for _ in range(count):
        yield text(8, 30, "?"), text(10, 60, ".")


def write_rows(path: Path, case: str, pairs: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            asked, said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            row = {"prompt": [asked], "completion": [said]} if case == "completion" else {"messages": [asked, said]}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """A byte-level BPE of the texts, in Hugging Face format."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in MARKERS])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.save_pretrained(str(folder))


# One run, in a process of its own ------------------------------------------------------------------------------------


def run_child(task: dict[str, Any]) -> None:
    """Do one run and write what it took and what it trained to the task's file."""
    result = {"trl": run_trl, "instil": run_instil, "fill": run_fill}[task["what"]](task)
    Path(task["result"]).write_text(json.dumps(result))


class Stopwatch:
    """Wall time, and CPU time with that of the children that have ended."""

    def __init__(self) -> None:
        self.began = self._now()

    def read(self) -> dict[str, float]:
        wall, cpu = (now - began for now, began in zip(self._now(), self.began, strict=True))
        return {"wall": wall, "cpu": cpu}

    @staticmethod
    def _now() -> tuple[float, float]:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def run_trl(task: dict[str, Any]) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()
    assistant = task["case"] == "assistant"
    config = SFTConfig(
        output_dir=task["scratch"],
        use_cpu=True,
        bf16=False,
        report_to="none",
        packing=True,
        packing_strategy="bfd",
        max_length=BUDGET,
        assistant_only_loss=assistant,
        completion_only_loss=not assistant,
        dataset_num_proc=task["processes"],
    )

    def load_tokenizer() -> Any:
        loaded = AutoTokenizer.from_pretrained(task["tokenizer"])
        loaded.chat_template = Path(task["template"]).read_text(encoding="utf-8")
        return loaded

    def load_rows(file: str, name: str) -> Any:
        return datasets.load_dataset("json", data_files=file, split="train", cache_dir=f"{task['scratch']}/{name}")

    tokenizer = load_tokenizer()
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=BUDGET, **size))
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=load_rows(task["small"], "small"), processing_class=tokenizer
    )

    stopwatch = Stopwatch()
    tokenizer = load_tokenizer()
    loaded = load_rows(task["data"], "rows")
    packed = trainer._prepare_dataset(loaded, tokenizer, config, config.packing, None, "train")
    taken = stopwatch.read()

    found = []
    for pack in packed.with_format("numpy"):
        ends = list(itertools.accumulate(int(length) for length in pack["seq_lengths"]))
        for start, end in itertools.pairwise([0, *ends]):
            labels = pack["labels"][start:end]
            found.append((pack["input_ids"][start:end].tolist(), labels[labels != -100].tolist()))
    return {**taken, **trained(found, tokenizer), "batches": len(packed)}


def run_instil(task: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    import instil
    from instil.packing import prepared

    del prepared, chat_template_utils  # imported before time counts

    stopwatch = Stopwatch()
    records = instil.read(task["data"])
    options = instil.PromptOptions(template=task["template"])
    workers = task.get("workers")
    ready = instil.prepare(records, task["tokenizer"], options, tokens_per_batch=BUDGET, workers=workers)
    batches = list(instil.pack(ready.trees, BUDGET))
    taken = stopwatch.read()

    found = []
    for batch in batches:
        for row in instil.expand(batch):
            ids, weights = (
                [*getattr(row, f"prompt_{what}"), *getattr(row, f"completion_{what}")] for what in ("ids", "weights")
            )
            found.append(([int(i) for i in ids], [int(i) for i, weight in zip(ids, weights, strict=True) if weight]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task["tokenizer"])
    return {**taken, **trained(found, tokenizer), "batches": len(batches)}


def run_fill(task: dict[str, Any]) -> dict[str, Any]:
    """Prepare, plan and build, timed apart."""
    import instil

    took = {}
    stopwatch = Stopwatch()
    ready = instil.prepare(
        instil.read(task["data"]),
        task["tokenizer"],
        instil.PromptOptions(template=task["template"]),
        tokens_per_batch=BUDGET,
    )
    took["prepare"], stopwatch = stopwatch.read()["wall"], Stopwatch()
    packs = instil.pack(ready.trees, BUDGET)
    took["plan"], stopwatch = stopwatch.read()["wall"], Stopwatch()
    sizes = [batch.size for batch in packs]
    took["build"] = stopwatch.read()["wall"]
    fill = sum(sizes) / (len(sizes) * BUDGET)
    return {**took, "fill": fill, "batches": len(sizes), "rows": len(ready.trees), "report": str(packs.report)}


def trained(found: Sequence[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, Any]:
    """A hash of the rows' (all ids, trained ids) as a multiset, less the white space after the last stop token."""
    blank: dict[int, bool] = {}
    digests, tokens, targets, dropped = [], 0, 0, 0
    for ids, taught in found:
        while blank.setdefault(ids[-1], not tokenizer.decode([ids[-1]]).strip()):
            assert taught[-1] == ids[-1]
            del ids[-1], taught[-1]
            dropped += 1
        digests.append(hashlib.sha256(json.dumps([ids, taught]).encode()).digest())
        tokens += len(ids)
        targets += len(taught)
    digest = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return {"digest": digest, "rows": len(found), "tokens": tokens, "trained": targets, "dropped": dropped}


# All runs, and the table ---------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer that has the ChatML tokens")
    parser.add_argument(
        "--fill-rows", type=int, default=100_000, help="rows that are packed to see how full batches are"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        return compare(arguments, Path(scratch))


def compare(arguments: argparse.Namespace, scratch: Path) -> int:
    tokenizer = (arguments.tokenizer or scratch / "tokenizer").resolve()
    if not arguments.tokenizer:
        make_tokenizer(tokenizer, itertools.chain.from_iterable(rows(arguments.rows)))
    print(
        f"{facts()}\ntokenizer {tokenizer.name}, template {TEMPLATE}, {arguments.rows:,} rows, packed to {BUDGET:,}\n"
    )
    task = {"tokenizer": str(tokenizer), "template": str(template_file())}
    results: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case in CASES:
        write_rows(scratch / f"{case}.jsonl", case, rows(arguments.rows))
        write_rows(scratch / f"{case}-small.jsonl", case, rows(8))
    for repeat in range(arguments.repeats):
        for case, name in itertools.product(CASES, list(RUNS)[:: -1 if repeat % 2 else 1]):
            files = {"data": str(scratch / f"{case}.jsonl"), "small": str(scratch / f"{case}-small.jsonl")}
            what = {"what": "trl" if name.startswith("TRL") else "instil", "case": case}
            results[case, name].append(in_child({**task, **files, **what, **RUNS[name]}, scratch))
    shown = [show(case, {name: results[case, name] for name in RUNS}, arguments.rows) for case in CASES]
    full = show_fill(task, arguments.fill_rows, scratch) if arguments.fill_rows else True
    return 0 if all(shown) and full else 1


def in_child(task: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run a task in a fresh process with fresh caches and no network."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        task = {**task, "scratch": folder, "result": f"{folder}/result.json"}
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        environment.pop("TOKENIZERS_PARALLELISM", None)
        command = [sys.executable, __file__, "--child", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a run failed: {task}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(Path(task["result"]).read_text())


def show(case: str, runs: dict[str, list[dict[str, Any]]], count: int) -> bool:
    """Print the table of a case; whether all runs trained the same."""
    wall = {name: statistics.median(run["wall"] for run in found) for name, found in runs.items()}
    cpu = {name: statistics.median(run["cpu"] for run in found) for name, found in runs.items()}
    print(f"{case:<20}{'wall s':>8}{'(runs)':>22}{'CPU s':>8}{'rows/s':>9}{'rows/CPU s':>12}{'batches':>9}")
    for name, found in runs.items():
        spread = " ".join(f"{run['wall']:.1f}" for run in found)
        speeds = f"{count / wall[name]:>9,.0f}{count / cpu[name]:>12,.0f}"
        print(f"{name:<20}{wall[name]:>8.1f}{spread:>22}{cpu[name]:>8.1f}{speeds}{found[0]['batches']:>9}")
    for mine, theirs in itertools.product(("Instil", "Instil, 1 process"), ("TRL", "TRL, 2 processes")):
        ratios = wall[theirs] / wall[mine], cpu[theirs] / cpu[mine]
        print(f"  {mine + ' / ' + theirs:<38} {ratios[0]:.1f} times the rows/s, {ratios[1]:.1f} times the rows/CPU s")
    every = [run for found in runs.values() for run in found]
    equal = len({run["digest"] for run in every}) == 1 and every[0]["rows"] == count
    first, dropped = every[0], {name: found[0]["dropped"] for name, found in runs.items()}
    print(
        f"  trained tokens {'equal' if equal else 'DIFFER'}: {first['rows']:,} rows, {first['tokens']:,} tokens, "
        f"{first['trained']:,} trained; white space after the stop token dropped: {max(dropped.values()):,} of TRL's, "
        f"{dropped['Instil']:,} of Instil's\n"
    )
    return equal


def show_fill(task: dict[str, Any], count: int, scratch: Path) -> bool:
    data = scratch / "fill.jsonl"
    write_rows(data, "assistant", rows(count, seed=1))
    found = in_child({**task, "what": "fill", "data": str(data)}, scratch)
    print(
        f"{found['rows']:,} rows to {BUDGET:,} tokens: {found['batches']:,} batches {found['fill']:.2%} full; "
        f"prepared in {found['prepare']:.1f} s, "
        f"planned in {found['plan']:.2f} s, every batch built in {found['build']:.1f} s\n"
        f"  {found['report']}"
    )
    return found["fill"] >= FULL


def facts() -> str:
    packages = ("instil", "trl", "transformers", "tokenizers", "datasets", "torch", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = "/".join(f"{each:.1f}" for each in os.getloadavg())
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {load}"
    return f"{machine}; Python {platform.python_version()}, {versions}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def template_file() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs trl: pip install -e '.[dev]'")
    return Path(spec.origin).parent / "chat_templates" / f"{TEMPLATE}.jinja"


if __name__ == "__main__":
    sys.exit(main())
