"""How sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """A share of items, with the 95 % interval of Wilson's score.

    Args:
        mean: The share itself, 0 to 1.
        low: Where the interval begins.
        high: Where it ends.
        n: How many items there were.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: Sequence[bool]) -> Share:
        """The share of the items that are right.

        Raises:
            ValueError: There are none.
        """
        from scipy.stats import binomtest

        if not right:
            raise ValueError("a share of no items")
        found = binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
        return cls(sum(right) / len(right), float(found.low), float(found.high), len(right))

    def to_json(self) -> dict[str, float | int]:
        """The four numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"
