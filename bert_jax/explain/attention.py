"""Attention of all layers and heads: maps, the patterns that heads are known for, and a page to walk through them.

Shapes: L layers, B batch, N heads, S sequence, H head_dim. Layers and heads are numbered from 0, as in BertViz.
"""

import argparse
import base64
import dataclasses
import math
import os
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.data.features import PREDICT_LENGTHS, Features, collate, padded
from bert_jax.errors import ConfigError, DataError
from bert_jax.page import render
from bert_jax.progress import say
from bert_jax.storage import check_output, whole_file

if TYPE_CHECKING:  # JAX is imported when a model is: `--help` answers at once
    import jax

    from bert_jax.bert import Bert
    from bert_jax.tasks import Batch, Params

# Half of the attention. Of two places only one can have more; of few words a bag of words may, beside a place.
THRESHOLD = 0.5
MIXED = "mixed"
TOP = 5  # heads of a pattern that the command prints
# The page holds queries and keys, from which the browser computes any head's map: 64 numbers a token twice, where 512
# tokens have 512 probabilities, and those do not fit. 14.4 MB are 19.2 MB of base64: base at 512 tokens gets 12 bits.
PAGE_BYTES, MOST_BITS, LEAST_BITS = 14_400_000, 16, 8
CELLS = 64  # of a head's thumbnail in the PNG, along an edge


class Maps(NamedTuple):
    """What all heads make of one text or pair."""

    tokens: list[str]
    """S pieces, with [CLS] and [SEP]."""
    type_ids: np.ndarray
    """int32 [S], 0 in the first text of a pair and 1 in the second."""
    special: np.ndarray
    """bool [S], whether a piece is one of the [CLS] and [SEP] around the texts."""
    probabilities: np.ndarray
    """float32 [L, N, S, S]: how much the token of the third axis attends to that of the fourth."""
    query: np.ndarray
    """float32 [L, N, S, H]."""
    key: np.ndarray
    """float32 [L, N, S, H]; probabilities are softmax(query key^T / sqrt(H))."""
    cut: int = 0
    """Pieces that the model does not read, and `tokens` leaves out."""


class Patterns(NamedTuple):
    """How much each head is like the patterns that heads are known for."""

    scores: dict[str, np.ndarray]
    """pattern -> float64 [L, N], 0..1."""
    names: list[list[str]]
    """L lists of N: a head's best pattern, or "mixed" where none is above THRESHOLD."""


# Maps


def attention_maps(
    config: ModelConfig, params: "Params", batch: "Batch"
) -> tuple["jax.Array", "jax.Array", "jax.Array"]:
    """What every layer's heads attend to in a batch. `params` has layers apart (`model.separate_layers`).

    Returns float32 probabilities [L, B, N, S, S], whose rows sum to 1 over the tokens of the same packed example and
    are 0 elsewhere (rows of padding are all 0), and the queries and keys [L, B, N, S, H] that they come from.
    """
    import jax
    import jax.numpy as jnp

    from bert_jax.attention import masked_scores, same_example
    from bert_jax.model import project
    from bert_jax.tasks import encode

    segment_ids = jnp.asarray(batch["segment_ids"])
    visible = same_example(segment_ids) & (segment_ids > 0)[:, None, None]
    layers = []
    for number, x in enumerate(encode(config, params, batch, all_layers=True)[:-1]):
        heads = params[f"layers_{number}"]["attention"]
        query, key = (project(x, heads[name]["kernel"], heads[name]["bias"]) for name in ("query", "key"))
        scores = masked_scores(query * config.head_dim**-0.5, key, segment_ids)
        layers.append((jnp.where(visible, jax.nn.softmax(scores), 0), query, key))
    return tuple(jnp.stack(part).astype(jnp.float32) for part in zip(*layers, strict=True))


def maps(bert: "Bert", text: str, pair: str | None = None) -> Maps:
    """The attention of a loaded model to a text or pair. What is longer than it reads is cut, and told.

    A literal "[MASK]" in a text is the special piece. Raises DataError for a text without words.
    """
    import jax

    from bert_jax.explain.reading import read

    tokenizer, longest = bert.tokenizer, bert.config.max_position_embeddings
    texts = (text,) if pair is None else (text, pair)
    pieces = [tokenizer.pieces(given, special=True) for given in texts]
    for name, given, some in zip(("text", "pair"), texts, pieces, strict=False):
        if not some:
            raise DataError(f"{name}: no words in {given!r}; give some text")
    reading = read(tokenizer, texts, pieces, longest)
    size, cut = len(reading.ids), reading.left_out
    if cut:
        say(f"note: the text is cut to the {longest} pieces that the model reads; {cut:,} are left out")
    features = Features([reading.ids], [reading.sides])
    batch = collate(features, np.array([0]), tokenizer.pad_id, padded(size, PREDICT_LENGTHS, longest))
    config = dataclasses.replace(bert.config, dtype="float32")  # what bfloat16 rounds away is not the model's
    found = jax.jit(attention_maps, static_argnums=0)(config, bert.params, batch)
    probabilities, query, key = (np.asarray(part)[:, 0, :, :size] for part in found)
    special = np.array([span is None for span in reading.spans])
    return Maps(reading.tokens, reading.sides, special, probabilities[..., :size], query, key, cut)


# Patterns


def pattern_targets(found: Maps) -> dict[str, np.ndarray]:
    """pattern -> float [S, S], the most of each token's attention that the pattern accounts for at each place.

    A pattern with a place, or a few, accounts for all that lies there: the next or previous token ([CLS] and [SEP]
    among them), the token itself and the other places of the same piece, the [SEP]s, [CLS]. A bag of words is spread
    evenly over the n words (tokens but for [CLS] and [SEP]) of the sentence: it accounts for 1/n at each.
    """
    size = len(found.tokens)
    pieces, words = np.array(found.tokens), ~found.special
    sentence = (found.type_ids[:, None] == found.type_ids) & words
    separators = found.special & (np.arange(size) > 0)
    everywhere = np.ones((size, 1))
    return {
        "next token": np.eye(size, k=1),
        "previous token": np.eye(size, k=-1),
        "same token": (pieces[:, None] == pieces).astype(float),
        "[SEP]": everywhere * separators,
        "[CLS]": everywhere * (np.arange(size) == 0),
        "bag of words": sentence / sentence.sum(1, keepdims=True),
    }


def patterns(found: Maps) -> Patterns:
    """Each head's score for each pattern: the share of a word's attention that it accounts for, mean over the words.

    That is the sum over places of min(attention, target). For a bag of words it is 1 minus the total variation
    distance to attention that is spread evenly: 1 for even attention, 1/n for attention to one of n words.
    """
    words = ~found.special
    scores = {
        name: np.stack(
            [np.minimum(layer[:, words], target[words]).sum(-1).mean(-1) for layer in found.probabilities]
        )  # [L, N]
        for name, target in pattern_targets(found).items()
    }
    known = np.array(list(scores))
    every = np.stack(list(scores.values()))  # [patterns, L, N]
    names = np.where(every.max(0) > THRESHOLD, known[every.argmax(0)], MIXED)
    return Patterns(scores, names.tolist())


def table(known: Patterns) -> str:
    """For each pattern the heads with the highest scores, a line each."""
    lines = [f"{'pattern':<16}heads (layer.head, from 0) and the share of a word's attention it accounts for"]
    for name, scores in known.scores.items():
        best = np.argsort(-scores, axis=None, kind="stable")[:TOP]
        heads = (
            f"{layer}.{head} {scores[layer, head]:.2f}"
            for layer, head in zip(*np.unravel_index(best, scores.shape), strict=True)
        )
        lines.append(f"{name:<16}{'   '.join(heads)}")
    return "\n".join(lines)


# Page and image


def page(found: Maps, known: Patterns, model: str, given: list[str]) -> str:
    """The page with head view, model view, neuron view and patterns, whole; it names the model and the given texts."""
    _, heads, _, size = found.query.shape
    bits = min(MOST_BITS, max(LEAST_BITS, 8 * PAGE_BYTES // (2 * found.query.size)))
    layers = zip(found.probabilities, found.query, found.key, strict=True)
    packed, errors = zip(*(_pack(*layer, bits) for layer in layers), strict=True)
    data = {
        "model": model,
        "given": given,
        "tokens": found.tokens,
        "cut": found.cut,
        "types": found.type_ids.tolist(),
        "heads": heads,
        "head_dim": size,
        "bits": bits,
        "error": math.ceil(1e6 * max(errors)) / 1e6,
        "layers": packed,
        "patterns": list(known.scores),
        "scores": np.stack(list(known.scores.values()), -1).round(4).tolist(),
        "names": known.names,
    }
    return render(f"Attention: {' / '.join(given)}", "attention", data)


def _pack(probabilities: np.ndarray, query: np.ndarray, key: np.ndarray, bits: int) -> tuple[str, float]:
    """A layer's [N, S, H] queries and keys as base64, and how far that moves a probability.

    Each dimension of a head has a scale of its own, since some are far larger than others: float32 lowest values and
    steps [2, N, 2, H], then codes of `bits` bits [N, 2, S, H], most significant bit first.
    """
    vectors = np.stack([query, key], 1)  # [N, 2, S, H]
    low = vectors.min(2, keepdims=True)
    step = (vectors.max(2, keepdims=True) - low) / (2**bits - 1)
    codes = np.rint((vectors - low) / np.where(step > 0, step, 1)).astype(">u2")
    flags = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1)[:, 16 - bits :]
    blob = np.stack([low, step]).astype("<f4").tobytes() + np.packbits(flags).tobytes()
    shown = low + codes.astype(np.float32) * step
    scores = shown[:, 0] @ shown[:, 1].swapaxes(-1, -2) * query.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return base64.b64encode(blob).decode(), float(np.abs(weights - probabilities).max())


def draw(found: Maps, file: IO[bytes]) -> None:
    """A PNG of all layers (rows) and heads (columns): darker is more attention, by its square root."""
    from matplotlib.figure import Figure  # pyplot would choose a window system

    layers, heads, size, _ = found.probabilities.shape
    cells = min(size, CELLS)
    starts = -(-np.arange(cells) * size // cells)
    pooled = np.maximum.reduceat(np.maximum.reduceat(found.probabilities, starts, -1), starts, -2)
    grid = np.full((layers, cells + 1, heads, cells + 1), np.nan, np.float32)  # with a gap after each
    grid[:, :cells, :, :cells] = np.sqrt(pooled).swapaxes(1, 2)
    figure = Figure(figsize=(1 + 0.8 * heads, 1 + 0.8 * layers), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.reshape(layers * (cells + 1), -1), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("#b0c4de")
    axes.set_xticks((np.arange(heads) + 0.5) * (cells + 1), range(heads))
    axes.set_yticks((np.arange(layers) + 0.5) * (cells + 1), range(layers))
    axes.tick_params(length=0)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(f"Attention of {size} tokens: from top to bottom who looks, from left to right at whom", fontsize=9)
    figure.savefig(file, format="png", dpi=150)


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `explain attention` beside --model and --output."""
    parser.add_argument("--text", required=True, help="the text that is read")
    parser.add_argument("--text-b", help="a second text, for a pair")
    parser.add_argument("--png", help="also an image of all layers and heads (.png); needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Prints the heads of each pattern; writes the page and, where it is named, the image."""
    for option, path in (("--output", args.output), ("--png", args.png)):
        if path:
            check_output(option, path)
    if args.png and os.path.realpath(args.png) == os.path.realpath(args.output):
        raise ConfigError(f"--png {args.png}: the page goes there; name another file")
    if args.png:
        _need_matplotlib()
    from bert_jax.bert import load

    found = maps(load(args.model), args.text, args.text_b)
    known = patterns(found)
    if args.png:
        with whole_file(args.png, "wb") as file:
            draw(found, file)
    with whole_file(args.output, "w") as file:
        file.write(page(found, known, args.model, [text for text in (args.text, args.text_b) if text]))
    print(table(known))
    return 0


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install matplotlib, or leave it out") from error
