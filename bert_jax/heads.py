"""What stands on the encoder: pooler, masked language model (tied), next sentence, and labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.attention import MASKED, dropout
from bert_jax.config import ModelConfig
from bert_jax.model import ACTIVATIONS, Affine, LayerNorm


class Pooler(nn.Module):
    """tanh of a linear map of the [CLS] vectors: [..., D] -> [..., D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        size = self.config.hidden_size
        kernel, bias = Affine((size, size), self.config.initializer_range, name="dense")()
        return jnp.tanh(first @ kernel.astype(first.dtype) + bias.astype(first.dtype))


class MlmHead(nn.Module):
    """Scores of the vocabulary for gathered positions: [..., D] -> [..., V], float32; the decoder is the token table.

    Columns that only pad the vocabulary get a score that no softmax sees.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, token_embedding: jax.Array) -> jax.Array:
        config = self.config
        size, padded = config.hidden_size, config.padded_vocab_size
        kernel, bias = Affine((size, size), config.initializer_range, name="transform")()
        x = ACTIVATIONS[config.hidden_act](hidden @ kernel.astype(hidden.dtype) + bias.astype(hidden.dtype))
        x = LayerNorm(config.layer_norm_epsilon, name="norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (padded,))
        # Padding is masked in the bias: a pass over the vocabulary, not one over the logits.
        bias = jnp.where(jnp.arange(padded) < config.vocab_size, bias, MASKED)
        table = token_embedding.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32) + bias


class ClassifierHead(nn.Module):
    """Dropout and a linear map to `num_labels` float32 scores: [..., D] -> [..., C]. Serves NSP (2 labels) too."""

    config: ModelConfig
    num_labels: int
    dropout_rate: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dropout(x, self.dropout_rate, None if self.deterministic else self.make_rng("dropout"))
        shape = (self.config.hidden_size, self.num_labels)
        kernel, bias = Affine(shape, self.config.initializer_range, name="dense")()
        return x.astype(jnp.float32) @ kernel + bias
