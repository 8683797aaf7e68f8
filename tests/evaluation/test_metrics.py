"""Every metric is what the library that published it, or its definition, gives."""

import json
import math
import re
import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.errors import DataError, UsageError
from instil.evaluation.execute import run_all
from instil.evaluation.metrics import (
    METRICS,
    Item,
    Shape,
    aggregate,
    code_of,
    label_of,
    normalize,
    number_of,
    score,
)

WORDS = st.lists(
    st.sampled_from(["the", "a", "The", "cat", "cats", "sat.", "on", "mat,", "x-1", "3.5", "Ünï", "“no”", "猫", "!"]),
    max_size=12,
).map(" ".join)
REFERENCES = st.lists(WORDS, min_size=1, max_size=3).map(tuple)
ITEMS = st.lists(st.builds(Item, WORDS, REFERENCES), min_size=1, max_size=6)
ASCII = st.text(alphabet="abtheAT .,-'\n", max_size=20)


def saved(name, items):
    """The scores as they come back from JSON, which has no NaN."""
    return json.loads(json.dumps(score(name, items), allow_nan=False))


def squad(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\s+", " ", re.sub(r"\b(a|an|the)\b", " ", text)).strip()


@given(ASCII, ASCII)
def test_exact_match_is_that_of_squad(answer, reference):
    if squad(answer) and squad(reference):
        (found,) = score("exact_match", [Item(answer, (reference,))])
        assert found == {"exact_match": float(squad(answer) == squad(reference))}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The  CAT!", "cat"),
        ("STRASSE", "straße"),
        ("ｆｕｌｌ", "full"),
        ("e\u0301t\u00e9", "été"),
        ("“Quoted” — «text»", "quoted text"),
        ("¿Qué?", "qué"),
    ],
)
def test_text_that_is_the_same(text, same):
    assert normalize(text) == normalize(same)


@pytest.mark.parametrize(
    ("one", "other"), [("+", "-"), ("A", "the"), ("A", ""), ("!", ""), ("été", "ete"), ("猫", "犬")]
)
def test_text_that_is_not(one, other):
    assert normalize(one) != normalize(other)


@given(ASCII, st.lists(ASCII, min_size=1, max_size=3))
def test_token_f1_is_that_of_squad(answer, references):
    def f1(reference):
        given_words, right_words = squad(answer).split(), squad(reference).split()
        common = sum((Counter(given_words) & Counter(right_words)).values())
        if not common:
            return 0.0
        precision, recall = common / len(given_words), common / len(right_words)
        return 2 * precision * recall / (precision + recall)

    if squad(answer) and all(map(squad, references)):
        (found,) = score("token_f1", [Item(answer, tuple(references))])
        assert found["token_f1"] == pytest.approx(max(map(f1, references)))


@settings(max_examples=40)
@given(WORDS, REFERENCES)
def test_rouge_l_is_that_of_rouge_score(answer, references):
    from rouge_score.rouge_scorer import RougeScorer

    (found,) = score("rouge_l", [Item(answer, references)])
    expected = RougeScorer(["rougeL"]).score_multi(references, answer)["rougeL"].fmeasure
    assert found["rouge_l"] == pytest.approx(expected)
    assert found["no_words"] == (not re.search("[a-z0-9]", " ".join(references).lower()))


@settings(max_examples=40)
@given(ITEMS)
def test_bleu_is_that_of_sacrebleu(items):
    from sacrebleu import BLEU, sentence_bleu

    scores = saved("bleu", items)
    answers = [item.answer for item in items]
    for item, found in zip(items, scores, strict=True):
        assert found["bleu"] == pytest.approx(sentence_bleu(item.answer, item.references).score)
    assert aggregate("bleu", scores)["bleu"] == pytest.approx(BLEU().corpus_score(answers, streams(items)).score)


@settings(max_examples=40)
@given(ITEMS)
def test_chrf_is_that_of_sacrebleu(items):
    from sacrebleu import CHRF, sentence_chrf

    scores = saved("chrf", items)
    for item, found in zip(items, scores, strict=True):
        assert found["chrf"] == pytest.approx(sentence_chrf(item.answer, item.references).score)
    expected = CHRF().corpus_score([item.answer for item in items], streams(items)).score
    figures = aggregate("chrf", scores)
    assert figures["chrf"] == pytest.approx(expected)
    assert figures["sentence_chrf"] == pytest.approx(math.fsum(found["chrf"] for found in scores) / len(items))


def streams(items):
    """References as sacrebleu takes them, None where an item has fewer."""
    most = max(len(item.references) for item in items)
    return [[item.references[i] if i < len(item.references) else None for item in items] for i in range(most)]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([*"xyz", "none"])), min_size=1, max_size=20))
def test_accuracy_is_that_of_scikit_learn(pairs):
    from sklearn.metrics import accuracy_score

    right, given_labels = zip(*pairs, strict=True)
    items = [
        Item(f"It is {stated}.", (label,), labels=("x", "y", "z"))
        for label, stated in zip(right, given_labels, strict=True)
    ]
    figures = aggregate("accuracy", saved("accuracy", items))
    assert figures["accuracy"] == pytest.approx(accuracy_score(right, given_labels))
    assert figures["unparsed"] == given_labels.count("none")
    assert figures["n"] == len(pairs)


FINITE = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@settings(max_examples=40)
@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20), st.integers(0, 3))
def test_numeric_errors_are_those_of_scikit_learn(pairs, without):
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    items = [Item(f"I say {answer:,.3f}, really", (f"{right}",)) for right, answer in pairs]
    items += [Item("I do not know", ("1",))] * without
    figures = aggregate("numeric", saved("numeric", items))
    right, answers = zip(*pairs, strict=True)
    assert figures["numeric"] == pytest.approx(mean_absolute_error(right, answers))
    assert figures["mean_squared_error"] == pytest.approx(mean_squared_error(right, answers))
    assert (figures["n"], figures["unparsed"]) == (len(items), without)


def test_no_number_at_all_is_no_error_of_zero():
    assert aggregate("numeric", score("numeric", [Item("none", ("1",))])) == {"n": 1, "unparsed": 1}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-5", -5.0),
        ("−5", -5.0),
        ("+3", 3.0),
        ("3-4", 4.0),
        ("from 7 to 12.", 12.0),
        ("1,234,567.5", 1234567.5),
        ("1\u202f234", 1234.0),
        ("1'000", 1000.0),
        ("-$1,000.50", -1000.5),
        (".5", 0.5),
        ("so...5", 5.0),
        ("1e-3", 0.001),
        ("45 %", 0.45),
        ("45 percent.", 0.45),
        ("5kg", 5.0),
        ("5²", 5.0),
        ("١٢", 12.0),
        ("- 5", 5.0),
        ("v2", None),
        ("3,14", None),
        ("1,2345", None),
        ("1.2.3", None),
        ("1/2", None),
        ("10:30", None),
        ("1e999", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert number_of(text) == number


@given(FINITE)
def test_a_number_is_read_as_it_is_written(number):
    assert number_of(f"{number}") == number_of(f"{number:,}") == number


@pytest.mark.parametrize(
    ("text", "labels", "label"),
    [
        (" positive\n", ("Positive", "Negative"), "Positive"),
        ("It is **Positive**.", ("positive", "negative"), "positive"),
        ("positive, positive", ("positive", "negative"), "positive"),
        ("positive or negative", ("positive", "negative"), None),
        ("neither", ("positive", "negative"), None),
        ("nonpositive", ("positive", "negative"), None),
        ("non-toxic", ("toxic", "nontoxic"), None),
        ("not entailment", ("entailment", "not entailment"), "not entailment"),
        ("The answer is (B).", ("A", "B"), "B"),
        ("It is a dog, so B", ("A", "B"), "B"),
        ("a", ("A", "B"), "A"),
        ("C++", ("C", "C++"), "C++"),
        ("C.", ("C", "C++"), "C"),
        ("-1", ("-1", "0", "1"), "-1"),
    ],
)
def test_the_label_of_a_text(text, labels, label):
    assert label_of(text, labels) == label


FRUITS = ("pear", "fig", "apple", "star apple", "lemon")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Three fruits are the pear, the fig and the lemon.", True),
        ("1. Lemon\n2. FIG\n3. star  apple", True),  # an apple within is none
        ("pear, fig, apple", True),
        ("pear, fig, pear", False),
        ("pear, fig, stone", False),
        ("pear, fig, apple, lemon", False),
        ("pears, fig-tree, lemon", False),
        ("", False),
    ],
)
def test_a_list_is_right_in_any_order(answer, right):
    assert score("list_of", [Item(answer, labels=FRUITS, count=3)]) == [{"list_of": float(right)}]


def test_a_list_that_cannot_be_is_named():
    with pytest.raises(DataError) as caught:
        score("list_of", [Item("a", count=1), Item("a", labels=FRUITS), Item("a", labels=FRUITS, count=6)])
    assert [problem.field for problem in caught.value.problems] == ["labels", "count", "count"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n"),
        ("First\n```bash\npip\n```\nthen\n```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1", "x = 1"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("use `x = 1`", "use `x = 1`"),
    ],
)
def test_the_program_in_an_answer(answer, code):
    assert code_of(answer) == code


def test_programs_run_where_that_is_allowed():
    items = [
        Item("```python\ndef f(x):\n    return x + 1\n```", tests="assert f(1) == 2"),
        Item("def f(x):\n    return x", tests="assert f(1) == 2"),
    ]
    with pytest.raises(UsageError, match="not allowed"):
        score("execute", items)
    scores = score("execute", items, run_all)
    assert [each["execute"] for each in scores] == [1.0, 0.0]
    assert aggregate("execute", scores) == {
        "execute": 0.5,
        "n": 2,
        "failed": 1,
        "timed_out": 0,
        "out_of_memory": 0,
        "could_not_run": 0,
    }


@settings(max_examples=40)
@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=2))
def test_any_text_has_scores_within_bounds(answer, references):
    item = Item(answer, tuple(references))
    for name in ("exact_match", "token_f1", "rouge_l", "chrf", "bleu"):
        (found,) = saved(name, [item])
        assert 0 <= found[name] <= METRICS[name].high
        assert 0 <= aggregate(name, [found])[name] <= METRICS[name].high


def test_a_right_answer_has_the_greatest_score():
    item = Item("The cat sat on the mat.", ("Nothing of it", "The cat sat on the mat."))
    for name in ("exact_match", "token_f1", "rouge_l", "chrf", "bleu"):
        assert score(name, [item])[0][name] == METRICS[name].high


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="'rouge_l'"):
        score("rougel", [])


def test_all_bad_records_are_named():
    items = [
        Item("x", ("x",), labels=("x", "y"), source="a:1"),
        Item("x", ("z",), labels=("x", "y"), source="a:2"),
        Item("x", ("x",), labels=("x", "X"), source="a:3"),
        Item("x", ("x",), source="a:4"),
        Item("x", source="a:5"),
    ]
    with pytest.raises(DataError, match="4 of 5 records cannot be scored by accuracy") as raised:
        score("accuracy", items)
    places = [(problem.source, problem.field) for problem in raised.value.problems]
    assert places == [
        ("a:2", "references"),
        ("a:3", "labels"),
        ("a:4", "labels"),
        ("a:5", "references"),
        ("a:5", "labels"),
    ]
    with pytest.raises(DataError, match="state no number"):
        score("numeric", [Item("1", ("one",))])


def test_no_answers_have_no_figure():
    with pytest.raises(UsageError, match="of no answers"):
        aggregate("exact_match", [])


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        ("", Shape(0, empty=True, repeated=0.0, repeats=False)),
        (" \n", Shape(0, empty=True, repeated=0.0, repeats=False)),
        ("ha ha ha", Shape(3, empty=False, repeated=0.0, repeats=False)),
        ("the quick brown fox jumps", Shape(5, empty=False, repeated=0.0, repeats=False)),
        ("no no no no no", Shape(5, empty=False, repeated=0.5, repeats=True)),
    ],
)
def test_the_shape_of_an_answer(answer, shape):
    assert Shape.of(answer) == shape


@given(st.integers(0, 200), st.integers(1, 5), st.integers(0, 4))
def test_a_loop_at_the_end_is_seen(before, period, cut):
    """However long the text before it is, and where the last time is cut."""
    phrase = [f"loop{i}" for i in range(period)]
    words = [f"word{i}" for i in range(before)] + phrase * 8 + phrase[: cut % period]
    assert Shape.of(" ".join(words)).repeats


@given(st.integers(0, 200), st.integers(3, 7))
def test_a_phrase_said_twice_is_no_loop(before, period):
    phrase = [f"loop{i}" for i in range(period)]
    assert not Shape.of(" ".join([*(f"word{i}" for i in range(before + 20)), *phrase, *phrase])).repeats
