"""The rows of a run: read, rendered, encoded, some of them held out; and what became of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instil.conversation import Record
from instil.data import Records, read
from instil.errors import TrainingError
from instil.model.load import base_of
from instil.packing import Prepared, StoredTrees, TokenTree, cache_folder, prepare
from instil.packing.tree import LABELS, Ints
from instil.prompt import PromptOptions, load_renderer
from instil.prompt.render import Renderer
from instil.training.config import TrainConfig
from instil.training.output import describe_data


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run, prepared; those held out apart.

    Args:
        renderer: What renders and encodes them.
        prepared: Those of `--data`, held-out ones among them.
        trained: (N,) the indices of those that are trained; None for all.
        held_out: The trees of the others, or of `--eval-data`.
        source: The rows that the held-out ones are read from.
        set_aside: (M,) the indices of the held-out ones among `prepared`; None where they come from `--eval-data`.
        about: What became of them, by name, as plain JSON values.
        described: The files, as `instil.json` names them.
        eval_described: Those of `--eval-data`.
    """

    renderer: Renderer
    prepared: Prepared
    trained: Ints | None
    held_out: Sequence[TokenTree]
    source: Records
    about: dict[str, Any]
    described: dict[str, Any]
    eval_described: dict[str, Any] | None = None
    set_aside: Ints | None = None

    @classmethod
    def of(cls, config: TrainConfig, *, rejects: bool) -> Rows:
        """Read, render and encode what a run is told to.

        Args:
            config: The run.
            rejects: Whether rows left out are written where it says.

        Raises:
            InstilError: Of the rooms it goes through.
        """
        base_of(config)  # which says at once if there is none
        options = PromptOptions.model_construct(**{name: getattr(config, name) for name in PromptOptions.model_fields})
        renderer = load_renderer(config.tokenizer_source(), options, text=config.objective == "pretrain")
        prepared, described, records = _prepared(config, config.data, renderer, options, rejects)
        if config.eval_data:
            evaluated, eval_described, records = _prepared(config, config.eval_data, renderer, options, rejects)
            about = {**_counts(prepared, "rows"), **_counts(evaluated, "held_out")}
            again = int(np.isin(evaluated.trees.hashes, prepared.trees.hashes).sum())
            about |= {"held_out_and_trained": again} if again else {}
            return cls(renderer, prepared, None, evaluated.trees, records, about, described, eval_described)
        if not config.eval_fraction:
            return cls(renderer, prepared, None, (), records, _counts(prepared, "rows"), described)
        rows, held_out = split(prepared.trees, config.eval_fraction, config.seed)
        about = {**_counts(prepared, "rows"), "held_out": len(held_out)}
        trees = [prepared.trees[i] for i in held_out.tolist()]
        return cls(renderer, prepared, rows, trees, records, about, described, set_aside=held_out)

    def held_out_records(self) -> Iterator[Record]:
        """The held-out rows as they were read; of `--eval-data` all, those without anything to train among them."""
        trees, places = self.prepared.trees, None
        if self.trained is not None:
            places = {trees.name(i) for i in np.setdiff1d(np.arange(len(trees)), self.trained).tolist()}
        for records, _ in self.source.shared(0, 1, 128):  # which leaves the file of rejects alone
            yield from (each for each in records if places is None or str(each.source) in places)


def _counts(prepared: Prepared, name: str) -> dict[str, Any]:
    """What is left of the rows, and why not all of them."""
    counted = prepared.describe()
    rows = {status: count for status, count in counted["rows"].items() if count or status == "read"}
    found = {name: rows, **({"tokens": counted["tokens"]} if name == "rows" else {})}
    reasons = _reasons(counted)
    return {**found, **({f"{name}_not_whole": reasons} if reasons else {})}


def _reasons(counted: Mapping[str, Any]) -> str:
    return "; ".join(map(_reason, counted["reasons"]))


def _reason(counted: Mapping[str, Any]) -> str:
    """What some rows are not whole for, and the first of them."""
    rows, status, what, first = (counted[name] for name in ("rows", "status", "what", "first"))
    places = ", ".join(first) + (", …" if rows > len(first) else "")
    return f"{rows:,} {what if what.startswith(status) else f'{status}: {what}'} ({places})"


def _prepared(
    config: TrainConfig, files: list[str], renderer: Renderer, options: PromptOptions, rejects: bool
) -> tuple[Prepared, dict[str, Any], Records]:
    records = read(
        files,
        format=config.format,
        columns=config.columns,
        objective=config.objective or "supervised",
        on_bad_row=config.on_bad_row,
        rejects=config.rejects if rejects else None,
    )
    prepared = prepare(
        records,
        renderer.tokenizer,
        options,
        tokens_per_batch=config.tokens_per_batch,
        workers=config.workers,
        cache=cache_folder(config.cache_dir) if config.cache else None,
    )
    named = ", ".join(files)
    if not len(prepared.trees):
        why = _reasons(prepared.describe())
        raise TrainingError(
            f"{named}: no row has anything to train" + (f" ({why})" if why else ""),
            "See more with `instil inspect --summary`.",
        )
    _check_labels(config, named, prepared.trees)
    return prepared, describe_data(records), records


def _check_labels(config: TrainConfig, named: str, trees: StoredTrees) -> None:
    """Refuse rows whose answers the objective can make nothing of.

    Raises:
        TrainingError: There are such.
    """
    if not config.compares:
        unwanted = {LABELS[label] for label in np.unique(trees.labels).tolist()} & {"rejected", "bad"}
        if unwanted:
            raise TrainingError(
                f"{named}: rows hold {' and '.join(sorted(unwanted))} answers, which supervised training would teach",
                "Train on them with --objective dpo (pairs) or kto (good and bad answers), leave those rows out, or "
                "map the good answers with --columns.",
            )
        return
    wanted = {"chosen", "rejected", "more"} | ({"good", "bad"} if config.objective == "kto" else set())
    exchanges: Ints = trees.exchanges.astype(np.int64)
    firsts = np.cumsum(exchanges) - exchanges  # (N,)
    strange = np.flatnonzero(~np.isin(trees.labels[firsts], [LABELS.index(each) for each in wanted]))
    if len(strange):
        some = ", ".join(trees.name(int(row)) for row in strange[:5]) + (" and others" if len(strange) > 5 else "")
        judged = "a chosen and a rejected answer" + (
            ", or one labelled good or bad" if config.objective == "kto" else ""
        )
        raise TrainingError(
            f"{named}: {len(strange):,} of {len(trees):,} rows do not have {judged}, which --objective "
            f"{config.objective} compares: {some}",
            "Leave those rows out, map their columns with --columns chosen=…,rejected=…, or train supervised.",
        )


def split(trees: StoredTrees, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """The rows to train and the rows to hold out; rows with the same tokens fall on one side.

    Raises:
        TrainingError: One side would be empty.
    """
    _, same = np.unique(trees.hashes, return_inverse=True)  # (N,)
    order = np.random.default_rng((seed, 1)).permutation(int(same.max()) + 1)
    sizes = np.bincount(same)[order]
    held = order[: int(np.searchsorted(np.cumsum(sizes), fraction * len(same), side="left")) + 1]
    out = np.isin(same, held)
    if not same.any():
        raise TrainingError(
            f"--eval-fraction {fraction:g}: all {len(same):,} rows are alike, so none can be held out",
            "Give the held-out rows with --eval-data.",
        )
    if out.all():
        raise TrainingError(
            f"--eval-fraction {fraction:g}: of {len(same):,} rows none would be left to train",
            "Hold fewer out, or give the held-out rows with --eval-data.",
        )
    return np.flatnonzero(~out), np.flatnonzero(out)
