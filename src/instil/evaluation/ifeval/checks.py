r"""The 25 verifiable instructions (Zhou et al., 2023, table 1), each as a check of a response.

A check takes the response, which is not empty, and by name the arguments that the prompt file gives. Where the checker
that came with the paper is at odds with the words of its instruction, the check agrees with the checker, so that
scores can be compared, and says so. It parts from the checker in this:

- Keywords, forbidden words, section names and postscript markers are plain text; there they are regular expressions,
  of which "C++" breaks off the run. Those of the published prompts mean the same either way.
- A missing argument, a count below 1 and a letter outside a to z are drawn at random there. Here the first two are
  errors of the prompt file, and a letter is any character, as "!" and "#" of the published prompts.
- Languages are told from a fixed seed, and capital words and sentences are counted without NLTK's data.
- JSON that is nested too deeply to be read is not followed, where it breaks off the run there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

from instil.evaluation.ifeval.language import detect
from instil.evaluation.ifeval.text import count_capital_words, count_sentences, count_words

Relation = Literal["less than", "at least"]
RELATIONS: tuple[Relation, ...] = ("less than", "at least")


def _holds(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def existence(response: str, *, keywords: list[str]) -> bool:
    """Every keyword is there, in any case, also within a longer word."""
    return all(re.search(re.escape(keyword), response, re.IGNORECASE) for keyword in keywords)


def frequency(response: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    """The keyword is there so often, in any case, also within longer words; occurrences do not overlap."""
    return _holds(len(re.findall(re.escape(keyword.strip()), response, re.IGNORECASE)), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: list[str]) -> bool:
    """None of the words is there, in any case, as a word of its own.

    A word that begins or ends in a sign ("C++") is one if no letter, digit or underscore touches it.
    """
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    """The letter, or any other character, is there so often, in either case."""
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response: str, *, language: str) -> bool:
    """The response is in the language; also if it has nothing to tell a language by, such as digits alone."""
    return detect(response) in (language, None)


def number_sentences(response: str, *, num_sentences: int, relation: Relation) -> bool:
    """There are so many sentences, as `count_sentences` counts them."""
    return _holds(count_sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs stand between dividers `***`.

    The response may begin and end with a divider, but nothing blank may stand between two.
    """
    paragraphs = [paragraph.strip() for paragraph in response.split("***")]
    if not paragraphs[0]:
        del paragraphs[0]
    if paragraphs and not paragraphs[-1]:
        del paragraphs[-1]
    return all(paragraphs) and len(paragraphs) == num_paragraphs


def number_words(response: str, *, num_words: int, relation: Relation) -> bool:
    """There are so many words, as `count_words` counts them."""
    return _holds(count_words(response), relation, num_words)


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """There are exactly so many paragraphs, two newlines between them, and that one begins with the word, in any case.

    The word ends at a space or at one of `.,?!'"`; single quotation marks, then double ones, before it do not count.

    As in the published checker, blank paragraphs (of three newlines and more) are left out of the number but keep
    their place in the order, so that the paragraph looked at may be an earlier one, and a blank one fails.
    """
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    words = paragraphs[nth_paragraph - 1].split() if nth_paragraph <= count else []
    if not words or count != num_paragraphs:
        return False
    word = re.split(r"""[.,?!'"]""", words[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower()


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders stand in square brackets, each on one line; `[]` is one."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """The postscript's marker is there, in any case.

    "P.S." and "P.P.S" may have a space behind each period ("P. S.") and, as in the published checker, may stand
    anywhere, so that "P.P.S." is a "P.S." too.
    """
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    marker = postscript_marker.strip()
    return bool(re.search(patterns.get(marker, re.escape(marker.lower())), response.lower()))


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines begin with a bullet, `*` or `-`, which white space may precede.

    As in the published checker, no space need follow: a line `---` and a number `-5` are bullets, and so is a line in
    italics, but not one that begins with `**`.
    """
    stars = re.findall(r"^\s*\*[^*].*", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    """One of "My answer is yes.", "My answer is no." and "My answer is maybe." is there, in this case.

    As in the published checker, more may be said around it.
    """
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many parts of lines are highlighted: `*so*` or `**so**`, with something that is not blank."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections begin with the name and a number: "Section 1"."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The response is JSON, bare or in a Markdown code block.

    As in the published checker, NaN and Infinity are JSON too, and a lone string or number will do.
    """
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title stands in double angular brackets on one line: `<<title>>`."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response))


def two_responses(response: str) -> bool:
    """Two responses, not the same, stand with `******` between them, and may stand between two of these."""
    parts = [part.strip() for part in response.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """The response begins with the request, in any case.

    As in the published checker, nothing need follow it.
    """
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    """The response ends with the phrase, in any case; double quotation marks may follow it."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    """There are so many words in capital letters, as `count_capital_words` counts them."""
    return _holds(count_capital_words(response), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    """The response is in English, and no letter of it is a small one.

    langdetect passes over what stands within a word in capital letters, so that English is told by little more than the
    first and the last letter of each word, as in the published checker. What has nothing to tell a language by follows.
    """
    return response.isupper() and detect(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    """The response is in English, and no letter of it is a capital; what has nothing to tell a language by follows."""
    return response.islower() and detect(response) in ("en", None)


def no_comma(response: str) -> bool:
    """No comma `,` is there; those of other scripts, as "،" and "，", are none, as in the published checker."""
    return "," not in response


def quotation(response: str) -> bool:
    """The response as a whole stands in double quotation marks `"`, not in curly ones."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:json_format": json_format,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:title": title,
    "keywords:existence": existence,
    "keywords:forbidden_words": forbidden_words,
    "keywords:frequency": frequency,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "punctuation:no_comma": no_comma,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
}
"""The check of each instruction, by its id in the prompt file. Its keyword arguments are those that the id needs."""
