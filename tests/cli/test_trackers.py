"""`--trackers` of the real command: a mistake is told before anything is loaded."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from instil.pocket import sample_data, save_sample_tokenizer
from instil.training.metrics import read_metrics

COMMON = ["train", "--model", "m", "--data", str(sample_data()[0]), "--output", "tuned"]


def test_a_name_that_is_no_tracker_is_answered_with_the_nearest(instil):
    told = instil(*COMMON, "--trackers", "mlflow", "tensorbord", code=2).stderr
    assert told.startswith("instil: --trackers tensorbord: must be ")
    assert "did you mean 'tensorboard'?" in told


def test_trackers_are_settings_as_others_are(instil):
    given = ["--trackers", "wandb", "mlflow", "--tracker-project", "ours", "--run-name", "first"]
    printed = instil(*COMMON, *given, "--print-config").stdout
    assert "trackers:\n- wandb\n- mlflow\ntracker_project: ours\nrun_name: first\n" in printed


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path):
    """The model named does not exist, which would be told next; and torch, which takes its time, is not loaded."""
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from instil.cli.main import main\n"
        f"try: main([*{COMMON!r}, '--trackers', 'tensorboard', 'wandb'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == (
        "instil: --trackers wandb: the package 'wandb' is not installed\n"
        "  pip install wandb, or all trackers: pip install 'instil[trackers]'.\n"
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.prove
def test_a_run_is_tracked_and_its_tracker_goes_on_when_it_is_resumed(instil, tmp_path, monkeypatch):
    """What TensorBoard and MLflow hold in the end is what stands in `metrics.jsonl`, and in one run each."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_sample_tokenizer(tmp_path / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=4096, **sizes).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes(b"".join(sample_data()[0].read_bytes().splitlines(keepends=True)[:40]))
    given = ["train", "--init", "base", "--data", "rows.jsonl", "--template", "chatml", "--output", "tuned"]
    given += ["--eval-fraction", "0.2", "--max-steps", "6", "--checkpoint-every", "2"]
    given += ["--trackers", "mlflow", "tensorboard"]
    store = (tmp_path / "mlflow").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    instil(*given)

    # As a run that was killed after its fifth step leaves its folder.
    tuned = tmp_path / "tuned"
    record = json.loads((tuned / "instil.json").read_text())
    (tuned / "instil.json").write_text(json.dumps({**record, "state": "running"}))
    shutil.rmtree(tuned / "checkpoints" / "step-00000006")
    instil(*given, "--resume")

    steps, evaluations = read_metrics(tuned / "metrics.jsonl")
    expected = {
        "loss": [(each.step, each.loss) for each in steps],
        "eval_loss": [(each.step, each.eval_loss) for each in evaluations],
    }
    events = EventAccumulator(str(tuned / "tensorboard"))
    events.Reload()
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("instil").experiment_id])
    assert run.info.status == "FINISHED"
    for name, series in expected.items():
        assert [each.step for each in events.Scalars(name)] == [step for step, _ in series]
        assert [each.value for each in events.Scalars(name)] == pytest.approx([value for _, value in series])
        assert dict(series) == {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
