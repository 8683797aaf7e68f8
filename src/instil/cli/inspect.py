"""`instil inspect`: what would be trained, token by token, or counted over the whole data set."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field, model_validator

from instil.cli.rows import RowOptions, encoded, noting, refuse_bad, write_page
from instil.data import Records
from instil.errors import RowProblem, UsageError
from instil.packing.options import PackOptions


class InspectOptions(PackOptions, RowOptions):
    """Everything that `instil inspect` takes."""

    model: str | None = Field(default=None, description="Model whose tokenizer is used: a folder or a hub name.")
    tokenizer: str | None = Field(default=None, description="Tokenizer, in place of a model's.")

    @model_validator(mode="after")
    def _fits_together(self) -> InspectOptions:
        if self.model is None and self.tokenizer is None:
            raise UsageError("--tokenizer: is missing, and so is --model", "Name the folder of one, or one on the hub.")
        if self.model is not None and self.tokenizer is not None:
            raise UsageError("--model and --tokenizer: both were given", "Give one: each names the tokenizer.")
        return self


def inspect(*, options: Annotated[InspectOptions, Parameter(name="*")]) -> None:
    """Show the tokens of rows with what is trained marked, or count over the whole data set (--summary).

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    records = options.read()
    if options.summary:
        _summarize(records, options)
    else:
        _show(records, options)


def _summarize(records: Records, options: InspectOptions) -> None:
    from instil.packing import cache_folder, pack, prepare

    prepared = prepare(
        records,
        options.model or options.tokenizer,
        options.prompt_options(),
        tokens_per_batch=options.tokens_per_batch,
        workers=options.workers,
        cache=cache_folder(options.cache_dir) if options.cache else None,
        count_roles=True,
    )
    packs = pack(prepared.trees, options.tokens_per_batch, seed=options.seed, share_prefixes=options.share_prefixes)
    described = prepared.describe(packs.report)
    if options.as_json:
        sys.stdout.write(json.dumps(described, ensure_ascii=False) + "\n")
        return
    from instil.cli.summary import show

    show(described)


def _show(records: Records, options: InspectOptions) -> None:
    from rich.console import Console

    from instil.prompt import RecordEncoder, load_renderer
    from instil.prompt.inspect import TokenText, to_html, to_json, to_text

    chosen = options.prompt_options()
    renderer = load_renderer(options.model or options.tokenizer, chosen, text=options.objective == "pretrain")
    limits = [limit for limit in (renderer.tokenizer.max_length, options.tokens_per_batch) if limit is not None]
    encoder = RecordEncoder(renderer, chosen, chosen.max_length or min(limits), options.objective)
    for warning in renderer.warnings:
        sys.stderr.write(f"instil: warning: {warning}\n")
    first, last = options.selected()
    if options.on_bad_row == "error":
        refuse_bad(records, encoder, first, last)
    rejected: list[RowProblem] = []
    rows = noting(encoded(records, encoder, first, last), rejected)
    texts, control = TokenText(renderer.tokenizer), frozenset(renderer.encoder.controls.values())
    if options.html is not None:
        write_page(options.html, to_html(rows, texts, control))
        sys.stderr.write(f"instil: wrote {options.html}\n")
    elif options.as_json:
        for row in rows:
            sys.stdout.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
    else:
        console = Console(highlight=False)
        for row in rows:
            console.print(to_text(row, texts, control), soft_wrap=True)
        if options.row is None and options.rows is None:
            console.print("The first rows; --rows A:B shows others, --summary counts all.", style="dim")
    if options.rejects is not None:
        records.reject(rejected)
