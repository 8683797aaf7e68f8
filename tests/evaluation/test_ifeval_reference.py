"""The checks against those of lm-evaluation-harness, which come from the paper's authors, and against NLTK.

Both run without NLTK's data: sentences and capital words, which need it, are held against NLTK's algorithms instead,
Punkt with the abbreviations and openers of ours.
"""

import json
import random
import re
import unicodedata
import warnings
from collections import Counter

import pytest
from langdetect import DetectorFactory

from instil.conversation import Source
from instil.evaluation.ifeval import IfevalPrompt, Instruction, followed, text
from instil.evaluation.ifeval.checks import CHECKS, RELATIONS

NEED_DATA = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
TYPES = sorted(CHECKS.keys() - NEED_DATA)
SLOW = {name for name in TYPES if name.startswith(("language", "change_case"))}  # a language is told in 10 ms

LANGUAGES = {
    "en": "we walked along the river and had lunch under the old trees",
    "de": "wir gingen am Fluss entlang und aßen unter den alten Bäumen",
    "fr": "nous avons marché le long de la rivière et déjeuné sous les arbres",
    "es": "caminamos por la orilla del río y comimos bajo los árboles viejos",
    "ru": "мы гуляли вдоль реки и обедали под старыми деревьями",
    "hi": "हम नदी के किनारे चले और पुराने पेड़ों के नीचे खाना खाया",
    "ar": "مشينا على طول النهر وتناولنا الغداء تحت الأشجار القديمة",
    "th": "เราเดินไปตามแม่น้ำและกินข้าวกลางวันใต้ต้นไม้เก่า",
    "ko": "우리는 강을 따라 걷고 오래된 나무 아래에서 점심을 먹었다",
}
PIECES = [
    *("river", "River", "RIVER", "riverbank", "tree's", "well-known", "don't", "So.", "Yes, but", "1,000", "3.14"),
    *("*", "**", "***", "******", "*so*", "**so**", "* *", "- a", "* b", "-5", "---", "\n- x", "\n* y"),
    *("[a]", "[", "]", "[]", "[a\nb]", "<<t>>", "<< >>", "<<", ">>", "<<<x>>>", "\n", "\n\n", "\n\n\n", "?!"),
    *("P.S. x", "P.P.S", "p. p. s.", "p. s.", "PS:", "My answer is no.", "My answer is", "my answer is yes."),
    *("Section 1", "Section2", "SECTION 3", "Section", "Any questions?", "any QUESTIONS", "\u00a0", "\t", "\r\n"),
    *('"', "“", "'river", '"River', "`x`", "```", "```json", "{", "}", '{"a": 1}', "null"),
    *("река", "РЕКА", "川", "é", "ß", "İ", "C++", "C#", "a.b", "axb", "#", "!", "$"),
    *LANGUAGES.values(),
]  # fmt: skip
WORDS = ["river", "River", "tree", "so", "a", "река", "ß", "well-known", "C++", "a.b", "C#"]


def choose(*choices):
    return lambda rng: rng.choice(choices)


def up_to(most):
    return lambda rng: rng.randint(1, most)


def some(words):
    return lambda rng: rng.sample(words, rng.randint(1, 2))


ARGUMENTS = {
    "detectable_content:number_placeholders": {"num_placeholders": up_to(3)},
    "detectable_content:postscript": {"postscript_marker": choose("P.S.", "P.P.S", "PS:", "a.b")},
    "detectable_format:multiple_sections": {
        "section_spliter": choose("Section", "SECTION", "a.b"),
        "num_sections": up_to(2),
    },
    "detectable_format:number_bullet_lists": {"num_bullets": up_to(3)},
    "detectable_format:number_highlighted_sections": {"num_highlights": up_to(3)},
    "keywords:existence": {"keywords": some(WORDS)},
    "keywords:forbidden_words": {"forbidden_words": some(WORDS)},
    "keywords:frequency": {"keyword": choose(*WORDS), "frequency": up_to(3), "relation": choose(*RELATIONS)},
    "keywords:letter_frequency": {
        "letter": choose(*"aReiß!#"),
        "let_frequency": up_to(6),
        "let_relation": choose(*RELATIONS),
    },
    "language:response_language": {"language": choose(*LANGUAGES)},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": up_to(3),
        "nth_paragraph": up_to(1),
        "first_word": choose("river", "River", "so"),
    },
    "length_constraints:number_paragraphs": {"num_paragraphs": up_to(3)},
    "length_constraints:number_words": {"num_words": up_to(12), "relation": choose(*RELATIONS)},
    "combination:repeat_prompt": {"prompt_to_repeat": choose("Name a river.", " Say SO. ")},
    "startend:end_checker": {"end_phrase": choose("Any questions?", "So.", " river ")},
}


def arguments_for(rng, name):
    found = {argument: draw(rng) for argument, draw in ARGUMENTS.get(name, {}).items()}
    if "nth_paragraph" in found:
        found["nth_paragraph"] = rng.randint(1, found["num_paragraphs"])
    return found


def response_to(rng, name, arguments):
    """A text of pieces, half of the time bent towards what is asked."""
    said = "".join(rng.choice(PIECES) + rng.choice([" "] * 6 + ["", "\n"]) for _ in range(rng.randint(1, 8)))
    if rng.random() < (0.1 if name in SLOW else 0.5):
        return said
    match name:
        case "detectable_content:number_placeholders":
            return said + rng.choice(["[x]", "[[x]]"]) * rng.randint(1, 3)
        case "detectable_format:multiple_sections":
            return said + rng.choice([" Section 2 ", "SECTION1", "axb 1", "a.b 1\n"]) * rng.randint(1, 3)
        case "combination:repeat_prompt":
            return rng.choice(["", " \n", '"']) + arguments["prompt_to_repeat"].strip().upper() + said
        case "combination:two_responses":
            return (
                rng.choice(["", "******\n"]) + rng.choice(["so", "river"]) + "******" + rng.choice(["so", said, " so "])
            )
        case "startend:end_checker":
            return said + arguments["end_phrase"].title().strip() + rng.choice(["", '"', " ", '"\n', "”", "*"])
        case "startend:quotation":
            return rng.choice(['"', ' "', "“"]) + said.strip() + rng.choice(['"', '" ', "”"])
        case "detectable_format:json_format":
            value = rng.choice([{"a": [1, None]}, "so", 3.5, [], {"река": {"b": True}}, float("nan")])
            start, end = rng.choice([("", ""), ("```json\n", "\n```"), ("```", "```"), ("```JSON", "```"), ("x", "")])
            return start + json.dumps(value) + end if rng.random() < 0.98 else "[" * 100_000
        case "language:response_language" | "change_case:english_capital" | "change_case:english_lowercase":
            sentence = LANGUAGES[rng.choice([arguments.get("language", "en"), *LANGUAGES])]
            sentence = " ".join(rng.sample(sentence.split(), k=rng.randint(1, len(sentence.split()))))
            bent = {"english_capital": str.upper, "english_lowercase": str.lower}.get(name.split(":")[1], str)
            return bent(rng.choice(["", "**", "1 2 3 "]) + sentence + rng.choice(["", ".", " C3"]))
        case "length_constraints:nth_paragraph_first_word":
            return "\n\n".join(
                rng.choice(["river so", "River's", "'so' x", "“so”", "x", " "]) for _ in range(rng.randint(1, 4))
            )
        case "length_constraints:number_paragraphs":
            return rng.choice([" ", "\n", "***"]).join(
                [*rng.choices(["so", "x\n***\ny", "***", " "], k=rng.randint(1, 3))]
            )
        case "detectable_format:constrained_response":
            return said + "My answer is " + rng.choice(["yes.", "no.", "maybe.", "maybe"])
        case _:
            return said


def is_pattern(given, response):
    """Whether an argument holds signs that a regular expression takes for something else."""
    texts = [given.get("keyword", ""), *given.get("keywords", []), *given.get("forbidden_words", [])]
    texts += [given.get("section_spliter", ""), given.get("postscript_marker", "")]
    return any(re.search(r"[.+#]", text) for text in texts if text not in ("P.S.", "P.P.S"))


def has_marks(given, response):
    return any(unicodedata.category(character)[0] == "M" for character in response)


PLAIN = ("words, names and markers are plain text, and regular expressions there", is_pattern)
# Where the two part, why, and when; anything else fails.
KNOWN = {
    "detectable_content:postscript": PLAIN,
    "detectable_format:multiple_sections": PLAIN,
    "keywords:existence": PLAIN,
    "keywords:forbidden_words": PLAIN,
    "keywords:frequency": PLAIN,
    "keywords:letter_frequency": (
        "a letter outside a to z is counted, and another one drawn at random there",
        lambda given, response: not re.fullmatch("[a-zA-Z]", given["letter"]),
    ),
    "detectable_format:json_format": (
        "JSON nested too deeply is not followed, and breaks off the run there",
        lambda given, response: response.startswith("[[["),
    ),
    "length_constraints:number_words": (
        "a sign above or below a letter ends a word, as it did in NLTK when the scores were published",
        has_marks,
    ),
}


@pytest.fixture(scope="module")
def reference():
    """The harness's own module, loaded without its download of NLTK's data."""
    import nltk

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(nltk, "download", lambda *_, **__: True)
        from lm_eval.tasks.ifeval import utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectorFactory, "seed", 0)
        yield utils


def theirs(reference, name, arguments, response):
    check = reference.instructions_registry.INSTRUCTION_DICT[name](name)
    try:
        check.build_description(**arguments)
        return bool(check.check_following(response))
    except (re.error, RecursionError, ValueError, TypeError) as error:
        return type(error)


def compare(reference, name, pairs):
    """How many of the pairs differ for the reason that is known; no other may."""
    rng = random.Random(name)
    outcomes, differ = Counter(), 0
    for _ in range(pairs):
        arguments = arguments_for(rng, name)
        response = response_to(rng, name, arguments)
        here, there = CHECKS[name](response, **arguments), theirs(reference, name, arguments, response)
        outcomes[here] += 1
        if here is not there:
            differ += 1
            assert name in KNOWN, (arguments, response, here, there)
            reason, applies = KNOWN[name]
            assert applies(arguments, response), (arguments, response, here, there, f"is not that {reason}")
    assert min(outcomes[True], outcomes[False]) > pairs / 50
    return differ


def test_the_reference_has_the_same_25_types(reference):
    assert reference.instructions_registry.INSTRUCTION_DICT.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", TYPES)
def test_pairs_agree(reference, name):
    compare(reference, name, 100 if name in SLOW else 300)


@pytest.mark.prove
@pytest.mark.parametrize("name", TYPES)
def test_ten_thousand_pairs_agree(reference, name):
    assert (compare(reference, name, 10_000) > 0) == (name in KNOWN)


EXACT = [name for name in TYPES if name not in SLOW and name not in KNOWN]


def compare_prompts(reference, prompts):
    rng = random.Random(5)
    outcomes = Counter()
    for number in range(prompts):
        names = rng.sample(EXACT, rng.randint(1, 3))
        given = [arguments_for(rng, name) for name in names]
        response = response_to(rng, names[0], given[0])
        found = followed(IfevalPrompt(number, "", tuple(map(Instruction, names, given)), Source("x", 1)), response)
        example = reference.InputExample(number, names, "", given)
        strict = reference.test_instruction_following_strict(example, response)
        loose = reference.test_instruction_following_loose(example, response)
        assert list(found.strict) == strict.follow_instruction_list, (names, given, response)
        assert list(found.loose) == loose.follow_instruction_list, (names, given, response)
        outcomes.update(zip(found.strict, found.loose, strict=True))
    assert outcomes.keys() == {(True, True), (False, True), (False, False)}


def test_strict_and_loose_of_whole_prompts_agree(reference):
    compare_prompts(reference, 1_000)


@pytest.mark.prove
def test_strict_and_loose_of_many_prompts_agree(reference):
    compare_prompts(reference, 20_000)


# Sentences and capital words.

TOKENS = [
    *("the", "The", "a", "In", "It's", "cat", "Cat", "Smith", "x:", "(see", "[name].", "...", "…", "-", "--"),
    *("end.", "end?", "END!", "what?!", "Wow!!", "note.)", '"Yes."', '"No!"', "“Go.”", "“Go”.", "don't.", "wait..."),
    *("Mr.", "“Mr.", "etc.", "e.g.", "U.S.", "p.m.", "J.", "b.", "A.", "I.", "Inc.", "1.", "-5.", "3,000.", "$5."),
    *("**bold**", "**Bold.**", "*it*", "* point", "- item", "## Head", "`code`.", "1.*", "https://a.org/b.c?d=e"),
    *("NASA", "NASA's", "NASA'S", "A", "3D", "(USA)", "'QUOTE'", "DO:", "A,B", "B*C", "A--B", "X…", "O'NEIL", "\n\n"),
    *("DON'T", "IT'S", "WE'RE.", "IT'S.", "DON’T", "CANNOT", "CANNOT.", "GONNA", "gotta", "ПРИВЕТ.", "É", "ß", "`X`"),
]  # fmt: skip
# Where Punkt parts from us, and why.
PUNKT_DIFFERS = {
    "before any capital `...` is an end, and there only before words known from elsewhere": r"\.\.\s+[^\W\d_a-zа-яßé]",
    "no mark within the next word makes an end of this one": r"\.\s+\S*[.?!][)\";}\]*:@'({\[‘’“”«»?!]",
    "opening quotation marks are no part of an abbreviation": r"“Mr\.",
    "a letter is an initial, also where it is a word that begins sentences": r"\.\s+[AI][.,]",
}


@pytest.fixture(scope="module")
def nltk_text():
    """NLTK's algorithms for sentences and words, with the abbreviations and openers of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import _ORTHO_BEG_UC, _ORTHO_MID_LC, PunktParameters, PunktSentenceTokenizer
    parameters = PunktParameters()
    parameters.abbrev_types = {*text._ABBREVIATIONS, "e.g", "u.s", "p.m"}
    parameters.sent_starters = set(text._OPENERS)
    for word in text._OPENERS:
        parameters.ortho_context[word] = _ORTHO_BEG_UC | _ORTHO_MID_LC
    return PunktSentenceTokenizer(parameters), NLTKWordTokenizer()


def compare_text(punkt, treebank, texts):
    rng = random.Random(7)
    reasons, agreed = Counter(), Counter()
    for _ in range(texts):
        drawn = "".join(rng.choice(TOKENS) + rng.choice(" \n") for _ in range(rng.randint(1, 7)))
        sentences = punkt.tokenize(drawn)
        if text.count_sentences(drawn) == len(sentences):
            agreed[len(sentences)] += 1
        else:
            known = [reason for reason, where in PUNKT_DIFFERS.items() if re.search(where, drawn)]
            assert known, (drawn, sentences)
            reasons.update(known)
        capital = sum(word.isupper() for sentence in sentences for word in treebank.tokenize(sentence))
        if text.count_capital_words(drawn) != capital:
            # No period is stripped within a sentence there, which hides the 'S.
            assert re.search(r"'(S|RE)\.", drawn), (drawn, sentences)
    assert sum(agreed.values()) > 0.8 * texts
    assert min(agreed[count] for count in range(1, 5)) > texts / 100
    return reasons


def test_sentences_and_capital_words_agree_with_nltk(nltk_text):
    compare_text(*nltk_text, 1_000)


@pytest.mark.prove
def test_sentences_and_capital_words_of_many_texts_agree_with_nltk(nltk_text):
    assert compare_text(*nltk_text, 20_000).keys() == PUNKT_DIFFERS.keys()
