"""A loaded model and what it can be asked. The pure functions behind it take parameters explicitly (`tasks/`)."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.convert import Model, load_model
from bert_jax.data.tokenizer import Tokenizer, load_tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.tasks import Batch, Params, encode, gather, pretrain
from bert_jax.tasks.classify import Example, Features, collate, featurize
from bert_jax.tasks.classify import logits as class_logits

BATCH_SIZE = 32
FILL_WIDTH = 8  # masks of a text are padded to a multiple of this


class Bert:
    """A loaded model. The pure functions behind it take parameters explicitly (`tasks/`)."""

    def __init__(self, model: Model):
        self.params: Params = jax.tree.map(jnp.asarray, model.params)
        self.config, self.labels = model.config, model.labels
        self.tokenizer: Tokenizer = load_tokenizer(model.tokenizer)
        if self.tokenizer.vocab_size > self.config.vocab_size:  # JAX would clamp such ids without a word
            raise DataError(
                f"{model.tokenizer}: the tokenizer has {self.tokenizer.vocab_size} pieces, the model only "
                f"{self.config.vocab_size}; they do not belong together"
            )
        self._fill = jax.jit(functools.partial(_fill_logits, self.config))
        self._classify = jax.jit(functools.partial(class_logits, self.config))

    def fill_mask(self, text: str, top: int = 5) -> list[list[dict[str, Any]]]:
        """For each [MASK] of `text`, its `top` pieces: {"token", "id", "probability", "text"}, best first.

        Raises DataError when there is no [MASK], ConfigError when the model has no MLM head.
        """
        self._need("mlm_head", "fill-mask", "a pre-trained model")
        encoding = self.tokenizer.encode(text)
        if len(encoding.ids) > self.config.max_position_embeddings:
            raise DataError(f"text: {len(encoding.ids)} pieces, the model reads {self.config.max_position_embeddings}")
        ids = np.array(encoding.ids, np.int32)
        places = np.flatnonzero(ids == self.tokenizer.mask_id)
        if not len(places):
            raise DataError(f"text: no {self.tokenizer.id_to_token(self.tokenizer.mask_id)} in {text!r}")
        features = Features([ids], [np.zeros_like(ids)], np.zeros(1, np.int32))
        batch = self._collate(features, np.array([0]))
        padded = np.zeros((1, -(-len(places) // FILL_WIDTH) * FILL_WIDTH), np.int32)
        padded[0, : len(places)] = places
        probabilities = np.asarray(self._fill(self.params, batch, padded))[0]
        return [self._best(row, ids, place, top) for row, place in zip(probabilities, places, strict=False)]

    def _best(self, probabilities: np.ndarray, ids: np.ndarray, place: int, top: int) -> list[dict[str, Any]]:
        found = []
        for piece in np.argsort(-probabilities[: self.config.vocab_size])[:top].tolist():
            filled = ids.copy()
            filled[place] = piece
            found.append(
                {
                    "token": self.tokenizer.id_to_token(piece),
                    "id": piece,
                    "probability": float(probabilities[piece]),
                    "text": self.tokenizer.decode(filled.tolist()),
                }
            )
        return found

    def classify(self, texts: Iterable[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """One {"label", "probability", "probabilities"} a text or (text, pair), in their order."""
        return list(self.classify_stream(texts))

    def classify_stream(self, texts: Iterable[str | tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """`classify` in bounded memory: reads `texts` as results are taken."""
        self._need("classifier", "classify", "a model that was fine-tuned with labels")
        for chunk in _chunks(texts, BATCH_SIZE * 16):
            examples = [Example(*_pair(text), "", 0) for text in chunk]
            features = featurize(examples, self.tokenizer, self.config.max_position_embeddings, None, "")
            yield from self._classify_features(features)

    def _classify_features(self, features: Features) -> list[dict[str, Any]]:
        lengths = np.array([len(ids) for ids in features.ids])
        order = np.argsort(lengths, kind="stable")  # neighbours in length share a batch, so little is padding
        results: list[dict[str, Any]] = [{}] * len(order)
        for start in range(0, len(order), BATCH_SIZE):
            numbers = np.full(BATCH_SIZE, -1)
            numbers[: len(order) - start] = order[start : start + BATCH_SIZE]
            logits = self._classify(self.params, self._collate(features, numbers))
            for number, row in zip(numbers, np.asarray(jax.nn.softmax(logits)), strict=True):
                if number >= 0:
                    results[number] = self._labelled(row)
        return results

    def _labelled(self, probabilities: np.ndarray) -> dict[str, Any]:
        values = [round(float(value), 6) for value in probabilities]
        best = int(probabilities.argmax())
        return {
            "label": self.labels[best],
            "probability": values[best],
            "probabilities": dict(zip(self.labels, values, strict=True)),
        }

    def _collate(self, features: Features, numbers: np.ndarray) -> Batch:
        whole = slice(0, len(numbers))
        return collate(features, numbers, whole, self.tokenizer.pad_id, self.config.max_position_embeddings)

    def _need(self, head: str, use: str, remedy: str) -> None:
        if head not in self.params:
            raise ConfigError(f"{use}: the model has no {head}; name {remedy}")


def _fill_logits(config: Any, params: Params, batch: Batch, places: jax.Array) -> jax.Array:
    hidden = gather(encode(config, params, batch, None), places)
    return jax.nn.softmax(pretrain.masked_lm_logits(config, params, hidden))


def _pair(text: str | tuple[str, str]) -> tuple[str, str | None]:
    return (text, None) if isinstance(text, str) else (text[0], text[1])


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def load(path: str) -> Bert:
    """A model directory, a workdir, or one of its checkpoints, ready for use."""
    return Bert(load_model(path))
