"""Schedule, decay mask, and the update rules against plain NumPy written from the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bert_jax.config import ModelConfig, OptimizerConfig
from bert_jax.optimizer import build_optimizer, decay_mask, decays, learning_rate_schedule
from bert_jax.tasks import pretrain

MODEL = ModelConfig(vocab_size=40, hidden_size=8, num_layers=3, num_heads=2, mlp_dim=16, max_position_embeddings=16)
CONSTANT = OptimizerConfig(schedule="constant", warmup_steps=0, learning_rate=0.01, clip_norm=0.0, weight_decay=0.1)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: pretrain.init(MODEL, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def grads(params):
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)


def test_linear_schedule_peaks_where_warm_up_ends_and_never_jumps():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 100)
    rates = np.array([schedule(step) for step in range(101)])
    assert rates[9] == 1.0 and rates[10] == 1.0
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], np.linspace(1, 0, 91), atol=1e-6)
    assert np.abs(np.diff(rates)).max() < 0.11


def test_other_schedules():
    cosine = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="cosine"), 100)
    assert float(cosine(50)) == pytest.approx(0.5, abs=1e-6)
    constant = learning_rate_schedule(CONSTANT, 100)
    assert float(constant(99)) == pytest.approx(0.01)
    share = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_fraction=0.2), 100)
    assert float(share(19)) == 1.0 and float(share(9)) == 0.5


def test_biases_and_norms_do_not_decay(params):
    mask = decay_mask(params)
    names = {"/".join(key.key for key in path): value for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    assert all(value == decays(name) for name, value in names.items())
    spared = {name for name, value in names.items() if not value}
    assert spared == {name for name in names if name.endswith(("bias", "scale"))}
    assert names["embeddings/position_embedding"] and names["mlm_head/transform/kernel"]


def steps(config, params, grads, count=3):
    optimizer = build_optimizer(config, MODEL.num_layers)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(count):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, optax.tree.scale(-config.learning_rate, updates))
    return params


def reference_adamw(param, grad, decay, config, count, scale=lambda param, update: 1.0):
    m = v = np.zeros_like(param)
    for t in range(1, count + 1):
        m = config.beta1 * m + (1 - config.beta1) * grad
        v = config.beta2 * v + (1 - config.beta2) * grad**2
        corrected = (m / (1 - config.beta1**t), v / (1 - config.beta2**t)) if config.bias_correction else (m, v)
        update = corrected[0] / (np.sqrt(corrected[1]) + config.epsilon) + decay * param
        param = param - config.learning_rate * scale(param, update) * update
    return param


@pytest.mark.parametrize("bias_correction", [True, False])
def test_adamw_is_the_paper_s(params, grads, bias_correction):
    config = dataclasses.replace(CONSTANT, bias_correction=bias_correction)
    found = steps(config, params, grads)
    for path, decay in (("pooler/dense/kernel", 0.1), ("pooler/dense/bias", 0.0), ("layers/mlp_norm/scale", 0.0)):
        names = path.split("/")
        param, grad, now = (np.array(leaf(tree, names), np.float64) for tree in (params, grads, found))
        np.testing.assert_allclose(now, reference_adamw(param, grad, decay, config, 3), rtol=1e-5, atol=5e-7)


def leaf(tree, names):
    for name in names:
        tree = tree[name]
    return tree


def test_lamb_trusts_each_layer_by_itself(params, grads):
    config = dataclasses.replace(CONSTANT, name="lamb")
    scaled = jax.tree.map(lambda value: value, grads)
    found = steps(config, params, scaled, count=2)

    def trust(param, update):
        return np.linalg.norm(param) / np.linalg.norm(update)

    for layer in range(MODEL.num_layers):
        param, grad, now = (np.array(tree["layers"]["mlp"]["wi"]["kernel"][layer]) for tree in (params, grads, found))
        np.testing.assert_allclose(now, reference_adamw(param, grad, 0.1, config, 2, trust), rtol=1e-4, atol=1e-6)
    param, grad, now = (np.array(tree["layers"]["mlp"]["wi"]["bias"]) for tree in (params, grads, found))
    np.testing.assert_allclose(now, reference_adamw(param, grad, 0.0, config, 2), rtol=1e-4, atol=1e-6)


def test_layer_decay_falls_from_the_head_down(params, grads):
    config = dataclasses.replace(CONSTANT, layer_decay=0.5, weight_decay=0.0)
    plain, decayed = (steps(c, params, grads, 1) for c in (dataclasses.replace(config, layer_decay=1.0), config))

    def ratio(*names):
        before = leaf(params, names)
        return np.array((leaf(decayed, names) - before) / (leaf(plain, names) - before))

    assert ratio("pooler", "dense", "kernel") == pytest.approx(1.0, rel=1e-3)
    kernel = ratio("layers", "mlp", "wi", "kernel")
    for layer, factor in enumerate((0.125, 0.25, 0.5)):
        assert np.median(kernel[layer]) == pytest.approx(factor, rel=1e-2)
    assert np.median(ratio("embeddings", "position_embedding")) == pytest.approx(0.0625, rel=1e-2)


def test_clipping_bounds_the_gradient(params, grads):
    config = dataclasses.replace(CONSTANT, clip_norm=1.0, weight_decay=0.0, bias_correction=False)
    huge = jax.tree.map(lambda value: value * 1e3, grads)
    for one, other in zip(
        jax.tree.leaves(steps(config, params, huge, 1)), jax.tree.leaves(steps(config, params, grads, 1)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert float(optax.tree.norm(grads)) > 1.0
    assert jnp.isfinite(optax.tree.norm(huge))
