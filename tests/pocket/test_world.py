"""The small world is true and of one mind, and what is held out of the instructions is held out."""

import json
import re
from collections import Counter

import pytest

import instil
from instil.pocket import data_folder
from instil.pocket.corpus import corpus
from instil.pocket.instructions import SETS, STYLES, is_right, plain_facts, training_rows
from instil.pocket.scenes import events
from instil.pocket.world import HELD_OUT_FAMILIES, is_held_out, kinds, relations, spelled, split_phrasings, table

RELATIONS = {relation.name: relation for relation in relations()}
TRAIN = training_rows()


def values(name):
    return {fact.words["x"]: fact.words["y"] for fact in RELATIONS[name].facts}


def test_every_table_is_whole():
    for name in ("animals", "colors", "countries", "elements", "opposites", "plurals", "verbs"):
        rows = table(name)
        keys = [next(iter(row.values())) for row in rows]
        assert len(set(keys)) == len(keys), name
        for row in rows:
            blank = [key for key, value in row.items() if not value and key != "article"]
            assert not blank, (name, row)
            assert all(value == value.strip() for value in row.values()), (name, row)


def test_the_elements_stand_in_their_order():
    elements = table("elements")
    assert [row["number"] for row in elements] == [str(n) for n in range(1, 93)]
    symbols = [row["symbol"] for row in elements]
    assert len(set(symbols)) == 92
    assert all(re.fullmatch("[A-Z][a-z]?", symbol) for symbol in symbols)
    # their own letters, but for those named in Latin, Greek or German
    foreign = {"Na": "sodium", "K": "potassium", "Fe": "iron", "Cu": "copper", "Ag": "silver", "Sn": "tin"}
    foreign |= {"Sb": "antimony", "W": "tungsten", "Au": "gold", "Hg": "mercury", "Pb": "lead"}
    for row in elements:
        own = re.fullmatch(".*".join(row["symbol"].lower()) + ".*", row["name"])
        assert bool(own) != (row["symbol"] in foreign), row
        assert foreign.get(row["symbol"], row["name"]) == row["name"]


def test_what_can_be_worked_out_is_right():
    for asked, answer in values("sum").items():
        assert eval(asked) == int(answer)
    for word, loud in values("capitals").items():
        assert word.upper() == loud
    opposites = values("opposite")
    assert {y for x, y in opposites.items() if opposites.get(y, x) != x} <= {"light", "old", "short"}
    assert [spelled(n) for n in (0, 7, 13, 20, 21, 40, 99, 100)] == [
        *("zero", "seven", "thirteen", "twenty", "twenty-one", "forty", "ninety-nine", "one hundred"),
    ]
    assert len(set(values("number_word").values())) == 101


def test_every_function_does_what_its_name_says():
    names = {spelled(n): n for n in range(2, 13)}
    does = {"add": lambda x, n: x + n, "subtract": lambda x, n: x - n, "multiply_by": lambda x, n: x * n}
    does["divide_by"] = lambda x, n: x / n
    seen = 0
    for head, body in values("function").items():
        found: dict = {}
        exec(f"{head}\n{body}", {}, found)
        ((name, function),) = found.items()
        verb, _, number = name.rpartition("_")
        if number in names:
            assert function(60) == does[verb](60, names[number])
            seen += 1
    assert seen == 44
    found = {}
    exec("\n".join(f"{head}\n{body}" for head, body in values("function").items()), {}, found)
    items = [3, 1, 2]
    assert [found[n](items) for n in ("first", "last", "count", "total", "largest", "smallest")] == [3, 2, 3, 6, 3, 1]
    assert [found[n](items) for n in ("backwards", "in_order", "average")] == [[2, 1, 3], [1, 2, 3], 2]
    assert [found[n](4) for n in ("is_even", "is_odd", "is_positive", "is_negative", "square", "cube")] == [
        *(True, False, True, False, 16, 64),
    ]
    assert (found["is_empty"]([]), found["is_empty"]([0])) == (True, False)
    assert [found[n](" a B ") for n in ("to_upper", "to_lower", "trim", "words")] == [
        " A B ",
        " a b ",
        "a B",
        ["a", "B"],
    ]
    assert [found[n](6, 3) for n in ("add", "subtract", "multiply", "divide")] == [9, 3, 18, 2]


def test_a_corpus_follows_from_its_seed_and_says_every_fact():
    documents = list(corpus(3000))
    assert documents == list(corpus(3000))
    assert documents != list(corpus(3000, seed=1))
    text = "\n".join(documents)
    for relation in relations():
        for fact in relation.facts:
            assert fact.words["y"] in text, (relation.name, fact)


def test_the_corpus_asks_in_no_held_out_way_and_answers_nothing():
    asking = [part for text in corpus(6000) for part in text.split("\n") if part.endswith("?")]
    assert len(asking) > 200
    said = {sentence for part in asking for sentence in re.split(r"(?<=[.?!]) ", part)}
    used, out = (
        {way.format(**f.words) for r in relations() for f in r.facts for way in split_phrasings(r.questions)[side]}
        for side in (0, 1)
    )
    assert len(said & used) > 200
    assert not said & out
    # what follows a question is another, or the end
    assert not re.search(r"What is the capital of \w+\? (?:It is|The capital|[A-Z]\w+\.)", "\n".join(asking))


def test_a_third_is_held_out():
    for relation in relations():
        share = sum(is_held_out(fact.entity) for fact in relation.facts) / len(relation.facts)
        assert 0.2 < share < 0.48, relation.name
        if relation.questions:
            used, out = split_phrasings(relation.questions)
            assert len(out) == len(relation.questions) // 3
            assert len(used) >= 2
    # who gives another away is held out with it
    out = {fact.words["x"]: is_held_out(fact.entity) for fact in RELATIONS["opposite"].facts}
    assert all(out[x] == out[y] for x, y in values("opposite").items() if values("opposite").get(y) == x)
    assert 8 <= sum(is_held_out(event) for event, _ in events()) <= 16


def test_no_training_row_is_about_what_is_held_out():
    families = Counter(row["family"] for row in TRAIN)
    assert len(families) >= 12
    assert not families.keys() & set(HELD_OUT_FAMILIES)
    members = {member.removeprefix("the ") for several in kinds().values() for member in several}
    out = [(r, f) for r in relations() for f in r.facts if is_held_out(f.entity)]
    questions = {way.format(**f.words) for r, f in out for way in r.questions}
    secret = [event for event, _ in events() if is_held_out(event)]
    secret += [r.plain.format(**f.words) for r, f in out if r.name != "function"]
    for row in TRAIN:
        said = " ".join(message["content"] for message in row["messages"])
        assert not [each for each in secret if each in said], row
        assert not questions & {message["content"] for message in row["messages"]}, row
        if row["family"] == "list_three":
            named = {m.removeprefix("the ") for m in re.split(", | and ", said.partition(" are ")[2].rstrip("."))}
            assert named <= members
            assert not any(is_held_out(name) for name in named)


def test_held_out_phrasings_are_in_no_training_row():
    for name in ("held_out_phrasings",):
        asked = {row["messages"][-2]["content"] for row in SETS[name]() if row["family"] != "style"}
        trained = {message["content"] for row in TRAIN for message in row["messages"] if message["role"] == "user"}
        assert not asked & trained
    systems = [ways[-1] for _, ways in STYLES.values()]
    assert not any(message["content"] in systems for row in TRAIN for message in row["messages"])


def test_the_sets_share_no_question():
    entities = {row["messages"][-2]["content"] for row in SETS["held_out_entities"]()}
    trained = {message["content"] for row in TRAIN for message in row["messages"] if message["role"] == "user"}
    assert not entities & trained


@pytest.mark.parametrize("name", SETS)
def test_the_bundled_rows_are_those_of_the_seed(name):
    lines = (data_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == SETS[name]()


def test_the_bundled_rows_are_read_whole():
    for name in SETS:
        records = instil.read(data_folder() / f"{name}.jsonl")
        rows = list(records)
        assert len(rows) == len(SETS[name]())
        assert {row.shape for row in rows} == {"messages"}


def test_what_is_right():
    row = next(row for row in TRAIN if row["family"] == "capital")
    reference = row["messages"][-1]["content"]
    assert is_right(row, reference + "\n")
    assert not is_right(row, reference.rstrip("."))
    assert not is_right(row, reference.lower())
    three = {"family": "list_three", "entity": "days", "messages": []}
    assert is_right(three, "Three days are Monday, Friday and Sunday.")
    assert not is_right(three, "Three days are Monday, Friday and Monday.")
    assert not is_right(three, "Three days are Monday, Friday and gold.")
    assert not is_right(three, "Three colors are red, green and blue.")


def test_a_plain_fact_begins_and_goes_on():
    facts = {start: rest for family, start, rest in plain_facts(held_out=False)} | {
        start: rest for family, start, rest in plain_facts(held_out=True)
    }
    assert facts["The capital of Peru is"] == " Lima."
    assert facts["The young of a cat is"] == " a kitten."
    assert facts["3 + 4 ="] == " 7."
    held = {start for _, start, _ in plain_facts(held_out=True)}
    assert 0.25 < len(held) / len(facts) < 0.42
