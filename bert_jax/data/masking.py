"""Dynamic masking (Devlin et al. 2019, section 3.1) of whole batches, with random numbers that need no state.

Shapes: B rows, S tokens, P masked positions of a row, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # the rest of the chosen tokens stays as it is
_NOT_CHOSEN = np.uint64(0xFFFF)  # rows are shorter than this
_LOW16, _UINT64_MAX = np.uint64(0xFFFF), np.uint64(2**64 - 1)


class Vocabulary(NamedTuple):
    """What masking needs to know of a tokenizer.

    regular: bool [V], pieces that may be chosen and inserted, that is, all but the special ones.
    continuation: bool [V], pieces that go on with a word; None masks pieces, not whole words.
    """

    mask_id: int
    regular: np.ndarray
    continuation: np.ndarray | None = None


def random_words(key: tuple[int, int], rows: np.ndarray, width: int) -> np.ndarray:
    """uint64 [B, width] random numbers of the rows numbered `rows` [B] in the stream `key`.

    Philox (Salmon et al. 2011) is a counter-based generator: a row's numbers depend on the key and the row number
    alone, so every host makes just those of its own rows, and nothing needs to be remembered.
    """
    blocks = -(-width // 4)  # one counter value gives four words
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # of numbers that follow each other
    words = [
        np.random.Philox(key=np.array(key, np.uint64), counter=[int(run[0]) * blocks, 0, 0, 0]).random_raw(
            len(run) * blocks * 4
        )
        for run in runs
    ]
    return np.concatenate(words).reshape(len(rows), blocks * 4)[:, :width]


def mask_tokens(
    input_ids: np.ndarray,
    *,
    vocabulary: Vocabulary,
    mask_rate: float,
    gather_width: int,
    key: tuple[int, int],
    row_numbers: np.ndarray,
) -> dict[str, np.ndarray]:
    """Chooses `mask_rate` of the regular tokens of each row; of these 80 % become [MASK], 10 % random, 10 % stay.

    Args:
      input_ids: int32 [B, S]; special ids, padding included, are never chosen.
      vocabulary: ids and word starts.
      mask_rate: share of the regular tokens, met exactly in expectation (the fraction of a token is drawn).
      gather_width: P, at most this many are chosen in a row.
      key, row_numbers: which random stream, and int64 [B] the rows' numbers in it.

    Returns:
      input_ids [B, S] with masks; masked_lm_positions, masked_lm_ids int32 [B, P] in order of position, zeros where
      masked_lm_weights float32 [B, P] is 0.
    """
    length = input_ids.shape[1]
    # The last two words of a row: luck of a word, rounding of the count.
    words = random_words(key, row_numbers, length + gather_width + 2)
    regular = vocabulary.regular[input_ids]  # [B, S]
    wanted = (mask_rate * regular.sum(1) + _uniform(words[:, -1])).astype(np.int64)
    wanted = np.minimum(wanted, gather_width)
    if vocabulary.continuation is None:
        positions = _choose_tokens(words[:, :length], regular, wanted, gather_width)
    else:
        starts = _word_starts(regular, vocabulary.continuation[input_ids])
        positions = _choose_words(words, regular, starts, wanted, gather_width)
    return _replace(input_ids, positions, words[:, length : length + gather_width], vocabulary)


def _replace(
    input_ids: np.ndarray, positions: np.ndarray, words: np.ndarray, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The batch of `mask_tokens`, once `positions` [B, P] are chosen; `words` [B, P] decide what stands there."""
    chosen = positions != _NOT_CHOSEN
    positions = np.where(chosen, positions, 0).astype(np.int32)
    original = np.where(chosen, np.take_along_axis(input_ids, positions, 1), 0)
    masked = input_ids.copy()
    row, column = np.nonzero(chosen)
    masked[row, positions[row, column]] = _replacements(words[row, column], original[row, column], vocabulary)
    return {
        "input_ids": masked,
        "masked_lm_positions": positions,
        "masked_lm_ids": original.astype(np.int32),
        "masked_lm_weights": chosen.astype(np.float32),
    }


def _uniform(words: np.ndarray) -> np.ndarray:
    """Floats in [0, 1) from the upper 53 bits of random words."""
    return (words >> np.uint64(11)) * 2.0**-53


def _choose_tokens(words: np.ndarray, regular: np.ndarray, wanted: np.ndarray, width: int) -> np.ndarray:
    """uint64 [B, P] positions of the `wanted` regular tokens with the smallest random words, then _NOT_CHOSEN."""
    position = np.arange(words.shape[1], dtype=np.uint64)
    keys = np.where(regular, (words & ~_LOW16) | position, _UINT64_MAX)
    smallest = np.sort(np.partition(keys, width - 1, axis=1)[:, :width], axis=1)
    chosen = np.where(np.arange(width) < wanted[:, None], smallest & _LOW16, _NOT_CHOSEN)
    return np.sort(chosen, axis=1)


def _word_starts(regular: np.ndarray, continuation: np.ndarray) -> np.ndarray:
    """[B, S] position at which the word of each token starts; a word never crosses a special token."""
    after_special = np.pad(~regular[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = ~continuation | after_special
    position = np.where(starts, np.arange(regular.shape[1]), 0)
    return np.maximum.accumulate(position, axis=1)


def _choose_words(
    words: np.ndarray, regular: np.ndarray, starts: np.ndarray, wanted: np.ndarray, width: int
) -> np.ndarray:
    """Like `_choose_tokens`, by whole words in random order.

    The word that would exceed `wanted` is taken with the probability that keeps the expected count exact.
    """
    length = regular.shape[1]
    position = np.arange(length, dtype=np.uint64)
    order = np.take_along_axis(words[:, :length], starts, 1) & ~np.uint64(0xFFFFFFFF)
    keys = np.where(regular, order | (starts.astype(np.uint64) << np.uint64(16)) | position, _UINT64_MAX)
    keys = np.sort(keys, axis=1)
    word = keys >> np.uint64(16)
    rank = np.arange(length)
    new = np.pad(word[:, 1:] != word[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = np.maximum.accumulate(np.where(new, rank, 0), axis=1)  # rank at which the word begins
    last = np.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = np.minimum.accumulate(np.where(last, rank + 1, length)[:, ::-1], axis=1)[:, ::-1]
    room = wanted[:, None] - first
    luck = _uniform(words[:, -2:-1])  # one draw a row
    whole = (room >= end - first) | ((room > 0) & (luck * (end - first) < room))
    chosen = whole & (end <= width) & (keys != _UINT64_MAX)
    return np.sort(np.where(chosen, keys & _LOW16, _NOT_CHOSEN), axis=1)[:, :width]


def _replacements(words: np.ndarray, original: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """What stands in place of each chosen token: 80 % [MASK], 10 % a random regular piece, 10 % itself."""
    draw = _uniform(words)
    pieces = np.flatnonzero(vocabulary.regular)
    random_ids = pieces[(words & np.uint64(0xFFFFFFFF)) % np.uint64(len(pieces))]
    replaced = np.where(draw < MASKED_SHARE + RANDOM_SHARE, random_ids, original)
    return np.where(draw < MASKED_SHARE, vocabulary.mask_id, replaced)
