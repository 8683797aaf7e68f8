"""`instil sweep`: every combination of some settings, each trained with several seeds, evaluated and compared."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, get_origin

from cyclopts import Parameter
from pydantic import AfterValidator, Field, ValidationError, model_validator

from instil.cli import config as files
from instil.cli.compare import free
from instil.cli.evaluate import REPORT, RESULTS, EvaluateOptions, Switch, bars, known, locked, unasked, write_results
from instil.cli.main import reason
from instil.data.options import Given
from instil.errors import DataError, InstilError, RowProblem, TrainingError, UsageError, nearest
from instil.evaluation.items import Evaluation, Item, read_items, spaced, write_evaluation, write_items
from instil.evaluation.report import SHOWN, Answered, Page, compared, to_html
from instil.evaluation.statistics import check_installed
from instil.inference.options import SamplingOptions
from instil.training.config import TrainConfig
from instil.training.files import RECORD, write_json
from instil.training.output import check_output, run_state

if TYPE_CHECKING:
    from rich.table import Table

    from instil.data import Records
    from instil.evaluation.figures import Figure
    from instil.evaluation.suites import OwnRecords

SWEEP = "sweep.json"
_OWN = {
    "seed": "--seeds says how many there are",
    "output": "each run has a folder below --output",
    "resume": "it is a flag of the sweep",
    "allow_changed": "the runs of a sweep do not change",
}
_LONG = 80  # characters of a folder's name
_FEW = 30  # items
_WIDTH = 160
_OF_EVALUATE, _OF_SAMPLING = EvaluateOptions.model_fields, SamplingOptions.model_fields


class SweepOptions(Given):
    """Everything that `instil sweep` takes."""

    config: Path | None = Field(default=None, description="YAML file with the settings of `instil train`.")
    vary: list[str] = Field(
        default_factory=list,
        description="A setting and its values, as prompt_weight=0,0.1,1, read as YAML; every combination is trained, "
        "and held against the first.",
    )
    seeds: int = Field(default=3, ge=1, description="Seeds of each combination: 0, 1, and so on.")
    eval: list[str] = Field(
        default_factory=list, description="Held-out records that each tuned model answers: files, folders, globs."
    )
    metric: Annotated[list[str], AfterValidator(known)] = Field(
        default=["exact_match"], min_length=1, description=_OF_EVALUATE["metric"].description
    )
    output: Path | None = Field(default=None, description="Folder that takes the runs, results.json and report.html.")
    model: str | None = Field(default=None, description="Base model, in place of the file's.")
    data: list[str] = Field(default_factory=list, description="Data to train on, in place of the file's.")
    resume: Switch = Field(default=False, description="Go on with the sweep in the output folder.")
    keep_models: Switch = Field(
        default=False, description="Keep the weights of every run; else they go once they are evaluated."
    )
    execute: Switch = Field(default=False, description=_OF_EVALUATE["execute"].description)
    max_new_tokens: int = Field(default=256, ge=1, description=_OF_SAMPLING["max_new_tokens"].description)
    batch_size: int = Field(default=64, ge=1, description=_OF_SAMPLING["batch_size"].description)

    @model_validator(mode="after")
    def _is_whole(self) -> SweepOptions:
        for name, remedy in (
            ("vary", "Say what to vary: --vary prompt_weight=0,1."),
            ("eval", "Name the held-out records that the models are to answer."),
            ("output", "Name a new folder for the runs, the results and the report."),
        ):
            if not getattr(self, name):
                raise UsageError(f"--{name}: is missing", remedy)
        if "-" in self.data:
            raise UsageError("--data -: each run reads the data anew", "Write it to a file.")
        return self

    def sampling(self) -> SamplingOptions:
        """How answers are generated: the likeliest token each time."""
        return SamplingOptions(temperature=0.0, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination of the varied settings.

    Args:
        name: What was varied, as `prompt_weight=0.1,learning_rate=1e-4`.
        values: The same by name.
        config: The whole run, but for its seed and its folder.
        folder: Takes the runs, one for each seed.
    """

    name: str
    values: Mapping[str, Any]
    config: TrainConfig
    folder: Path

    def run(self, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"seed-{seed}"


def sweep(*, options: Annotated[SweepOptions | None, Parameter(name="*")] = None) -> None:
    """Train every combination of some settings with several seeds, and compare what that gives on held-out records.

    A seed gives the same order of the data to every setting.
    """
    options = options or SweepOptions()  # which says what is missing
    assert options.output is not None
    check_installed()
    settings = _settings(options)
    _check_output(options)
    records = _records(options, settings[0].config)
    suite = _suite(options, records)
    asked = suite.items()
    data = _check_data(settings, asked)
    with locked(options.output):
        _remember(options, settings, {**data, "--eval": records.fingerprint()})
        _Sweep(options, settings, suite, asked).run()


class _Sweep:
    """The runs of a sweep, one after the other, and what they come to."""

    def __init__(
        self, options: SweepOptions, settings: Sequence[Setting], suite: OwnRecords, asked: Sequence[Item]
    ) -> None:
        assert options.output is not None
        self._options, self._output = options, options.output
        self._settings = settings
        self._suite, self._asked = suite, asked
        self._done: dict[str, dict[int, list[Item]]] = {setting.name: {} for setting in settings}
        self._failed: list[str] = []

    def run(self) -> None:
        """Do all runs that are not done yet: every setting with the first seed, then with the next.

        Raises:
            TrainingError: Some have failed; all others are done.
        """
        runs = [(setting, seed) for seed in range(self._options.seeds) for setting in self._settings]
        begun, new = time.monotonic(), 0
        try:
            for number, (setting, seed) in enumerate(runs, 1):
                said = f"run {number} of {len(runs)}: {setting.name}, seed {seed}"
                if (setting.run(seed) / RESULTS).exists():
                    sys.stderr.write(f"instil: {said}: done before\n")
                else:
                    each = (time.monotonic() - begun) / new if new else None
                    left = f"; {timedelta(seconds=round(each * (len(runs) - number + 1)))} left" if each else ""
                    sys.stderr.write(f"instil: {said}{left}\n")
                    new += 1
                    if not self._train_and_evaluate(setting, seed):
                        continue
                self._tidy(setting.run(seed))
                self._done[setting.name][seed] = read_items(setting.run(seed))
        finally:
            if any(self._done.values()):
                self._finish(len(runs))
        if self._failed:
            raise TrainingError("\n".join((f"{len(self._failed)} of {len(runs)} runs failed:", *self._failed)))

    def _train_and_evaluate(self, setting: Setting, seed: int) -> bool:
        folder = setting.run(seed)
        state = run_state(folder)
        if state != "finished":
            resume = state is not None
            try:
                _train(setting.config.model_copy(update={"output": folder, "seed": seed, "resume": resume}))
            except TrainingError as error:  # as where the loss is no number: others may do better
                self._failed.append(f"  {setting.name}, seed {seed}: {error}")
                sys.stderr.write(f"instil: note: {setting.name}, seed {seed}: {error}\n")
                return False
        self._evaluate(setting, seed)
        return True

    def _evaluate(self, setting: Setting, seed: int) -> None:
        from instil.cli.train import hush
        from instil.evaluation.run import ask, weigh
        from instil.inference.load import load_engine
        from instil.model.options import ModelOptions
        from instil.prompt.options import PromptOptions

        hush()
        folder, config = setting.run(seed), setting.config
        model = ModelOptions(
            model=str(folder),
            precision=config.precision,
            quantize="none" if config.merge_adapter else config.quantize,
            trust_remote_code=config.trust_remote_code,
        )
        loaded = load_engine(model, PromptOptions(template_args=config.template_args))
        items = [replace(item, said={}, scores={}) for item in self._asked]
        with bars() as telling:
            ask(loaded, "tuned", items, self._options.sampling(), telling)
            weigh(loaded, "tuned", items, telling)
        self._suite.score(items)
        write_items(folder, items)
        record = _record(folder)
        about = {
            "Model": str(folder),
            "Setting": setting.name,
            "Seed": seed,
            "Held-out data": ", ".join(self._options.eval),
            "Training": f"{record['outcome']['seconds']:.0f} seconds",
            "Versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        }
        evaluation = Evaluation(about)
        write_evaluation(folder, evaluation)
        write_results(folder, [self._suite], items, evaluation)
        del loaded
        free()

    def _tidy(self, folder: Path) -> None:
        """Remove the weights of a run that is evaluated, unless they are to be kept; its checkpoints in any case."""
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for path in () if self._options.keep_models else folder.glob("*.safetensors*"):
            path.unlink()

    def _finish(self, runs: int) -> None:
        """Compare what is done; write and show it."""
        from instil.evaluation.sweep import disagreeing, sweep_figures

        found = sweep_figures(self._done)
        done = sum(map(len, self._done.values()))
        seconds = {
            setting.name: fmean(_record(setting.run(seed))["outcome"]["seconds"] for seed in self._done[setting.name])
            for setting in self._settings
            if self._done[setting.name]
        }
        warnings = [f"{runs - done:,} of {runs:,} runs are not there"] if done < runs else []
        some = next(by_seed for by_seed in self._done.values() if by_seed)
        warnings += unasked(some[min(some)])  # the same prompts, but for what was varied
        if len(self._asked) < _FEW:
            warnings.append(f"{len(self._asked)} items say little")
        if self._options.seeds == 1:
            warnings.append("one seed says nothing of how much seeds differ")
        for each in found:
            first = next(other for other in found if other.suite == each.suite)
            if seeds := disagreeing(each, first):
                verdict = each.comparison and each.comparison.verdict
                warnings.append(
                    f"{each.suite}: {each.measure} is {verdict} than the first, and not so under seed "
                    f"{', '.join(seeds)}: more seeds would tell"
                )
        write_json(
            self._output / RESULTS,
            {
                "settings": [
                    {
                        "setting": setting.name,
                        "values": setting.values,
                        "folder": setting.folder.name,
                        "seeds": list(self._done[setting.name]),
                        "training_seconds": seconds.get(setting.name),
                    }
                    for setting in self._settings
                ],
                "items": len(self._asked),
                "figures": [
                    {"metric": values.pop("suite"), "setting": values.pop("measure"), **values}
                    for values in (each.to_json() for each in found)
                ],
                "failed": self._failed,
                "warnings": warnings,
            },
        )
        self._write_report(found, warnings, seconds)
        _show(found, seconds)
        for warning in warnings:
            sys.stderr.write(f"instil: note: {warning}\n")
        sys.stderr.write(f"instil: wrote {self._output}: {RESULTS}, {REPORT}\n")

    def _write_report(self, found: Sequence[Figure], warnings: Sequence[str], seconds: Mapping[str, float]) -> None:
        first = self._settings[0]
        page = Page(
            title="Sweep",
            summary=f"{len(self._settings)} settings, {len(self._asked):,} held-out items. Each setting stands beside "
            f"the first, {first.name}, on the same items and seeds. The intervals are about other items, not about "
            "other seeds; what each seed came to stands in the table of the command and in results.json.",
            about={
                "Base model": first.config.model or str(first.config.init),
                "Varied": "; ".join(self._options.vary),
                "Seeds": self._options.seeds,
                "Data": ", ".join(first.config.data),
                "Held-out data": ", ".join(self._options.eval),
                "Decoding": "greedy, the likeliest token each time",
                **{f"Training of {name}": f"{mean:.0f} seconds" for name, mean in seconds.items()},
            },
            compared=compared(found, {}),
            warnings=warnings,
            bars=(first.name, "the setting itself"),
            answered=self._answered(),
        )
        (self._output / REPORT).write_text(to_html(page), encoding="utf-8", errors="backslashreplace")

    def _answered(self) -> list[Answered]:
        """What each setting answers, under the first of its seeds."""
        of_settings = {name: runs[min(runs)] for name, runs in self._done.items() if runs}
        return [
            Answered(
                self._asked[at].prompt,
                [(name, items[at].said["tuned"][-1].text) for name, items in of_settings.items()],
                next(iter(self._asked[at].wanted["references"]), ""),
            )
            for at in spaced(range(len(self._asked)), SHOWN)
        ]


def _settings(options: SweepOptions) -> list[Setting]:
    """Every combination, each a run that can be; all that is wrong with them at once."""
    names = [name.replace("_", "-") for name in TrainConfig.model_fields]
    given = files.load(str(options.config), names) if options.config else {}
    base = {name.replace("-", "_"): value for name, value in given.items()}
    for name in [name for name in _OWN if base.pop(name, None)]:
        sys.stderr.write(f"instil: note: {options.config}: {name} is not taken: {_OWN[name]}\n")
    base |= {name: value for name in ("model", "data") if (value := getattr(options, name))}
    varied = _varied(options.vary)
    found: dict[str, tuple[dict[str, Any], TrainConfig]] = {}
    problems: dict[str, None] = {}
    for several in product(*varied.values()):
        values = dict(zip(varied, several, strict=True))
        name = ",".join(f"{key}={_shown(value)}" for key, value in values.items())
        try:
            config = TrainConfig(**{key: _listed(key, value) for key, value in (base | values).items()})
        except ValidationError as error:
            for each in error.errors():
                place = "--vary" if each["loc"] and each["loc"][0] in varied else options.config or "the settings"
                problems[f"{place}: {reason(each)}"] = None
        except UsageError as error:
            problems[f"{name}: {error}"] = None
        else:
            found[name] = values, config
    if problems:
        raise UsageError("\n".join(problems))
    configs = [config for _, config in found.values()]
    twice = next((name for n, name in enumerate(found) if configs[n] in configs[:n]), None)
    if twice or len(found) < len(list(product(*varied.values()))):
        raise UsageError(f"--vary: {twice or 'a combination'} stands twice", "Write each value once.")
    assert options.output is not None
    folders = [re.sub(r"[^\w.=,+-]+", "_", name) for name in found]
    if len(set(folders)) < len(folders) or max(map(len, folders)) > _LONG:
        folders = [f"{number}-{folder[:_LONG]}" for number, folder in enumerate(folders, 1)]
    return [
        Setting(name, values, config, options.output / folder)
        for folder, (name, (values, config)) in zip(folders, found.items(), strict=True)
    ]


def _varied(given: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each varied setting."""
    varied: dict[str, list[Any]] = {}
    problems = []
    for each in given:
        name, _, text = each.partition("=")
        name = name.strip().replace("-", "_")
        if name not in TrainConfig.model_fields:
            problems.append(f"--vary {each}: there is no setting {name!r}; {nearest(name, TrainConfig.model_fields)}")
        elif name in _OWN:
            problems.append(f"--vary {each}: {name} is not varied so: {_OWN[name]}")
        elif name in varied:
            problems.append(f"--vary {each}: {name} is varied twice; write all its values behind one --vary")
        else:
            try:
                varied[name] = files.values(text)
            except ValueError as error:
                problems.append(f"--vary {each}: {error}; write {name}=VALUE,VALUE")
    if problems:
        raise UsageError("\n".join(problems))
    return varied


def _listed(name: str, value: Any) -> Any:
    """A single value as a list where the setting is one, as flags and files take it."""
    takes_list = get_origin(TrainConfig.model_fields[name].annotation) is list
    return [value] if takes_list and isinstance(value, str) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _check_output(options: SweepOptions) -> None:
    """Refuse a folder that holds something else, or a sweep that is not to be gone on with."""
    output = options.output
    assert output is not None
    if output.is_file():
        raise UsageError(f"--output {output}: is a file", "Name a new folder.")
    if (output / SWEEP).exists():
        if not options.resume:
            raise UsageError(f"--output {output}: a sweep is there", "Go on with --resume, or name a new folder.")
    else:
        check_output(output)


def _records(options: SweepOptions, config: TrainConfig) -> Records:
    """The held-out records, read as the training data is."""
    from instil.data import read

    return read(options.eval, format=config.format, columns=config.columns)


def _suite(options: SweepOptions, records: Records) -> OwnRecords:
    from instil.evaluation.execute import run_all
    from instil.evaluation.suites import OwnRecords

    return OwnRecords(records, options.metric, run=run_all if options.execute else None)


def _check_data(settings: Sequence[Setting], asked: Sequence[Item]) -> dict[str, str | None]:
    """Prepare the data of every setting, and the prompts of the items, so that no run fails for them later.

    Returns:
        The fingerprint of each setting's data.
    """
    try:
        from instil.training.rows import Rows
    except ModuleNotFoundError as error:
        raise UsageError(f"training needs the package {error.name!r}", "pip install 'instil[train]'") from error
    from instil.evaluation.suites import conversation_of
    from instil.inference.session import prompt_ids
    from instil.training.optimizer import check_installed
    from instil.training.trackers import check_trackers

    fingerprints = {}
    for setting in settings:
        check_installed(setting.config.optimizer)
        check_trackers(setting.config.trackers)
        rows = Rows.of(setting.config, rejects=False)
        fingerprints[setting.name] = rows.described["fingerprint"]
        problems = []
        for item in asked:
            try:
                prompt_ids(rows.renderer, conversation_of(item.messages, item.tools))
            except InstilError as error:
                problems.append(RowProblem(item.id, "", error.message, error.remedy))
        if problems:
            raise DataError(f"{setting.name}: there are records that cannot be asked", problems=problems)
    return fingerprints


def _remember(options: SweepOptions, settings: Sequence[Setting], data: Mapping[str, str | None]) -> None:
    """Write down what the sweep is; refuse to go on with one that was something else. More seeds may be added.

    Raises:
        UsageError: What decides the runs and their figures is not as it was.
    """
    assert options.output is not None
    file = options.output / SWEEP
    now: dict[str, Any] = {
        "settings": {each.name: each.config.model_dump(mode="json", exclude=set(_OWN)) for each in settings},
        "folders": {each.name: each.folder.name for each in settings},
        "data": data,
        **{name: getattr(options, name) for name in ("metric", "max_new_tokens", "execute", "keep_models")},
    }
    now = json.loads(json.dumps(now))
    if not file.exists():
        write_json(file, now)
        return
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in now if then.get(name) != now[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}", "Name a new folder with --output.") from error
    if changed:
        raise UsageError(
            f"--output {options.output}: the sweep there is another one: {', '.join(changed)} differ",
            f"Set them back to what {file} says, or name a new folder.",
        )


def _train(config: TrainConfig) -> None:
    from instil.cli.progress import Progress
    from instil.cli.stopping import Stopping
    from instil.cli.train import hush, measuring
    from instil.training import train

    hush()
    with Progress(settings=False) as progress, Stopping() as stopping:
        train(config, [progress, stopping], stopping=stopping.asked, measure=measuring(config))
    free()


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return found


def _show(found: Sequence[Figure], seconds: Mapping[str, float]) -> None:
    """A table for each metric."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    for metric in dict.fromkeys(each.suite for each in found):
        console.print(Text(metric, "bold"))
        console.print(_table([each for each in found if each.suite == metric], seconds))


def _table(found: Sequence[Figure], seconds: Mapping[str, float]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 2))
    for column in ("", "mean", "each seed", "against the first", "verdict", "training"):
        table.add_column(column, no_wrap=True)
    for each in found:
        by_seed = " ".join(each.shown(mean).removesuffix(" %") for mean in each.extra["seeds"].values())
        against, verdict = ("", "") if each.comparison is None else (_against(each), each.comparison.verdict)
        table.add_row(
            each.measure, each.with_interval("tuned"), by_seed, against, verdict, f"{seconds[each.measure]:.0f} s"
        )
    return table


def _against(found: Figure) -> str:
    """The difference to the first setting with its interval; of shares in percentage points."""
    assert found.comparison is not None
    scale = 100 if found.unit == "share" else 1
    values = (found.comparison.difference, found.comparison.low, found.comparison.high)
    difference, low, high = (f"{scale * value:+.{1 if scale > 1 else 4}f}" for value in values)
    return f"{difference} ({low} to {high})"
