"""Each instruction by its definition, the prompt file with all that can be wrong in it, the four numbers."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.conversation import Source
from instil.errors import DataError, UsageError
from instil.evaluation.ifeval import (
    Followed,
    IfevalPrompt,
    Instruction,
    ensure_ready,
    followed,
    read_prompts,
)
from instil.evaluation.ifeval import language as languages
from instil.evaluation.ifeval.checks import CHECKS
from instil.evaluation.ifeval.text import count_capital_words, count_sentences, count_words
from instil.evaluation.items import Item
from instil.evaluation.statistics import Share
from instil.evaluation.suites import IFEval

AT_LEAST, LESS_THAN = "at least", "less than"
ENGLISH = "the weather was fine all week, so we walked along the river and had our lunch under the old trees."
GERMAN = "Das Wetter war die ganze Woche schön, also gingen wir am Fluss entlang und aßen unter den alten Bäumen."
RUSSIAN = "Всю неделю стояла хорошая погода, и мы гуляли вдоль реки и обедали под старыми деревьями."
CODE = "```python\nprint('x')\n```"

# (id, arguments, what follows, what does not)
CASES = {
    "keywords:existence": (
        {"keywords": ["river", "Öl"]},
        ["The River runs. öl", "riverbank and ÖLfarbe", "```\nriver öl\n```"],
        ["river", "oil, river", "ri ver öl", "***", "riv*er* öl"],
    ),
    "keywords:frequency": (
        {"keyword": "go", "frequency": 2, "relation": AT_LEAST},
        ["Go! GO!", "gogo", "ago, gone", "«go» “go”"],
        ["go", "g o g o", "го го", "gO"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["cat", "C++"]},
        ["concatenate", "cats", "C+ +", "кот", "cat_s", "C++11"],
        ["A Cat.", "(cat)", "«CAT»", "the-cat-sat", "`c++`", "I like C++.", "**cat**"],
    ),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 3, "let_relation": LESS_THAN},
        ["ee", "Ee aaa", "ее ее", "é é é é", "123"],
        ["eee", "EeE", "tree house"],
    ),
    "language:response_language": (
        {"language": "de"},
        [GERMAN, f"„{GERMAN}“", f"**{GERMAN}**", "1 2 3", "!!!"],
        [ENGLISH, RUSSIAN],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": AT_LEAST},
        ["A cat. Two cats! Three?", "One.\nTwo.\nThree.", "“Go.” “Stay.” “Run.”", "Да. Нет. Может быть."],
        ["One. Two.", "- one\n- two\n- three", "Mr. Smith met Dr. Jones. He left.", "e.g. 3.14", "..."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "one***two", "***\none\n***\ntwo\n***", "один\n\n***\n\nдва"],
        ["one", "one\n\ntwo", "one\n***\n***\ntwo", "a***b***c", "***", "one * * * two"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": LESS_THAN},
        ["one two three", "- - - !!", "«один» два", "三个字的句子", "snake_case is_one"],
        ["one two three four", "it's well-known", "```\na b c d\n```", "1.5 2.5"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ["First.\n\nThen more", "a\n\n  THEN, we", "a\n\n'then' b", 'a\n\n"Then" b', "a\n\nthen's b"],
        ["a\nthen", "then\n\na", "a\n\nthenceforth", "a\n\n**Then** b", "a\n\nthen\n\nb", "a\n\n\n\nthen"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] [address]", "[a][b]", "[[x] y] [имя]", "x = [1, 2]; y = [3]"],
        ["[name]", "(name) (address)", "[na\nme] [x]", "] [", "［名］［址］"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. more", "p.s. more", "P. S. more", "P.P.S. more", "**P.S.** more"],
        ["PS more", "P.S more", "Postscript: more", "P.  S.", "П.С. ещё"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n* b", "text\n  - a\n\t* b\nend", "- один\n- два", "*a\n-b"],
        ["* a", "* a\n* b\n* c", "1. a\n2. b", "• a\n• b", "**a**\n**b**", "a * b\nc - d"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes.", "Well: My answer is maybe.", '"My answer is no."', "**My answer is no.**"],
        ["My answer is yes", "my answer is yes.", "My answer is: no.", "yes.", "Мой ответ — да."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*", "**один** **два**", "* a\n*b* *c*"],
        ["*a*", "**a**", "* *  ** **", "*a\nb* *c", "****", "\\_a\\_ _b_"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section2", "**Section 1** x **Section 2**", "Section 7, Section 7"],
        ["Section 1", "SECTION 1 SECTION 2", "Section A Section B", "Section  1 Section  2", "Раздел 1 Раздел 2"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "```JSON\n1```", '  "слово"  ', "true"],
        ["{'a': 1}", "{", 'Here: {"a": 1}', '{"a": 1,}', "```json\n```", '```yaml\n{"a": 1}\n```', "[" * 100_000],
    ),
    "detectable_format:title": (
        {},
        ["<<joy>>", "text\n<<a b>> text", "<<<x>>>", "<<название>>", "**<<x>>**"],
        ["<joy>", "<< >>", "<<>>", "<<a\nb>>", "«joy»", "<<joy", "x << y"],
    ),
    "combination:two_responses": (
        {},
        ["a******b", "a\n******\nb\n******", "******\na ****** b", "один\n******\nдва"],
        ["a", "a******a", "a***b", "a******b******c", "a************b", "a* * * * * *b", "******"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": " Write a Poem.\nNow! "},
        ["Write a Poem.\nNow! Roses are red.", "  write a poem.\nnow!", "WRITE A POEM.\nNOW!!"],
        ["Write a Poem. Now! Roses", '"Write a Poem.\nNow!"', "Sure. Write a Poem.\nNow!", "Roses", "***"],
    ),
    "startend:end_checker": (
        {"end_phrase": "Any Questions?"},
        ["So. Any questions?", 'He said "any questions?"', "x ANY QUESTIONS?\n\n", "ManyAny questions?"],
        ["Any questions? No.", "Any questions", "**Any questions?**", "“Any questions?”", "`Any questions?`"],
    ),
    "startend:quotation": (
        {},
        ['"a"', ' \n"a\n\nb" ', '""', '"a" and "b"', '"да"'],
        ["a", '"', '"a', "“a”", "'a'", '**"a"**', '```\n"a"\n```'],
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["NASA and ESA", "**GO** (NOW)", "I AM", "ПРИВЕТ МИР", "`X` 3D", "DON'T", "NASA's U.S."],
        ["NASA", "Nasa Esa", "STATE-OF-THE-ART", "123 !!", "你好 世界"],
    ),
    "change_case:english_capital": (
        {},
        [ENGLISH.upper(), f"**{ENGLISH.upper()}** 123"],
        [ENGLISH, ENGLISH.upper() + " x", "123", "***", RUSSIAN.upper(), "你好"],
    ),
    "change_case:english_lowercase": (
        {},
        [ENGLISH, f'"{ENGLISH}"', f"* {ENGLISH} 123"],
        [ENGLISH.capitalize(), ENGLISH + " I", GERMAN.lower(), RUSSIAN.lower(), "123", "***"],
    ),
    "punctuation:no_comma": (
        {},
        ["no comma; none", "بسم، الله", "一，二", "‚low quote'", "***"],
        ["a, b", ",", "1,000", "```\nf(a, b)\n```", '","'],
    ),
}  # fmt: skip


def prompt_of(*instructions: tuple[str, dict], key: int | str = 1) -> IfevalPrompt:
    return IfevalPrompt(key, "Do it.", tuple(Instruction(*one) for one in instructions), Source("prompts.jsonl", 1))


def strictly(name: str, response: str, **arguments: object) -> bool:
    (answer,) = followed(prompt_of((name, arguments)), response).strict
    return answer


def test_there_are_25_types_and_each_has_cases():
    assert len(CHECKS) == 25
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_follows_an_instruction(name):
    arguments, right, wrong = CASES[name]
    found = {response: strictly(name, response, **arguments) for response in [*right, *wrong]}
    assert found == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blank", ["", " ", "\n\n\t", "\u3000"])
def test_an_empty_response_follows_nothing(name, blank):
    result = followed(prompt_of((name, CASES[name][0])), blank)
    assert result.strict == result.loose == (False,)


@given(st.integers(0, 9), st.integers(1, 9))
def test_less_than_and_at_least_are_opposites(there, asked):
    for name, number, relation, text in [
        ("keywords:frequency", "frequency", "relation", "word "),
        ("keywords:letter_frequency", "let_frequency", "let_relation", "z "),
        ("length_constraints:number_sentences", "num_sentences", "relation", "So it is. "),
        ("length_constraints:number_words", "num_words", "relation", "word "),
        ("change_case:capital_word_frequency", "capital_frequency", "capital_relation", "WORD "),
    ]:
        more = {"keyword": "word"} if name == "keywords:frequency" else {}
        more |= {"letter": "z"} if name == "keywords:letter_frequency" else {}
        extra = "…" if name != "length_constraints:number_sentences" else ""  # so that nothing is asked of a blank
        if not there and not extra:
            continue
        response = text * there + extra
        assert strictly(name, response, **more, **{number: asked, relation: AT_LEAST}) == (there >= asked)
        assert strictly(name, response, **more, **{number: asked, relation: LESS_THAN}) == (there < asked)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        (" \n", 0),
        ("no mark at all", 1),
        ("One. Two? Three! Four", 4),
        ("Dr. A. B. Smith of Acme Inc. came at 5 p.m. on Tue. by car.", 1),
        ("We left at 5 p.m. The bus was late.", 2),
        ("She lives in the U.S. and likes it, e.g. the food, etc. and so on.", 1),
        ("Pi is 3.14. It is not 3.", 2),
        ("Well... maybe. Well... Maybe.", 3),
        ('"Really?" he asked. "No." (He left.)', 4),
        ("# Heading\n\nText here\n- a list", 1),
        ("1. First.\n2. Second.", 4),
        ("**Bold.** Then.", 2),
        ("See https://example.org/a.b?c=d for it.", 1),
        ("Wait?! Go.", 2),
    ],
)
def test_sentences(text, sentences):
    assert count_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("NASA, ESA; and JAXA.", 3),
        ("STATE-OF-THE-ART O'NEIL", 2),
        ("IT'S DON'T CANNOT", 6),
        ("NASA's Nasa's nasa", 1),
        ("A,B,C 1,000 3:30 X:1", 4),
        ("(ONE) [TWO] {THREE} <FOUR> *FIVE* “SIX” 'SEVEN' `EIGHT`", 8),
        ("ONE—TWO–THREE--FOUR...FIVE", 5),
        ("ΑΘΗΝΑ МОСКВА Париж 東京", 2),
    ],
)
def test_capital_words(text, words):
    assert count_capital_words(text) == words


@given(st.lists(st.sampled_from(["one", "Zwei", "три", "4", "a_b"])), st.sampled_from([" ", ", ", "\n", " - ", "'"]))
def test_words(words, between):
    assert count_words(between.join(words)) == len(words)


# Strict and loose.

NO_COMMA = ("punctuation:no_comma", {})
QUOTED = ("startend:quotation", {})
TWO_BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})


@pytest.mark.parametrize(
    ("instruction", "response", "strict", "loose"),
    [
        (NO_COMMA, "Sure, here:\nIt is.", False, True),  # without the first line
        (NO_COMMA, "It is.\nBye, then.", False, True),  # without the last
        (NO_COMMA, "Sure, here:\nIt is.\nBye, then.", False, True),  # without both
        (NO_COMMA, "It is.\nHere, too.\nBye.", False, False),
        (NO_COMMA, "Sure, here.", False, False),  # what is left is empty
        (QUOTED, '**"So."**', False, True),  # without asterisks
        (QUOTED, 'Sure:\n*"So."*', False, True),  # and without the first line
        (QUOTED, '*"So."*\nBye.', False, True),  # or the last
        (QUOTED, 'Sure:\n\n*"So."*\n\nBye.', False, True),  # or both
        (QUOTED, 'Sure:\nHere:\n"So."', False, False),
        (TWO_BULLETS, "* a\n* b\n* c", False, True),
        (TWO_BULLETS, "* a\n* b", True, True),  # the response itself is a variant
    ],
)
def test_a_variant_may_follow_loosely(instruction, response, strict, loose):
    assert followed(prompt_of(instruction), response) == Followed(1, (strict,), (loose,))


def test_each_instruction_may_have_its_own_variant():
    result = followed(prompt_of(NO_COMMA, TWO_BULLETS, QUOTED), "Sure, here:\n- a\n- b")
    assert result == Followed(1, (False, True, False), (True, True, False))


def test_the_four_numbers_keep_what_belongs_together():
    scores = [
        {"strict": [True, False], "loose": [True, True]},
        {"strict": [True], "loose": [True]},
        {"strict": [False, False, True], "loose": [False, True, True]},
    ]
    instruction = {"id": "punctuation:no_comma", "arguments": {}}
    shape = {"shape": {"stopped": True, "empty": False, "repeats": False, "cut": False}}
    items = [
        Item("i", str(at), wanted={"instructions": [instruction] * len(of["strict"])}, scores={"tuned": of | shape})
        for at, of in enumerate(scores)
    ]
    found = {each.measure: each.tuned for each in IFEval().figures(items) if each is not None and not each.family}
    assert found["prompts followed, strict"] == Share.of([False, True, False])
    assert found["prompts followed, loose"] == Share.of([True, True, False])
    prompts = ["0", "0", "1", "2", "2", "2"]
    assert found["instructions followed, strict"] == Share.of([True, False, True, False, False, True], prompts)
    assert found["instructions followed, loose"] == Share.of([True, True, True, False, True, True], prompts)


# The prompt file.

GOOD = {
    "key": 1,
    "prompt": "Write no commas, and two bullets.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
    "kwargs": [{}, {"num_bullets": 2}],
}


def written(folder, *rows, name="prompts.jsonl"):
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def asking(name: str, arguments: object, key: int = 1) -> dict:
    return {"key": key, "prompt": "Do.", "instruction_id_list": [name], "kwargs": [arguments]}


def test_prompts_are_read_in_order(tmp_path):
    nulls = {"num_words": 5, "relation": "less than", "keywords": None, "num_bullets": None}
    path = written(tmp_path, GOOD, "", {**asking("length_constraints:number_words", nulls), "key": "b"})
    first, second = read_prompts(path)
    assert first == IfevalPrompt(
        1,
        GOOD["prompt"],
        (Instruction("punctuation:no_comma", {}), Instruction(TWO_BULLETS[0], {"num_bullets": 2})),
        Source(str(path), 1),
    )
    assert second.key == "b"
    assert second.instructions[0].arguments == {"num_words": 5, "relation": "less than"}
    assert second.source == Source(str(path), 3)
    assert read_prompts(str(path)) == [first, second]


def test_every_type_can_be_read(tmp_path):
    rows = [asking(name, arguments, key) for key, (name, (arguments, _, _)) in enumerate(CASES.items())]
    assert [prompt.instructions[0].id for prompt in read_prompts(written(tmp_path, *rows))] == list(CASES)


@pytest.mark.parametrize("name", [name for name, (arguments, _, _) in CASES.items() if arguments])
def test_each_argument_is_needed_and_of_its_kind(tmp_path, name):
    arguments = CASES[name][0]
    for argument, value in arguments.items():
        for wrong in (None, True, [], {}, "" if isinstance(value, str) else "two", 0, -1, 2.0, [""], [1]):
            with pytest.raises(UsageError) as raised:
                read_prompts(written(tmp_path, asking(name, {**arguments, argument: wrong})))
            assert f"prompts.jsonl:1: kwargs[0].{argument}: " in str(raised.value)
            assert ("is missing" in str(raised.value)) == (wrong is None)


NTH = "length_constraints:nth_paragraph_first_word"
WRONG = [
    (asking("punctuation:no_commas", {}), "instruction_id_list[0]: unknown: the string 'punctuation:no_commas'"
     " (did you mean 'punctuation:no_comma'?)"),
    (asking("keywords:key_sentences", {}), "instruction_id_list[0]: unknown"),
    (asking(7, {}), "instruction_id_list[0]: unknown: the number 7"),
    (asking("punctuation:no_comma", {"num_words": 2}), "kwargs[0].num_words: is not an argument"
     " of punctuation:no_comma (give {})"),
    (asking("startend:end_checker", {"end_phrase": "x", "end_phrases": "x"}), "kwargs[0].end_phrases: is not an"
     " argument of startend:end_checker (did you mean 'end_phrase'?)"),
    (asking("startend:end_checker", None), "kwargs[0]: must be an object, and is null"),
    (asking("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}),
     "kwargs[0].letter: must be a single character, and is the string 'ab'"),
    (asking("keywords:letter_frequency", {"letter": "a", "let_frequency": 1, "let_relation": "at most"}),
     "kwargs[0].let_relation: must be 'less than' or 'at least', and is the string 'at most'"),
    (asking("language:response_language", {"language": "zh"}), "kwargs[0].language: must be one of af, ar,"),
    (asking(NTH, {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}),
     "kwargs[0].nth_paragraph: is 3, and there are to be 2 paragraphs"),
    ({**GOOD, "kwargs": [{}]}, "kwargs: has 1 entries for 2 ids"),
    ({**GOOD, "kwargs": {}}, "kwargs: must be a list of objects"),
    ({**GOOD, "instruction_id_list": [], "kwargs": []}, "instruction_id_list: must be a list of at least one id"),
    ({**GOOD, "prompt": " "}, "prompt: must be a string that is not blank"),
    ({**GOOD, "key": True}, "key: must be"),
    ({**GOOD, "key": 1.5}, "key: must be"),
    ({"prompts": "x", **{name: value for name, value in GOOD.items() if name != "prompt"}},
     "prompt: is missing (did you mean 'prompts'?)"),
    ("[1]", "a row must be an object"),
    ('{"key": 1', "malformed JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), WRONG)
def test_a_bad_row_is_named_with_its_field_and_cause(tmp_path, row, words):
    with pytest.raises(UsageError) as raised:
        read_prompts(written(tmp_path, {**GOOD, "key": 0}, row))
    assert f"prompts.jsonl:2: {words}" in str(raised.value)
    assert str(raised.value).count("prompts.jsonl:") == 2  # the file, and the one row


def test_all_bad_rows_are_named_at_once(tmp_path):
    rows = [row for row, _ in WRONG]
    rows = [{**row, "key": number} if isinstance(row, dict) and type(row["key"]) is int else row
            for number, row in enumerate(rows)]  # fmt: skip
    with pytest.raises(UsageError) as raised:
        read_prompts(written(tmp_path, *rows))
    lines = str(raised.value).splitlines()
    assert len(lines) == len(WRONG) + 2
    for number, (line, (_, words)) in enumerate(zip(lines[1:-1], WRONG, strict=True), 1):
        assert f"prompts.jsonl:{number}: {words}" in line
    assert lines[-1].strip() == raised.value.remedy != ""


def test_more_than_a_hundred_are_counted(tmp_path):
    with pytest.raises(UsageError, match=r"\n  \.\.\. and 7 more\n"):
        read_prompts(written(tmp_path, *[asking("x", {}, key) for key in range(107)]))


def test_a_key_stands_once(tmp_path):
    with pytest.raises(UsageError, match=r"prompts\.jsonl:3: key: 1 stands at .*prompts\.jsonl:1 already"):
        read_prompts(written(tmp_path, GOOD, {**GOOD, "key": 2}, GOOD))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(written(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + '{"key": "é"}\n'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.jsonl:2: byte 0xe9 .* is not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


# Languages.


def test_the_codes_are_those_of_langdetect():
    assert set(languages._detectors().get_lang_list()) == languages.LANGUAGES


def test_without_langdetect_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    monkeypatch.setitem(sys.modules, "langdetect.detector_factory", None)
    languages._detectors.cache_clear()
    with pytest.raises(UsageError, match=r"instil\[evaluate\]"):
        ensure_ready()
    monkeypatch.undo()
    ensure_ready()


def test_nothing_heavy_is_loaded_before_it_is_needed():
    heavy = {"langdetect", "lm_eval", "nltk", "numpy", "pyarrow", "scipy", "torch", "transformers"}
    code = f"import sys, instil.evaluation.ifeval; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


UNCLEAR = ["no", "bon die", "a la mar", "dit is", "hallo", "in extra", "se me va", "okay then", "der die", "su e"]


def test_the_answer_is_the_same_in_every_process_and_order():
    """Short texts, of which an unseeded langdetect says now this, now that."""
    code = """
import random, sys
import langdetect
from instil.evaluation.ifeval.language import detect
order, *texts = sys.argv[1:]
random.seed(int(order))
langdetect.DetectorFactory.seed = int(order)
texts = texts * 3
random.shuffle(texts)
print(sorted({(text, detect(text)) for text in texts}))
"""
    found = set()
    for seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", code, seed, *UNCLEAR],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        found.add(process.stdout)
    assert found == {f"{sorted((text, languages.detect(text)) for text in UNCLEAR)}\n"}
