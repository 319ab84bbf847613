"""The answer to a question as a span of a text (Devlin et al. 2019, section 4.2; Rajpurkar et al. 2016)."""

from typing import NamedTuple

import jax
import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.heads import ClassifierHead
from bert_jax.tasks import Batch, Params, encode, init_encoder

MAX_QUESTION, STRIDE, MAX_ANSWER = 64, 128, 30  # pieces, as in google-research/bert's run_squad.py


class Span(NamedTuple):
    """Pieces `first` to `last`, both included, of a window, and the sum of their scores."""

    score: float
    first: int
    last: int


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Encoder and span head."""
    keys = jax.random.split(key, 2)
    head = ClassifierHead(config, 2).init(keys[1], np.zeros((1, config.hidden_size), np.float32))
    return init_encoder(config, keys[0]) | {"span_head": head["params"]}


def logits(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores [B, S, 2] of every token as the first and as the last of the answer."""
    hidden = encode(config, params, batch, key)
    return ClassifierHead(config, 2).apply({"params": params["span_head"]}, hidden)


def windows(length: int, room: int) -> list[tuple[int, int]]:
    """Ranges of at most `room` pieces that cover `length` of them, each STRIDE (or half of `room`) after the last."""
    stride = min(STRIDE, max(1, room // 2))
    starts = range(0, max(1, length - room + stride), stride)
    return [(start, min(start + room, length)) for start in starts]


def has_most_context(ranges: list[tuple[int, int]], number: int) -> np.ndarray:
    """For each piece of window `number`, whether no other window shows it with more text on its scarcer side.

    Google's measure: the smaller of the pieces to the left and to the right, plus a hundredth of the window's length.
    """
    first, last = ranges[number]

    def context(window: tuple[int, int], piece: np.ndarray) -> np.ndarray:
        margin = np.minimum(piece - window[0], window[1] - 1 - piece)
        return np.where(margin >= 0, margin + 0.01 * (window[1] - window[0]), -1)

    piece = np.arange(first, last)
    scores = np.stack([context(window, piece) for window in ranges])
    return scores.argmax(0) == number


def best_spans(scores: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int = 1) -> list[Span]:
    """The `count` best of all spans of at most MAX_ANSWER pieces, best first.

    `scores` [S, 2]; bool [S] `starts` and `ends` tell where an answer may start and end.
    """
    first = np.where(starts, scores[:, 0], -np.inf)
    last = np.pad(np.where(ends, scores[:, 1], -np.inf), (0, MAX_ANSWER - 1), constant_values=-np.inf)
    sums = first[:, None] + np.lib.stride_tricks.sliding_window_view(last, MAX_ANSWER)  # [S, MAX_ANSWER]
    best = np.argsort(-sums, axis=None, kind="stable")[:count]
    return [
        Span(float(sums.flat[place]), int(place // MAX_ANSWER), int(place // MAX_ANSWER + place % MAX_ANSWER))
        for place in best
        if np.isfinite(sums.flat[place])
    ]
