"""Checkpoints: to go on from one is never to have stopped, and what is not whole is passed over."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instil.errors import Interrupted, TrainingError
from instil.training import checkpoint as module
from instil.training.checkpoint import Checkpoints, differences
from instil.training.files import broken
from instil.training.loop import fit
from instil.training.options import TrainOptions

from .tiny import VOCABULARY, Witness, exchange, gpt2, llama, make_rows, one_thread, reader, trees_of, weights_of

STEPS = 9
TREES = trees_of(make_rows(40))
HELD_OUT = trees_of(make_rows(8, seed=1))
_DRAWN = np.random.default_rng(0)
UNLIKE = trees_of([[exchange(*_DRAWN.integers(1, VOCABULARY, (2, 7)).tolist())] for _ in range(8)])


def train(model, checkpoints=None, *, resume=None, until=None, held_out=HELD_OUT, witness=None, **options):
    """A run of nine steps; `until` asks it to stop after so many."""
    taken = witness or Witness()
    chosen = {"max_steps": STEPS, "tokens_per_step": 120, "learning_rate": 1e-2, "eval_every": 2, **options}
    with one_thread():
        return fit(
            reader(model),
            TREES,
            TrainOptions(**chosen),
            held_out=held_out,
            tokens_per_batch=64,
            seed=3,
            watchers=[taken],
            checkpoints=checkpoints,
            resume=resume,
            stopping=lambda: 15 if taken.told and getattr(taken.told[-1], "step", 0) >= (until or STEPS) else 0,
        )


def timeless(outcome):
    """What a run came to, but for how long it took."""
    steps = [(s.step, s.loss, s.learning_rate, s.grad_norm, s.tokens, s.trained_tokens) for s in outcome.history]
    return steps, [(e.step, e.eval_loss, e.best) for e in outcome.evaluations], outcome.best_step, outcome.stopped_early


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("made", [llama, lambda: gpt2(dropout=0.2)], ids=["llama", "dropout"])
@pytest.mark.parametrize("until", [1, 4, 7])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, made, until):
    whole = made()
    expected = train(whole)

    checkpoints = Checkpoints(tmp_path, every=100)
    with pytest.raises(Interrupted) as raised:
        train(made(), checkpoints, until=until)
    assert (raised.value.exit_code, raised.value.args[0].split(":")[0]) == (143, f"stopped after step {until}")

    resumed, witness = made(), Witness()
    with torch.no_grad():
        for each in resumed.parameters():
            each.zero_()  # all of it comes from the checkpoint
    found, passed = checkpoints.newest()
    assert (found.step, passed) == (until, [])
    outcome = train(resumed, resume=found, witness=witness)
    assert timeless(outcome) == timeless(expected)
    assert same(weights_of(resumed), weights_of(whole))
    assert [each.step for each in witness.told[1:] if hasattr(each, "loss")] == list(range(until + 1, STEPS + 1))
    assert [each.seconds for each in outcome.history] == sorted(each.seconds for each in outcome.history)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_the_state_of_every_optimizer_is_in_it(tmp_path, optimizer):
    whole, checkpoints = llama(), Checkpoints(tmp_path, every=100)
    expected = train(whole, optimizer=optimizer)
    with pytest.raises(Interrupted):
        train(llama(), checkpoints, until=4, optimizer=optimizer)
    resumed = llama(seed=1)
    outcome = train(resumed, resume=checkpoints.newest()[0], optimizer=optimizer)
    assert timeless(outcome) == timeless(expected)
    assert same(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("until", [2, 4, 7])
def test_the_best_weights_and_patience_are_kept(tmp_path, until):
    """What is learned is of no use on rows of another kind: their loss soon rises."""
    options = {"held_out": UNLIKE, "learning_rate": 0.03, "eval_every": 1, "patience": 6, "schedule": "constant"}
    whole = llama()
    expected = train(whole, **options)
    assert expected.stopped_early
    assert (expected.best_step, expected.steps) == (2, 8)

    checkpoints = Checkpoints(tmp_path, every=100)
    with pytest.raises(Interrupted):
        train(llama(), checkpoints, until=until, **options)
    resumed = llama(seed=1)
    assert timeless(train(resumed, resume=checkpoints.newest()[0], **options)) == timeless(expected)
    assert same(weights_of(resumed), weights_of(whole))


def test_a_run_that_had_ended_ends_again_alike(tmp_path):
    """It was killed while its output was written."""
    whole, checkpoints = llama(), Checkpoints(tmp_path)
    expected = train(whole, checkpoints)
    resumed = llama(seed=1)
    assert timeless(train(resumed, checkpoints, resume=checkpoints.newest()[0])) == timeless(expected)
    assert same(weights_of(resumed), weights_of(whole))


def test_only_what_trains_is_in_it(tmp_path):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    train(model, Checkpoints(tmp_path, every=100), held_out=())
    (folder,) = tmp_path.iterdir()
    assert sorted({path.suffix for path in folder.iterdir()}) == [".json", ".jsonl", ".safetensors"]
    held = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    states = {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert held.keys() == {f"model.{name}" for name in trained} | states
    assert same({name: held[f"model.{name}"] for name in trained}, {n: weights_of(model)[n] for n in trained})


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [8, 9]), (3, [6, 8, 9]), (0, [])])
def test_the_newest_are_kept(tmp_path, keep, left):
    (tmp_path / ".step-00000002").mkdir()  # of a run that was killed
    train(llama(), Checkpoints(tmp_path, keep=keep, every=2), held_out=())
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in left]
    assert not keep or not list(tmp_path.glob(".*"))


def test_an_older_one_goes_only_when_the_new_one_was_read_back(tmp_path, monkeypatch):
    checked = []

    def look(folder):
        checked.append((folder.name, sorted(path.name for path in tmp_path.iterdir())))
        return "it is not" if folder.name == "step-00000006" else broken(folder)

    monkeypatch.setattr(module, "broken", look)
    with pytest.raises(TrainingError, match=r"step-00000006: .* not what it should be: it is not"):
        train(llama(), Checkpoints(tmp_path, keep=1, every=3), held_out=())
    assert checked == [("step-00000003", ["step-00000003"]), ("step-00000006", ["step-00000003", "step-00000006"])]
    assert not broken(tmp_path / "step-00000003")


@pytest.fixture
def three(tmp_path):
    """The folder of a run with three checkpoints."""
    train(llama(), Checkpoints(tmp_path, keep=3, every=3), held_out=())
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": (lambda folder: flip(next(folder.glob("*.safetensors"))), r"\.safetensors is not as it was written"),
    "a file": (lambda folder: next(folder.glob("*.safetensors")).unlink(), r"\.safetensors is missing"),
    "an end": (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"1"), "has 1 bytes, not "),
    "the state": (lambda folder: (folder / "state.json").write_text("{}"), "state.json has 2 bytes"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"a'), "manifest.json cannot be read"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_that_is_not_whole_is_named_and_passed_over(three, damage):
    harm, said = DAMAGE[damage]
    harm(three / "step-00000009")
    found, (passed,) = Checkpoints(three).newest()
    assert found.step == 6
    assert passed.startswith(f"{three}/step-00000009: ")
    assert re.search(said, passed)
    outcome = train(llama(), Checkpoints(three, keep=1, every=3), resume=found, held_out=())
    assert outcome.steps == STEPS
    assert [path.name for path in three.iterdir()] == ["step-00000009"]
    assert not broken(three / "step-00000009")


def test_none_is_whole(three):
    for folder in three.iterdir():
        flip(next(folder.glob("*.safetensors")))
    found, passed = Checkpoints(three).newest()
    assert found is None
    assert [line.split(":")[0][-1] for line in passed] == ["9", "6", "3"]
    assert Checkpoints(three / "none").newest() == (None, [])


def test_a_later_one_that_was_passed_over_outlives_no_new_one(three):
    flip(next((three / "step-00000009").glob("*.safetensors")))
    shutil.rmtree(three / "step-00000006")
    found, _ = Checkpoints(three).newest()
    assert found.step == 3
    with pytest.raises(Interrupted):
        train(llama(), Checkpoints(three, keep=1, every=100), resume=found, until=4, held_out=())
    assert [path.name for path in three.iterdir()] == ["step-00000004"]


def test_large_states_stand_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FILE", 20_000)
    whole, checkpoints = llama(), Checkpoints(tmp_path, every=100)
    with pytest.raises(Interrupted):
        train(llama(), checkpoints, until=5)
    assert len(list(tmp_path.glob("step-00000005/*.safetensors"))) > 5
    resumed = llama(seed=1)
    assert timeless(train(resumed, resume=checkpoints.newest()[0])) == timeless(train(whole))
    assert same(weights_of(resumed), weights_of(whole))


def test_what_differs_between_two_runs():
    assert differences({"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [1, 3], "d": 0}) == ["b", "d"]


def test_what_the_run_is_made_of_is_kept(tmp_path):
    train(llama(), Checkpoints(tmp_path, made_of={"seed": 3, "data": "abc"}), held_out=())
    found, _ = Checkpoints(tmp_path).newest()
    assert found.made_of == {"seed": 3, "data": "abc"}
    assert json.loads((found.folder / "state.json").read_text())["step"] == found.step == STEPS
