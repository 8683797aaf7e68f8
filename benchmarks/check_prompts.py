"""Holds training prompts against transformers: equal ids for every exchange of every row, tokenizer and template.

    python benchmarks/check_prompts.py DATA_FOLDER TOKENIZERS_FOLDER [--templates FOLDER] [--rows N]

For each file, tokenizer and template (those that ship with Instil, and the family's own where MANIFEST.md names one):
the prompt's ids equal `apply_chat_template(messages[:i], add_generation_prompt=True)`; the ids of prompt and completion
together equal those of the whole text, or decode to it where the seam is split; BOS stands where the tokenizer itself
puts it, once. A row that spells a control token differs on purpose: it is listed, and equal when the spelling is taken
literally. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import instil
from instil.conversation import Conversation, Record
from instil.errors import DataError
from instil.prompt import (
    EncodedRecord,
    Exchange,
    PromptOptions,
    RecordEncoder,
    Renderer,
    builtin_templates,
    load_renderer,
)

CHUNK = 256
SHOWN = 5


@dataclass
class Result:
    """What came out for one tokenizer and template."""

    counts: Counter[str] = field(default_factory=Counter)
    spelled: Counter[str] = field(default_factory=Counter)  # file -> rows
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> rows
    differences: list[str] = field(default_factory=list)

    def differs(self, record: Record, what: str) -> None:
        self.counts["differ"] += 1
        self.differences.append(f"{record.source}: {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--templates", type=Path, default=_trl_templates(), help="chat templates; trl's by default")
    parser.add_argument("--rows", type=int, help="rows of each file, spread over it; all by default")
    parser.add_argument("--only", nargs="*", help="names of tokenizers")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    started = time.perf_counter()
    data = dict(_readable(arguments.data, arguments.rows))
    print(f"{len(data)} files, {sum(map(len, data.values())):,} rows\n")
    families = _families(arguments.tokenizers / "MANIFEST.md")
    print(_line("tokenizer", "template", "exchanges", "equal", "spelled", "rejected", "seams", "differ", "seconds"))
    results: dict[tuple[str, str], Result] = {}
    for folder in sorted(path for path in arguments.tokenizers.iterdir() if path.is_dir()):
        if arguments.only and folder.name not in arguments.only:
            continue
        own = [str(arguments.templates / families[folder.name])] if folder.name in families else []
        for template in [*own, *builtin_templates()]:
            begun = time.perf_counter()
            result = results[folder.name, Path(template).name] = check(folder, template, data)
            c = result.counts
            seams = "/".join(str(c[seam]) for seam in ("special", "compared", "split"))
            took = f"{time.perf_counter() - begun:.0f}"
            counted = (c["exchanges"], c["equal"], c["spelled"], c["rejected"], seams, c["differ"], took)
            print(_line(folder.name, Path(template).name, *counted), flush=True)
    return _conclude(results, time.perf_counter() - started)


def check(folder: Path, template: str, data: dict[str, list[Record]]) -> Result:
    """Holds one tokenizer with one template against transformers, over all the data."""
    result = Result()
    options = PromptOptions(template=template)
    renderer = load_renderer(folder, options)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    declared = [tokenizers.AddedToken(t, special=True, normalized=False) for t in renderer.tokenizer.added]
    reference.add_tokens(declared, special_tokens=True)
    encoder = RecordEncoder(renderer, options)
    for file, records in data.items():
        for start in range(0, len(records), CHUNK):
            encoded = encoder.encode(records[start : start + CHUNK])
            for row in encoded:
                if row.status == "rejected":
                    result.counts["rejected"] += 1
                    result.rejected[row.reason[:110]] += 1
                if row.spelled:
                    result.spelled[file] += 1
            _check_prompts(encoded, renderer, reference, template in builtin_templates(), result)
            _check_completions(encoded, renderer, reference, result)
    return result


def _check_prompts(
    rows: Sequence[EncodedRecord], renderer: Renderer, reference: Any, builtin: bool, result: Result
) -> None:
    groups: dict[str, list[tuple[EncodedRecord, Exchange, list[Any], list[Any]]]] = defaultdict(list)
    for row in rows:
        for exchange, conversation, turn in _prompts(row):
            messages, tools = renderer.wire(conversation)
            groups[json.dumps(tools)].append((row, exchange, messages[:turn], tools))
    for group in groups.values():
        found = reference.apply_chat_template(
            [messages for _, _, messages, _ in group],
            tools=group[0][3] or None,
            chat_template=renderer.template.text,
            add_generation_prompt=True,
            return_dict=False,
        )
        for (row, exchange, _, _), expected in zip(group, found, strict=True):
            result.counts["exchanges"] += 1
            result.counts[exchange.boundary if len(exchange.completion_ids) else "prompt"] += 1
            ids = exchange.prompt_ids.tolist()
            literal = renderer.encoder.encode(exchange.prompt_text)
            if ids == expected:
                result.counts["equal"] += 1
            elif literal == expected and row.spelled:
                result.counts["spelled"] += 1
                controls = set(renderer.encoder.controls.values())
                if sum(i in controls for i in ids) >= sum(i in controls for i in literal):
                    result.differs(row.record, "a spelled control token was not kept plain")
            else:
                at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
                result.differs(row.record, f"prompt ids differ from token {at} on: {exchange.prompt_text[:80]!r}")
            if builtin:
                _check_bos(row, ids, renderer, result)


def _check_bos(row: EncodedRecord, ids: list[int], renderer: Renderer, result: Result) -> None:
    backend = renderer.tokenizer.backend
    bos = renderer.tokenizer.special_tokens.get("bos_token")
    if bos is not None and bos in renderer.template.text:
        return  # this template's own first token serves the tokenizer as BOS
    number = None if bos is None else backend.token_to_id(bos)
    adds = backend.encode("a", add_special_tokens=True).ids[0] == number
    if adds != (ids[:1] == [number]) or (adds and ids[1:2] == [number]):
        result.differs(
            row.record, f"BOS: the tokenizer {'adds' if adds else 'does not add'} it, the prompt is {ids[:2]}"
        )


def _check_completions(rows: Sequence[EncodedRecord], renderer: Renderer, reference: Any, result: Result) -> None:
    """Prompt and completion together are the whole text's tokens, or decode to it where the seam is split."""
    pairs = [(row, exchange) for row in rows for exchange in row.exchanges if len(exchange.completion_ids)]
    if not pairs:
        return
    # One call of the tokenizer; its threads are what makes it fast enough.
    wholes = reference([e.prompt_text + e.completion_text for _, e in pairs], add_special_tokens=False)["input_ids"]
    for (row, exchange), whole in zip(pairs, wholes, strict=True):
        joined = [*exchange.prompt_ids.tolist(), *exchange.completion_ids.tolist()]
        if joined == whole or row.spelled:
            continue
        text = exchange.prompt_text + exchange.completion_text
        if row.record.kind == "text" or exchange.boundary != "split":
            result.differs(row.record, f"the ids of the whole differ ({exchange.boundary}): {text[-80:]!r}")
        elif renderer.tokenizer.decode(joined) not in (text, renderer.tokenizer.decode(whole)):
            result.differs(row.record, f"a split seam does not decode to the text: {exchange.prompt_text[-40:]!r}")


def _prompts(row: EncodedRecord) -> Iterator[tuple[Exchange, Conversation, int]]:
    """Each exchange with the messages that its prompt is made of: all before the answer."""
    if not row.exchanges or row.record.kind == "text":
        return
    found: list[tuple[Conversation, int]] = []
    for conversation in row.record.conversations:
        turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        if row.record.kind == "prompt":
            turns = [len(conversation.messages)]
        elif row.record.kind in ("preference", "labelled"):
            turns = turns[-1:]
        found += [(conversation, i) for i in turns if row.record.kind == "prompt" or _trained(conversation, i)]
    yield from ((exchange, *place) for exchange, place in zip(row.exchanges, found, strict=True))


def _trained(conversation: Conversation, turn: int) -> bool:
    return conversation.messages[turn].weight != 0


def _readable(folder: Path, rows: int | None) -> Iterator[tuple[str, list[Record]]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        name = str(path.relative_to(folder))
        try:
            records = list(instil.read(path, on_bad_row="skip"))
        except DataError as error:
            reason = str((error.problems or [error])[0]).removeprefix(f"{path}: ")
            print(f"not readable: {name}: {reason[:60]}")
            continue
        if not records:
            print(f"not readable: {name}: no row of a known shape")
            continue
        yield name, records[:: max(1, len(records) // rows)][:rows] if rows else records


def _families(manifest: Path) -> dict[str, str]:
    """The template that the manifest's table names for each tokenizer."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in manifest.open(encoding="utf-8")]
    return {row[0]: row[-1] for row in rows if row[-1].endswith(".jinja")}


def _trl_templates() -> Path | None:
    spec = find_spec("trl")
    return Path(str(spec.origin)).parent / "chat_templates" if spec else None


def _line(*cells: object) -> str:
    widths = (22, 16, 9, 9, 7, 8, 21, 6, 7)
    return "  ".join(
        str(cell).ljust(w) if i < 2 else str(cell).rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


def _conclude(results: dict[tuple[str, str], Result], seconds: float) -> int:
    spelled: dict[tuple[str, str], int] = {}
    rejected: Counter[str] = Counter()
    for (tokenizer, _), result in results.items():
        rejected.update(result.rejected)
        for file, rows in result.spelled.items():
            spelled[tokenizer, file] = max(rows, spelled.get((tokenizer, file), 0))
    print("\nrows that spell a control token (most of any template):")
    for (tokenizer, file), rows in sorted(spelled.items()):
        print(f"  {tokenizer}  {file}: {rows}")
    print("\nrows that a template refuses:")
    for reason, rows in rejected.most_common(40):
        print(f"  {rows:>7,}  {reason}")
    total = sum((result.counts for result in results.values()), Counter[str]())
    print("\n" + ", ".join(f"{total[key]:,} {key}" for key in ("exchanges", "equal", "spelled", "rejected", "differ")))
    print(f"{seconds:,.0f} s")
    for (tokenizer, template), result in results.items():
        for difference in result.differences[:SHOWN]:
            print(f"DIFFERS  {tokenizer} {template}: {difference}")
    return 1 if total["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
