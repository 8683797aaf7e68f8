"""How fast a model is trained, held against TRL: tokens per second, memory, and how much of the machine is used.

python benchmarks/bench_train.py [--case rows|tools] [--repeats 5] [--steps 4] [--runs NAME ...] [--variants]
                                 [--shape 42M] [--tuning full] [--device cpu|cuda] [--profile [NAME]] [--sweep]

All train the same model from the same saved weights on the same token ids, once through, with AdamW, the same constant
learning rate, no weight decay, gradients clipped to 1, and as nearly as can be the same tokens to an optimizer step.
Preparation is not measured (`bench_prepare.py` does that): ids are made directly, as frequent as words are.

rows     independent rows of 80 to 240 tokens, half of each trained
tools    4 lists of 1,000 tokens, each the beginning of a quarter of the rows; 60 to 140 tokens follow, half trained

TRL        `SFTTrainer` with what `SFTConfig` gives by default: 8 rows padded to the longest, bf16 autocast, gradient
           checkpointing, fused AdamW. Set are: the learning rate and its schedule, gradient accumulation, one epoch, a
           log line each step, no checkpoints, and `max_length` where a row is longer than its 1,024.
TRL, best  the settings of it that were fastest on this kind of machine (`--sweep` tries others): see `best_of`.
           Without checkpointing; `rows` packed, for which transformers makes a block mask from the position ids:
           exact, each row is alone, but the mask is dense. Packs of about 512, as long as makes them come out even
           over the steps. `tools` row by row: reasoned, not swept.
Trainer    transformers' own trainer, likewise, in packs of about 1,024. TRL 1.16 computes the head in tiles made for
           GPUs: on a CPU it scores every position, trained or not, once more on the way back, and makes its gradients
           in fp32. Transformers' trainer scores them once, in bf16: it is the one to beat.
Instil     `fit` with `share_prefixes="auto"`, bf16; 8,192 tokens to a batch, on a CPU 2,048 under `rows`.

`--variants` adds Instil in fp32, and with and without compilation.

Every run is a process of its own; runs take turns, in alternating order. The first optimizer step warms up and is not
counted; time is from its end to the end of the last. `whole s` is all of training, that step included, so compilation
shows there. Tokens are those of the rows one by one, for all: what sharing or padding does shows as speed. `GB` is
the peak resident memory of the process (on CUDA the peak that torch allocated), imports and weights included.

Useful FLOPs: 6 times the parameters of the layers for each token, 6 times those of the head for each trained token,
and 12 * layers * width of the heads * L^2 / 2 for each row of L tokens; 4 times where weights are frozen, which get no
gradient. Nothing for padding, for computing again, for untrained logits. `of peak` is their part of what a large
product in bf16 (in fp32 under fp32) gave, measured in turn with the runs. With sharing it may exceed 100 %.

The rows that the models were given are read back after time has stopped: the multisets of (ids, trained ids) must be
equal, and so must the weights at the start. The order is each trainer's own, so losses agree by and large only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_prepare import processor

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "inner": 176, "vocabulary": 512},
    "42M": {"hidden": 512, "layers": 8, "heads": 8, "inner": 1376, "vocabulary": 32_000},
    "0.6B": {
        "kind": "qwen3",
        "hidden": 1024,
        "layers": 28,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
        "inner": 3072,
        "vocabulary": 151_936,
    },
    "1B": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "inner": 8192, "vocabulary": 128_256},
    "8B": {
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "inner": 14_336,
        "vocabulary": 128_256,
        "tied": False,
    },
}
RUNS: dict[str, dict[str, Any]] = {
    "TRL": {"what": "trl"},
    "TRL, best": {"what": "trl", "best": True},
    "Trainer": {"what": "trainer", "best": True},
    "Instil": {"what": "instil"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "Instil, fp32": {"what": "instil", "precision": "fp32"},
    "Instil, compiled": {"what": "instil", "compile": "on"},
    "Instil, not compiled": {"what": "instil", "compile": "off"},
}
PLAIN = {"gradient_checkpointing": False}
SWEEP: dict[str, dict[str, Any]] = {
    "TRL": {"what": "trl"},
    "8 rows": {"what": "trl", "settings": PLAIN},
    "8 rows, by length": {"what": "trl", "settings": {**PLAIN, "train_sampling_strategy": "group_by_length"}},
    "1 row": {"what": "trl", "settings": {**PLAIN, "per_device_train_batch_size": 1}},
    "2 rows": {"what": "trl", "settings": {**PLAIN, "per_device_train_batch_size": 2}},
    **{f"packs of {size:,}": {"what": "trl", "settings": PLAIN, "pack": size} for size in (256, 512, 1024, 2048)},
    "packs of 512, compiled": {"what": "trl", "settings": {**PLAIN, "torch_compile": True}, "pack": 512},
    "packs of 512, fp32": {"what": "trl", "settings": {**PLAIN, "bf16": False}, "pack": 512},
    **{f"Trainer, packs of {size:,}": {"what": "trainer", "pack": size} for size in (512, 1024, 2048)},
    "Trainer, 1 row": {"what": "trainer", "settings": {"per_device_train_batch_size": 1}},
}
LEARNING_RATE = {"full": 3e-4, "lora": 1e-3}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TOKENS_PER_BATCH = 8192
ON_CPU = 2048  # of rows that share nothing: what their batch takes in memory is near what TRL's packs take
TRL_LENGTH = 1024  # SFTConfig's own `max_length`
FIRST_LOSS = 0.02  # relative: the first steps hold other rows, but the weights are the same
BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and AdamW's two moments


def tokens_per_batch(task: dict[str, Any]) -> int:
    return ON_CPU if task["case"] == "rows" and task["device"] == "cpu" else TOKENS_PER_BATCH


def best_of(task: dict[str, Any]) -> dict[str, Any]:
    """What a person would set for the machine and the rows, for either trainer, as keys of a run's task."""
    if task["device"] == "cuda":
        liger = importlib.util.find_spec("liger_kernel") is not None
        return {"settings": {**PLAIN, "use_liger_kernel": liger}, "pack": TOKENS_PER_BATCH, "flash": True}
    if task["case"] == "tools":
        # A row by itself fills the products, needs no padding and no mask: attention is the causal flash kernel.
        return {"settings": {**PLAIN, "per_device_train_batch_size": 1, "dataloader_pin_memory": False}}
    # A dense mask costs more with longer packs, the fp32 gradient of TRL's head more with shorter ones.
    pack = 512 if task["what"] == "trl" else 1024
    return {"settings": {**PLAIN, "dataloader_pin_memory": False}, "pack": pack}


# The data ------------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of token ids, each a prompt and a completion; the completion is trained.

    Args:
        ids: (N,) all rows' tokens.
        lengths: (R,) the tokens of each row.
        prompts: (R,) those of its prompt.
    """

    def __init__(self, ids: Any, lengths: Any, prompts: Any) -> None:
        self.ids, self.lengths, self.prompts = ids, lengths, prompts

    @classmethod
    def made(cls, case: str, count: int, vocabulary: int, scale: float, seed: int = 0) -> Rows:
        """Ids from 2 on, the k-th as frequent as 1 / (k + 2.7); `scale` shortens all."""
        draw = np.random.default_rng(seed)
        frequency = 1 / (np.arange(vocabulary - 2) + 2.7)
        frequency /= frequency.sum()

        def words(size: int) -> Any:
            return draw.choice(vocabulary - 2, size, p=frequency) + 2

        least, most = (80, 240) if case == "rows" else (60, 140)
        own = np.maximum(draw.integers(int(least * scale), int(most * scale) + 1, count), 4)
        trunks = [words(int(1000 * scale)) for _ in range(4)] if case == "tools" else [words(0)]
        parts, lengths, prompts = [], [], []
        for number, length in enumerate(own.tolist()):
            trunk = trunks[number * len(trunks) // count]
            parts += [trunk, words(length)]
            lengths.append(len(trunk) + length)
            prompts.append(len(trunk) + length // 2)
        return cls(np.concatenate(parts).astype(np.int32), np.array(lengths), np.array(prompts))

    @classmethod
    def load(cls, file: str) -> Rows:
        with np.load(file) as stored:
            return cls(stored["ids"], stored["lengths"], stored["prompts"])

    def save(self, file: str) -> None:
        np.savez(file, ids=self.ids, lengths=self.lengths, prompts=self.prompts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Each row's ids, and how many of them are its prompt."""
        starts = np.cumsum(self.lengths)[:-1]
        yield from zip(np.split(self.ids, starts), self.prompts.tolist(), strict=True)


# The model -----------------------------------------------------------------------------------------------------------


def new_model(shape: dict[str, Any], device: str, dtype: Any, attention: str = "sdpa") -> Any:
    """A model of a shape with random weights, always the same."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    kind = Qwen3Config if shape.get("kind") == "qwen3" else LlamaConfig
    config = kind(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape.get("kv_heads", shape["heads"]),
        head_dim=shape.get("head_dim", shape["hidden"] // shape["heads"]),
        max_position_embeddings=TOKENS_PER_BATCH,
        tie_word_embeddings=shape.get("tied", True),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def load_model(task: dict[str, Any], attention: str = "sdpa") -> Any:
    """The model that all start from: weights in float32; under LoRA in bf16 on CUDA, with the adapter around it."""
    import torch
    from transformers import AutoModelForCausalLM

    lora = task["tuning"] == "lora"
    dtype = torch.bfloat16 if lora and task["device"] == "cuda" else torch.float32
    if task["weights"]:
        model = AutoModelForCausalLM.from_pretrained(task["weights"], dtype=dtype, attn_implementation=attention)
    else:
        model = new_model(task["shape"], task["device"], dtype, attention)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**LORA))


def weights_of(model: Any) -> str:
    """A fingerprint of all weights."""
    sums = [f"{float(each.detach().double().abs().sum()):.6e}" for each in model.parameters()]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def sizes_of(model: Any) -> dict[str, int]:
    """The parameters of the layers, those of them that are frozen, and those of the head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings().weight
    outside = {id(head), id(base.get_input_embeddings().weight)}
    own = [(each.numel(), each.requires_grad) for each in base.parameters() if id(each) not in outside]
    return {
        "layers": sum(size for size, _ in own),
        "frozen": sum(size for size, trained in own if not trained),
        "head": head.numel(),
    }


# One run, in a process of its own ------------------------------------------------------------------------------------


def run_child(task: dict[str, Any]) -> None:
    """Do one run and write what it took and what it trained to the task's file."""
    runs = {"trl": run_trl, "trainer": run_trl, "instil": run_instil, "save": save_weights, "peak": measure_peak}
    result = runs[task["what"]](task)
    Path(task["result"]).write_text(json.dumps(result))


class Clock:
    """Tells when steps ended and what the model had been given by then.

    Args:
        device: Where the model is.
        steps: What is counted ends with the last of them; a profile is taken of them all but the first.
        profile: Whether it is taken.
    """

    def __init__(self, device: str, steps: int | None, profile: bool) -> None:
        self.device, self.steps = device, steps
        self.given: list[Any] = []  # what the model was given, micro-batch by micro-batch
        self.ends: list[tuple[float, int]] = []  # when each step ended, and what was given by then
        self.profiler: Any = None
        self.profile = profile
        self.began = time.perf_counter()

    def step(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        if self.profiler is not None and len(self.ends) + 1 == self.steps:
            self.profiler.stop()
        self.ends.append((time.perf_counter(), len(self.given)))
        if self.profile and len(self.ends) == 1:
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
            self.profiler = profile(activities=kinds)
            self.profiler.start()
            self.ends[0] = (time.perf_counter(), len(self.given))

    def result(self, read: Callable[[Any], list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
        """What was measured and what was trained; `read` gives the rows (ids, trained ids) of what was given."""
        memory = peak_memory(self.device)
        if len(self.ends) < 2:
            raise SystemExit(f"{len(self.ends)} optimizer steps: too few to count any")
        rows = [read(each) for each in self.given]
        cuts = [0, *(given for _, given in self.ends)]
        steps = [list(itertools.chain.from_iterable(rows[a:b])) for a, b in itertools.pairwise(cuts)]
        counted = list(itertools.chain.from_iterable(steps[1:]))
        seconds = self.ends[-1][0] - self.ends[0][0]
        every = [json.dumps([ids, taught]).encode() for step in steps for ids, taught in step]
        digest = hashlib.sha256(b"".join(sorted(hashlib.sha256(each).digest() for each in every))).hexdigest()
        return {
            "seconds": seconds,
            "whole": self.ends[-1][0] - self.began,
            "memory": memory,
            "digest": digest,
            "rows": len(every),
            "examples": len(counted),
            "tokens": sum(len(ids) for ids, _ in counted),
            "trained": sum(len(taught) for _, taught in counted),
            "squares": sum(len(ids) ** 2 for ids, _ in counted),
            "steps": [sum(len(ids) for ids, _ in step) for step in steps],
            "profile": self.profiler and profile_of(self.profiler, seconds, self.device),
        }


def peak_memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_trl(task: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer, or transformers' own on TRL's packs."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    datasets.disable_caching()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    rows = Rows.load(task["data"])
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in rows],
            "labels": [[-100] * prompt + ids[prompt:].tolist() for ids, prompt in rows],
        }
    )
    chosen = {**task, **(best_of(task) if task.get("best") else {})}
    steps, pack = task["steps"], chosen.get("pack")
    flash = chosen.get("flash") and importlib.util.find_spec("flash_attn") is not None
    settings: dict[str, Any] = {
        "output_dir": task["scratch"],
        "use_cpu": task["device"] == "cpu",
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **chosen.get("settings", {}),
    }
    longest = int(rows.lengths.max())
    if pack:
        length, packs = even_packs(table, steps, max(pack, longest))
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": packs}
        limit = {"packing": True, "packing_strategy": "bfd", "max_length": length}
    else:
        size = settings.setdefault("per_device_train_batch_size", SFTConfig(use_cpu=True).per_device_train_batch_size)
        settings["gradient_accumulation_steps"] = max(1, round(len(rows) / steps / size))
        limit = {"max_length": longest} if longest > TRL_LENGTH else {}
    model = load_model(task, "flash_attention_2" if flash else "sdpa")
    start = {"weights": weights_of(model), **sizes_of(model)}
    if task["what"] == "trl":
        trainer: Any = SFTTrainer(
            model=model, args=SFTConfig(**settings, **limit), train_dataset=table, processing_class=pad_tokenizer()
        )
    else:
        from trl import pack_dataset

        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**{"bf16": True, **settings}, remove_unused_columns=False),
            train_dataset=pack_dataset(table, limit["max_length"], "bfd") if pack else table,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=bool(pack)),
        )

    clock = Clock(task["device"], steps, task.get("profile", False))

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        clock.given.append({name: value for name, value in inputs.items() if name in _GIVEN})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.add_callback(Watch())
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    attention = trainer.model.config._attn_implementation
    note = f"{settings['per_device_train_batch_size']} x {settings['gradient_accumulation_steps']} a step, "
    note += f"packs of {limit['max_length']}, {attention}" if pack else attention
    precision = "bf16" if trainer.args.bf16 else "fp32"
    return {**clock.result(rows_of_tensors), **start, "losses": losses, "note": note, "precision": precision}


_GIVEN = ("input_ids", "labels", "attention_mask", "position_ids")


def rows_of_tensors(given: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The rows of what TRL's collator made, padded or laid end to end."""
    found = []
    if "attention_mask" in given:
        for ids, labels, mask in zip(given["input_ids"], given["labels"], given["attention_mask"], strict=True):
            kept = mask.bool()
            found.append((ids[kept].tolist(), labels[kept & (labels != -100)].tolist()))
        return found
    ids, labels, positions = (given[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    starts = [at for at, position in enumerate(positions) if position == 0]
    for start, stop in itertools.pairwise([*starts, len(ids)]):
        found.append((ids[start:stop], [label for label in labels[start:stop] if label != -100]))
    return found


def even_packs(table: Any, steps: int, about: int) -> tuple[int, int]:
    """A length near `about` whose packs come out even: the same number of them in each step, all nearly full.

    Returns:
        The length and the packs of a step.
    """
    from trl import pack_dataset

    longest, total = (operation(map(len, table["input_ids"])) for operation in (max, sum))
    packs = max(1, round(total / steps / about))
    length = max(longest, -(-total // (steps * packs)))
    while len(pack_dataset(table, length, "bfd")) > steps * packs:
        length += max(1, length // 200)
    return length, packs


def pad_tokenizer() -> Any:
    """A tokenizer for TRL to pad with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def run_instil(task: dict[str, Any]) -> dict[str, Any]:
    import instil
    from instil.model.forward import TreeModel
    from instil.packing import TokenTree
    from instil.prompt.exchange import Exchange
    from instil.training.loop import fit
    from instil.training.options import TrainOptions

    rows = Rows.load(task["data"])
    trees = []
    for record, (ids, prompt) in enumerate(rows):
        weights = np.zeros(prompt, np.float32), np.ones(len(ids) - prompt, np.float32)
        exchange = Exchange("", "", ids[:prompt], weights[0], ids[prompt:], weights[1], "special")
        trees.append(TokenTree.from_exchanges([exchange], record=record))
    hf_model = load_model(task)
    start = {"weights": weights_of(hf_model), **sizes_of(hf_model)}
    precision = task.get("precision", "bf16")
    model = TreeModel(hf_model, bf16=precision == "bf16")

    # The steps of an epoch are the fewest equal ones below this size.
    tokens = sum(tree.unshared for tree in trees)
    options = TrainOptions(
        tokens_per_step=-(-tokens // task["steps"]) + int(rows.lengths.max()),
        epochs=1.0,
        learning_rate=task["learning_rate"],
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        compile=task.get("compile", "auto"),
    )
    clock = Clock(task["device"], task["steps"], task.get("profile", False))
    notes = [] if not model.one_by_one else [f"one path at a time: {model.one_by_one}"]

    class Watch:
        def started(self, resolved: Any) -> None:
            notes.append(f"share_prefixes {resolved.settings.get('share_prefixes')}")
            notes.append(f"compile {resolved.settings.get('compile', options.compile)}")

        def stepped(self, step: Any) -> None:
            clock.step()

        def evaluated(self, evaluation: Any) -> None:
            pass

    losses_of = model.losses

    def losses(batch: Any) -> Any:
        clock.given.append(batch)
        return losses_of(batch)

    model.losses = losses  # type: ignore[method-assign]
    outcome = fit(
        model,
        trees,
        options,
        tokens_per_batch=tokens_per_batch(task),
        share_prefixes="auto",
        seed=0,
        watchers=[Watch()],
    )

    def read(batch: Any) -> list[tuple[list[int], list[int]]]:
        found = []
        for row in instil.expand(batch):
            ids = [*row.prompt_ids.tolist(), *row.completion_ids.tolist()]
            weights = [*row.prompt_weights.tolist(), *row.completion_weights.tolist()]
            found.append((ids, [i for i, weight in zip(ids, weights, strict=True) if weight]))
        return found

    laid_out = sum(step.tokens for step in outcome.history)
    notes.append(f"{len(clock.given)} batches of {laid_out:,} tokens in all")
    return {
        **clock.result(read),
        **start,
        "losses": [step.loss for step in outcome.history],
        "note": ", ".join(notes),
        "precision": precision,
    }


def save_weights(task: dict[str, Any]) -> dict[str, Any]:
    """Write the weights that all runs start from."""
    import torch

    model = new_model(task["shape"], "cpu", torch.float32)
    model.save_pretrained(task["to"])
    return sizes_of(model)


def measure_peak(task: dict[str, Any]) -> dict[str, Any]:
    """FLOPs a second of a large product: the best of five, once warm."""
    import torch

    size = task.get("size") or (8192 if task["device"] == "cuda" else 4096)
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device=task["device"]).to(dtype) for _ in range(2))
        took = []
        for _ in range(6):
            began = time.perf_counter()
            left @ right
            if task["device"] == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        found[name] = 2 * size**3 / min(took[1:])
    return found


# Where the time goes -------------------------------------------------------------------------------------------------

_OPTIMIZER, _HEAD, _ATTENTION, _PRODUCTS = "optimizer", "head", "attention", "products"
_ELEMENTWISE, _COMPILED, _OTHER = "elementwise, norms, copies", "compiled kernels", "Python and other"
_AROUND = {
    _OPTIMIZER: ("Optimizer.step", "Optimizer.zero_grad", "clip_grad", "_foreach_norm", "_fused_adam"),
    _HEAD: ("instil::head", "_CrossEntropy", "ChunkedLogProb", "nll_loss", "log_softmax", "cross_entropy"),
    _ATTENTION: ("scaled_dot_product", "_Flash", "flash_attention", "flash_attn", "flex_attention", "varlen_attn"),
}
_ITSELF = {
    _PRODUCTS: ("addmm", "::mm", "bmm", "linear", "matmul", "baddbmm", "einsum"),
    _COMPILED: ("CompiledFxGraph", "Compiled Region", "CompiledFunction", "inductor", "triton", "cpp_fused"),
}


def profile_of(profiler: Any, wall: float, device: str) -> list[dict[str, Any]]:
    """The counted steps' time in groups: an operation belongs to the range it stands in, or else goes by its name.

    Operations that a range's own operations bring about on the way back bear the same sequence number.
    """
    events = [each for each in profiler.events() if str(each.device_type).endswith("CPU")]
    marked: dict[tuple[int, int], str] = {}  # the group of an operation, by thread and sequence number

    def around(event: Any) -> str | None:
        while event is not None:
            for group, names in _AROUND.items():
                if any(name in event.name for name in names):
                    return group
            if event.name.startswith("autograd::engine") and (event.fwd_thread, event.sequence_nr) in marked:
                return marked[event.fwd_thread, event.sequence_nr]
            event = event.cpu_parent
        return None

    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::") and (found := around(event)):
            marked[event.thread, event.sequence_nr] = found
    time_of: dict[str, float] = defaultdict(float)
    names: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        spent = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
        group = around(event)
        if group is None:
            own = (group for group, known in _ITSELF.items() if any(name in event.name for name in known))
            group = next(own, _ELEMENTWISE if event.name.startswith(("aten::", "mkldnn::")) else _OTHER)
        time_of[group] += spent
        names[group][event.name] += spent
    # Outside every operation: Python, the loop, and on CUDA whatever time the device was idle.
    time_of[_OTHER] += max(0.0, wall - sum(time_of.values()))
    groups = sorted(time_of, key=lambda group: -time_of[group])
    return [
        {
            "group": group,
            "seconds": time_of[group],
            "part": time_of[group] / wall,
            "most": sorted(((s, name) for name, s in names[group].items() if s), reverse=True)[:4],
        }
        for group in groups
    ]


def show_profile(found: Sequence[dict[str, Any]]) -> None:
    print(f"{'where the time goes':<28}{'s':>8}{'part':>8}  most of it")
    for each in found:
        most = ", ".join(f"{name.removeprefix('aten::')} {seconds:.2f}" for seconds, name in each["most"])
        print(f"{each['group']:<28}{each['seconds']:>8.2f}{each['part']:>8.1%}  {most}")
    print()


# All runs, and the table ---------------------------------------------------------------------------------------------


def main() -> int:
    arguments = parsed()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return 0
    known = RUNS | VARIANTS | SWEEP
    if wrong := [name for name in (*arguments.runs, *filter(None, [arguments.profile])) if name not in known]:
        raise SystemExit(f"no run is called {', '.join(wrong)}; there are: {'; '.join(known)}")
    cuda = arguments.device == "cuda"
    if cuda and not has_cuda():
        print("no GPU that torch can use is at hand: nothing measured on CUDA")
        return 0
    shapes = arguments.shape or (["0.6B", "1B", "8B"] if cuda else ["42M"])
    tunings = arguments.tuning or (["full", "lora"] if cuda else ["full"])
    print(facts(cuda) + "\n", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a run under way would go on by itself
    good = True
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        for shape, tuning in itertools.product(shapes, tunings):
            good &= compare(arguments, shape, tuning, Path(scratch))
    return 0 if good else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("rows", "tools"), default="rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="42M; on CUDA 0.6B, 1B and 8B")
    parser.add_argument("--tuning", nargs="+", choices=("full", "lora"), help="full; on CUDA both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="counted after the first: 4, 3 under tools, 8 on CUDA")
    parser.add_argument("--rows-per-step", type=int, help="a multiple of 8: 32, 64 under tools, 256 on CUDA")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME", help=f"of {'; '.join(RUNS | VARIANTS)}")
    parser.add_argument("--variants", action="store_true", help="Instil's other settings and transformers' trainer")
    parser.add_argument("--sweep", action="store_true", help="other settings of TRL in place of the usual runs")
    parser.add_argument(
        "--profile", nargs="?", const="Instil", metavar="NAME", help="also say where a run's time goes: Instil's"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, shape: str, tuning: str, scratch: Path) -> bool:
    """All runs of a shape, in turns, and their table; whether they trained the same."""
    cuda, case = arguments.device == "cuda", arguments.case
    steps = 1 + (arguments.steps or (8 if cuda else 3 if case == "tools" else 4))
    per_step = arguments.rows_per_step or (256 if cuda else 64 if case == "tools" else 32)
    rows = Rows.made(case, steps * per_step, SHAPES[shape]["vocabulary"], 0.25 if shape == "tiny" else 1.0)
    rows.save(str(scratch / "rows.npz"))
    task = {
        "case": case,
        "device": arguments.device,
        "shape": SHAPES[shape],
        "tuning": tuning,
        "steps": steps,
        "learning_rate": LEARNING_RATE[tuning],
        "data": str(scratch / "rows.npz"),
        "weights": None if cuda else str(scratch / f"weights-{shape}"),
    }
    if cuda and tuning == "full" and (needed := state_bytes(SHAPES[shape])) > 0.85 * (held := device_memory()):
        sizes = f"{needed / 1e9:.0f} GB of weights, gradients and moments do not fit in {held / 1e9:.0f}"
        print(f"{shape}, full: {sizes}\n")
        return True
    if not cuda:
        in_child({**task, "what": "save", "to": task["weights"]}, scratch)
    print(
        f"{shape}, {tuning}, {case}: {len(rows):,} rows of {rows.lengths.mean():.0f} tokens, {steps - 1} steps counted "
        f"of about {rows.lengths.sum() / steps:,.0f} tokens, after 1 to warm up",
        flush=True,
    )
    runs = SWEEP if arguments.sweep else RUNS | (VARIANTS if arguments.variants else {})
    if arguments.runs:
        runs = {name: (RUNS | VARIANTS | SWEEP)[name] for name in arguments.runs}
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    peaks: list[dict[str, float]] = []
    for repeat in range(arguments.repeats):
        size = {"size": 512} if shape == "tiny" else {}
        peaks.append(in_child({**task, "what": "peak", **size}, scratch))
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            results[name].append(in_child({**task, **runs[name]}, scratch))
            last = results[name][-1]
            print(f"  {repeat + 1}. {name}: {last['tokens'] / last['seconds']:,.0f} tokens/s", file=sys.stderr)
    peak = {name: statistics.median(each[name] for each in peaks) for name in peaks[0]}
    good = show(task, {name: results[name] for name in runs}, peak, len(rows))
    if arguments.profile:
        chosen = (RUNS | VARIANTS | SWEEP)[arguments.profile]
        print(f"profile of {arguments.profile}; the profiler itself takes time too")
        show_profile(in_child({**task, **chosen, "profile": True}, scratch)["profile"])
    return good


def in_child(task: dict[str, Any], scratch: Path, script: str = __file__) -> dict[str, Any]:
    """Run a task of a script in a fresh process with fresh caches and no network."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        task = {**task, "scratch": folder, "result": f"{folder}/result.json"}
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        command = [sys.executable, "-W", "ignore", script, "--child", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a run failed: {task}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(Path(task["result"]).read_text())


def show(task: dict[str, Any], runs: dict[str, list[dict[str, Any]]], peak: dict[str, float], count: int) -> bool:
    """Print the table of a case; whether all runs trained the same rows from the same weights."""
    speed = {name: statistics.median(speeds(found, "tokens")) for name, found in runs.items()}
    width = max(map(len, runs)) + 2
    print(
        f"{'':<{width}}{'tokens/s':>9}{'(runs)':>{7 * len(next(iter(runs.values()))) + 2}}{'trained/s':>11}"
        f"{'rows/s':>8}{'GB':>7}{'of peak':>9}{'whole s':>9}{'tokens a step':>16}{'loss, first to last':>21}"
    )
    for name, found in runs.items():
        first = found[0]
        spread = f"({' '.join(f'{each:,.0f}' for each in speeds(found, 'tokens'))})"
        trained, rows = (statistics.median(speeds(found, what)) for what in ("trained", "examples"))
        memory, whole = (statistics.median(run[what] for run in found) for what in ("memory", "whole"))
        used = statistics.median(useful(task, run) / run["seconds"] for run in found) / peak[first["precision"]]
        steps = f"{min(first['steps'][1:]):,} to {max(first['steps'][1:]):,}"
        losses = f"{first['losses'][0]:.3f} to {first['losses'][-1]:.3f}"
        print(
            f"{name:<{width}}{speed[name]:>9,.0f}{spread:>{7 * len(found) + 2}}{trained:>11,.0f}{rows:>8.1f}"
            f"{memory / 1e9:>7.2f}{used:>9.1%}{whole:>9.1f}{steps:>16}{losses:>21}"
        )
    mine, theirs = ([name for name in runs if name.startswith("Instil") == own] for own in (True, False))
    for a, b in itertools.product(mine, theirs):
        less = statistics.median(run["memory"] for run in runs[a]) / statistics.median(run["memory"] for run in runs[b])
        print(f"  {f'{a} / {b}':<40} {speed[a] / speed[b]:.2f} times the tokens/s, {less:.2f} times the memory")
    for name, found in runs.items():
        print(f"  {name}: {len(found[0]['steps'])} steps, {found[0]['precision']}, {found[0]['note']}")
    print(f"  peak: {', '.join(f'{each / 1e12:.2f} TFLOP/s {name}' for name, each in peak.items())}")
    return are_equal([run for found in runs.values() for run in found], count)


def are_equal(every: Sequence[dict[str, Any]], count: int) -> bool:
    rows = len({run["digest"] for run in every}) == 1 and every[0]["rows"] == count
    weights = len({run["weights"] for run in every}) == 1
    firsts = [run["losses"][0] for run in every]
    close = max(firsts) / min(firsts) - 1 <= FIRST_LOSS
    print(
        f"  trained rows {'equal' if rows else 'DIFFER'}, weights at the start {'equal' if weights else 'DIFFER'}, "
        f"first losses {'agree' if close else 'DIFFER'} ({min(firsts):.3f} to {max(firsts):.3f})\n"
    )
    return rows and weights and close


def speeds(found: Sequence[dict[str, Any]], what: str) -> list[float]:
    return [run[what] / run["seconds"] for run in found]


def useful(task: dict[str, Any], run: dict[str, Any]) -> float:
    """The useful FLOPs of the counted steps, as the top of the script says."""
    shape = task["shape"]
    wide = shape["heads"] * shape.get("head_dim", shape["hidden"] // shape["heads"])
    layers = (6 * run["layers"] - 2 * run["frozen"]) * run["tokens"]
    head = (6 if task["tuning"] == "full" else 4) * run["head"] * run["trained"]
    return layers + head + 12 * shape["layers"] * wide * run["squares"] / 2


def state_bytes(shape: dict[str, Any]) -> int:
    """What full training of a shape holds besides activations."""
    wide = shape["heads"] * shape.get("head_dim", shape["hidden"] // shape["heads"])
    keys = wide * shape.get("kv_heads", shape["heads"]) // shape["heads"]
    layer = shape["hidden"] * (2 * wide + 2 * keys + 3 * shape["inner"])
    tables = shape["vocabulary"] * shape["hidden"] * (1 if shape.get("tied", True) else 2)
    return (shape["layers"] * layer + tables) * BYTES_PER_PARAMETER


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def device_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def facts(cuda: bool) -> str:
    found = []
    names = ("instil", "trl", "transformers", "torch", "accelerate", "peft", "liger-kernel", "flash-attn")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    load = "/".join(f"{each:.1f}" for each in os.getloadavg())
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {load}"
    if cuda:
        import torch

        machine = f"{torch.cuda.get_device_name(0)}; {machine}"
    return f"{machine}; Python {platform.python_version()}, {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
