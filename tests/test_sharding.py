"""One table of PartitionSpecs: the same loss and the same new parameters on every mesh, state born sharded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bert_jax import hlo
from bert_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from bert_jax.data import pipeline
from bert_jax.data.prepare import load_manifest
from bert_jax.errors import ConfigError
from bert_jax.optimizer import build_optimizer
from bert_jax.sharding import PARTITION_RULES, global_batch, make_mesh, partition_spec, tree_shardings
from bert_jax.tasks import pretrain
from bert_jax.train_state import abstract_state, create_state, jit_step, train_step

MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2)]


def build(small_config, mesh, optimizer=None, **model):
    """The task and a mesh over as many devices as it needs."""
    config = dataclasses.replace(small_config, model=dataclasses.replace(small_config.model, **model))
    task = pretrain.build(config)
    devices = jax.devices()[: int(np.prod(mesh))]
    return task, build_optimizer(optimizer or config.optimizer, 2), make_mesh(MeshConfig(*mesh), devices)


def run(small_config, shape, *, steps=2, accumulate=1, optimizer=None):
    task, optimizer, mesh = build(small_config, shape, optimizer)
    fixed = {"key": jax.random.key(5), "learning_rate": 1e-3, "accumulate": accumulate}
    step = jax.jit(
        functools.partial(train_step, objective=task.objective, optimizer=optimizer, **fixed),
        donate_argnums=0,
    )
    losses = []
    with jax.set_mesh(mesh):
        state = create_state(task.objective, optimizer, mesh, seed=0)
        for number in range(steps):
            state, metrics = step(state, global_batch(task.train_batch(number), mesh))
            losses.append([float(total / count) for total, count in metrics["sums"].values()])
    return np.array(losses), jax.device_get(state.params)


@pytest.fixture(scope="module")
def single(small_config):
    return run(small_config, (1, 1, 1))


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_same_loss_and_parameters_on_every_mesh(small_config, single, shape):
    """Dropout is on: its masks do not depend on the mesh either."""
    losses, params = run(small_config, shape)
    np.testing.assert_allclose(losses, single[0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(single[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_accumulation_is_one_large_batch(small_config, shape):
    """Without dropout, since each micro-batch draws its own; counts differ between micro-batches, the mean does not."""
    model = dataclasses.replace(small_config.model, hidden_dropout=0.0, attention_dropout=0.0)
    config = dataclasses.replace(small_config, model=model)
    whole, params = run(config, (1, 1, 1))
    parts, params_parts = run(config, shape, accumulate=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(params_parts), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_loop_over_layers_computes_the_same(small_config, shape):
    """Without dropout, whose keys follow from where a layer stands."""
    still = dataclasses.replace(small_config.model, hidden_dropout=0.0, attention_dropout=0.0)
    apart, looped = (
        run(dataclasses.replace(small_config, model=dataclasses.replace(still, scan_unroll=unroll)), shape)
        for unroll in (0, 1)
    )
    np.testing.assert_allclose(apart[0], looped[0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(apart[1]), jax.tree.leaves(looped[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_micro_batches_are_the_same_on_every_mesh_dropout_too(small_config):
    wanted, single = run(small_config, (1, 1, 1), accumulate=2)
    for shape in ((2, 2, 2), (1, 4, 2)):
        losses, params = run(small_config, shape, accumulate=2)
        np.testing.assert_allclose(losses, wanted, rtol=1e-6)
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-6)


def compiled(small_config, accumulate):
    """The state's shapes, and the program of a step on a mesh of four devices."""
    task, optimizer, mesh = build(small_config, (2, 2, 1))
    with jax.set_mesh(mesh):
        state = abstract_state(task.objective, optimizer, mesh)
        step = jit_step(task.objective, optimizer, mesh, accumulate=accumulate)
        batch = global_batch(task.train_batch(0), mesh)
        return state, step.lower(state, batch, np.uint32(0), np.float32(1e-3)).compile()


@pytest.fixture(scope="module")
def of_one_batch(small_config):
    return compiled(small_config, 1)


def test_gradients_of_micro_batches_go_over_the_network_once(small_config, of_one_batch):
    """The devices send as much for four micro-batches as for one, but for a few counts."""

    def sent(program):
        mesh = {"data": 2, "fsdp": 2, "tensor": 1}
        return sum(one.bytes for one in hlo.collectives(program.as_text(), mesh))

    once = sent(of_one_batch[1])
    assert once > 100_000
    assert sent(compiled(small_config, 4)[1]) < once + 1000


def test_the_state_comes_out_as_it_went_in(of_one_batch):
    """Else batches of another shape would meet a state of other shardings, and their programs be compiled twice."""
    state, program = of_one_batch
    assert program.output_shardings[0] == jax.tree.map(lambda leaf: leaf.sharding, state)


@pytest.mark.parametrize("optimizer", [{"name": "lamb"}, {"layer_decay": 0.9}], ids=str)
def test_other_optimizers_shard_alike(small_config, optimizer):
    chosen = OptimizerConfig(**optimizer)
    one, other = (run(small_config, shape, optimizer=chosen) for shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_state_is_born_sharded_and_optimizer_moments_like_their_parameters(small_config):
    task, optimizer, mesh = build(small_config, (2, 2, 2))
    with jax.set_mesh(mesh):
        state = create_state(task.objective, optimizer, mesh, seed=0)
    kernel = state.params["layers"]["mlp"]["wi"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor
    table = state.params["embeddings"]["token_embedding"]
    assert table.addressable_shards[0].data.shape == (table.shape[0] // 4, table.shape[1])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments and all(moment.sharding == kernel.sharding for moment in moments)


@pytest.mark.parametrize(
    ("mesh", "share"), [((1, 1, 1), 1), ((8, 1, 1), 1), ((1, 8, 1), 8), ((1, 4, 2), 8), ((2, 2, 2), 4)]
)
def test_bytes_of_a_device_fall_as_the_mesh_says(mesh, share):
    """All but two hundredths of BERT-base are split."""
    shapes = jax.eval_shape(lambda: pretrain.init(ModelConfig(), jax.random.key(0)))
    shardings = jax.tree.leaves(
        tree_shardings(shapes, make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))]))
    )
    held = sum(int(np.prod(s.shard_shape(x.shape))) for x, s in zip(jax.tree.leaves(shapes), shardings, strict=True))
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    assert whole / share <= held < whole / share + 0.02 * whole


def test_every_parameter_matches_a_rule_and_every_rule_a_parameter():
    shapes = jax.eval_shape(lambda: pretrain.init(ModelConfig(), jax.random.key(0)))
    names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    used = {partition_spec(name, 9) for name in names}
    assert used == {spec for _, spec in PARTITION_RULES}


def test_mesh_sizes_are_checked():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh(MeshConfig(data=4)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:6]).shape) == {"data": 3, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for wrong in (MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=16)):
        with pytest.raises(ConfigError, match="8 devices"):
            make_mesh(wrong)


@pytest.mark.parametrize("model", [{"mlp_dim": 65}, {"hidden_size": 36, "num_heads": 2}], ids=str)
def test_arrays_that_the_mesh_cannot_split_are_named(small_config, model):
    task, optimizer, mesh = build(small_config, (1, 4, 2), **model)
    if "hidden_size" in model:
        mesh = make_mesh(MeshConfig(1, 8, 1))
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="mesh: .* splits .*layers/"):
        create_state(task.objective, optimizer, mesh, seed=0)


def test_no_step_of_the_compiler_replicates_by_force(small_config, capfd, request):
    """XLA says "Involuntary full rematerialization" when it cannot follow the shardings."""
    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled says nothing
    request.addfinalizer(lambda: jax.config.update("jax_enable_compilation_cache", True))
    run(small_config, (2, 2, 2), steps=1)
    assert "rematerialization" not in capfd.readouterr().err
    # It does say so: this resharding cannot be done otherwise.
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    one, other = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("a", None), (None, "b")))
    place = jax.lax.with_sharding_constraint
    jax.jit(lambda x: place(jnp.sin(place(x, one)), other))(jnp.ones((32, 16))).block_until_ready()
    assert "rematerialization" in capfd.readouterr().err


def test_the_global_batch_is_split_over_data_and_fsdp(prepared, tokenizer, small_config):
    rows = pipeline.open_rows(prepared, load_manifest(prepared), "train")
    vocabulary = pipeline.masking_vocabulary(tokenizer, whole_words=False)
    batch = pipeline.train_batch(rows, vocabulary, small_config.data, 16, 0)
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    placed = global_batch(batch, mesh)["input_ids"]
    assert placed.addressable_shards[0].data.shape[0] == 4
    np.testing.assert_array_equal(placed, batch["input_ids"])
