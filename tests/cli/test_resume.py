"""Runs that are broken off, through the real command: asked to stop, killed, out of disk, a checkpoint corrupted."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from instil.training.metrics import read_metrics

from .small import environment, make_folder

SETTINGS = {
    "init": "base",
    "data": ["rows.jsonl"],
    "template": "chatml",
    "learning_rate": 3e-3,
    "max_steps": 24,
    "tokens_per_step": 512,
    "tokens_per_batch": 256,
    "eval_fraction": 0.1,
    "eval_every": 5,
    "checkpoint_every": 4,
    "precision": "fp32",
    "adapter": "lora",
    "lora_dropout": 0.1,
}
END = 300.0  # seconds in which whatever is waited for happens, or never


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base model's configuration and tokenizer, rows, and the settings of a run."""
    root = tmp_path_factory.mktemp("resume")
    make_folder(root, 60)
    (root / "run.yaml").write_text(json.dumps(SETTINGS))
    return root


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "instil", "train", "--config", "run.yaml", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment(folder),
    )


def run(folder, *arguments, code=0):
    process = start(folder, *arguments)
    said, _ = process.communicate(timeout=END)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def wait_for(process, happened):
    """Until something has happened, or the process has ended."""
    end = time.monotonic() + END
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.001)


def lines(output):
    try:
        return (output / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def weights(output):
    return {path.name: path.read_bytes() for path in sorted(output.rglob("*.safetensors")) if "step-" not in str(path)}


def measured(output):
    steps, evaluations = read_metrics(output / "metrics.jsonl")
    return [(s.step, s.loss, s.grad_norm, s.tokens) for s in steps], [(e.step, e.eval_loss) for e in evaluations]


def state(output):
    record = json.loads((output / "instil.json").read_text())
    return record["state"], record["ended"]


@pytest.fixture(scope="module")
def whole(folder):
    """The run that is never broken off."""
    run(folder, "--output", "whole")
    assert state(folder / "whole") == ("finished", None)
    return folder / "whole"


@pytest.mark.prove
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_once_it_saves_and_stops_and_goes_on_bit_for_bit(folder, whole, number, code):
    output = folder / number.name
    process = start(folder, "--output", output.name)
    wait_for(process, lambda: lines(output) > 7)
    process.send_signal(number)
    said, _ = process.communicate(timeout=END)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "once more ends it at once" in said
    at, saved = re.search(
        r"instil: stopped after step (\d+): its state is in (\S+)\n  Go on with --resume\.", said
    ).groups()
    assert (Path(saved).name, Path(saved).is_dir()) == (f"step-{int(at):08d}", True)
    assert len(measured(output)[0]) == int(at) < 24
    assert state(output)[0] == "interrupted"
    assert f"stopped after step {at}" in state(output)[1]
    assert not (output / "adapter_model.safetensors").exists()

    refused = run(folder, "--output", output.name, code=2)
    assert "a run is there that has not finished" in refused
    said = run(folder, "--output", output.name, "--resume")
    assert re.search(rf"resumed from +\S+step-{int(at):08d}", said)
    assert weights(output) == weights(whole)
    assert measured(output) == measured(whole)
    assert state(output) == ("finished", None)
    assert "has finished; nothing is left to do" in run(folder, "--output", output.name, "--resume", code=2)


@pytest.mark.prove
def test_asked_twice_it_leaves_at_once(folder):
    output = folder / "twice"
    many = folder / "many.jsonl"
    many.write_text((folder / "rows.jsonl").read_text() * 100)
    large = ["--data", many.name, "--tokens-per-step", "100000000", "--share-prefixes", "off"]
    process = start(folder, "--output", output.name, *large)
    wait_for(process, lambda: lines(output) > 0)  # the first evaluation; a step takes half a minute
    process.send_signal(signal.SIGTERM)
    said = "".join(iter_until(process, "once more ends it at once"))
    time.sleep(1.1)  # two within a second are one: torchrun passes on what the terminal has sent already
    process.send_signal(signal.SIGTERM)
    more, _ = process.communicate(timeout=END)
    assert process.returncode == 143, said + more
    assert more.endswith("instil: ended by a signal\n")
    assert state(output)[0] == "interrupted"
    assert lines(output) == 1


def iter_until(process, text):
    for line in process.stdout:
        yield line
        if text in line:
            return
    raise AssertionError(f"never said: {text}")


@pytest.mark.prove
def test_a_changed_run_is_refused_with_the_difference_unless_allowed(folder, whole):
    output = folder / "changed"
    process = start(folder, "--output", output.name)
    wait_for(process, lambda: (output / "checkpoints" / "step-00000004").exists())
    process.kill()
    process.communicate()
    assert state(output) == ("running", None)
    (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text() + '{"instruction": "Hi", "output": "Ho"}\n')
    changes = ["--learning-rate", "1e-3", "--data", "more.jsonl", "--workers", "1", "--resume", "--output", output.name]
    said = run(folder, *changes, code=2)
    assert re.search(
        r"instil: \S+step-\d+: the run has changed since:\n  data: \w+ then, \w+ now\n"
        r"  learning_rate: 0.003 then, 0.001 now\n"
        r"  Set them back, allow it with --allow-changed data learning_rate, or start anew",
        said,
    ), said
    assert "1 now" not in run(folder, *changes, "--allow-changed", "learning_rate", code=2).split("data:")[0]
    run(folder, *changes, "--allow-changed", "data", "learning-rate")
    assert measured(output) != measured(whole)


@pytest.mark.prove
def test_a_corrupted_checkpoint_is_named_and_the_one_before_is_taken(folder, whole):
    output = folder / "corrupted"
    process = start(folder, "--output", output.name)
    wait_for(process, lambda: (output / "checkpoints" / "step-00000012").exists())
    process.kill()
    process.communicate()
    newest, before = sorted((output / "checkpoints").glob("step-*"), reverse=True)[:2]
    broken = next(newest.glob("*.safetensors"))
    with broken.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\0\1\2")
    said = run(folder, "--output", output.name, "--resume")
    assert re.search(rf"passed over +\S+{newest.name}: {broken.name} is not as it was written", said)
    assert re.search(rf"resumed from +\S+{before.name}", said)
    assert weights(output) == weights(whole)
    assert measured(output) == measured(whole)


@pytest.mark.prove
def test_without_a_checkpoint_it_begins(folder, whole):
    assert "resumed" not in run(folder, "--output", "anew", "--resume")
    assert weights(folder / "anew") == weights(whole)


@pytest.mark.prove
def test_only_one_process_trains_in_a_folder(folder):
    output = folder / "locked"
    process = start(folder, "--output", output.name, "--max-steps", "100000")
    wait_for(process, lambda: lines(output) > 0)
    try:
        assert "another process trains there" in run(folder, "--output", output.name, "--resume", code=2)
        assert state(output) == ("running", None)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def small_disk(folder, size):
    """A file system that holds so much, where we may mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.prove
def test_a_full_disk_is_said_and_the_older_checkpoint_goes_on(folder, whole):
    with small_disk(folder / "disk", "64m"):
        output = folder / "disk" / "run"
        process = start(folder, "--output", output)
        wait_for(process, lambda: (output / "checkpoints" / "step-00000004").exists())
        with pytest.raises(OSError, match="No space left"):
            (output.parent / "filler").write_bytes(bytes(1 << 26))
        said, _ = process.communicate(timeout=END)
        assert process.returncode == 2, said
        assert "Traceback" not in said
        assert "No space left on device" in said
        assert not list((output / "checkpoints").glob(".*"))
        (output.parent / "filler").unlink()
        said = run(folder, "--output", output, "--resume")
        assert re.search(r"resumed from +\S+step-000000\d\d", said)
        assert weights(output) == weights(whole)
        assert measured(output) == measured(whole)


@pytest.mark.prove
def test_killed_at_any_moment_it_comes_to_the_same(folder, whole):
    """Twenty lives and more, each a process of its own, each killed at random: in the midst of saving as well."""
    draw, killed, while_saving = random.Random(0), 0, 0
    for number in range(100):
        output = folder / f"killed-{number}"
        while (ended := live(folder, output, draw)) is not None:
            killed += 1
            while_saving += ended
        assert weights(output) == weights(whole)
        assert measured(output) == measured(whole)
        if killed >= 20 and while_saving >= 3:
            return
    raise AssertionError(f"{killed} were killed, {while_saving} while they saved")


def live(folder, output, draw):
    """Go on with a run and kill it: whether it was saving, or None if it came to its end before."""
    process = start(folder, "--output", output.name, "--resume", "--checkpoint-every", "1")
    before = lines(output)
    target, saving, rest = before + draw.randrange(1, 10), draw.random() < 0.5, draw.uniform(0.0, 1.0)
    end = time.monotonic() + END

    def drafts():
        return list((output / "checkpoints").glob(".step-*"))

    while process.poll() is None and not (lines(output) >= target and (drafts() or not saving)):
        assert time.monotonic() < end
        time.sleep(0.0005)
    if not saving:
        time.sleep(rest)
    process.kill()
    said, _ = process.communicate(timeout=END)
    if process.returncode == -signal.SIGKILL and state(output)[0] != "finished":
        return bool(drafts())
    assert process.returncode in (0, -signal.SIGKILL), said
    return None
