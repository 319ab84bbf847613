"""The BERT encoder (Devlin et al. 2019): embeddings and post-norm transformer layers, stacked along one axis.

Shapes: B batch, S sequence, L layers, D hidden, N heads, H head_dim, F mlp.
"""

import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.attention import attend, dropout
from bert_jax.config import ModelConfig
from bert_jax.sharding import constrain_batch, platform


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (Hendrycks and Gimpel 2016), with erf in float32: `jax.nn.gelu`'s erfc takes longer."""
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": gelu,
    "relu": jax.nn.relu,
}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def affine(spec: str, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, kernel)` in the type of `x`, plus `bias` along the axes that come from `kernel`.

    The gradients of the float32 `kernel` and `bias` stay as they are summed, in float32. JAX's own would be rounded to
    the type of `x` first, and widened again in a pass of its own.
    """
    return _affine_forward(spec, x, kernel, bias)[0]


def _affine_forward(spec: str, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    narrow, (of_kernel, output) = kernel.astype(x.dtype), spec.split(",")[1].split("->")
    axes = [axis for axis, name in enumerate(output) if name not in of_kernel]
    return jnp.einsum(spec, x, narrow) + jnp.expand_dims(bias.astype(x.dtype), axes), (x, narrow)


def _affine_backward(spec: str, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    (x, narrow), (inputs, output) = kept, spec.split("->")
    of_x, of_kernel = inputs.split(",")
    summed = "".join(name for name in output if name not in of_kernel)
    of_bias = "".join(name for name in output if name in of_kernel)
    # By a product with ones, in the 8 rows of a TPU's tile: of one row its compiler makes a sum, which is far slower
    # for heads of 64 in long rows.
    ones = jnp.ones((8, *(gradient.shape[output.index(name)] for name in summed)), gradient.dtype)
    total = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
        jnp.einsum(f"{output},{of_kernel}->{of_x}", gradient, narrow),
        total(f"{of_x},{output}->{of_kernel}", x, gradient),
        total(f"z{summed},{output}->z{of_bias}", ones, gradient)[0],
    )


affine.defvjp(_affine_forward, _affine_backward)


class Affine(nn.Module):
    """The weights of a linear map, without applying it: kernel of `shape`, bias of its last `bias_ndim` axes."""

    shape: tuple[int, ...]
    stddev: float
    bias_ndim: int = 1

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.truncated_normal(self.stddev), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-self.bias_ndim :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm (Ba et al. 2016) of [..., D] with weights [D], in float32 whatever the type of `x`.

    Mean and variance come from one pass over `x`, and so do the two means of its gradient, where JAX's own would take
    one after the other. The backward pass keeps `x`, and of each row mean and inverse deviation. Rows whose
    mean is a thousand times their deviation would lose the variance in float32's rounding; those of BERT are near 0.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return ((wide - mean) * inverse * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon: float, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = kept
    wide, rows = gradient.astype(jnp.float32), tuple(range(x.ndim - 1))
    normal = (x.astype(jnp.float32) - mean) * inverse
    scaled = wide * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    of_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    return of_x.astype(x.dtype), (wide * normal).sum(rows), wide.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """`layer_norm` with its weights."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.epsilon)


class Embeddings(nn.Module):
    """Sum of token, position and token-type vectors, then LayerNorm and dropout."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        config = self.config
        normal = nn.initializers.truncated_normal(config.initializer_range)
        rows = {
            "token_embedding": (input_ids, config.padded_vocab_size),
            "position_embedding": (position_ids, config.max_position_embeddings),
            # Where there is one row, as in models without next-sentence prediction, B is read as A.
            "token_type_embedding": (jnp.minimum(token_type_ids, config.type_vocab_size - 1), config.type_vocab_size),
        }
        # Rows are taken from the f32 tables and the sum is cast: cast tables would get their gradients in bf16.
        x = sum(
            jnp.take(self.param(name, normal, (size, config.hidden_size)), ids, axis=0)
            for name, (ids, size) in rows.items()
        )  # [B, S, D]
        # Cast before the norm, as between layers: the backward pass keeps what goes in.
        x = LayerNorm(config.layer_norm_epsilon, name="norm")(x.astype(config.dtype))
        return dropout(x, config.hidden_dropout, None if self.deterministic else self.make_rng("dropout"))


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[B, S, D] by kernel [D, N, H] and bias [N, H] -> [B, N, S, H], for queries, keys or values.

    One product for all three, then split, is slower by a TPU's compiler: it puts the parts of its gradient together
    first. On a CPU there is no difference; GPUs were not measured.
    """
    return affine("bsd,dnh->bnsh", x, kernel, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention. `first_only`: [B, 1, D], what the first token of each row sees."""

    config: ModelConfig
    deterministic: bool
    first_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        config, stddev = self.config, self.config.initializer_range
        heads = (config.num_heads, config.head_dim)
        query, key, value = (
            Affine((config.hidden_size, *heads), stddev, 2, name=name)() for name in ("query", "key", "value")
        )
        context = attend(
            project(x[:, :1] if self.first_only else x, *query),
            project(x, *key),
            project(x, *value),
            segment_ids,
            dropout_rate=config.attention_dropout,
            dropout_key=None if self.deterministic else self.make_rng("dropout"),
            backend=config.attention,
        )  # [B, N, S, H]
        return affine("bnsh,nhd->bsd", context, *Affine((*heads, config.hidden_size), stddev, name="out")())


class Mlp(nn.Module):
    """Position-wise feed-forward block."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, stddev = self.config, self.config.initializer_range
        # One axis for B and S is faster on a CPU; on a TPU it keeps LayerNorm from being done on the way in and out.
        shape, tokens = x.shape, "bs" if platform() == "tpu" else "t"
        x = x if tokens == "bs" else x.reshape(-1, shape[-1])
        wi = Affine((config.hidden_size, config.mlp_dim), stddev, name="wi")()
        wo = Affine((config.mlp_dim, config.hidden_size), stddev, name="wo")()
        x = ACTIVATIONS[config.hidden_act](affine(f"{tokens}d,df->{tokens}f", x, *wi))
        return affine(f"{tokens}f,fd->{tokens}d", x, *wo).reshape(shape)


class EncoderLayer(nn.Module):
    """Attention and MLP, each followed by dropout, residual sum and LayerNorm. The body of the scan over layers.
    `first_only`: [B, 1, D], what it gives for the first token of each row.
    """

    config: ModelConfig
    deterministic: bool
    keep: bool = False
    first_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        config = self.config

        def drop(y: jax.Array) -> jax.Array:
            return dropout(y, config.hidden_dropout, None if self.deterministic else self.make_rng("dropout"))

        attended = SelfAttention(config, self.deterministic, self.first_only, name="attention")(x, segment_ids)
        x = x[:, :1] if self.first_only else x
        x = LayerNorm(config.layer_norm_epsilon, name="attention_norm")(x + drop(attended))
        x = LayerNorm(config.layer_norm_epsilon, name="mlp_norm")(x + drop(Mlp(config, name="mlp")(x)))
        x = constrain_batch(x)
        return x, x if self.keep else None


class Encoder(nn.Module):
    """Token ids to contextual vectors. Parameters: `embeddings/…` and `layers/…`, the latter stacked [L, …], or with
    `separate` one tree a layer, `layers_0/…` (see `separate_layers`).

    Call with int32 [B, S] arrays: `input_ids`, `token_type_ids` (A/B), `position_ids` (restart at each packed
    example) and `segment_ids` (number of the packed example, 0 for padding). `embedded` [B, S, D] takes the place of
    what the embeddings would give. Returns [B, S, D], or with `all_layers` [L + 1, B, S, D]: the embeddings, then what
    each layer gives.
    """

    config: ModelConfig
    deterministic: bool = True
    all_layers: bool = False
    separate: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        embedded: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        x = embedded
        if x is None:
            x = Embeddings(config, self.deterministic, name="embeddings")(input_ids, token_type_ids, position_ids)
        first = x = constrain_batch(x)
        layer = EncoderLayer
        if config.remat != "none":
            # Outside a loop the compiler would find the second computation to be the first, and keep its results.
            layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=self.separate)
        if self.separate:
            states = []
            for number in range(config.num_layers):
                x, _ = layer(config, self.deterministic, name=f"layers_{number}")(x, segment_ids)
                states.append(x)
            return jnp.stack([first, *states]) if self.all_layers else x
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            unroll=max(1, config.scan_unroll),
        )
        x, states = stack(config, self.deterministic, self.all_layers, name="layers")(x, segment_ids)
        return jnp.concatenate([first[None], states]) if self.all_layers else x


def separate_layers(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """`params` with the stack `layers` taken apart into `layers_0`, …: what programs without a loop over layers run;
    as they are where `num_layers` is 0.

    A slice of the stack is a copy in every call: half of the time of one sentence (`benchmarks/predict.py`).
    """
    if num_layers == 0:
        return params
    layers = {f"layers_{i}": jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(num_layers)}
    return {name: tree for name, tree in params.items() if name != "layers"} | layers


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `separate_layers`."""
    names = [f"layers_{i}" for i in range(len(params)) if f"layers_{i}" in params]
    if not names:
        return params
    stack = jax.tree.map(lambda *layers: jnp.stack(layers), *(params[name] for name in names))
    return {name: tree for name, tree in params.items() if name not in names} | {"layers": stack}
