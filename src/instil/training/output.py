"""The output folder of a run: the tuned model, the tokenizer and template it was taught with, and where it came from.

    model or adapter         by the callable handed in
    tokenizer.json, …        `AutoTokenizer` gives the ids that training saw
    chat_template.jinja      the template that was trained with
    generation_config.json   ends at the stop tokens that were trained
    README.md, loss.svg      the model card

They are written beside their place and renamed. The other files there are the run's own: see `run_folder`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from instil.data import Records
from instil.errors import UsageError
from instil.packing import Prepared
from instil.prompt import ChatTemplate, Renderer, Tokenizer
from instil.training.card import draw_loss, example_of, model_card
from instil.training.config import TrainConfig
from instil.training.events import Evaluation, Outcome, best_of, chosen_fell, lately
from instil.training.files import RECORD, plain, sha256, sync, sync_one, write_json

if TYPE_CHECKING:  # it loads torch
    from instil.training.comparison import Comparison

ADAPTER_CONFIG = "adapter_config.json"

_FEWER = "a higher --sft-weight holds them up, and so do a lower --learning-rate and fewer steps"
_PROBE_FOLDER = ".instil-"
_FRESH = "Name a new folder, as in --output tuned."
_NO_CURVE = "the model card has no loss curve: matplotlib is not installed (pip install matplotlib)"
_PACKAGES = ("instil", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")
_PROBE = "Hello, World! It's 12,345.67 – naïve café, 日本語, Ελληνικά 🙂\n\n\tdef f(x):\n    return x  +  1\n"

# Held by tokenizer.json or chat_template.jinja, where it says more or would be said twice.
_SAID_ELSEWHERE = ("chat_template", "added_tokens_decoder", "add_bos_token", "add_eos_token")
# True of the source alone: its classes, files and place.
_OF_THE_SOURCE = ("auto_map", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")


def check_output(folder: str | Path, *, resume: bool = False) -> None:
    """Refuse a place where no output can be, before anything is trained for it.

    Args:
        folder: The output folder.
        resume: Whether a run that has not finished may be there.

    Raises:
        UsageError: A file stands there, the folder holds something else, or it cannot be written.
    """
    target = Path(os.path.realpath(folder))
    parent = target.parent
    if target.exists():
        if not target.is_dir():
            raise UsageError(f"--output {folder}: is a file", _FRESH)
        state = run_state(target)
        if state == "finished" and resume:
            raise UsageError(f"--output {folder}: the run there has finished; nothing is left to do", _FRESH)
        if state not in (None, "finished") and not resume:
            raise UsageError(
                f"--output {folder}: a run is there that has not finished", f"Go on with --resume. {_FRESH}"
            )
        names = (child.name for child in _children(target, folder))
        held = sorted(name for name in names if not name.startswith(_PROBE_FOLDER))
        if held and (state is None or not resume):
            raise UsageError(f"--output {folder}: the folder holds something ({', '.join(held[:5])})", _FRESH)
        parent = target
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"--output {folder}: {parent} is no folder", _FRESH)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=_PROBE_FOLDER, dir=parent))
    except OSError as error:
        raise _unwritable(folder, error) from error


def run_state(folder: Path) -> str | None:
    """How the run in a folder is by its own account: running, finished, interrupted or failed; None without a run."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return str(record.get("state", "finished"))
    except (OSError, ValueError, AttributeError):
        return "interrupted" if any(folder.glob("checkpoints/step-*")) else None


def describe_data(records: Records) -> dict[str, Any]:
    """The data as `instil.json` names it; to be taken before training, for a file may change meanwhile.

    Args:
        records: Read through, so that their report counts the rows.

    Returns:
        `fingerprint` (None where data has no bytes, as on the hub) and `files`: of each its `path`, `sha256` (None for
        what is no file) and `records`.
    """
    counts = records.report.files
    files = [
        {
            "path": path,
            "sha256": sha256(Path(path)) if Path(path).is_file() else None,
            "records": sum(counts.get(path, {}).values()),
        }
        for path in records.paths
    ]
    return {"fingerprint": records.fingerprint(), "files": files}


def describe_run(
    config: TrainConfig,
    renderer: Renderer,
    prepared: Prepared,
    data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run is made of, as `instil.json` says it; how it is resolved and ends is added when that is known.

    Args:
        config: Every option of the run.
        renderer: What the prompts were rendered with.
        prepared: The data that is trained.
        data: As `describe_data` gave it.
        eval_data: The same of the held-out files, if there are any.
    """
    tokenizer, template = renderer.tokenizer, renderer.template
    return {
        "format": 1,
        "base_model": config.model or str(config.init),
        "config": config.model_dump(mode="json"),
        "data": data,
        "eval_data": eval_data,
        "summary": prepared.describe(),
        "template": {
            "name": template.name,
            "fingerprint": template.fingerprint(),
            "arguments": template.arguments,
        },
        "stop_tokens": {token: tokenizer.backend.token_to_id(token) for token in prepared.stop_tokens},
        "added_tokens": {token: tokenizer.backend.token_to_id(token) for token in tokenizer.added},
        "outcome": None,
        "versions": versions(),
    }


def write_output(
    folder: str | Path,
    record: Mapping[str, Any],
    *,
    save: Callable[[Path], None],
    renderer: Renderer,
    outcome: Outcome,
    generation_config: Mapping[str, Any] | None = None,
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """Write the tuned model into its folder: beside its place first, then renamed, what makes it a model last.

    Args:
        folder: The output folder, which may hold the run's own files.
        record: As `describe_run` gave it, with `resolved`.
        save: Is given an existing folder and writes the model or the adapter into it, weights and configuration.
        renderer: What the prompts were rendered with; its tokenizer and template are saved.
        outcome: How the run ended.
        generation_config: What the base model generates with, if `save` writes no `generation_config.json` and the
            model is no local folder.
        comparison: Of the merged model with the quantized one that was trained.

    Returns:
        What the run came to, for `instil.json`: `kind`, `outcome` and `notes`, what a person should know about what was
        written, a sentence each.

    Raises:
        UsageError: The folder cannot be written.
    """
    target = Path(os.path.realpath(folder))
    draft = target / f".output.{os.getpid()}"
    try:
        for left in target.glob(".output.*"):  # of a run that was killed
            shutil.rmtree(left)
        draft.mkdir(parents=True)
        save(draft)
        stops = [number for number in record["stop_tokens"].values() if number is not None]
        notes = save_tokenizer(draft, renderer.tokenizer, renderer.template)
        notes += _of_quantization(record, comparison)
        notes += [f"{fell} ({_FEWER})"] if (fell := chosen_fell(outcome.history)) else []
        _save_generation_config(draft, record["base_model"], generation_config, stops)
        ended: dict[str, Any] = {
            "kind": "adapter" if (draft / ADAPTER_CONFIG).exists() else "model",
            "outcome": _ending(outcome),
            "comparison": comparison and comparison.to_dict(),
            "notes": notes,
        }
        drawn = draw_loss(draft / "loss.svg", outcome.history, outcome.evaluations)
        card = model_card(plain({**record, **ended}), target.name, example_of(renderer), curve=drawn)
        (draft / "README.md").write_text(card, encoding="utf-8")
        _open_to_others(draft)
        sync(draft)
        _put(draft, target)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ended if drawn else {**ended, "notes": [*notes, _NO_CURVE]}


def save_tokenizer(folder: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """Write a tokenizer with its added tokens and the template it is served with, for plain transformers.

    The template stands in `chat_template.jinja` and nowhere else. The tokenizer is stored as the one that was trained
    with, whole, so it is loaded by the class that takes it as it is.

    Returns:
        What plain transformers will do otherwise than training did, a sentence each: usually nothing.
    """
    state = json.loads(tokenizer.backend.to_str())
    state["truncation"] = state["padding"] = None  # a caller's business, which may have been left on
    write_json(folder / "tokenizer.json", state)
    config: dict[str, Any] = {"model_max_length": tokenizer.max_length} if tokenizer.max_length else {}
    source = Path(tokenizer.name) / "tokenizer_config.json"
    if source.is_file():
        config = json.loads(source.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in (*_SAID_ELSEWHERE, *_OF_THE_SOURCE)}
    named = {key: value for key, value in tokenizer.special_tokens.items() if isinstance(value, str)}
    write_json(folder / "tokenizer_config.json", {**config, **named, "tokenizer_class": "PreTrainedTokenizerFast"})
    for stale in ("chat_template.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / stale).unlink(missing_ok=True)
    if template.name == "none":
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    else:
        (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8", newline="")
    if template.tool_text is not None:
        more = folder / "additional_chat_templates"
        more.mkdir(exist_ok=True)
        (more / "tool_use.jinja").write_text(template.tool_text, encoding="utf-8", newline="")
    return _differences(folder, tokenizer, template)


def _differences(folder: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """What `AutoTokenizer` makes of the folder otherwise than training did: some model types insist on a class that
    builds its own pre-tokenizer.
    """
    import transformers

    notes = []
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        same = _behaviour(loaded.backend_tokenizer) == _behaviour(tokenizer.backend)
    except Exception as error:
        notes.append(f"AutoTokenizer cannot load this tokenizer: {error}")
    else:
        if not same:
            notes.append(
                f"AutoTokenizer loads this tokenizer as {type(loaded).__name__}, which encodes otherwise than was "
                "trained; load it with transformers.PreTrainedTokenizerFast"
            )
    if template.arguments:
        given = ", ".join(f"{name}={value!r}" for name, value in template.arguments.items())
        notes.append(f"the template was given arguments that plain transformers must be given as well: {given}")
    return notes


def _behaviour(backend: Any) -> list[Any]:
    """What two tokenizers have in common that encode and decode alike."""
    state = json.loads(backend.to_str())
    parts: list[Any] = [state[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")]
    probes = [_PROBE, *(f"a{token['content']} b" for token in state["added_tokens"][:512])]
    for special in (True, False):
        parts += [encoding.ids for encoding in backend.encode_batch(probes, add_special_tokens=special)]
    return [*parts, backend.get_vocab(with_added_tokens=True)]


def _save_generation_config(folder: Path, base: str | None, given: Mapping[str, Any] | None, stops: list[int]) -> None:
    """What the base model generates with, ending at the tokens that were trained to end an answer."""
    file = folder / "generation_config.json"
    sources = [file, *([Path(base) / file.name] if base else [])]
    found = next((source for source in sources if source.is_file()), None)
    held = json.loads(found.read_text(encoding="utf-8")) if found else given or {}
    config = {key: value for key, value in held.items() if value is not None}
    if stops:
        config["eos_token_id"] = stops
    config.pop("_from_model_config", None)  # else transformers would take it for a guess, and make its own
    write_json(file, config)


def _of_quantization(record: Mapping[str, Any], comparison: Comparison | None) -> list[str]:
    """What to know of an adapter that was trained on a quantized base, or of a model that it was merged into."""
    if record["config"].get("quantize", "none") == "none":
        return []
    if comparison is None:
        return ["the adapter was trained on a base in 4 bits (NF4); in full precision its base is a little another one"]
    return [f"the adapter was merged into the dequantized weights that it was trained on: {comparison}"]


def _ending(outcome: Outcome) -> dict[str, Any]:
    losses = [step.loss for step in outcome.history]
    measured = [each.eval_loss for each in outcome.evaluations]
    metric = outcome.evaluations[0].metric if outcome.evaluations else None
    return {
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "tokens": sum(step.tokens for step in outcome.history),
        "trained_tokens": sum(step.trained_tokens for step in outcome.history),
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
        "first_eval_loss": measured[0] if measured else None,
        "final_eval_loss": measured[-1] if measured else None,
        "best_eval_loss": min((loss for loss in measured if math.isfinite(loss)), default=None),
        "eval_metric": None if metric is None else {"name": metric, **_of_metric(outcome.evaluations)},
        "measures": _measures(outcome),
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped_early,
    }


def _measures(outcome: Outcome) -> dict[str, Any] | None:
    """What the objective measured beside its loss: over the last steps, and on held-out rows at the end."""
    if not any(step.measures for step in outcome.history):
        return None
    held_out = dict(outcome.evaluations[-1].measures) if outcome.evaluations else None
    return {"training": lately(outcome.history), "held_out": held_out}


def _of_metric(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    best = best_of(evaluations)
    return {"first": evaluations[0].value, "final": evaluations[-1].value, "best": best.value if best else None}


def versions() -> dict[str, str]:
    """The versions of what a run depends on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _put(draft: Path, target: Path) -> None:
    """Move what was written to its place; what says that a model is there comes last."""
    for path in sorted(draft.iterdir(), key=lambda path: path.name in ("config.json", ADAPTER_CONFIG)):
        place = target / path.name
        if place.is_dir():  # of a run that was killed while it moved
            shutil.rmtree(place)
        os.replace(path, place)
    with contextlib.suppress(OSError):
        sync_one(target)


def _open_to_others(folder: Path) -> None:
    """Let whoever may read the card read all files: safetensors makes its own for the owner alone."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _children(target: Path, folder: str | Path) -> list[Path]:
    try:
        return list(target.iterdir())
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: str | Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--output {folder}: cannot be written: {reason}", "Name a folder in one that takes it.")
