"""AdamW and LAMB as chains of optax pieces, their schedule, and what decays.

Everything that speaks of "a layer" works on slices of the stacked layer axis, never on the whole stack.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bert_jax.config import OptimizerConfig
from bert_jax.sharding import path_name

STACKED = "layers/"  # parameters under this path carry a leading layer axis


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Steps of warm-up in a run of `num_steps`."""
    return round(config.warmup_fraction * num_steps) if config.warmup_fraction else config.warmup_steps


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at a step counted from 0: linear warm-up to the peak, then decay that would reach 0 at `num_steps`.

    Decay starts where warm-up ends, so the rate does not jump there (Google's BERT decays from step 0, and jumps).
    """
    warmup = warmup_steps(config, num_steps)
    rest = max(1, num_steps - warmup)

    def schedule(step: jax.Array) -> jax.Array:
        left = jnp.clip((num_steps - step) / rest, 0, 1)
        decay = {"linear": left, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left), "constant": 1.0}[config.schedule]
        return config.learning_rate * jnp.minimum((step + 1) / max(1, warmup), decay)

    return schedule


def decays(path: str) -> bool:
    """Whether weight decay applies: not to biases and LayerNorm (Devlin et al. 2019, appendix A.2 and its code)."""
    return not path.endswith(("bias", "norm/scale"))


def decay_mask(params: Any) -> Any:
    """Tree of booleans for `optax.add_decayed_weights`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_name(path)), params)


def build_optimizer(config: OptimizerConfig, num_layers: int) -> optax.GradientTransformation:
    """clip -> Adam moments -> decoupled decay -> (LAMB trust ratio) -> layer-wise decay.

    What comes out is times minus the learning rate in `train_step`, which is given that of each step: as a constant of
    the program, each schedule would be compiled anew.
    """
    pieces = []
    if config.clip_norm > 0:
        pieces.append(optax.clip_by_global_norm(config.clip_norm))
    adam = optax.scale_by_adam if config.bias_correction else scale_by_uncorrected_adam
    pieces.append(adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon))
    pieces.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    if config.name == "lamb":
        pieces.append(scale_by_layer_trust_ratio())
    if config.layer_decay != 1.0:
        pieces.append(scale_by_depth(config.layer_decay, num_layers))
    return optax.chain(*pieces)


def scale_by_uncorrected_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction from the raw moments: Google's BERT (`optimization.py`) never corrects their bias."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=zeros(params), nu=zeros(params))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=state.count + 1, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def scale_by_layer_trust_ratio() -> optax.GradientTransformation:
    """Scales each tensor's update by |param| / |update| (You et al. 2020, algorithm 2), layer by layer in a stack.

    Tensors that do not decay (biases and LayerNorm) keep their update, as in the reference implementation.
    """

    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        name = path_name(path)
        if not decays(name):
            return update
        axes = tuple(range(1 if name.startswith(STACKED) else 0, param.ndim))
        param_norm, update_norm = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (param, update))
        ratio = jnp.where((param_norm > 0) & (update_norm > 0), param_norm / jnp.maximum(update_norm, 1e-30), 1.0)
        return update * ratio

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


def scale_by_depth(factor: float, num_layers: int) -> optax.GradientTransformation:
    """Layer-wise decay (Clark et al. 2020): heads get 1, the top layer `factor`, ... the embeddings `factor**(L+1)`."""

    def scale(path: tuple, update: jax.Array) -> jax.Array:
        name = path_name(path)
        if name.startswith(STACKED):
            powers = factor ** (num_layers - jnp.arange(num_layers, dtype=jnp.float32))
            return update * powers.reshape(-1, *[1] * (update.ndim - 1))
        return update * factor ** (num_layers + 1) if name.startswith("embeddings/") else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
