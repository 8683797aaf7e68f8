"""`instil quickstart`: the bundled base model, which follows no instructions, tuned until it does, and the proof."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from instil.data.options import Given
from instil.errors import UsageError
from instil.evaluation.report import Bar, Compared, Page, SideBySide, to_html
from instil.evaluation.statistics import Share
from instil.pocket import data_folder, model_folder
from instil.pocket.instructions import Row, is_right
from instil.training.files import write_json

if TYPE_CHECKING:
    from instil.inference import Loaded
    from instil.pocket.trial import Trial
    from instil.training import Outcome, TrainConfig

_TEMPLATE = "chatml"
_SHOWN = ("capital", "young", "french_word", "plural", "currency")
_NAMES = {
    "held_out_entities": "Entities never asked about",
    "held_out_phrasings": "Phrasings never seen",
    "held_out_families": "Tasks never seen",
}
_SHOWN_CHARACTERS = 100


class QuickstartOptions(Given):
    """What the quickstart may be told."""

    output: Path = Field(
        default=Path("instil-quickstart"),
        description="Folder that takes the model, report.html and results.json.",
    )
    data: Path = Field(
        default=data_folder() / "train.jsonl", description="Rows to tune with, in place of the bundled ones."
    )
    adapter: Literal["none", "lora"] = Field(
        default="lora", description="Train all weights, or a LoRA adapter, which is merged."
    )
    prompt_weight: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight of the prompt in the loss; 1 is unmasked.",
    )
    seed: int = Field(default=0, ge=0, description="Decides everything random.")
    with_preferences: bool = Field(
        default=False, description="Then align the tuned model by preference pairs, and show all three stages."
    )


def quickstart(*, options: Annotated[QuickstartOptions | None, Parameter(name="*")] = None) -> None:
    """See a base model that follows no instructions, tune it, see it follow them; on held-out data, with intervals.

    Everything comes with Instil: the model, the data. Nothing is downloaded.
    """
    options = options or QuickstartOptions()
    begun = time.monotonic()
    _check(options)
    console = Console(highlight=False)
    from instil.cli.train import hush
    from instil.pocket.trial import answers, base_under, examine, results, rows_of, tuned

    hush()
    asked = [next(row for row in rows_of("held_out_entities") if row["family"] == family) for family in _SHOWN]
    _title(console, "1. The base model goes on with text, and follows no instructions")
    base = base_under(model_folder(), _TEMPLATE)
    before = [answer.text for answer in answers(base, asked)]
    _show_answers(console, asked, {"base": before})
    base_trial = _with_bar("The base model answers what is held out", lambda told: examine(base, told))

    _title(console, "2. What is trained: the answer and its end token")
    _run(console, ["inspect", *_base_and_data(options), "--row", "1"])

    _title(console, "3. Training")
    outcome = _train(configuration(options))

    _title(console, "4. The same five, after")
    model = tuned(options.output)
    after = [answer.text for answer in answers(model, asked)]
    _show_answers(console, asked, {"base": before, "tuned": after})
    trial = _with_bar("The tuned model answers what is held out", lambda told: examine(model, told))

    _title(console, "5. Base against tuned, on what no training row asked, with 95 % intervals")
    console.print(_table(base_trial, trial))
    found = results(base_trial, trial)
    if options.with_preferences:
        found["preferences"] = _align(console, options, {"base": (base, base_trial), "tuned": (model, trial)})
    seconds = time.monotonic() - begun
    write_json(options.output / "results.json", {"seconds": round(seconds, 1), **found})
    shown = list(zip(asked, before, after, strict=True))
    (options.output / "report.html").write_text(
        to_html(_page(options, outcome, base_trial, trial, shown, seconds)), encoding="utf-8"
    )
    console.print(Text(f"\n{seconds:.0f} seconds. The report: {options.output / 'report.html'}\n", "bold"))
    for comment, command in _commands(options):
        console.print(Text(f"# {comment}", "dim"))
        console.print(Text(command), soft_wrap=True)


def _align(console: Console, options: QuickstartOptions, models: Mapping[str, tuple[Loaded, Trial]]) -> dict[str, Any]:
    """Go on with the tuned model: by preference pairs, and beside it by their chosen answers alone."""
    from instil.cli import aligning
    from instil.pocket.trial import tuned

    _title(console, "6. What is preferred: to say what is not known, to decline what is unsafe, to be brief")
    stages = {name: aligning.stage(loaded, trial) for name, (loaded, trial) in models.items()}
    shown = ["--model", str(options.output), "--data", _short(aligning.PAIRS), "--row", "1"]
    _run(console, ["inspect", "--objective", "dpo", *shown])

    _title(console, "7. Aligning by preference pairs, and by their chosen answers alone")
    reference = options.output / "preferred"
    folders = {name: options.output / name for name in ("aligned", "supervised")}
    _train(aligning.preferred(options.output, reference, options.seed))
    outcome = _train(aligning.aligned(reference, folders["aligned"], options.seed))
    _train(aligning.supervised(reference, folders["supervised"], options.seed, outcome.steps))
    stages |= {name: aligning.stage(tuned(folder)) for name, folder in folders.items()}

    _title(console, "8. One question of each kind")
    aligning.show_examples(console, {name: stage.lesson for name, stage in stages.items()})

    _title(console, "9. The three stages, on entities that no pair and no instruction is about, with 95 % intervals")
    console.print(aligning.table(stages))
    return aligning.results(stages)


def _check(options: QuickstartOptions) -> None:
    output = options.output
    if not options.data.is_file():
        raise UsageError(f"--data {options.data}: is no file", "Name a file of rows, or leave it out.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UsageError(
            f"--output {output}: there is something already", "Name another folder with --output, or remove this one."
        )


def _base_and_data(options: QuickstartOptions) -> list[str]:
    return ["--model", _short(model_folder()), "--template", _TEMPLATE, "--data", _short(options.data)]


def configuration(options: QuickstartOptions) -> TrainConfig:
    """The run that the quickstart trains."""
    from instil.training import TrainConfig

    lora = options.adapter == "lora"
    return TrainConfig(
        model=str(model_folder()),
        data=[str(options.data)],
        template=_TEMPLATE,
        output=options.output,
        adapter=options.adapter,
        merge_adapter=lora,
        prompt_weight=options.prompt_weight,
        epochs=1.0,
        tokens_per_step=1024,
        tokens_per_batch=4096,
        learning_rate=2e-3 if lora else 3e-4,
        warmup=0.05,
        keep_checkpoints=0,
        seed=options.seed,
        cache=False,
    )


def _train(config: TrainConfig) -> Outcome:
    from instil.cli.progress import Progress as TrainingProgress
    from instil.cli.stopping import Stopping
    from instil.training import train

    with TrainingProgress(settings=False) as progress, Stopping() as stopping:
        return train(config, [progress, stopping], stopping=stopping.asked)


def _run(console: Console, arguments: list[str]) -> None:
    """Run another command of Instil and show it."""
    from instil.cli.main import app

    console.print(Text("$ " + shlex.join(["instil", *arguments]), "dim"), soft_wrap=True)
    app(arguments, exit_on_error=False, print_error=False)


def _title(console: Console, title: str) -> None:
    console.print()
    console.rule(Text(title, "bold"), align="left")


def _with_bar(name: str, work: Callable[[Callable[[int], None]], Trial]) -> Trial:
    """Have work done that tells of each prompt that is answered, with a bar on standard error."""
    from instil.pocket.trial import HELD_OUT, rows_of

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=sum(len(rows_of(each)) for each in HELD_OUT))
        return work(lambda _: progress.advance(task))


def _show_answers(console: Console, rows: Sequence[Row], answers: Mapping[str, Sequence[str]]) -> None:
    for number, row in enumerate(rows):
        console.print(Text(row["messages"][-2]["content"], "bold"))
        for name, texts in answers.items():
            said = " ".join(texts[number].split()) or "(blank lines)"
            said = said if len(said) <= _SHOWN_CHARACTERS else f"{said[:_SHOWN_CHARACTERS]} …"
            style = "green" if name == "tuned" and is_right(row, texts[number]) else ""
            console.print(Text(f"  {name}: ", "dim").append(said, style), soft_wrap=True)


def _shares(base: Trial, tuned: Trial, *, families: bool) -> Iterator[tuple[str, Share, Share, bool]]:
    """What each figure is called, the two shares, and whether it is one of the tasks of the figure above."""
    for name, title in _NAMES.items():
        yield title, base.share(name), tuned.share(name), False
        for family in base.families(name) if families else ():
            yield family.replace("_", " "), base.share(name, family), tuned.share(name, family), True
    yield "All of these, and stories, lists, styles", base.everything, tuned.everything, False
    yield "Plain facts, as text", base.known, tuned.known, False
    yield "Ends in the stop token", base.stopped, tuned.stopped, False


def _compared(base: Trial, tuned: Trial) -> Iterator[Compared]:
    for name, before, after, detail in _shares(base, tuned, families=True):
        yield Compared(name, Bar.of(before), Bar.of(after), after.n, detail=detail)


def _table(base: Trial, tuned: Trial) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "items", "base", "tuned"):
        table.add_column(column, justify="right" if column == "items" else "left")
    for name, before, after, _ in _shares(base, tuned, families=False):
        table.add_row(name, f"{after.n:,}", str(before), Text(str(after), "bold"))
    return table


def _commands(options: QuickstartOptions) -> list[tuple[str, str]]:
    """What to do next: a comment and a command each."""
    model, base = shlex.quote(str(options.output)), shlex.quote(_short(model_folder()))
    return [
        ("Talk to it", f"instil chat --model {model}"),
        ("See it beside its base, in a browser or by OpenAI's API", f"instil serve --model {model} --base {base}"),
        ("See what the base model does instead", f'instil complete --model {base} --prompt "The capital of Peru is"'),
        ("See which tokens of your data would be trained", f"instil inspect --model {model} --data yours.jsonl"),
        (
            "Train on your data, from this base or any other",
            f"instil train --model {base} --template {_TEMPLATE} --data yours.jsonl --output tuned",
        ),
    ]


def _page(
    options: QuickstartOptions,
    outcome: Outcome,
    base: Trial,
    tuned: Trial,
    shown: Sequence[tuple[Row, str, str]],
    seconds: float,
) -> Page:
    record = json.loads((options.output / "instil.json").read_text(encoding="utf-8"))
    tokens = record["summary"]["tokens"]
    curve = options.output / "loss.svg"
    return Page(
        title="Instil quickstart",
        summary=(
            "A small base model, which goes on with text and follows no instructions, was tuned on "
            f"{record['summary']['rows']['read']:,} instructions in {outcome.seconds:.0f} seconds. Entities, ways to "
            "ask and whole tasks were kept out of these: what follows was measured on them."
        ),
        about={
            "Base model": f"bundled, {record['resolved']['parameters']:,} parameters",
            "Trained": f"{record['resolved']['trained_parameters']:,} parameters",
            "Data": f"{options.data.name}, SHA-256 begins {record['data']['files'][0]['sha256'][:16]}",
            "Template": f"{_TEMPLATE}, its answers end in {', '.join(record['stop_tokens'])}",
            "Tokens": f"{tokens['total']:,}, of which {tokens['trained']:,} trained",
            "Steps": f"{outcome.steps:,}, learning rate {record['config']['learning_rate']:g}, seed {options.seed}",
            "Decoding": "greedy, the likeliest token each time; right is what equals the reference",
            "Time": f"{seconds:.0f} seconds in all",
            "Versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        },
        compared=[("Base against tuned", list(_compared(base, tuned)))],
        curve=curve.read_text(encoding="utf-8") if curve.is_file() else "",
        answers=[
            SideBySide(
                row["messages"][-2]["content"], row["messages"][-1]["content"], before, after, is_right(row, after)
            )
            for row, before, after in shown
        ],
        trained=_trained(options),
        commands=_commands(options),
    )


def _trained(options: QuickstartOptions) -> str:
    """The first rows as `instil inspect` shows them."""
    from instil.data import read
    from instil.prompt import PromptOptions, RecordEncoder, load_renderer
    from instil.prompt.inspect import TokenText, to_fragment

    prompt = PromptOptions(template=_TEMPLATE, prompt_weight=options.prompt_weight)
    renderer = load_renderer(options.output, prompt)
    rows = RecordEncoder(renderer, prompt, None).encode(list(islice(read(str(options.data)), 3)))
    return to_fragment(rows, TokenText(renderer.tokenizer), frozenset(renderer.encoder.controls.values()))


def _short(path: Path) -> str:
    """The path, from the current folder where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
