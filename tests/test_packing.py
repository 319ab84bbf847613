"""Packing and its inverse: every example once, none split, nothing lost."""

from random import Random

import numpy as np
import pytest

from bert_jax.data.packing import best_fit, example_length, fill_rows, max_examples_of, row_dtype, unpack_rows
from bert_jax.data.sentence_pairs import Example

PAD, CLS, SEP = 0, 101, 102


def random_lengths(count, capacity, seed=0):
    """Mostly full examples and some of any length, as prose gives."""
    rng = Random(seed)
    return [capacity if rng.random() < 0.7 else 5 + int(rng.random() * (capacity - 4)) for _ in range(count)]


@pytest.mark.parametrize(("capacity", "max_examples", "seed"), [(128, 8, 0), (128, 1, 1), (512, 32, 2), (40, 3, 3)])
def test_every_example_is_in_one_row_that_holds_it(capacity, max_examples, seed):
    lengths = random_lengths(3000, capacity, seed)
    rows = best_fit(lengths, capacity, max_examples)
    assert sorted(number for row in rows for number in row) == list(range(3000))
    assert all(sum(lengths[number] for number in row) <= capacity for row in rows)
    assert max(map(len, rows)) <= max_examples
    assert rows == best_fit(lengths, capacity, max_examples)


def test_rows_are_full():
    lengths = random_lengths(10_000, 128)
    rows = best_fit(lengths, 128, 8)
    assert sum(lengths) / (128 * len(rows)) > 0.99


def test_best_fit_takes_the_tightest_row():
    # 6 opens a row with 4 left, 5 one with 5 left; 4 must go to the first, 3 to the second; ties go by number
    assert best_fit([3, 4, 5, 6], 10, 9) == [[3, 1], [2, 0]]
    assert best_fit([5, 5, 5, 5], 10, 9) == [[0, 1], [2, 3]]
    assert best_fit([2, 2, 2], 10, 2) == [[0, 1], [2]]
    assert best_fit([], 10, 2) == []


def random_rows(seq_len, max_examples, count=400, seed=0):
    """Examples over a token stream of 1000, 1001, …, packed."""
    rng, examples = Random(seed), []
    for length in random_lengths(count, seq_len, seed):
        a = 1 + int(rng.random() * (length - 4))
        a_start, b_start = int(rng.random() * 5000), int(rng.random() * 5000)
        examples.append(Example(a_start, a_start + a, b_start, b_start + length - 3 - a, rng.random() < 0.5))
    rows = best_fit([example_length(example) for example in examples], seq_len, max_examples)
    dtype = row_dtype(seq_len, max_examples, 30_000)
    stream = np.arange(1000, 7000, dtype=dtype["input_ids"].base)
    records = fill_rows(examples, rows, lambda start, end: stream[start:end], dtype, pad_id=PAD, cls_id=CLS, sep_id=SEP)
    return examples, rows, records


def unpack_by_hand(examples, row, seq_len, max_examples):
    """What the model must see of a row, built token by token."""
    ids, types, segments, positions = [], [], [], []
    places, labels, weights = [0] * max_examples, [0] * max_examples, [0.0] * max_examples
    for slot, number in enumerate(row):
        a_start, a_end, b_start, b_end, is_random_next = examples[number]
        a, b = range(1000 + a_start, 1000 + a_end), range(1000 + b_start, 1000 + b_end)
        places[slot], labels[slot], weights[slot] = len(ids), int(is_random_next), 1.0
        tokens = [CLS, *a, SEP, *b, SEP]
        ids += tokens
        types += [0] * (len(a) + 2) + [1] * (len(b) + 1)
        segments += [slot + 1] * len(tokens)
        positions += range(len(tokens))
    padding = seq_len - len(ids)
    ids, types, segments = ids + [PAD] * padding, types + [0] * padding, segments + [0] * padding
    return ids, types, segments, positions + list(range(padding)), places, labels, weights


@pytest.mark.parametrize(("seq_len", "max_examples"), [(128, 8), (64, 1), (512, 32)])
def test_unpacking_inverts_packing(seq_len, max_examples):
    examples, rows, records = random_rows(seq_len, max_examples)
    restored = np.frombuffer(b"".join(record.tobytes() for record in records), records.dtype)
    batch = unpack_rows(restored)
    names = ("input_ids", "token_type_ids", "segment_ids", "position_ids")
    names += tuple(f"next_sentence_{name}" for name in ("positions", "labels", "weights"))
    assert set(batch) == set(names)
    expected = zip(*(unpack_by_hand(examples, row, seq_len, max_examples) for row in rows), strict=True)
    for name, values in zip(names, expected, strict=True):
        np.testing.assert_array_equal(batch[name], values, err_msg=name)
        assert batch[name].dtype == (np.float32 if name.endswith("weights") else np.int32)


def test_without_packing_a_row_is_google_s():
    stream = np.arange(100, dtype="<u2")
    dtype = row_dtype(12, max_examples_of(12, False), 100)
    examples = [Example(10, 13, 20, 22, False), Example(30, 31, 40, 48, True)]
    rows = best_fit([8, 12], 12, 1)
    records = fill_rows(examples, rows, lambda a, b: stream[a:b], dtype, pad_id=0, cls_id=1, sep_id=2)
    batch = unpack_rows(records[::-1])
    assert batch["input_ids"].tolist() == [
        [1, 10, 11, 12, 2, 20, 21, 2, 0, 0, 0, 0],
        [1, 30, 2, 40, 41, 42, 43, 44, 45, 46, 47, 2],
    ]
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 3 + [0] * 4, [0] * 3 + [1] * 9]
    assert (batch["segment_ids"] > 0).tolist() == [[True] * 8 + [False] * 4, [True] * 12]
    assert batch["position_ids"][1].tolist() == list(range(12))
    assert batch["next_sentence_positions"].tolist() == [[0], [0]]
    assert batch["next_sentence_labels"].tolist() == [[0], [1]]
    assert batch["next_sentence_weights"].tolist() == [[1.0], [1.0]]


def test_record_is_as_small_as_its_ids_allow():
    assert row_dtype(128, 8, 30_522).itemsize == 128 * 2 + 8 * 5
    assert row_dtype(128, 8, 65_536)["input_ids"].base == np.dtype("<u2")
    assert row_dtype(128, 8, 65_537)["input_ids"].base == np.dtype("<u4")
    assert [max_examples_of(seq_len, True) for seq_len in (8, 128, 512)] == [1, 8, 32]
    assert max_examples_of(512, False) == 1
