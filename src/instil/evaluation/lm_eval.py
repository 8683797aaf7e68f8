"""The tasks of EleutherAI's harness (lm-evaluation-harness; Gao et al., 2021), answered by Instil's engine.

Requests are the harness's own, so that figures compare with published ones: how texts become tokens, where a context
ends and a continuation begins, what is cut from the left where it does not fit. What differs is who answers: contexts
that begin alike are read once, and where the model has a chat template its prompts are rendered as in training.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from instil.errors import TemplateError, UsageError, nearest
from instil.evaluation.suites import conversation_of
from instil.inference.options import SamplingOptions
from instil.prompt import Exchange

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as missing:
    raise UsageError(f"lm-eval needs the package {missing.name!r}", "pip install 'instil[lm-eval]'") from missing

if TYPE_CHECKING:
    from instil.inference import Loaded
    from instil.model.forward import TreeModel

_TOKENS = 8192  # of a batch, those shared counted once
_RESAMPLES = 1000  # for the standard error of what is no mean
_NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
_DRAWN_BY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model as the harness asks it.

    Log-likelihoods are in nats. A context ends and a continuation begins as in the harness's own `hf` model: white
    space at the end of the context belongs to the continuation, and the tokens of the continuation are those that both
    together have more than the context. A text read as a whole is read behind BOS (or EOS, where there is no BOS), and
    behind the BOS that its tokenizer adds as well.

    Args:
        loaded: The model.
        as_text: Whether contexts are plain text even if there is a chat template.
    """

    def __init__(self, loaded: Loaded, *, as_text: bool = False) -> None:
        super().__init__()
        self._loaded = loaded
        self.has_template = loaded.has_template and not as_text
        self.requests = 0
        """How many were read or answered so far."""
        self.cut = 0
        """How many of them were cut from the left, for they were longer than the context."""
        self.without_system = 0
        """How many prompts were rendered without their system message, which the template refuses."""
        self._encoder = loaded.renderer.encoder if self.has_template else loaded.encoder
        self._opening = ""  # what the template puts between a prompt and the content of its answer
        self._spelled: dict[str, frozenset[int]] = {}  # where prompts only spell control tokens, if any do
        if self.has_template:
            from instil.inference.session import frame, stop_ids

            self._opening = frame(loaded.renderer)[0]
            loaded.engine.stop_ids |= frozenset(stop_ids(loaded.renderer))

    @property
    def eot_token_id(self) -> int:
        """The id of EOS, or of a token that ends answers.

        Raises:
            UsageError: There is none.
        """
        found = self._special("eos_token")
        found = min(self._loaded.engine.stop_ids, default=None) if found is None else found
        if found is None:
            raise UsageError(
                f"{self._loaded.tokenizer.name}: has neither BOS nor EOS, before which the harness reads texts",
                "Name its EOS in tokenizer_config.json.",
            )
        return found

    @property
    def prefix_token_id(self) -> int:
        """The id of what texts without a context are read behind: BOS, or else `eot_token_id`."""
        found = self._special("bos_token")
        return self.eot_token_id if found is None else found

    @property
    def max_length(self) -> int:
        """The most tokens that the model takes."""
        return self._loaded.engine.context or sys.maxsize

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return self._loaded.tokenizer.name.replace("/", "__")

    @cached_property
    def _reader(self) -> TreeModel:
        from instil.model.forward import TreeModel

        return TreeModel(self._loaded.engine.model)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, control tokens that it spells included, but for those that a message only spells.

        Args:
            string: The text.
            add_special_tokens: Whether to put BOS before it; None to do so if the tokenizer does, and it is not there.
        """
        bos = self._loaded.tokenizer.bos_token
        plain_at = next((at for text, at in self._spelled.items() if string.startswith(text.rstrip())), frozenset())
        ids = self._encoder.encode(string, plain_at)
        added = bos is not None and (not string.startswith(bos) if add_special_tokens is None else add_special_tokens)
        return [self.prefix_token_id, *ids] if added else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation as training renders it, up to where the content of the answer begins.

        Args:
            chat_history: The messages. A system message that the template refuses is left out, as the harness does.
            add_generation_prompt: Whether the last one is to be answered, or is an answer that is to go on.

        Raises:
            TemplateError: The template refuses the messages.
        """
        messages = list(chat_history)
        begun = "" if add_generation_prompt else messages.pop()["content"]
        renderer = self._loaded.renderer
        try:
            prompt = renderer.prompt(conversation_of(messages))
        except TemplateError:
            others = [each for each in messages if each["role"] != "system"]
            if len(others) == len(messages):
                raise
            prompt = renderer.prompt(conversation_of(others))
            self.without_system += 1
        text = prompt.prompt + self._opening + begun
        if prompt.plain_at:
            self._spelled[text] = prompt.plain_at
        return text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """How likely each continuation is behind its context, and whether each of its tokens is the likeliest."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """How likely each text is, in windows of the context of which each goes on where the last one ended."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        likelihoods = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            likelihoods[number] += likelihood
        return likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm  # type: ignore[import-untyped]

        from instil.packing import TokenTree, merge

        exchanges = [self._exchange(*request) for request in requests]
        found = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=None)
        for batch in batches([[*each.prompt_ids.tolist(), *each.completion_ids.tolist()] for each in exchanges]):
            forest = merge([TokenTree.from_exchanges([exchanges[number]]) for number in batch])
            log_probs, ranks = (each.cpu().numpy() for each in self._reader.scores(forest))  # (S,)
            ends = np.cumsum([len(exchanges[number].completion_ids) for number in batch])[:-1]
            parts = zip(batch, np.split(log_probs.astype(float), ends), np.split(ranks, ends), strict=True)
            for number, log_prob, rank in parts:
                found[number] = float(log_prob.sum()), bool((rank == 1).all())
            bar.update(len(batch))
        bar.close()
        return found

    def _exchange(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Exchange:
        """A request as an exchange, cut from the left where it does not fit; the last token is only predicted."""
        if not 0 < len(continuation) <= self.max_length:
            raise UsageError(
                f"lm-eval: the continuation {(texts or ('', ''))[1][:40]!r} has {len(continuation):,} tokens, and the "
                f"model takes 1 to {self.max_length:,}",
                "Leave this task out.",
            )
        kept = self._fitting(context, self.max_length + 1 - len(continuation))
        return Exchange("", "", *_weighed(kept, 0.0), *_weighed(continuation, 1.0), "none")

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """The end of a context that there is room for."""
        self.requests += 1
        self.cut += len(ids) > room
        return ids[-room:]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model answers to each context, as the task says: up to its stop texts, greedy or drawn.

        Raises:
            UsageError: A task generates in a way that Instil does not, or more than the model's context holds.
        """
        from tqdm import tqdm

        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        said = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="answers", disable=None)
        for numbers in alike.values():
            first = requests[numbers[0]]
            sampling = sampling_of(first.args[1], first.task_name)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UsageError(
                    f"lm-eval: {first.task_name}: asks for {sampling.max_new_tokens:,} tokens, and the model takes "
                    f"{self.max_length:,}, its prompt included",
                    "Leave this task out.",
                )
            contexts = [self.tok_encode(requests[number].args[0].removesuffix(self._opening)) for number in numbers]
            prompts = [self._fitting(ids or [self.prefix_token_id], room) for ids in contexts]
            found = self._loaded.engine.generate(prompts, sampling, on_done=lambda _: bar.update())
            for number, (answer,) in zip(numbers, found, strict=True):
                said[number] = answer.text.removeprefix(self._opening)
        bar.close()
        return said

    def notes(self) -> list[str]:
        """What deserves a look of the requests so far."""
        found = []
        if self.cut:
            found.append(f"{self.cut:,} of {self.requests:,} requests were cut from the left to fit into the context")
        if self.without_system:
            found.append(
                f"{self.without_system:,} prompts are without their system message, which the template refuses"
            )
        return found

    def _special(self, name: str) -> int | None:
        token = self._loaded.tokenizer.special_tokens.get(name)
        return None if token is None else self._loaded.tokenizer.backend.token_to_id(token)


def load_tasks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tasks of the harness, with their data.

    Args:
        names: Of tasks, groups or tags of the harness (`lm-eval ls tasks` lists them), or YAML files of tasks.

    Returns:
        What the harness's `TaskManager.load` gives.

    Raises:
        UsageError: There is no such task, its data cannot be had, or it is none for a language model that Instil runs.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in names if Path(name).is_file()]
    manager = TaskManager(include_defaults=len(files) < len(names))  # thousands of files, which take their time
    check_names([name for name in names if name not in files], manager.task_index)
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    problems = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # data sets fail in many ways
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(f"{name} cannot be loaded: {lines[0]}")
            continue
        for kind, several in loaded.items():
            found[kind].update(several)
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"{name} runs what the model writes, and not in a sandbox")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"{name} shows pictures or plays sounds")
    if problems:
        raise UsageError(
            "lm-eval: " + "\n  ".join(problems),
            "Data is downloaded once: connect, or let HF_HOME name the folder that has it; or leave the task out.",
        )
    return found


def check_names(names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse names that no task has.

    Raises:
        UsageError: Some have none; it gives the nearest right one.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise UsageError(
            f"lm-eval: there is no task {', '.join(map(repr, unknown))}",
            hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists them.",
        )


def run(
    loaded: Loaded, tasks: Sequence[str] | Mapping[str, Any], limit: int | None = None, *, as_text: bool = False
) -> dict[str, Any]:
    """Run tasks of the harness on a model.

    A model that has a chat template, or was given one, is asked with it, examples as turns of the conversation. The
    harness's seeds are set, so that two models are asked the same.

    Args:
        loaded: The model.
        tasks: Their names, or what `load_tasks` made of them.
        limit: Only so many items of each task, evenly spaced.
        as_text: Whether to ask in plain text all the same, as base models are.

    Returns:
        As plain JSON values: `template`, whether a chat template was used; `tasks`, for each task and group its metrics
        by name, each with `value`, `stderr` (the harness's own standard error; None where it has none), `low` and
        `high` (the ends of the 95 % interval: 1.96 standard errors to both sides, within 0 and 1 for a share; None
        where the error is 0 or unknown), `n`, the items, and `unit`, `share` or ""; `parts`, the tasks that are part of
        a group; `documents`, for each task and metric whose value is the mean over documents the value of each, and
        whether a higher one is better; `notes`, what deserves a look.

    Raises:
        UsageError: As `load_tasks`, or the model's context is too small for a task.
        TemplateError: The template refuses what a task asks.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    chosen = tasks if isinstance(tasks, Mapping) else load_tasks(tasks)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    samples = {}
    for name, task in chosen["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        count = len(task.eval_docs)
        if limit is not None and limit < count:
            samples[name] = [number * count // limit for number in range(limit)]
    os.environ["DISABLE_MULTIPROC"] = "1"  # forks and threads do not go together
    lm = HarnessModel(loaded, as_text=as_text)
    model = loaded.engine.model
    attention = model.config._attn_implementation
    try:
        with redirect_stdout(sys.stderr):  # it prints
            found = evaluate(
                lm,
                chosen,
                samples=samples,
                bootstrap_iters=_RESAMPLES,
                log_samples=True,
                apply_chat_template=lm.has_template,
                fewshot_as_multiturn=lm.has_template,
            )
    finally:
        model.set_attn_implementation(attention)
    measured = {name: _metrics(values) for name, values in {**found["results"], **found.get("groups", {})}.items()}
    return {
        "template": lm.has_template,
        "tasks": measured,
        "parts": sorted({name for names in found["group_subtasks"].values() for name in names}),
        "documents": {
            name: _documents(samples, found["higher_is_better"][name], measured[name])
            for name, samples in found["samples"].items()
        },
        "notes": lm.notes(),
    }


def sampling_of(given: Mapping[str, Any], task: str) -> SamplingOptions:
    """How a task has answers generated.

    Args:
        given: Its `generation_kwargs`.
        task: Its name, for messages.

    Raises:
        UsageError: It asks for what Instil does not do.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    values: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
    stop = [each for each in values.pop("until") if each]
    most, drawn = values.pop("max_gen_toks"), values.pop("do_sample")
    chosen = {name: values.pop(name, default) for name, default in _DRAWN_BY.items()}
    unknown = {name: value for name, value in values.items() if (name, value) != ("num_beams", 1)}
    if unknown:
        raise UsageError(
            f"lm-eval: {task}: generates with {', '.join(f'{name} {value!r}' for name, value in unknown.items())}, "
            "which Instil does not",
            "Leave this task out.",
        )
    return SamplingOptions(max_new_tokens=most, stop=stop, **chosen | ({} if drawn else {"temperature": 0.0}))


def batches(paths: Sequence[list[int]], tokens: int = _TOKENS) -> Iterator[list[int]]:
    """The numbers of paths, those that begin alike together, in batches of about so many tokens.

    Args:
        paths: The ids of each.
        tokens: The most of a batch, what its paths share counted once; a longer path has a batch for itself.
    """
    batch: list[int] = []
    size = 0
    for number in sorted(range(len(paths)), key=lambda each: paths[each]):
        path = paths[number]
        new = len(path) - (_shared(paths[batch[-1]], path) if batch else 0)
        if batch and size + new > tokens:
            yield batch
            batch, size, new = [], 0, len(path)
        batch.append(number)
        size += new
    if batch:
        yield batch


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _weighed(ids: list[int], weight: float) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.array(ids, np.int32), np.full(len(ids), weight, np.float32)


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics in what the harness says of a task, where each stands as `name,filter`."""
    found = {}
    for key, value in values.items():
        name, comma, way = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{way}")
        error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        shown = _shown(name, way)
        low, high = _interval(float(value), error, share=name in _SHARES)
        found[shown] = {
            "value": float(value),
            "stderr": error,
            "low": low,
            "high": high,
            "n": values["sample_len"],
            "unit": "share" if name in _SHARES else "",
        }
    return found


def _shown(metric: str, way: str) -> str:
    return metric if way == "none" else f"{metric} ({way})"


def _documents(
    samples: Sequence[Mapping[str, Any]], higher: Mapping[str, bool | None], measured: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The values of documents by metric, where the metric is their mean and it is known which is better."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            if higher.get(name) is not None and isinstance(sample[name], bool | int | float | np.number):
                metric = found.setdefault(
                    _shown(name, sample["filter"]), {"higher_is_better": higher[name], "values": {}}
                )
                metric["values"][str(sample["doc_id"])] = float(sample[name])
    return {
        name: metric
        for name, metric in found.items()
        if name in measured and math.isclose(fmean(metric["values"].values()), measured[name]["value"])
    }


def _interval(value: float, error: float | None, *, share: bool) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval; none where all items are alike, of which a standard error of 0 tells nothing."""
    if not error:
        return None, None
    low, high = value - _NORMAL * error, value + _NORMAL * error
    return (max(0.0, low), min(1.0, high)) if share else (low, high)
