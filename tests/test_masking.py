"""Dynamic masking: rates, what replaces what, and that random numbers need no state."""

import numpy as np
import pytest

from bert_jax.data.masking import Vocabulary, mask_tokens

VOCAB, LENGTH = 5000, 128
SPECIAL = np.arange(7)


def vocabulary(whole_words: bool) -> Vocabulary:
    regular = np.ones(VOCAB, bool)
    regular[SPECIAL] = False
    continuation = np.random.default_rng(1).random(VOCAB) < 0.3
    continuation[SPECIAL] = False
    return Vocabulary(4, regular, continuation if whole_words else None)


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Rows of two packed examples and padding at the end."""
    ids = np.random.default_rng(seed).integers(len(SPECIAL), VOCAB, (count, LENGTH)).astype(np.int32)
    ids[:, 0], ids[:, 40], ids[:, 60], ids[:, 61], ids[:, 119] = 2, 3, 3, 2, 3
    ids[:, 120:] = 0
    return ids


def mask(ids, whole_words=False, key=(0, 0), first=0):
    return mask_tokens(
        ids,
        vocabulary=vocabulary(whole_words),
        mask_rate=0.15,
        gather_width=24 if whole_words else 20,
        key=key,
        row_numbers=first + np.arange(len(ids)),
    )


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_million_tokens(whole_words):
    """15 % +- 0.1, of these 80/10/10 +- 0.5, no special token chosen nor inserted."""
    ids = rows(1_100_000 // LENGTH + 1)
    found = mask(ids, whole_words)
    chosen = found["masked_lm_weights"] > 0
    regular = ~np.isin(ids, SPECIAL)
    assert regular.sum() > 900_000
    assert abs(chosen.sum() / regular.sum() - 0.15) < 0.001
    original = np.take_along_axis(ids, found["masked_lm_positions"], 1)[chosen]
    now = np.take_along_axis(found["input_ids"], found["masked_lm_positions"], 1)[chosen]
    assert np.array_equal(original, found["masked_lm_ids"][chosen])
    assert not np.isin(original, SPECIAL).any()
    assert not np.isin(now[now != 4], SPECIAL).any()
    assert abs((now == 4).mean() - 0.8) < 0.005
    assert abs((now == original).mean() - 0.1) < 0.005
    inserted = now[(now != 4) & (now != original)]
    assert len(np.unique(inserted)) > 0.9 * VOCAB  # from the whole vocabulary


@pytest.mark.parametrize("whole_words", [False, True])
def test_only_chosen_positions_change_and_each_is_listed_once(whole_words):
    ids = rows(64)
    found = mask(ids, whole_words)
    for row in range(len(ids)):
        weights = found["masked_lm_weights"][row] > 0
        positions = found["masked_lm_positions"][row][weights]
        assert np.array_equal(positions, np.unique(positions))
        assert set(np.flatnonzero(found["input_ids"][row] != ids[row])) <= set(positions)
        assert not found["masked_lm_positions"][row][~weights].any()
        assert not found["masked_lm_ids"][row][~weights].any()


def test_whole_words_are_chosen_whole():
    ids, words = rows(200), vocabulary(True)
    found = mask(ids, whole_words=True)
    for row in range(len(ids)):
        positions = set(found["masked_lm_positions"][row][found["masked_lm_weights"][row] > 0])
        for position in positions:
            following = position + 1
            if words.regular[ids[row, following]] and words.continuation[ids[row, following]]:
                assert following in positions
            begins = not words.continuation[ids[row, position]] or not words.regular[ids[row, position - 1]]
            assert begins or position - 1 in positions


def test_random_numbers_follow_from_key_and_row():
    ids = rows(32)
    whole = mask(ids, key=(3, 9))
    for first in (0, 8, 24):
        part = mask(ids[first : first + 8], key=(3, 9), first=first)
        for name, values in part.items():
            assert np.array_equal(values, whole[name][first : first + 8])
    other = mask(ids, key=(3, 10))
    same = (whole["masked_lm_positions"] == other["masked_lm_positions"]).mean()
    assert same < 0.3


def test_rows_without_regular_tokens_choose_nothing():
    found = mask(np.zeros((4, LENGTH), np.int32))
    assert not found["masked_lm_weights"].any()
    assert not found["input_ids"].any()


def test_every_position_is_as_likely():
    ids = rows(20_000)
    found = mask(ids)
    chosen = found["masked_lm_weights"] > 0
    counts = np.bincount(found["masked_lm_positions"][chosen], minlength=LENGTH)
    regular = ~np.isin(ids[0], SPECIAL)
    assert counts[regular].min() > 0.15 * len(ids) * 0.9
    assert counts[regular].max() < 0.15 * len(ids) * 1.1
