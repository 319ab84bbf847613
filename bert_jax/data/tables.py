"""Labelled texts from tables: CSV, TSV, JSONL and XML with named columns, told by their ending, and TFDS by name."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bert_jax.config import TaskConfig, did_you_mean
from bert_jax.data import tfds
from bert_jax.errors import DataError

ENDINGS = ("csv", "tsv", "jsonl", "xml")
Cell = str | tuple[str, ...] | None  # text or a number as text; a list of them; anything else
_REST = object()  # key of cells beyond the header


class Example(NamedTuple):
    """One text; `line` is where it stands in its file, or its number in an XML file or TFDS split."""

    text: str
    pair: str | None
    label: Cell
    line: int


def read_examples(path: str, task: TaskConfig, *, labelled: bool = True) -> list[Example]:
    """All examples of a table, at least one."""
    examples = list(iterate_examples(path, task, labelled=labelled))
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


def iterate_examples(path: str, task: TaskConfig, *, labelled: bool = True) -> Iterator[Example]:
    """The examples of a table, one after the other; `labelled=False` lets the label column be absent.

    Raises DataError naming file and line: no such column, a cell of another kind.
    """
    texts = [task.text_column, *filter(None, [task.text_pair_column])]
    columns = [*texts, *([task.label_column] if labelled else [])]
    for line, row in read_rows(path, columns):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"{path}: line {line}: no column {missing[0]!r}{did_you_mean(missing[0], row)}; "
                "name the columns with the options text-column, text-pair-column and label-column"
            )
        wrong = [column for column in columns if row[column] is None]
        wrong += [column for column in texts if isinstance(row[column], tuple)]
        if wrong:
            raise DataError(f"{path}: line {line}: {wrong[0]!r} holds neither text nor a number")
        label = row.get(task.label_column)
        label = label.strip() if isinstance(label, str) else label
        pair = row[task.text_pair_column] if task.text_pair_column else None
        yield Example(row[task.text_column], pair, label, line)


def read_rows(path: str, columns: list[str]) -> Iterator[tuple[int, dict[str, Cell]]]:
    """(line, row) of a table; of a TFDS split only `columns`, with labels by their names."""
    if path.startswith(tfds.TFDS):
        return _tfds_rows(path, columns)
    kind = path.rsplit(".", 1)[-1].lower()
    if kind not in ENDINGS:
        raise DataError(f"{path}: the ending must be .csv, .tsv, .jsonl or .xml, or the beginning {tfds.TFDS}")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    return _xml_rows(path) if kind == "xml" else _file_rows(path, kind)


def _xml_rows(path: str) -> Iterator[tuple[int, dict[str, Cell]]]:
    """A row for each element below the first: its attributes, and the texts of what is in it (ASSIN's layout)."""
    number, depth = 0, 0
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 1:
                number += 1
                yield number, dict(element.attrib) | {child.tag: child.text or "" for child in element}
                element.clear()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not whole XML ({error}); fetch it again") from error


def _file_rows(path: str, kind: str) -> Iterator[tuple[int, dict[str, Cell]]]:
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


def _json_row(path: str, line: int, text: str) -> dict[str, Cell]:
    try:
        row = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {line}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {line}: a JSON object is wanted, like {{'text': …, 'label': …}}")
    return {key: _cell(value) for key, value in row.items()}


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _cell(value: Any) -> Cell:
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return tuple(map(str, value))
    return None


def _tfds_rows(path: str, columns: list[str]) -> Iterator[tuple[int, dict[str, Cell]]]:
    features = tfds.features(path)
    known = [column for column in columns if column in features]
    if len(known) < len(columns):
        yield 1, dict.fromkeys(features)  # the reader tells which is absent
        return
    names = {column: getattr(_element(features[column]), "int2str", None) for column in known}
    for number, row in enumerate(tfds.rows(path, known), 1):
        yield number, dict.fromkeys(features) | {column: _tfds_cell(row[column], names[column]) for column in known}


def _element(feature: Any) -> Any:
    """What a sequence is of; else the feature itself."""
    return getattr(feature, "feature", feature)


def _tfds_cell(value: Any, name: Any) -> Cell:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if getattr(value, "ndim", 0) == 1:
        return tuple(_tfds_cell(item, name) or "" for item in value)
    if getattr(value, "ndim", 0) > 1 or isinstance(value, dict):
        return None
    number = value.item()
    return name(number) if name and number >= 0 else str(number)  # -1 is an unknown label, as of GLUE's test sets
