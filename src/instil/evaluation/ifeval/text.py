"""Words, capital words and sentences of a text, without data to download.

The published scores count capital words and sentences with NLTK, whose tokenizers these follow: the rules of
Treebank's words as NLTK has them, and the algorithm of Kiss and Strunk, 2006, "Unsupervised Multilingual Sentence
Boundary Detection" (Punkt). What differs is said with each.
"""

from __future__ import annotations

import re
from itertools import pairwise

_WORD = re.compile(r"\w+")

# What separates tokens, and what stands as a token of its own and holds no letter.
_BREAK = re.compile(r"""[«»“”„‘’`"*?!;@#$%&()\[\]{}<>\u2012-\u2015]|--|''|\.{2,}|[:,](?!\d)|(?<!\w)'(?=\w)""")
# Where a token begins within a word: IT|'S, DO|N'T.
_CLITIC = re.compile(r"(?<=[^'\s])(?=(?:'[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)\.?(?:\s|$))")
# Where two words are written as one: CAN|NOT, GON|NA.
_JOINED = re.compile(r"\b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b))", re.IGNORECASE)

# A sentence ends, if at all, at the last mark of what stands between two spaces, with such behind it.
_END = re.compile(r"""(.*[.?!])((?:[)";}\]*:@'({\[‘’“”«»?!].*)?)""")
_LAST_END = re.compile(r"""(.*[.?!])([)";}\]*:@'({\[‘’“”«»?!].*)""")
_CLOSERS = "\"')]}‘’“”«»"
_LETTERS = re.compile(r"(?:[^\W\d_]\.)+")
_NUMBER = re.compile(r"-?[.,]?\d[\d.-]*")


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ABBREVIATIONS = _listed(
    """
    mr mrs ms messrs dr prof rev hon gov pres sen rep gen col lt sgt capt maj cmdr adm st jr sr esq ph.d
    inc ltd co corp bros dept univ assn est ave blvd rd mt ft
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    etc vs cf al approx ca fig figs vol pp ed eds min max lb lbs oz hr hrs
    """
)
_OPENERS = _listed(
    """
    a after all also although an and another any as at because before both but by despite each even every few finally
    first for from furthermore he her here his how however i if in instead it its just last later let many meanwhile
    more moreover most my next no nor not now of on once one only or other our overall perhaps please rather she
    since so some sometimes soon still such that the their then there therefore these they this those though
    through thus to today together under unless until we what when where whether which while who why with without
    yes yet you your
    """
)
"""Words that begin sentences, and with a capital stand nowhere else."""


def count_words(text: str) -> int:
    r"""How many runs of letters, digits and underscores (`\w+`) there are: "don't" and "well-known" are two each.

    The vowel signs of Thai, Hindi and the like end a word, as in Python's `re`, which the published scores were counted
    with; NLTK has since changed to the package `regex`, which takes them for letters.
    """
    return len(_WORD.findall(text))


def count_capital_words(text: str) -> int:
    """How many words have capital letters only, as `str.isupper` has it: "A", "NASA", "COVID-19", "3D".

    As in NLTK's words, a hyphen joins ("STATE-OF-THE-ART" is one), and "IT'S", "DON'T" and "CANNOT" are two each;
    "NASA's" is one.

    Differs from NLTK: it strips a period from the last word of each sentence that it has found, and only there sees
    that "IT'S." ends in "'S"; here any word may end in a period. "D'YE" and "MORE'N" are one word.
    """
    text = _BREAK.sub(" ", text)
    text = _CLITIC.sub(" ", text)
    text = _JOINED.sub(r" \g<0> ", text)
    return sum(word.isupper() for word in text.split())


def count_sentences(text: str) -> int:
    """How many sentences there are, as Punkt counts them in English.

    A sentence ends where `.`, `?` or `!` stands before a space, a quotation mark, a bracket, or one of `*`, `:`, `;`,
    `@`, `?`, `!`; closing quotation marks and brackets go with it, and in one run of such marks only the last counts. A
    line's end is a space: a heading or a list without such marks ends nothing. What follows the last end is a sentence
    too, if only `**`, or the last `!` of a text that ends in `!!`. The "1." of a list is one unless a small letter
    follows. No sentence ends at an abbreviation or an initial, unless a word that begins sentences follows with a
    capital ("at 5 p.m. The"), nor at `...`, unless any capital follows.

    Differs from Punkt in what that has learned from newspapers: it has other abbreviations (here: those of
    `_ABBREVIATIONS`, and single letters with periods, as "e.g.", "U.S.") and other words that begin sentences
    (`_OPENERS`), knows pairs of words around a period, and takes `...` for an end only before words that it has seen.
    And in three faults of it: an abbreviation is none there behind an opening curly quotation mark (“Mr. Smith), or
    before a word with a mark inside (Mr. Smith.”), and an initial is one only before words that begin no sentence
    (J. A. Smith).
    """
    *words, last = text.split() or [""]
    ends = 0
    for word, following in pairwise([*words, last]):
        found = _END.fullmatch(word)
        ends += bool(found and _ends_sentence(found[1], found[2] or following))
    found = _LAST_END.fullmatch(last)
    ends += bool(found and found[2].strip(_CLOSERS) and _ends_sentence(found[1], found[2]))
    return ends + bool(last)


def _ends_sentence(head: str, following: str) -> bool:
    """Whether a sentence ends with the mark that `head` ends in, before what follows."""
    if "?" in head or "!" in head:
        return True
    token = re.split(r"[^\w.'$-]", head)[-1].lstrip("-")
    first = following[:1]
    if token.endswith(".."):
        return first.isupper()
    if token.removesuffix(".").lower() in _ABBREVIATIONS or _LETTERS.fullmatch(token):
        initial = len(token) == 2
        opener = first.isupper() and re.split(r"[^\w.]", following)[0].lower() in _OPENERS
        return opener or (initial and not first.isalpha())
    if _NUMBER.fullmatch(token):
        return not first.islower()
    return True
