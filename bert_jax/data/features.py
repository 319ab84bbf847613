"""Texts and pairs as ids, and padded batches of them: what fine-tuning and prediction read.

Shapes: B batch, S sequence.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bert_jax.data.pipeline import permute, row_numbers

if TYPE_CHECKING:
    from bert_jax.data.tokenizer_model import Tokenizer

# Lengths that batches are padded to, so that few shapes compile: close together where most texts are.
PREDICT_LENGTHS = (*range(8, 32, 2), *range(32, 64, 8), *range(64, 128, 16), *range(128, 513, 64))
TRAIN_LENGTHS = (*range(12, 64, 4), *range(64, 128, 8), *range(128, 256, 16), *range(256, 513, 32))
SHAPES = 5  # of TRAIN_LENGTHS that training uses: each is a step to compile, ten seconds on a CPU
EVAL_SHAPES = 3  # an evaluation is a third of the work
WINDOW = 64  # batches whose rows are dealt out by length


class Features(NamedTuple):
    """Texts as ids, with [CLS] and [SEP]."""

    ids: list[np.ndarray]
    """int32 [S], one array a text."""
    type_ids: list[np.ndarray]
    """int32 [S], 0 in the first text of a pair and 1 in the second."""
    cut: int = 0
    """How many texts were longer and lost their end."""


def truncate_pair(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cuts the longer of two id lists from its end until both fit into `room`, as Google's fine-tuning does."""
    if len(first) + len(second) <= room:
        return first, second
    keep_first = max(room - len(second), min(len(first), (room + 1) // 2))
    return first[:keep_first], second[: room - keep_first]


def featurize(
    texts: Sequence[str], pairs: Sequence[str | None] | None, tokenizer: "Tokenizer", max_seq_len: int
) -> Features:
    """`[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`, cut to `max_seq_len` pieces."""
    pairs = pairs or [None] * len(texts)
    first = tokenizer.encode_batch(list(texts))
    second = tokenizer.encode_batch([pair or "" for pair in pairs]) if any(pairs) else [[]] * len(texts)
    ids, types, cut = [], [], 0
    for a, b, pair in zip(first, second, pairs, strict=True):
        whole = len(a) + len(b)
        a, b = truncate_pair(a, b, max_seq_len - (2 if pair is None else 3))
        cut += len(a) + len(b) < whole
        tail = [] if pair is None else [*b, tokenizer.sep_id]
        ids.append(np.array([tokenizer.cls_id, *a, tokenizer.sep_id, *tail], np.int32))
        types.append(np.array([0] * (len(a) + 2) + [1] * len(tail), np.int32))
    return Features(ids, types, cut)


def padded(length: int, steps: Sequence[int], most: int) -> int:
    """The first of `steps` that is not below `length`; `most` where there is none, or it is more."""
    return min(next((step for step in steps if step >= length), most), most)


def choose_lengths(lengths: np.ndarray, most: int, shapes: int = SHAPES) -> tuple[int, ...]:
    """At most `shapes` lengths, ascending, to which rows of `lengths`, none above `most`, are padded least."""
    if not len(lengths):
        return (most,)
    steps = np.array([*(step for step in TRAIN_LENGTHS if step < most), most])
    counts = np.bincount(np.searchsorted(steps, lengths), minlength=len(steps))
    used = np.flatnonzero(counts)

    def tokens(chosen: tuple[int, ...]) -> int:
        bounds = steps[list(chosen)]
        return int((counts[used] * bounds[np.searchsorted(bounds, steps[used])]).sum())

    shorter = itertools.combinations(used[:-1].tolist(), min(shapes, len(used)) - 1)
    best = min(((*some, int(used[-1])) for some in shorter), key=tokens)
    return tuple(steps[list(best)].tolist())


def batches_by_length(lengths: np.ndarray, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> int64 [B] rows of a training batch; rows of a batch are of similar length, so that little is padding.

    Each epoch has every row once, in an order of its own (`pipeline.row_numbers`); then the rows of WINDOW batches are
    sorted by length, dealt out, and those batches shuffled. A pure function of the step: nothing to save or rewind.
    """

    count = len(lengths)

    @functools.lru_cache(maxsize=4)
    def window(first: int, size: int) -> np.ndarray:
        found = [row_numbers(step, batch_size, count, seed) for step in range(first, first + size)]
        rows = np.concatenate(found)
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(size, batch_size)
        return rows[permute(np.arange(size), size, seed * 1_000_003 + first)]

    def rows_of(step: int) -> np.ndarray:
        epoch = step * batch_size // count
        begin, end = -(-epoch * count // batch_size), (epoch + 1) * count // batch_size  # its whole batches
        if not begin <= step < end:  # rows of two epochs, or more of a very small set
            return row_numbers(step, batch_size, count, seed)
        first = begin + (step - begin) // WINDOW * WINDOW
        return window(first, min(WINDOW, end - first))[step - first]

    return rows_of


def collate(features: Features, numbers: np.ndarray, pad_id: int, length: int) -> dict[str, np.ndarray]:
    """The encoder's batch [B, S] of `numbers`, padded to S = `length`; -1 is an empty row."""
    shape = (len(numbers), length)
    batch = {"input_ids": np.full(shape, pad_id, np.int32), "token_type_ids": np.zeros(shape, np.int32)}
    batch["segment_ids"] = np.zeros(shape, np.int32)
    for row, number in enumerate(numbers):
        if number >= 0:
            ids = features.ids[number]
            batch["input_ids"][row, : len(ids)] = ids
            batch["token_type_ids"][row, : len(ids)] = features.type_ids[number]
            batch["segment_ids"][row, : len(ids)] = 1
    batch["position_ids"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    return batch


class Labelled(NamedTuple):
    """Features and what each of them should give."""

    features: Features
    targets: dict[str, np.ndarray | list[np.ndarray]]
    """name -> array [n, ...], or a list of n arrays [S], one value a piece."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], pieces of each."""
        return np.array([len(ids) for ids in self.features.ids])


def labelled_batch(
    found: Labelled, rows: np.ndarray, pad_id: int, lengths: tuple[int, ...], *, share: np.ndarray
) -> dict[str, np.ndarray]:
    """Of the batch of `rows` (-1 only fills it) what stands at `share`, this host's places: `collate`, the targets,
    `label_weights` [B] unless they are among the targets, and `rows` [B].

    The length, the first of `lengths` with room for all, looks at the global batch, so that all hosts agree on it.
    """
    longest = max(len(found.features.ids[row]) for row in rows if row >= 0)
    mine, length = rows[share], padded(longest, lengths, lengths[-1])
    batch = collate(found.features, mine, pad_id, length)
    batch["label_weights"] = (mine >= 0).astype(np.float32)
    for name, values in found.targets.items():
        if isinstance(values, list):
            batch[name] = np.zeros((len(mine), length), values[0].dtype)
            for place, row in zip(batch[name], mine, strict=True):
                if row >= 0:
                    place[: len(values[row])] = values[row]
        else:
            batch[name] = values[np.maximum(mine, 0)]
            batch[name][mine < 0] = 0
    return batch | {"rows": mine.astype(np.int32)}


def rows_by_length(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """All rows once, [B] at a time, neighbours in length together; -1 fills the last batch."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)
