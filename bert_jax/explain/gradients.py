"""What a score rests on: integrated gradients (Sundararajan et al. 2017) with respect to what the embeddings give.

Shapes: S sequence, D hidden, C labels, V vocabulary, K points of the path.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.model import Embeddings
from bert_jax.tasks import Batch, Params, classify, encode, ner, pretrain, squad

TOKENS = 1024  # of the points that are run at once; more is no faster on a CPU


class Integral(NamedTuple):
    """Attributions, and the score at both ends of the path. Without the error of the sum over the path,
    `scores.sum()` is `value - baseline_value` (completeness)."""

    scores: np.ndarray
    """float64 [S], summed over D."""
    value: float
    baseline_value: float


def target_scores(
    config: ModelConfig, params: Params, batch: Batch, target: tuple[jax.Array, jax.Array], *, kind: str
) -> jax.Array:
    """The score to be explained, a logit (of an answer two), of each row: float32 [B].

    `target` by `kind`: classify (any, label); tag (position, label); answer (first, last position); fill-mask
    (position, piece).
    """
    first, second = target
    if kind == "classify":
        return classify.logits(config, params, batch)[:, second]
    if kind == "tag":
        return ner.logits(config, params, batch)[:, first, second]
    if kind == "answer":
        scores = squad.logits(config, params, batch)
        return scores[:, first, 0] + scores[:, second, 1]
    return piece_logits(config, params, batch, first)[:, second]


def piece_logits(config: ModelConfig, params: Params, batch: Batch, position: jax.Array) -> jax.Array:
    """Logits [B, V] of the pieces at one position."""
    return pretrain.masked_lm_logits(config, params, encode(config, params, batch)[:, position])


@functools.partial(jax.jit, static_argnames="config")
def embed(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """[B, S, D], what the embeddings give: after their LayerNorm, without dropout."""
    embeddings = Embeddings(config, deterministic=True)
    ids = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids"))
    return embeddings.apply({"params": params["embeddings"]}, *ids)


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def path_part(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    target: tuple[jax.Array, jax.Array],
    ends: tuple[jax.Array, jax.Array],
    nodes: jax.Array,
    weights: jax.Array,
    *,
    kind: str,
) -> tuple[jax.Array, jax.Array]:
    """Some points of the straight path between two `ends` [1, S, D].

    Args:
      batch: one row, [1, S].
      nodes, weights: [K], how far along the path each point is, 0 to 1, and what its gradient counts.

    Returns:
      The scores at the points, [K], and their part of the attributions, [S].
    """
    begin, end = ends
    rows = {name: jnp.broadcast_to(array, (len(nodes), *array.shape[1:])) for name, array in batch.items()}

    def total(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = target_scores(config, params, rows | {"embedded": points}, target, kind=kind)
        return values.sum(), values  # rows do not see each other: the gradient of the sum is each one's own

    points = begin + nodes[:, None, None] * (end - begin)  # [K, S, D]
    gradients, values = jax.grad(total, has_aux=True)(points)
    return values, jnp.einsum("k,ksd,sd->s", weights, gradients, (end - begin)[0])


def integrated_gradients(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    target: tuple[int, int],
    baseline: Batch | None,
    *,
    kind: str,
    steps: int,
    tokens: int = TOKENS,
    report: Callable[[int], None] = lambda done: None,
) -> Integral:
    """Equation 3 of the paper for the score `target_scores` of one row.

    Args:
      batch: one row, [1, S].
      baseline: the row where the path begins; None for embeddings of zero.
      steps: points of the integral, by Gauss and Legendre's rule, as Captum's default.
      tokens: points that are run at once hold at most so many, or are one.
      report: called with how many points of `steps` + 2, both ends among them, are done.
    """
    end = embed(config, params, batch)  # [1, S, D]
    begin = jnp.zeros_like(end) if baseline is None else embed(config, params, baseline)
    # Both ends are points too, which count nothing: so their scores need no program of their own.
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    nodes, weights = np.concatenate([[0, 1], (nodes + 1) / 2]), np.concatenate([[0, 0], weights / 2])
    parts = -(-len(nodes) // max(tokens // end.shape[1], 1))
    rows = -(-len(nodes) // parts)
    spare = parts * rows - len(nodes)
    nodes, weights = (np.pad(a, (0, spare)).astype(np.float32).reshape(parts, rows) for a in (nodes, weights))
    values, scores = [], np.zeros(end.shape[1])
    with jax.default_matmul_precision("float32"):  # accelerators' shorter products would spoil completeness
        for some, counts in zip(nodes, weights, strict=True):
            found, part = path_part(config, params, batch, target, (begin, end), some, counts, kind=kind)
            values.append(np.asarray(found))
            scores += np.asarray(part, np.float64)
            report(min(len(values) * rows, steps + 2))
    baseline_value, value = np.concatenate(values)[:2].tolist()
    return Integral(scores, value, baseline_value)
