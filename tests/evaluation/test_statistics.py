"""Intervals are those of the formula, and cover."""

import json
import math
import operator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from instil.errors import UsageError
from instil.evaluation.report import Bar, Compared, Page, SideBySide, to_html
from instil.evaluation.statistics import Mean, Share, compare, detectable, holm

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


VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 2)), min_size=2, max_size=40)


def share_of_clusters(rng, p, correlation, clusters, most):
    """Items right with probability p, alike within clusters of 1 to `most` items (beta-binomial)."""
    sizes = rng.integers(1, most + 1, clusters)
    rates = np.full(clusters, p)
    if correlation:
        spread = (1 - correlation) / correlation
        rates = rng.beta(p * spread, (1 - p) * spread, clusters)
    codes = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(codes)) < rates[codes]).tolist(), codes.tolist()


def coverage_of_clustered_shares(seed, correlation, clusters, most, draws):
    rng = np.random.default_rng(seed)
    covered = []
    for p in np.linspace(0.05, 0.95, draws):
        share = Share.of(*share_of_clusters(rng, p, correlation, clusters, most))
        covered.append(share.low <= p <= share.high)
    return np.mean(covered)


@pytest.mark.parametrize("n", [100, 250])
def test_intervals_of_shares_cover(n):
    """Not a simulation: the probability of each count is known."""
    intervals = [Share.of([True] * k + [False] * (n - k)) for k in range(n + 1)]
    low, high = (np.array([getattr(each, end) for each in intervals]) for end in ("low", "high"))
    p = np.linspace(0.05, 0.95, 181)[:, None]
    covered = (stats.binom.pmf(np.arange(n + 1), n, p) * ((low <= p) & (p <= high))).sum(1)
    assert 0.93 <= covered.mean() <= 0.97


def test_intervals_of_clustered_shares_cover():
    assert 0.93 <= coverage_of_clustered_shares(1, 0.2, 30, 5, draws=400) <= 0.97


@pytest.mark.prove
@pytest.mark.parametrize(
    ("correlation", "clusters", "most"), [(0.0, 30, 5), (0.1, 30, 10), (0.3, 30, 5), (0.3, 30, 2), (0.5, 100, 5)]
)
def test_intervals_of_clustered_shares_cover_whatever_the_correlation(correlation, clusters, most):
    assert 0.93 <= coverage_of_clustered_shares(2, correlation, clusters, most, draws=2000) <= 0.97


def test_an_interval_that_knows_no_clusters_would_not_cover():
    """What the clusters are for."""
    rng = np.random.default_rng(3)
    covered = []
    for p in np.linspace(0.05, 0.95, 400):
        right, _ = share_of_clusters(rng, p, 0.5, 30, 9)
        share = Share.of(right)
        covered.append(share.low <= p <= share.high)
    assert np.mean(covered) < 0.85


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_clusters_of_copies_count_once(right):
    """Each item four times over tells as much as each once."""
    alone, copied = Share.of(right, range(len(right))), Share.of(right * 4, [*range(len(right))] * 4)
    assert copied.mean == pytest.approx(alone.mean)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    assert 0 <= copied.low <= copied.mean + 1e-12
    assert copied.mean <= copied.high + 1e-12 <= 1 + 1e-12


def test_one_cluster_tells_nothing():
    assert Share.of([True, True, False], "aaa") == Share(2 / 3, 0.0, 1.0, 3)
    assert Mean.of([1.0, 2.0], "aa") == Mean(1.5, None, None, 2, 1)
    assert Mean.of([1.0]) == Mean(1.0, None, None, 1)


@settings(max_examples=40)
@given(VALUES)
def test_a_mean_has_students_interval(values):
    mean = Mean.of(values)
    if len(set(values)) == 1:
        assert mean.low == mean.high == mean.mean
        return
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (mean.low, mean.high) == pytest.approx((expected.low, expected.high))
    assert mean.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)


@settings(max_examples=40)
@given(VALUES, st.integers(2, 5))
def test_clusters_of_a_mean_are_as_one_item_each(values, copies):
    if len(set(values)) > 1:
        alone, copied = Mean.of(values), Mean.of(values * copies, [*range(len(values))] * copies)
        # statsmodels corrects for N items and k = 1 parameters by (N - 1) / (N - k), which is 1
        assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
        assert copied.clusters == len(values)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 3))
def test_a_bounded_mean_keeps_within_its_bounds(values, groups):
    for clusters in (None, [i % groups for i in range(len(values))]):
        mean = Mean.of([100 * value for value in values], clusters, bounds=(0.0, 100.0))
        assert 0 <= mean.low <= mean.mean + 1e-9
        assert mean.mean <= mean.high + 1e-9
        assert mean.high <= 100
        assert mean.low < mean.high


def coverage_of_means(seed, draws, make, truth, **given_to):
    rng = np.random.default_rng(seed)
    means = [Mean.of(make(rng).tolist(), **given_to) for _ in range(draws)]
    return np.mean([mean.low <= truth <= mean.high for mean in means])


def test_intervals_of_means_cover():
    found = coverage_of_means(4, 400, lambda rng: rng.normal(3.0, 2.0, 100), 3.0)
    assert 0.93 <= found <= 0.97
    found = coverage_of_means(5, 400, lambda rng: rng.beta(2.0, 1.0, 100), 2 / 3, bounds=(0.0, 1.0))
    assert 0.93 <= found <= 0.97


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=30)
def test_right_against_wrong_is_the_binomial_test_of_the_discordant(pairs):
    base, tuned = map(list, zip(*pairs, strict=True))
    found = compare(base, tuned)
    wins, losses = pairs.count((False, True)), pairs.count((True, False))
    assert (found.wins, found.losses, found.ties) == (wins, losses, len(pairs) - wins - losses)
    # Q. McNemar, 1947: of the pairs that differ, each is as likely to be a win as a loss
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.p_value == pytest.approx(expected)
    assert found.test == "exact McNemar"
    assert found.difference == pytest.approx((wins - losses) / len(pairs))
    swapped = compare(tuned, base)
    assert (swapped.difference, swapped.p_value) == (-found.difference, pytest.approx(found.p_value))


def test_the_verdict_follows_the_direction():
    base, tuned = [0.1 * (i % 5) for i in range(60)], [0.1 * (i % 5) + 0.05 * (i % 3) for i in range(60)]
    assert compare(base, tuned).verdict == "better"
    assert compare(tuned, base).verdict == "worse"
    assert compare(base, base).verdict == "not distinguishable"
    errors = compare(base, tuned, higher_is_better=False)
    assert (errors.verdict, errors.wins, errors.losses, errors.ties) == ("worse", 0, 40, 20)
    assert errors.low > 0


def test_a_comparison_says_the_same_for_the_same_seed():
    rng = np.random.default_rng(6)
    base, tuned = rng.normal(size=(2, 50)).tolist()
    assert compare(base, tuned) == compare(base, tuned)
    assert compare(base, tuned, seed=1) != compare(base, tuned)


def test_the_paired_bootstrap_is_students_interval_at_large_n():
    rng = np.random.default_rng(7)
    base = rng.normal(size=2000)
    tuned = base + rng.normal(0.05, 1.0, 2000)
    found, expected = compare(base.tolist(), tuned.tolist()), stats.ttest_rel(tuned, base)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.003)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.01)
    assert found.test == "paired bootstrap"


def test_clusters_are_resampled_whole():
    """Four copies of each item say no more than one."""
    rng = np.random.default_rng(8)
    base, tuned = rng.normal(size=(2, 60)).tolist()
    alone, copied = compare(base, tuned), compare(base * 4, tuned * 4, [*range(60)] * 4)
    assert (copied.low, copied.high, copied.p_value) == pytest.approx((alone.low, alone.high, alone.p_value))
    assert copied.detectable == pytest.approx(alone.detectable)
    assert (copied.n, copied.clusters) == (240, 60)
    apart = compare(base * 4, tuned * 4)
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def coverage_of_differences(seed, draws, clusters):
    """Tuned less base is 0.1 in truth, and items of a cluster of five move together."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(clusters), 5)
    covered, distinguished = [], []
    for _ in range(draws):
        base = rng.normal(size=len(codes))
        tuned = base + 0.1 + rng.normal(0, 0.3, clusters)[codes] + rng.normal(0, 0.3, len(codes))
        found = compare(base.tolist(), tuned.tolist(), codes.tolist())
        covered.append(found.low <= 0.1 <= found.high)
        distinguished.append((found.verdict != "not distinguishable") == (not found.low <= 0 <= found.high))
    return np.mean(covered), np.mean(distinguished)


def test_intervals_of_differences_cover():
    covered, alike = coverage_of_differences(9, 60, 50)
    assert 0.9 <= covered <= 0.99
    assert alike >= 0.95  # interval and p-value are of the same resamples


@pytest.mark.prove
def test_intervals_of_differences_cover_with_few_clusters():
    assert 0.93 <= coverage_of_differences(10, 1000, 30)[0] <= 0.97


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8))
@settings(max_examples=30)
def test_few_items_are_judged_by_every_flip_of_their_signs(differences):
    found = compare([0.0] * len(differences), [float(each) for each in differences])
    flips = [sum(map(operator.mul, signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    assert found.test == "exact sign flips"
    # the sums lie symmetrically about 0, so that twice one side is both sides but for a sum of 0
    expected = sum(flip >= abs(sum(differences)) for flip in flips) / len(flips)
    assert found.p_value == pytest.approx(min(1.0, 2 * expected))


def test_few_items_that_agree_prove_nothing():
    base, tuned = [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6]
    found = compare(base, tuned)
    assert (found.wins, found.p_value, found.verdict) == (5, 2 / 2**5, "not distinguishable")
    clustered = compare(base * 9, tuned * 9, [*range(5)] * 9)
    assert (clustered.p_value, clustered.test) == (2 / 2**5, "exact sign flips")


@given(st.integers(5, 500), st.floats(0.1, 10))
@settings(max_examples=10)
def test_what_is_detectable_has_that_power(n, deviation):
    effect = detectable(n, deviation)
    shift, edge = effect / deviation * math.sqrt(n), stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-3)


def test_what_is_detectable_of_a_comparison():
    found = compare([True, False] * 50, [True, True] * 25 + [True, False] * 25)
    discordant = 25 / 100
    assert found.detectable == pytest.approx(detectable(100, math.sqrt((discordant - discordant**2) * 100 / 99)))
    assert compare([True], [True]).detectable is None
    assert compare([True, False], [True, False]).detectable is None


def test_several_comparisons_share_the_level():
    one = compare([False] * 20, [False] * 14 + [True] * 6)
    assert one.verdict == "better"
    # S. Holm, 1979: the smallest p-value times their number, the next times one less, never falling
    several = {name: replace(one, p_value=p) for name, p in {"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.9}.items()}
    adjusted = holm(several)
    assert {name: round(each.adjusted, 9) for name, each in adjusted.items()} == {
        "a": 0.09,
        "b": 0.04,
        "c": 0.09,
        "d": 0.9,
    }
    assert [each.verdict for each in adjusted.values()] == [
        "not distinguishable",
        "better",
        *["not distinguishable"] * 2,
    ]
    assert holm({}) == {}


def test_everything_goes_into_json():
    comparison = compare([True, False, True], [True, True, True])
    for value in (comparison, Mean.of([1.0]), Mean.of([1.0, 2.0], "ab"), Share.of([True], "a")):
        assert json.loads(json.dumps(value.to_json(), allow_nan=False)) == value.to_json()
    assert comparison.to_json()["verdict"] == "not distinguishable"
    assert Share.of([True]).to_json().keys() == {"mean", "low", "high", "n"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Mean.of([]), "no values"),
        (lambda: Mean.of([1.0, math.nan, math.inf]), "2 values are no finite numbers: item 1: nan, item 2: inf"),
        (lambda: Mean.of([0.5, 1.5], bounds=(0.0, 1.0)), "item 1: 1.5"),
        (lambda: Mean.of([1.0, 2.0], "a"), "1 clusters for 2 items"),
        (lambda: compare([1.0], [1.0, 2.0]), "1 values of the base model and 2 of the tuned one"),
        (lambda: compare([], []), "no values"),
        (lambda: detectable(1, 1.0), "1 items"),
        (lambda: detectable(10, 0.0), "0.0"),
    ],
)
def test_what_has_no_figure_says_so(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_a_page_shows_text_as_text():
    bar = Bar.of(Share.of([True, False]))
    page = to_html(
        Page(
            title="A <b>title",
            summary="",
            about={"Model": "<script>alert(1)</script>"},
            compared=[("<i>all", [Compared("first", bar, bar, 4), Compared("part", bar, bar, 4, detail=True)])],
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
