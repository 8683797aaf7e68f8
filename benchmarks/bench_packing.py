"""How long planning takes, how full the batches are and how fast they are built.

python benchmarks/bench_packing.py [rows]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instil.packing import TokenTree, deal, pack
from instil.packing.packs import Sharing
from instil.prompt.exchange import Exchange

BUDGET = 8192
SHARING: tuple[Sharing, ...] = ("off", "on", "auto")


def exchange(prompt: NDArray[Any], completion: NDArray[Any]) -> Exchange:
    return Exchange(
        prompt_text="",
        completion_text="",
        prompt_ids=np.asarray(prompt, np.int32),
        prompt_weights=np.zeros(len(prompt), np.float32),
        completion_ids=np.asarray(completion, np.int32),
        completion_weights=np.ones(len(completion), np.float32),
        boundary="special",
    )


def short_rows(rows: int, preamble: int) -> list[Exchange]:
    """Log-normal lengths around 160 tokens, after a preamble that all rows share."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(160), 0.6, rows), 8, BUDGET - preamble).astype(int)
    shared = rng.integers(0, 32000, preamble)
    return [
        exchange(np.append(shared, rng.integers(0, 32000, length // 2)), rng.integers(0, 32000, length - length // 2))
        for length in lengths
    ]


def tool_rows(lists: int, rows: int) -> list[Exchange]:
    """A preamble of 40 tokens, then one of `lists` tool lists of 1,000 tokens, each in `rows` rows of 100 tokens."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 32000, 40)
    tools = [np.append(preamble, rng.integers(0, 32000, 1000)) for _ in range(lists)]
    order = rng.permutation(np.repeat(np.arange(lists), rows))
    return [exchange(np.append(tools[n], rng.integers(0, 32000, 50)), rng.integers(0, 32000, 50)) for n in order]


class OnePrompt(Sequence[TokenTree]):
    """Rows of 50 tokens after one prompt of 4,000, made where they are read."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.prompt = rng.integers(0, 32000, 4000, np.int32)
        self.rest = rng.integers(0, 32000, (rows, 50), np.int32)
        self.sizes = self.longest = self.unshared = np.full(rows, 4050)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def first_ids(self, index: int, start: int, stop: int) -> NDArray[np.int32]:
        if stop <= 4000:
            return self.prompt[start:stop]
        return np.concatenate((self.prompt[start:], self.rest[index, max(0, start - 4000) : stop - 4000]))


def measure(title: str, exchanges: list[Exchange]) -> None:
    start = time.perf_counter()
    trees = [TokenTree.from_exchanges([each], record=n) for n, each in enumerate(exchanges)]
    built = time.perf_counter() - start
    print(f"{title}: {len(trees):,} rows, {1e6 * built / len(trees):.1f} µs to build a tree")
    for sharing in SHARING:
        start = time.perf_counter()
        packs = pack(trees, BUDGET, share_prefixes=sharing)
        planned = time.perf_counter() - start
        some = range(min(200, len(packs)))
        start = time.perf_counter()
        tokens = sum(packs[n].size for n in some)
        per_second = len(some) / (time.perf_counter() - start)
        print(
            f"  {sharing:4} planned in {planned:.2f} s, {per_second:,.0f} batches/s ({tokens / len(some):,.0f} tokens)"
        )
        print(f"       {packs.report}")
    start = time.perf_counter()
    deal(trees, BUDGET)
    print(f"  dealt in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    measure("short rows", short_rows(rows, 0))
    measure("short rows after a preamble", short_rows(rows, 40))
    measure("tool lists", tool_rows(200, 20))
    measure("few, large tool lists", tool_rows(4, 1000))
    start = time.perf_counter()
    deal(OnePrompt(rows), BUDGET)
    print(f"one prompt of 4,000 tokens before all of {rows:,} rows: dealt in {time.perf_counter() - start:.2f} s")
