"""`instil score`: what a model makes of given answers, token by token, or in all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from instil.cli.rows import RowOptions, encoded, noting, refuse_bad, write_page
from instil.errors import RowProblem

if TYPE_CHECKING:
    from instil.inference.score import Parts, ScoredRow

_WORST = 5


class ScoreOptions(RowOptions):
    """Everything that `instil score` takes."""

    model: str = Field(description="Model or adapter: a folder or a hub name, with weights in safetensors.")
    tokens_per_batch: int = Field(default=8192, ge=2, description="Token budget of a batch.")
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; only from a source you trust."
    )
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = Field(
        default=False, description="Print a JSON object for each exchange, or for the summary."
    )


def score(*, options: Annotated[ScoreOptions, Parameter(name="*")]) -> None:
    """Show how probable each token of rows is to a model, and its rank, or the likelihood of all rows (--summary).

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    from instil.prompt import RecordEncoder, load_renderer, longest_exchange
    from instil.prompt.inspect import TokenText

    records, chosen = options.read(), options.prompt_options()
    renderer = load_renderer(options.model, chosen)
    encoder = RecordEncoder(
        renderer, chosen, longest_exchange(renderer, chosen, options.tokens_per_batch), options.objective
    )
    first, last = (1, None) if options.summary else options.selected()
    if options.on_bad_row == "error":
        refuse_bad(records, encoder, first, last)
    from instil.inference.score import load_reader, score_rows  # torch, which takes its time

    model = load_reader(options.model, renderer, trust_remote_code=options.trust_remote_code)
    rejected: list[RowProblem] = []
    rows = noting(encoded(records, encoder, first, last), rejected)
    scored = score_rows(model, rows, options.tokens_per_batch)
    if options.summary:
        _summarize(scored, options.as_json)
    else:
        _show(scored, options, TokenText(renderer.tokenizer), frozenset(renderer.encoder.controls.values()))
    if options.rejects is not None:
        records.reject(rejected)


def _show(rows: Iterator[ScoredRow], options: ScoreOptions, texts: Any, control: frozenset[int]) -> None:
    from instil.inference.score_view import said, to_html, to_json, to_text

    if options.html is not None:
        write_page(options.html, to_html(rows, texts, control))
        sys.stderr.write(f"instil: wrote {options.html}\n")
    elif options.as_json:
        for row in rows:
            if not row.exchanges:
                sys.stderr.write(f"instil: note: {said(row)}\n")
            for each in to_json(row, texts, control):
                sys.stdout.write(json.dumps(each, ensure_ascii=False) + "\n")
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for row in rows:
            for shown in to_text(row, texts, control):
                console.print(shown, soft_wrap=True)
        if options.row is None and options.rows is None:
            console.print("The first rows; --rows A:B shows others, --summary adds up all.", style="dim")


def _summarize(rows: Iterable[ScoredRow], as_json: bool) -> None:
    from instil.inference.score import Parts
    from instil.inference.score_view import likelihood_to_json, perplexity_text, totals

    counted: dict[str, int] = {}
    found: list[tuple[str, int, Parts]] = []
    total = Parts()
    for row in rows:
        counted[row.row.status] = counted.get(row.row.status, 0) + 1
        for number, scored in enumerate(row.exchanges, 1):
            parts = scored.likelihood
            total = Parts(total.prompt + parts.prompt, total.completion + parts.completion)
            if parts.completion.tokens:
                found.append((str(row.row.record.source), number, parts))
    found.sort(key=lambda each: each[2].completion.log_likelihood / each[2].completion.tokens)
    worst = [
        {"source": source, "exchange": number, **likelihood_to_json(parts)["completion"]}
        for source, number, parts in found[:_WORST]
    ]
    if as_json:
        summary = {"rows": counted, **likelihood_to_json(total), "least_likely": worst}
        sys.stdout.write(json.dumps(summary, ensure_ascii=False) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    lines = [f"rows: {', '.join(f'{count:,} {status}' for status, count in counted.items())}", *totals(total)]
    lines += ["the least likely answers:"] if found else []
    for source, number, parts in found[:_WORST]:
        lines.append(f"  {source}, exchange {number}: perplexity {perplexity_text(parts.completion.perplexity or 0.0)}")
    console.print(Text("\n".join(lines)), soft_wrap=True)
