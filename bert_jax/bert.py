"""A loaded model and what it can be asked. The pure functions behind it take parameters explicitly (`tasks/`).

Texts are read in chunks, sorted by length inside a chunk, and run in batches of few shapes, so that little is padding
and little is compiled; results come in the order of the texts.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import VOCAB_MULTIPLE
from bert_jax.convert import Model, load_model
from bert_jax.data.features import PREDICT_LENGTHS, Features, collate, featurize, padded
from bert_jax.data.tokenizer_model import Tokenizer, load_tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.model import separate_layers
from bert_jax.process import keep_programs
from bert_jax.progress import say
from bert_jax.tasks import Batch, Params, classify, embed, encode, gather, ner, pretrain, squad

Text = str | tuple[str, str]
CHUNK, CHUNK_CHARS = 2048, 4_000_000  # texts in memory at a time, and their characters
TOKENS = 1024  # of a full batch; more at once is no faster on a CPU
AHEAD = 2  # batches under way
FILL_WIDTH = 8  # masks of a text are padded to a multiple of this


class Bert:
    """A loaded model; made by `bert_jax.load`."""

    def __init__(self, model: Model):
        self.params: Params = jax.tree.map(jnp.asarray, separate_layers(model.params, model.config.num_layers))
        self.config, self.labels, self.problem = model.config, model.labels, model.problem
        self.null_threshold = model.null_threshold
        self.tokenizer: Tokenizer = load_tokenizer(model.tokenizer)
        if self.tokenizer.vocab_size > self.config.vocab_size:  # JAX would clamp such ids without a word
            raise DataError(
                f"{model.tokenizer}: the tokenizer has {self.tokenizer.vocab_size} pieces, the model only "
                f"{self.config.vocab_size}; they do not belong together"
            )
        if self.config.vocab_size - self.tokenizer.vocab_size >= VOCAB_MULTIPLE:  # more than padding
            say(
                f"note: {model.tokenizer} has {self.tokenizer.vocab_size:,} pieces and the model rows for "
                f"{self.config.vocab_size:,}; do they belong together?"
            )
        self._jit = functools.cache(lambda function, **settings: jax.jit(functools.partial(function, **settings)))

    # Masks

    def fill_mask(self, text: str, top: int = 5) -> list[list[dict[str, Any]]]:
        """For each [MASK] of `text`, its `top` pieces: {"token", "id", "probability", "text"}, best first.

        The other masks stay in "text". Of a text that is longer than the model reads, it sees what stands around each
        mask. Raises DataError when there is no [MASK], ConfigError when the model has no MLM head.
        """
        self._need("mlm_head", "fill-mask", "a pre-trained model")
        ids = np.array(self.tokenizer.encode(text).ids, np.int32)
        places = np.flatnonzero(ids == self.tokenizer.mask_id)
        if not len(places):
            raise DataError(f"text: no {self.tokenizer.id_to_token(self.tokenizer.mask_id)} in {text!r}")
        longest = self.config.max_position_embeddings
        if len(ids) <= longest:
            return self._fill(ids, ids, places, places, top)
        say(f"note: the text has {len(ids):,} pieces, the model reads {longest}: those around each mask")
        found = []
        for place in places:
            first = min(max(1, place - (longest - 2) // 2), len(ids) - 1 - (longest - 2))
            shown = np.concatenate([ids[:1], ids[first : first + longest - 2], ids[-1:]])
            found += self._fill(ids, shown, np.array([place]), np.array([place - first + 1]), top)
        return found

    def _fill(
        self, ids: np.ndarray, shown: np.ndarray, places: np.ndarray, shown_places: np.ndarray, top: int
    ) -> list[list[dict[str, Any]]]:
        """What fills `places` of `ids` when the model reads `shown`, where they are at `shown_places`."""
        features = Features([shown], [np.zeros_like(shown)])
        length = padded(len(shown), PREDICT_LENGTHS, self.config.max_position_embeddings)
        batch = collate(features, np.array([0]), self.tokenizer.pad_id, length)
        wide = np.zeros((1, -(-len(places) // FILL_WIDTH) * FILL_WIDTH), np.int32)
        wide[0, : len(places)] = shown_places
        fill = self._jit(_fill, config=self.config)
        probabilities = np.asarray(fill(params=self.params, batch=batch, places=wide))[0]
        return [self._best(row, ids, place, top) for row, place in zip(probabilities, places, strict=False)]

    def _best(self, probabilities: np.ndarray, ids: np.ndarray, place: int, top: int) -> list[dict[str, Any]]:
        found = []
        for piece in np.argsort(-probabilities[: self.tokenizer.vocab_size])[:top].tolist():
            filled = ids.copy()
            filled[place] = piece
            found.append(
                {
                    "token": self.tokenizer.id_to_token(piece),
                    "id": piece,
                    "probability": float(probabilities[piece]),
                    "text": self.tokenizer.decode(filled.tolist(), shown=[self.tokenizer.mask_id]),
                }
            )
        return found

    # Texts and pairs

    def classify(self, texts: Iterable[Text]) -> list[dict[str, Any]]:
        """One dictionary a text or (text, pair), in their order.

        {"label", "probability", "probabilities"}; of a model with several labels a text {"labels", "probabilities"},
        those above one half; of a regression {"score"}, or {"scores"} where there are several.
        """
        return list(self.classify_stream(texts))

    def classify_stream(self, texts: Iterable[Text]) -> Iterator[dict[str, Any]]:
        """`classify` in bounded memory: reads `texts` as results are taken."""
        self._need("classifier", "classify", "a model that was fine-tuned with labels")
        yield from map(self._labelled, self._stream(classify.predictions, texts, problem=self.problem))

    def _labelled(self, row: np.ndarray) -> dict[str, Any]:
        values = dict(zip(self.labels, (round(float(value), 6) for value in row), strict=True))
        if self.problem == "regression":
            return {"score": values[self.labels[0]]} if len(values) == 1 else {"scores": values}
        if self.problem == "multi_label_classification":
            return {"labels": [name for name, value in values.items() if value > 0.5], "probabilities": values}
        best = self.labels[int(row.argmax())]
        return {"label": best, "probability": values[best], "probabilities": values}

    def embed(self, texts: Iterable[Text], pooling: str = "mean", layers: Iterable[int] | str = ()) -> np.ndarray:
        """Vectors of texts, as `tasks.embed.vectors` describes them: float32 [T, D], [T, 4 D] or [T, layers, D].

        `layers` are numbers from 0, the embeddings, to the number of layers, or "all".
        """
        found = list(self.embed_stream(texts, pooling, layers))
        return np.stack(found) if found else np.zeros((0, *self.vector_shape(pooling, layers)), np.float32)

    def embed_stream(
        self, texts: Iterable[Text], pooling: str = "mean", layers: Iterable[int] | str = ()
    ) -> Iterator[np.ndarray]:
        """`embed` in bounded memory: one array a text."""
        yield from self._stream(embed.vectors, texts, pooling=pooling, layers=self._layers(pooling, layers))

    def vector_shape(self, pooling: str, layers: Iterable[int] | str = ()) -> tuple[int, ...]:
        """Shape of what `embed` gives for one text."""
        chosen, size = self._layers(pooling, layers), self.config.hidden_size
        if pooling == "last4":
            return (size * len(embed.last4(self.config.num_layers)),)
        return (len(chosen), size) if chosen else (size,)

    def _layers(self, pooling: str, layers: Iterable[int] | str) -> tuple[int, ...]:
        known = range(self.config.num_layers + 1)
        chosen = tuple(known) if layers == "all" else tuple(layers)
        if pooling not in embed.POOLINGS:
            raise ConfigError(f"pooling: {pooling!r} is none of {', '.join(embed.POOLINGS)}")
        if any(layer not in known for layer in chosen):
            raise ConfigError(f"layers: {list(chosen)}, but the model's go from 0 (embeddings) to {known[-1]}")
        if pooling == "last4" and chosen:
            raise ConfigError("layers: pooling last4 says itself which layers")
        return chosen

    def similarity(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Cosine of the mean vectors of each pair of texts."""
        return list(self.similarity_stream(pairs))

    def similarity_stream(self, pairs: Iterable[tuple[str, str]]) -> Iterator[float]:
        """`similarity` in bounded memory."""
        vectors = self.embed_stream(itertools.chain.from_iterable(map(_two_texts, pairs)))
        for first, second in zip(vectors, vectors, strict=True):
            yield float(embed.cosine(first, second))

    # Words and spans

    def tag(self, text: str) -> dict[str, Any]:
        """{"words", "labels", "entities"}: a label a word, and {"kind", "text", "start", "end"} of what they spell."""
        return next(self.tag_stream([text]))

    def tag_stream(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        """`tag` of many texts, in bounded memory."""
        self._need("tagger", "tag", "a model that was fine-tuned for words")
        longest, cut, windowed = self.config.max_position_embeddings, 0, 0
        for chunk in _chunks(_several(texts)):
            split = [ner.split_words(text, self.tokenizer) for text in chunk]
            places = [[word.span for word in mine] for mine in split]
            words = [[text[slice(*place)] for place in mine] for text, mine in zip(chunk, places, strict=True)]
            shown = ner.featurize([[word.ids for word in mine] for mine in split], self.tokenizer, longest)
            cut, windowed = cut + shown.features.cut, windowed + sum(len(mine) > 1 for mine in shown.of_sentence)
            scores = ner.decode(shown, self._run(ner.logits, shown.features))
            for text, mine, spans, rows in zip(chunk, words, places, scores, strict=True):
                yield self._tagged(text, mine, spans, [self.labels[row.argmax()] for row in rows])
        if windowed:
            say(f"note: {windowed:,} of the texts are longer than the {longest} pieces of a window and read in several")
        if cut:
            say(f"note: {cut:,} words are longer than the {longest} pieces of a window; their ends are cut")

    @staticmethod
    def _tagged(text: str, words: list[str], spans: list[tuple[int, int]], labels: list[str]) -> dict[str, Any]:
        found = [
            {"kind": kind, "text": text[spans[first][0] : spans[last - 1][1]]}
            | {"start": spans[first][0], "end": spans[last - 1][1]}
            for kind, first, last in ner.entities(labels)
        ]
        return {"words": words, "labels": labels, "entities": found}

    def answer(self, question: str, context: str, top: int = 1) -> list[dict[str, Any]]:
        """The `top` spans of `context` that answer `question`: {"text", "score", "start", "end"}, best first.

        `score` is the sum of the logits of start and end. A model of SQuAD 2.0 puts the empty text first, from 0 to 0,
        where "no answer" scores above the best one by more than what was tuned on dev. A context longer than the model
        reads is gone through in overlapping windows; a question is cut to 64 pieces, as in google-research/bert, or
        half of what it reads.
        """
        return next(self.answer_stream([(question, context)], top))

    def answer_stream(self, questions: Iterable[tuple[str, str]], top: int = 1) -> Iterator[list[dict[str, Any]]]:
        """`answer` to many (question, context), in bounded memory."""
        self._need("span_head", "answer", "a model that was fine-tuned on questions")
        longest, cut, windowed = self.config.max_position_embeddings, 0, 0
        for chunk in _chunks(questions):
            asked, contexts = map(list, zip(*chunk, strict=True))
            shown = squad.featurize(asked, contexts, self.tokenizer, longest)
            cut, windowed = cut + shown.features.cut, windowed + sum(len(mine) > 1 for mine in shown.of_question)
            answers = squad.decode(shown, self._run(squad.logits, shown.features), top, self.null_threshold)
            for context, found in zip(contexts, answers, strict=True):
                yield [
                    {"text": context[start:end], "score": score, "start": start, "end": end}
                    for score, start, end in found
                ]
        if windowed:
            say(f"note: {windowed:,} contexts do not fit into a window of {longest} pieces and are read in several")
        if cut:
            say(f"note: {cut:,} questions are cut to {min(squad.MAX_QUESTION, longest // 2)} pieces")

    # Batches

    def _stream(self, function: Callable, texts: Iterable[Text], **settings: Any) -> Iterator[np.ndarray]:
        """`function`'s row for each text or pair."""
        longest, cut = self.config.max_position_embeddings, 0
        for chunk in _chunks(_several(texts)):
            firsts, pairs = zip(*map(_pair, chunk), strict=True)
            features = featurize(firsts, pairs, self.tokenizer, longest)
            cut += features.cut
            yield from self._run(function, features, **settings)
        if cut:
            say(f"note: {cut:,} of the texts are cut to the {longest} pieces that the model reads")

    def _run(self, function: Callable, features: Features, **settings: Any) -> list[np.ndarray]:
        """`function(config, params, batch, **settings)` [B, ...] for all texts, in their order."""
        run = self._jit(function, config=self.config, **settings)
        results: list[np.ndarray] = [np.zeros(0)] * len(features.ids)
        lengths = np.array([len(ids) for ids in features.ids])
        pending: deque[tuple[np.ndarray, jax.Array]] = deque()  # the next batch is made while the device works
        for numbers, length in batches(lengths, self.config.max_position_embeddings):
            batch = collate(features, numbers, self.tokenizer.pad_id, length)
            pending.append((numbers, run(params=self.params, batch=batch)))
            if len(pending) > AHEAD:
                _place(results, *pending.popleft())
        for numbers, rows in pending:
            _place(results, numbers, rows)
        return results

    def _need(self, head: str, use: str, remedy: str) -> None:
        if head not in self.params:
            raise ConfigError(f"{use}: the model has no {head}; name {remedy}")


def batches(lengths: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """(numbers, length) of batches for texts of `lengths`, neighbours in length; numbers of -1 fill the last one up.

    Few shapes: a length is one of PREDICT_LENGTHS, and the rows make up TOKENS, or are 1 or 8 for a few texts.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded(int(lengths[order[start]]), PREDICT_LENGTHS, longest)
        rows = max(TOKENS // length // 8 * 8, 8)
        numbers = order[start : start + rows]
        start += rows
        rows = next(few for few in (1, 8, rows) if few >= len(numbers))
        yield np.pad(numbers, (0, rows - len(numbers)), constant_values=-1), length


def _place(results: list[np.ndarray], numbers: np.ndarray, rows: jax.Array) -> None:
    for number, row in zip(numbers, np.asarray(rows), strict=True):
        if number >= 0:
            results[number] = row


def _fill(config: Any, params: Params, batch: Batch, places: jax.Array) -> jax.Array:
    hidden = gather(encode(config, params, batch), places)
    return jax.nn.softmax(pretrain.masked_lm_logits(config, params, hidden))


def _pair(text: Text) -> tuple[str, str | None]:
    return (text, None) if isinstance(text, str) else (text[0], text[1])


def _several(texts: Iterable[Any]) -> Iterable[Any]:
    if isinstance(texts, str):  # its letters would be taken for texts
        raise ConfigError("texts: give a list of texts, not one text")
    return texts


def _two_texts(pair: tuple[str, str]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2:  # the letters of a text would be taken for texts
        raise ConfigError(f"pairs: give pairs of texts, not {pair!r}")
    return pair


def _chunks(items: Iterable[Text]) -> Iterator[list[Any]]:
    """Lists of at most CHUNK items that hold CHUNK_CHARS characters, or one item that holds more."""
    chunk, size = [], 0
    for item in items:
        length = len(item) if isinstance(item, str) else sum(map(len, filter(None, item)))
        if chunk and (len(chunk) >= CHUNK or size + length > CHUNK_CHARS):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += length
    if chunk:
        yield chunk


def load(path: str) -> Bert:
    """A model directory, a workdir, or one of its checkpoints, ready for use."""
    keep_programs()
    return Bert(load_model(path))
