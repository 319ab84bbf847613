"""Texts and pairs as ids, and padded batches of them: what fine-tuning and prediction read.

Shapes: B batch, S sequence.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from bert_jax.data.tokenizer_model import Tokenizer

LENGTH_STEP = 32  # batches are padded to a multiple of this, so that few shapes compile


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


def padded_length(features: Features, numbers: np.ndarray, max_seq_len: int) -> int:
    """The length step that the longest of `numbers` needs (-1 is none), at most `max_seq_len`."""
    longest = max(len(features.ids[number]) for number in numbers if number >= 0)
    return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_seq_len)


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
