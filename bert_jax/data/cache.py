"""Raw text named as `data.path` is prepared once into the user's cache, and found there the next time."""

import contextlib
import importlib.metadata
import os
import sys
from typing import Any

from bert_jax import storage
from bert_jax.config import DataConfig, cache_folder, fingerprint
from bert_jax.data import prepare, tfds
from bert_jax.data.corpus import read_documents, resolve_inputs
from bert_jax.data.tokenizer_model import Tokenizer, load_tokenizer, publish
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.errors import ConfigError

_ROW_SETTINGS = ("max_seq_len", "pack", "short_seq_prob", "dupe_factor", "eval_fraction", "seed", "language")
_TEXT_SETTINGS = ("text_field", "documents")


def is_prepared(path: str) -> bool:
    """Whether `path` is a folder of prepared rows rather than raw text."""
    with storage.reached(path):
        return (storage.place(path) / prepare.MANIFEST).is_file()


def prepared_folder(data: DataConfig, vocab_size: int) -> str:
    """The folder of rows for `data`: `data.path` itself if it is one (fetched, if of a bucket), else made from its
    text, once.

    Without `data.tokenizer` a WordPiece vocabulary of at most `vocab_size` is trained on the text first.
    Raises what preparing raises: ConfigError, DataError, StorageError.
    """
    if is_prepared(data.path):
        return storage.fetch(data.path)
    text = {"inputs": _fingerprint_inputs(data.path), **{name: getattr(data, name) for name in _TEXT_SETTINGS}}
    tokenizer = _tokenizer(data, vocab_size, text)
    settings = {name: getattr(data, name) for name in _ROW_SETTINGS}
    folder = (
        cache_folder()
        / "prepared"
        / _key(text | settings | {"tokenizer": tokenizer.fingerprint, "format": prepare.FORMAT_VERSION})
    )
    if not is_prepared(str(folder)):
        print(f"preparing {data.path} into {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            prepare.prepare([data.path], folder, tokenizer=tokenizer, data=data)
        except ConfigError:
            if not is_prepared(str(folder)):  # else another run has prepared the same text meanwhile
                raise
    return str(folder)


def _tokenizer(data: DataConfig, vocab_size: int, text: dict[str, Any]) -> Tokenizer:
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)
    switches = {"vocab_size": vocab_size, "lowercase": data.lowercase, "strip_accents": data.strip_accents}
    folder = cache_folder() / "tokenizers" / _key(text | switches)
    if not folder.is_dir():
        print(f"training a WordPiece vocabulary of {vocab_size:,} on {data.path}", file=sys.stderr)
        documents = read_documents([data.path], text_field=data.text_field, documents=data.documents)
        tokenizer = train_tokenizer("wordpiece", (document.text for document in documents), **switches)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another run has trained the same meanwhile
            publish(tokenizer, folder)
    return load_tokenizer(folder)


def _fingerprint_inputs(path: str) -> list[Any]:
    """What changes when the text does: size and time of files, versions of what `builtin` reads."""
    found: list[Any] = []
    for item in resolve_inputs([path]):
        if item == "builtin":
            versions = {(dist.name, dist.version) for dist in importlib.metadata.distributions()}
            found.append([item, sys.version, sorted(versions)])
            continue
        for file in tfds.files(item) if item.startswith(tfds.TFDS) else [item]:
            place = file if storage.is_remote(file) else os.path.realpath(file)
            found.append([item, place, *storage.size_and_time(file)])
    return found


def _key(values: dict[str, Any]) -> str:
    return fingerprint(values)[:16]
