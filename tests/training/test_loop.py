"""The loop against transformers and plain torch, and its promises as equalities: same steps, same run, best weights."""

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.training.events import Evaluation, Resolved, Step
from instil.training.loop import fit
from instil.training.options import TrainOptions
from instil.training.steps import Steps

from .tiny import (
    VOCABULARY,
    Row,
    Witness,
    exchange,
    furthest,
    gpt2,
    llama,
    make_rows,
    naive_loss,
    one_thread,
    reader,
    trees_of,
    weights_of,
)


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


def decays_in_gpt2(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def decays_in_llama(name: str) -> bool:
    return name.endswith(("proj.weight", "lm_head.weight"))


def naive_run(model, rows: Sequence[Row], steps: Sequence[list[int]], rates, decays, decay, limit):
    """Each step by transformers, row by row, and torch's plain AdamW; the losses and the norms of the gradients."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in named if decays(name)], "weight_decay": decay},
        {"params": [each for name, each in named if not decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)
    model.eval()  # no dropout
    losses, norms = [], []
    for step, rate in zip(steps, rates, strict=True):
        optimizer.zero_grad()
        loss = naive_loss(model, [each for row in step for each in rows[row]])
        loss.backward()
        norm = torch.cat([each.grad.flatten() for _, each in named if each.grad is not None]).norm()
        for _, each in named:
            if limit is not None and each.grad is not None:
                each.grad *= min(1.0, limit / (float(norm) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    return losses, norms


def planned(trees, options: TrainOptions, budget: int, steps: int, seed: int = 0) -> list[list[int]]:
    """The rows of each step of a run."""
    cut = Steps.of(trees, options.tokens_per_step, budget, "off", seed)
    epochs = -(-steps // cut.per_epoch)
    return [step.tolist() for epoch in range(epochs) for step in cut.rows(epoch)][:steps]


@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("share", ["on", "off"])
def test_a_run_is_what_transformers_and_torch_compute(share, prompt_weight, limit):
    rows = make_rows(16, prompt_weight=prompt_weight, branches=2, system=5)
    trees = trees_of(rows)
    ours, theirs = gpt2().double(), gpt2().double()
    options = TrainOptions(
        tokens_per_step=250, epochs=2, learning_rate=3e-3, warmup=0.2, weight_decay=0.1, max_grad_norm=limit
    )
    outcome = fit(reader(ours), trees, options, tokens_per_batch=64, share_prefixes=share)
    steps = planned(trees, options, 64, outcome.steps)
    assert outcome.steps == 2 * Steps.of(trees, 250, 64, "off", 0).per_epoch >= 4
    rates = [step.learning_rate for step in outcome.history]
    losses, norms = naive_run(theirs, rows, steps, rates, decays_in_gpt2, 0.1, limit)
    assert [step.loss for step in outcome.history] == pytest.approx(losses, abs=1e-10)
    assert [step.grad_norm for step in outcome.history] == pytest.approx(norms, abs=1e-9)
    assert min(norms) > 0.5, "clipping is at work"
    assert furthest(weights_of(ours), weights_of(theirs)) < 1e-9
    assert furthest(weights_of(ours), weights_of(gpt2().double())) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_llama(tied):  # whose norms compute in float32
    rows = make_rows(16, branches=2, system=5)
    trees = trees_of(rows)
    ours, theirs = llama(tied=tied).double(), llama(tied=tied).double()
    options = TrainOptions(tokens_per_step=250, max_steps=4, learning_rate=3e-3, weight_decay=0.1, warmup=0.0)
    outcome = fit(reader(ours), trees, options, tokens_per_batch=64, share_prefixes="on")
    steps = planned(trees, options, 64, outcome.steps)
    rates = [step.learning_rate for step in outcome.history]
    losses, _ = naive_run(theirs, rows, steps, rates, decays_in_llama, 0.1, 1.0)
    assert [step.loss for step in outcome.history] == pytest.approx(losses, abs=1e-6)
    assert furthest(weights_of(ours), weights_of(theirs)) < 1e-5


def test_the_split_into_micro_batches_changes_nothing():
    trees = trees_of(make_rows(24, branches=2, system=6))  # a step holds all of them
    found = {}
    for budget in (40, 75, 200, 5000):
        for share in ("on", "off", "auto"):
            model, witness = gpt2().double(), Witness()
            options = TrainOptions(tokens_per_step=5000, max_steps=4, learning_rate=3e-3)
            outcome = fit(
                reader(model), trees, options, tokens_per_batch=budget, share_prefixes=share, watchers=[witness]
            )
            found[budget, share] = [step.loss for step in outcome.history], weights_of(model)
    losses, weights = found[5000, "off"]
    assert losses[-1] < losses[0]
    for other, moved in found.values():
        assert other == pytest.approx(losses, abs=1e-10)
        assert furthest(moved, weights) < 1e-10


def test_a_model_that_reads_path_by_path_trains_alike():
    trees = trees_of(make_rows(12, branches=3, system=4))
    options = TrainOptions(tokens_per_step=300, max_steps=4, learning_rate=3e-3)
    alone, together = gpt2().double(), gpt2().double()
    one = fit(TreeModel(alone, one_by_one="to see"), trees, options, tokens_per_batch=100, share_prefixes="on")
    other = fit(reader(together), trees, options, tokens_per_batch=100, share_prefixes="on")
    assert [step.loss for step in one.history] == pytest.approx([step.loss for step in other.history], abs=1e-10)
    assert furthest(weights_of(alone), weights_of(together)) < 1e-10


@pytest.mark.parametrize("share", ["on", "off"])
def test_a_step_counts_its_tokens(share):
    rows = make_rows(20, branches=2, system=6, prompt_weight=0.5)
    rows[:1] = without_weight(rows[:1])
    trees = trees_of(rows)
    options = TrainOptions(tokens_per_step=300, max_steps=3)
    outcome = fit(reader(gpt2()), trees, options, tokens_per_batch=2000, share_prefixes=share)
    steps = planned(trees, options, 2000, 3)
    for step, found in zip(steps, outcome.history, strict=True):  # one micro-batch each
        exchanges = [each for row in step for each in rows[row]]
        inputs = {
            (row if share == "off" else None, *ids[:end])
            for row in step
            for each in rows[row]
            for ids in [(*each.prompt_ids.tolist(), *each.completion_ids.tolist())]
            for end in range(1, len(ids))
        }  # each the path to a token; within a row they share in any case
        assert found.tokens == len(inputs)
        weights = [np.append(each.prompt_weights, each.completion_weights)[1:] for each in exchanges]
        assert found.trained_tokens == sum(int((each > 0).sum()) for each in weights)
    began = [0.0, *(step.seconds for step in outcome.history)]
    for before, found in zip(began, outcome.history, strict=False):
        assert found.seconds > before
        assert found.tokens_per_second >= found.tokens / (found.seconds - before)


@pytest.mark.parametrize(
    ("chosen", "epochs"),
    [({"max_steps": 5}, None), ({"epochs": 0.5}, 0.5), ({"epochs": 1.6}, 1.6), ({"epochs": 1e-9}, 0)],
)
def test_the_number_of_steps(chosen, epochs):
    trees = trees_of(make_rows(40))
    per_epoch = Steps.of(trees, 60, 100, "auto", 0).per_epoch
    witness = Witness()
    outcome = fit(
        reader(gpt2()), trees, TrainOptions(tokens_per_step=60, **chosen), tokens_per_batch=100, watchers=[witness]
    )
    expected = 5 if epochs is None else max(1, round(epochs * per_epoch))
    assert per_epoch > 8
    assert outcome.steps == len(outcome.history) == witness.resolved.steps == expected
    assert [step.step for step in outcome.history] == list(range(1, expected + 1))
    assert witness.resolved.epochs == pytest.approx(expected / per_epoch)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_of_each_step(schedule):
    options = TrainOptions(tokens_per_step=60, max_steps=10, learning_rate=3e-4, warmup=0.25, schedule=schedule)
    witness = Witness()
    outcome = fit(reader(gpt2()), trees_of(make_rows(20)), options, tokens_per_batch=100, watchers=[witness])
    falling = {
        "cosine": [(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)],
        "linear": [1 - step / 8 for step in range(8)],
        "constant": [1.0] * 8,
    }[schedule]
    assert witness.resolved.settings["warmup_steps"] == 2
    expected = [3e-4 * part for part in [1 / 3, 2 / 3, *falling]]
    assert [step.learning_rate for step in outcome.history] == pytest.approx(expected)


def without_weight(rows: list[Row]) -> list[Row]:
    return [[replace(each, completion_weights=0 * each.completion_weights) for each in row] for row in rows]


def strange_rows(part: float) -> list[Row]:
    """Rows in whose answers a part of the tokens is one that `make_rows` has not: they get worse as it is learned."""
    rng = np.random.default_rng(5)

    def strange(answer):
        return np.where(rng.random(len(answer)) < part, 63, answer).astype(np.int32)

    return [
        [replace(each, completion_ids=strange(each.completion_ids)) for each in row] for row in make_rows(10, seed=5)
    ]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (8, 3, [0, 3, 6, 8]),
        (6, 3, [0, 3, 6]),
        (4, 9, [0, 4]),
        (20, None, list(range(0, 21, 2))),
        (3, None, [0, 1, 2, 3]),
    ],
)
def test_evaluations(steps, every, expected):
    held_out = make_rows(6, seed=9, branches=2, prompt_weight=0.5)
    model = gpt2(dropout=0.1).double()
    naive = []

    def measure(evaluation: Evaluation) -> None:
        with torch.no_grad():
            naive.append(float(naive_loss(model.eval(), [each for row in held_out for each in row])))

    witness = Witness(on_evaluation=measure)
    options = TrainOptions(tokens_per_step=60, max_steps=steps, learning_rate=3e-3, eval_every=every)
    outcome = fit(
        reader(model),
        trees_of(make_rows(20)),
        options,
        held_out=trees_of(held_out),
        tokens_per_batch=50,
        watchers=[witness],
    )
    assert [each.step for each in outcome.evaluations] == expected
    assert [each.eval_loss for each in outcome.evaluations] == pytest.approx(naive, abs=1e-12)
    lowest = [naive[at] == min(naive[: at + 1]) for at in range(len(naive))]
    assert [each.best for each in outcome.evaluations] == lowest
    told = [("step", each.step) if isinstance(each, Step) else ("evaluation", each.step) for each in witness.told[1:]]
    in_order = [("evaluation", 0)]
    for step in range(1, steps + 1):
        in_order += [("step", step), *([("evaluation", step)] if step in expected else [])]
    assert isinstance(witness.told[0], Resolved)
    assert told == in_order
    assert [each for each in witness.told if isinstance(each, Step)] == outcome.history
    assert [each for each in witness.told if isinstance(each, Evaluation)] == outcome.evaluations


def run_with_snapshots(rate: float, held_out, **options):
    model, snapshots = gpt2(), {}
    witness = Witness(on_evaluation=lambda each: snapshots.update({each.step: weights_of(model)}))
    outcome = fit(
        reader(model),
        trees_of(make_rows(20)),
        TrainOptions(tokens_per_step=60, learning_rate=rate, schedule="constant", warmup=0, eval_every=1, **options),
        held_out=trees_of(held_out),
        tokens_per_batch=100,
        watchers=[witness],
    )
    return model, snapshots, outcome


@pytest.mark.parametrize("which", ["first", "between", "last"])
def test_the_best_weights_are_put_back(which):
    held_out = {"first": strange_rows(1.0), "between": strange_rows(0.3), "last": make_rows(20)}[which]
    model, snapshots, outcome = run_with_snapshots(5e-3, held_out, max_steps=12)
    losses = [each.eval_loss for each in outcome.evaluations]
    best = losses.index(min(losses))
    assert {"first": best == 0, "between": 0 < best < 12, "last": best == 12}[which]
    assert outcome.steps == 12
    assert outcome.best_step == (None if which == "last" else best)
    assert not outcome.stopped_early
    assert not model.training
    found = weights_of(model)
    for name, expected in snapshots[best].items():
        assert torch.equal(found[name], expected)
    if which != "last":
        assert furthest(found, snapshots[12]) > 1e-3


def test_patience():
    _, _, whole = run_with_snapshots(5e-3, strange_rows(0.3), max_steps=30)
    losses = [each.eval_loss for each in whole.evaluations]
    for patience in (1, 3):
        waited, best = 0, losses[0]
        last = 0
        while waited < patience:
            last += 1
            waited = 0 if losses[last] < best else waited + 1
            best = min(best, losses[last])
        assert 1 < last < 30
        model, snapshots, outcome = run_with_snapshots(5e-3, strange_rows(0.3), max_steps=30, patience=patience)
        assert outcome.stopped_early
        assert outcome.steps == last
        assert [each.loss for each in outcome.history] == [each.loss for each in whole.history[:last]]
        assert outcome.best_step == losses.index(best) == last - patience
        assert furthest(weights_of(model), snapshots[outcome.best_step]) == 0


def dropped_out(seed: int = 0, dropout: float = 0.1, rows=None, **more):
    model = gpt2(dropout=dropout)
    torch.manual_seed(torch.seed() % 1000)  # a run must not depend on it
    options = TrainOptions(tokens_per_step=100, max_steps=6, learning_rate=3e-3, **more)
    outcome = fit(
        reader(model),
        trees_of(make_rows(20, branches=2)),
        options,
        held_out=trees_of(rows or []),
        tokens_per_batch=60,
        share_prefixes="on",
        seed=seed,
    )
    return [step.loss for step in outcome.history], weights_of(model)


def test_a_run_is_the_same_for_the_same_seed():
    losses, weights = dropped_out()
    again, same = dropped_out()
    assert losses == again
    assert furthest(weights, same) == 0
    other, _ = dropped_out(seed=1)
    assert not set(losses) & set(other)
    without, _ = dropped_out(dropout=0.0)
    assert not set(losses) & set(without), "dropout is at work"


def test_to_evaluate_changes_no_step():
    losses, _ = dropped_out()
    evaluated, _ = dropped_out(rows=make_rows(5, seed=3), eval_every=1)
    assert losses == evaluated


def test_to_compute_activations_again_changes_nothing():
    losses, weights = dropped_out(activation_checkpointing="off")
    again, same = dropped_out(activation_checkpointing="on")
    assert again == pytest.approx(losses, abs=1e-6)
    assert furthest(weights, same) < 1e-5


def test_what_is_frozen_stays_and_all_else_moves():
    model = gpt2()
    for name, each in model.named_parameters():
        each.requires_grad = ".h.1." in name
    before = weights_of(model)
    options = TrainOptions(tokens_per_step=100, max_steps=3, learning_rate=1e-3, weight_decay=0.5)
    fit(reader(model), trees_of(make_rows(20)), options, tokens_per_batch=100)
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) == (".h.1." not in name), name


def test_an_adapter_trains_alone():
    from peft import LoraConfig, get_peft_model

    def adapted():
        config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
            return get_peft_model(gpt2().double(), config, autocast_adapter_dtype=False)

    rows = make_rows(16, branches=2)
    trees = trees_of(rows)
    torch.manual_seed(1)
    ours = adapted()
    theirs = copy.deepcopy(ours)
    before = weights_of(ours)
    options = TrainOptions(tokens_per_step=200, max_steps=3, warmup=0, weight_decay=0.1)
    outcome = fit(reader(ours), trees, options, tokens_per_batch=60)
    rates = [step.learning_rate for step in outcome.history]
    assert rates[0] == 2e-4
    losses, _ = naive_run(theirs, rows, planned(trees, options, 60, 3), rates, lambda name: True, 0.1, 1.0)
    assert [step.loss for step in outcome.history] == pytest.approx(losses, abs=1e-10)
    assert furthest(weights_of(ours), weights_of(theirs)) < 1e-10
    for name, each in ours.named_parameters():
        assert torch.equal(each, before[name]) == ("lora_" not in name), name


def test_every_watcher_is_told_the_same():
    witnesses = [Witness(), Witness()]
    options = TrainOptions(tokens_per_step=100, max_steps=3, eval_every=2)
    fit(
        reader(gpt2()),
        trees_of(make_rows(20)),
        options,
        held_out=trees_of(make_rows(3, seed=1)),
        tokens_per_batch=100,
        watchers=witnesses,
    )
    assert [type(each) for each in witnesses[0].told] == [
        Resolved,
        *(Evaluation, Step, Step, Evaluation, Step, Evaluation),
    ]
    assert all(one is other for one, other in zip(witnesses[0].told, witnesses[1].told, strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_before_it_harms(what):
    model, last = gpt2(), {}

    def break_it(step: Step) -> None:
        if step.step == 2 and what == "loss":
            with torch.no_grad():
                model.transformer.ln_f.bias[0] = torch.nan
        elif step.step == 2:
            model.transformer.ln_f.bias.register_hook(lambda gradient: gradient * torch.inf)
        last.update(weights_of(model))

    witness = Witness(on_step=break_it)
    options = TrainOptions(tokens_per_step=100, max_steps=5)
    with pytest.raises(TrainingError, match="step 3: the loss is"):
        fit(reader(model), trees_of(make_rows(20)), options, tokens_per_batch=100, watchers=[witness])
    assert len(witness.told) == 3
    for name, each in model.named_parameters():
        assert torch.equal(each.nan_to_num(7.0), last[name].nan_to_num(7.0)), name


def poisoned():
    """A model that knows no number for the token 5, and rows of which the eighth begins with it."""
    model = llama()
    model.model.embed_tokens.register_forward_hook(
        lambda _, ids, found: found.masked_fill(ids[0][..., None] == 5, torch.nan)
    )
    rows = make_rows(20)
    rows[7] = [exchange([5, 1, 4], [9, 16, 0])]
    return model, trees_of(rows)


def test_steps_without_a_number_are_skipped_and_counted_if_that_is_wished():
    model, trees = poisoned()
    seen = {0: weights_of(model)}
    witness = Witness(on_step=lambda step: seen.update({step.step: weights_of(model)}))
    options = TrainOptions(tokens_per_step=100, epochs=2, on_nonfinite="skip", max_nonfinite=2)
    outcome = fit(reader(model), trees, options, tokens_per_batch=40, watchers=[witness])
    cut = Steps.of(trees, 100, 40, "auto", 0)
    planned = [rows.tolist() for epoch in range(2) for rows in cut.rows(epoch)]
    expected = [number for number, rows in enumerate(planned, 1) if 7 in rows]
    assert [step.step for step in outcome.history if not step.taken] == expected
    assert len(expected) == 2 < outcome.steps
    for number in range(1, outcome.steps + 1):
        pairs = [(seen[number - 1][name], seen[number][name]) for name in seen[0]]
        unchanged = all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in pairs)
        assert unchanged == (number in expected), number


def test_weights_that_the_last_step_breaks_are_not_kept():
    options = TrainOptions(tokens_per_step=100, max_steps=1, learning_rate=1e300, warmup=0.0)
    with pytest.raises(TrainingError, match=r"after step 1 .* trained weights are no finite numbers"):
        fit(reader(llama()), trees_of(make_rows(20)), options, tokens_per_batch=100)


def test_rows_longer_than_the_learned_positions_are_refused():
    rows = [*make_rows(3), [exchange([1] * 100, [4] * 30)]]
    with pytest.raises(TrainingError, match="row 3: is longer than the 128 positions that the model has learned"):
        fit(reader(gpt2()), trees_of(rows), TrainOptions(max_steps=1), tokens_per_batch=200)
    held_out = trees_of(rows)
    with pytest.raises(TrainingError, match="row 3: is longer than the 128 positions"):
        fit(reader(gpt2()), trees_of(make_rows(3)), TrainOptions(max_steps=1), held_out=held_out, tokens_per_batch=200)
    fit(reader(llama()), trees_of(rows), TrainOptions(max_steps=1), tokens_per_batch=200)  # which has no table of them


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip", "max_nonfinite": 1}])
def test_the_rows_of_a_loss_without_a_number_are_named(options):
    model, trees = poisoned()
    with pytest.raises(TrainingError) as raised:
        fit(reader(model), trees, TrainOptions(tokens_per_step=100, epochs=2, **options), tokens_per_batch=40)
    said = raised.value.message
    named = [int(each) for each in re.findall(r"row (\d+)", said)]
    assert 7 in named
    assert sum(trees[each].size for each in named) <= 40, "those of one micro-batch"
    assert ("and so were 1 steps before" in said) == bool(options)


def test_an_id_beyond_the_embeddings_is_refused_with_its_row():
    rows = make_rows(6)
    rows[4] = [exchange([1, VOCABULARY], [4, 0])]
    with pytest.raises(TrainingError, match=f"row 4: holds the token id {VOCABULARY}, .* {VOCABULARY} embeddings"):
        fit(reader(llama()), trees_of(rows), TrainOptions(), tokens_per_batch=100)


_SHORT_OF_MEMORY = """
import resource, sys
import torch
from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.training.loop import fit
from instil.training.options import TrainOptions
from instil.training.events import Resolved
from transformers import LlamaConfig, LlamaForCausalLM
import numpy as np
from instil.packing import TokenTree
from instil.prompt.exchange import Exchange

config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
ids, weights = np.ones(6000, np.int32), np.ones(6000, np.float32)
row = Exchange("", "", ids[:10], weights[:10] * 0, ids, weights, "compared")
model = TreeModel(LlamaForCausalLM(config), one_by_one="")

class Limit:
    def started(self, resolved):
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20),) * 2)
    def stepped(self, step): pass
    def evaluated(self, evaluation): pass

trees = [TokenTree.from_exchanges([row])]
held_out = trees if sys.argv[1] == "held-out rows" else ()
try:
    fit(model, trees, TrainOptions(max_steps=1), held_out=held_out, tokens_per_batch=8192, watchers=[Limit()])
except TrainingError as error:
    print(error)
"""


@pytest.mark.prove
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.parametrize("place", ["step 1", "held-out rows"])
def test_memory_that_runs_out_names_the_batch_and_what_to_lower(place):
    done = subprocess.run([sys.executable, "-c", _SHORT_OF_MEMORY, place], capture_output=True, text=True)
    assert re.match(
        rf"{place}: memory ran out on a batch of 6,009 tokens \(1 exchanges, the longest of 6,009 tokens, 6,000 targets"
        r"\)\n"
        r"  Lower --tokens-per-batch, .* or turn on --activation-checkpointing on\.",
        done.stdout,
    ), done.stdout + done.stderr[-2000:]


def test_nothing_to_train():
    model = gpt2().requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        fit(reader(model), trees_of(make_rows(3)), TrainOptions(), tokens_per_batch=100)
    weightless = without_weight(make_rows(3))
    with pytest.raises(TrainingError, match="no token of any row has a weight"):
        fit(reader(gpt2()), trees_of(weightless), TrainOptions(), tokens_per_batch=100)


def test_no_rows_to_train():
    with pytest.raises(TrainingError):
        fit(reader(gpt2()), [], TrainOptions(), tokens_per_batch=100)


def test_held_out_rows_without_a_weight():
    weightless = without_weight(make_rows(3))
    with pytest.raises(TrainingError):
        fit(
            reader(gpt2()),
            trees_of(make_rows(5)),
            TrainOptions(max_steps=1),
            held_out=trees_of(weightless),
            tokens_per_batch=100,
        )


def test_only_some_rows():
    trees = trees_of(make_rows(20))
    some = np.array([3, 4, 11, 17])
    alone = gpt2().double()
    among = gpt2().double()
    options = TrainOptions(tokens_per_step=5000, max_steps=3, learning_rate=3e-3)
    one = fit(reader(among), trees, options, rows=some, tokens_per_batch=50)
    other = fit(reader(alone), [trees[row] for row in some], options, tokens_per_batch=50)
    assert [step.loss for step in one.history] == pytest.approx([step.loss for step in other.history], abs=1e-12)
    assert furthest(weights_of(among), weights_of(alone)) < 1e-12
