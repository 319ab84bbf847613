"""What a model is trained for. A `Task` is the record of functions and facts that the training loop works with.

Each file of this folder tells one task whole: examples -> batches, modules, loss, metric sums, score.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import PROBLEMS, Config, ModelConfig
from bert_jax.data.features import (
    EVAL_SHAPES,
    Features,
    Labelled,
    batches_by_length,
    choose_lengths,
    labelled_batch,
    rows_by_length,
)
from bert_jax.data.tokenizer_model import Tokenizer, load_tokenizer
from bert_jax.errors import ConfigError
from bert_jax.model import Encoder, EncoderLayer
from bert_jax.sharding import local_rows

Params = dict[str, Any]
Batch = dict[str, np.ndarray]
# Metric name -> (sum, count). They add up over micro-batches, devices and batches; the host divides at the end.
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Objective(NamedTuple):
    """What a compiled training step is made of: it needs no data."""

    init: Callable[[jax.Array], Params]
    """key -> parameters."""
    sums: Callable[[Params, Batch, jax.Array | None], Sums]
    """(params, batch, dropout key or None) -> metric sums."""
    weights: Callable[[Batch], dict[str, jax.Array]]
    """batch -> count of each loss term: from weights alone, so known before the forward pass."""
    losses: tuple[str, ...]
    """Metrics whose means add up to the training loss; the count of the last one counts examples."""
    layers: int
    """How many `model.separate_layers` takes apart before `sums` is called; 0 leaves the stack."""


class Task(NamedTuple):
    """One task, bound to its configuration and data."""

    objective: Objective
    rows: int
    """Training rows of one epoch."""
    train_batch: Callable[[int], Batch]
    """step -> this host's rows of that batch; a pure function."""
    eval_sets: dict[str, Callable[[], Iterator[Batch]]]
    """name -> its fixed batches, from the beginning at each call."""
    tokenizer: Tokenizer
    """What made the ids."""
    facts: str
    """The data in one line."""
    data_digest: str
    """Of all rows: processes of one run must have the same."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in order."""
    problem: str = PROBLEMS[0]
    """What a classifier's scores mean."""
    metric: str = ""
    """The score on the set "dev" that models are chosen by, the higher the better; "" when there is none."""
    unlabelled: frozenset[str] = frozenset()
    """Evaluation sets whose labels nobody knows: predictions are written, scores are not."""
    first_params: Callable[[], dict[str, np.ndarray]] | None = None
    """path -> array of parameters that a new run takes from its data instead of from `init`; weights that it starts
    from go before them."""
    outputs: Callable[[Params, Batch], dict[str, jax.Array]] | None = None
    """(params, batch) -> arrays [B, ...] of every row, for scores that are no sums."""
    score: Callable[[str, dict[str, np.ndarray]], dict[str, float]] | None = None
    """(evaluation set, its outputs in their order) -> metrics."""
    write_predictions: Callable[[str, str, dict[str, np.ndarray]], None] | None = None
    """(folder, evaluation set, outputs) -> files with one prediction an example."""


def choose_tokenizer(named: str, of_weights: str) -> str:
    """Path of a run's tokenizer: that of the weights it starts from, else `data.tokenizer`; "" when there is neither.

    Raises ConfigError when both are given and differ: ids would mean other pieces than the weights learned.
    """
    if named and of_weights and load_tokenizer(named).fingerprint != load_tokenizer(of_weights).fingerprint:
        raise ConfigError(f"data.tokenizer: {named} is not the tokenizer of the weights, {of_weights}; leave it out")
    return of_weights or named


def take_tokenizer(config: Config, tokenizer: str) -> Config:
    """Sets `data.tokenizer` to `tokenizer`, that of the weights, when a fine-tuning starts from some."""
    path = choose_tokenizer(config.data.tokenizer, tokenizer)
    if not path:
        raise ConfigError("data.tokenizer: name one, or start from weights with --train.init-from")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of a fine-tuning. Raises ConfigError when it has more pieces than the model has rows."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, but {config.data.tokenizer} has {tokenizer.vocab_size} "
            f"pieces; set --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def runner(config: Config, sets: dict[str, Labelled], pad_id: int) -> dict[str, Any]:
    """What a fine-tuning's `Task` says of its batches: `rows`, `data_digest`, `train_batch`, `eval_sets`."""
    length, batch_size = config.data.max_seq_len, config.train.global_batch_size
    train = sets.get("train", Labelled(Features([], []), {}))  # without, a finished model is judged
    count = len(train.features.ids)
    share = local_rows(batch_size)
    lengths = choose_lengths(train.lengths, length)
    rows_of = batches_by_length(train.lengths, batch_size, config.train.seed)

    def batches(found: Labelled) -> Iterator[Batch]:
        few = choose_lengths(found.lengths, length, EVAL_SHAPES)
        for rows in rows_by_length(found.lengths, batch_size):
            yield labelled_batch(found, rows, pad_id, few, share=share)

    digest = hashlib.sha256()
    for name, found in sorted(sets.items()):
        digest.update(f"{name} {len(found.features.ids)}".encode())
        for arrays in (found.features.ids, found.features.type_ids, *found.targets.values()):
            digest.update(np.concatenate(arrays or [[]]) if isinstance(arrays, list) else np.ascontiguousarray(arrays))
    return {
        "rows": count,
        "data_digest": digest.hexdigest(),
        "train_batch": lambda step: labelled_batch(train, rows_of(step), pad_id, lengths, share=share),
        "eval_sets": {name: functools.partial(batches, found) for name, found in sets.items() if name != "train"},
    }


def cut_note(count: int, what: str, length: int) -> str:
    """What is added to a task's facts when `count` of `what` did not fit."""
    return f"; {count:,} {what} are cut to {length} pieces" if count else ""


def encode(
    config: ModelConfig, params: Params, batch: Batch, dropout_key: jax.Array | None = None, *, all_layers: bool = False
) -> jax.Array:
    """Contextual vectors [B, S, D] of a batch's tokens; no key, no dropout. `all_layers`: [L + 1, B, S, D].

    A batch with `embedded` [B, S, D] is one whose tokens are embedded already.
    """
    separate = "layers" not in params
    encoder = Encoder(config, deterministic=dropout_key is None, all_layers=all_layers, separate=separate)
    return encoder.apply(
        {"params": {name: tree for name, tree in params.items() if name.startswith(("embeddings", "layers"))}},
        batch["input_ids"],
        batch["token_type_ids"],
        batch["position_ids"],
        batch["segment_ids"],
        batch.get("embedded"),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )


def encode_first(config: ModelConfig, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Contextual vectors [B, D] of the first token of each row, [CLS]: the last layer is run for these alone, which
    spares 10 of its 12 D x D products for each other token.
    """
    last = config.num_layers - 1
    if last == 0:
        return encode(config, params, batch, dropout_key)[:, 0]
    if "layers" in params:
        below = params | {"layers": jax.tree.map(lambda x: x[:last], params["layers"])}
        top = jax.tree.map(lambda x: x[last], params["layers"])
    else:
        below, top = params, params[f"layers_{last}"]
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    hidden = encode(dataclasses.replace(config, num_layers=last), below, batch, keys[0])
    layer = EncoderLayer(config, deterministic=dropout_key is None, first_only=True)
    rngs = None if dropout_key is None else {"dropout": keys[1]}
    return layer.apply({"params": top}, hidden, batch["segment_ids"], rngs=rngs)[0][:, 0]


def init_encoder(config: ModelConfig, key: jax.Array) -> Params:
    """First parameters of embeddings and layers."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return Encoder(config).init(key, ids, ids, ids, ids)["params"]


def gather(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, S, D] at positions [B, P] -> [B, P, D]."""
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def loss_and_accuracy(name: str, logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    """`{name}_loss` (cross-entropy in nats) and `{name}_accuracy` of float32 scores [..., C], counted by `weights`.

    A prediction is right when no score is above the label's: on a CPU that is ten times as fast as an argmax.
    """
    prefix = f"{name}_" if name else ""
    count = weights.sum()
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    right = (picked >= logits.max(-1)).astype(jnp.float32)
    return {
        f"{prefix}loss": ((loss * weights).sum(), count),
        f"{prefix}accuracy": ((right * weights).sum(), count),
    }
