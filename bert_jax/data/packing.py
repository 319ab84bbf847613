"""Rows of several examples: choosing them, their record on disk, and its inverse for training.

A row of S tokens holds up to E examples, one after the other from position 0, each `[CLS] A [SEP] B [SEP]`, and padding
after them. Letters for shapes: B rows, S tokens of a row, E examples of a row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bert_jax.data.sentence_pairs import Example, token_dtype

SPECIALS = 3  # [CLS] and two [SEP] of an example
TOKENS_PER_SLOT = 16  # E = S / 16; rows of shorter examples than this on average are not filled to the end


def max_examples_of(max_seq_len: int, pack: bool) -> int:
    """Examples that a row has room for, E."""
    return max(1, max_seq_len // TOKENS_PER_SLOT) if pack else 1


def example_length(example: Example) -> int:
    """Tokens that an example takes in a row."""
    return example.a_end - example.a_start + example.b_end - example.b_start + SPECIALS


def row_dtype(max_seq_len: int, max_examples: int, vocab_size: int) -> np.dtype:
    """The record of a row; `a_lengths` and `b_lengths` count tokens without special ones, and are 0 where none is."""
    return np.dtype(
        [
            ("input_ids", token_dtype(vocab_size), (max_seq_len,)),
            ("a_lengths", "<u2", (max_examples,)),
            ("b_lengths", "<u2", (max_examples,)),
            ("is_random_next", "u1", (max_examples,)),
        ]
    )


def best_fit(lengths: Sequence[int], capacity: int, max_examples: int) -> list[list[int]]:
    """Numbers of the examples of each row, by best-fit decreasing: longest first, each into the fullest row it fits.

    Johnson 1974. Rows are kept by the space they have left, and the set of those spaces as bits of one integer, so an
    example costs the same for any number of rows. Ties go by number, so the result depends on `lengths` alone.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        space -= length
        if space and len(rows[row]) < max_examples:
            rows_by_space[space].append(row)
            spaces |= 1 << space
    return rows


def fill_rows(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    read: Callable[[int, int], np.ndarray],
    dtype: np.dtype,
    *,
    pad_id: int,
    cls_id: int,
    sep_id: int,
) -> np.ndarray:
    """Records [B] of the rows that `best_fit` chose; `read(start, end)` gives the tokens of a span."""
    records = np.zeros(len(rows), dtype)
    records["input_ids"] = pad_id
    fields = (records[name] for name in dtype.names)
    for numbers, ids, a_lengths, b_lengths, is_random_next in zip(rows, *fields, strict=True):
        at = 0
        for slot, number in enumerate(numbers):
            a_start, a_end, b_start, b_end, is_random_next[slot] = examples[number]
            a_lengths[slot], b_lengths[slot] = a_end - a_start, b_end - b_start
            middle = at + 1 + a_end - a_start
            end = middle + 1 + b_end - b_start
            ids[at] = cls_id
            ids[at + 1 : middle] = read(a_start, a_end)
            ids[middle] = ids[end] = sep_id
            ids[middle + 1 : end] = read(b_start, b_end)
            at = end + 1
    return records


def unpack_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Model inputs of records [B], all int32 unless said.

    `input_ids`, `token_type_ids` (0 for A and its specials, 1 for B), `segment_ids` (1, 2, … by example, 0 = padding),
    `position_ids` (from 0 in each example) [B, S]; `next_sentence_positions` (of each [CLS]; 0 where no example is),
    `next_sentence_labels` (1 = random next, as Google's) and float32 `next_sentence_weights` [B, E].
    """
    count, seq_len = rows["input_ids"].shape
    a_lengths, b_lengths = rows["a_lengths"].astype(np.int32), rows["b_lengths"].astype(np.int32)
    present = a_lengths > 0  # [B, E]
    lengths = np.where(present, a_lengths + b_lengths + SPECIALS, 0)
    starts = np.cumsum(lengths, axis=1, dtype=np.int32) - lengths
    slots = present.shape[1]
    # A row is runs of equal values: A and B of each example, then padding. [B, 2E + 1], summing to S in each row
    runs = np.empty((count, 2 * slots + 1), np.int32)
    runs[:, 1:-1:2] = np.where(present, b_lengths + 1, 0)
    runs[:, 0:-1:2] = lengths - runs[:, 1:-1:2]
    runs[:, -1] = seq_len - lengths.sum(axis=1)
    run_starts = np.zeros_like(runs)
    run_starts[:, 0:-1:2] = run_starts[:, 1:-1:2] = starts
    run_starts[:, -1] = seq_len - runs[:, -1]
    segments = np.arange(2, 2 * slots + 3, dtype=np.int32)  # of each run: twice the segment number, plus the token type
    segments[-1] = 0
    codes = np.repeat(np.tile(segments, count), runs.ravel()).reshape(count, seq_len)
    token_starts = np.repeat(run_starts.ravel(), runs.ravel()).reshape(count, seq_len)
    return {
        "input_ids": rows["input_ids"].astype(np.int32),
        "token_type_ids": codes & 1,
        "segment_ids": codes >> 1,
        "position_ids": np.arange(seq_len, dtype=np.int32) - token_starts,
        "next_sentence_positions": np.where(present, starts, 0),
        "next_sentence_labels": rows["is_random_next"].astype(np.int32),
        "next_sentence_weights": present.astype(np.float32),
    }
