"""`torchrun -m instil train` with two processes: the same steps as one, and what becomes of them when one is gone."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from instil.packing import TokenTree
from instil.prompt.exchange import Exchange
from instil.training.distributed import Processes
from instil.training.metrics import read_metrics

from .small import environment, make_folder

ONE = [sys.executable, "-m", "instil"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "instil"]
SETTINGS = {
    "init": "base",
    "data": ["rows.jsonl"],
    "template": "chatml",
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_steps": 20,
    "tokens_per_step": 700,
    "tokens_per_batch": 300,
    "eval_fraction": 0.1,
    "eval_every": 7,
    "checkpoint_every": 8,
    "keep_checkpoints": 9,
    "precision": "fp32",
}
END = 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base model's configuration and tokenizer, rows, and the settings of a run."""
    root = tmp_path_factory.mktemp("distributed")
    make_folder(root, 60)
    (root / "run.yaml").write_text(json.dumps(SETTINGS))
    return root


def start(folder, command, *arguments):
    return subprocess.Popen(
        [*command, "train", "--config", "run.yaml", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment(folder),
    )


def run(folder, command, *arguments):
    process = start(folder, command, *arguments)
    said, _ = process.communicate(timeout=END)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def alone(folder):
    """What one process comes to."""
    run(folder, ONE, "--output", "alone")
    return folder / "alone"


def assert_same(one, other):
    """To 1e-5, in every loss and every weight."""
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-5
    (steps, evaluations), (more_steps, more_evaluations) = (
        read_metrics(each / "metrics.jsonl") for each in (one, other)
    )
    assert [each.step for each in steps] == [each.step for each in more_steps] == list(range(1, 21))
    assert np.abs(np.array([s.loss for s in steps]) - [s.loss for s in more_steps]).max() < 1e-5
    assert np.abs(np.array([s.grad_norm for s in steps]) - [s.grad_norm for s in more_steps]).max() < 1e-4
    assert [each.trained_tokens for each in steps] == [each.trained_tokens for each in more_steps]
    assert np.abs(np.array([e.eval_loss for e in evaluations]) - [e.eval_loss for e in more_evaluations]).max() < 1e-5


@pytest.mark.prove
@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["whole", "sharded"])
def test_two_processes_take_the_steps_of_one(folder, alone, how):
    output = folder / f"two{''.join(how)}"
    said = run(folder, TWO, "--output", output.name, *how)
    assert_same(alone, output)
    assert said.count("instil: wrote") == 1, "one speaks for both"
    assert re.search(rf"processes +2, each with {'a part' if how else 'all'} of the model", said)


@pytest.mark.prove
def test_the_best_weights_of_a_sharded_run_are_whole(folder):
    """Rows of another kind, on which the loss soon rises: the weights are not those of the last step."""
    unlike = [{"instruction": "zq xv " * number, "output": "qz jx kv " * number} for number in range(1, 9)]
    (folder / "unlike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlike))
    given = ["--eval-fraction", "0", "--eval-data", "unlike.jsonl", "--eval-every", "4", "--learning-rate", "1e-2"]
    for name, command, how in (("best-alone", ONE, []), ("best-shards", TWO, ["--shard"])):
        run(folder, command, "--output", name, "--max-steps", "16", *given, *how)
    alone, shards = (folder / name for name in ("best-alone", "best-shards"))
    steps = [json.loads((each / "instil.json").read_text())["outcome"]["best_step"] for each in (alone, shards)]
    assert steps[0] == steps[1] is not None
    weights, others = load_file(alone / "model.safetensors"), load_file(shards / "model.safetensors")
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4


@pytest.mark.prove
def test_a_run_goes_on_with_another_number_of_processes(folder, alone):
    run(folder, TWO, "--output", "sharded", "--shard")
    record = json.loads((folder / "sharded" / "instil.json").read_text())
    for name, command, how in (("to-one", ONE, []), ("to-two", TWO, []), ("to-shards", TWO, ["--shard"])):
        source = folder / ("sharded" if name != "to-shards" else "alone")
        subprocess.run(["cp", "-r", str(source), str(folder / name)], check=True)
        for left in (folder / name).glob("*.safetensors"):
            left.unlink()
        for later in ("step-00000016", "step-00000020"):
            subprocess.run(["rm", "-r", str(folder / name / "checkpoints" / later)], check=True)
        (folder / name / "instil.json").write_text(json.dumps({**record, "state": "interrupted"}))
        said = run(folder, command, "--output", name, "--resume", *how)
        assert re.search(r"resumed from +\S+step-00000008", said)
        assert_same(alone, folder / name)


def worker(process):
    """One of the processes that torchrun started."""
    found = [each for each in psutil.Process(process.pid).children(recursive=True) if "instil" in each.cmdline()]
    return found[-1]


def wait_for(process, path):
    end = time.monotonic() + END
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.prove
@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["whole", "sharded"])
def test_when_one_is_killed_the_other_says_so_within_a_minute(folder, how):
    output = folder / f"killed{''.join(how)}"
    process = start(folder, TWO, "--output", output.name, "--max-steps", "100000", *how)
    wait_for(process, output / "checkpoints" / "step-00000008")
    began = time.monotonic()
    worker(process).kill()
    said, _ = process.communicate(timeout=END)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert re.search(r"instil \(process \d\): another process has ended or cannot be reached: .*\n.*--resume", said), (
        said
    )


@pytest.mark.prove
def test_torchrun_asked_to_stop_saves_and_goes_on(folder, alone):
    output = folder / "asked"
    process = start(folder, TWO, "--output", output.name)
    wait_for(process, output / "checkpoints" / "step-00000008")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=END)
    assert re.search(r"stopped after step \d+: its state is in ", said), said
    run(folder, TWO, "--output", output.name, "--resume")
    assert_same(alone, output)


def exchange(length):
    ids = np.arange(length, dtype=np.int32)
    weights = np.ones(length, np.float32)
    return Exchange("", "", ids[:2], weights[:2] * 0, ids[2:], weights[2:], "compared")


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 3), (4, 2), (5, 3), (2, 5)])
def test_all_have_as_many_micro_batches_and_those_without_weigh_nothing(count, size):
    batches = [TokenTree.from_exchanges([exchange(6), exchange(4 + number)], record=number) for number in range(count)]
    shares = [Processes(rank, size).share(batches) for rank in range(size)]
    assert {len(share) for share in shares} == {-(-count // size)}
    weighing = [batch for share in shares for batch in share if batch.target_weights.any()]
    assert sorted(int(batch.exchange_record[0]) for batch in weighing) == list(range(count))
    for share in shares:
        for batch in share:
            assert batch in batches or (
                not batch.target_weights.any() and batch.exchanges == 1 and len(batch.target_ids)
            )
