"""The file of `--config`: the flags of a command, written as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from instil.errors import UsageError, nearest

_EXAMPLE = "Write one setting on each line, as in `prompt_weight: 0.5`."
_MAPPINGS = ("columns", "template-args")


def take(tokens: list[str]) -> str | None:
    """Take `--config FILE`, or `--config=FILE`, out of the arguments."""
    found: list[str] = []
    while at := next((n for n, token in enumerate(tokens, 1) if token.partition("=")[0] == "--config"), 0):
        _, equals, file = tokens.pop(at - 1).partition("=")
        if not equals:
            file = tokens.pop(at - 1) if at <= len(tokens) else ""
        if not file:
            raise UsageError("--config: names no file", "Give a YAML file of flags, as in `prompt_weight: 0.5`.")
        found.append(file)
    if len(found) > 1:
        raise UsageError(f"--config {found[1]}: given twice", "Put all settings into one file.")
    return found[0] if found else None


def load(file: str, known: Collection[str]) -> dict[str, Any]:
    """The settings of the file, by the names of their flags, of which `known` are all."""
    path = Path(file)
    if not path.exists():
        raise UsageError(f"--config {file}: no such file", "Check the path.")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"--config {file}: cannot be read: {error.strerror}", "Name a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {file}: not YAML: {' '.join(str(error).split())}", "Mend the file.") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file}: holds no settings", _EXAMPLE)
    for key, value in settings.items():
        if not isinstance(key, str):
            raise UsageError(f"--config {file}: {key!r} is no name of a setting", _EXAMPLE)
        if key.replace("_", "-") not in known:
            raise UsageError(f"--config {file}: {key}: there is no such setting", nearest(_flag(key), known))
        if isinstance(value, dict) and _flag(key) not in _MAPPINGS:
            raise UsageError(f"--config {file}: {key}: takes no settings of its own", _EXAMPLE)
    by_flag = {_flag(key): value for key, value in settings.items()}
    if len(by_flag) < len(settings):
        raise UsageError(f"--config {file}: a setting is written twice, with - and with _", "Leave one out.")
    if isinstance(arguments := by_flag.get("template-args"), dict):
        by_flag["template-args"] = json.dumps({name: _as_text(value) for name, value in arguments.items()}, default=str)
    return by_flag


def values(text: str) -> list[Any]:
    """Values written on the command line with commas between them, each read as in the file.

    Raises:
        ValueError: They are not YAML, or there is none.
    """
    try:
        found = yaml.load(f"[{text}]", _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {getattr(error, 'problem', None) or error}") from error
    if not found:
        raise ValueError("has no value")
    return list(found)


def _as_text(value: Any) -> Any:
    """The value as the flag takes it, which reads text as YAML: a text that YAML reads otherwise stands in quotes."""
    if not isinstance(value, str):
        return value
    try:
        return value if yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    except yaml.YAMLError:
        return json.dumps(value, ensure_ascii=False)


def _flag(key: str) -> str:
    return key.replace("_", "-")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value!r} stands there twice, again in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# As in YAML 1.2 and in what the flags take, on and off are words.
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
