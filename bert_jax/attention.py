"""Self-attention over packed rows: tokens see only tokens of their own example."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row of padding gives a uniform softmax and no NaN


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8 random numbers, four from each 32-bit word; `jax.random.bits` would spend a whole word on each byte."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` (rounded to 1/256) of `x` and scales the rest; `key=None` returns `x`.

    A byte decides: with a word an element, making the masks took half of a training step on a CPU.
    """
    threshold = round(rate * 256)
    if key is None or threshold == 0:
        return x
    keep = random_bytes(key, x.shape) >= threshold
    return jnp.where(keep, x * jnp.asarray(256 / (256 - threshold), x.dtype), 0)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), block-diagonal over the examples of a row.

    Args:
      query, key, value: [B, N, S, H]; heads before tokens, since the products over heads are then plain matrix
        products (on a CPU the forward pass is 1.7 times as fast as with tokens first).
      segment_ids: [B, S] number of the packed example a token belongs to; 0 is padding.
      dropout_rate, dropout_key: dropout of the probabilities; no key, no dropout.

    Returns:
      [B, N, S, H], of the type of `value`.
    """
    scores = jnp.einsum("bnqh,bnkh->bnqk", query * query.shape[-1] ** -0.5, key)
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, S, S]
    scores = jnp.where(visible, scores.astype(jnp.float32), MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)  # [B, N, S, S]
    probabilities = dropout(probabilities, dropout_rate, dropout_key)
    return jnp.einsum("bnqk,bnkh->bnqh", probabilities, value)
