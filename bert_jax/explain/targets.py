"""What attribution asks of a model: the row that it reads, and the score to be explained, for each kind of head.

Shapes: S sequence, C labels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import softmax

from bert_jax.bert import Bert
from bert_jax.config import PROBLEMS, ModelConfig, did_you_mean
from bert_jax.data.features import Features, collate, padded
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.explain.gradients import piece_logits
from bert_jax.explain.reading import Reading, assemble, read
from bert_jax.tasks import Batch, classify, ner, squad

# What a text is padded to: of MiniLM-L6, a length takes 8 s to compile, and 20 to 48 pieces take 2 to 4 s to run.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Target(NamedTuple):
    """A score, and what the model says."""

    reading: Reading
    numbers: tuple[int, int]
    """As `gradients.target_scores` takes them."""
    asked: range
    """The pieces whose label, answer or filling it is; empty for labels of texts."""
    name: str
    about: str
    """What `name` is the label of, in words; "" for labels of texts."""
    prediction: str
    probability: float | None
    """Of `prediction`; None for a number."""


def float32(config: ModelConfig) -> ModelConfig:
    """`config` with which attributions are computed: in bfloat16 their sum is off by percents."""
    return dataclasses.replace(config, dtype="float32")


def batch_of(reading: Reading, tokenizer: Tokenizer, longest: int) -> Batch:
    """The row as a batch [1, S], padded to one of LENGTHS."""
    length = padded(len(reading.ids), LENGTHS, longest)
    return collate(Features([reading.ids], [reading.sides]), np.array([0]), tokenizer.pad_id, length)


def baseline_of(batch: Batch, tokenizer: Tokenizer, name: str) -> Batch | None:
    """`batch` with [PAD] or [MASK] in the place of what is no [CLS], [SEP] or [MASK]; None for embeddings of zero."""
    if name == "zero":
        return None
    ids, kept = batch["input_ids"], [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    empty = tokenizer.pad_id if name == "pad" else tokenizer.mask_id
    return batch | {"input_ids": np.where(np.isin(ids, kept) | (batch["segment_ids"] == 0), ids, empty)}


_compiled = functools.cache(lambda function: jax.jit(function, static_argnums=0))


def _scores(function: Callable, bert: Bert, reading: Reading, *rest: int) -> np.ndarray:
    """`function(config, params, batch, *rest)`'s row, float32 [C] or, without padding, [S, C]."""
    batch = batch_of(reading, bert.tokenizer, bert.config.max_position_embeddings)
    row = np.asarray(_compiled(function)(float32(bert.config), bert.params, batch, *rest))[0]
    return row if row.ndim == 1 else row[: len(reading.ids)]


def _label_number(name: str, labels: tuple[str, ...]) -> int:
    if name not in labels:
        raise ConfigError(f"target: {name!r} is not among the labels {', '.join(labels)}{did_you_mean(name, labels)}")
    return labels.index(name)


def _only_one_text(pair: str | None, kind: str) -> None:
    if pair is not None:
        raise ConfigError(f"a second text: {kind} reads one")


def _numbered(word: int, count: int, what: str) -> int:
    if not 0 <= word < count:
        raise ConfigError(f"word: {word}, but the text has {count} {what}, numbered from 0")
    return word


def of_label(bert: Bert, text: str, pair: str | None, target: str | None, word: int | None) -> Target:
    """The logit of the label `target`, or of the likeliest one, or the number that a regression gives."""
    if word is not None:
        raise ConfigError("word: the label is of the whole text")
    texts = (text,) if pair is None else (text, pair)
    reading = read(bert.tokenizer, texts, list(map(bert.tokenizer.pieces, texts)), bert.config.max_position_embeddings)
    scores = _scores(classify.logits, bert, reading)
    best = int(scores.argmax())
    if bert.problem == PROBLEMS[2]:
        number = 0 if target is None else _label_number(target, bert.labels)
        said, probability = f"{scores[number]:.4g}", None
    else:
        number = best if target is None else _label_number(target, bert.labels)
        said, probability = bert.labels[best], float(softmax(scores)[best])
        if bert.problem == PROBLEMS[1]:  # each label for itself, as `Bert.classify` says it
            above = [name for name, score in zip(bert.labels, scores, strict=True) if score > 0]
            said, probability = ", ".join(above) or "(none)", None
    return Target(reading, (0, number), range(0), bert.labels[number], "", said, probability)


def of_word(bert: Bert, text: str, pair: str | None, target: str | None, word: int | None) -> Target:
    """The logit of a label at the first piece of word `word`, counted as `Bert.tag` does.

    Without `target` it is the word's likeliest label; without `word` the first word with another label than O.
    """
    _only_one_text(pair, "tag")
    tokenizer, pieces = bert.tokenizer, bert.tokenizer.pieces(text)
    words = ner.split_words(text, tokenizer)
    if not words:
        raise DataError(f"text: no word in {text!r}")
    begins = np.cumsum([0, *(len(one.ids) for one in words)])
    longest = bert.config.max_position_embeddings
    shown = ner.featurize([[one.ids for one in words]], tokenizer, longest)
    readings = []
    for first, last in shown.ranges:
        part = [
            piece
            for number in range(first, last)
            for piece in pieces[begins[number] : begins[number + 1]][: longest - 2]
        ]
        readings.append(assemble(tokenizer, (text,), [part], len(pieces)))
    scores = ner.decode(shown, [_scores(ner.logits, bert, reading) for reading in readings])[0]  # [words, C]
    said = [bert.labels[row.argmax()] for row in scores]
    chosen = next((place for place, label in enumerate(said) if label != "O"), 0) if word is None else word
    _numbered(chosen, len(words), "words")
    number = int(scores[chosen].argmax()) if target is None else _label_number(target, bert.labels)
    window = ner.best_window(chosen, shown.ranges)
    place = int(shown.starts[window][chosen - shown.ranges[window][0]])
    return Target(
        readings[window],
        (place, number),
        range(place, place + 1),
        bert.labels[number],
        f"label of word {chosen}, {text[slice(*words[chosen].span)]!r}",
        said[chosen],
        float(softmax(scores[chosen]).max()),
    )


def of_answer(bert: Bert, question: str, context: str | None, target: str | None, word: int | None) -> Target:
    """The sum of the logits of the best answer's first and last piece, in the window of the context that shows it.

    Of a model of SQuAD 2.0 it may be "no answer": [CLS] is its first and last piece.
    """
    if context is None:
        raise ConfigError("answer: a question needs a context")
    if target is not None or word is not None:
        raise ConfigError("target, word: of answers the best one is explained")
    tokenizer = bert.tokenizer
    asked, told = tokenizer.pieces(question), tokenizer.pieces(context)
    shown = squad.featurize([question], [context], tokenizer, bert.config.max_position_embeddings)
    head = shown.begin[0]
    readings = [
        assemble(tokenizer, (question, context), [asked[: head - 2], told[first:last]], len(asked) + len(told))
        for first, last in shown.ranges
    ]
    scores = [_scores(squad.logits, bert, reading) for reading in readings]  # [S, 2] each
    best: tuple[float, int, int, int] = (-np.inf, 0, 0, 0)
    for window, (first, last) in enumerate(shown.ranges):
        starts = squad.has_most_context(shown.ranges, window)
        for score, begin, end in squad.best_spans(scores[window][head : head + last - first], starts):
            best = max(best, (score, window, head + begin, head + end))
    null = min(range(len(scores)), key=lambda number: scores[number][0].sum())
    threshold = bert.null_threshold
    if threshold is not None and scores[null][0].sum() - best[0] > threshold:
        best = (0.0, null, 0, 0)
    _, window, begin, end = best
    spans = readings[window].spans
    text = context[spans[begin][0] : spans[end][1]] if begin else "(no answer)"
    chances = softmax(scores[window], axis=0)
    probability = float(chances[begin, 0] * chances[end, 1])
    return Target(
        readings[window], (begin, end), range(begin, end + 1), text, "answer to the question", text, probability
    )


def of_mask(bert: Bert, text: str, pair: str | None, target: str | None, word: int | None) -> Target:
    """The logit of the piece `target`, or of the likeliest one, at the [MASK] number `word`, or the first.

    Of a text that is longer than the model reads, it reads what stands around that [MASK].
    """
    _only_one_text(pair, "fill-mask")
    tokenizer, room = bert.tokenizer, bert.config.max_position_embeddings - 2
    pieces = tokenizer.pieces(text, special=True)
    masks = [place for place, (_, index, _) in enumerate(pieces) if index == tokenizer.mask_id]
    mask = tokenizer.id_to_token(tokenizer.mask_id)
    if not masks:
        raise DataError(f"text: no {mask} in {text!r}")
    chosen = masks[_numbered(word or 0, len(masks), mask)]
    first = max(0, min(chosen - room // 2, len(pieces) - room))
    reading = assemble(tokenizer, (text,), [pieces[first : first + room]], len(pieces))
    place = chosen - first + 1
    scores = _scores(piece_logits, bert, reading, place)[: tokenizer.vocab_size]
    best = int(scores.argmax())
    number = best if target is None else _piece_number(target, tokenizer)
    said, name = tokenizer.id_to_token(best), tokenizer.id_to_token(number)
    about = f"piece at {mask} {word or 0}" if len(masks) > 1 else f"piece at {mask}"
    return Target(reading, (place, number), range(place, place + 1), name, about, said, float(softmax(scores)[best]))


def _piece_number(target: str, tokenizer: Tokenizer) -> int:
    """The id of a piece, or of a word that is one piece."""
    known = tokenizer.token_to_id(target)
    if known is not None:
        return known
    ids = tokenizer.encode_batch([target])[0]
    if len(ids) != 1 or ids[0] == tokenizer.unk_id:
        shown = " ".join(map(tokenizer.id_to_token, ids))
        raise ConfigError(f"target: {target!r} is no piece of the vocabulary, which spells it {shown}; name a piece")
    return ids[0]


TARGETS = {"classify": of_label, "tag": of_word, "answer": of_answer, "fill-mask": of_mask}
