"""A label for each word, and the entities they spell (Devlin et al. 2019, section 5.3; CoNLL-2003)."""

import functools
import itertools
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import Config, ModelConfig
from bert_jax.data.features import Features, Labelled
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.errors import DataError
from bert_jax.heads import ClassifierHead
from bert_jax.tasks import (
    Batch,
    Objective,
    Params,
    Sums,
    Task,
    cut_note,
    encode,
    init_encoder,
    loss_and_accuracy,
    runner,
    take_tokenizer,
    tokenizer_of,
)


class Sentence(NamedTuple):
    """Words and their labels; `line` is where it begins in its file."""

    words: list[str]
    labels: list[str]
    line: int


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


# Reading


def read_sentences(path: str) -> list[Sentence]:
    """Sentences of a file in CoNLL's columns: the word first, its label last, a blank line between sentences.

    Lines that begin with -DOCSTART- part documents and are left out. Raises DataError naming file and line.
    """
    found, words, labels, line = [], [], [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line, text in enumerate(itertools.chain(file, [""]), 1):
                cells = re.split(r"[ \t]+", text.strip())  # other blanks, such as no-break spaces, are of words
                cells = cells if cells[0] else []
                if cells and cells[0] != "-DOCSTART-":
                    if len(cells) < 2:
                        raise DataError(f"{path}: line {line}: {cells[0]!r} has no label; give word and label")
                    if cells[-1][:2] in ("E-", "S-", "L-", "U-"):
                        raise DataError(f"{path}: line {line}: {cells[-1]!r} is of IOBES or BILOU; write B-, I- and O")
                    words.append(cells[0])
                    labels.append(cells[-1])
                elif words:
                    found.append(Sentence(words, labels, line - len(words)))
                    words, labels = [], []
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {line} ({error.reason}); convert it to UTF-8") from error
    if not found:
        raise DataError(f"{path}: no sentences in it")
    return found


def label_names(path: str, sentences: list[Sentence]) -> tuple[str, ...]:
    """Distinct labels, O first, then by kind."""
    names = {label for sentence in sentences for label in sentence.labels}
    if len(names) < 2:
        raise DataError(f"{path}: every word has the label {names.pop()!r}; two at least are needed")
    return tuple(sorted(names, key=lambda name: (name != "O", name[2:] if name[1:2] == "-" else name, name)))


def label_numbers(path: str, sentences: list[Sentence], labels: tuple[str, ...]) -> list[np.ndarray]:
    """int32 [words] of each sentence. Raises DataError on a label that training never saw."""
    number = {name: index for index, name in enumerate(labels)}
    for sentence in sentences:
        for place, label in enumerate(sentence.labels):
            if label not in number:
                raise DataError(
                    f"{path}: line {sentence.line + place}: label {label!r} is not among the training labels "
                    f"{', '.join(labels)}"
                )
    return [np.array([number[label] for label in sentence.labels], np.int32) for sentence in sentences]


# The model


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


def sums(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None) -> Sums:
    """Cross-entropy and accuracy over the first pieces of words."""
    return loss_and_accuracy("", logits(config, params, batch, key), batch["labels"], batch["label_weights"])


def outputs(config: ModelConfig, params: Params, batch: Batch, *, length: int) -> dict[str, jax.Array]:
    """What `score` is made of: the label of every piece, padded to [B, length]."""
    labels = logits(config, params, batch).argmax(-1).astype(jnp.int32)
    return {"labels": jnp.pad(labels, ((0, 0), (0, length - labels.shape[1]))), "rows": batch["rows"]}


# Words and windows


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


def piece_labels(shown: Windows, labels: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """`labels` int32 [S] and `label_weights` float32 [S] of each window: 1 at the first piece of a word, in the one
    window in which it is scored."""
    found = {"labels": [], "label_weights": []}
    for row in shown.features.ids:
        found["labels"].append(np.zeros(len(row), np.int32))
        found["label_weights"].append(np.zeros(len(row), np.float32))
    for numbers, mine in zip(shown.of_sentence, labels, strict=True):
        ranges = [shown.ranges[number] for number in numbers]
        for word, label in enumerate(mine):
            best = best_window(word, ranges)
            place = shown.starts[numbers[best]][word - ranges[best][0]]
            found["labels"][numbers[best]][place] = label
            found["label_weights"][numbers[best]][place] = 1
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


def score_entities(real: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """precision, recall and f1 of whole entities over all sentences, 0 to 1, as conlleval counts them."""
    true, found = (
        {(number, *entity) for number, labels in enumerate(sentences) for entity in entities(labels)}
        for sentences in (real, predicted)
    )
    right = len(true & found)
    precision, recall = (right / len(some) if some else 0.0 for some in (found, true))
    return {"precision": precision, "recall": recall, "f1": 2 * right / (len(true) + len(found)) if right else 0.0}


# The task

complete = take_tokenizer


def init_params(config: Config, key: jax.Array) -> Params:
    """`init` with the labels that the training file names."""
    path = config.task.files["train"]
    return init(config.model, len(label_names(path, read_sentences(path))), key)


def known_rows(config: Config) -> int | None:
    """Unknown before sentences are cut into windows."""
    return None


def build(config: Config) -> Task:
    """Reads, cuts into windows and binds the functions above to them."""
    task, length, tokenizer = config.task, config.data.max_seq_len, tokenizer_of(config)
    paths = task.files
    read = {name: read_sentences(path) for name, path in paths.items()}
    labels = label_names(paths["train"], read["train"])
    shown, ready = {}, {}
    for name, sentences in read.items():
        numbers = label_numbers(paths[name], sentences, labels)
        shown[name] = featurize(word_ids([sentence.words for sentence in sentences], tokenizer), tokenizer, length)
        ready[name] = Labelled(shown[name].features, piece_labels(shown[name], numbers))

    def predicted(name: str, found: dict[str, np.ndarray]) -> list[list[str]]:
        return [[labels[number] for number in row] for row in decode(shown[name], list(found["labels"]))]

    def score(name: str, found: dict[str, np.ndarray]) -> dict[str, float]:
        return score_entities([sentence.labels for sentence in read[name]], predicted(name, found))

    def write(folder: str, name: str, found: dict[str, np.ndarray]) -> None:
        """`folder/name.conll`: word, true label, predicted label, as conlleval reads them."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{name}.conll"), "w", encoding="utf-8") as file:
            for sentence, row in zip(read[name], predicted(name, found), strict=True):
                file.writelines(
                    f"{word} {true} {label}\n"
                    for word, true, label in zip(sentence.words, sentence.labels, row, strict=True)
                )
                file.write("\n")

    kinds = Counter(entity.kind for sentence in read["train"] for entity in entities(sentence.labels))
    counts = ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items()))
    cut = sum(found.features.cut for found in shown.values())
    objective = Objective(
        init=functools.partial(init, config.model, len(labels)),
        sums=functools.partial(sums, config.model),
        weights=lambda batch: {"loss": batch["label_weights"].sum()},
        losses=("loss",),
        layers=config.model.layers_apart,
    )
    return Task(
        objective,
        **runner(config, ready, tokenizer.pad_id),
        tokenizer=tokenizer,
        facts=f"{len(read['train']):,} sentences ({counts}) from {paths['train']} "
        f"in {len(shown['train'].ranges):,} windows" + cut_note(cut, "words", length - 2),
        labels=labels,
        metric="f1",
        outputs=functools.partial(outputs, config.model, length=length),
        score=score,
        write_predictions=write,
    )
