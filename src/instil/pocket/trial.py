"""The bundled model before and after tuning: what it answers, what it still knows, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instil.conversation import Conversation, Message
from instil.evaluation.statistics import Share
from instil.inference import Answer, Engine, Loaded, SamplingOptions, load_engine
from instil.inference.load import stop_ids
from instil.inference.session import Chat
from instil.model.load import load_model
from instil.model.options import ModelOptions
from instil.model.tokens import reserve_tokens
from instil.pocket import data_folder
from instil.pocket.instructions import FACT_FAMILIES, Row, is_right, plain_facts
from instil.prompt import PromptOptions, builtin_templates, load_renderer, load_tokenizer

HELD_OUT = ("held_out_entities", "held_out_phrasings", "held_out_families")
_GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=32)
_PLAIN = SamplingOptions(temperature=0.0, max_new_tokens=16)


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out row and what a model made of it.

    Args:
        set: The set it is of: held-out entities, phrasings or families.
        family: Its task family.
        prompt: The user's words.
        reference: The answer of the row.
        answer: The model's.
        right: Whether that is the reference.
        stopped: Whether it ended in the stop token.
    """

    set: str
    family: str
    prompt: str
    reference: str
    answer: str
    right: bool
    stopped: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """What a model made of everything held out.

    Args:
        items: Its answers under the template.
        plain: For each held-out fact, whether the model goes on with it as plain text.
    """

    items: tuple[Item, ...]
    plain: tuple[bool, ...]

    def share(self, name: str, family: str | None = None) -> Share:
        """The share of right answers in a set, or of one of its families.

        Of held-out entities and phrasings it is that of the families that ask for a fact, of which alone the base can
        know the answer.
        """
        wanted = (
            item
            for item in self.items
            if item.set == name
            and (item.family == family if family else name == "held_out_families" or item.family in FACT_FAMILIES)
        )
        return Share.of([item.right for item in wanted])

    @property
    def everything(self) -> Share:
        """The share of right answers among all, those of stories, lists, styles and the like too."""
        return Share.of([item.right for item in self.items])

    def families(self, name: str) -> list[str]:
        """The families of a set, in order."""
        return list(dict.fromkeys(item.family for item in self.items if item.set == name))

    @property
    def stopped(self) -> Share:
        """The share of the answers that end in the stop token."""
        return Share.of([item.stopped for item in self.items])

    @property
    def known(self) -> Share:
        """The share of held-out facts that the model completes as plain text."""
        return Share.of(self.plain)


def rows_of(name: str) -> list[Row]:
    """The rows of a bundled set."""
    with (data_folder() / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def base_under(folder: Path, template: str) -> Loaded:
    """A base model that is to be prompted with a template: the tokens it lacks are there, and nothing was trained."""
    prompt = PromptOptions(template=template)
    tokenizer = load_tokenizer(folder)
    load_renderer(tokenizer, prompt)  # which adds the template's tokens to the tokenizer
    model = load_model(ModelOptions(model=str(folder)))
    reserve_tokens(model, tokenizer, builtin_templates()[template].special_tokens)
    return Loaded(Engine(model.requires_grad_(False), tokenizer, stop_ids({}, tokenizer)), tokenizer, prompt)


def tuned(folder: Path) -> Loaded:
    """A model that `instil train` wrote."""
    return load_engine(ModelOptions(model=str(folder)))


def answers(loaded: Loaded, rows: Sequence[Row], told: Callable[[int], object] | None = None) -> list[Answer]:
    """What a model answers to the rows, less their last message, as it would be served.

    Args:
        loaded: The model.
        rows: Rows of `messages`.
        told: Is given the number of each row that is done.
    """
    chat = Chat(loaded)
    prompts = [chat.prompt(_conversation(row["messages"][:-1]), _GREEDY).ids for row in rows]
    return [several[0] for several in loaded.engine.generate(prompts, _GREEDY, on_done=told)]


def examine(loaded: Loaded, told: Callable[[int], object] | None = None) -> Trial:
    """Have a model answer everything held out, and complete the facts it was not asked about in training."""
    rows = [(name, row) for name in HELD_OUT for row in rows_of(name)]
    given = answers(loaded, [row for _, row in rows], told)
    items = tuple(_item(name, row, answer) for (name, row), answer in zip(rows, given, strict=True))
    facts = list(plain_facts(held_out=True))
    went_on = loaded.engine.generate([loaded.encode(start) for _, start, _ in facts], _PLAIN)
    plain = tuple(answer.text.startswith(rest) for (_, _, rest), (answer,) in zip(facts, went_on, strict=True))
    return Trial(items, plain)


def results(base: Trial, after: Trial) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""

    def beside(share: Callable[[Trial], Share]) -> dict[str, Any]:
        return {"base": share(base).to_json(), "tuned": share(after).to_json()}

    found: dict[str, Any] = {name: beside(lambda trial, name=name: trial.share(name)) for name in HELD_OUT}  # type: ignore[misc]
    found["everything"] = beside(lambda trial: trial.everything)
    found["plain_facts"] = beside(lambda trial: trial.known)
    found["stopped"] = beside(lambda trial: trial.stopped)
    found["families"] = {
        name: {family: beside(lambda t, n=name, f=family: t.share(n, f)) for family in base.families(name)}  # type: ignore[misc]
        for name in HELD_OUT
    }
    return found


def _conversation(messages: Iterable[Mapping[str, str]]) -> Conversation:
    return Conversation(tuple(Message(each["role"], each["content"]) for each in messages))  # type: ignore[arg-type]


def _item(name: str, row: Row, answer: Answer) -> Item:
    *_, question, reference = row["messages"]
    stopped = answer.ended == "stop"
    right = stopped and is_right(row, answer.text)
    return Item(name, row["family"], question["content"], reference["content"], answer.text, right, stopped)
