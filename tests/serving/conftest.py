"""The real server on a real port: `instil serve` with a model tuned from the bundled one."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest

import instil
from instil.pocket import data_folder, model_folder


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """The bundled model under ChatML, after so few steps that it takes seconds: it ends answers, and knows little."""
    folder = tmp_path_factory.mktemp("served") / "tuned"
    lines = (data_folder() / "train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    instil.train(
        instil.TrainConfig(
            model=str(model_folder()),
            template="chatml",
            data=[str(rows)],
            output=folder,
            max_steps=8,
            learning_rate=2e-3,
            keep_checkpoints=0,
            precision="fp32",
        )
    )
    return folder


@contextmanager
def serving(model, *flags, threads=2, **env):
    """A server; its address, its process, and a client for it."""
    command = [sys.executable, "-m", "instil", "serve", "--model", str(model), "--port", "0", *map(str, flags)]
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **env}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **own})
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            found = re.search(r"serving at (http://\S+?)[; ]", line)
            if found:
                break
        else:
            raise AssertionError("".join(said))
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield SimpleNamespace(url=found[1], process=process, client=client, said="".join(said))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stderr.close()


@pytest.fixture(scope="session")
def served(tuned, tmp_path_factory):
    """One server for all tests that leave it as it was: tuned and base, recording what says store: true."""
    record = tmp_path_factory.mktemp("recorded")
    with serving(
        tuned, "--base", model_folder(), "--record", record, "--precision", "fp32", "--name", "tuned"
    ) as found:
        found.record = record
        yield found
