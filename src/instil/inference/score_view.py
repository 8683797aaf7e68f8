"""Scores made visible: each token with its probability and rank, as JSON, as a table, as a page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from instil.inference.score import Likelihood, Parts, ScoredExchange, ScoredRow
from instil.prompt.inspect import Shown, TokenText, heading, parts

if TYPE_CHECKING:
    from rich.console import RenderableType

LEVELS = (
    (0.5, "0.5 or more"),
    (0.1, "0.1 to 0.5"),
    (0.01, "0.01 to 0.1"),
    (0.001, "0.001 to 0.01"),
    (0.0, "less than 0.001"),
)
"""The lowest probability of each shade of the page, and its name in the legend."""

_PARTS = (("prompt", "instruction"), ("completion", "answer"))


class _Token(NamedTuple):
    """One token and what the model makes of it; the probability is None where nothing precedes."""

    part: str
    shown: Shown
    log_prob: float | None
    rank: int | None

    @property
    def probability(self) -> float | None:
        return None if self.log_prob is None else math.exp(self.log_prob)


def to_json(row: ScoredRow, texts: TokenText, control: frozenset[int]) -> Iterator[dict[str, Any]]:
    """Each exchange of a row as plain JSON values."""
    for number, scored in enumerate(row.exchanges, 1):
        yield {
            "source": str(row.row.record.source),
            "exchange": number,
            "label": scored.exchange.label,
            **likelihood_to_json(scored.likelihood),
            "tokens": [
                {
                    "id": token.shown.id,
                    "text": texts(token.shown.id),
                    "part": token.part,
                    "weight": token.shown.weight,
                    "log_probability": token.log_prob,
                    "probability": token.probability,
                    "rank": token.rank,
                }
                for token in _tokens(scored, texts, control)
            ],
        }


def likelihood_to_json(parts: Parts) -> dict[str, Any]:
    """The likelihood of instruction, of answer, and the loss of both, as plain JSON values."""
    named = zip(("prompt", "completion"), parts, strict=True)
    loss, weight = parts.whole.loss, parts.whole.weight
    return {**{name: _of_part(each) for name, each in named}, "loss": _finite(loss), "weight": weight}


def to_text(row: ScoredRow, texts: TokenText, control: frozenset[int]) -> Iterator[RenderableType]:
    """A row for the terminal: a heading, a table of the tokens and a line of totals for each exchange."""
    from rich.table import Table
    from rich.text import Text

    yield Text(said(row), "bold")
    for number, scored in enumerate(row.exchanges, 1):
        yield Text(heading(scored.exchange, number, len(row.exchanges)), "dim")
        table = Table(box=None, pad_edge=False)
        for name in ("Token", "Part", "Probability", "Rank", "Weight"):
            table.add_column(name, justify="left" if name in ("Token", "Part") else "right")
        for token in _tokens(scored, texts, control):
            weight = f"{token.shown.weight:g}" if token.shown.weight else ""
            style = "green" if weight else "bold cyan" if token.shown.control else ""
            cells = dict(_PARTS)[token.part], _probability(token.probability), _rank(token.rank), weight
            table.add_row(Text(token.shown.text, style), *cells)
        yield table
        yield Text("\n".join(totals(scored.likelihood)) + "\n")


def said(row: ScoredRow) -> str:
    """Where a row stands, and what became of it."""
    record, reason = row.row.record, f": {row.row.reason}" if row.row.reason else ""
    return f"{record.source}  {record.shape}, {row.row.status}{reason}"


def totals(parts: Parts) -> list[str]:
    """A line for the instruction, one for the answer, and one for the loss, if any token is trained."""
    lines = [_line(name, each) for (_, name), each in zip(_PARTS, parts, strict=True) if each.tokens]
    whole = parts.whole
    return [*lines, f"loss of what is trained: {whole.loss:.4f} nats a token"] if whole.loss is not None else lines


def perplexity_text(value: float) -> str:
    """A perplexity in a few digits."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _line(name: str, each: Likelihood) -> str:
    assert each.perplexity is not None
    return (
        f"{name}: {each.tokens:,} tokens, log-likelihood {each.log_likelihood:,.2f} nats, perplexity "
        f"{perplexity_text(each.perplexity)}, {each.top1 / each.tokens:.0%} of rank 1"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>instil score</title><style>
:root {{ color-scheme: light dark; --ink: #1c1c1c; --quiet: #595959; --ground: #fff; --line: #d4d4d4;
--control: #0a4f96; --p0: transparent; --p1: #fdf0cf; --p2: #fbd493; --p3: #f2a978; --p4: #e5857b }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e4; --quiet: #a6a6a6; --ground: #161616; --line: #444;
--control: #8cc4ff; --p1: #3b3420; --p2: #5c4416; --p3: #7a3d17; --p4: #8c2f2f }} }}
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto 6rem; max-width: 70rem; padding: 0 1rem;
color: var(--ink); background: var(--ground) }}
h2 {{ font-size: 1rem; margin: 2rem 0 0; overflow-wrap: anywhere }} p {{ margin: .2rem 0; color: var(--quiet) }}
.tokens {{ font: 13px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
border: 1px solid var(--line); padding: .6rem; margin: .3rem 0 }}
.tokens span {{ border-right: 1px solid color-mix(in srgb, currentColor 40%, transparent) }}
.l0 {{ background: var(--p0) }} .l1 {{ background: var(--p1) }} .l2 {{ background: var(--p2) }}
.l3 {{ background: var(--p3) }} .l4 {{ background: var(--p4) }}
.t {{ text-decoration: underline 2px; text-underline-offset: 3px }} .c {{ color: var(--control); font-weight: 600 }}
.legend span {{ color: var(--ink); padding: .1rem .4rem; border: 1px solid var(--line); white-space: nowrap }}
.legend .c {{ color: var(--control) }}
.tokens span:is(:hover, :focus) {{ outline: 2px solid var(--control) }}
.tokens span:is(:hover, :focus)::after {{ content: attr(title); position: fixed; inset: auto 0 0 0; padding: .5rem 1rem;
background: var(--ink); color: var(--ground); font-weight: 400; white-space: pre-wrap }}
</style></head><body><h1>What the model makes of each token</h1>
<p class="legend">Probability given what stands before: {legend}; <span class="t">trained</span>,
<span class="c">control token</span>. Point at a token, or touch it, for its probability and rank.</p>
{body}
</body></html>
"""


def to_html(rows: Iterable[ScoredRow], texts: TokenText, control: frozenset[int]) -> str:
    """Rows as one page that needs nothing beside it."""
    body: list[str] = []
    for row in rows:
        body.append(f"<h2>{html.escape(said(row))}</h2>")
        for number, scored in enumerate(row.exchanges, 1):
            body.append(f"<p>{html.escape(heading(scored.exchange, number, len(row.exchanges)))}</p>")
            spans = (_span(token) for token in _tokens(scored, texts, control))
            body.append(f'<div class="tokens">{"".join(spans)}</div>')
            body += (f"<p>{html.escape(line)}</p>" for line in totals(scored.likelihood))
    legend = " ".join(f'<span class="l{level}">{name}</span>' for level, (_, name) in enumerate(LEVELS))
    return _PAGE.format(legend=legend, body="\n".join(body))


def _span(token: _Token) -> str:
    shown, probability = token.shown, token.probability
    kinds = [] if probability is None else [f"l{next(n for n, (low, _) in enumerate(LEVELS) if probability >= low)}"]
    kinds += ["c"] * shown.control + ["t"] * bool(shown.weight)
    facts = (
        f"probability {_probability(probability)}, rank {_rank(token.rank)}, " if token.rank else "nothing precedes, "
    )
    title = f"{facts}{dict(_PARTS)[token.part]}, id {shown.id}, weight {shown.weight:g}"
    text = html.escape(shown.text) + ("\n" if shown.ends_line else "")
    return f'<span class="{" ".join(kinds)}" tabindex="-1" title="{title}">{text}</span>'


def _tokens(scored: ScoredExchange, texts: TokenText, control: frozenset[int]) -> Iterator[_Token]:
    found = zip(scored.log_probs.tolist(), scored.ranks.tolist(), strict=True)
    for part, ids, weights in parts(scored.exchange):
        for shown in texts.show(ids, weights, control=control):
            log_prob, rank = next(found)
            yield _Token(part, shown, log_prob, rank) if rank else _Token(part, shown, None, None)


def _of_part(each: Likelihood) -> dict[str, Any]:
    return {
        "tokens": each.tokens,
        "log_likelihood": each.log_likelihood,
        "perplexity": _finite(each.perplexity),
        "rank_1": each.top1,
    }


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _probability(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def _rank(rank: int | None) -> str:
    return "" if rank is None else f"{rank:,}"
