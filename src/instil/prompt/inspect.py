"""Exchanges made visible: each token as text, with what is trained marked."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instil.prompt.encode import EncodedRecord
from instil.prompt.exchange import Exchange
from instil.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BETWEEN = "│"
# White space by signs of its own, other control characters by Unicode's pictures of them, and what turns the direction
# of writing by a full stop in a box: none of them may act on the terminal.
VISIBLE = (
    {code: 0x2400 + code for code in range(32)}
    | dict.fromkeys([*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "⊡")
    | str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
)

PROOFS = {
    "special": "a special token stands at the seam",
    "compared": "the tokens of the whole begin with the prompt's",
    "split": "a token would straddle the seam; the completion was encoded by itself",
    "none": "a prompt without an answer",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """One token as it is shown.

    Args:
        text: What it stands for, white space visible.
        id: Its id.
        weight: Its weight in the loss.
        control: Whether it steers the model rather than says something.
        ends_line: Whether a line ends with it.
    """

    text: str
    id: int
    weight: float
    control: bool
    ends_line: bool


class TokenText:
    """The text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._special = {i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
        self._bytes = _byte_alphabet() if "ByteLevel" in str(tokenizer.backend.decoder) else {}

    def __call__(self, token_id: int) -> str:
        """The text; bytes that are no whole character as `<0xE2>`."""
        return _decoded(self.raw(token_id))

    def raw(self, token_id: int) -> bytes:
        """The bytes that it stands for, perhaps a part of a character."""
        if token_id in self._special:
            return self._special[token_id].encode()
        piece = self._backend.id_to_token(token_id) or f"<id {token_id}>"
        if self._bytes:
            return bytes(self._bytes.get(char, 63) for char in piece)
        found = _BYTE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()

    def show(self, ids: Iterable[Any], weights: Iterable[Any], *, control: frozenset[int]) -> list[Shown]:
        """The tokens as they are shown."""
        shown = []
        for token_id, weight in zip(map(int, ids), map(float, weights), strict=True):
            text = self(token_id)
            shown.append(Shown(text.translate(VISIBLE), token_id, weight, token_id in control, text.endswith("\n")))
        return shown


def to_json(row: EncodedRecord) -> dict[str, Any]:
    """A row as plain JSON values: `source`, `status`, `reason`, and its `exchanges` token by token."""
    return {
        "source": str(row.record.source),
        "shape": row.record.shape,
        "kind": row.record.kind,
        "status": row.status,
        "reason": row.reason,
        "control_tokens_spelled": list(row.spelled),
        "left_out": list(row.notes),
        "exchanges": [
            {
                "label": exchange.label,
                "prompt_text": exchange.prompt_text,
                "completion_text": exchange.completion_text,
                "prompt_ids": exchange.prompt_ids.tolist(),
                "prompt_weights": exchange.prompt_weights.tolist(),
                "completion_ids": exchange.completion_ids.tolist(),
                "weights": exchange.completion_weights.tolist(),
                "boundary": exchange.boundary,
            }
            for exchange in row.exchanges
        ],
    }


def to_text(row: EncodedRecord, texts: TokenText, control: frozenset[int]) -> Text:
    """A row for the terminal. Trained tokens are green and stand in `⟦ ⟧`, so that they show without colour too."""
    from rich.text import Text

    out = Text()
    out.append(f"{row.record.source}", "bold")
    out.append(
        f"  {', '.join(filter(None, (row.record.shape, row.status)))}"
        + (f": {row.reason}" if row.reason else "")
        + "\n"
    )
    for number, exchange in enumerate(row.exchanges, 1):
        out.append(heading(exchange, number, len(row.exchanges)) + "\n", "dim")
        trained = 0.0
        for part, ids, weights in parts(exchange):
            for shown in texts.show(ids, weights, control=control):
                if shown.weight != trained:
                    out.append(("⟧" if trained else "") + _opening(shown.weight), "green")
                    trained = shown.weight
                style = ("green " if shown.weight else "") + ("bold cyan" if shown.control and not shown.weight else "")
                out.append(shown.text, style.strip() or ("dim" if part == "prompt" else ""))
                out.append("\n" if shown.ends_line else _BETWEEN, "" if shown.ends_line else "dim")
        out.append("⟧\n" if trained else "\n", "green")
    return out


def _opening(weight: float) -> str:
    return "" if not weight else "⟦" if weight == 1 else f"⟦×{weight:g} "


def parts(exchange: Exchange) -> Sequence[tuple[str, Any, Any]]:
    """The name, the ids and the weights of the prompt, then of the completion."""
    return (
        ("prompt", exchange.prompt_ids, exchange.prompt_weights),
        ("completion", exchange.completion_ids, exchange.completion_weights),
    )


def heading(exchange: Exchange, number: int, of: int) -> str:
    """What an exchange is, in a line: which one of its row, its tokens, its seam."""
    label = f" ({exchange.label})" if exchange.label else ""
    return (
        f"exchange {number} of {of}{label}: {len(exchange.prompt_ids):,} + {len(exchange.completion_ids):,} tokens; "
        f"seam: {exchange.boundary} ({PROOFS[exchange.boundary]})"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>instil inspect</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
h2 {{ font-size: 1rem; margin: 2rem 0 0 }} p {{ margin: .2rem 0; color: #555 }}
.tokens {{ font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ddd; padding: .6rem }}
.tokens span {{ border-right: 1px solid #ddd }} .t {{ background: #cdeccd }} .w {{ background: #f5ecc0 }}
.c {{ color: #0a58a8; font-weight: 600 }} .p {{ color: #666 }}
@media (prefers-color-scheme: dark) {{ body, .tokens {{ background: #161616; color: #ddd; border-color: #444 }}
.tokens span {{ border-color: #444 }} .t {{ background: #1d4d1d }} .w {{ background: #55491a }} .c {{ color: #7db8f0 }}
p, .p {{ color: #999 }} }}
</style></head><body><h1>What is trained</h1>
<p><span class="t">trained</span>, <span class="w">trained with another weight than 1</span>,
<span class="c">control token</span>, <span class="p">prompt</span>. A token's id and weight show under the pointer.</p>
{body}
</body></html>
"""


def to_html(rows: Iterable[EncodedRecord], texts: TokenText, control: frozenset[int]) -> str:
    """Rows as one page that needs nothing beside it."""
    return _PAGE.format(body=to_fragment(rows, texts, control))


def to_fragment(rows: Iterable[EncodedRecord], texts: TokenText, control: frozenset[int]) -> str:
    """Rows as HTML for a page that has the styles of this one."""
    body: list[str] = []
    for row in rows:
        reason = f": {row.reason}" if row.reason else ""
        body.append(f"<h2>{html.escape(str(row.record.source))}</h2>")
        body.append(f"<p>{html.escape(f'{row.record.shape}, {row.status}{reason}')}</p>")
        for number, exchange in enumerate(row.exchanges, 1):
            body.append(f"<p>{html.escape(heading(exchange, number, len(row.exchanges)))}</p>")
            spans = (
                _span(shown, part)
                for part, ids, weights in parts(exchange)
                for shown in texts.show(ids, weights, control=control)
            )
            body.append(f'<div class="tokens">{"".join(spans)}</div>')
    return "\n".join(body)


def _span(shown: Shown, part: str) -> str:
    kinds = ["p"] if part == "prompt" and not shown.control else []
    kinds += ["c"] if shown.control else []
    kinds += ["t" if shown.weight == 1 else "w"] if shown.weight else []
    text = html.escape(shown.text) + ("\n" if shown.ends_line else "")
    return f'<span class="{" ".join(kinds)}" title="id {shown.id}, weight {shown.weight:g}">{text}</span>'


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in content)


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte: printable ones themselves, the others from 256 on
    (GPT-2).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
