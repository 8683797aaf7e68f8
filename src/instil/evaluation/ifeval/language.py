"""The language of a text, the same in every process and whatever was asked before."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from instil.errors import UsageError

_CODES = """
af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru
sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
LANGUAGES = frozenset(_CODES.split())
"""The codes that langdetect answers with: ISO 639-1, and two for Chinese."""


def ensure_ready() -> None:
    """Sees to it that languages can be told, before an answer is generated.

    Raises:
        UsageError: langdetect is not installed.
    """
    _detectors()


def detect(text: str) -> str | None:
    """The code of a text's language, one of `LANGUAGES` or "unknown"; None where there is nothing to tell it by.

    langdetect (Nakatani, 2010) draws the n-grams it looks at, here from seed 0 for every text. It looks at the first
    10,000 characters.

    Raises:
        UsageError: langdetect is not installed.
    """
    detectors = _detectors()
    from langdetect import LangDetectException

    detector = detectors.create()
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


@cache
def _detectors() -> Any:
    """A factory of our own, so that no one else's seed reaches it, with its profiles in the order of their names."""
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
    except ImportError as error:
        raise UsageError("IFEval needs the package 'langdetect'", "pip install 'instil[evaluate]'") from error
    factory = DetectorFactory()
    factory.set_seed(0)
    factory.load_json_profile([file.read_text("utf-8") for file in sorted(Path(PROFILES_DIRECTORY).iterdir())])
    return factory
