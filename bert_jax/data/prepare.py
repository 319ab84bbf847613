"""Raw text to a folder of training rows.

    python -m bert_jax.data.prepare --input 'texts/*.txt' --tokenizer T --output P --max-seq-len 128

Two passes over all cores, in memory that does not grow with the corpus. The first splits documents into sentences and
tokens, in order, into a store on disk (`sentence_pairs.create_store`). The second makes each of the store's units, a
fixed range of text, into one ArrayRecord file of packed rows. Neither the groups of the first nor the units of the
second depend on the number of workers, so the files do not either.

P/train-00000-of-00004.array_record …, P/eval-…, P/tokenizer/, P/manifest.json

More text than one machine splits in time goes in parts, each a process of its own, anywhere, in any order, as often as
need be (`--part 3/16`); `--merge` then makes the rows, the same bytes as one process would have made:

P.parts/00003-of-00016/{tokens,sentences,pieces,part.json}
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bert_jax import storage
from bert_jax.config import Config, DataConfig, ModelConfig, faults, fingerprint
from bert_jax.data import packing, sentence_pairs
from bert_jax.data.corpus import Document, documents_of, input_bytes, resolve_inputs, split_sentences
from bert_jax.errors import BertJaxError, CommandParser, ConfigError, DataError, StorageError, run_command
from bert_jax.progress import Progress, say

if TYPE_CHECKING:
    from bert_jax.data.tokenizer_model import Tokenizer

FORMAT_VERSION = 2
MANIFEST, PART = "manifest.json", "part.json"
# Random access wants one record a group; without compression it reads 1.3 and writes 5 times as fast for 5 % more disk.
WRITER_OPTIONS = "group_size:1,uncompressed"
_GROUP_CHARS = 1_000_000  # text that a worker splits and tokenises at a time
_SENTENCES = 256  # sentences that the tokenizer gets at a time: its results take about a hundred bytes a token
_UNIT_TOKENS = 2_000_000  # text of one output file
_SETTINGS = (
    *("max_seq_len", "pack", "short_seq_prob", "dupe_factor", "eval_fraction", "seed"),
    *("language", "text_field", "documents"),
)  # of DataConfig: all that the rows depend on beside text and tokenizer


class Context(NamedTuple):
    """What every task of a worker needs."""

    tokenizer: "Tokenizer"
    data: DataConfig
    folder: Path  # where files are made; the store is in its subfolder


class Job(NamedTuple):
    """One output file: a unit of a split, in the `dupe`-th of the passes over it."""

    split: str
    number: int
    dupe: int
    unit: sentence_pairs.Unit
    name: str


def prepare(
    inputs: Sequence[str], output: str | os.PathLike, *, tokenizer: "Tokenizer", data: DataConfig, report: bool = True
) -> dict[str, Any]:
    """Writes the folder `output` and returns its manifest; the same bytes for any `data.workers`.

    The folder appears whole, or not at all. `report` shows progress on stderr.

    Raises:
      ConfigError: settings that cannot be, or `output` is there already.
      DataError: text that cannot be used; fewer than two documents.
      StorageError, OSError: a disk that fails or is full.
    """
    return _prepare(output, tokenizer, data, report, functools.partial(_tokenise_corpus, inputs), list(inputs))


def prepare_part(
    inputs: Sequence[str],
    output: str | os.PathLike,
    part: tuple[int, int],
    *,
    tokenizer: "Tokenizer",
    data: DataConfig,
    report: bool = True,
) -> Path:
    """Tokenises part (number from 1, count) of the inputs into a folder beside `output`, and returns that folder.

    Parts are whole files, neighbours in the order of all, of about the same size. A part that is there already, made of
    the same text with the same settings, stays. Raises as `prepare` does.
    """
    output, (number, count) = Path(output).absolute(), part
    _check(output, data)
    folder = part_folder(output, number, count)
    names = resolve_inputs(inputs)
    mine = names_of_part(names, number, count)
    asked = {"inputs": list(inputs), "files": names, "tokenizer": tokenizer.fingerprint}
    asked |= {"settings": {name: getattr(data, name) for name in _SETTINGS}}
    if (folder / PART).is_file():
        if read_part(folder)["asked"] == asked:
            say(f"{folder} is there already; remove it to make it again")
            return folder
        raise ConfigError(
            f"{folder.name} in the folder {folder.parent.name} was made of other files or with other settings; remove "
            f"{folder.parent.name}, or take another --output"
        )
    _remove_dead(folder)
    partial = folder.with_name(f"{_partial_prefix(folder)}{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with _worker_map(Context(tokenizer, data, partial)) as worker_map:
            counts, digests = _tokenise(mine, partial, worker_map, data, report)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        values = {"asked": asked, "counts": counts, "digests": digests, "bytes": sizes}
        (partial / PART).write_text(json.dumps(values | {"sha256": fingerprint(values)}) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def merge(
    output: str | os.PathLike, *, tokenizer: "Tokenizer", data: DataConfig, report: bool = True
) -> dict[str, Any]:
    """Makes the folder `output` of the parts beside it, and removes them. Returns its manifest; raises as `prepare`."""
    output = Path(output).absolute()
    folders = sorted(path for path in parts_folder(output).glob("*-of-*") if re.fullmatch(r"\d+-of-\d+", path.name))
    if not folders:
        raise DataError(f"{parts_folder(output)}: no parts; make them with --part")
    count = int(folders[0].name.rpartition("-")[2])
    wanted = [part_folder(output, number, count) for number in range(1, count + 1)]
    if missing := [path.name for path in wanted if not (path / PART).is_file()]:
        raise DataError(f"{parts_folder(output)}: {', '.join(missing)} missing; make them with --part")
    if folders != wanted:
        raise DataError(f"{parts_folder(output)}: parts of more than one division; remove those of one")
    parts = [read_part(path) for path in wanted]
    settings = {name: getattr(data, name) for name in _SETTINGS}
    for path, part in zip(wanted, parts, strict=True):
        check_whole(path, part)
        if part["asked"] != parts[0]["asked"]:
            raise ConfigError(f"{path}: made of other files or with other settings than {wanted[0].name}; remove it")
    asked = parts[0]["asked"]
    if asked["settings"] != settings or asked["tokenizer"] != tokenizer.fingerprint:
        raise ConfigError(f"{parts_folder(output)}: of another tokenizer or other settings; give the same again")

    def join(store: Path, worker_map: WorkerMap, data: DataConfig, report: bool) -> dict[str, Any]:
        del worker_map
        progress = Progress("merge", count, "parts") if report else None
        with sentence_pairs.create_store(store) as writer:
            for number, path in enumerate(wanted, 1):
                writer.extend(path)
                if progress:
                    progress.update(number)
        if progress:
            progress.close()
        digests = [digest for part in parts for digest in part["digests"]]
        return _corpus_facts(writer.counts, store, digests, data, asked["inputs"])

    manifest = _prepare(output, tokenizer, data, report, join, asked["inputs"])
    shutil.rmtree(parts_folder(output), ignore_errors=True)
    return manifest


def parts_folder(output: Path) -> Path:
    """Where the parts of `output` stand."""
    return output.with_name(f"{output.name}.parts")


def part_folder(output: Path, number: int, count: int) -> Path:
    """The folder of part `number`, from 1, of `count`."""
    return parts_folder(output) / f"{number:05d}-of-{count:05d}"


def names_of_part(names: Sequence[str], number: int, count: int) -> list[str]:
    """Those of the files `names` that make up part `number`, from 1, of `count`: neighbours, a share of the bytes."""
    known = (storage.is_remote(name) or os.path.isfile(name) for name in names)
    sizes = [storage.size_and_time(name)[0] if file else 0 for name, file in zip(names, known, strict=True)]
    sizes = np.array(sizes, np.int64)
    sizes = np.maximum(sizes, max(1, int(sizes.mean()) // 100))  # of what is no file nobody knows
    middles = np.cumsum(sizes) - sizes / 2
    part = np.minimum(middles * count // sizes.sum(), count - 1)
    return [name for name, its in zip(names, part, strict=True) if its == number - 1]


def read_part(folder: Path) -> dict[str, Any]:
    """What a finished part says of itself. Raises DataError where it is not what was written."""
    try:
        values = json.loads((folder / PART).read_text(encoding="utf-8"))
        if values.pop("sha256") != fingerprint(values):
            raise ValueError("sha256 differs")
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{folder / PART}: damaged ({error}); remove {folder.name} and make it again") from None
    return values


def check_whole(folder: Path, part: dict[str, Any]) -> None:
    """Raises DataError where a file of a part has not the size that the part tells of."""
    for name, size in part["bytes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise DataError(f"{folder / name}: not the {size:,} bytes that were written; remove {folder.name}")


def _prepare(
    output: str | os.PathLike,
    tokenizer: "Tokenizer",
    data: DataConfig,
    report: bool,
    fill_store: Callable[[Path, "WorkerMap", DataConfig, bool], dict[str, Any]],
    inputs: list[str],
) -> dict[str, Any]:
    """`prepare`, with the store filled by `fill_store`, which returns what the manifest says of the corpus."""
    output = Path(output).absolute()
    _check(output, data)
    partial = output.with_name(f"{_partial_prefix(output)}{os.getpid()}")
    (partial / "store").mkdir(parents=True)
    try:
        with _worker_map(Context(tokenizer, data, partial)) as worker_map:
            corpus = fill_store(partial / "store", worker_map, data, report)
            files = _write_rows(partial, worker_map, data, report)
        shutil.rmtree(partial / "store")
        tokenizer.save(partial / "tokenizer")
        manifest = _manifest(inputs, partial, tokenizer, data, corpus, files)
        signed = manifest | {"sha256": fingerprint(manifest)}
        (partial / MANIFEST).write_text(json.dumps(signed, indent=1) + "\n", encoding="utf-8")
        try:
            os.rename(partial, output)
        except OSError as error:
            raise ConfigError(f"{output} could not be put in place: {error.strerror}; give another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check(output: Path, data: DataConfig) -> None:
    """Raises ConfigError for settings or an output that cannot be; removes what dead runs left beside it."""
    positions = max(8, data.max_seq_len)
    wrong = faults(Config(model=ModelConfig(max_position_embeddings=positions), data=replace(data, path="text")))
    wrong = [fault for fault in wrong if fault.startswith("data.")]
    if wrong:
        raise ConfigError("; ".join(wrong))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} is there already; remove it or give another --output")
    _remove_dead(output)


def _remove_dead(output: Path) -> None:
    """Removes what dead runs on this host left beside `output`."""
    for left in output.parent.glob(f"{_partial_prefix(output)}*"):
        process = left.name.rpartition("-")[2]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _partial_prefix(output: Path) -> str:
    """The host is in the name because another host's process numbers mean nothing here."""
    return f"{output.name}.partial-{socket.gethostname()}-"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return process != os.getpid()


# Workers

WorkerMap = Callable[[Callable[[Context, Any], Any], Iterable[Any]], Iterator[Any]]
_context: Context  # of this worker process


@contextlib.contextmanager
def _worker_map(context: Context) -> Iterator[WorkerMap]:
    """A `map(function(context, task), tasks)` over processes: lazy, in order, with few tasks under way at a time."""
    workers = context.data.workers or _cores()
    if workers == 1:
        with _one_tokenizer_thread():
            yield lambda function, tasks: (function(context, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (context,))
    try:
        yield lambda function, tasks: _map_ahead(pool, function, tasks, 2 * workers)
    except BrokenProcessPool as error:
        raise BertJaxError("a worker process was killed (out of memory?); try again, with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map_ahead(pool: ProcessPoolExecutor, function: Callable, tasks: Iterable[Any], ahead: int) -> Iterator[Any]:
    pending = deque()
    for task in tasks:
        with _sheltered_start():
            pending.append(pool.submit(_call, function, task))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _sheltered_start() -> Iterator[None]:
    """Processes that start here do not see Ctrl-C, which is the parent's to handle, nor the main module.

    A spawned process runs the main module again: that of training would load JAX, and a user's script needs a guard.
    """
    main, came = sys.modules["__main__"], []
    handling = threading.current_thread() is threading.main_thread()
    sys.modules["__main__"] = types.ModuleType("__main__")
    # The mask is what the process inherits. Here another thread may get the signal, which the handler then puts off:
    # else the process would be left with half of what it is to read.
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args)) if handling else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handling:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if came and callable(before):
            before(*came[0])


@contextlib.contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(context: Context) -> None:
    global _context
    _context = context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this the workers of a killed parent would wait for tasks for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable, task: Any) -> Any:
    return function(_context, task)


# Pass 1: text to the store


def _tokenise_corpus(
    inputs: Sequence[str], folder: Path, worker_map: WorkerMap, data: DataConfig, report: bool
) -> dict[str, Any]:
    """Fills the store and splits it; returns what the manifest says of the corpus."""
    counts, digests = _tokenise(resolve_inputs(inputs), folder, worker_map, data, report)
    return _corpus_facts(counts, folder, digests, data, inputs)


def _tokenise(
    names: Sequence[str], folder: Path, worker_map: WorkerMap, data: DataConfig, report: bool
) -> tuple[dict[str, int], list[str]]:
    """Fills a store with the files `names`: its counts, and the digest of each file's text."""
    digests = {name: hashlib.sha256() for name in names}
    progress = Progress("tokenise", input_bytes(names) if names else 0, "bytes") if report else None
    with sentence_pairs.create_store(folder) as store:
        found = documents_of(names, data.text_field, data.documents)
        for part in worker_map(tokenise, _groups(found, digests, progress)):
            store.append(part)
    if progress:
        progress.close(f"{store.tokens:,} tokens")
    return store.counts, [digest.hexdigest() for digest in digests.values()]


def _corpus_facts(
    counts: dict[str, int], folder: Path, digests: list[str], data: DataConfig, inputs: Sequence[str]
) -> dict[str, Any]:
    """Splits a store that is full, and returns what the manifest says of its text. Raises DataError for too little."""
    if counts["documents"] < 2:
        raise DataError(
            f"{' '.join(inputs)}: {counts['documents']} document with tokens; next-sentence prediction needs two "
            "documents at least: give more text, or say with --documents what separates documents"
        )
    held_out = sentence_pairs.held_out_sources(counts["documents"], data.eval_fraction, data.seed)
    sentence_pairs.split_store(folder, held_out)
    return {"fingerprint": fingerprint(digests), **counts}


def _groups(
    documents: Iterable[tuple[str, Document]], digests: dict[str, Any], progress: Progress | None
) -> Iterator[list[Document]]:
    """Documents in groups of about `_GROUP_CHARS`; their texts go into the digest of their file."""
    group, chars, done = [], 0, 0
    for name, document in documents:
        text = document.text.encode("utf-8", "surrogatepass")
        digests[name].update(len(text).to_bytes(8, "little") + text)
        group.append(document)
        chars, done = chars + len(document.text), done + len(text)
        if chars >= _GROUP_CHARS:
            yield group
            group, chars = [], 0
            if progress:
                progress.update(done)
    if group:
        yield group
    if progress:
        progress.update(done)


def tokenise(context: Context, documents: Sequence[Document]) -> sentence_pairs.Tokenised:
    """Sentences and tokens of some documents; sentences without tokens are dropped."""
    sentences = [split_sentences(document, context.data.language) for document in documents]
    owner = np.repeat(np.arange(len(documents)), [len(some) for some in sentences])
    dtype = sentence_pairs.token_dtype(context.tokenizer.vocab_size)
    flat, tokens, lengths = list(itertools.chain.from_iterable(sentences)), [], []
    for start in range(0, len(flat), _SENTENCES):
        encoded = context.tokenizer.encode_batch(flat[start : start + _SENTENCES])
        lengths += map(len, encoded)
        tokens.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
    lengths = np.array(lengths, np.int64)
    return sentence_pairs.Tokenised(
        np.concatenate([np.zeros(0, dtype), *tokens]),
        lengths[lengths > 0],
        np.bincount(owner[lengths > 0], minlength=len(documents)),
        np.array([document.source for document in documents], np.int64),
    )


# Pass 2: the store to rows


def _write_rows(folder: Path, worker_map: WorkerMap, data: DataConfig, report: bool) -> dict[str, list[dict]]:
    """Writes all row files; returns their descriptions by split."""
    jobs = [job for split in sentence_pairs.SPLITS for job in plan_jobs(folder / "store", split, data.dupe_factor)]
    progress = Progress("write rows", sum(job.unit.tokens for job in jobs), "tokens") if report else None
    files: dict[str, list[dict]] = {split: [] for split in sentence_pairs.SPLITS}
    for job, entry in zip(jobs, worker_map(write_shard, jobs), strict=True):
        files[job.split].append(entry)
        if progress:
            progress.update(progress.done + job.unit.tokens)
    if progress:
        progress.close()
    return files


def plan_jobs(store: Path, split: str, dupe_factor: int) -> list[Job]:
    """The output files of a split, in order. Held-out text is used once: more pairs of it would measure nothing new."""
    units = sentence_pairs.cut_units(store, split, _UNIT_TOKENS)
    dupes = range(dupe_factor if split == "train" else 1)
    pairs = [(dupe, number) for dupe in dupes for number in range(len(units))]
    return [
        Job(split, number, dupe, units[number], f"{split}-{index:05d}-of-{len(pairs):05d}.array_record")
        for index, (dupe, number) in enumerate(pairs)
    ]


def write_shard(context: Context, job: Job) -> dict[str, Any]:
    """Makes one file of rows and describes it."""
    data, tokenizer = context.data, context.tokenizer
    dtype = packing.row_dtype(
        data.max_seq_len, packing.max_examples_of(data.max_seq_len, data.pack), tokenizer.vocab_size
    )
    with sentence_pairs.Store(context.folder / "store", job.split, dtype["input_ids"].base) as store:
        examples = sentence_pairs.unit_examples(
            store,
            job.unit.first,
            job.unit.last,
            max_seq_len=data.max_seq_len,
            short_seq_prob=data.short_seq_prob,
            rng=Random(f"{data.seed}/{job.split}/{job.dupe}/{job.number}"),
        )
        lengths = [packing.example_length(example) for example in examples]
        rows = packing.best_fit(lengths, data.max_seq_len, dtype["a_lengths"].shape[0])
        special = {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
        records = packing.fill_rows(examples, rows, store.tokens, dtype, **special)
    write_records(context.folder / job.name, records)
    return _describe_file(context.folder, job.name) | {
        "rows": len(rows),
        "examples": len(examples),
        "filled": sum(lengths),
        "random_next": sum(example.is_random_next for example in examples),
        "source_tokens": job.unit.tokens,
        "dupe": job.dupe,
        "sentences": job.unit.sentences,
        "documents": job.unit.sources,
    }


def write_records(path: Path, records: np.ndarray) -> None:
    """Writes an ArrayRecord file. Raises StorageError."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for record in records:
            writer.write(record.tobytes())
        writer.close()
    except RuntimeError as error:  # its way to say that the disk is full
        raise StorageError(f"{path}: {error}") from error


# The manifest


def _describe_file(folder: Path, name: str) -> dict[str, Any]:
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest}


def _manifest(
    inputs: Sequence[str],
    folder: Path,
    tokenizer: "Tokenizer",
    data: DataConfig,
    corpus: dict[str, Any],
    files: dict[str, list[dict]],
) -> dict[str, Any]:
    saved = sorted(path.relative_to(folder).as_posix() for path in (folder / "tokenizer").rglob("*") if path.is_file())
    settings = {name: getattr(data, name) for name in _SETTINGS}
    return {
        "format": "bert_jax rows",
        "format_version": FORMAT_VERSION,
        "tool_version": _tool_version(),
        "settings": settings | {"max_examples": packing.max_examples_of(data.max_seq_len, data.pack)},
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer_files": [_describe_file(folder, name) for name in saved],
        "inputs": list(inputs),
        "corpus": corpus,
        "splits": {split: _split_summary(entries, data) for split, entries in files.items()},
    }


def _tool_version() -> str:
    try:
        return importlib.metadata.version("bert_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _split_summary(entries: list[dict], data: DataConfig) -> dict[str, Any]:
    """Sums over the files of a split; text that is used `dupe_factor` times is counted once."""

    def total(key: str, dupes: int | None = None) -> int:
        return sum(entry[key] for entry in entries if dupes is None or entry["dupe"] < dupes)

    rows, examples = total("rows"), total("examples")
    summary = {
        "documents": total("documents", 1),
        "sentences": total("sentences", 1),
        "tokens": total("source_tokens", 1),
        "examples": examples,
        "rows": rows,
        "fill_rate": round(total("filled") / (rows * data.max_seq_len), 6) if rows else 0.0,
        "random_next_share": round(total("random_next") / examples, 6) if examples else 0.0,
        "files": [{key: entry[key] for key in ("name", "rows", "bytes", "sha256")} for entry in entries],
    }
    if not entries:
        summary["note"] = "empty: eval_fraction is 0 or there are fewer than four documents"
    return summary


def load_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared folder, whose files were all seen to be there with the right size.

    Raises:
      DataError: no prepared folder, one of another format version, or one with a file missing or cut short.
    """
    path = Path(folder) / MANIFEST
    again = "prepare the text again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no prepared rows ({MANIFEST} is missing); {again}") from None
    except ValueError as error:
        raise DataError(f"{path}: not readable ({error}); {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "bert_jax rows":
        raise DataError(f"{path}: not a manifest of bert_jax; {again}")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise DataError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {again}")
    if manifest.pop("sha256", "") != fingerprint(manifest):
        raise DataError(f"{path}: not what was written (sha256 differs); {again}")
    for entry in _listed_files(manifest):
        file = Path(folder) / entry["name"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "missing" if size is None else f"{size} bytes instead of {entry['bytes']}"
            raise DataError(f"{file}: {found}; {again}")
    return manifest


def _listed_files(manifest: dict[str, Any]) -> list[dict]:
    rows = [entry for split in manifest["splits"].values() for entry in split["files"]]
    return rows + manifest["tokenizer_files"]


def verify(folder: str | os.PathLike) -> int:
    """Compares the sha256 of every file with the manifest; their number. DataError names the first wrong one."""
    entries = _listed_files(load_manifest(folder))
    progress = Progress("verify", len(entries), "files")
    for number, entry in enumerate(entries, 1):
        if _describe_file(Path(folder), entry["name"])["sha256"] != entry["sha256"]:
            raise DataError(f"{Path(folder) / entry['name']}: content has changed (sha256); prepare the text again")
        progress.update(number)
    progress.close()
    return len(entries)


# The command


def describe(manifest: dict[str, Any]) -> str:
    """Counts, fill rate and next-sentence balance as text."""
    settings = manifest["settings"]
    lines = [
        f"tokens a row: {settings['max_seq_len']}, examples a row: up to {settings['max_examples']}, "
        f"vocabulary: {manifest['vocab_size']:,}, seed: {settings['seed']}"
    ]
    for name, split in manifest["splits"].items():
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['sentences']:,} sentences, {split['tokens']:,} tokens "
            f"-> {split['examples']:,} examples in {split['rows']:,} rows ({len(split['files'])} files), "
            f"fill rate {100 * split['fill_rate']:.2f} %, random next {100 * split['random_next_share']:.2f} %"
            if split["rows"]
            else f"{name}: {split['note']}"
        )
        if split["examples"] > 1000 and abs(split["random_next_share"] - 0.5) > 0.01:
            lines.append(f"{name}: many documents are one sentence, which has no true next sentence")
    return "\n".join(lines)


def inspect(folder: str | os.PathLike, *, rows: int = 3) -> str:
    """`describe`, and a few rows as text, example by example."""
    from bert_jax.data.tokenizer_model import load_tokenizer

    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer"))
    lines = [describe(manifest)]
    entry = manifest["splits"]["train"]["files"][0]
    numbers = sorted({entry["rows"] * part // rows for part in range(rows)})
    records = read_records(folder, manifest, entry["name"], numbers)
    for number, record in zip(numbers, records, strict=True):
        at = 0
        for slot in np.flatnonzero(record["a_lengths"]):
            a, b = int(record["a_lengths"][slot]), int(record["b_lengths"][slot])
            ids = record["input_ids"][at : at + a + b + packing.SPECIALS].tolist()
            at += len(ids)
            kind = "random next" if record["is_random_next"][slot] else "true next"
            lines.append(f"{entry['name']} row {number}, example {slot + 1}: {a} + {b} tokens, {kind}")
            lines.append(f"  A: {tokenizer.decode(ids[1 : 1 + a])}\n  B: {tokenizer.decode(ids[2 + a : -1])}")
    return "\n".join(lines)


def read_records(
    folder: str | os.PathLike, manifest: dict[str, Any], name: str, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Records of one row file, all or those of the given numbers."""
    from array_record.python.array_record_module import ArrayRecordReader

    settings = manifest["settings"]
    dtype = packing.row_dtype(settings["max_seq_len"], settings["max_examples"], manifest["vocab_size"])
    reader = ArrayRecordReader(os.path.join(folder, name))
    try:
        records = reader.read_all() if numbers is None else reader.read(list(numbers))
        return np.frombuffer(b"".join(records), dtype)
    finally:
        reader.close()


def _parser() -> argparse.ArgumentParser:
    default, option = DataConfig(), argparse.BooleanOptionalAction
    parser = CommandParser("python -m bert_jax.data.prepare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", help="files, globs, folders, .gz, .jsonl, tfds:NAME/CONFIG:SPLIT or builtin")
    add("--tokenizer", help="tokenizer folder or file")
    add("--output", help="folder to make")
    add("--inspect", metavar="P", help="instead: show counts and a few rows of a prepared folder")
    add("--verify", metavar="P", help="instead: compare every file of a prepared folder with its digest")
    add("--part", metavar="I/N", help="make only part I, from 1, of N, in a folder beside --output; then --merge")
    add("--merge", action="store_true", help="make the rows of all parts; takes the same settings again, no --input")
    add("--max-seq-len", type=int, default=default.max_seq_len, help="tokens in a row (%(default)s)")
    add("--workers", type=int, default=default.workers, help="processes; 0 takes all cores (%(default)s)")
    add("--seed", type=int, default=default.seed, help="seed of pairs and of the held-out split (%(default)s)")
    add("--dupe-factor", type=int, default=default.dupe_factor, help="how often text is cut into pairs (%(default)s)")
    add("--pack", action=option, default=default.pack, help="several examples in a row (%(default)s)")
    add("--short-seq-prob", type=float, default=default.short_seq_prob, help="share of shorter examples (%(default)s)")
    add("--eval-fraction", type=float, default=default.eval_fraction, help="share of documents held out (%(default)s)")
    add("--language", default=default.language, help="language of prose, to split it (%(default)s)")
    add("--text-field", default=default.text_field, help="key of the text in JSONL and TFDS (%(default)s)")
    rules = ("auto", "blank-line", "file", "line")
    add("--documents", choices=rules, default=default.documents, help="what separates documents (%(default)s)")
    add("--lowercase", action=option, help="overrule the tokenizer's own setting")
    add("--strip-accents", action=option, help="overrule the tokenizer's own setting")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    """`prepare` and `inspect` as a command; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.inspect:
        print(inspect(options.inspect))
        return 0
    if options.verify:
        print(f"{options.verify}: {verify(options.verify)} files, all as they were written")
        return 0
    needed = ("tokenizer", "output") if options.merge else ("input", "tokenizer", "output")
    missing = [name for name in needed if not getattr(options, name)]
    if missing:
        raise ConfigError(f"--{missing[0]} is missing; see --help")
    from bert_jax.data.tokenizer_model import load_tokenizer

    data = DataConfig(workers=options.workers, **{name: getattr(options, name) for name in _SETTINGS})
    numbers = parse_part(options.part) if options.part else None
    with staged(options.output, numbers, merging=options.merge) as output:
        _check(output, data)  # before the tokenizer is read
        tokenizer = load_tokenizer(options.tokenizer, lowercase=options.lowercase, strip_accents=options.strip_accents)
        if numbers:
            print(prepare_part(options.input, output, numbers, tokenizer=tokenizer, data=data))
        elif options.merge:
            print(describe(merge(output, tokenizer=tokenizer, data=data)))
        else:
            print(describe(prepare(options.input, output, tokenizer=tokenizer, data=data)))
    return 0


@contextlib.contextmanager
def staged(output: str, part: tuple[int, int] | None, *, merging: bool) -> Iterator[Path]:
    """Where `output`, or a part of it, is made: a bucket's in the cache, from where it is carried up when it is whole.

    Of a part that the bucket has already, what it says of itself is fetched. `merging`: all parts are, and go from the
    bucket when they are joined. Raises ConfigError where the bucket has `output` already.
    """
    if not storage.is_remote(output):
        yield Path(output).absolute()
        return
    output = output.rstrip("/")
    with storage.reached(output):
        if storage.place(output).exists():
            raise ConfigError(f"{output} is there already; remove it or take another --output")
    here, theirs = storage.cached(output), f"{output}.parts"
    if part:
        folder = part_folder(here, *part)
        target = f"{theirs}/{folder.name}"
        shutil.rmtree(folder, ignore_errors=True)
        with storage.reached(target):
            if storage.place(f"{target}/{PART}").exists():
                storage.fetch(f"{target}/{PART}")
        yield here
        _carry_whole(folder, target, PART)
        return
    shutil.rmtree(here, ignore_errors=True)
    if merging:
        shutil.rmtree(parts_folder(here), ignore_errors=True)
        storage.fetch(theirs)
    yield here
    _carry_whole(here, output, MANIFEST)
    if merging:
        with storage.reached(theirs):
            storage.place(theirs).rmtree()


def _carry_whole(folder: Path, target: str, last: str) -> None:
    """Moves a folder into a bucket, the file `last` at last: what has it there is whole."""
    storage.carry(folder, target, leave=frozenset({last}))
    storage.carry(folder, target)
    shutil.rmtree(folder)


def parse_part(text: str) -> tuple[int, int]:
    """`3/16` -> (3, 16). Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 99_999):
        raise ConfigError(
            f"--part {text}: give I/N, the number of the part from 1 and how many there are, such as 3/16"
        )
    return int(number), int(count)


if __name__ == "__main__":
    from bert_jax.data.prepare import main as importable_main  # tasks must not be pickled as functions of __main__

    run_command(importable_main)
