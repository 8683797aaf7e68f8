"""`instil evaluate`: what a tuned model does, beside its base, with how sure each figure is."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from instil.cli.generating import missing, shown
from instil.cli.main import REMEDIES
from instil.data.options import DataOptions
from instil.errors import DataError, UsageError, nearest
from instil.evaluation.items import (
    EVALUATION,
    ITEMS,
    TOO_LONG,
    Evaluation,
    read_evaluation,
    read_items,
    spaced,
    write_evaluation,
    write_items,
)
from instil.evaluation.judge import CRITERIA
from instil.evaluation.metrics import METRICS
from instil.evaluation.report import SHOWN, Page, SideBySide, compared, to_html
from instil.evaluation.statistics import check_installed
from instil.inference.options import SamplingOptions
from instil.prompt.options import PromptOptions, arguments
from instil.training.files import RECORD, lock, sha256, write_json
from instil.training.output import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from instil.evaluation.figures import Figure
    from instil.evaluation.items import Item, Who
    from instil.evaluation.judge import Endpoint
    from instil.evaluation.run import Telling
    from instil.evaluation.suites import Suite
    from instil.inference import Loaded

RESULTS, REPORT = "results.json", "report.html"
_SUITES = ("ifeval", "refusals", "judge", "forgetting", "lm-eval")
_WITH_FILE = ("ifeval", "refusals", "judge")
_TO_RESCORE = (
    "rescore",
    "execute",
    "judge_url",
    "judge_model",
    "judge_key_env",
    "judge_cache",
    "judge_requests",
    "criteria",
)
_TASKS = "tasks of EleutherAI's harness"
_FEW = 30
_MARKED = 3
_TEXTS = 100
_WIDTH = 132
_SEED = 1_000_000  # of the bundled plain text: none that the bundled model was trained on
_OF_PROMPTS = PromptOptions.model_fields
Switch = Annotated[bool, Parameter(negative=())]


class EvaluateOptions(SamplingOptions, DataOptions):
    """Everything that `instil evaluate` takes."""

    may_be_empty = ("judge_key_env",)

    model: str | None = Field(default=None, description="Model or adapter to evaluate: a folder or a hub name.")
    base: str | None = Field(default=None, description="The model that it was tuned from, to be asked the same.")
    data: list[str] = Field(
        default_factory=list,
        description="Your held-out records: files, folders, globs, hf://owner/name:split. The last answer of each is "
        "its reference.",
    )
    suite: list[str] = Field(
        default_factory=list,
        description="What else to evaluate: ifeval:FILE, refusals:FILE, judge:FILE, forgetting, forgetting:FILE (plain "
        "text), lm-eval:TASKS.",
    )
    output: Path | None = Field(
        default=None, description="New folder that takes results.json, items.jsonl and report.html."
    )
    rescore: Path | None = Field(
        default=None, description="Score the items of this folder anew, as its figures were made; nothing is generated."
    )
    metric: Annotated[list[str], AfterValidator(lambda given: known(given))] = Field(
        default=["exact_match"],
        min_length=1,
        description="Metrics of records that name none: exact_match, accuracy, list_of, token_f1, rouge_l, chrf, bleu, "
        "numeric, execute.",
    )
    limit: int | None = Field(default=None, ge=1, description="Only so many items of each suite, evenly spaced.")
    lm_eval_as_text: Switch = Field(
        default=False, description="Ask the tasks of lm-eval as plain text, as base models are, not with the template."
    )
    execute: Switch = Field(
        default=False, description="Run programs that the model writes, in a process of their own without network."
    )
    template: str | None = Field(default=None, description=_OF_PROMPTS["template"].description)
    template_args: Annotated[dict[str, Any], BeforeValidator(arguments)] = Field(
        default_factory=dict, description=_OF_PROMPTS["template_args"].description
    )
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="Divide the logits by this; 0 takes the likeliest token."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What is computed in; auto: bf16 where the hardware has it."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; only from a source you trust."
    )
    judge_url: str | None = Field(default=None, description="OpenAI-compatible endpoint of a judge, up to its /v1.")
    judge_model: str | None = Field(default=None, description="The judge, as the endpoint knows it.")
    judge_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the endpoint's key; '' for none."
    )
    judge_cache: Path = Field(default=Path(".instil-judge"), description="Folder that keeps the judge's replies.")
    judge_requests: int | None = Field(
        default=None, ge=0, description="Most requests to the judge; kept ones are free."
    )
    judge_references: Path | None = Field(default=None, description="File of right answers for the judge to see.")
    criteria: list[str] = Field(
        default_factory=list, description="Have the judge rate the answers to --data by these: coherence, helpfulness."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> EvaluateOptions:
        if self.answers > 1:
            raise UsageError(f"--answers {self.answers}: one answer to each item is evaluated", "Leave it out.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UsageError("--judge-url and --judge-model belong together", "Give both, or neither.")
        if self.judge_url is not None and not self.judge_url.startswith(("http://", "https://")):
            raise UsageError(f"--judge-url {self.judge_url}: is no address", "Write it as http://host:port/v1.")
        for each in self.criteria:
            if each not in CRITERIA:
                raise UsageError(f"--criteria {each}: there is no such criterion", nearest(each, CRITERIA))
        if self.rescore is not None:
            others = [_flag(name) for name in self.model_fields_set if name not in _TO_RESCORE]
            if others:
                raise UsageError(
                    f"--rescore takes what was asked from its folder, and so no {', '.join(sorted(others))}",
                    f"Leave that out; it takes {', '.join(map(_flag, _TO_RESCORE[1:]))}.",
                )
            if self.criteria and self.judge_url is None:
                raise UsageError("--criteria needs a judge", "Give --judge-url and --judge-model.")
            return self
        if self.model is None:
            raise UsageError("--model: is missing", REMEDIES["model"])
        if not self.data and not self.suite:
            raise UsageError("--data and --suite: both are missing", "Name your held-out records, or a suite.")
        if self.output is None:
            raise UsageError("--output: is missing", "Name a new folder for results, items and report.")
        if self.criteria and (self.judge_url is None or not self.data):
            raise UsageError("--criteria needs a judge, and --data", "Give --judge-url, --judge-model and --data.")
        names = [each.partition(":")[0] for each in self.suite]
        if self.judge_url is not None and not self.criteria and not {"judge", "refusals"}.intersection(names):
            raise UsageError(
                "--judge-url: nothing is to be judged", "Add --suite judge:FILE or refusals:FILE, or --criteria."
            )
        for each, name in zip(self.suite, names, strict=True):
            _check_suite(each, name)
            if names.count(name) > 1:
                raise UsageError(f"--suite {each}: {name} stands twice", "Name each suite once.")
        check_output(self.output)  # before anything is generated, which would be lost
        return self

    def sampling(self) -> SamplingOptions:
        """Those of the options that say how answers are generated."""
        return SamplingOptions(**{name: getattr(self, name) for name in SamplingOptions.model_fields})

    def prompt_options(self) -> PromptOptions:
        """Those of the options that say how conversations become prompts."""
        return PromptOptions(template=self.template, template_args=self.template_args)


def evaluate(*, options: Annotated[EvaluateOptions | None, Parameter(name="*")] = None) -> None:
    """Measure what a tuned model does, beside its base: your own records, instructions, refusals, forgetting.

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    options = options or EvaluateOptions()
    if options.rescore is not None:
        _rescore(options)
        return
    assert options.model is not None
    assert options.output is not None
    from instil.evaluation.run import score

    check_installed()
    begun, folder = time.monotonic(), options.output
    suites = _suites(options)
    items = _items(suites, options.limit)
    tasks = _tasks(options)
    with locked(folder):
        with bars() as telling:
            loaded, base = _run(options, items, telling)
        write_items(folder, items)
        with _answers_are_kept(options, folder):
            about = _about(options, loaded, time.monotonic() - begun)
            evaluation = Evaluation(about, options.judge_model or "", options.criteria, _trained(items, loaded))
            write_evaluation(folder, evaluation)
            if tasks:
                evaluation = replace(evaluation, harness=_harness(tasks, loaded, base, options))
                write_evaluation(folder, evaluation)
            score(suites, items)
            write_items(folder, items)
            _finish(folder, suites, items, evaluation)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """An output folder, made where it is missing, with a lock on it; it goes again where nothing came into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = lock(folder)
    except BlockingIOError as error:
        raise UsageError(f"--output {folder}: another run works there", "Wait for it, or name a new folder.") from error
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written: {error.strerror}", "Name another.") from error
    try:
        yield
    finally:
        if number is not None:
            os.close(number)
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _answers_are_kept(options: EvaluateOptions, folder: Path) -> Iterator[None]:
    """Say of whatever breaks the scoring off that the answers are there, and how to go on."""
    try:
        yield
    except BaseException:
        command = ["instil", "evaluate", "--rescore", str(folder)]
        for name in (each for each in _TO_RESCORE[1:] if each in options.model_fields_set):
            value = getattr(options, name)
            values = [] if value is True else value if isinstance(value, list) else [str(value)]
            command += [_flag(name), *values] if value is not False else []
        sys.stderr.write(
            f"instil: note: {folder / ITEMS} has what the models said; go on, without asking them again, with\n"
            f"  {shlex.join(command)}\n"
        )
        raise


def known(metrics: list[str]) -> list[str]:
    """The metrics, if there are such.

    Raises:
        UsageError: There is one that is none.
    """
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"--metric {name}: there is no such metric", nearest(name, METRICS))
    return metrics


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_suite(given: str, name: str) -> None:
    file = given.partition(":")[2]
    if name not in _SUITES:
        raise UsageError(f"--suite {given}: there is no such suite", nearest(name, _SUITES))
    if not file and name in _WITH_FILE:
        raise UsageError(f"--suite {given}: needs a file", f"Write {name}:FILE.")
    if not file and name == "lm-eval":
        raise UsageError(f"--suite {given}: needs tasks", "Write lm-eval:TASK,TASK.")


def _suites(options: EvaluateOptions) -> list[Suite]:
    """The suites, in the order they are asked for."""
    from instil.data import read
    from instil.evaluation import suites as kinds
    from instil.evaluation.execute import run_all

    endpoint = _endpoint(options)
    found: list[Suite] = []
    if options.data:
        records = read(
            options.data,
            format=options.format,
            columns=options.columns,
            objective=options.objective,
            on_bad_row=options.on_bad_row,
            rejects=options.rejects,
        )
        run = run_all if options.execute else None
        found.append(kinds.OwnRecords(records, options.metric, run=run, endpoint=endpoint, criteria=options.criteria))
    for each in options.suite:
        name, _, file = each.partition(":")
        if name == "ifeval":
            found.append(kinds.IFEval(file))
        elif name == "refusals":
            found.append(kinds.Refusals(file, endpoint))
        elif name == "judge":
            found.append(kinds.Judged(file, endpoint, options.judge_references))
        elif name == "forgetting":
            found.append(kinds.Forgetting(*_plain(file)))
    return found


def _plain(file: str) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """The plain texts of a file, or the bundled ones with the bundled facts."""
    from instil.data import read
    from instil.pocket.corpus import corpus
    from instil.pocket.instructions import plain_facts

    if file:
        records = read(file, objective="pretrain")
        return [(str(each.source), each.conversations[0].messages[-1].content) for each in records], []
    texts = [(f"bundled text {number}", text) for number, text in enumerate(corpus(_TEXTS, _SEED), 1)]
    return texts, list(plain_facts(held_out=True))


def _endpoint(options: EvaluateOptions) -> Endpoint | None:
    if options.judge_url is None or options.judge_model is None:
        return None
    from instil.evaluation.judge import Budget, Endpoint

    endpoint = Endpoint(
        options.judge_url,
        options.judge_model,
        options.judge_cache,
        options.judge_key_env,
        budget=Budget(requests=options.judge_requests),
    )
    endpoint.check()
    return endpoint


def _items(suites: Sequence[Suite], limit: int | None) -> list[Item]:
    """What is asked, all of it checked."""
    items: list[Item] = []
    for suite in suites:
        found = suite.items()
        if limit is not None and len(found) > limit:
            sys.stderr.write(
                f"instil: note: {suite.name}: {limit:,} of {len(found):,} items, evenly spaced (--limit)\n"
            )
            found = spaced(found, limit)
        items += found
    return items


def _run(options: EvaluateOptions, items: list[Item], telling: Telling) -> tuple[Loaded, Loaded | None]:
    """Have the models answer, and weigh what is to be weighed."""
    try:
        from instil.inference.load import load_base, load_engine, renderer_of, tokenizer_of
    except ModuleNotFoundError as error:
        raise missing(error) from error
    from instil.cli.train import hush
    from instil.evaluation.run import ask, diverge, weigh
    from instil.model.options import ModelOptions

    def named(name: str | None) -> ModelOptions:
        return ModelOptions(model=name, precision=options.precision, trust_remote_code=options.trust_remote_code)

    hush()
    if any(item.messages for item in items):  # a template that is missing is said before weights are read
        renderer_of(tokenizer_of(named(options.model)), options.prompt_options())
    tuned = load_engine(named(options.model), options.prompt_options())
    base = load_base(named(options.base), tuned) if options.base is not None else None
    sampling = options.sampling()
    sys.stderr.write(f"instil: {shown(tuned.engine.sampling(sampling).to_json())}\n")
    models: list[tuple[Loaded, Who]] = [(tuned, "tuned"), *([(base, "base")] if base else [])]  # type: ignore[list-item]
    for model, who in models:
        ask(model, who, items, sampling, telling)
        weigh(model, who, items, telling)
    if base is not None:
        diverge(base, tuned, items, telling)
    return tuned, base


def _finish(folder: Path, suites: Sequence[Suite], items: Sequence[Item], evaluation: Evaluation) -> None:
    """Make the figures, write them and the report, and show them."""
    found, warnings = write_results(folder, suites, items, evaluation)
    _show(found, suites, warnings)
    sys.stderr.write(f"instil: wrote {folder}: {RESULTS}, {ITEMS}, {EVALUATION}, {REPORT}\n")


def write_results(
    folder: Path, suites: Sequence[Suite], items: Sequence[Item], evaluation: Evaluation
) -> tuple[list[Figure], list[str]]:
    """Make the figures of scored items, and write them and the report.

    Returns:
        The figures, those of the harness last, and what deserves a look.
    """
    from instil.evaluation.run import figures

    harness = evaluation.harness
    found = figures(suites, items, harness)
    warnings = _warnings(found, items)
    warnings += [f"lm-eval, {who}: {note}" for who, each in harness.items() for note in each["notes"]]
    of_tasks = {who: {**each, "documents": f"in {EVALUATION}"} for who, each in harness.items()}
    results = {
        "about": evaluation.about,
        "items": {suite.name: sum(item.suite == suite.name for item in items) for suite in suites},
        "figures": [each.to_json() for each in found],
        "warnings": warnings,
        **({"lm_eval": of_tasks} if harness else {}),
    }
    write_json(folder / RESULTS, results)
    page = _page(found, suites, items, evaluation, warnings)
    (folder / REPORT).write_text(to_html(page), encoding="utf-8", errors="backslashreplace")
    return found, warnings


def _rescore(options: EvaluateOptions) -> None:
    """Make the figures of a folder anew from its items."""
    folder = options.rescore
    assert folder is not None
    items = read_items(folder)
    evaluation = read_evaluation(folder)
    if evaluation is None:
        sys.stderr.write(f"instil: note: {folder} has no {EVALUATION}, which says what was evaluated\n")
        evaluation = Evaluation()
    if not items and not evaluation.harness:
        raise DataError(f"{folder / ITEMS}: is empty", "Evaluate anew.")
    if evaluation.judge and options.judge_url is None and not (folder / RESULTS).exists():
        raise UsageError(
            f"{folder}: the judge, {evaluation.judge}, has not judged all that is there",
            "Give --judge-url and --judge-model: what it said already is not asked again.",
        )
    if options.judge_model is not None:
        evaluation = replace(evaluation, judge=options.judge_model, criteria=options.criteria or evaluation.criteria)
    suites = _suites_of(items, options, evaluation.criteria)
    for suite in suites:
        of_suite = [item for item in items if item.suite == suite.name]
        try:
            suite.score(of_suite)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / ITEMS}: the items of the suite {suite.name} cannot be scored: {error!r}",
                "Set back what was changed by hand, or evaluate anew.",
            ) from error
    write_items(folder, items)
    write_evaluation(folder, evaluation)
    _finish(folder, suites, items, evaluation)


def _suites_of(items: Sequence[Item], options: EvaluateOptions, criteria: Sequence[str]) -> list[Suite]:
    """The suites that items are of."""
    from instil.evaluation import suites as kinds
    from instil.evaluation.execute import run_all

    endpoint, run = _endpoint(options), run_all if options.execute else None
    made: dict[str, Callable[[], Suite]] = {
        **kinds.SUITES,
        "records": lambda: kinds.OwnRecords(run=run, endpoint=endpoint, criteria=criteria),
        "refusals": lambda: kinds.Refusals(endpoint=endpoint),
        "judge": lambda: kinds.Judged(endpoint=endpoint),
    }
    names = dict.fromkeys(item.suite for item in items)
    if unknown := [name for name in names if name not in made]:
        raise DataError(f"{options.rescore}: {ITEMS}: there is no suite {unknown[0]!r}", nearest(unknown[0], made))
    return [made[name]() for name in names]


def _about(options: EvaluateOptions, loaded: Loaded, seconds: float) -> dict[str, Any]:
    """What was evaluated, and how."""
    from importlib.metadata import version

    record = _record(options.model)
    sampling = loaded.engine.sampling(options.sampling())
    return {
        "Model": str(options.model),
        **({"Base": options.base} if options.base else {}),
        "Weights": _weights(Path(str(options.model))),
        **({"Trained on": _data_of(record)} if record else {}),
        **({"Held-out data": ", ".join(options.data)} if options.data else {}),
        **({"Suites": ", ".join(options.suite)} if options.suite else {}),
        **({"Template": loaded.renderer.template.name} if loaded.has_template else {}),
        "Decoding": shown(sampling.to_json()),
        "Time": f"{seconds:.0f} seconds",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("instil", "torch", "transformers")),
    }


def _record(model: Any) -> dict[str, Any]:
    """The provenance of a model that Instil wrote; nothing of another."""
    try:
        found = json.loads((Path(str(model)) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _weights(folder: Path) -> str:
    """What tells the weights of a folder from others."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return ", ".join(f"{file.name}, SHA-256 begins {sha256(file)[:16]}" for file in files[:2]) or "of the hub"


def _data_of(record: Mapping[str, Any]) -> str:
    try:
        return ", ".join(
            f"{Path(file['path']).name}, SHA-256 begins {file['sha256'][:16]}" for file in record["data"]["files"][:3]
        )
    except (KeyError, TypeError):  # changed by hand, or of rows in memory
        return "unknown"


def _curve(about: Mapping[str, Any]) -> str:
    drawn = Path(str(about.get("Model", ""))) / "loss.svg"
    return drawn.read_text(encoding="utf-8", errors="replace") if drawn.is_file() else ""


def _trained(items: Sequence[Item], loaded: Loaded) -> str:
    """The first of a person's own records as training would mark their last answers."""
    from instil.evaluation.run import record_of
    from instil.prompt import RecordEncoder
    from instil.prompt.inspect import TokenText, to_fragment

    records = [record_of(item) for item in items if item.suite == "records" and item.wanted["references"]][:_MARKED]
    if not records:
        return ""
    renderer = loaded.renderer
    rows = RecordEncoder(renderer, PromptOptions(train_on="last"), None).encode(records)
    return to_fragment(rows, TokenText(renderer.tokenizer), frozenset(renderer.encoder.controls.values()))


def unasked(items: Sequence[Item]) -> list[str]:
    """Which prompts the tuned model was not given, or not whole."""
    found = []
    too_long = [item.id for item in items if any(said.ended == TOO_LONG for said in item.said.get("tuned", ()))]
    if too_long:
        some = ", ".join(too_long[:5]) + (" and others" if len(too_long) > 5 else "")
        found.append(f"{len(too_long):,} prompts are longer than the model takes, and count as not answered: {some}")
    cut = sum(any(said.dropped_turns for said in item.said.get("tuned", ())) for item in items)
    if cut:
        found.append(f"{cut:,} prompts are without their oldest turns, so that they fit into the model's context")
    return found


def _warnings(figures: Sequence[Figure], items: Sequence[Item]) -> list[str]:
    """What deserves a look."""
    from instil.evaluation.suites import promised

    found = unasked(items)
    unknown = promised(items).difference((each.suite, each.measure) for each in figures)
    found += [f"{suite}: {name}: cannot be said of any item of the tuned model" for suite, name in sorted(unknown)]
    for each in figures:
        if each.family:
            continue
        if each.headline and each.tuned.n < _FEW:
            found.append(f"{each.suite}: {each.measure}: {each.tuned.n:,} items say little")
        if each.measure == "ends in the stop token" and each.tuned.mean < 0.9:
            found.append(f"{each.suite}: {each.shown(each.tuned.mean)} of the answers end in the stop token")
        found += [
            f"{each.suite}: {each.measure}: cannot be said of {count:,} items of the {who} model"
            for who, count in each.missing.items()
            if count
        ]
    return found


def _page(
    figures: Sequence[Figure],
    suites: Sequence[Suite],
    items: Sequence[Item],
    evaluation: Evaluation,
    warnings: Sequence[str],
) -> Page:
    return Page(
        title="Evaluation",
        summary=f"{len(items):,} items. Every prompt, answer and score stands in {ITEMS}.",
        about=evaluation.about,
        compared=compared(figures, {suite.name: suite.about for suite in suites} | {"lm-eval": _TASKS}),
        curve=_curve(evaluation.about),
        answers=[_side(item) for item in spaced([item for item in items if item.messages], SHOWN)],
        trained=evaluation.trained,
        warnings=warnings,
    )


def _side(item: Item) -> SideBySide:
    references = item.wanted.get("references") or [""]
    right = item.scores["tuned"].get("exact_match", {}).get("exact_match")
    said = {who: "\n\n".join(each.text for each in several) for who, several in item.said.items()}
    return SideBySide(
        item.prompt, references[0], said.get("base"), said["tuned"], None if right is None else bool(right)
    )


def _show(figures: Sequence[Figure], suites: Sequence[Suite], warnings: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    for name, about in {**{suite.name: suite.about for suite in suites}, "lm-eval": _TASKS}.items():
        of_suite = [each for each in figures if each.suite == name and not each.family]
        if of_suite:
            console.print(Text(f"{name}: {about}", "bold"))
            console.print(_table(of_suite))
    for warning in warnings:
        sys.stderr.write(f"instil: note: {warning}\n")


def _table(figures: Sequence[Figure]) -> Table:
    from rich.table import Table

    paired = any(each.base is not None for each in figures)
    table = Table(box=None, padding=(0, 2, 0, 2))
    for column in ("", "items", *(["base"] if paired else []), "tuned", *(["verdict"] if paired else [])):
        table.add_column(column, justify="right" if column == "items" else "left", no_wrap=True)
    for each in figures:
        verdict = each.comparison.verdict if each.comparison else ""
        row = [each.measure, f"{each.tuned.n:,}", each.with_interval("base"), each.with_interval("tuned"), verdict]
        table.add_row(*(row if paired else [*row[:2], row[3]]))
    return table


def _tasks(options: EvaluateOptions) -> Mapping[str, Any]:
    """The tasks of EleutherAI's harness, if any are asked for: found before any model answers."""
    names = next((each.partition(":")[2] for each in options.suite if each.startswith("lm-eval")), "")
    if not names:
        return {}
    from instil.evaluation.lm_eval import load_tasks

    return load_tasks(names.split(","))


def _harness(
    tasks: Mapping[str, Any], tuned: Loaded, base: Loaded | None, options: EvaluateOptions
) -> dict[str, dict[str, Any]]:
    """What the harness finds of each model."""
    from instil.evaluation.lm_eval import run

    models = {"tuned": tuned, **({"base": base} if base is not None else {})}
    return {who: run(each, tasks, options.limit, as_text=options.lm_eval_as_text) for who, each in models.items()}


@contextmanager
def bars() -> Iterator[Telling]:
    """Bars on standard error with the time that is left; without a terminal, nothing."""
    if not sys.stderr.isatty():
        yield lambda what, total: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def tell(what: str, total: int) -> Callable[[], object]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        yield tell
