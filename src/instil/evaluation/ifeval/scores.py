"""Whether a response follows its instructions, strictly and loosely, and the four numbers of many."""

from __future__ import annotations

from collections.abc import Iterable
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


@dataclass(frozen=True, slots=True)
class FourNumbers:
    """The four numbers of IFEval, each as the items whose share it is.

    Instructions of one prompt are no independent items: an interval of their share takes them by prompt.

    Args:
        prompt_keys: The key of each prompt.
        prompt_strict: Whether all instructions of each prompt are followed.
        prompt_loose: The same of the variants; each instruction may be followed by another one.
        instruction_keys: The key of the prompt that each instruction belongs to.
        instruction_strict: Whether each instruction is followed.
        instruction_loose: The same of the variants.
    """

    prompt_keys: tuple[int | str, ...]
    prompt_strict: tuple[bool, ...]
    prompt_loose: tuple[bool, ...]
    instruction_keys: tuple[int | str, ...]
    instruction_strict: tuple[bool, ...]
    instruction_loose: tuple[bool, ...]


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


def four_numbers(results: Iterable[Followed]) -> FourNumbers:
    """What was followed, by prompt and by instruction, strictly and loosely."""
    results = tuple(results)
    return FourNumbers(
        prompt_keys=tuple(result.key for result in results),
        prompt_strict=tuple(all(result.strict) for result in results),
        prompt_loose=tuple(all(result.loose) for result in results),
        instruction_keys=tuple(result.key for result in results for _ in result.strict),
        instruction_strict=tuple(right for result in results for right in result.strict),
        instruction_loose=tuple(right for result in results for right in result.loose),
    )


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    texts = [response, *cut]
    return list(dict.fromkeys([*texts, *(text.replace("*", "") for text in texts)]))


def _follows(instruction: Instruction, text: str) -> bool:
    return bool(text.strip()) and CHECKS[instruction.id](text, **instruction.arguments)
