"""A label for each word, and the entities they spell (Devlin et al. 2019, section 5.3; CoNLL-2003)."""

import itertools
import unicodedata
from typing import NamedTuple

import jax
import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.data.features import Features
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.heads import ClassifierHead
from bert_jax.tasks import Batch, Params, encode, init_encoder


class Word(NamedTuple):
    """A word of a text: its characters and the ids of its pieces."""

    span: tuple[int, int]
    ids: list[int]


class Windows(NamedTuple):
    """Sentences as the encoder reads them: each in one window, or in several that overlap."""

    features: Features
    """A row a window; `cut` counts the words that lost pieces because a window cannot hold them all."""
    of_sentence: list[range]
    """The windows of each sentence."""
    ranges: list[tuple[int, int]]
    """The words of its sentence that a window shows, the last not included."""
    starts: list[np.ndarray]
    """Where the first piece of each of them stands in the row."""


class Entity(NamedTuple):
    """Words `first` to `last`, the latter not included, of one kind."""

    kind: str
    first: int
    last: int


def init(config: ModelConfig, num_labels: int, key: jax.Array) -> Params:
    """Encoder and tagger."""
    keys = jax.random.split(key, 2)
    head = ClassifierHead(config, num_labels).init(keys[1], np.zeros((1, config.hidden_size), np.float32))
    return init_encoder(config, keys[0]) | {"tagger": head["params"]}


def logits(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores [B, S, C] of every token's label."""
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    hidden = encode(config, params, batch, encoder_key)  # [B, S, D]
    num_labels = params["tagger"]["dense"]["bias"].shape[0]
    head = ClassifierHead(config, num_labels, config.hidden_dropout, deterministic=key is None)
    return head.apply({"params": params["tagger"]}, hidden, rngs=None if key is None else {"dropout": head_key})


def split_words(text: str, tokenizer: Tokenizer) -> list[Word]:
    """The words of a text as its tokenizer tells them apart; accents and other marks behind one belong to it."""
    found: list[Word] = []
    for _, index, (start, end) in tokenizer.pieces(text):
        if found and tokenizer.continuation[index]:
            found[-1] = Word((found[-1].span[0], end), [*found[-1].ids, index])
        else:
            found.append(Word((start, end), [index]))
    following = [word.span[0] for word in found[1:]] + [len(text)]
    return [
        word._replace(span=(word.span[0], _after_marks(text, word.span[1], limit)))
        for word, limit in zip(found, following, strict=False)
    ]


def _after_marks(text: str, end: int, limit: int) -> int:
    while end < limit and unicodedata.category(text[end]) in ("Mn", "Mc", "Me", "Cf"):
        end += 1
    return end


def word_ids(sentences: list[list[str]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """The ids of each word of sentences that are given as words; none is empty."""
    pieces = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(sentences))))
    return [[ids or [tokenizer.unk_id] for ids in itertools.islice(pieces, len(words))] for words in sentences]


def featurize(sentences: list[list[list[int]]], tokenizer: Tokenizer, longest: int) -> Windows:
    """Sentences, given as the ids of their words, in windows of at most `longest` pieces."""
    room = longest - 2
    found, cut = Windows(Features([], []), [], [], []), 0
    for mine in sentences:
        cut += sum(len(ids) > room for ids in mine)
        ranges = windows([len(ids) for ids in mine], room)
        found.of_sentence.append(range(len(found.ranges), len(found.ranges) + len(ranges)))
        found.ranges.extend(ranges)
        for first, last in ranges:
            parts = [ids[:room] for ids in mine[first:last]]
            row = np.array([tokenizer.cls_id, *itertools.chain.from_iterable(parts), tokenizer.sep_id], np.int32)
            found.features.ids.append(row)
            found.features.type_ids.append(np.zeros_like(row))
            found.starts.append(1 + np.cumsum([0, *map(len, parts[:-1])]))
    return found._replace(features=found.features._replace(cut=cut))


def decode(shown: Windows, scores: list[np.ndarray]) -> list[np.ndarray]:
    """Scores [S, C] of each window -> scores [words, C] of each sentence: those of a word's first piece, from the
    window in which it is farthest from an edge."""
    found = []
    for numbers in shown.of_sentence:
        ranges = [shown.ranges[number] for number in numbers]
        rows = []
        for word in range(ranges[-1][1] if ranges else 0):
            best = best_window(word, ranges)
            number = numbers[best]
            rows.append(scores[number][shown.starts[number][word - ranges[best][0]]])
        found.append(np.array(rows))
    return found


def windows(counts: list[int], room: int) -> list[tuple[int, int]]:
    """Ranges of words, (first, last), that cover all words with at most `room` pieces each.

    `counts` are the pieces of each word. A range begins a quarter of `room` before the one in front of it ends, so that
    every word is somewhere away from an edge. A word longer than `room` counts as `room`: its end is cut.
    """
    counts = [min(count, room) for count in counts]
    found, first = [], 0
    while first < len(counts):
        last, pieces = first, 0
        while last < len(counts) and pieces + counts[last] <= room:
            pieces, last = pieces + counts[last], last + 1
        found.append((first, last))
        if last == len(counts):
            break
        back, pieces, shared = last, 0, min(room // 4, room - counts[last])
        while back > first + 1 and pieces + counts[back - 1] <= shared:
            pieces, back = pieces + counts[back - 1], back - 1
        first = back
    return found


def best_window(word: int, ranges: list[tuple[int, int]]) -> int:
    """The window in which a word is farthest from an edge of the text that the window shows."""
    margins = [min(word - first, last - 1 - word) if first <= word < last else -1 for first, last in ranges]
    return margins.index(max(margins))


def entities(labels: list[str]) -> list[Entity]:
    """The spans of IOB labels of words, as the CoNLL-2003 scorer reads them.

    B- starts a span; I- goes on with one of its kind, and starts one where there is none. Labels without B- or I- are
    kinds by themselves, neighbours of one kind making one span; O is none.
    """
    found: list[Entity] = []
    for number, label in enumerate([*labels, "O"]):
        prefix, kind = label.split("-", 1) if label[:2] in ("B-", "I-") else ("I", label)
        goes_on = bool(found) and found[-1].last == number and found[-1].kind == kind and prefix == "I"
        if kind == "O":
            continue
        if goes_on:
            found[-1] = found[-1]._replace(last=number + 1)
        else:
            found.append(Entity(kind, number, number + 1))
    return found
