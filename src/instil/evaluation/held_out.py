"""A metric of the answers that a model gives to held-out rows while it is trained (`instil train --eval-metric`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from instil.conversation import Record
from instil.errors import DataError, RowProblem, UsageError, nearest
from instil.evaluation import metrics
from instil.evaluation.items import spaced
from instil.training.config import TrainConfig
from instil.training.events import Measure

if TYPE_CHECKING:
    from instil.inference import Engine
    from instil.model.forward import TreeModel
    from instil.prompt import Renderer
    from instil.training.distributed import Processes
    from instil.training.rows import Rows


def check_metric(name: str) -> None:
    """Refuse what is no metric that answers can be measured by while a model is trained.

    Raises:
        UsageError: There is none of that name, or it runs programs.
    """
    if name == "execute":
        raise UsageError(
            "--eval-metric execute: runs programs that the model writes, which training does not",
            "Choose another, and run `instil evaluate` with --execute afterwards.",
        )
    if name not in metrics.METRICS:
        raise UsageError(
            f"--eval-metric {name}: there is no such metric", nearest(name, {"loss", *metrics.METRICS} - {"execute"})
        )


def measure(config: TrainConfig, rows: Rows) -> Measure:
    """How the answers of the model being trained to held-out rows are measured, to be given to `instil.train`.

    The model is asked with the very prompts of training for the last answer of each row, and answers by the likeliest
    tokens (greedily). Its answers are held against those of the rows, and whatever else a row says is right.

    Args:
        config: The run: which metric, at most how many rows, how long an answer may be.
        rows: Its rows.

    Raises:
        UsageError: There is no such metric, or a package that it needs is not installed.
        DataError: Held-out rows have no answer in text, or lack what the metric needs; all of them.
    """
    name = config.eval_metric
    check_metric(name)
    records = list(rows.held_out_records())
    references = _references(records, name)
    chosen = spaced(range(len(records)), config.eval_metric_rows)
    count = len(chosen)
    prompts = _prompts([records[number] for number in chosen], config, rows.renderer)
    asked = {chosen[at]: prompt for at, prompt in prompts.items()}
    if not asked:
        raise DataError(f"--eval-metric {name}: nothing of the last answer of any held-out row is trained")
    answers = Answers(
        name, [references[at] for at in asked], list(asked.values()), rows.renderer, config.eval_max_new_tokens
    )
    higher = metrics.metric(name).higher_is_better
    left_out = count - len(asked)
    about = f"{name} ({'higher' if higher else 'lower'} is better) of greedy answers to {len(asked):,} of "
    about += f"{len(records):,} held-out rows" + (", evenly spaced" if count < len(records) else "")
    about += f"; of {left_out:,} more nothing of the last answer is trained" if left_out else ""
    return Measure(answers, higher, about)


class Answers:
    """Has a model answer prompts, and scores the answers.

    Args:
        name: The metric.
        references: What each answer is held against.
        prompts: The token ids of each prompt.
        renderer: What they were rendered with.
        max_new_tokens: The most tokens of an answer.
    """

    def __init__(
        self,
        name: str,
        references: Sequence[metrics.Item],
        prompts: Sequence[Sequence[int]],
        renderer: Renderer,
        max_new_tokens: int,
    ) -> None:
        self._name = name
        self._references = references
        self._prompts = prompts
        self._renderer = renderer
        self._max_new_tokens = max_new_tokens
        self._engine: Engine | None = None

    def __call__(self, model: TreeModel, processes: Processes) -> float:
        """The metric of a model's answers, of which each process gives its share; NaN where no answer has a value.

        Args:
            model: In evaluation mode; it is left as it was.
            processes: Those that hold the same model.
        """
        count = len(self._prompts)
        shares = [range(rank, count, processes.size) for rank in range(processes.size)]
        texts = processes.gathered(self._generate(model, [self._prompts[at] for at in shares[processes.rank]]))
        order = [at for share in shares for at in share]
        return self.score([text for _, text in sorted(zip(order, texts, strict=True))])

    def score(self, answers: Sequence[str]) -> float:
        """The metric of answers, one for each prompt."""
        items = [replace(each, answer=answer) for each, answer in zip(self._references, answers, strict=True)]
        return metrics.aggregate(self._name, metrics.score(self._name, items)).get(self._name, float("nan"))

    def _generate(self, model: TreeModel, prompts: Sequence[Sequence[int]]) -> list[str]:
        import torch

        from instil.inference import Engine, SamplingOptions
        from instil.inference.load import stop_ids
        from instil.inference.session import frame
        from instil.inference.session import stop_ids as stop_ids_of_template

        if self._engine is None or self._engine.model is not model.base:
            tokenizer = self._renderer.tokenizer
            stops = stop_ids_of_template(self._renderer) or stop_ids({}, tokenizer)
            self._engine = Engine(model.model, tokenizer, stops)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine takes as many answers at once as free memory holds
        greedy = SamplingOptions(temperature=0.0, max_new_tokens=self._max_new_tokens)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
            found = self._engine.generate(prompts, greedy)
        opening, closing = frame(self._renderer)
        return [answer.text.removeprefix(opening).removesuffix(closing) for (answer,) in found]


def _references(records: Sequence[Record], name: str) -> list[metrics.Item]:
    """What the last answer of each record is held against.

    Raises:
        DataError: Records that have none, or lack what the metric needs; all of them.
    """
    from instil.evaluation.suites import OwnRecords, held_against

    problems = [
        RowProblem(str(each.source), "", "its last answer has no text to hold an answer against", "leave it out")
        for each in records
        if each.kind == "conversation" and not each.conversations[-1].messages[-1].content.strip()
    ]
    try:
        items = OwnRecords([_without_metric(each) for each in records], [name]).items()
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(f"--eval-metric {name}: there are held-out rows that it cannot measure", problems=problems)
    return [held_against(item) for item in items]


def _without_metric(record: Record) -> Record:
    """The record without the metric of its own, which is for `instil evaluate`."""
    return replace(record, extra={key: value for key, value in record.extra.items() if key != "metric"})


def _prompts(records: Sequence[Record], config: TrainConfig, renderer: Renderer) -> Mapping[int, Sequence[int]]:
    """The ids of the prompt of each record's last answer, as it is trained, by its number; the others have none."""
    from instil.prompt import PromptOptions, RecordEncoder, longest_exchange

    values = {name: getattr(config, name) for name in PromptOptions.model_fields}
    options = PromptOptions.model_construct(**{**values, "train_on": "last"})
    longest = longest_exchange(renderer, options, config.tokens_per_batch)
    found = RecordEncoder(renderer, options, longest, config.objective or "supervised").encode(records)
    return {at: row.exchanges[-1].prompt_ids.tolist() for at, row in enumerate(found) if row.exchanges}
