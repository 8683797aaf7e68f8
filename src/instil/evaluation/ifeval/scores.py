"""Whether a response follows its instructions, strictly and loosely."""

from __future__ import annotations

from dataclasses import dataclass

from instil.evaluation.ifeval.checks import CHECKS
from instil.evaluation.ifeval.prompts import IfevalPrompt, Instruction


@dataclass(frozen=True, slots=True)
class Followed:
    """Which of a prompt's instructions a response follows, in their order.

    Args:
        key: The key of the prompt.
        strict: Whether the response as it stands follows.
        loose: Whether one of its eight variants does.
    """

    key: int | str
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def followed(prompt: IfevalPrompt, response: str) -> Followed:
    """Which of the prompt's instructions the response follows (Zhou et al., 2023).

    Loosely, one of eight variants must: the response; it without its first line, its last, or both, each stripped;
    and these four without any `*`. What is empty, or white space alone, follows nothing.

    Args:
        prompt: What was asked.
        response: The answer, whole.

    Raises:
        UsageError: An instruction is about language, and langdetect is not installed.
    """
    variants = _variants(response)
    strict = tuple(_follows(instruction, response) for instruction in prompt.instructions)
    loose = tuple(any(_follows(instruction, text) for text in variants) for instruction in prompt.instructions)
    return Followed(prompt.key, strict, loose)


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    texts = [response, *cut]
    return list(dict.fromkeys([*texts, *(text.replace("*", "") for text in texts)]))


def _follows(instruction: Instruction, text: str) -> bool:
    return bool(text.strip()) and CHECKS[instruction.id](text, **instruction.arguments)
