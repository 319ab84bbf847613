"""Texts as ids: truncation as Google's loop, single and pair inputs, padded batches."""

import numpy as np
import pytest

from bert_jax.config import Config, TrainConfig, total_steps
from bert_jax.data.features import batches_by_length, collate, featurize, padded_length, truncate_pair


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
    rows_of = batches_by_length(lengths, batch_size, 7, steps)
    batches = [rows_of(step) for step in range(steps)]
    counts = np.bincount(np.concatenate(batches), minlength=rows)
    assert abs(counts - steps * batch_size / rows).max() < 1  # as many times as the run has epochs, up or down
    again = batches_by_length(lengths, batch_size, 7, steps)
    for step in np.random.default_rng(1).permutation(steps):  # in whatever order they are asked for
        np.testing.assert_array_equal(again(int(step)), batches[step])
    assert not np.array_equal(batches_by_length(lengths, batch_size, 8, steps)(0), batches[0])


def test_batches_by_length_hold_little_padding():
    lengths = np.random.default_rng(0).integers(5, 80, 3000)
    rows_of = batches_by_length(lengths, 32, 0, 256)
    batches = [lengths[rows_of(step)] for step in range(256)]
    assert sum(batch.sum() for batch in batches) / sum(batch.max() * 32 for batch in batches) > 0.95
    longest = [batch.max() for batch in batches[:32]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_a_special_piece_in_a_text_is_text(tokenizer):
    ids = featurize(["a [SEP] b"], None, tokenizer, 32).ids[0].tolist()
    assert ids.count(tokenizer.sep_id) == 1 and ids[-1] == tokenizer.sep_id


def test_batches_are_padded_to_few_lengths(tokenizer):
    features = featurize(["word " * n for n in (3, 50, 10)], None, tokenizer, 64)
    numbers = np.array([0, 2, -1, -1])
    assert padded_length(features, numbers, 64) == 24
    assert padded_length(features, np.array([0]), 64) == 16
    assert padded_length(features, np.array([0, 1]), 64) == 64
    assert padded_length(features, np.array([1]), 52) == 52
    batch = collate(features, numbers, tokenizer.pad_id, 32)
    assert batch["input_ids"].shape == (4, 32)
    assert batch["segment_ids"].sum(1).tolist() == [len(features.ids[0]), len(features.ids[2]), 0, 0]
    assert (batch["input_ids"][batch["segment_ids"] == 0] == tokenizer.pad_id).all()
    assert batch["position_ids"][1].tolist() == list(range(32))
