"""A curve drawn with the dots of braille characters, two by four of them in each."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, then by row
_BLANK = 0x2800


def draw(
    line: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]] = (), *, width: int = 72, height: int = 12
) -> list[str]:
    """Lines of text with a line through some points, circles at others, and the ends of both axes.

    Args:
        line: Points `(x, y)` by rising x. Where y is no finite number, the line breaks off.
        marks: Points `(x, y)` drawn as `o`.
        width: Columns of it all.
        height: Rows of it all.

    Returns:
        Nothing if no point has a finite y.
    """
    shown = [(x, y) for x, y in (*line, *marks) if math.isfinite(y)]
    if not shown:
        return []
    left, right = min(x for x, _ in shown), max(x for x, _ in shown)
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    top, bottom = f"{high:.4g}", f"{low:.4g}"
    edge = max(len(top), len(bottom))
    columns, rows = max(8, width - edge - 3), max(2, height - 2)

    def place(x: float, y: float) -> tuple[int, int]:
        across = (x - left) / (right - left) if right > left else 0.0
        down = (high - y) / (high - low) if high > low else 0.5
        return round(across * (2 * columns - 1)), round(down * (4 * rows - 1))

    grid = [[_BLANK] * columns for _ in range(rows)]
    last: tuple[int, int] | None = None
    for x, y in line:
        if not math.isfinite(y):
            last = None
            continue
        here = place(x, y)
        for across, down in _between(last or here, here):
            grid[down // 4][across // 2] |= _DOTS[across % 2][down % 4]
        last = here
    cells = [[chr(dots) if dots != _BLANK else " " for dots in row] for row in grid]
    for x, y in marks:
        if math.isfinite(y):
            across, down = place(x, y)
            cells[down // 4][across // 2] = "o"

    labels = [top, *[""] * (rows - 2), bottom]
    lines = [f"{label:>{edge}} {'┤' if label else '│'}{''.join(row)}" for label, row in zip(labels, cells, strict=True)]
    begin, end = f"{left:,.0f}", f"{right:,.0f}"
    lines.append(f"{'':>{edge}} └{'─' * columns}")
    lines.append(f"{'':>{edge}}  {begin}{end:>{columns - len(begin)}}")
    return [text.rstrip() for text in lines]


def _between(one: tuple[int, int], other: tuple[int, int]) -> list[tuple[int, int]]:
    """Every dot on the straight line from one to the other, both included."""
    count = max(abs(other[0] - one[0]), abs(other[1] - one[1]), 1)
    return [
        (round(one[0] + (other[0] - one[0]) * n / count), round(one[1] + (other[1] - one[1]) * n / count))
        for n in range(count + 1)
    ]
