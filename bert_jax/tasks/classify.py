"""Labels, several labels, or a number of a text or a pair of texts, from any table (Devlin et al. 2019, section 4.1).

Shapes: n examples, B batch, C classes, labels or numbers.
"""

import csv
import functools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert_jax import metrics
from bert_jax.config import PROBLEMS, Config, ModelConfig, TaskConfig
from bert_jax.data.features import Labelled, featurize
from bert_jax.data.tables import Example, read_examples
from bert_jax.errors import ConfigError, DataError
from bert_jax.heads import ClassifierHead, Pooler
from bert_jax.tasks import (
    Batch,
    Objective,
    Params,
    Sums,
    Task,
    cut_note,
    encode_first,
    init_encoder,
    loss_and_accuracy,
    runner,
    take_tokenizer,
    tokenizer_of,
)

ONE, SEVERAL, NUMBER = PROBLEMS
METRICS = {ONE: "accuracy", SEVERAL: "f1", NUMBER: "spearman"}  # what models are chosen by


class Examples(NamedTuple):
    """A set of examples and where it comes from."""

    path: str
    examples: list[Example]
    labelled: bool = True
    """Whether labels are known; of a test set whose labels are not, predictions alone are written."""


def problem_of(task: TaskConfig) -> str:
    """What the scores of this task mean: one of PROBLEMS."""
    return NUMBER if task.name == "regress" else SEVERAL if task.multi_label else ONE


# Labels


def label_names(path: str, examples: list[Example]) -> tuple[str, ...]:
    """Distinct labels, numbers in order of size and before words."""
    found = [_names(example, path) for example in examples]
    names = {name for some in found for name in some}
    if not names:
        raise DataError(f"{path}: no example has a label")
    if len(names) < 2 and all(found):
        raise DataError(f"{path}: every example has the label {names.pop()!r}; two at least are needed")

    def order(name: str) -> tuple:
        number = int(name) if re.fullmatch(r"-?\d{1,18}", name) else None
        return number is None, number or 0, name

    return tuple(sorted(names, key=order))


def _names(example: Example, path: str) -> tuple[str, ...]:
    """Its labels: one, or with a list any number."""
    if isinstance(example.label, tuple):
        return example.label
    if not example.label:
        raise DataError(f"{path}: line {example.line}: empty label")
    return (example.label,)


def label_numbers(examples: list[Example], labels: tuple[str, ...], path: str) -> np.ndarray:
    """int32 [n], the number of each example's label. Raises DataError on one that training never saw, and on lists."""
    for example in examples:
        if isinstance(example.label, tuple):
            raise DataError(f"{path}: line {example.line}: a list of labels; set --task.multi-label")
    return label_matrix(examples, labels, path).argmax(-1).astype(np.int32)


def label_matrix(examples: list[Example], labels: tuple[str, ...], path: str) -> np.ndarray:
    """float32 [n, C], 1 for the labels that an example has. Raises DataError on one that training never saw."""
    number = {name: index for index, name in enumerate(labels)}
    matrix = np.zeros((len(examples), len(labels)), np.float32)
    for row, example in zip(matrix, examples, strict=True):
        for name in _names(example, path):
            if name not in number:
                raise DataError(
                    f"{path}: line {example.line}: label {name!r} is not among the training labels {', '.join(labels)}"
                )
            row[number[name]] = 1
    return matrix


def numbers(examples: list[Example], path: str) -> np.ndarray:
    """float32 [n]. Raises DataError on a label that is no finite number."""
    found = np.zeros(len(examples), np.float32)
    for index, example in enumerate(examples):
        try:
            found[index] = float(example.label)
        except (TypeError, ValueError):
            found[index] = np.nan
        if not np.isfinite(found[index]):
            raise DataError(f"{path}: line {example.line}: {example.label!r} is no finite number")
    return found


def targets(problem: str, found: Examples, labels: tuple[str, ...]) -> np.ndarray:
    """What each example should give: int32 [n], float32 [n, C] or float32 [n]."""
    if not found.labelled:
        shape = (len(found.examples), len(labels)) if problem == SEVERAL else len(found.examples)
        return np.zeros(shape, np.int32 if problem == ONE else np.float32)
    if problem == NUMBER:
        return numbers(found.examples, found.path)
    return (label_numbers if problem == ONE else label_matrix)(found.examples, labels, found.path)


def split_labels(examples: list[Example], separator: str) -> list[Example]:
    """Cells in which `separator` stands between labels -> lists; an empty one has none."""
    return [
        example
        if isinstance(example.label, tuple)
        else example._replace(label=tuple(filter(None, map(str.strip, example.label.split(separator)))))
        for example in examples
    ]


# The model


def init(config: ModelConfig, num_labels: int, key: jax.Array) -> Params:
    """Encoder, pooler and classifier."""
    keys = jax.random.split(key, 3)
    hidden = jnp.zeros((1, config.hidden_size))
    return init_encoder(config, keys[0]) | {
        "pooler": Pooler(config).init(keys[1], hidden)["params"],
        "classifier": ClassifierHead(config, num_labels).init(keys[2], hidden)["params"],
    }


@functools.partial(jax.jit, static_argnames="config")  # an evaluation asks twice: it is traced once
def logits(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores [B, C] of the classes, from the pooled vector of [CLS]."""
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    first = encode_first(config, params, batch, encoder_key)  # [B, D]
    pooled = Pooler(config).apply({"params": params["pooler"]}, first)
    num_labels = params["classifier"]["dense"]["bias"].shape[0]
    head = ClassifierHead(config, num_labels, config.hidden_dropout, deterministic=key is None)
    return head.apply({"params": params["classifier"]}, pooled, rngs=None if key is None else {"dropout": head_key})


def predictions(config: ModelConfig, params: Params, batch: Batch, *, problem: str) -> jax.Array:
    """[B, C] by what the scores mean (`config.PROBLEMS`): probabilities of one class, of each label, or numbers."""
    scores = logits(config, params, batch)
    if problem == "regression":
        return scores
    return jax.nn.sigmoid(scores) if problem == "multi_label_classification" else jax.nn.softmax(scores)


def sums(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None, *, problem: str) -> Sums:
    """The loss over the weighted rows (cross-entropy; mean over the labels; squared error), and accuracy of classes."""
    scores, labels, weights = logits(config, params, batch, key), batch["labels"], batch["label_weights"]
    if problem == ONE:
        return loss_and_accuracy("", scores, labels, weights)
    if problem == NUMBER:
        loss = jnp.square(scores[:, 0] - labels)
    else:
        loss = optax.sigmoid_binary_cross_entropy(scores, labels).mean(-1)
    return {"loss": ((loss * weights).sum(), weights.sum())}


def outputs(config: ModelConfig, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """What `score` and the prediction files are made of."""
    scores = logits(config, params, batch)
    return {"logits": scores, "labels": batch["labels"], "rows": batch["rows"]}


# Scores


def score_classes(found: dict[str, np.ndarray]) -> dict[str, float]:
    """accuracy, macro_f1 (the mean over classes), and f1: of the second class where there are two, else macro_f1."""
    predictions, labels, classes = found["logits"].argmax(-1), found["labels"], found["logits"].shape[-1]
    macro = metrics.macro_f1(predictions, labels, classes)
    f1 = metrics.f1(predictions, labels) if classes == 2 else macro
    return {"accuracy": metrics.accuracy(predictions, labels), "f1": f1, "macro_f1": macro}


def score_labels(found: dict[str, np.ndarray]) -> dict[str, float]:
    """accuracy of whole rows, and f1 over all decisions (micro)."""
    predictions, labels = found["logits"] > 0, found["labels"] > 0.5
    return {"accuracy": metrics.accuracy(predictions, labels), "f1": metrics.f1(predictions, labels)}


def score_numbers(found: dict[str, np.ndarray]) -> dict[str, float]:
    """pearson and spearman."""
    pair = found["logits"][:, 0], found["labels"]
    return {"pearson": metrics.pearson(*pair), "spearman": metrics.spearman(*pair)}


SCORES = {ONE: score_classes, SEVERAL: score_labels, NUMBER: score_numbers}


def write_predictions(
    problem: str, labels: tuple[str, ...], folder: str, name: str, found: dict[str, np.ndarray]
) -> None:
    """`folder/name.tsv`: index, prediction, its probability (not of numbers), true label."""
    os.makedirs(folder, exist_ok=True)
    scores = found["logits"].astype(np.float64)
    with open(os.path.join(folder, f"{name}.tsv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        if problem == NUMBER:
            writer.writerow(["index", "prediction", "label"])
            for index, (row, true) in enumerate(zip(scores, found["labels"], strict=True)):
                writer.writerow([index, f"{row[0]:.6f}", f"{true:g}"])
            return
        writer.writerow(["index", "prediction", "probability", "label"])
        if problem == SEVERAL:
            shares = 1 / (1 + np.exp(-scores))
            for index, (row, true) in enumerate(zip(shares, found["labels"], strict=True)):
                chosen = [number for number, share in enumerate(row) if share > 0.5]
                real = ",".join(labels[number] for number in np.flatnonzero(true))
                shown = (",".join(labels[n] for n in chosen), ",".join(f"{row[n]:.6f}" for n in chosen))
                writer.writerow([index, *shown, real])
            return
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        for index, (row, true) in enumerate(zip(shares, found["labels"], strict=True)):
            writer.writerow([index, labels[row.argmax()], f"{row.max():.6f}", labels[true]])


# The task


def training_examples(config: Config) -> Examples:
    """The training file's examples, or a random `max_train_examples` of them."""
    task = config.task
    path = task.files["train"]
    return Examples(path, draw(task, config.train.seed, _read(path, task)))


def draw(task: TaskConfig, seed: int, examples: list[Example]) -> list[Example]:
    """`task.max_train_examples` of the examples, in their order; all if it is 0."""
    count = task.max_train_examples
    if not 0 < count < len(examples):
        return examples
    drawn = [examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]
    if problem_of(task) == ONE and len({example.label for example in drawn}) < 2:
        raise ConfigError(f"task.max_train_examples: the {count} that were drawn are all of one label; take more")
    return drawn


def _read(path: str, task: TaskConfig) -> list[Example]:
    examples = read_examples(path, task)
    return split_labels(examples, task.label_separator) if task.multi_label else examples


def names_of(config: Config, training: Examples) -> tuple[str, ...]:
    """What the scores are of: the labels, or the column of the numbers."""
    if problem_of(config.task) == NUMBER:
        return (config.task.label_column,)
    return label_names(training.path, training.examples)


def init_params(config: Config, key: jax.Array) -> Params:
    """`init` for a whole configuration, with the labels that its training examples name."""
    return init(config.model, len(names_of(config, training_examples(config))), key)


def known_rows(config: Config) -> int | None:
    """Training examples of an epoch."""
    return len(training_examples(config).examples)


complete = take_tokenizer


def build(config: Config) -> Task:
    """Reads the files that the configuration names."""
    training = training_examples(config)
    sets = {"train": training}
    sets |= {
        name: Examples(path, _read(path, config.task)) for name, path in config.task.files.items() if name != "train"
    }
    problem, labels = problem_of(config.task), names_of(config, training)
    return build_from(
        config,
        sets,
        labels,
        problem,
        score=SCORES[problem],
        metric=METRICS[problem],
        write=functools.partial(write_predictions, problem, labels),
    )


def build_from(
    config: Config,
    sets: dict[str, Examples],
    labels: tuple[str, ...],
    problem: str,
    *,
    score: Callable,
    metric: str,
    write: Callable,
) -> Task:
    """Tokenises the sets, of which "train" is learned from, and binds the functions above to them."""
    length, tokenizer = config.data.max_seq_len, tokenizer_of(config)
    wanted = {name: targets(problem, found, labels) for name, found in sets.items()}
    check_training(sets["train"], wanted["train"], problem)
    ready = {}
    for name, found in sets.items():
        texts, pairs = zip(*((example.text, example.pair) for example in found.examples), strict=True)
        ready[name] = Labelled(featurize(texts, pairs, tokenizer, length), {"labels": wanted[name]})
    run = runner(config, ready, tokenizer.pad_id)
    objective = Objective(
        init=functools.partial(init, config.model, len(labels)),
        sums=functools.partial(sums, config.model, problem=problem),
        weights=lambda batch: {"loss": batch["label_weights"].sum()},
        losses=("loss",),
        layers=config.model.layers_apart,
    )
    return Task(
        objective,
        **run,
        first_params=functools.partial(first_params, wanted["train"]) if problem == NUMBER else None,
        unlabelled=frozenset(name for name, found in sets.items() if not found.labelled),
        tokenizer=tokenizer,
        facts=_facts(problem, sets["train"], wanted["train"], labels)
        + cut_note(sum(found.features.cut for found in ready.values()), "texts", length),
        labels=labels,
        problem=problem,
        metric=metric,
        outputs=functools.partial(outputs, config.model),
        score=lambda _, found: score(found),
        write_predictions=write,
    )


def check_training(training: Examples, wanted: np.ndarray, problem: str) -> None:
    """Raises DataError where there is nothing to learn: all examples alike."""
    if problem != SEVERAL and (wanted == wanted[0]).all():
        what = "number" if problem == NUMBER else "label"
        raise DataError(
            f"{training.path}: every example has the {what} {training.examples[0].label!r}; give others too"
        )


def first_params(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """A regression begins at the mean of its numbers: to climb there would take hundreds of steps at 2e-5."""
    return {"classifier/dense/bias": np.array([numbers.mean()], np.float32)}


def _facts(problem: str, training: Examples, wanted: np.ndarray, labels: tuple[str, ...]) -> str:
    """The training set in one line: how many, of what, from where."""
    if problem == NUMBER:
        spread = f"{wanted.min():g} to {wanted.max():g}, mean {wanted.mean():.3g}"
    else:
        counts = wanted.sum(0) if problem == SEVERAL else np.bincount(wanted, minlength=len(labels))
        spread = ", ".join(f"{label} {int(count):,}" for label, count in zip(labels, counts, strict=True))
        if problem == ONE and len(labels) == 2:
            spread += f"; f1 is of {labels[1]}"
    return f"{len(wanted):,} examples ({spread}) from {training.path}"
