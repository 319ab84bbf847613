"""Vectors of whole texts from a trained encoder: the feature-based use of BERT (Devlin et al. 2019, section 5.3)."""

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.tasks import Batch, Params, encode

POOLINGS = ("mean", "cls", "last4")


def last4(num_layers: int) -> tuple[int, ...]:
    """The last four of the layers 0, the embeddings, to `num_layers`; fewer where there are no four."""
    return tuple(range(max(0, num_layers - 3), num_layers + 1))


def vectors(
    config: ModelConfig, params: Params, batch: Batch, *, pooling: str = "mean", layers: tuple[int, ...] = ()
) -> jax.Array:
    """One vector a text, float32.

    Args:
      batch: one text a row, [B, S].
      pooling: mean over the tokens ([CLS] and [SEP] too), cls for the vector of [CLS], or last4 for the mean over the
        tokens of the last four layers' vectors, side by side (of a small model all layers', the embeddings too).
      layers: which layers, 0 being the embeddings; none is the last one. Not with last4.

    Returns:
      [B, D]; [B, 4 D] with last4; [B, len(layers), D] where layers are named.
    """
    chosen = last4(config.num_layers) if pooling == "last4" else layers
    hidden = encode(config, params, batch, all_layers=bool(chosen))
    hidden = hidden[jnp.array(chosen)] if chosen else hidden[None]  # [K, B, S, D]
    hidden = hidden.astype(jnp.float32)
    if pooling == "cls":
        pooled = hidden[:, :, 0]  # [K, B, D]
    else:
        real = (batch["segment_ids"] > 0).astype(jnp.float32)  # [B, S]
        pooled = jnp.einsum("kbsd,bs->kbd", hidden, real) / jnp.maximum(real.sum(1), 1)[:, None]
    pooled = pooled.swapaxes(0, 1)  # [B, K, D]
    if pooling == "last4":
        return pooled.reshape(pooled.shape[0], -1)
    return pooled if layers else pooled[:, 0]


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarity [T] of the rows of two arrays [T, D]; 0 where a vector is 0."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(-1) / np.maximum(lengths, 1e-12)
