"""Self-attention over packed rows: tokens see only tokens of their own example. One function, three back ends."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bert_jax.sharding import ROWS, batch_axes, inside_shard, platform

MASKED = -1e30  # finite, so that a row of padding gives a uniform softmax and no NaN
SPLASH_LANES, SPLASH_BLOCK = 128, 512  # row lengths are multiples of the first; tokens of a tile at most the second


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8 random numbers, on CPUs the same on any mesh: four from each 32-bit word of their generator, where
    `jax.random.bits` would spend a word on each.
    """
    if platform() != "cpu":
        return own_random_bytes(key, shape)
    shards = jax.lax.axis_size(ROWS) if inside_shard() else 1
    size = math.prod(shape[1:])  # in one row: a short innermost axis is unrolled, and compiled for half as long again
    words = jax.random.bits(key, (shards * shape[0], -(-size // 4)), jnp.uint32)
    if shards > 1:  # those of all, of which these rows are a part
        words = jax.lax.dynamic_slice_in_dim(words, jax.lax.axis_index(ROWS) * shape[0], shape[0])
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(shape[0], -1)[:, :size].reshape(shape)


def own_random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8 random numbers of which each device makes its part from a key of its own: its rows of axis 0 and, of four
    axes, its heads of axis 1.

    The compiler cannot split accelerators' generators: it lets every device make the numbers of the global batch. Nor
    do they need their words cut up, which costs a TPU more than making them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.random.bits(key, shape, jnp.uint8)
    of_scores, rows = len(shape) == 4, batch_axes()
    spec = P(rows, "tensor") if of_scores else P(rows)
    axes = (*ROWS, "tensor") if of_scores else ROWS
    heads = shape[1] // mesh.shape["tensor"] if of_scores else shape[1]
    part = (shape[0] // math.prod(mesh.shape[axis] for axis in rows), heads, *shape[2:])

    def local(key: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, jax.lax.axis_index(axes)), part, jnp.uint8)

    found = jax.shard_map(local, in_specs=P(), out_specs=spec, check_vma=False)(key)
    return found.swapaxes(2, 3) if of_scores else found  # as a TPU lays out scores [B, N, S, S]: else they are copied


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` (rounded to 1/256) of `x` and scales the rest; `key=None` returns `x`.

    A byte decides: with a word an element, making the masks took half of a training step on a CPU.
    """
    keep, scale = keep_mask(x.shape, rate, key)
    return x if keep is None else jnp.where(keep, x * jnp.asarray(scale, x.dtype), 0)


def keep_mask(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> tuple[jax.Array | None, float]:
    """What dropout keeps, bool, and by what it multiplies that; None and 1 where it keeps all."""
    threshold = round(rate * 256)
    if key is None or threshold == 0:
        return None, 1.0
    return random_bytes(key, shape) >= threshold, 256 / (256 - threshold)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), block-diagonal over the examples of a row.

    Args:
      query, key, value: [B, N, S, H]; heads before tokens, since the products over heads are then plain matrix
        products (on a CPU the forward pass is 1.7 times as fast as with tokens first). Queries may be those of the
        first tokens of each row only.
      segment_ids: [B, S] number of the packed example a token belongs to; 0 is padding.
      dropout_rate, dropout_key: dropout of the probabilities; no key, no dropout.
      backend: one of ModelConfig.attention. `splash` and `cudnn`, which have no dropout, are taken where the program
        is for a TPU or a GPU and the shapes suit them; the mathematics is the same everywhere.

    Returns:
      One vector a query, [B, N, S, H], of the type of `value`.
    """
    scaled = query * query.shape[-1] ** -0.5
    if query.shape == key.shape and (dropout_key is None or dropout_rate == 0):
        if backend == "splash" and platform() == "tpu" and query.shape[2] % SPLASH_LANES == 0:
            return splash_attention(scaled, key, value, segment_ids)
        if backend == "cudnn" and platform() == "gpu" and query.dtype == jnp.bfloat16:
            return cudnn_attention(scaled, key, value, segment_ids)
    scores = masked_scores(scaled, key, segment_ids)  # [B, N, S, S]
    probabilities = softmax(scores, value.dtype, *keep_mask(scores.shape, dropout_rate, dropout_key))
    return jnp.einsum("bnqk,bnkh->bnqh", probabilities, value)


def masked_scores(scaled: jax.Array, key: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Products of scaled queries and keys [B, N, S, H] -> float32 [B, N, S, S], MASKED between examples of a row.

    Queries may be those of the first tokens only.
    """
    scores = jnp.einsum("bnqh,bnkh->bnqk", scaled, key)
    # A sum, whose backward pass keeps nothing, not a choice, which keeps an array of the scores' size.
    return scores.astype(jnp.float32) + jnp.where(same_example(segment_ids)[:, :, : scaled.shape[2]], 0.0, MASKED)


def same_example(segment_ids: jax.Array) -> jax.Array:
    """[B, S] -> bool [B, 1, S, S], whether two tokens belong to one example."""
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
def softmax(scores: jax.Array, dtype: jnp.dtype, keep: jax.Array | None = None, scale: float = 1.0) -> jax.Array:
    """Softmax of float32 `scores` over the last axis, as `dtype`; with `keep` and `scale`, of `keep_mask`, dropped out.

    The backward pass keeps one array of `dtype`, the probabilities, less than 0 where they were dropped. JAX's own
    would keep them in float32 too, the largest array of a layer, and the mask.
    """
    return _softmax_forward(scores, dtype, keep, scale)[0]


def _softmax_forward(
    scores: jax.Array, dtype: jnp.dtype, keep: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    signed = jax.nn.softmax(scores, axis=-1).astype(dtype)
    if keep is None:
        return signed, signed
    signed = jnp.where(keep, signed, -signed)
    return jnp.maximum(signed, 0) * jnp.asarray(scale, dtype), signed


def _softmax_backward(dtype: jnp.dtype, scale: float, signed: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    wide = signed.astype(jnp.float32)
    weighted = jnp.maximum(wide, 0) * (scale * gradient.astype(jnp.float32))
    return weighted - jnp.abs(wide) * weighted.sum(-1, keepdims=True), None


softmax.defvjp(_softmax_forward, _softmax_backward)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPUs: no array of [S, S] is ever in memory. `query` is scaled already.

    `interpret` runs it anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        heads, length = query.shape[1:3]
        block = next(size for size in range(SPLASH_BLOCK, 0, -SPLASH_LANES) if length % size == 0)
        forward = {"block_q": block, "block_kv": block, "block_kv_compute": block}
        backward = {"block_q_dkv": block, "block_kv_dkv": block, "block_kv_dkv_compute": block}
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.FullMask((length, length))] * heads),
            block_sizes=kernels.BlockSizes(**forward, **backward, use_fused_bwd_kernel=True),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(kernel)(query, key, value, kernels.SegmentIds(segment_ids, segment_ids))

    return on_each_device(local, query, key, value, segment_ids)


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """cuDNN's fused kernel, for bfloat16 on GPUs. `query` is scaled already."""

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        tokens_first = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, S, N, H]
        mask = same_example(segment_ids)
        found = jax.nn.dot_product_attention(*tokens_first, mask=mask, scale=1.0, implementation="cudnn")
        return found.swapaxes(1, 2)

    return on_each_device(local, query, key, value, segment_ids)


def on_each_device(local: Any, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`local`, attention in a kernel, which the compiler cannot split, on the rows and heads of each device."""
    if jax.sharding.get_abstract_mesh().empty:
        return local(query, key, value, segment_ids)
    rows, heads = P(batch_axes()), P(batch_axes(), "tensor")
    # Kernels do not tell over which axes their outputs vary.
    return jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        query, key, value, segment_ids
    )
