"""TensorFlow data sets by name: `tfds:NAME/CONFIG:SPLIT`, found in `$TFDS_DATA_DIR` or TFDS's own folder."""

import os
import re
from collections.abc import Iterator
from typing import Any

from bert_jax.data.pipeline import tensorflow
from bert_jax.errors import DataError

TFDS = "tfds:"


def files(name: str) -> list[str]:
    """The files of a data set."""
    folder = os.fspath(_builder(name, _parts(name)[0]).data_path)
    return sorted(os.path.join(folder, file) for file in os.listdir(folder))


def features(name: str) -> dict[str, Any]:
    """field -> TFDS's description of it."""
    return dict(_builder(name, _parts(name)[0]).info.features)


def rows(name: str, fields: list[str]) -> Iterator[dict[str, Any]]:
    """Those fields of each example, in order: bytes, numbers and arrays. Nothing else is decoded: it may be images.

    Raises DataError: no such data set or split, or files that are damaged.
    """
    dataset, split = _parts(name)
    builder, tf = _builder(name, dataset), tensorflow()
    import tensorflow_datasets as tfds

    try:
        decoders = tfds.decode.PartialDecoding(dict.fromkeys(fields, True))
        examples = builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)
    except ValueError as error:
        raise DataError(f"{name}: {_first_line(error)}; its splits: {', '.join(builder.info.splits)}") from error
    try:
        yield from tfds.as_numpy(examples)
    except tf.errors.OpError as error:
        raise DataError(f"{name}: {_first_line(error)}; its files are damaged, make it again") from error


def _builder(name: str, dataset: str) -> Any:
    tensorflow()  # before TFDS imports all of it
    import tensorflow_datasets as tfds  # here, because it takes seconds and only these inputs need it

    way_out = f"make it first, in Python: tensorflow_datasets.load({dataset!r}), or set TFDS_DATA_DIR to its folder"
    try:
        builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # not found, or a description that protobuf cannot parse
        raise DataError(f"{name}: {_first_line(error)}; {way_out}") from error
    if not builder.data_path.exists():
        raise DataError(f"{name}: not in {builder.data_path}; {way_out}")
    return builder


def _parts(name: str) -> tuple[str, str]:
    """NAME/CONFIG and SPLIT."""
    match = re.fullmatch(r"tfds:(.+?(?::\d+\.\d+\.\d+)?):(.+)", name)
    if not match:
        raise DataError(f"{name}: write {TFDS}NAME:SPLIT or {TFDS}NAME/CONFIG:SPLIT, such as {TFDS}glue/sst2:train")
    return match.groups()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")  # TFDS goes on with a list of all its data sets
