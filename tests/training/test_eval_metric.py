"""A metric beside the held-out loss: it decides which weights are kept, and to measure it changes no step."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from instil.errors import DataError, Interrupted, TrainingError, UsageError
from instil.evaluation import held_out, metrics
from instil.inference import Engine
from instil.packing import expand
from instil.training import Evaluation, Measure, TrainConfig, resolve, train
from instil.training.checkpoint import Checkpoints
from instil.training.distributed import Processes
from instil.training.loop import fit
from instil.training.metrics import read_metrics, write_metrics
from instil.training.options import TrainOptions
from instil.training.rows import Rows
from instil.training.run import Measuring

from ..cli.small import make_folder, rows
from .tiny import Witness, furthest, gpt2, make_rows, one_thread, reader, trees_of, weights_of

TREES, HELD_OUT = trees_of(make_rows(20)), trees_of(make_rows(6, seed=9))


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


def in_turn(values):
    """A measure that gives one value after the other, whatever the model."""
    left = iter(values)
    return lambda model, processes: next(left)


def run(value, *, higher=True, steps=6, witness=None, **given):
    model = gpt2(dropout=0.1)
    options = {"tokens_per_step": 60, "learning_rate": 5e-3, "eval_every": 1, "eval_metric": "worth"}
    chosen = TrainOptions(max_steps=steps, **{**options, **given.pop("options", {})})
    measure = None if value is None else Measure(value, higher)
    more = {"held_out": HELD_OUT, "tokens_per_batch": 100, "watchers": [witness or Witness()], "measure": measure}
    return model, fit(reader(model), TREES, chosen, **{**more, **given})


@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [
        (True, [0.0, 0.5, 0.25, 0.5, math.nan, 0.4, math.inf], [0, 1]),
        (False, [9.0, 9.5, 7.0, -1.0, -1.0, math.nan, 2.0], [0, 2, 3]),
        (True, [math.nan, math.nan, 0.0, 0.0, 0.0, 0.0, 0.0], [2]),
        (True, [math.nan] * 7, []),
    ],
    ids=["higher", "lower", "nothing at first", "never"],
)
def test_the_best_weights_are_those_of_the_best_metric(higher, values, best):
    seen = {}
    witness = Witness(on_evaluation=lambda each: seen.update({each.step: weights_of(model_of[0])}))
    model_of = []

    def value(model, processes):
        model_of[:] = [model.model]
        assert not model.model.training
        return next(left)

    left = iter(values)
    model, outcome = run(value, higher=higher, witness=witness)
    losses = [each.eval_loss for each in outcome.evaluations]
    assert [each.step for each in outcome.evaluations if each.best] == best
    assert [each.metric for each in outcome.evaluations] == ["worth"] * 7
    assert [each.value for each in outcome.evaluations] == pytest.approx(values, nan_ok=True)
    kept = best[-1] if best else 6
    assert outcome.best_step == (best[-1] if best else None)
    assert furthest(weights_of(model), seen[kept]) == 0
    if best:
        assert furthest(seen[kept], seen[losses.index(min(losses))]) > 0, "by the loss it would be another"


@pytest.mark.parametrize(
    ("higher", "values", "steps"),
    [(True, [0.1, 0.2, 0.2, 0.1, 0.9], 3), (False, [3.0, 2.0, 2.5, 1.0, 1.0, 4.0], 5), (True, range(7), 6)],
)
def test_patience_is_for_the_metric(higher, values, steps):
    _, outcome = run(in_turn(values), higher=higher, options={"patience": 2})
    assert outcome.steps == steps
    assert outcome.stopped_early == (steps < 6)


def of_the_weights(model, processes):
    """A measure that rises and falls as the model learns."""
    return math.sin(1e3 * float(model.base.transformer.wte.weight.sum()))


@pytest.mark.parametrize(
    "until", [3, pytest.param(1, marks=pytest.mark.prove), pytest.param(5, marks=pytest.mark.prove)]
)
def test_resumed_is_uninterrupted(tmp_path, until):
    def timeless(outcome):
        steps = [(each.step, each.loss, each.grad_norm) for each in outcome.history]
        found = [(each.step, each.eval_loss, each.value, each.best) for each in outcome.evaluations]
        return steps, found, outcome.best_step

    whole, uninterrupted = run(of_the_weights)
    witness = Witness()
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    stopping = lambda: 15 if getattr(witness.told[-1], "step", 0) >= until else 0  # noqa: E731
    with pytest.raises(Interrupted):
        run(of_the_weights, witness=witness, checkpoints=checkpoints, stopping=stopping)
    found, passed = checkpoints.newest()
    assert (found.step, passed) == (until, [])
    resumed, outcome = run(of_the_weights, resume=found)
    assert timeless(outcome) == timeless(uninterrupted)
    assert len({each.value for each in outcome.evaluations}) == 7
    assert furthest(weights_of(whole), weights_of(resumed)) == 0


def test_lines_of_the_metric_are_read_back_and_old_ones_stay_as_they_were(tmp_path):
    file = tmp_path / "metrics.jsonl"
    found = [Evaluation(0, 2.5, True, 0.0), Evaluation(1, 2.0, False, 0.5, "worth", 0.25)]
    write_metrics(file, [], found)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"step": 0, "eval_loss": 2.5, "best": True, "seconds": 0.0}
    assert (lines[1]["metric"], lines[1]["value"]) == ("worth", 0.25)
    assert read_metrics(file) == ([], found)
    write_metrics(file, [], [Evaluation(1, 2.0, False, 0.5, "worth", math.nan)])
    assert json.loads(file.read_text())["value"] is None
    assert math.isnan(read_metrics(file)[1][0].value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"value": None}, "eval_metric worth: nothing measures it"),
        ({"value": of_the_weights, "held_out": ()}, "eval_metric worth: there are no held-out rows"),
        ({"value": of_the_weights, "options": {"eval_metric": "loss"}}, "eval_metric loss: there is a measure"),
        (
            {"value": of_the_weights, "options": {"shard": True}, "processes": Processes(0, 2)},
            r"eval_metric worth: a model in parts \(--shard\) generates nothing",
        ),
    ],
)
def test_what_does_not_go_together(given, said):
    with pytest.raises(TrainingError, match=said):
        run(**given)


def test_memory_that_runs_out_is_explained():
    def value(model, processes):
        raise torch.OutOfMemoryError("none is left")

    with pytest.raises(TrainingError, match="step 0: memory ran out when held-out rows were answered"):
        run(value)


# With the answers of a real model.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("metric")
    make_folder(root, 24)
    return root


def config(folder, **given):
    settings = {
        "init": folder / "base",
        "data": [str(folder / "rows.jsonl")],
        "eval_data": [str(folder / "rows.jsonl")],
        "template": "chatml",
        "learning_rate": 5e-3,
        "max_steps": 44,
        "tokens_per_step": 1024,
        "eval_every": 11,
        "precision": "fp32",
        "eval_metric": "token_f1",
        "eval_metric_rows": 8,
        "eval_max_new_tokens": 20,
        "cache": False,
    }
    return TrainConfig(**{**settings, **given})


def test_the_value_is_what_plain_transformers_gives(folder):
    """Of the model that was written, asked in its own template: the first rows' answers, held against theirs."""
    output = folder / "tuned"
    outcome = train(config(folder, output=output, eval_metric_rows=24, max_steps=33), measure=held_out.measure)
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    items = []
    for row in rows(24):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        out = model.generate(ids, max_new_tokens=20, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        items.append(metrics.Item(answer, (row["output"],)))
    scores = [each["token_f1"] for each in metrics.score("token_f1", items)]
    assert len(set(scores)) > 3
    best = max(outcome.evaluations, key=lambda each: each.value)
    assert best.value == pytest.approx(sum(scores) / 24, abs=1e-12)
    assert best.best

    record = json.loads((output / "instil.json").read_text())
    values = [each.value for each in outcome.evaluations]
    expected = {"name": "token_f1", "first": values[0], "final": values[-1], "best": best.value}
    assert record["outcome"]["eval_metric"] == expected
    assert record["resolved"]["eval_metric"] == (
        "token_f1 (higher is better) of greedy answers to 24 of 24 held-out rows"
    )
    assert f"| Held-out token_f1, best | {best.value:.4f} |" in (output / "README.md").read_text()
    assert read_metrics(output / "metrics.jsonl")[1] == outcome.evaluations


def state(output):
    """All that the last checkpoint holds, but for the best weights."""
    newest = max((output / "checkpoints").glob("step-*"))
    tensors = {name: each for file in newest.glob("*.safetensors") for name, each in load_file(file).items()}
    return {name: each for name, each in tensors.items() if not name.startswith("best.")}


WAYS = [
    {"adapter": "lora", "lora_dropout": 0.2, "activation_checkpointing": "on"},
    {},
    {"adapter": "lora", "lora_dropout": 0.2, "precision": "bf16"},
    {"adapter": "lora", "quantize": "nf4"},
    {"compile": "on"},
]


PROVE = pytest.mark.prove
LOUD = pytest.mark.filterwarnings("ignore")  # torch warns itself as it compiles


@pytest.mark.parametrize(
    "way",
    [
        WAYS[0],
        *(pytest.param(each, marks=PROVE) for each in WAYS[1:-1]),
        pytest.param(WAYS[-1], marks=[PROVE, LOUD]),
    ],
    ids=["lora", "in full", "bf16", "qlora", "compiled"],
)
def test_to_measure_changes_no_step(folder, tmp_path, way):
    """Weights and the optimizer's state after the last step are bit for bit those of a run that measures the loss."""
    given = {"max_steps": 3, "eval_every": 1, **way}
    losses = []
    for name, measure in (("with", held_out.measure), ("without", None)):
        metric = {} if measure else {"eval_metric": "loss", "eval_metric_rows": 200, "eval_max_new_tokens": 128}
        outcome = train(config(folder, output=tmp_path / name, **given, **metric), measure=measure)
        losses.append([each.eval_loss for each in outcome.evaluations])
        assert all((each.value is None) == (measure is None) for each in outcome.evaluations)
    assert losses[0] == losses[1]
    one, other = state(tmp_path / "with"), state(tmp_path / "without")
    assert one.keys() == other.keys()
    assert len(one) > 10
    for name, each in one.items():
        assert torch.equal(each, other[name]), name


def measured(config):
    """The measure of a run, and its rows."""
    data = Rows.of(config, rejects=False)
    return held_out.measure(config, data), data


def test_the_model_is_left_as_it_was(folder):
    """Its attention, its mode, where activations are computed again, every weight and its type."""
    chosen = config(folder)
    measure, data = measured(chosen)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base"), dtype=torch.float32)
    model.resize_token_embeddings(len(data.renderer.tokenizer.backend.get_vocab()) + 8, mean_resizing=False)
    tree = reader(model.eval())
    tree.base.activation_checkpointing_enable()

    def now():
        modules = [
            (name, each.training, getattr(each, "gradient_checkpointing", None)) for name, each in model.named_modules()
        ]
        named = [*model.named_parameters(), *model.named_buffers()]
        return (
            model.config._attn_implementation,
            modules,
            [(name, each.dtype, each.requires_grad, each.is_inference(), each.data_ptr()) for name, each in named],
        )

    before, weights = now(), weights_of(model)
    with torch.no_grad():
        first = measure.value(tree, Processes())
        assert first == measure.value(tree, Processes())
    assert now() == before
    assert furthest(weights_of(model), weights) == 0
    assert before[0] == "instil"


def asked_by(monkeypatch):
    """The prompts that the engine is given, which still answers them."""
    found = []
    real = Engine.generate

    def generate(self, prompts, *given):
        found.extend(prompts)
        return real(self, prompts, *given)

    monkeypatch.setattr(Engine, "generate", generate)
    return found


@pytest.mark.parametrize("source", ["eval_data", "eval_fraction"])
def test_prompts_are_those_of_training_evenly_spaced(folder, tmp_path, monkeypatch, source):
    """Of conversations whose oldest turns are cut: those of the last answers, as the held-out trees hold them."""
    turns = [[message for part in rows(24)[at : at + 3] for message in both(part)] for at in range(20)]
    data = write(tmp_path / "turns.jsonl", [{"messages": each} for each in turns])
    given = {"eval_data": [data]} if source == "eval_data" else {"eval_data": [], "eval_fraction": 0.6}
    chosen = config(
        folder, data=[data], max_length=100, on_too_long="cut-prompt", eval_metric_rows=5, max_steps=1, **given
    )
    _, seen = measured(chosen)
    last = [list(expand(tree))[-1].prompt_ids.tolist() for tree in seen.held_out]
    count = len(last)
    assert count > 11
    assert len({tuple(each) for each in last}) > 11
    found = asked_by(monkeypatch)
    outcome = train(chosen.model_copy(update={"output": tmp_path / "tuned"}), measure=held_out.measure)
    assert len(outcome.evaluations) == 2
    assert [list(each) for each in found[:5]] == [last[at * count // 5] for at in range(5)]
    assert found[5:] == found[:5]


def both(row):
    asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def write(path, several):
    path.write_text("".join(json.dumps(each) + "\n" for each in several), encoding="utf-8")
    return str(path)


def test_processes_share_the_rows_and_come_to_one_value(folder):
    """Each generates its own; what all said, put in order, is scored by each."""
    chosen = config(folder, eval_metric="chrf", eval_metric_rows=7)
    measure, _ = measured(chosen)
    said = [rows(24)[number * 24 // 7]["output"] for number in range(7)]
    parts = [measure.value._prompts[rank::3] for rank in range(3)]
    asked = []
    for rank in range(3):
        processes = SimpleNamespace(rank=rank, size=3, gathered=lambda texts: [*said[0::3], *said[1::3], *said[2::3]])
        other, _ = measured(chosen)
        other.value._generate = lambda model, prompts: asked.append(list(prompts)) or []
        assert other.value(None, processes) == measure.value.score(said)
    assert asked == parts
    assert measure.value.score(said) == 100 > measure.value.score(said[::-1])


ANSWERED = {"instruction": "Say it.", "output": "It is so."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
CALLING = {
    "messages": [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
}


@pytest.mark.parametrize(
    ("metric", "rows", "problems"),
    [
        (
            "exact_match",
            [CALLING, {"messages": both(ANSWERED)}, CALLING],
            [("held.jsonl:1", "has no text"), ("held.jsonl:3", "has no text")],
        ),
        (
            "accuracy",
            [{**ANSWERED, "labels": ["No", "It is so."]}, ANSWERED, {**ANSWERED, "labels": ["No"]}],
            [("held.jsonl:2", "is missing, and accuracy needs it"), ("held.jsonl:3", "are none of")],
        ),
        ("numeric", [{**ANSWERED, "output": "It is 5."}, ANSWERED], [("held.jsonl:2", "state no number")]),
    ],
)
def test_all_bad_rows_are_named_before_the_first_step(folder, tmp_path, metric, rows, problems):
    held = write(tmp_path / "held.jsonl", rows)
    with pytest.raises(DataError, match=f"--eval-metric {metric}: there are held-out rows") as caught:
        measured(config(folder, eval_data=[held], eval_metric=metric))
    found = [(each.source.rpartition("/")[2], each.reason) for each in caught.value.problems]
    assert [source for source, _ in found] == [source for source, _ in problems]
    for (_, reason), (_, said) in zip(found, problems, strict=True):
        assert said in reason


def test_what_a_row_says_is_right_counts(folder, tmp_path):
    """Further references and labels of the row; a metric of its own does not."""
    held = write(
        tmp_path / "held.jsonl",
        [{**ANSWERED, "references": ["Otherwise."], "metric": "execute"}, {**ANSWERED, "output": "No."}],
    )
    measure, _ = measured(config(folder, eval_data=[held], eval_metric="exact_match"))
    assert [measure.value.score(each) for each in (["otherwise", "no"], ["It is so", "yes"], ["No", "so"])] == [
        1,
        0.5,
        0,
    ]
    assert measure.higher_is_better
    held = write(tmp_path / "numbers.jsonl", [{**ANSWERED, "output": "5"}, {**ANSWERED, "output": "7"}])
    measure, _ = measured(config(folder, eval_data=[held], eval_metric="numeric"))
    assert measure.value.score(["It is 4.", "17"]) == 5.5
    assert math.isnan(measure.value.score(["none", "none"]))
    assert not measure.higher_is_better


def test_rows_that_training_leaves_out_are_counted(folder, tmp_path):
    long = {**ANSWERED, "output": "It is so. " * 200}
    held = write(tmp_path / "held.jsonl", [ANSWERED, long, ANSWERED])
    chosen = config(folder, eval_data=[held], max_length=64)
    told = resolve(chosen, held_out.measure).settings["eval_metric"]
    assert told.endswith("to 2 of 3 held-out rows; of 1 more nothing of the last answer is trained")


@pytest.mark.parametrize(
    ("metric", "said"),
    [("exactmatch", "there is no such metric\n  did you mean 'exact_match'"), ("execute", "runs programs")],
)
def test_a_metric_that_cannot_be(folder, metric, said):
    with pytest.raises(UsageError, match=f"--eval-metric {metric}: {said}"):
        measured(config(folder, eval_metric=metric))


def test_the_settings_name_every_metric():
    described = TrainConfig.model_fields["eval_metric"].description
    assert all(name in described for name in {"loss", *metrics.METRICS} - {"execute"})
    assert "execute" not in described


def test_a_measure_of_ones_own(folder, tmp_path):
    """It is made of the run and its rows, under a name of its own."""
    asked = []

    def mine(config, rows):
        asked.append((config.eval_metric, len(list(rows.held_out_records()))))
        return Measure(lambda model, processes: float(model.training), about="mine")

    made: Measuring = mine
    outcome = train(config(folder, output=tmp_path / "own", eval_metric="own", max_steps=2), measure=made)
    assert asked == [("own", 24)]
    assert {each.metric for each in outcome.evaluations} == {"own"}
    with pytest.raises(TrainingError, match="eval_metric own: nothing measures it"):
        train(config(folder, output=tmp_path / "none", eval_metric="own", max_steps=2))
