"""The settings of `instil train` through the real command: help, YAML there and back, one clear error a mistake."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from instil.cli.progress import Progress
from instil.errors import UsageError
from instil.pocket import sample_data, save_sample_tokenizer
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Resolved, Step

DATA = str(sample_data()[0])
COMMON = ["--model", "m", "--data", DATA]


def test_help_names_every_setting(instil):
    shown = instil("train", "--help").stdout
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    for switch in ("--dry-run", "--print-config", "--print-schema"):
        assert switch in shown
        assert f"--no-{switch[2:]}" not in shown
    assert "--config FILE; flags override it" in shown
    listed = instil("--help").stdout
    assert "Tune a model on data." in listed
    assert "Show the tokens of rows" in listed


def test_settings_load_no_model_library():
    code = (
        "import sys\nfrom instil.cli.main import main\n"
        f"sys.argv = ['instil', 'train', '--model', 'm', '--data', {DATA!r}, '--print-config']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


EVERY_KIND = [
    *("--output", "tuned", "--learning-rate", "1e-5", "--epochs", "0.5", "--adapter", "lora", "--lora-rank", "4"),
    *("--lora-targets", "q_proj", "v_proj", "--no-cache", "--seed", "7", "--eval-fraction", "0.1", "--patience", "3"),
    *("--template", "chatml", "--columns", "instruction=question,output=é", "--max-length", "100"),
]


def test_printed_settings_are_taken_back(instil, tmp_path):
    arguments = '{"flag": false, "text": "false", "number": 3, "nested": {"one": 1, "list": ["1", null]}, "no": "[x"}'
    printed = instil("train", *COMMON, *EVERY_KIND, "--print-config").stdout
    (tmp_path / "run.yaml").write_text(printed)
    assert instil("train", "--config", "run.yaml", "--print-config").stdout == printed

    settings = yaml.safe_load(printed)
    assert settings["lora_targets"] == ["q_proj", "v_proj"]
    assert settings["columns"] == {"instruction": "question", "output": "é"}
    assert (settings["learning_rate"], settings["cache"], settings["output"]) == (1e-5, False, "tuned")
    assert "max_steps" not in settings, "what has no value is not printed"
    assert TrainConfig(**settings).model_dump(mode="json", exclude_defaults=True).items() <= settings.items()

    settings["template_args"] = json.loads(arguments)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    printed = instil("train", "--config", "run.yaml", "--print-config").stdout
    assert yaml.safe_load(printed)["template_args"] == json.loads(arguments)
    (tmp_path / "run.yaml").write_text(printed)
    assert instil("train", "--config", "run.yaml", "--print-config").stdout == printed


def test_on_and_off_are_words_and_nothing_can_be_said(instil, tmp_path):
    (tmp_path / "run.yaml").write_text("compile: off\nshare_prefixes: on\nmax_grad_norm: null\n")
    printed = instil("train", *COMMON, "--config", "run.yaml", "--print-config").stdout
    settings = yaml.safe_load(printed)
    assert (settings["compile"], settings["share_prefixes"], settings["max_grad_norm"]) == ("off", "on", None)
    (tmp_path / "again.yaml").write_text(printed)
    assert instil("train", "--config", "again.yaml", "--print-config").stdout == printed


def test_flags_override_the_file(instil, tmp_path):
    (tmp_path / "run.yaml").write_text(f"data: {DATA}\nmodel: m\nlearning-rate: 1e-5\ntemplate_args: {{order: spm}}\n")
    read = yaml.safe_load(instil("train", "--config", "run.yaml", "--seed", "5", "--print-config").stdout)
    assert (read["learning_rate"], read["seed"], read["template_args"]) == (1e-5, 5, {"order": "spm"})
    flags = ["--learning-rate", "1e-3", "--template-args", "order=psm"]
    read = yaml.safe_load(instil("train", "--config", "run.yaml", *flags, "--print-config").stdout)
    assert (read["learning_rate"], read["template_args"]) == (1e-3, {"order": "psm"})


def test_the_schema_knows_every_setting(instil):
    schema = json.loads(instil("train", "--print-schema").stdout)
    assert schema["properties"].keys() == TrainConfig.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert "required" not in schema
    assert schema["properties"]["schedule"]["enum"] == ["cosine", "linear", "constant"]
    assert schema["properties"]["data"]["type"] == ["array", "string"]
    assert all(setting["description"] for setting in schema["properties"].values())


@pytest.fixture
def places(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    save_sample_tokenizer(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")


OUT = ["--output", "tuned"]
MISTAKES = {
    "no data": (["--model", "m", *OUT], "--data: is missing\n  Name a file"),
    "nothing at all": ([], "--data: is missing"),
    "empty data": (["--model", "m", "--data", "", *OUT], "is empty (a shell variable"),
    "no model": (["--data", DATA, *OUT], "--model: is missing, and so is --init"),
    "two models": ([*COMMON, "--init", "whole", *OUT], "--model and --init exclude each other"),
    "empty model": (["--model", "", "--data", DATA, *OUT], "--model '': is empty (a shell variable"),
    "a new model without tokenizer": (["--init", "bare", "--data", DATA, *OUT], "--init bare: there is no tokenizer"),
    "no output": (COMMON, "--output: is missing"),
    "a file as output": ([*COMMON, "--output", "file"], "--output file: is a file"),
    "an output that is full": ([*COMMON, "--output", "full"], "the folder holds something (something)"),
    "an output in a file": ([*COMMON, "--output", "file/tuned"], "file is no folder"),
    "an output nowhere": ([*COMMON, "--output", "/proc/none/tuned"], "cannot be written"),
    "held out twice": (
        [*COMMON, *OUT, "--eval-data", DATA, "--eval-fraction", "0.1"],
        "--eval-data and --eval-fraction exclude each other",
    ),
    "patience with nothing": ([*COMMON, *OUT, "--patience", "2"], "--patience 2: there are no held-out rows"),
    "evaluating nothing": ([*COMMON, *OUT, "--eval-every", "2"], "--eval-every 2: there are no held-out rows"),
    "a rank of nothing": ([*COMMON, *OUT, "--lora-rank", "3"], "--lora-rank: says how a LoRA adapter is made"),
    "nothing to merge": ([*COMMON, *OUT, "--merge-adapter"], "--merge-adapter: there is no adapter to merge"),
    "an adapter on an adapter": (
        [*COMMON, *OUT, "--base-adapter", "keep", "--adapter", "lora"],
        "--base-adapter keep and --adapter lora exclude each other",
    ),
    "an adapter of a new model": (
        ["--init", "whole", "--data", DATA, *OUT, "--base-adapter", "keep"],
        "--base-adapter keep: a new model has no adapter",
    ),
    "muon and an adapter": (
        [*COMMON, *OUT, "--optimizer", "muon", "--adapter", "lora"],
        "--optimizer muon: makes steps of whole matrices orthogonal, and an adapter holds factors",
    ),
    "one standard input": (
        ["--model", "m", *OUT, "--data", "-", "--eval-data", "-"],
        "--data - and --eval-data -: there is one standard input",
    ),
    "a split model and another optimizer": (
        [*COMMON, *OUT, "--shard", "--optimizer", "muon"],
        "--shard and --optimizer muon exclude each other",
    ),
    "changes to nothing": ([*COMMON, *OUT, "--allow-changed", "data"], "--allow-changed: says what may differ"),
    "changes of nothing": (
        [*COMMON, *OUT, "--resume", "--allow-changed", "lerning-rate"],
        "--allow-changed lerning_rate: there is no such setting\n  did you mean 'learning_rate'?",
    ),
    "two things to print": (
        [*COMMON, "--dry-run", "--print-config"],
        "--dry-run and --print-config exclude each other",
    ),
    "a mistyped flag": ([*COMMON, *OUT, "--learning-rat", "1"], "did you mean '--learning-rate'"),
    "a mistyped choice": ([*COMMON, *OUT, "--schedule", "cosin"], "did you mean 'cosine'"),
    "no rate": ([*COMMON, *OUT, "--learning-rate", "0"], "--learning-rate 0: must be more than 0"),
    "a rate of nothing": ([*COMMON, *OUT, "--learning-rate", "nan"], "--learning-rate nan: must be"),
    "all held out": ([*COMMON, *OUT, "--eval-fraction", "1"], "--eval-fraction 1: must be less than 1"),
    "no steps": ([*COMMON, *OUT, "--max-steps", "0"], "--max-steps 0: must be 1 or more"),
    "half a step": ([*COMMON, *OUT, "--max-steps", "1.5"], "--max-steps 1.5: must be a whole number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_for_each_mistake(instil, places, mistake):
    arguments, said = MISTAKES[mistake]
    done = instil("train", *arguments, code=2, stdin="")
    assert said in done.stderr
    assert done.stderr.startswith("instil: ")
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""


def test_a_mistake_in_the_file_names_the_file(instil, tmp_path):
    for text, said in (
        ("learning_rte: 1", "run.yaml: learning_rte: there is no such setting\n  did you mean 'learning-rate'?"),
        ("patience: 2", "run.yaml: --patience 2: there are no held-out rows"),
        ("epochs: -1", "run.yaml: --epochs -1: must be more than 0"),
        ("epochs: {a: 1}", "run.yaml: epochs: takes no settings of its own"),
    ):
        (tmp_path / "run.yaml").write_text(f"{text}\n")
        done = instil("train", *COMMON, *OUT, "--config", "run.yaml", code=2)
        assert said in done.stderr


def test_standard_input_is_data_or_held_out(instil):
    read = yaml.safe_load(instil("train", "--model", "m", "--data", "-", "--print-config").stdout)
    assert (read["data"], read.get("eval_data")) == (["-"], None)
    read = yaml.safe_load(instil("train", *COMMON, "--eval-data", "-", "--print-config").stdout)
    assert (read["data"], read["eval_data"]) == ([DATA], ["-"])
    read = yaml.safe_load(instil("train", *COMMON, "--eval-data", "a", "-", "b", "--print-config").stdout)
    assert (read["data"], read["eval_data"]) == ([DATA], ["a", "-", "b"])


def test_python_gets_the_same_checks():
    with pytest.raises(UsageError, match="--model: is missing"):
        TrainConfig(data=["a"])
    TrainConfig(data=["a"], model="m", base_adapter="keep", merge_adapter=True)
    with pytest.raises(UsageError, match="--patience 1: there are no held-out rows"):
        TrainConfig(data=["a"], model="m", patience=1)
    config = TrainConfig(data=["a"], model="m")
    assert (config.output, config.tokenizer_source()) == (None, "m")
    assert TrainConfig(data=["a"], model="m", tokenizer="t").tokenizer_source() == "t"
    with pytest.raises(UsageError, match="--init none/here: there is no tokenizer"):
        TrainConfig(data=["a"], init=Path("none/here"))
    assert TrainConfig(data=["a"], init=Path("none/here"), tokenizer="t").tokenizer_source() == "t"


def test_a_tokenizer_beside_the_configuration_is_found(tmp_path):
    save_sample_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert TrainConfig(data=["a"], init=tmp_path).tokenizer_source() == str(tmp_path)


def test_steps_win_over_epochs_and_it_is_said():
    assert TrainConfig(data=["a"], model="m", max_steps=5).remarks() == []
    (said,) = TrainConfig(data=["a"], model="m", max_steps=5, epochs=2).remarks()
    assert said == "--max-steps 5 decides how long is trained, not --epochs 2"


STEPS = [Step(n, 3.0 / n, 1e-4, 0.5, 100, 40, 1000.0, 4.0 * n) for n in range(1, 7)]


def shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, highlight=False)
    with Progress(console, seconds=10) as progress:
        progress.started(
            Resolved(6, 1.5, 2048, {"learning_rate": 1e-4, "rows": {"read": 1200, "kept": 3}, "lora_rank": None})
        )
        for step in STEPS:
            progress.stepped(step)
            if step.step == 3:
                progress.evaluated(Evaluation(3, 1.25, True, 12.5))
    return out.getvalue()


def test_lines_where_there_is_no_terminal():
    text = shown(terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert "tokens per step  2,048" in lines
    assert "rows             read 1,200, kept 3" in lines
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [
        "step 1/6",
        "step 3: held-out loss 1.2500, the best so far",
        "step 4/6",
        "step 6/6",
    ], "the first, each ten seconds later, the last"
    first, _, fourth, last = steps
    assert "loss 3.0000  lr 1.00e-04  1,000 tokens/s, 400 trained" in first
    assert "0:00:20 left" in first
    assert "loss 0.7500  held out 1.2500" in fourth
    assert "GiB" in last


def test_a_bar_in_a_terminal():
    text = shown(terminal=True)
    assert "6/6" in text
    assert "held-out loss 1.2500" in text
    assert "\x1b[?25h" in text, "the cursor is back"


def test_a_run_goes_on_where_no_one_hears_of_it_any_more():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for terminal in (False, True):
        with Progress(Console(file=Closed(), force_terminal=terminal), seconds=0) as progress:
            progress.started(Resolved(6, 1.5, 2048, {}))
            progress.stepped(STEPS[0])
            progress.evaluated(Evaluation(1, 1.25, True, 12.5))
            progress.stepped(STEPS[5])
