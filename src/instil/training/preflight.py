"""What is settled and refused before the first step: everything that follows from configuration and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from instil.errors import TrainingError
from instil.model.adapter import trained_parameters
from instil.model.forward import TreeModel
from instil.model.quantize import describe
from instil.packing import StoredTrees, TokenTree
from instil.packing.tree import Ints
from instil.training.checkpoint import Checkpoint
from instil.training.distributed import Processes
from instil.training.events import Measure, Resolved
from instil.training.memory import Kept, Load, Memory, estimate
from instil.training.options import TrainOptions
from instil.training.steps import Steps, longest_paths, sizes

WORTH_COMPILING = {"cpu": 1e15, "cuda": 1e17}
"""Floating-point operations of a run from which compiling its layers, which takes a minute or two, is worth it."""

_COMPARED = 20
"""By how much the learning rate is smaller where answers are compared: 1e-6 in full, where supervised it is 2e-5."""


def check(
    model: TreeModel,
    trees: Sequence[TokenTree],
    rows: Ints | None,
    *,
    held_out: Sequence[TokenTree] = (),
    sharded: bool,
) -> None:
    """Refuse what could not be trained, before the first step.

    Args:
        model: What is to be trained.
        trees: One for each row.
        rows: (N,) the indices of the rows that are trained; None for all.
        held_out: Those that the loss is measured on.
        sharded: Whether processes hold the model in parts.

    Raises:
        TrainingError: The first thing that is wrong, with its row.
    """
    if sharded and not model.in_one_go:
        raise TrainingError(
            "--shard: this model reads some rows apart from others, and its processes would wait for each other: "
            + (model.one_by_one or "long paths are rotated otherwise"),
            "Leave --shard out: each process then holds all of the model.",
        )
    if not len(trees if rows is None else rows):
        raise TrainingError("there are no rows to train", "Give some.")
    if isinstance(trees, StoredTrees):
        weight, highest = trees.weight, trees.highest_id
    else:
        weight = sum(float(tree.target_weights.sum()) for tree in trees)
        highest = max(int(tree.input_ids.max(initial=0)) for tree in trees)
    if not weight:
        raise TrainingError("no token of any row has a weight", "Give rows an answer that is trained.")
    for each in (trees, held_out):
        check_positions(model, each)
    embeddings = model.base.get_input_embeddings().weight.shape[0]
    if highest >= embeddings:
        where = next(index for index, tree in enumerate(trees) if tree.input_ids.max(initial=0) >= embeddings)
        raise TrainingError(
            f"{naming(trees)(where)}: holds the token id {highest:,}, and the model has {embeddings:,} embeddings",
            "Encode the rows with the model's own tokenizer.",
        )


def check_measure(measure: Measure | None, options: TrainOptions, *, held_out: bool, sharded: bool) -> None:
    """Refuse a metric that nothing measures, or that could not be measured.

    Args:
        measure: How it is measured.
        options: Which say what it is called.
        held_out: Whether there are rows to measure it on.
        sharded: Whether processes hold the model in parts.

    Raises:
        TrainingError: The two do not go together, there are no such rows, or the model is in parts.
    """
    named = f"eval_metric {options.eval_metric}"
    if measure is None and options.eval_metric != "loss":
        raise TrainingError(
            f"{named}: nothing measures it", "Pass measure=instil.evaluation.held_out.measure to train."
        )
    if measure is not None and options.eval_metric == "loss":
        raise TrainingError(f"{named}: there is a measure beside it", "Give it a name of its own, or pass no measure.")
    if measure is not None and not held_out:
        raise TrainingError(f"{named}: there are no held-out rows to evaluate on", "Hold some out.")
    if measure is not None and sharded:
        raise TrainingError(f"{named}: a model in parts (--shard) generates nothing", "Leave --shard out.")


def check_positions(model: TreeModel, trees: Sequence[TokenTree]) -> None:
    """Refuse rows that are longer than a table of learned positions (GPT-2, OPT).

    Raises:
        TrainingError: There are such, the first of them named.
    """
    limit = model.learned_positions
    if limit is None or not len(trees):
        return
    longer = np.flatnonzero(longest_paths(trees) > limit)
    if len(longer):
        raise TrainingError(
            f"{naming(trees)(int(longer[0]))}: is longer than the {limit:,} positions that the model has learned, and "
            f"so are {len(longer) - 1:,} more",
            f"Give --max-length {limit}, and with --on-too-long what becomes of such rows.",
        )


def naming(trees: Sequence[TokenTree]) -> Callable[[int], str]:
    """What says where the row of a tree stands, by its index."""
    own: Callable[[int], str] | None = getattr(trees, "name", None)
    return own or "row {}".format


def check_whole(trees: Sequence[TokenTree], tokens_per_batch: int) -> None:
    """Refuse rows that do not fit a batch whole: their answers are to be compared.

    Raises:
        TrainingError: There are such, all of them named.
    """
    tokens = sizes(trees)  # (N,)
    larger = np.flatnonzero(tokens > tokens_per_batch)
    if len(larger):
        rows = "".join(f"\n  {naming(trees)(int(at))}: {int(tokens[at]):,} tokens" for at in larger)
        raise TrainingError(
            f"the answers of {len(larger):,} {'row' if len(larger) == 1 else 'rows'} do not fit a batch of "
            f"{tokens_per_batch:,} tokens together, and are to be compared:{rows}",
            f"Raise --tokens-per-batch to {int(tokens.max()):,}, or lower --max-length.",
        )


def resolve(
    model: TreeModel,
    steps: Steps,
    options: TrainOptions,
    resume: Checkpoint | None = None,
    *,
    compares: bool = False,
    held_out: bool = False,
    processes: Processes | None = None,
) -> Resolved:
    """Settle what is left to the counts.

    Args:
        model: What is trained.
        steps: The steps of an epoch.
        options: How it is trained.
        resume: What the run goes on from.
        compares: Whether answers are compared, which takes smaller steps.
        held_out: Whether rows are held out, so that the best weights are kept.
        processes: Those that train together, which agree on what fits.

    Raises:
        TrainingError: The run does not fit into memory.
    """
    count = options.max_steps or max(1, round(options.epochs * steps.per_epoch))
    lora = hasattr(model.model, "peft_config")
    trained, parameters = trained_parameters(model.model)
    checkpointing, memory = _memory(model, steps, options, held_out, processes or Processes())
    work = 6 * parameters * count * min(steps.tokens_per_step, steps.tokens)  # multiplications and additions, roughly
    settings = {
        "optimizer": options.optimizer,
        "learning_rate": options.learning_rate or (2e-4 if lora else 2e-5) / (_COMPARED if compares else 1),
        "schedule": options.schedule,
        "warmup_steps": round(options.warmup * count),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "tokens_per_batch": steps.tokens_per_batch,
        "share_prefixes": steps.share_prefixes,
        "share_prefixes_reason": steps.reason,
        "trained_parameters": trained,
        "parameters": parameters,
        **({"quantized": quantized} if (quantized := describe(model.model)) else {}),
        "attention": "token trees" if not model.one_by_one else f"one path at a time: {model.one_by_one}",
        "precision": "bf16" if model.bf16 else "fp32",
        "activation_checkpointing": checkpointing,
        "compile": options.compile == "on" or (options.compile == "auto" and work > WORTH_COMPILING[model.device.type]),
        "eval_every": options.eval_every or max(1, count // 10),
        "memory": str(memory),
    }
    if steps.processes > 1:
        settings["processes"] = (
            f"{steps.processes}, {'each with a part' if options.shard else 'each with all'} of the model"
        )
    if resume is not None:
        settings["resumed_from"] = str(resume.folder)
        settings |= {"passed_over": "; ".join(resume.passed)} if resume.passed else {}
    return Resolved(count, count / steps.per_epoch, steps.tokens_per_step, settings)


def _memory(
    model: TreeModel, steps: Steps, options: TrainOptions, held_out: bool, processes: Processes
) -> tuple[bool, Memory]:
    """Whether activations are computed again, and the memory that takes."""
    load, kept, chosen = Load.of(steps), Kept.by(model), options.activation_checkpointing

    def take(load: Load, checkpointing: bool) -> Memory:
        shards = steps.processes if options.shard else 1
        return estimate(
            model, options.optimizer, load, kept, checkpointing=checkpointing, held_out=held_out, shards=shards
        )

    def fits(memory: Memory) -> bool:
        return not processes.total(memory.needed > memory.available)[0]

    memory = take(load, chosen == "on")
    if fits(memory):
        return chosen == "on", memory
    with_checkpointing = take(load, True)
    if chosen == "auto" and fits(with_checkpointing):
        return True, with_checkpointing
    lower = steps.tokens_per_batch
    while lower > 256 and not fits(take(load.within(lower), True)):
        lower //= 2
    enough = fits(take(load.within(lower), True))
    remedy = (
        f"--tokens-per-batch {lower} --activation-checkpointing on" if enough else "--adapter lora, or a smaller model"
    )
    raise TrainingError(f"the run does not fit into memory: {memory}", f"It would fit with {remedy}.")
