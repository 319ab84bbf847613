"""The training state (arrays only) and the one pure training step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bert_jax.model import separate_layers, stack_layers
from bert_jax.sharding import (
    BATCH,
    ROWS,
    batch_shards,
    compiler_options,
    constrain_batch,
    platform,
    put_together,
    specs_over,
    tree_shardings,
)
from bert_jax.tasks import Batch, Objective, Params, Sums


@flax.struct.dataclass
class TrainState:
    """All that a step changes. Data order and dropout follow from `step`, so they need no state of their own."""

    step: jax.Array
    params: Params
    opt_state: Any


def abstract_state(objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state; allocates nothing."""
    state = jax.eval_shape(lambda: _new_state(objective.init, optimizer, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        tree_shardings(state, mesh),
    )


def create_state(objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """First state, born sharded: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, optimizer, mesh))
    create = jax.jit(lambda key: _new_state(objective.init, optimizer, key), out_shardings=shardings)
    return create(jax.random.key(seed))


def _new_state(init: Callable, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init(key)
    return TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params))


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether the norm of all parameters is a float32: false for NaN, infinity, and weights that grew past 1e19."""
    return jnp.isfinite(optax.tree.norm(params))


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], every part with rows of every device, so that no row moves."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def gradients(
    objective: Objective, params: Params, batch: Batch, key: jax.Array, accumulate: int
) -> tuple[Params, Sums]:
    """Gradient of the mean loss over the global batch, and its metric sums, over `accumulate` micro-batches.

    Each loss term is (global sum) / (global count): counts come first, from the weights of the whole batch, so
    micro-batches with few targets weigh what they should (a mean of means would not). Each device puts the parameters
    together from their shares, adds up its own rows of all micro-batches, and then gets the sum over all devices of its
    share alone (Rajbhandari et al. 2020, stage 3, but once a step): left to the compiler, every micro-batch would be
    added over all devices.
    """
    counts = objective.weights(batch)

    def loss(params: Params, micro: Batch, key: jax.Array, counts: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        sums = objective.sums(params, micro, key)
        return sum(sums[name][0] / jnp.maximum(counts[name], 1) for name in objective.losses), sums

    gradient = jax.grad(loss, has_aux=True)

    def add_all(params: Params, batch: Batch, key: jax.Array, counts: dict[str, jax.Array]) -> tuple[Params, Sums]:
        if accumulate == 1:
            return gradient(params, jax.tree.map(constrain_batch, batch), key, counts)

        def add_micro(total: tuple[Params, Sums], indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, micro = indexed
            part = gradient(params, jax.tree.map(constrain_batch, micro), jax.random.fold_in(key, index), counts)
            return jax.tree.map(jnp.add, total, part), None

        micros = split_batch(batch, accumulate)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micros), key, counts)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add_micro, zeros, (jnp.arange(accumulate), micros))[0]

    apart = separate_layers(params, objective.layers)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_shards(mesh) == 1:
        totals, sums = add_all(apart, batch, key, counts)
        return stack_layers(totals), sums
    specs = specs_over("fsdp", apart)

    def share(total: jax.Array, spec: P) -> jax.Array:
        if "fsdp" not in spec:
            return jax.lax.psum(total, ROWS)
        axis = spec.index("fsdp")
        return jax.lax.psum(jax.lax.psum_scatter(total, "fsdp", scatter_dimension=axis, tiled=True), "data")

    def add_shard(*given: Any) -> tuple[Params, Sums]:
        totals, sums = add_all(*given)
        return jax.tree.map(share, totals, specs), jax.lax.psum(sums, ROWS)

    shards = jax.shard_map(
        add_shard, in_specs=(P(), BATCH, P(), P()), out_specs=(specs, P()), axis_names=set(ROWS), check_vma=False
    )
    totals, sums = shards(put_together(apart), batch, key, counts)
    return stack_layers(totals), sums


def dropout_key(seed: jax.Array) -> jax.Array:
    """The key that a run's dropout keys come from. Accelerators have a generator of their own, and are fast with it."""
    return jax.random.key(seed, impl="threefry2x32" if platform() == "cpu" else "rbg")


def jit_step(objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, *, accumulate: int) -> Any:
    """`train_step` compiled for a mesh: (state, batch, seed, learning rate) -> (state, metrics).

    The state is given away. Neither seed, uint32, nor learning rate, float32, is a constant of the program: runs that
    differ in them, or in their length, share one. Nor are the first step and later ones two programs: the state comes
    out as `create_state` lays it out, where the compiler would leave out axes of one device.
    """
    bound = {"objective": objective, "optimizer": optimizer, "accumulate": accumulate}

    def step(
        state: TrainState, batch: Batch, seed: jax.Array, learning_rate: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        return train_step(state, batch, key=dropout_key(seed), learning_rate=learning_rate, **bound)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, optimizer, mesh))
    options = compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def jit_gradient(objective: Objective, mesh: Mesh) -> Any:
    """(params, batch, seed) -> gradient and sums of one micro-batch, compiled as in `jit_step`; for `plan`."""

    def gradient(params: Params, batch: Batch, seed: jax.Array) -> tuple[Params, Sums]:
        return gradients(objective, params, batch, dropout_key(seed), 1)

    return jax.jit(gradient, compiler_options=compiler_options(mesh))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    learning_rate: jax.Array,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step. Pure: the dropout key is `fold_in(key, step)`.

    Returns the next state and {"sums": Sums, "grad_norm": float32}.
    """
    grads, sums = gradients(objective, state.params, batch, jax.random.fold_in(key, state.step), accumulate)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, optax.tree.scale(-learning_rate, updates))
    return TrainState(state.step + 1, params, opt_state), {"sums": sums, "grad_norm": optax.tree.norm(grads)}
