"""The output folder of a run: the tuned model, the tokenizer and template it was taught with, and where it came from.

    model or adapter         by the callable handed in
    tokenizer.json, …        `AutoTokenizer` gives the ids that training saw
    chat_template.jinja      the template that was trained with
    generation_config.json   ends at the stop tokens that were trained
    instil.json              every option, the data by hash, versions, how the run ended
    metrics.jsonl            every step and evaluation
    README.md, loss.svg      the model card

It is written beside its place and renamed, so that it appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from instil.data import Records
from instil.errors import UsageError
from instil.packing import Prepared
from instil.prompt import ChatTemplate, Renderer, Tokenizer
from instil.training.card import draw_loss, example_of, model_card
from instil.training.comparison import Comparison
from instil.training.events import Outcome, Resolved
from instil.training.metrics import write_metrics

_FRESH = "Name a new folder, as in --output tuned."
_NO_CURVE = "the model card has no loss curve: matplotlib is not installed (pip install matplotlib)"
_PACKAGES = ("instil", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")
_PROBE = "Hello, World! It's 12,345.67 – naïve café, 日本語, Ελληνικά 🙂\n\n\tdef f(x):\n    return x  +  1\n"

# Held by tokenizer.json or chat_template.jinja, where it says more or would be said twice.
_SAID_ELSEWHERE = ("chat_template", "added_tokens_decoder", "add_bos_token", "add_eos_token")
# True of the source alone: its classes, files and place.
_OF_THE_SOURCE = ("auto_map", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")


def check_output(folder: str | Path) -> None:
    """Refuse a place where no output can be, before anything is trained for it.

    Raises:
        UsageError: A file stands there, the folder holds something, or it cannot be written.
    """
    target = Path(os.path.realpath(folder))
    parent = target.parent
    if target.exists():
        if not target.is_dir():
            raise UsageError(f"--output {folder}: is a file", _FRESH)
        if held := sorted(child.name for child in _children(target, folder)):
            raise UsageError(f"--output {folder}: the folder holds something ({', '.join(held[:5])})", _FRESH)
        if target.is_mount():
            raise UsageError(f"--output {folder}: is a mount point, which cannot be replaced", "Name a folder in it.")
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"--output {folder}: {parent} is no folder", _FRESH)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".instil-", dir=parent))
    except OSError as error:
        raise _unwritable(folder, error) from error


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
        {"path": path, "sha256": _sha256(Path(path)), "records": sum(counts.get(path, {}).values())}
        for path in records.paths
    ]
    return {"fingerprint": records.fingerprint(), "files": files}


def write_output(
    folder: str | Path,
    *,
    save: Callable[[Path], None],
    config: BaseModel,
    renderer: Renderer,
    prepared: Prepared,
    resolved: Resolved,
    outcome: Outcome,
    data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    comparison: Comparison | None = None,
) -> list[str]:
    """Write the output folder, whole or not at all: beside its place first, then renamed.

    Args:
        folder: Must not exist, or be empty (`check_output` says so before training).
        save: Is given an existing folder and writes the model or the adapter into it, weights and configuration.
        config: Every option of the run (`TrainConfig`).
        renderer: What the prompts were rendered with; its tokenizer and template are saved.
        prepared: The data that was trained.
        resolved: What the run resolved.
        outcome: How it ended.
        data: As `describe_data` gave it.
        eval_data: The same of the held-out files, if there are any.
        generation_config: What the base model generates with, if `save` writes no `generation_config.json` and the
            model is no local folder.
        comparison: Of the merged model with the quantized one that was trained.

    Returns:
        What a person should know about what was written, a sentence each.

    Raises:
        UsageError: The folder cannot be written.
    """
    target = Path(os.path.realpath(folder))
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        draft.mkdir(parents=True)
        save(draft)
        base = _base_model(config)
        stops = {token: renderer.tokenizer.backend.token_to_id(token) for token in prepared.stop_tokens}
        notes = save_tokenizer(draft, renderer.tokenizer, renderer.template)
        notes += _of_quantization(config, comparison)
        _save_generation_config(draft, base, generation_config, [i for i in stops.values() if i is not None])
        write_metrics(draft / "metrics.jsonl", outcome.history, outcome.evaluations)
        provenance = {
            "format": 1,
            "base_model": base,
            "kind": "adapter" if (draft / "adapter_config.json").exists() else "model",
            "config": config.model_dump(mode="json"),
            "resolved": {
                "steps": resolved.steps,
                "epochs": resolved.epochs,
                "tokens_per_step": resolved.tokens_per_step,
                **resolved.settings,
            },
            "data": data,
            "eval_data": eval_data,
            "summary": prepared.describe(),
            "template": {
                "name": renderer.template.name,
                "fingerprint": renderer.template.fingerprint(),
                "arguments": renderer.template.arguments,
            },
            "stop_tokens": stops,
            "added_tokens": {t: renderer.tokenizer.backend.token_to_id(t) for t in renderer.tokenizer.added},
            "outcome": _ending(outcome),
            "comparison": comparison and comparison.to_dict(),
            "notes": notes,
            "versions": versions(),
        }
        drawn = draw_loss(draft / "loss.svg", outcome.history, outcome.evaluations)
        card = model_card(_plain(provenance), target.name, example_of(renderer), curve=drawn)
        (draft / "README.md").write_text(card, encoding="utf-8")
        _write_json(draft / "instil.json", provenance)
        _open_to_others(draft)
        _sync(draft)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _unwritable(folder, error) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _put(draft, target, folder)
    return notes if drawn else [*notes, _NO_CURVE]


def save_tokenizer(folder: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """Write a tokenizer with its added tokens and the template it is served with, for plain transformers.

    The template stands in `chat_template.jinja` and nowhere else. The tokenizer is stored as the one that was trained
    with, whole, so it is loaded by the class that takes it as it is.

    Returns:
        What plain transformers will do otherwise than training did, a sentence each: usually nothing.
    """
    state = json.loads(tokenizer.backend.to_str())
    state["truncation"] = state["padding"] = None  # a caller's business, which may have been left on
    _write_json(folder / "tokenizer.json", state)
    config: dict[str, Any] = {"model_max_length": tokenizer.max_length} if tokenizer.max_length else {}
    source = Path(tokenizer.name) / "tokenizer_config.json"
    if source.is_file():
        config = json.loads(source.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in (*_SAID_ELSEWHERE, *_OF_THE_SOURCE)}
    named = {key: value for key, value in tokenizer.special_tokens.items() if isinstance(value, str)}
    _write_json(folder / "tokenizer_config.json", {**config, **named, "tokenizer_class": "PreTrainedTokenizerFast"})
    for stale in ("chat_template.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / stale).unlink(missing_ok=True)
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
    _write_json(file, config)


def _of_quantization(config: BaseModel, comparison: Comparison | None) -> list[str]:
    """What to know of an adapter that was trained on a quantized base, or of a model that it was merged into."""
    if getattr(config, "quantize", "none") == "none":
        return []
    if comparison is None:
        return ["the adapter was trained on a base in 4 bits (NF4); in full precision its base is a little another one"]
    return [f"the adapter was merged into the dequantized weights that it was trained on: {comparison}"]


def _ending(outcome: Outcome) -> dict[str, Any]:
    losses = [step.loss for step in outcome.history]
    measured = [each.eval_loss for each in outcome.evaluations]
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
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped_early,
    }


def versions() -> dict[str, str]:
    """The versions of what a run depends on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _base_model(config: BaseModel) -> str | None:
    base = getattr(config, "model", None) or getattr(config, "init", None)
    return None if base is None else str(base)


def _put(draft: Path, target: Path, folder: str | Path) -> None:
    """Move the finished folder to its place. Should something have come there meanwhile, the work is not lost."""
    try:
        os.replace(draft, target)
    except OSError as error:
        raise UsageError(
            f"--output {folder}: something came there while training: {error.strerror}",
            f"The tuned model is whole, in {draft}: move it where you like.",
        ) from error
    with contextlib.suppress(OSError):
        _sync_one(target.parent)


def _open_to_others(folder: Path) -> None:
    """Let whoever may read the card read all files: safetensors makes its own for the owner alone."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sync(folder: Path) -> None:
    """Have the disk hold all of a folder before its name appears."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _children(target: Path, folder: str | Path) -> list[Path]:
    try:
        return list(target.iterdir())
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: str | Path, error: OSError) -> UsageError:
    reason = error.strerror or error
    return UsageError(f"--output {folder}: cannot be written: {reason}", "Name a folder in one that takes it.")


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # JSON escapes half a pair alike


def _plain(value: Any) -> Any:
    """The value as strict JSON holds it: what is no finite number is null, what is unknown is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
