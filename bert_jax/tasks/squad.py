"""The answer to a question as a span of a text (Devlin et al. 2019, section 4.2; Rajpurkar et al. 2016)."""

from typing import NamedTuple

import jax
import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.data.features import Features
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.errors import DataError
from bert_jax.heads import ClassifierHead
from bert_jax.tasks import Batch, Params, encode, init_encoder

MAX_QUESTION, STRIDE, MAX_ANSWER = 64, 128, 30  # pieces, as in google-research/bert's run_squad.py


class Windows(NamedTuple):
    """Questions as the encoder reads them: each with all of its context, or several times with overlapping parts."""

    features: Features
    """A row a window; `cut` counts the questions that lost their end."""
    of_question: list[range]
    """The windows of each question."""
    ranges: list[tuple[int, int]]
    """The pieces of its context that a window shows, the last not included."""
    begin: list[int]
    """Where the first of them stands in the row."""
    spans: list[list[tuple[int, int]]]
    """The characters of each piece of each context."""


class Answer(NamedTuple):
    """Characters `start` to `end`, the latter not included, of a context; `score` is the sum of both ends' logits."""

    score: float
    start: int
    end: int


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


def featurize(questions: list[str], contexts: list[str], tokenizer: Tokenizer, longest: int) -> Windows:
    """`[CLS] question [SEP] part of the context [SEP]` in windows of at most `longest` pieces.

    A question is cut to MAX_QUESTION pieces, or half of `longest`. Raises DataError on a context without any text.
    """
    found, cut = Windows(Features([], []), [], [], [], []), 0
    most = min(MAX_QUESTION, longest // 2)
    for asked, context in zip(tokenizer.encode_batch(questions), contexts, strict=True):
        pieces = tokenizer.pieces(context)
        if not pieces:
            raise DataError("context: no text in it")
        cut += len(asked) > most
        head = [tokenizer.cls_id, *asked[:most], tokenizer.sep_id]
        ranges = windows(len(pieces), longest - len(head) - 1)
        found.of_question.append(range(len(found.ranges), len(found.ranges) + len(ranges)))
        found.ranges.extend(ranges)
        found.spans.append([span for _, _, span in pieces])
        for first, last in ranges:
            shown = [index for _, index, _ in pieces[first:last]]
            row = np.array([*head, *shown, tokenizer.sep_id], np.int32)
            found.features.ids.append(row)
            found.features.type_ids.append((np.arange(len(row)) >= len(head)).astype(np.int32))
            found.begin.append(len(head))
    return found._replace(features=found.features._replace(cut=cut))


def decode(shown: Windows, scores: list[np.ndarray], count: int = 1) -> list[list[Answer]]:
    """Scores [S, 2] of each window -> the `count` best answers to each question, best first.

    A piece is where an answer starts only in the window that shows it with most context.
    """
    found = []
    for numbers, spans in zip(shown.of_question, shown.spans, strict=True):
        ranges = [shown.ranges[number] for number in numbers]
        answers = []
        for place, number in enumerate(numbers):
            first, last = ranges[place]
            of_context = scores[number][shown.begin[number] : shown.begin[number] + last - first]
            starts = has_most_context(ranges, place)
            for score, start, end in best_spans(of_context, starts, np.ones_like(starts), count):
                answers.append(Answer(score, spans[first + start][0], spans[first + end][1]))
        found.append(sorted(answers, key=lambda answer: -answer.score)[:count])
    return found


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
