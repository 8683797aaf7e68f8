"""Data to stored token trees: read, rendered and encoded on all cores, once for each content."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from instil.conversation import Record
from instil.data import Records
from instil.data import Report as ReadReport
from instil.errors import PackingError, RowProblem, UsageError
from instil.packing.packs import Report, refuse_long
from instil.packing.store import Columns, StoredTrees, columns, write
from instil.packing.summary import Summary, describe
from instil.packing.tree import TokenTree, concatenate, paths
from instil.prompt import EncodedRecord, PromptOptions, RecordEncoder, load_renderer, longest_exchange, prompt_options
from instil.prompt.exchange import Exchange

_MANIFEST = "manifest.json"
_CHUNK = 128  # rows encoded at once
_ALONE = 500_000  # so few bytes of data are encoded here: starting processes takes longer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A data set ready to be packed.

    Args:
        trees: One token tree for each row that has something to train.
        summary: What the rows came to.
        stop_tokens: The tokens that end an answer: what generation must stop at.
        added_tokens: The special tokens that the template needed and the tokenizer lacked.
        warnings: What about the template and the tokenizer deserves a look.
        report: What was met while reading: shapes, unused columns, notes.
        cached: Whether it was found in the cache.
    """

    trees: StoredTrees
    summary: Summary
    stop_tokens: tuple[str, ...]
    added_tokens: tuple[str, ...]
    warnings: tuple[str, ...]
    report: dict[str, Any]
    cached: bool = False

    def describe(self, packs: Report | None = None) -> dict[str, Any]:
        """Everything counted, as plain JSON values; with a packing's report, that too."""
        described = describe(self.summary, self.report, self.trees.lengths)
        described["stop_tokens"] = list(self.stop_tokens)
        described["added_tokens"] = list(self.added_tokens)
        described["warnings"] = [*self.warnings, *described["warnings"]]
        described["cached"] = self.cached
        if packs is not None:
            described["packs"] = {**asdict(packs), "fill": packs.fill}
        return described


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where encoded data is kept: the folder chosen, `$INSTIL_CACHE`, or `instil` in the user's cache folder."""
    if chosen is not None:
        return Path(chosen)
    if found := os.environ.get("INSTIL_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instil"


def prepare(
    records: Records,
    tokenizer: Any,
    options: PromptOptions | None = None,
    *,
    tokens_per_batch: int | None = None,
    workers: int | None = None,
    cache: str | Path | None = None,
    count_roles: bool = False,
    **changes: Any,
) -> Prepared:
    """Encode a whole data set into token trees, or find them in the cache.

    The cache holds what the same data, template, tokenizer, options and version of this code gave before; it is
    written whole or not at all.

    Args:
        records: As `instil.read` gives them.
        tokenizer: A folder or hub name, or a fast tokenizer of transformers.
        options: The template, what is trained and what is too long.
        tokens_per_batch: The budget of a batch: no exchange may be longer, unless `options.max_length` says so.
        workers: Processes that encode; None for one on each core. They change nothing but the time.
        cache: The folder of the cache; None keeps the result only as long as it is used.
        count_roles: Whether to count tokens by whose text they are.
        changes: Fields of the options by name: `template="chatml"`, `prompt_weight=0.1`, …

    Raises:
        DataError: Bad rows, all of them, unless they are skipped.
        PackingError: Rows that fit no batch, all of them named.
        UsageError, TokenizerError, TemplateError: An option, the tokenizer or the template cannot be used.
    """
    chosen = prompt_options(options, **changes)
    renderer = load_renderer(tokenizer, chosen, text=records.objective == "pretrain")
    longest = longest_exchange(renderer, chosen, tokens_per_batch)
    encoder = RecordEncoder(renderer, chosen, longest, records.objective, count_roles=count_roles)
    key = None if cache is None else _key(records, encoder)
    if cache is not None and key is not None and records.rejects is None and _is_whole(Path(cache) / key):
        prepared = _load(Path(cache) / key, cached=True)
        records.report = ReadReport.from_json(prepared.report)
        return prepared
    folder = _new_folder(Path(cache) if cache is not None and key is not None else Path(tempfile.gettempdir()))
    try:
        _fill(folder, records, encoder, workers or _cores())
        if tokens_per_batch is not None:
            refuse_long(_load(folder).trees, tokens_per_batch)
        if key is None:
            prepared = _load(folder)
            weakref.finalize(prepared.trees, shutil.rmtree, folder, ignore_errors=True)
            return prepared
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _load(_put(folder, folder.parent / key))


def _new_folder(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".instil-", dir=root))
    except OSError as error:
        raise UsageError(
            f"{root}: encoded data cannot be kept there: {error.strerror}",
            "Choose another folder with --cache-dir or $INSTIL_CACHE, or keep nothing with --no-cache.",
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class _Part:
    """What became of some rows in a row."""

    columns: Columns
    summary: Summary
    problems: list[RowProblem]
    stop_tokens: list[str]


def _fill(folder: Path, records: Records, encoder: RecordEncoder, workers: int) -> None:
    """Encode the records and write their trees and counts into the folder."""
    summary = Summary()
    problems: list[RowProblem] = []
    stop_tokens: dict[str, None] = {}

    def parts() -> Iterator[Columns]:
        for part in _parts(records, encoder, workers):
            summary.merge(part.summary)
            if records.on_bad_row != "skip" or records.rejects is not None:
                problems.extend(part.problems)
            stop_tokens.update(dict.fromkeys(part.stop_tokens))
            yield part.columns

    write(folder, parts())
    if records.rejects is not None:
        records.reject(problems)
    if problems and records.on_bad_row != "skip":
        raise records.unusable(problems)
    _tally_duplicates(StoredTrees(folder, records.paths), summary)
    meta = {
        "summary": summary.to_json(),
        "files": records.paths,
        "stop_tokens": list(stop_tokens),
        "added_tokens": list(encoder.renderer.tokenizer.added),
        "warnings": list(encoder.renderer.warnings),
        "report": records.report.to_json(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=True), encoding="utf-8")
    (folder / _MANIFEST).write_text(json.dumps(_digests(folder)))


def _parts(records: Records, encoder: RecordEncoder, workers: int) -> Iterator[_Part]:
    """All rows in chunks, in order: encoded here if they are few, by several processes otherwise."""
    size = records.bytes_on_disk
    if workers > 1 and size is not None and size > _ALONE:
        yield from _parts_of_workers(records, encoder, workers)
    else:
        yield from _share(records, encoder, 0, 1)


def _share(records: Records, encoder: RecordEncoder, number: int, of: int) -> Iterator[_Part]:
    """Every `of`-th chunk of the rows, encoded."""
    files = {path: index for index, path in enumerate(records.paths)}
    for chunk, problems in records.shared(number, of, _CHUNK):
        part = _encode(encoder, chunk, files)
        for source, same in groupby(problems, key=lambda problem: problem.source):
            part.summary.reject(source, list(same))
        part.problems[:0] = problems
        yield part


def _parts_of_workers(records: Records, encoder: RecordEncoder, workers: int) -> Iterator[_Part]:
    """Each process reads the data and encodes its share; what they send is taken in turn, so in the order of the rows.

    A process that is ahead waits, since nobody empties its pipe: memory stays constant.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = []
    receivers = []
    total = ReadReport()
    try:
        for number in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, records, encoder, number, workers), daemon=True)
            with _signals_held():
                process.start()
                processes.append(process)
            sender.close()
            receivers.append(receiver)
        while receivers:
            for receiver in list(receivers):
                sent = _received(receiver)
                if isinstance(sent, _Part):
                    yield sent
                else:
                    total.merge(sent)
                    receivers.remove(receiver)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    records.report = total


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back what would end this process: an exception raised in the midst of a fork is lost."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(receiver: Connection) -> _Part | ReadReport:
    try:
        sent: _Part | ReadReport | Exception = receiver.recv()
    except EOFError as error:
        raise PackingError(
            "a process that encodes has died (memory may have run out)", "Use fewer: --workers 1 encodes here."
        ) from error
    if isinstance(sent, Exception):
        raise sent
    return sent


def _work(sender: Connection, records: Records, encoder: RecordEncoder, number: int, of: int) -> None:
    """In a process of its own: send the parts of a share, then the report of its rows, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other processes
    gc.freeze()  # what was made before the fork stays: looking through it time and again is a tenth of the time
    gc.set_threshold(20_000, 20, 100)
    try:
        for part in _share(records, encoder, number, of):
            sender.send(part)
        sender.send(records.report)
    except Exception as error:
        sender.send(error)


def _encode(encoder: RecordEncoder, chunk: list[Record], files: Mapping[str, int]) -> _Part:
    """Encode some records into trees and counts."""
    rows = encoder.encode(chunk)
    backend = encoder.renderer.tokenizer.backend
    stop_ids = frozenset(i for i in map(backend.token_to_id, encoder.renderer.stop_tokens) if i is not None)
    summary = Summary()
    summary.add(rows, stop_ids)
    problems = [problem for row in rows for problem in row.problems]
    trained = [row for row in rows if row.exchanges and row.record.kind != "prompt"]
    sources = [row.record.source for row in trained]
    forest = _forest([row.exchanges for row in trained])
    places: Columns = {
        "file": np.array([files[source.path] for source in sources], np.int32),
        "line": np.array([source.line for source in sources], np.int64),
        "column": np.array([source.column for source in sources], np.int64),
        "hash": np.array([_hash(row) for row in trained], np.uint64),
        "lengths": np.array([len(exchange) for row in trained for exchange in row.exchanges], np.int32),
    }
    return _Part(columns(forest, places), summary, problems, list(encoder.renderer.stop_tokens))


def _forest(rows: Sequence[Sequence[Exchange]]) -> TokenTree:
    """The trees of rows side by side; rows of one exchange, which share nothing, are laid out together."""
    trees = []
    for several, group in groupby(enumerate(rows), key=lambda row: len(row[1]) > 1):
        if several:
            trees += [TokenTree.from_exchanges(exchanges, record=record) for record, exchanges in group]
        else:
            singles = [(exchange, record) for record, exchanges in group for exchange in exchanges]
            trees.append(paths([exchange for exchange, _ in singles], [record for _, record in singles]))
    return trees[0] if len(trees) == 1 else concatenate(trees)


def _hash(row: EncodedRecord) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for exchange in row.exchanges:
        digest.update(exchange.prompt_ids.tobytes() + b"|" + exchange.completion_ids.tobytes() + b"||")
    return int.from_bytes(digest.digest(), "little")


def _tally_duplicates(trees: StoredTrees, summary: Summary) -> None:
    """Count the rows whose tokens are those of an earlier row."""
    _, first = np.unique(trees.hashes, return_index=True)
    again = np.ones(len(trees), np.bool_)
    again[first] = False
    for index in np.flatnonzero(again).tolist():
        summary.tally("duplicate", "same tokens").add(trees.name(index))


def _load(folder: Path, *, cached: bool = False) -> Prepared:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Prepared(
        StoredTrees(folder, meta["files"]),
        Summary.from_json(meta["summary"]),
        tuple(meta["stop_tokens"]),
        tuple(meta["added_tokens"]),
        tuple(meta["warnings"]),
        meta["report"],
        cached,
    )


def _put(folder: Path, final: Path) -> Path:
    """Move a finished folder to its place, unless another process has been there first."""
    if _is_whole(final):
        shutil.rmtree(folder)
        return final
    shutil.rmtree(final, ignore_errors=True)
    try:
        folder.rename(final)
    except OSError:
        if not _is_whole(final):
            raise
        shutil.rmtree(folder)
    return final


def _is_whole(folder: Path) -> bool:
    """Whether a stored folder is as it was written: its manifest, written last, says what each file holds."""
    try:
        return bool(json.loads((folder / _MANIFEST).read_text()) == _digests(folder))
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != _MANIFEST:
            with path.open("rb") as content:
                digests[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def _key(records: Records, encoder: RecordEncoder) -> str | None:
    """What decides the result, as a hash; None where the data has no bytes to hash (the hub)."""
    data = records.fingerprint()
    if data is None:
        return None
    renderer = encoder.renderer
    parts = [
        data,
        renderer.template.fingerprint(),
        renderer.tokenizer.fingerprint(),
        encoder.options.model_dump_json(),
        f"{encoder.max_length} {encoder.objective} {encoder.count_roles}",
        _code_version(),
        *(f"{name} {version(name)}" for name in ("jinja2", "numpy", "pyarrow", "pyyaml", "tokenizers", "transformers")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _code_version() -> str:
    """A hash of the code that the result depends on."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(
        chain(package.glob("*.py"), *(package.glob(f"{room}/*") for room in ("data", "prompt", "packing")))
    ):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
