"""Texts as ids: truncation as Google's loop, single and pair inputs, padded batches."""

import itertools

import numpy as np
import pytest

from bert_jax.config import Config, TrainConfig, total_steps
from bert_jax.data.features import (
    SHAPES,
    TRAIN_LENGTHS,
    Labelled,
    batches_by_length,
    choose_lengths,
    collate,
    featurize,
    labelled_batch,
    truncate_pair,
)


def loop_truncation(first, second, room):
    """Google's way: one piece at a time off the longer list."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_truncation_is_the_loop_s():
    for a in range(14):
        for b in range(14):
            for room in range(15):
                lists = list(range(a)), list(range(b))
                assert truncate_pair(*lists, room) == loop_truncation(*lists, room), (a, b, room)


def test_features_are_single_and_pair_inputs(tokenizer):
    features = featurize(["the function", "the function"], [None, "returns a value " * 40], tokenizer, 32)
    encoding = tokenizer.encode("the function")
    assert features.ids[0].tolist() == encoding.ids and not features.type_ids[0].any()
    assert len(features.ids[1]) == 32 and features.ids[1][-1] == tokenizer.sep_id
    assert features.type_ids[1].tolist() == sorted(features.type_ids[1].tolist())
    assert features.type_ids[1].sum() == 32 - len(encoding.ids)
    assert features.cut == 1


@pytest.mark.parametrize("rows, batch_size", [(640, 16), (1000, 32), (37, 8), (5, 8)])
def test_batches_by_length_visit_every_row_once_an_epoch(rows, batch_size):
    lengths = np.random.default_rng(0).integers(5, 80, rows)
    steps = total_steps(Config(train=TrainConfig(num_epochs=3, global_batch_size=batch_size)), rows)
    rows_of = batches_by_length(lengths, batch_size, 7)
    batches = [rows_of(step) for step in range(steps)]
    for epoch in range(3):  # each epoch's places hold every row; only a batch of two epochs may hold one twice
        flat = np.concatenate(batches)[epoch * rows : (epoch + 1) * rows]
        if len(flat) == rows and rows % batch_size == 0:
            assert sorted(flat) == list(range(rows))
    for step, batch in enumerate(batches):
        if step * batch_size // rows == ((step + 1) * batch_size - 1) // rows:
            assert len(set(batch.tolist())) == batch_size
    counts = np.bincount(np.concatenate(batches), minlength=rows)
    assert abs(counts - steps * batch_size / rows).max() < 1  # as many times as the run has epochs, up or down
    again = batches_by_length(lengths, batch_size, 7)
    for step in np.random.default_rng(1).permutation(steps):  # in whatever order they are asked for
        np.testing.assert_array_equal(again(int(step)), batches[step])
    assert not np.array_equal(batches_by_length(lengths, batch_size, 8)(0), batches[0])


def test_batches_by_length_hold_little_padding():
    lengths = np.random.default_rng(0).integers(5, 80, 3000)
    rows_of = batches_by_length(lengths, 32, 0)
    batches = [lengths[rows_of(step)] for step in range(256)]
    assert sum(batch.sum() for batch in batches) / sum(batch.max() * 32 for batch in batches) > 0.95
    longest = [batch.max() for batch in batches[:64]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_lengths_are_few_and_pad_least():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4, 7, 2000).astype(int), 3, 128)
    chosen = choose_lengths(lengths, 128)
    assert len(chosen) == SHAPES and list(chosen) == sorted(chosen) and chosen[-1] >= lengths.max()

    def tokens(bounds):
        return np.array(bounds)[np.searchsorted(bounds, lengths)].sum()

    last = next(step for step in TRAIN_LENGTHS if step >= lengths.max())
    others = [step for step in TRAIN_LENGTHS if step < last]
    for some in itertools.combinations(others, SHAPES - 1):
        assert tokens(chosen) <= tokens([*some, last])
    assert choose_lengths(np.array([5, 9]), 128) == (12,)
    assert choose_lengths(np.array([5, 100]), 100) == (12, 100)
    assert choose_lengths(np.array([], int), 64) == (64,)


def test_a_special_piece_in_a_text_is_text(tokenizer):
    ids = featurize(["a [SEP] b"], None, tokenizer, 32).ids[0].tolist()
    assert ids.count(tokenizer.sep_id) == 1 and ids[-1] == tokenizer.sep_id


def test_batches_are_padded_to_few_lengths(tokenizer):
    features = featurize(["word " * n for n in (3, 50, 10)], None, tokenizer, 64)
    numbers = np.array([0, 2, -1, -1])

    def length_of(numbers, lengths):
        rows = np.array(numbers)
        batch = labelled_batch(Labelled(features, {}), rows, tokenizer.pad_id, lengths, share=np.arange(len(rows)))
        return batch["input_ids"].shape[1]

    assert length_of(numbers, (16, 24, 64)) == 24
    assert length_of([0], (16, 24, 64)) == 16
    assert length_of([0, 1], (16, 24, 64)) == 64
    assert length_of([1, -1], (64,)) == 64
    batch = collate(features, numbers, tokenizer.pad_id, 32)
    assert batch["input_ids"].shape == (4, 32)
    assert batch["segment_ids"].sum(1).tolist() == [len(features.ids[0]), len(features.ids[2]), 0, 0]
    assert (batch["input_ids"][batch["segment_ids"] == 0] == tokenizer.pad_id).all()
    assert batch["position_ids"][1].tolist() == list(range(32))
