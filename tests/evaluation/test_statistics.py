"""Intervals are those of the formula, and cover."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.evaluation.report import Compared, Page, SideBySide, to_html
from instil.evaluation.statistics import Share

Z = 1.959963984540054


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_a_share_has_wilsons_interval(right):
    share = Share.of(right)
    n, p = len(right), sum(right) / len(right)
    # E. B. Wilson, 1927: the p0 for which |p - p0| is z standard errors of p0
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    assert share.mean == p
    assert share.n == n
    assert share.low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert share.high == pytest.approx(min(1.0, middle + half), abs=1e-9)


def test_no_items_are_no_share():
    with pytest.raises(ValueError, match="no items"):
        Share.of([])


def test_a_page_shows_text_as_text():
    share = Share.of([True, False])
    page = to_html(
        Page(
            title="A <b>title",
            summary="",
            about={"Model": "<script>alert(1)</script>"},
            compared=[Compared("first", share, share), Compared("part", share, share, detail=True)],
            answers=[SideBySide("1 < 2 & 3?", "<i>", "</dd>", "&amp;", right=False)],
            warnings=["<u>look"],
        )
    )
    for markup in ("<b>title", "<script>alert", "<i>", "<u>look"):
        assert markup not in page.partition("<body>")[2]
    assert "1 &lt; 2 &amp; 3?" in page
    assert "&amp;amp;" in page
    assert page.count("<details>") == page.count("</details>") == 1
    assert "50.0 %" in page
