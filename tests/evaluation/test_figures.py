"""Figures of items: what is missing is counted, parts belong to their item, verdicts are adjusted together."""

import numpy as np
import pytest

from instil.errors import DataError
from instil.evaluation.figures import Measure, adjusted, by_family, figure
from instil.evaluation.items import Item, Said, read_items, write_items
from instil.evaluation.statistics import Mean, Share, compare


def items_of(tuned, base=None):
    return [
        Item("s", str(at), scores={"tuned": {"v": value}, **({"base": {"v": base[at]}} if base else {})})
        for at, value in enumerate(tuned)
    ]


MEASURE = Measure("v", lambda scores: scores["v"])


def test_what_cannot_be_said_of_one_model_is_counted_and_leaves_the_other():
    found = figure("s", MEASURE, items_of([True, None, False, True], [None, None, False, False]))
    assert found.tuned == Share.of([True, False, True])
    assert found.base == Share.of([False, False])
    assert found.missing == {"tuned": 1, "base": 2}
    assert (found.comparison.n, found.comparison.wins) == (2, 1)  # the items of both
    alone = figure("s", MEASURE, items_of([True, False], [None, None]))
    assert (alone.base, alone.comparison, alone.tuned.n) == (None, None, 2)
    assert figure("s", MEASURE, items_of([None, None])) is None


def test_parts_of_an_item_are_a_cluster_and_paired_part_by_part():
    tuned, base = [[1.0, 2.0], [5.0, None], [3.0, 4.0]], [[2.0, 2.0], [1.0, 9.0], [3.0, 3.0]]
    measure = Measure("v", lambda scores: scores["v"], "")
    found = figure("s", measure, items_of(tuned, base))
    assert found.tuned == Mean.of([1, 2, 5, 3, 4], ["0", "0", "1", "2", "2"])
    assert found.comparison == compare([2, 2, 1, 3, 3], [1, 2, 5, 3, 4], ["0", "0", "1", "2", "2"])


def test_a_weighted_mean_is_that_of_all_tokens_with_the_interval_of_whole_texts():
    rng = np.random.default_rng(0)
    texts = [rng.normal(2, 1, size=size) for size in rng.integers(5, 60, size=40)]
    items = [
        Item("s", str(at), scores={"tuned": {"loss": float(t.sum()), "tokens": len(t)}}) for at, t in enumerate(texts)
    ]
    measure = Measure(
        "loss",
        lambda scores: scores["loss"] / scores["tokens"],
        "perplexity",
        weight=lambda scores: scores["tokens"],
    )
    found = figure("s", measure, items)
    tokens = np.concatenate(texts)
    whole = Mean.of(list(tokens), [at for at, text in enumerate(texts) for _ in text])  # every token by itself
    assert found.tuned.mean == pytest.approx(tokens.mean())
    # The same estimate from the sums alone; only the small-sample factor differs, (N - 1) / N of tokens or of texts.
    factor = np.sqrt((len(texts) - 1) / len(texts) * len(tokens) / (len(tokens) - 1))
    half = (found.tuned.high - found.tuned.low) * factor
    assert half == pytest.approx(whole.high - whole.low, rel=0.02)
    assert found.shown(found.tuned.mean) == f"{np.exp(tokens.mean()):.4g}"


def test_headlines_are_adjusted_together_and_families_by_themselves():
    rng = np.random.default_rng(1)

    def made(name, family="", headline=True):
        base = list(rng.random(60) < 0.4)
        tuned = list(rng.random(60) < 0.65)
        items = items_of([bool(each) for each in tuned], [bool(each) for each in base])
        return figure("s", Measure(name, lambda scores: scores["v"], headline=headline), items, family)

    figures = [made("a"), made("b"), made("c"), made("a", "x"), made("a", "y"), made("d", headline=False)]
    found = adjusted(figures)
    p_values = [each.comparison.p_value for each in figures[:3]]
    order = np.argsort(p_values)
    expected = np.maximum.accumulate([min(1.0, p_values[at] * (3 - rank)) for rank, at in enumerate(order)])
    assert [found[at].comparison.adjusted for at in order] == pytest.approx(list(expected))
    families = sorted(each.comparison.p_value for each in figures[3:5])
    assert min(found[3].comparison.adjusted, found[4].comparison.adjusted) == pytest.approx(2 * families[0])
    assert found[5].comparison.adjusted == pytest.approx(figures[5].comparison.p_value)


def test_families_are_told_apart_only_where_there_are_several():
    several = [Item("s", "1", "a"), Item("s", "2", "b"), Item("s", "3", "a")]
    assert {family: [item.id for item in items] for family, items in by_family(several).items()} == {
        "a": ["1", "3"],
        "b": ["2"],
    }
    assert by_family(several[:1]) == {}


def test_items_come_back_as_they_were_written(tmp_path):
    items = [
        Item(
            "s",
            "1",
            "f",
            [{"role": "user", "content": "a\u2028b\n"}],
            later_turns=[[{"role": "user", "content": "c"}]],
            wanted={"references": ["x"]},
            said={"tuned": [Said("é", "stop", 3)]},
            scores={"tuned": {"v": 0.1}},
        ),
        Item("s", "2"),
    ]
    write_items(tmp_path, items)
    assert read_items(tmp_path) == items
    write_items(tmp_path, [Item("s", "b\udcffd.jsonl:1")])
    assert read_items(tmp_path) == [Item("s", "b?d.jsonl:1")]
    (tmp_path / "items.jsonl").write_text('{"suite": "s", "id": "1"}\n[1]\nno\n{"suite": "s", "idd": "1"}\n')
    with pytest.raises(DataError) as caught:
        read_items(tmp_path)
    assert [problem.source.rpartition(":")[2] for problem in caught.value.problems] == ["2", "3", "4", "4"]
    assert [problem.field for problem in caught.value.problems] == ["", "", "id", "idd"]
