"""Labels of a text or a pair of texts, from any CSV, TSV or JSONL file (Devlin et al. 2019, section 4.1)."""

import csv
import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import Config, ModelConfig, TaskConfig, did_you_mean
from bert_jax.data.features import Features, collate, featurize, padded_length
from bert_jax.data.pipeline import host_share, row_numbers
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.heads import ClassifierHead, Pooler
from bert_jax.metrics import accuracy, f1, macro_f1
from bert_jax.tasks import Batch, Params, Sums, Task, choose_tokenizer, encode, init_encoder, loss_and_accuracy

_REST = object()  # key of cells beyond the header


class Example(NamedTuple):
    """One labelled text; `line` is where it stands in its file."""

    text: str
    pair: str | None
    label: str
    line: int


def read_table(path: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, row) of a CSV, TSV or JSONL file with named columns; None is JSON that is neither text nor a number.

    Raises DataError naming file and line.
    """
    kind = path.rsplit(".", 1)[-1].lower()
    if kind not in ("csv", "tsv", "jsonl"):
        raise DataError(f"{path}: the ending must be .csv, .tsv or .jsonl")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    csv.field_size_limit(1 << 30)
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == "jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield line, _json_row(path, line, text)
                return
            # TSV as the field publishes it: no quoting, quotes may be unbalanced.
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
            reader = csv.DictReader(file, strict=True, restkey=_REST, **style)
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
                raise DataError(f"{path}: line 1: two columns are named {twice[0]!r}; rename one")
            for row in reader:
                line = reader.line_num
                if _REST in row or None in row.values():
                    raise DataError(
                        f"{path}: line {line}: not as many columns as the header's {len(reader.fieldnames)}"
                    )
                yield line, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {line} ({error.reason}); convert it to UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: after line {line}: {error}") from error


def _json_row(path: str, line: int, text: str) -> dict[str, str | None]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {line}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {line}: a JSON object is wanted, like {{'text': …, 'label': …}}")
    return {key: str(value) if isinstance(value, str | int | float) else None for key, value in row.items()}


def read_examples(path: str, task: TaskConfig) -> list[Example]:
    """All labelled examples of a file, at least one."""
    examples = list(iterate_examples(path, task))
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


def iterate_examples(path: str, task: TaskConfig, *, labelled: bool = True) -> Iterator[Example]:
    """The examples of a file, one after the other; `labelled=False` lets the label column be absent."""
    columns = [task.text_column, *filter(None, [task.text_pair_column]), *([task.label_column] if labelled else [])]
    for line, row in read_table(path):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"{path}: line {line}: no column {missing[0]!r}{did_you_mean(missing[0], row)}; "
                "name the columns with the options text-column, text-pair-column and label-column"
            )
        empty = [column for column in columns if row[column] is None]
        if empty:
            raise DataError(f"{path}: line {line}: {empty[0]!r} holds neither text nor a number")
        pair = row[task.text_pair_column] if task.text_pair_column else None
        label = (row.get(task.label_column) or "").strip()
        if labelled and not label:
            raise DataError(f"{path}: line {line}: empty label in column {task.label_column!r}")
        yield Example(row[task.text_column], pair, label, line)


def label_names(path: str, examples: list[Example]) -> tuple[str, ...]:
    """Distinct labels, numbers in order of size and before words."""
    names = {example.label for example in examples}
    if len(names) < 2:
        raise DataError(f"{path}: every example has the label {names.pop()!r}; two at least are needed")
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def label_numbers(examples: list[Example], labels: tuple[str, ...], path: str) -> np.ndarray:
    """int32 number of each example's label. Raises DataError on one that training never saw."""
    number = {name: index for index, name in enumerate(labels)}
    for example in examples:
        if example.label not in number:
            raise DataError(
                f"{path}: line {example.line}: label {example.label!r} is not among the training labels "
                f"{', '.join(labels)}"
            )
    return np.array([number[example.label] for example in examples], np.int32)


def init(config: ModelConfig, num_labels: int, key: jax.Array) -> Params:
    """Encoder, pooler and classifier."""
    keys = jax.random.split(key, 3)
    hidden = jnp.zeros((1, config.hidden_size))
    return init_encoder(config, keys[0]) | {
        "pooler": Pooler(config).init(keys[1], hidden)["params"],
        "classifier": ClassifierHead(config, num_labels).init(keys[2], hidden)["params"],
    }


def logits(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores [B, C] of the classes, from the pooled vector of [CLS]."""
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    first = encode(config, params, batch, encoder_key)[:, 0]  # [B, D]
    pooled = Pooler(config).apply({"params": params["pooler"]}, first)
    num_labels = params["classifier"]["dense"]["bias"].shape[0]
    head = ClassifierHead(config, num_labels, config.hidden_dropout, deterministic=key is None)
    return head.apply({"params": params["classifier"]}, pooled, rngs=None if key is None else {"dropout": head_key})


def predictions(config: ModelConfig, params: Params, batch: Batch, *, problem: str) -> jax.Array:
    """[B, C] by what the scores mean (`convert.PROBLEMS`): probabilities of one class, of each label, or numbers."""
    scores = logits(config, params, batch)
    if problem == "regression":
        return scores
    return jax.nn.sigmoid(scores) if problem == "multi_label_classification" else jax.nn.softmax(scores)


def sums(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None) -> Sums:
    """Cross-entropy and accuracy over the weighted rows."""
    return loss_and_accuracy("", logits(config, params, batch, key), batch["labels"], batch["label_weights"])


def outputs(config: ModelConfig, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """What `score` and the prediction files are made of."""
    scores = logits(config, params, batch)
    return {"logits": scores, "labels": batch["labels"], "weights": batch["label_weights"]}


def score(found: dict[str, np.ndarray]) -> dict[str, float]:
    """accuracy and f1: of class 1 when there are two classes, else the mean over classes."""
    predictions, labels, classes = found["logits"].argmax(-1), found["labels"], found["logits"].shape[-1]
    f1_score = f1(predictions, labels) if classes == 2 else macro_f1(predictions, labels, classes)
    return {"accuracy": accuracy(predictions, labels), "f1": f1_score}


def write_predictions(labels: tuple[str, ...], folder: str, name: str, found: dict[str, np.ndarray]) -> None:
    """`folder/name.tsv`: index, predicted label, its probability, true label."""
    os.makedirs(folder, exist_ok=True)
    scores = found["logits"] - found["logits"].max(-1, keepdims=True)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    with open(os.path.join(folder, f"{name}.tsv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction", "probability", "label"])
        for index, (row, true) in enumerate(zip(probabilities, found["labels"], strict=True)):
            writer.writerow([index, labels[row.argmax()], f"{row.max():.6f}", labels[true]])


def training_examples(task: TaskConfig, seed: int) -> list[Example]:
    """The training file's examples, or a random `max_train_examples` of them."""
    examples, count = read_examples(task.train, task), task.max_train_examples
    if not 0 < count < len(examples):
        return examples
    drawn = [examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]
    if len({example.label for example in drawn}) < 2:
        raise ConfigError(f"task.max_train_examples: {count} of {task.train} are all of one label; take more")
    return drawn


def init_params(config: Config, key: jax.Array) -> Params:
    """`init` for a whole configuration, with the labels that its training examples name."""
    examples = training_examples(config.task, config.train.seed)
    return init(config.model, len(label_names(config.task.train, examples)), key)


def known_rows(config: Config) -> int | None:
    """Training examples of an epoch."""
    return len(training_examples(config.task, config.train.seed))


def complete(config: Config, tokenizer: str) -> Config:
    """Sets `data.tokenizer` to `tokenizer`, that of the weights, when the run starts from some."""
    path = choose_tokenizer(config.data.tokenizer, tokenizer)
    if not path:
        raise ConfigError("data.tokenizer: name one, or start from weights with --train.init-from")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def build(config: Config) -> Task:
    """Reads and tokenises the files and binds the functions above to them."""
    task, length, batch_size = config.task, config.data.max_seq_len, config.train.global_batch_size
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, but {config.data.tokenizer} has {tokenizer.vocab_size} "
            f"pieces; set --model.vocab-size {tokenizer.vocab_size}"
        )
    examples = training_examples(task, config.train.seed)
    labels = label_names(task.train, examples)
    sets: dict[str, tuple[Features, np.ndarray]] = {}
    for name, path in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        if path:
            some = examples if name == "train" else read_examples(path, task)
            numbers = label_numbers(some, labels, path)
            pairs = [example.pair for example in some] if task.text_pair_column else None
            sets[name] = featurize([example.text for example in some], pairs, tokenizer, length), numbers
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}

    def batch_of(name: str, numbers: np.ndarray) -> Batch:
        """This host's share; the length looks at the global batch, so that all hosts agree on the shape."""
        features, targets = sets[name]
        mine = numbers[host_share(numbers, **hosts)]
        batch = collate(features, mine, tokenizer.pad_id, padded_length(features, numbers, length))
        batch["labels"] = np.where(mine >= 0, targets[mine], 0).astype(np.int32)
        return batch | {"label_weights": (mine >= 0).astype(np.float32)}

    def eval_batches(name: str) -> Iterator[Batch]:
        count = len(sets[name][1])
        for start in range(0, count, batch_size):
            numbers = np.arange(start, start + batch_size)
            yield batch_of(name, np.where(numbers < count, numbers, -1))

    rows = len(examples)
    counts = ", ".join(f"{label} {n:,}" for label, n in sorted(Counter(e.label for e in examples).items()))
    cut = sum(features.cut for features, _ in sets.values())
    note = f"; {cut:,} texts are cut to {length} pieces" if cut else ""
    return Task(
        init=functools.partial(init, config.model, len(labels)),
        sums=functools.partial(sums, config.model),
        weights=lambda batch: {"loss": batch["label_weights"].sum()},
        losses=("loss",),
        rows=rows,
        train_batch=lambda step: batch_of("train", row_numbers(step, batch_size, rows, config.train.seed)),
        eval_sets={name: functools.partial(eval_batches, name) for name in sets if name != "train"},
        tokenizer=tokenizer,
        facts=f"{rows:,} examples ({counts}) from {task.train}{note}",
        labels=labels,
        outputs=functools.partial(outputs, config.model),
        score=score,
        write_predictions=functools.partial(write_predictions, labels),
    )
