"""The model card: what a model was tuned on, how it is prompted, how to use it, how training went."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from instil.conversation import Conversation, Message
from instil.data.shapes import COMPARING
from instil.errors import TemplateError
from instil.prompt import Renderer
from instil.training.config import OF_METRIC
from instil.training.events import Evaluation, Step
from instil.training.options import PreferenceOptions

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_QUESTION = Message("user", "Name the capital of Peru.")
_GAP = Message("user", fields={"prefix": "def add(a, b):\n    return ", "suffix": "\n"})
_ANSWERS = (_QUESTION, Message("assistant", "Lima.")), (_GAP, Message("assistant", "a + b"))

_ELSEWHERE = ("data", "eval_data", "output", "model", "init", "tokenizer", "rejects", "cache", "cache_dir", "workers")
_OF_TRACKERS = ("trackers", "tracker_project", "run_name")
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "dora")
_DRAWN = ("reward_accuracy", "reward_margin")
_MEASURES = ("reward_accuracy", "reward_margin", "chosen_logp", "rejected_logp", "kl")
_Points: TypeAlias = "Sequence[tuple[int, float]]"
_MEASURED = {"training": "Last tenth of training", "held_out": "Held out, last"}
_WHEN = {"first": "first", "last": "final", "best": "best"}

_USE_MODEL = """\
from transformers import AutoModelForCausalLM, {tokenizer_class}

model = AutoModelForCausalLM.from_pretrained("{name}")
"""
_USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import {tokenizer_class}, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
model.generation_config = GenerationConfig.from_pretrained("{name}")
"""
_USE = """\
tokenizer = {tokenizer_class}.from_pretrained("{name}")
messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{arguments}
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


_USE_TEXT = """\
tokenizer = {tokenizer_class}.from_pretrained("{name}")
inputs = tokenizer("The capital of Peru is", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One exchange that shows how a model is prompted.

    Args:
        messages: The prompt's messages, as the template takes them.
        prompt: Their rendering, up to where the model answers.
        completion: An answer, up to and including the stop token.
    """

    messages: Sequence[Mapping[str, Any]]
    prompt: str
    completion: str


def example_of(renderer: Renderer) -> Example | None:
    """An exchange as this renderer makes it, of no one's data; None if the template takes none of ours."""
    for messages in _ANSWERS:
        try:
            exchange = renderer.exchange(Conversation(messages), 1)
        except TemplateError:
            continue
        asked, _ = renderer.wire(Conversation(messages[:1]))
        return Example(asked, exchange.prompt, exchange.completion)
    return None


def model_card(provenance: Mapping[str, Any], name: str, example: Example | None, *, curve: bool) -> str:
    """The text of `README.md`.

    Args:
        provenance: What stands in `instil.json`.
        name: The folder's name, under which the card's code finds the model.
        example: Shown as the prompt format.
        curve: Whether `loss.svg` stands beside it.
    """
    sections = [
        _front_matter(provenance),
        f"# {name}\n",
        _introduction(provenance),
        "## Use\n\n" + _usage(provenance, name, example),
        *([] if _of_text(provenance) else ["## Prompt format\n\n" + _prompt_format(provenance, example)]),
        "## Training data\n\n" + _data(provenance),
        "## Results\n\n" + _results(provenance, curve),
        *(["## Merged and quantized\n\n" + _compared(compared)] if (compared := provenance.get("comparison")) else []),
        "## Hyperparameters\n\n" + _hyperparameters(provenance),
    ]
    return "\n".join(sections)


def draw_loss(path: Path, steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> bool:
    """Draw loss and learning rate over the steps as SVG, below them what else is measured, if there is anything.

    Returns:
        False, and no picture, where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Text stays text, and the same run gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "instil"}):
        measures = _measures(steps, evaluations)
        figure = Figure(figsize=(7, 3.5 + 1.5 * len(measures)), layout="constrained")
        axes, *below = figure.subplots(
            1 + len(measures), sharex=True, squeeze=False, height_ratios=[5, *[2] * len(measures)]
        )[:, 0]
        _draw(axes, [(s.step, s.loss) for s in steps], [(e.step, e.eval_loss) for e in evaluations])
        for panel, (name, points) in zip(below, measures.items(), strict=True):
            _draw(panel, *points)
            panel.set_ylabel(name.replace(" ", "\n", 1))
        (below or [axes])[-1].set_xlabel("step")
        axes.set_ylabel("loss (nats a token)" if not any(s.measures for s in steps) else "loss (nats)")
        if steps or evaluations:
            axes.legend()
        rate = axes.twinx()
        rate.plot([s.step for s in steps], [s.learning_rate for s in steps], color="#2e86c1", linewidth=0.8, alpha=0.6)
        rate.set_ylabel("learning rate", color="#2e86c1")
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _measures(steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> dict[str, tuple[_Points, _Points]]:
    """What is drawn below the loss, by name: of training, and of held-out rows."""
    metric = [(e.metric, e.step, e.value) for e in evaluations if e.metric is not None and e.value is not None]
    found: dict[str, tuple[_Points, _Points]] = {}
    if metric:
        found[f"held-out {metric[0][0]}"] = [], [(step, value) for _, step, value in metric]
    for name in _DRAWN:
        training, held_out = (
            [(e.step, e.measures[name]) for e in few if name in e.measures] for few in (steps, evaluations)
        )
        if training:
            found[name.replace("_", " ")] = training, held_out
    return found


def _draw(axes: Any, training: _Points, held_out: _Points) -> None:
    if training:
        axes.plot(*zip(*training, strict=True), color="#888888", linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c0392b", marker="o", markersize=4, label="held out")
    axes.grid(alpha=0.3)


def _of_text(provenance: Mapping[str, Any]) -> bool:
    """Whether the model was trained on plain text alone, so that it goes on with text and has no chat template."""
    return bool(provenance["template"]["name"] == "none")


def _front_matter(provenance: Mapping[str, Any]) -> str:
    adapter = provenance["kind"] == "adapter"
    front: dict[str, Any] = {}
    if base := _hub_name(provenance["base_model"]):
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    front["library_name"] = "peft" if adapter else "transformers"
    front["pipeline_tag"] = "text-generation"
    taught = [] if _of_text(provenance) else ["instruction-tuning", "conversational"]
    compared = [name] if (name := provenance["config"].get("objective")) in COMPARING else []
    front["tags"] = ["instil", *taught, *compared, *(["lora"] if adapter else [])]
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n"


def _introduction(provenance: Mapping[str, Any]) -> str:
    base, what = provenance["base_model"], "adapter" if provenance["kind"] == "adapter" else "model"
    shown = f"[{base}](https://huggingface.co/{base})" if _hub_name(base) else f"`{Path(base).name}`" if base else ""
    origin = "trained from random weights" if provenance["config"].get("init") else f"tuned from {shown}"
    version = provenance["versions"].get("instil", "")
    lines = [f"A language {what}, {origin} with Instil {version}. `instil.json` holds every setting, the data by hash."]
    lines += [f"\nNote: {note}." for note in provenance["notes"]]
    return "\n".join(lines) + "\n"


def _usage(provenance: Mapping[str, Any], name: str, example: Example | None) -> str:
    beginning = _USE_ADAPTER if provenance["kind"] == "adapter" else _USE_MODEL
    otherwise = any(note.startswith("AutoTokenizer") for note in provenance["notes"])
    code = (beginning + (_USE_TEXT if _of_text(provenance) else _USE)).format(
        tokenizer_class="PreTrainedTokenizerFast" if otherwise else "AutoTokenizer",
        name=name,
        messages=_python([dict(message) for message in example.messages] if example else [_QUESTION.to_wire()]),
        arguments="".join(f", {key}={_python(value)}" for key, value in provenance["template"]["arguments"].items()),
    )
    return _fenced(code, "python")


def _prompt_format(provenance: Mapping[str, Any], example: Example | None) -> str:
    stops = " or ".join(map(_code, provenance["stop_tokens"])) or "no token of its own"
    lines = [f"`chat_template.jinja` makes it. An answer ends with {stops}."]
    if added := provenance["added_tokens"]:
        lines.append(f"New tokens: {', '.join(map(_code, added))}.")
    if example is None:
        return "\n".join(lines) + "\n"
    lines += ["\nThe prompt:\n", _fenced(example.prompt), "The answer:\n", _fenced(example.completion)]
    return "\n".join(lines)


def _data(provenance: Mapping[str, Any]) -> str:
    summary = provenance["summary"]
    rows, tokens = summary["rows"], summary["tokens"]
    counts = {
        **{f"Rows {status}": f"{count:,}" for status, count in rows.items()},
        "Record shapes": ", ".join(f"{shape} {count:,}" for shape, count in summary["shapes"].items()),
        "Exchanges": f"{summary['exchanges']:,}",
        "Tokens": f"{tokens['total']:,}",
        "Tokens trained": f"{tokens['trained']:,} ({tokens['share']:.1%})",
    }
    named = [("Training", provenance["data"]), ("Held out", provenance["eval_data"])]
    files = [
        (Path(file["path"]).name, use, f"{file['records']:,}", _code((file["sha256"] or "")[:16]))
        for use, data in named
        if data
        for file in data["files"]
    ]
    table = _table(("", ""), counts.items())
    return table + "\n" + _table(("File", "Use", "Records", "SHA-256 begins"), files) if files else table


def _results(provenance: Mapping[str, Any], curve: bool) -> str:
    outcome = provenance["outcome"]
    losses = {
        "Training loss, first step": outcome["first_loss"],
        "Training loss, last step": outcome["final_loss"],
        "Held-out loss, first": outcome["first_eval_loss"],
        "Held-out loss, last": outcome["final_eval_loss"],
        "Held-out loss, best": outcome["best_eval_loss"],
    }
    metric = outcome.get("eval_metric") or {}
    values = {f"Held-out {metric['name']}, {when}": metric[key] for when, key in _WHEN.items()} if metric else {}
    said = {
        f"{when}: {name.replace('_', ' ')}": of_it.get(name) for when, of_it in _told(outcome) for name in _MEASURES
    }
    rows = [(name, f"{value:.4f}") for name, value in (losses | values | said).items() if value is not None]
    ended = ", ended early" if outcome["stopped_early"] else ""
    rows.append(("Steps", f"{outcome['steps']:,}{ended}"))
    if outcome["best_step"] is not None:
        rows.append(("Weights of step", f"{outcome['best_step']:,}"))
    rows.append(("Tokens trained", f"{outcome['trained_tokens']:,} of {outcome['tokens']:,}"))
    rows.append(("Seconds", f"{outcome['seconds']:,.0f}"))
    objective = provenance["resolved"].get("objective")
    what = f"of {objective} over the pairs or answers" if objective else "of the cross-entropy of trained tokens"
    text = f"Losses are means {what}, in nats.\n\n" + _table(("", ""), rows)
    return text + ("\n![Loss over the steps](loss.svg)\n" if curve else "")


def _told(outcome: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """What the objective measured beside its loss, and when."""
    measures = outcome.get("measures") or {}
    return [(when, measures[key]) for key, when in _MEASURED.items() if measures.get(key)]


def _compared(comparison: Mapping[str, Any]) -> str:
    """The merged model beside the one that was trained; prompts stay with their owner."""
    rows = [(str(each["row"]), _code(each["quantized"]), _code(each["merged"])) for each in comparison["answers"]]
    losses = [f"{comparison[name]:.4f}" for name in ("quantized_loss", "merged_loss")]
    return (
        "The adapter was trained on a base in 4 bits (NF4) and merged into its dequantized weights. Greedy answers to "
        "rows of the data, begun, and the loss on them, before and after:\n\n"
        + _table(("Row", "Quantized, with the adapter", "Merged"), [*rows, ("Loss", *losses)])
    )


def _hyperparameters(provenance: Mapping[str, Any]) -> str:
    """What was chosen, less what stands elsewhere in the card, and what was resolved, which wins."""
    chosen = {key: value for key, value in provenance["config"].items() if key not in (*_ELSEWHERE, *_OF_TRACKERS)}
    if chosen.get("adapter") != "lora":
        chosen = {key: value for key, value in chosen.items() if key not in _OF_LORA}
    if chosen.get("objective") not in COMPARING:
        chosen = {key: value for key, value in chosen.items() if key not in PreferenceOptions.model_fields}
    if chosen.get("eval_metric") == "loss":
        chosen = {key: value for key, value in chosen.items() if key not in OF_METRIC}
    shown = {**chosen, **provenance["resolved"]}
    rows = [(_code(key), _shown(value)) for key, value in shown.items() if value not in (None, [], {})]
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    return _table(("Setting", "Value"), rows) + f"\nVersions: {versions}.\n"


def _hub_name(base: str | None) -> str | None:
    """The base model if it is one of the hub; a folder's path means nothing there."""
    return base if base and _HUB_NAME.fullmatch(base) and not Path(base).exists() else None


def _python(value: Any) -> str:
    """A plain value as it stands in Python."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(key)}: {_python(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fenced(text: str, language: str = "text") -> str:
    """The text as a code block, whatever ticks it holds."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(map(_cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """The text on one line, with bars that do not end the cell."""
    return " ".join(text.split()).replace("|", "\\|")
