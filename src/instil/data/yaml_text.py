"""A YAML list of rows, one by one, each with its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from instil.data.strict_json import fault

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _RowLoader(Composer, SafeConstructor, Resolver):
    """Composes and constructs one row at a time, from the events of libyaml's fast parser."""

    def __init__(self, stream: BinaryIO) -> None:
        events = _Loader(stream)
        self.check_event = events.check_event
        self.peek_event = events.peek_event
        self.get_event = events.get_event
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)


def read_values(stream: BinaryIO) -> Iterator[tuple[int, int, Any, str]]:
    """Each element of the list: its line and column, its value, and why it cannot be a row, or ""."""
    line = column = 1
    try:
        loader = _RowLoader(stream)
        while loader.check_event(yaml.StreamStartEvent, yaml.DocumentStartEvent):
            loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            return
        start = loader.get_event()
        line = start.start_mark.line + 1
        if not isinstance(start, yaml.SequenceStartEvent):
            yield line, column, None, "the file must be a list of rows, each with its columns"
            return
        while not loader.check_event(yaml.SequenceEndEvent):
            line, column = _begin(loader)
            yield line, column, *_read_value(loader)
            column += 1  # what breaks off behind the row does not stand at its place
        loader.get_event()
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            yield *_begin(loader), None, "a second document follows; a file holds one list"
    except (yaml.YAMLError, RecursionError) as error:
        reason = f"malformed YAML{_place(error)}: {_explained(error)}; the rest of the file cannot be read"
        yield line, column, None, reason


def _begin(loader: _RowLoader) -> tuple[int, int]:
    mark = loader.peek_event().start_mark
    return mark.line + 1, mark.column + 1


def _read_value(loader: _RowLoader) -> tuple[Any, str]:
    node = loader.compose_node(None, 0)
    twice = _repeated_key(node)
    if twice:
        return None, f"the key {twice!r} stands twice in one object"
    try:
        value = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        return None, f"malformed YAML{_place(error)}: {_explained(error)}"
    return value, fault(value)


def _repeated_key(node: Any) -> str:
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) != len(keys):
                return str(next(key for key in keys if keys.count(key) > 1))[:60]
            waiting += [value for _, value in node.value]
    return ""


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"


def _explained(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
