"""Attention: the back ends agree, gradients too, and the backward pass keeps no float32 probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bert_jax import attention
from bert_jax.attention import attend, softmax, splash_attention
from bert_jax.config import Config, DataConfig, MeshConfig, ModelConfig, faults
from bert_jax.sharding import ROWS, make_mesh

BATCH, HEADS, LENGTH, DIM = 2, 2, 256, 64


def operands(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(one, (BATCH, HEADS, LENGTH, DIM), dtype) for one in keys)
    segments = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256])
    return query, key, value, segments


@pytest.mark.parametrize("on_mesh", [False, True])
def test_splash_is_what_xla_computes_gradients_too(on_mesh, request):
    query, key, value, segments = operands()
    real = (segments > 0)[:, None, :, None]

    def loss(function):
        return lambda q, k, v: (jnp.sin(function(q, k, v)) * real).sum()

    def splash(q, k, v):
        return splash_attention(q * DIM**-0.5, k, v, segments, interpret=True)

    def xla(q, k, v):
        return attend(q, k, v, segments)

    wanted = jax.value_and_grad(loss(xla), argnums=(0, 1, 2))(query, key, value)
    compiled = jax.jit(jax.value_and_grad(loss(splash), argnums=(0, 1, 2)))
    if on_mesh:  # rows over two devices, heads over two
        with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
            found = jax.device_get(compiled(query, key, value))
    else:
        found = compiled(query, key, value)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_on_other_devices_xla_takes_their_place(backend):
    query, key, value, segments = operands()
    np.testing.assert_array_equal(
        attend(query, key, value, segments, backend=backend), attend(query, key, value, segments)
    )


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """Its call, with JAX's own implementation in cuDNN's place."""
    query, key, value, segments = operands()
    real, asked = jax.nn.dot_product_attention, []

    def stand_in(*arrays, implementation, **how):
        asked.append(implementation)
        return real(*arrays, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = attention.cudnn_attention(query * DIM**-0.5, key, value, segments)
    np.testing.assert_allclose(found, attend(query, key, value, segments), atol=1e-5)
    assert asked == ["cudnn"]


def test_softmax_and_its_gradient():
    scores = jax.random.normal(jax.random.key(1), (3, 5, 7))
    weights = jax.random.normal(jax.random.key(2), scores.shape)
    ours = jax.value_and_grad(lambda x: (softmax(x, jnp.float32) * weights).sum())(scores)
    theirs = jax.value_and_grad(lambda x: (jax.nn.softmax(x) * weights).sum())(scores)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_softmax_with_dropout_and_its_gradient():
    scores = jax.random.normal(jax.random.key(1), (3, 5, 128)).at[..., 100:].set(attention.MASKED)
    weights = jax.random.normal(jax.random.key(2), scores.shape)
    keep, scale = attention.keep_mask(scores.shape, 0.25, jax.random.key(3))
    assert 0.7 < keep.mean() < 0.8 and scale == 4 / 3
    ours = jax.value_and_grad(lambda x: (softmax(x, jnp.float32, keep, scale) * weights).sum())(scores)
    theirs = jax.value_and_grad(lambda x: (jax.nn.softmax(x) * keep * scale * weights).sum())(scores)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dropped", [False, True])
def test_the_backward_pass_keeps_probabilities_of_the_narrow_type_alone(dropped):
    query, key, value, segments = operands(jnp.bfloat16)
    how = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)} if dropped else {}
    _, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments, **how), query, key, value)
    kept = [leaf for leaf in jax.tree.leaves(backward) if getattr(leaf, "shape", ())[-2:] == (LENGTH, LENGTH)]
    assert {leaf.dtype.name for leaf in kept} == {"bfloat16"}  # with dropout, no mask either


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_back_ends_without_dropout_say_so(backend):
    config = Config(model=ModelConfig(attention=backend), data=DataConfig(path="x"))
    assert any("--model.attention-dropout 0" in fault for fault in faults(config))
    config = Config(model=ModelConfig(attention=backend, attention_dropout=0.0), data=DataConfig(path="x"))
    assert not faults(config)


@pytest.mark.parametrize("local", [False, True])
def test_devices_make_random_bytes_of_their_own(local):
    """As accelerators do: no two devices the same, all values as frequent, and each its rows and heads alone. Also
    where micro-batches are added up, shard by shard.
    """
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    key = jax.random.key(0, impl="rbg")

    def made(*shape):
        if not local:
            return jax.jit(lambda key: attention.own_random_bytes(key, (8, *shape)))(key)
        how = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(ROWS), "axis_names": set(ROWS)}
        shard = jax.shard_map(lambda key: attention.own_random_bytes(key, (2, *shape)), **how, check_vma=False)
        return jax.jit(shard)(key)

    with jax.set_mesh(mesh):
        of_four, of_three = made(4, 32, 32), made(32, 32)
    assert {shard.data.shape for shard in of_four.addressable_shards} == {(2, 2, 32, 32)}
    assert {shard.data.shape for shard in of_three.addressable_shards} == {(2, 32, 32)}
    parts = [np.asarray(shard.data).tobytes() for shard in of_four.addressable_shards]
    assert len(set(parts)) == 8
    assert abs(np.asarray(of_four).mean() - 127.5) < 2
    rows = np.asarray(of_three).reshape(8, -1)
    assert len({row.tobytes() for row in rows}) == 8  # and devices that share rows have the same
    one, other = (np.asarray(shard.data) for shard in of_three.addressable_shards if shard.index[0] == slice(0, 2))
    np.testing.assert_array_equal(one, other)
