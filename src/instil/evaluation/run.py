"""An evaluation: models answer what suites ask, and figures are made of what they said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from instil.conversation import Record, Source
from instil.evaluation.figures import Figure, adjusted, of_harness
from instil.evaluation.items import TOO_LONG, Item, Said, Who
from instil.evaluation.suites import Suite, conversation_of
from instil.prompt import Exchange, PromptOptions, RecordEncoder

if TYPE_CHECKING:
    from instil.inference import Loaded, SamplingOptions
    from instil.inference.session import Chat


class Telling(Protocol):
    """Hears how far an evaluation is."""

    def __call__(self, what: str, total: int) -> Callable[[], object]:
        """Something begins that has `total` parts; what is returned is called after each."""


def ask(loaded: Loaded, who: Who, items: Sequence[Item], sampling: SamplingOptions, telling: Telling) -> None:
    """Have a model answer items, turn by turn, all items of a turn together.

    Args:
        loaded: The model.
        who: As which its answers are kept.
        items: What is asked; `Item.said` takes the answers, and those that ask nothing are passed by.
        sampling: How answers are generated.
        telling: Hears of every answer.

    Raises:
        TemplateError, UsageError: A conversation that the template or the context does not take.
    """
    from instil.inference.session import Chat

    for item in items:
        item.said[who], item.scores[who] = [], {}
    plain = [item for item in items if "start" in item.wanted]
    if plain:
        done = telling(f"{who}: plain text", len(plain))
        prompts = [loaded.encode(item.wanted["start"]) for item in plain]
        found = loaded.engine.generate(prompts, _short(sampling), on_done=lambda _: done())
        for item, (answer,) in zip(plain, found, strict=True):
            item.said[who].append(Said(answer.text, answer.ended, len(answer.ids)))
    waiting = [item for item in items if item.messages]
    chat = Chat(loaded) if waiting else None
    turn = 0
    while waiting and chat is not None:
        _ask_once(
            chat, who, waiting, sampling, telling(f"{who}: answers" + f", turn {turn + 1}" * bool(turn), len(waiting))
        )
        waiting = [item for item in waiting if len(item.later_turns) > turn]
        turn += 1


def _ask_once(
    chat: Chat, who: Who, items: Sequence[Item], sampling: SamplingOptions, done: Callable[[], object]
) -> None:
    """Have each item answered once more; what is too long for the model's context is answered by nothing."""
    from instil.inference.session import TooLongError

    fitting, asked = [], []
    for item in items:
        messages = list(item.messages)
        for said, later in zip(item.said[who], item.later_turns, strict=False):
            messages += [{"role": "assistant", "content": said.text}, *later]
        conversation = conversation_of(messages, item.tools)
        try:
            asked.append((conversation, chat.prompt(conversation, sampling)))
        except TooLongError:
            item.said[who].append(Said("", TOO_LONG, 0))
            done()
            continue
        fitting.append(item)
    for item, reply in zip(fitting, chat.replies_to(asked, sampling, lambda _: done()), strict=True):
        answer = reply.answers[0]
        said = Said(answer.message.content, answer.ended, answer.tokens or 0, reply.dropped_turns)
        item.said[who].append(said)


def _short(sampling: SamplingOptions) -> SamplingOptions:
    """For text that is only to go on by a word or two."""
    return sampling.model_copy(update={"max_new_tokens": min(16, sampling.max_new_tokens)})


def figures(suites: Sequence[Suite], items: Sequence[Item], harness: Mapping[str, Any] | None = None) -> list[Figure]:
    """The figures of all suites, from items that are scored; those of the harness's tasks last."""
    found = [each for suite in suites for each in suite.figures([i for i in items if i.suite == suite.name])]
    return adjusted([*(each for each in found if each is not None), *of_harness(harness or {})])


def score(suites: Sequence[Suite], items: Sequence[Item]) -> None:
    """Score the items of all suites."""
    for suite in suites:
        of_suite = [item for item in items if item.suite == suite.name]
        if of_suite:
            suite.score(of_suite)


def weigh(loaded: Loaded, who: Who, items: Sequence[Item], telling: Telling, tokens_per_batch: int = 8192) -> None:
    """Score how likely the first reference of each item is behind its prompt, and each plain text.

    Puts `reference` into the scores: `loss`, the sum over the tokens (a reference's stop token included) in nats, and
    `tokens`. What is longer than the model takes has none.

    Args:
        loaded: The model.
        who: As which its scores are kept.
        items: What is scored.
        telling: Hears of every item.
        tokens_per_batch: Token budget of a batch.
    """
    from instil.inference.score import score_exchanges
    from instil.model.forward import TreeModel

    found = [(item, exchange) for item in items for exchange in _exchanges(loaded, item)]
    if not found:
        return
    done = telling(f"{who}: likelihood", len(found))
    model = loaded.engine.model
    attention = model.config._attn_implementation
    reader = TreeModel(model)
    try:
        for chunk in _batches(found, tokens_per_batch):
            scored = score_exchanges(reader, [exchange for _, exchange in chunk], [item.id for item, _ in chunk])
            for (item, _), each in zip(chunk, scored, strict=True):
                completion = each.likelihood.completion
                before = item.scores[who].get("reference", {"loss": 0.0, "tokens": 0})
                item.scores[who]["reference"] = {
                    "loss": before["loss"] - completion.log_likelihood,
                    "tokens": before["tokens"] + completion.tokens,
                }
                done()
    finally:
        model.set_attn_implementation(attention)


def diverge(base: Loaded, tuned: Loaded, items: Sequence[Item], telling: Telling) -> None:
    """Measure how far the tuned model's distributions are from the base's on plain texts.

    Puts `divergence` into the tuned scores: the mean over the positions of a text of the Kullback-Leibler divergence of
    the tuned model's next token from the base's, in nats, over the tokens that both have.

    Args:
        base: The base model.
        tuned: The tuned one, of the same tokens.
        items: Those with a `text`.
        telling: Hears of every text.
    """
    import torch

    texts = [item for item in items if "text" in item.wanted]
    if not texts:
        return
    done = telling("base against tuned: divergence", len(texts))

    def divergence(exchange: Exchange) -> float:
        ids = torch.tensor([[*exchange.prompt_ids, *exchange.completion_ids]], device=tuned.engine.model.device)
        one, other = (each.engine.model(input_ids=ids).logits[0, :-1].float() for each in (base, tuned))
        rows = min(one.shape[-1], other.shape[-1])
        p, q = (torch.log_softmax(logits[:, :rows], -1) for logits in (one, other))  # (P, V)
        return float((p.exp() * (p - q)).sum())

    with torch.inference_mode():
        for item in texts:
            windows = _exchanges(tuned, item)
            if windows:
                positions = sum(len(each.completion_ids) for each in windows)
                item.scores["tuned"]["divergence"] = sum(map(divergence, windows)) / positions
            done()


def _exchanges(loaded: Loaded, item: Item) -> list[Exchange]:
    """What is weighed of an item: a text in windows of the model's context, or a reference behind its prompt.

    Nothing where there is no such thing, or a prompt and its reference are longer than the context.
    """
    limit = loaded.engine.context or None
    if "text" in item.wanted:
        ids = np.array(loaded.encode(item.wanted["text"]), np.int32)
        return [_plain(ids[at : at + (limit or len(ids))]) for at in range(0, len(ids) - 1, limit or len(ids))]
    references = item.wanted.get("references")
    if not references or not item.messages or item.later_turns:
        return []
    (row,) = RecordEncoder(loaded.renderer, PromptOptions(train_on="last"), limit).encode([record_of(item)])
    return [row.exchanges[-1]] if row.exchanges else []


def record_of(item: Item) -> Record:
    """An item with its first reference as its answer."""
    path, _, line = item.id.rpartition(":")
    whole = [*item.messages, {"role": "assistant", "content": item.wanted["references"][0]}]
    source = Source(path, int(line)) if line.isdecimal() else Source(item.id, 0)
    return Record(source, "messages", "conversation", (conversation_of(whole, item.tools),))


def _plain(ids: NDArray[np.int32]) -> Exchange:
    """A text as an exchange whose first token is the prompt."""
    ones = np.ones(len(ids), np.float32)
    return Exchange("", "", ids[:1], ones[:1], ids[1:], ones[1:], "none")


def _batches(found: Sequence[tuple[Item, Exchange]], tokens: int) -> Iterator[list[tuple[Item, Exchange]]]:
    chunk: list[tuple[Item, Exchange]] = []
    for each in found:
        if chunk and sum(len(exchange) for _, exchange in chunk) + len(each[1]) > tokens:
            yield chunk
            chunk = []
        chunk.append(each)
    yield chunk
