"""The answer to a question as a span of a text (Devlin et al. 2019, sections 4.2 and 4.3; Rajpurkar et al. 2016, 2018).

Shapes: B batch of windows, S sequence.
"""

import collections
import functools
import json
import os
import re
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.attention import MASKED
from bert_jax.config import Config, ModelConfig
from bert_jax.data.features import Features, Labelled
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.heads import ClassifierHead
from bert_jax.progress import say
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

MAX_QUESTION, STRIDE, MAX_ANSWER = 64, 128, 30  # pieces, as in google-research/bert's run_squad.py
NEAR = 64  # characters around a wrong offset in which the answer is looked for


class Question(NamedTuple):
    """A question about a context, and the answers that people gave: their text, and where it starts."""

    id: str
    text: str
    context: str
    answers: list[tuple[str, int]]
    """None of them: the context does not say (SQuAD 2.0)."""


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
    """Scores [B, S, 2] of every token as the first and as the last of the answer; padding is neither."""
    hidden = encode(config, params, batch, key)
    scores = ClassifierHead(config, 2).apply({"params": params["span_head"]}, hidden)
    return jnp.where(batch["segment_ids"][..., None] > 0, scores, MASKED)


def sums(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None) -> Sums:
    """Cross-entropy of the answer's first and last piece, their mean; [CLS] is both where there is no answer."""
    scores, weights = logits(config, params, batch, key), batch["label_weights"]
    first, last = (
        loss_and_accuracy("", scores[..., side], batch[name], weights) for side, name in enumerate(("starts", "ends"))
    )
    return {"loss": ((first["loss"][0] + last["loss"][0]) / 2, weights.sum())}


def outputs(config: ModelConfig, params: Params, batch: Batch, *, length: int) -> dict[str, jax.Array]:
    """What `score` is made of: scores padded to [B, length, 2]."""
    scores = logits(config, params, batch)
    wide = jnp.pad(scores, ((0, 0), (0, length - scores.shape[1]), (0, 0)), constant_values=MASKED)
    return {"logits": wide, "rows": batch["rows"]}


# Reading


def read_questions(path: str) -> list[Question]:
    """The questions of a file in SQuAD's JSON layout, all of it seen to be sound. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = [
                Question(
                    str(asked["id"]),
                    asked["question"],
                    paragraph["context"],
                    [(answer["text"], answer["answer_start"]) for answer in asked.get("answers", [])]
                    if not asked.get("is_impossible")
                    else [],
                )
                for article in json.load(file)["data"]
                for paragraph in article["paragraphs"]
                for asked in paragraph["qas"]
            ]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not in SQuAD's JSON layout ({type(error).__name__}: {error})") from error
    if not found:
        raise DataError(f"{path}: no questions in it")
    counts = collections.Counter(question.id for question in found)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise DataError(f"{path}: two questions have the id {twice[0]!r}, and predictions go by id; rename one")
    for question in found:
        for name, text in (("question", question.text), ("context", question.context)):
            if not isinstance(text, str) or not any(map(str.isprintable, text.replace(" ", ""))):
                raise DataError(f"{path}: question {question.id}: its {name} is {text!r}, no text")
        for text, start in question.answers:
            if not isinstance(text, str) or not text.strip() or type(start) is not int:
                raise DataError(f"{path}: question {question.id}: an answer is {text!r} at {start!r}")
    return found


def repair(questions: list[Question], path: str) -> list[Question]:
    """Training questions with their first answer where it really stands; says what was wrong.

    An answer whose offset does not match the text is moved when it occurs exactly once near it; else its question is
    left out.
    """
    kept, moved, lost = [], 0, 0
    for question in questions:
        if not question.answers:
            kept.append(question)
            continue
        text, start = question.answers[0]
        place = start if question.context.startswith(text, max(start, 0)) else find_near(question.context, text, start)
        moved += place is not None and place != start
        lost += place is None
        if place is not None:
            kept.append(question._replace(answers=[(text, place)]))
    if moved or lost:
        say(f"note: {path}: {moved + lost} answers are not where they should be: {moved} moved, {lost} left out")
    return kept


def find_near(context: str, text: str, start: int) -> int | None:
    """Where `text` begins, if it does so exactly once at most NEAR characters from `start`."""
    first, last = max(0, start - NEAR), start + NEAR + len(text)
    found = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context[first:last])]
    return first + found[0] if len(found) == 1 else None


# The model


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


def decode(
    shown: Windows, scores: list[np.ndarray], count: int = 1, null_threshold: float | None = None
) -> list[list[Answer]]:
    """Scores [S, 2] of each window -> the `count` best answers to each question, best first.

    A piece is where an answer starts only in the window that shows it with most context. With a `null_threshold` the
    empty answer comes first where its score is above the best one's by more than that.
    """
    found = []
    for numbers, spans, null in zip(shown.of_question, shown.spans, null_scores(shown, scores), strict=True):
        ranges = [shown.ranges[number] for number in numbers]
        answers = []
        for place, number in enumerate(numbers):
            first, last = ranges[place]
            of_context = scores[number][shown.begin[number] : shown.begin[number] + last - first]
            starts = has_most_context(ranges, place)
            for score, start, end in best_spans(of_context, starts, count):
                answers.append(Answer(score, spans[first + start][0], spans[first + end][1]))
        answers.sort(key=lambda answer: -answer.score)
        if null_threshold is not None and null - answers[0].score > null_threshold:
            answers.insert(0, Answer(null, 0, 0))
        found.append(answers[:count])
    return found


def answer_pieces(shown: Windows, questions: list[Question]) -> dict[str, np.ndarray]:
    """int32 [n] `starts` and `ends`: places of the first answer's pieces in each window, 0 where it is not whole."""
    starts, ends = (np.zeros(len(shown.ranges), np.int32) for _ in range(2))
    for numbers, spans, question in zip(shown.of_question, shown.spans, questions, strict=True):
        if not question.answers:
            continue
        text, begin = question.answers[0]
        inside = [piece for piece, (a, b) in enumerate(spans) if a < begin + len(text) and b > begin]
        for number in numbers:
            first, last = shown.ranges[number]
            if inside and first <= inside[0] and inside[-1] < last:
                starts[number], ends[number] = (shown.begin[number] + inside[end] - first for end in (0, -1))
    return {"starts": starts, "ends": ends}


def null_scores(shown: Windows, scores: list[np.ndarray]) -> list[float]:
    """Of each question, the lowest sum of [CLS]'s scores over its windows: how sure the model is of no answer."""
    return [min(float(scores[number][0].sum()) for number in numbers) for numbers in shown.of_question]


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


def best_spans(scores: np.ndarray, starts: np.ndarray, count: int = 1) -> list[Span]:
    """The `count` best of all spans of at most MAX_ANSWER pieces, best first.

    `scores` [S, 2]; bool [S] `starts` tells where an answer may start.
    """
    first = np.where(starts, scores[:, 0], -np.inf)
    last = np.pad(scores[:, 1], (0, MAX_ANSWER - 1), constant_values=-np.inf)
    sums = first[:, None] + np.lib.stride_tricks.sliding_window_view(last, MAX_ANSWER)  # [S, MAX_ANSWER]
    best = np.argsort(-sums, axis=None, kind="stable")[:count]
    return [
        Span(float(sums.flat[place]), int(place // MAX_ANSWER), int(place // MAX_ANSWER + place % MAX_ANSWER))
        for place in best
        if np.isfinite(sums.flat[place])
    ]


# Scores, by the rules of SQuAD's evaluation scripts


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 when both are the same once normalised, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Overlap of the words, 0 to 1; where one of them is empty, whether both are."""
    one, other = normalize(prediction).split(), normalize(answer).split()
    if not one or not other:
        return float(one == other)
    both = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * both / (len(one) + len(other))


def best_over_answers(prediction: str, answers: list[str], *, version_2: bool = False) -> tuple[float, float]:
    """Exact match and F1 against the answer that fits best; no answers: the prediction should be empty."""
    # In SQuAD 2.0 answers that normalise to nothing do not count, unless all do.
    real = [answer for answer in answers if normalize(answer) or not version_2] or [""]
    return max(exact_match(prediction, answer) for answer in real), max(f1(prediction, answer) for answer in real)


def score_predictions(
    questions: list[Question], predictions: list[str], *, version_2: bool = False
) -> dict[str, float]:
    """exact_match and f1, means over the questions, 0 to 1."""
    pairs = [
        best_over_answers(prediction, [text for text, _ in question.answers], version_2=version_2)
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    exact, overlap = np.mean(pairs, axis=0)
    return {"exact_match": float(exact), "f1": float(overlap)}


def best_threshold(questions: list[Question], texts: list[str], odds: list[float]) -> float:
    """Above which difference between no answer and the best one the answer is empty, so that F1 is highest.

    `odds` are those differences; the threshold is in the middle between two of them, so that rounding changes nothing,
    or beyond all.
    """
    order = np.argsort(odds, kind="stable")
    gains = []  # what answering each question, rather than not, brings
    for number in order:
        answers = [text for text, _ in questions[number].answers]
        given, none = (best_over_answers(text, answers, version_2=True)[1] for text in (texts[number], ""))
        gains.append(given - none)
    totals = np.concatenate([[0.0], np.cumsum(gains)])
    ordered = np.asarray(odds)[order]
    totals[1:-1][ordered[1:] == ordered[:-1]] = -np.inf  # no threshold parts what is equal
    bounds = np.concatenate([[ordered[0] - 2], ordered, [ordered[-1] + 2]])
    best = int(totals.argmax())
    return float(bounds[best : best + 2].mean())


# The task


complete = take_tokenizer


def init_params(config: Config, key: jax.Array) -> Params:
    """`init` for a whole configuration."""
    return init(config.model, key)


def known_rows(config: Config) -> int | None:
    """None when nothing is trained; else unknown before the texts are cut into windows."""
    if "train" not in config.task.files:
        return 0
    read_questions(config.task.files["train"])
    return None


def read_set(path: str, version_2: bool, *, train: bool) -> list[Question]:
    """A file's questions; of training questions the answers are repaired. Raises DataError where one has no answer."""
    questions = read_questions(path)
    if not version_2 and (without := [question.id for question in questions if not question.answers]):
        raise DataError(f"{path}: question {without[0]} has no answer; for SQuAD 2.0 set --task.version-2")
    questions = repair(questions, path) if train else questions
    if train and not any(question.answers for question in questions):
        raise DataError(f"{path}: no question has an answer that is in its context")
    return questions


def build(config: Config) -> Task:
    """Reads, cuts into windows and binds the functions above to them."""
    task, length, tokenizer = config.task, config.data.max_seq_len, tokenizer_of(config)
    asked, shown, ready = {}, {}, {}
    for name, path in task.files.items():
        asked[name] = read_set(path, task.version_2, train=name == "train")
        texts, contexts = zip(*((question.text, question.context) for question in asked[name]), strict=True)
        shown[name] = featurize(list(texts), list(contexts), tokenizer, length)
        room = min(MAX_QUESTION, length // 2)
        if shown[name].features.cut and room < MAX_QUESTION:
            raise ConfigError(
                f"data.max_seq_len: {length} has no room for the questions of {path}; take {2 * MAX_QUESTION} or more"
            )
        ready[name] = Labelled(shown[name].features, answer_pieces(shown[name], asked[name]))
    thresholds: dict[str, float] = {}

    def texts_of(name: str, scores: list[np.ndarray], threshold: float | None) -> tuple[list[str], list[float]]:
        """The best text for each question, and its score."""
        best = [answers[0] for answers in decode(shown[name], scores, null_threshold=threshold)]
        return [q.context[a.start : a.end] for q, a in zip(asked[name], best, strict=True)], [a.score for a in best]

    def final(name: str, found: dict[str, np.ndarray]) -> list[str]:
        """The text that answers each question; of SQuAD 2.0 by a threshold that is tuned on dev."""
        scores = list(found["logits"])
        if not task.version_2:
            return texts_of(name, scores, None)[0]
        if name == "dev":
            texts, best = texts_of(name, scores, None)
            odds = [null - score for null, score in zip(null_scores(shown[name], scores), best, strict=True)]
            thresholds["dev"] = best_threshold(asked[name], texts, odds)
        return texts_of(name, scores, thresholds.get("dev", task.null_threshold))[0]

    def score(name: str, found: dict[str, np.ndarray]) -> dict[str, float]:
        scores = score_predictions(asked[name], final(name, found), version_2=task.version_2)
        return scores | ({"null_threshold": thresholds.get("dev", task.null_threshold)} if task.version_2 else {})

    def write(folder: str, name: str, found: dict[str, np.ndarray]) -> None:
        os.makedirs(folder, exist_ok=True)
        chosen = {question.id: text for question, text in zip(asked[name], final(name, found), strict=True)}
        with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as file:
            json.dump(chosen, file, ensure_ascii=False, indent=1)

    if "train" in ready:
        whole = int((ready["train"].targets["ends"] > 0).sum())
        if not whole:
            raise ConfigError(
                f"data.max_seq_len: no answer of {task.files['train']} fits into {length} pieces; take more"
            )
        facts = f"{len(asked['train']):,} questions from {task.files['train']} "
        facts += f"in {len(shown['train'].ranges):,} windows, {whole:,} of them with an answer"
    else:
        counts = (f"{len(questions):,} questions from {task.files[name]}" for name, questions in asked.items())
        facts = f"evaluation alone, {', '.join(counts)}"
    cut = sum(found.features.cut for found in shown.values())
    objective = Objective(
        init=functools.partial(init, config.model),
        sums=functools.partial(sums, config.model),
        weights=lambda batch: {"loss": batch["label_weights"].sum()},
        losses=("loss",),
        layers=config.model.layers_apart,
    )
    return Task(
        objective,
        **runner(config, ready, tokenizer.pad_id),
        tokenizer=tokenizer,
        facts=facts + cut_note(cut, "questions", min(MAX_QUESTION, length // 2)),
        metric="f1",
        outputs=functools.partial(outputs, config.model, length=length),
        score=score,
        write_predictions=write,
    )
