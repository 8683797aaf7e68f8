"""The text of an answer as it comes: whole characters, no special tokens, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product

from instil.prompt.tokenizer import Tokenizer

_CONTEXT = 16
"""Tokens of the prompt beside which the first of an answer are decoded; a character has fewer."""

_BYTES = 4
"""Most tokens of a character: its bytes."""

_UNFINISHED = "\ufffd"


class Decoder:
    """Decodes what follows a prompt.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)
        self._bos = tokenizer.special_tokens.get("bos_token")
        self._letter = self._backend.encode("a", add_special_tokens=False).ids
        control = next((token.content for token in added.values() if token.special and token.content.strip()), None)
        self._at_start = self._behind("a")
        self._behind_control = self._behind(f"{control}a") if control else self._at_start

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, none of them special."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def context(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """The tokens beside which an answer is decoded, and their text, up to the last whole character.

        Where an answer follows text they are the end of that; else what keeps the space that begins it, unless that is
        the dummy one that the tokenizer puts there.
        """
        tail: list[int] = []
        for token in reversed(prompt[-_CONTEXT:]):
            if token in self.special:
                break
            tail.insert(0, token)
        if not tail:
            alone = len(prompt) == 1 and prompt[0] == self._backend.token_to_id(self._bos or "")
            tail = self._at_start if alone else self._behind_control
            return tail, self.decode(tail)
        for start, left in product(range(_BYTES), repeat=2):  # either end may stand within a character
            text = self.decode(tail[start : len(tail) - left])
            if _UNFINISHED not in text:
                return tail[start:], text
        return tail, self.decode(tail).rstrip(_UNFINISHED)

    def _behind(self, text: str) -> list[int]:
        """No tokens if the tokenizer puts a dummy space before a letter here, else those of a letter."""
        ids = [i for i in self._backend.encode(text, add_special_tokens=False).ids if i not in self.special]
        both, letter = self.decode([*self._letter, *ids]), self.decode(self._letter)
        return [] if both[len(letter) :].startswith(" ") else self._letter


class TextStream:
    """The text of one answer, token by token.

    Args:
        decoder: Of the model's tokenizer.
        prompt: The ids before the answer.
        stop: Texts before which it ends.
        shown: Special tokens that are text here all the same: those of tool calls.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], stop: Sequence[str] = (), shown: Collection[int] = ()
    ) -> None:
        self._decoder = decoder
        self._dropped = decoder.special - set(shown)
        self._stop = stop
        self._ids, self._before = decoder.context(prompt)  # of what is not yet text, behind those of the last text
        self._known = len(self._ids)
        self._held = ""  # may turn out to be the start of a stop string
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now, perhaps none."""
        if token in self._dropped or self.stopped:
            return ""
        self._ids = [*self._ids, token]
        now = self._decoder.decode(self._ids)
        if now.endswith(_UNFINISHED):
            return ""
        new = now[len(self._before) :]
        tail = self._ids[self._known :]
        alone = self._decoder.decode(tail)
        if _UNFINISHED in alone:  # it begins within a character, and is decoded beside what is before
            tail, alone = self._ids, now
        self._ids, self._known, self._before = tail, len(tail), alone
        return self._given(new)

    def finish(self) -> str:
        """The rest, when no token comes any more; half a character is left out."""
        if self.stopped:
            return ""
        new = self._decoder.decode(self._ids)[len(self._before) :].rstrip(_UNFINISHED)
        rest = self._given(new) if new else ""
        if self._held:
            self._pieces.append(self._held)
            rest, self._held = rest + self._held, ""
        return rest

    def _given(self, new: str) -> str:
        """What of the text so far can be given out; the rest is held."""
        text = self._held + new
        found = [at for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self.stopped, self._held, text = True, "", text[: min(found)]
        else:
            held = max((_overlap(text, each) for each in self._stop), default=0)
            self._held = text[len(text) - held :]
            text = text[: len(text) - held]
        self._pieces.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
