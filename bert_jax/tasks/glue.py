"""The nine tasks of GLUE (Wang et al. 2019), from their official files or from TFDS, scored as GLUE scores them.

Files: https://gluebenchmark.com; a folder a task with train.tsv, dev.tsv and test.tsv, without quoting.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bert_jax import metrics
from bert_jax.config import PROBLEMS, Config, TaskConfig
from bert_jax.data.tables import Example, read_examples, read_rows
from bert_jax.errors import DataError
from bert_jax.progress import say
from bert_jax.tasks import Params, Task, classify, take_tokenizer

CLASSES, _, NUMBER = PROBLEMS


class Spec(NamedTuple):
    """One task of GLUE."""

    folder: str
    """Of the official files."""
    texts: tuple[str, ...]
    """Columns of one or two texts."""
    labels: tuple[str, ...]
    """In GLUE's order; of numbers the column."""
    metric: str
    """What models are chosen by on dev; the first of `scores`."""
    tfds: tuple[str, ...] = ()
    """Columns of the texts in TFDS, where they differ."""
    label: str = "label"
    """Column of the label in the official files."""
    splits: tuple[str, ...] = ("dev", "test")
    highest: float = 0.0
    """Of a number, which goes from 0 to that; 0 for classes."""


ENTAILMENT = ("entailment", "not_entailment")
SPECS = {
    "cola": Spec("CoLA", ("sentence",), ("0", "1"), "matthews_correlation"),
    "sst2": Spec("SST-2", ("sentence",), ("0", "1"), "accuracy"),
    "mrpc": Spec("MRPC", ("#1 String", "#2 String"), ("0", "1"), "f1", ("sentence1", "sentence2"), "Quality"),
    "stsb": Spec("STS-B", ("sentence1", "sentence2"), ("score",), "spearman", label="score", highest=5.0),
    "qqp": Spec("QQP", ("question1", "question2"), ("0", "1"), "f1", label="is_duplicate"),
    "mnli": Spec(
        "MNLI",
        ("sentence1", "sentence2"),
        ("contradiction", "entailment", "neutral"),
        "accuracy",
        ("premise", "hypothesis"),
        "gold_label",
        splits=("dev_matched", "dev_mismatched", "test_matched", "test_mismatched"),
    ),
    "qnli": Spec("QNLI", ("question", "sentence"), ENTAILMENT, "accuracy"),
    "rte": Spec("RTE", ("sentence1", "sentence2"), ENTAILMENT, "accuracy"),
    "wnli": Spec("WNLI", ("sentence1", "sentence2"), ("0", "1"), "accuracy"),
}
# TFDS names classes otherwise in these tasks; ours are those that the server takes.
TFDS_LABELS = {
    "cola": {"unacceptable": "0", "acceptable": "1"},
    "sst2": {"negative": "0", "positive": "1"},
    "mrpc": {"not_equivalent": "0", "equivalent": "1"},
    "qqp": {"not_duplicate": "0", "duplicate": "1"},
    "wnli": {"not_entailment": "0", "entailment": "1"},
}
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy,
    "f1": metrics.f1,
    "matthews_correlation": metrics.matthews_correlation,
    "pearson": metrics.pearson,
    "spearman": metrics.spearman,
}
SHOWN = {
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("spearman", "pearson"),
}  # else accuracy alone


def read_split(name: str, split: str, data_dir: str) -> classify.Examples:
    """A split of a task: "train", or as `Spec.splits` has it. Test sets have no labels."""
    labelled = not split.startswith("test")
    if data_dir:
        return _read_files(SPECS[name], split, data_dir, labelled)
    spec, official = SPECS[name], {"dev": "validation"}
    path = f"tfds:glue/{name}:{official.get(split, split.replace('dev_', 'validation_'))}"
    texts = spec.tfds or spec.texts
    columns = TaskConfig(text_column=texts[0], text_pair_column=texts[1] if len(texts) > 1 else "")
    examples = read_examples(path, columns, labelled=labelled)
    order = np.argsort([int(row["idx"]) for _, row in read_rows(path, ["idx"])], kind="stable")  # TFDS shuffles
    examples = [examples[place] for place in order]
    renamed = TFDS_LABELS.get(name, {})
    return classify.Examples(path, [e._replace(label=renamed.get(e.label, e.label)) for e in examples], labelled)


def _read_files(spec: Spec, split: str, data_dir: str, labelled: bool) -> classify.Examples:
    place = os.path.join(data_dir, spec.folder)
    path = os.path.join(place if os.path.isdir(place) else data_dir, f"{split}.tsv")
    examples = list(_file_examples(spec, path, labelled))
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return classify.Examples(path, examples, labelled)


def _file_examples(spec: Spec, path: str, labelled: bool) -> Iterator[Example]:
    """CoLA's train and dev sets have no header, its test set and all others have one; MRPC's begin with a BOM."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; task.data_dir is the folder of GLUE's official files")
    headless = spec.folder == "CoLA" and labelled
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            header = ["source", "label", "mark", "sentence"] if headless else next(file, "").rstrip("\r\n").split("\t")
            places = [_place(path, header, name) for name in spec.texts]
            label = _place(path, header, spec.label) if labelled else None
            torn = 0
            for line, text in enumerate(file, 1 if headless else 2):
                cells = text.rstrip("\r\n").split("\t")
                if len(cells) <= max(places + ([label] if labelled else [])):
                    torn += 1
                    if spec.folder == "QQP" and labelled:  # the official files have some
                        continue
                    raise DataError(f"{path}: line {line}: {len(cells)} cells, not the header's {len(header)}")
                first, *second = (cells[place] for place in places)
                found = cells[label].strip() if labelled else ""
                if labelled and found == "-":  # annotators of MNLI did not agree; published scores leave these out
                    continue
                yield Example(first, second[0] if second else None, found, line)
            if torn:
                say(f"note: {path}: {torn} lines have too few cells and are left out")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); download it again") from error


def _place(path: str, header: list[str], name: str) -> int:
    if name not in header:
        raise DataError(f"{path}: line 1: no column {name!r} among {', '.join(header)}; is it GLUE's official file?")
    return header.index(name)


def problem_of(name: str) -> str:
    """A number for STS-B, else classes."""
    return NUMBER if SPECS[name].highest else CLASSES


def init_params(config: Config, key: object) -> Params:
    """`classify.init` with the task's labels."""
    return classify.init(config.model, len(SPECS[config.task.name].labels), key)


def known_rows(config: Config) -> int | None:
    """Training examples of an epoch."""
    return len(_training(config).examples)


def _training(config: Config) -> classify.Examples:
    found = read_split(config.task.name, "train", config.task.data_dir)
    return found._replace(examples=classify.draw(config.task, config.train.seed, found.examples))


complete = take_tokenizer


def build(config: Config) -> Task:
    """Reads the task's sets and hands them to `classify`. MNLI's "dev" and "test" are the matched ones."""
    name = config.task.name
    spec, problem = SPECS[name], problem_of(name)
    sets = {"train": _training(config)}
    for split in spec.splits:
        if split.startswith("test") and config.task.data_dir and not _has(spec, split, config.task.data_dir):
            continue  # many keep the files without test sets
        sets[split.removesuffix("_matched")] = read_split(name, split, config.task.data_dir)
    return classify.build_from(
        config,
        sets,
        spec.labels,
        problem,
        score=functools.partial(score, name),
        metric=spec.metric,
        write=functools.partial(write_predictions, name),
    )


def _has(spec: Spec, split: str, data_dir: str) -> bool:
    return any(os.path.isfile(os.path.join(data_dir, part, f"{split}.tsv")) for part in (spec.folder, ""))


def score(name: str, found: dict[str, np.ndarray]) -> dict[str, float]:
    """The scores that GLUE's leaderboard shows for the task."""
    numbers = problem_of(name) == NUMBER
    predictions = found["logits"][:, 0] if numbers else found["logits"].argmax(-1)
    return {metric: SCORES[metric](predictions, found["labels"]) for metric in SHOWN.get(name, ("accuracy",))}


def write_predictions(name: str, folder: str, split: str, found: dict[str, np.ndarray]) -> None:
    """`folder/split.tsv`, and for test sets the file that the server takes: `index` and `prediction`, tab between."""
    spec = SPECS[name]
    os.makedirs(folder, exist_ok=True)
    if problem_of(name) == NUMBER:  # the server refuses numbers outside the scale
        shown = [f"{value:.3f}" for value in np.clip(found["logits"][:, 0], 0, spec.highest)]
    else:
        shown = [spec.labels[number] for number in found["logits"].argmax(-1)]
    files = [f"{split}.tsv"]
    if split.startswith("test"):
        files.append(f"{spec.folder}{'-mm' if split.endswith('mismatched') else '-m' if name == 'mnli' else ''}.tsv")
    for file in files:
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write("index\tprediction\n")
            out.writelines(f"{index}\t{value}\n" for index, value in enumerate(shown))
