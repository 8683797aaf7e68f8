"""IFEval: instructions whose following a program can verify.

Source: Zhou et al., 2023, "Instruction-Following Evaluation for Large Language Models" (arXiv 2311.07911).
"""

from instil.evaluation.ifeval.language import ensure_ready
from instil.evaluation.ifeval.prompts import IfevalPrompt, Instruction, read_prompts
from instil.evaluation.ifeval.scores import Followed, followed

__all__ = [
    "Followed",
    "IfevalPrompt",
    "Instruction",
    "ensure_ready",
    "followed",
    "read_prompts",
]
