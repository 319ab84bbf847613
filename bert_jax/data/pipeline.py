"""Prepared rows to batches. Batch i is a pure function of (rows, seed, i): nothing to save, nothing to rewind.

step -> row numbers by a stateless permutation -> rows -> masks by counter-based random numbers -> this host's share.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from bert_jax.config import DataConfig
from bert_jax.data.masking import Vocabulary, mask_tokens
from bert_jax.data.packing import row_dtype, unpack_rows
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.errors import BertJaxError, DataError

Batch = dict[str, np.ndarray]
_FEISTEL_ROUNDS = 6
_EVAL_STREAM = 1 << 63  # evaluation masks come from a stream that no training step uses


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of `range(size)` sends each `index`, without building the permutation.

    A Feistel network on the smallest square that holds `size`, walked until it lands below `size` (Black and Rogaway
    2002). Next to no value needs a second walk; on the next power of four, the slowest of a batch took some twenty.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)

    def walk(value: np.ndarray) -> np.ndarray:
        left, right = np.divmod(value, side)
        for round_ in range(_FEISTEL_ROUNDS):
            left, right = right, (left + _mix(right, (key << 3) + round_) % side) % side
        return left * side + right

    value = walk(index.astype(np.uint64))
    while (outside := value >= size).any():
        value[outside] = walk(value[outside])
    return value.astype(np.int64)


def _mix(value: np.ndarray, salt: int) -> np.ndarray:
    """Hash of uint64 words: the finaliser of splitmix64 (Steele et al. 2014)."""
    value = value + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def row_numbers(step: int, batch_size: int, rows: int, seed: int) -> np.ndarray:
    """int64 [B] rows of a training batch: each epoch visits every row once, in an order of its own."""
    position = step * batch_size + np.arange(batch_size)
    epoch, index = np.divmod(position, rows)
    numbers = np.empty(batch_size, np.int64)
    for number in np.unique(epoch):
        here = epoch == number
        numbers[here] = permute(index[here], rows, seed * 1_000_003 + int(number))
    return numbers


class PreparedRows(NamedTuple):
    """Random access to the rows of one split of a prepared folder."""

    paths: tuple[str, ...]
    starts: np.ndarray  # row number at which each shard begins, and the total at the end
    dtype: np.dtype
    readers: dict[int, object]  # opened as they are needed

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Structured rows [len(numbers)] in the order asked for."""
        shard = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = np.empty(len(numbers), self.dtype)
        for index in np.unique(shard):
            here = shard == index
            try:
                read = self._reader(int(index)).read
                # A list of numbers goes through the reader's threads: 5 to 23 us a row instead of 2.
                records = [read(row, row + 1)[0] for row in (numbers[here] - self.starts[index]).tolist()]
                rows[here] = np.frombuffer(b"".join(records), self.dtype)
            except (RuntimeError, ValueError, IndexError) as error:
                raise DataError(f"{self.paths[index]}: cannot be read ({error}); prepare the text again") from error
        return rows

    def _reader(self, index: int) -> object:
        if index not in self.readers:
            from array_record.python.array_record_module import ArrayRecordReader

            self.readers[index] = ArrayRecordReader(self.paths[index])
        return self.readers[index]


def open_rows(folder: str | os.PathLike, manifest: dict, split: str) -> PreparedRows:
    """The rows of `split` ("train" or "eval"), as the manifest of `folder` lists them."""
    settings, files = manifest["settings"], manifest["splits"][split]["files"]
    counts = [entry["rows"] for entry in files]
    return PreparedRows(
        paths=tuple(os.path.join(folder, entry["name"]) for entry in files),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        dtype=row_dtype(settings["max_seq_len"], settings["max_examples"], manifest["vocab_size"]),
        readers={},
    )


def masking_vocabulary(tokenizer: Tokenizer, whole_words: bool) -> Vocabulary:
    """The tables that masking wants of a tokenizer."""
    regular = np.ones(tokenizer.vocab_size, bool)
    regular[list(tokenizer.special_ids)] = False
    return Vocabulary(tokenizer.mask_id, regular, tokenizer.continuation if whole_words else None)


def pretraining_batch(
    rows: np.ndarray, vocabulary: Vocabulary, data: DataConfig, key: tuple, numbers: np.ndarray
) -> Batch:
    """Rows to the arrays of a pre-training step (DESIGN: input_ids ... next_sentence_weights).

    `numbers` are the rows' places in the stream of random numbers `key`.
    """
    batch = unpack_rows(rows)
    return batch | mask_tokens(
        batch["input_ids"],
        vocabulary=vocabulary,
        mask_rate=data.mask_rate,
        gather_width=data.gather_width,
        key=key,
        row_numbers=numbers,
    )


def train_batch(
    rows: PreparedRows,
    vocabulary: Vocabulary,
    data: DataConfig,
    batch_size: int,
    step: int,
    *,
    share: np.ndarray | None = None,
) -> Batch:
    """Training batch number `step`: the rows `share` of it (int64 [n], those of this host), without it all."""
    share = np.arange(batch_size) if share is None else share
    numbers = row_numbers(step, batch_size, len(rows), data.seed)[share]
    return pretraining_batch(rows.read(numbers), vocabulary, data, (data.seed, step), share)


def eval_batches(
    rows: PreparedRows,
    vocabulary: Vocabulary,
    data: DataConfig,
    batch_size: int,
    *,
    limit: int = 0,
    share: np.ndarray | None = None,
) -> Iterator[Batch]:
    """All held-out rows in order (or `limit` batches), masked the same way each time; the last batch is padded.

    `share` as in `train_batch`.
    """
    share = np.arange(batch_size) if share is None else share
    count = -(-len(rows) // batch_size)
    for number in range(min(count, limit) if limit else count):
        wanted = number * batch_size + share
        found = rows.read(np.minimum(wanted, len(rows) - 1))
        batch = pretraining_batch(found, vocabulary, data, (_EVAL_STREAM + data.seed, 0), wanted)
        beyond = wanted >= len(rows)
        batch["masked_lm_weights"][beyond] = 0
        batch["next_sentence_weights"][beyond] = 0
        yield batch


def stream(make_batch: Callable[[int], Batch], start: int, stop: int, *, ahead: int = 4) -> Iterator[Batch]:
    """Batches `start` to `stop - 1`, each made by tf.data while the device works on those before; the first right away,
    with whose step, and its compiling, the seconds pass that importing TensorFlow takes.
    """
    if start >= stop:
        return
    first = make_batch(start)
    with ThreadPoolExecutor(1) as thread:
        importing = thread.submit(tensorflow) if stop - start > 1 else None
        yield first
    if not importing:
        return
    tf = importing.result()
    names, types = zip(*((name, array.dtype) for name, array in first.items()), strict=True)
    failures: list[BertJaxError] = []

    def make(step: int) -> list[np.ndarray]:
        try:
            batch = make_batch(int(step))
        except BertJaxError as error:
            failures.append(error)  # TensorFlow would keep the text only
            raise
        return [batch[name] for name in names]

    dataset = tf.data.Dataset.range(start + 1, stop).map(
        lambda step: tf.numpy_function(make, [step], types, stateful=False),
        num_parallel_calls=2,
        deterministic=True,
    )
    try:
        for arrays in dataset.prefetch(ahead).as_numpy_iterator():
            yield dict(zip(names, arrays, strict=True))
    except tf.errors.OpError as error:
        raise (failures[0] if failures else error) from None


def tensorflow() -> Any:
    """TensorFlow for tf.data only: without GPUs, which are JAX's, and without Keras, half of its import."""
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # which is not loaded until it is asked for
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf
