"""The encoder and its heads: packed equals unpacked, every way to run the layers gives the same numbers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_jax import model
from bert_jax.attention import attend, dropout
from bert_jax.config import DataConfig, ModelConfig
from bert_jax.data.masking import Vocabulary, mask_tokens
from bert_jax.data.packing import row_dtype, unpack_rows
from bert_jax.model import Mlp, affine, gelu, layer_norm, separate_layers
from bert_jax.tasks import encode, encode_first, pretrain

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    mlp_dim=64,
    max_position_embeddings=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    initializer_range=0.2,  # far from zero, so that a wrong mask shows
)
LENGTH = 64


@pytest.fixture(scope="module")
def params():
    params = jax.jit(functools.partial(pretrain.init, MODEL))(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), params)


def packed_and_unpacked():
    """The same eight examples in two packed rows and in eight rows of one, with the same masks."""
    rng = np.random.default_rng(0)
    lengths = [[(5, 9), (8, 4), (7, 6), (3, 5)], [(10, 11), (2, 3), (9, 1), (6, 6)]]
    packed = np.zeros(2, row_dtype(LENGTH, 4, MODEL.vocab_size))
    single = np.zeros(8, row_dtype(LENGTH, 1, MODEL.vocab_size))
    for row, examples in enumerate(lengths):
        at = 0
        for slot, (a, b) in enumerate(examples):
            ids = [1, *rng.integers(5, 300, a), 2, *rng.integers(5, 300, b), 2]
            packed["input_ids"][row, at : at + len(ids)] = ids
            single["input_ids"][row * 4 + slot, : len(ids)] = ids
            for rows, where in ((packed, (row, slot)), (single, (row * 4 + slot, 0))):
                rows["a_lengths"][where], rows["b_lengths"][where] = a, b
                rows["is_random_next"][where] = slot % 2
            at += len(ids)
    batches = unpack_rows(packed), unpack_rows(single)
    regular = np.arange(MODEL.vocab_size) >= 5
    masked = mask_tokens(
        batches[0]["input_ids"],
        vocabulary=Vocabulary(4, regular),
        mask_rate=0.3,
        gather_width=32,
        key=(0, 0),
        row_numbers=np.arange(2),
    )
    batches[0].update(masked)
    batches[1].update(mask_like(batches[0], batches[1]))
    return batches


def mask_like(packed, single):
    """Carries the masks of packed rows over to the single ones, example by example."""
    width = 32
    result = {"input_ids": np.zeros_like(single["input_ids"])}
    for name, dtype in (("positions", np.int32), ("ids", np.int32), ("weights", np.float32)):
        result[f"masked_lm_{name}"] = np.zeros((8, width), dtype)
    for row in range(2):
        for slot in range(4):
            start = packed["next_sentence_positions"][row, slot]
            tokens = packed["segment_ids"][row] == slot + 1
            to = row * 4 + slot
            result["input_ids"][to, : tokens.sum()] = packed["input_ids"][row, tokens]
            positions, weights = packed["masked_lm_positions"][row], packed["masked_lm_weights"][row] > 0
            mine = np.flatnonzero(weights & tokens[positions])
            result["masked_lm_positions"][to, : len(mine)] = positions[mine] - start
            result["masked_lm_ids"][to, : len(mine)] = packed["masked_lm_ids"][row, mine]
            result["masked_lm_weights"][to, : len(mine)] = 1
    return result


def loss(params, batch, config=MODEL):
    sums = pretrain.sums(config, params, batch, None)
    counts = pretrain.weights(batch)
    return sum(sums[name][0] / counts[name] for name in pretrain.LOSSES)


@functools.partial(jax.jit, static_argnums=2)
def loss_and_gradient(params, batch, config=MODEL):
    return jax.value_and_grad(loss)(params, batch, config)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return pretrain.forward(config, params, batch, None)


@functools.partial(jax.jit, static_argnums=0)
def vectors(config, params, batch):
    return encode(config, params, batch, None)


def assert_trees_close(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-2, float(jnp.abs(b).max())))


def test_packed_equals_unpacked_logits(params):
    packed, single = packed_and_unpacked()
    masked_lm, next_sentence = forward(MODEL, params, packed)
    masked_lm_1, next_sentence_1 = forward(MODEL, params, single)
    np.testing.assert_allclose(next_sentence.reshape(8, 2), next_sentence_1.reshape(8, 2), atol=1e-5)
    by_row = np.array(masked_lm)[packed["masked_lm_weights"] > 0]
    assert len(by_row) > 20
    by_example = np.array(masked_lm_1)[single["masked_lm_weights"] > 0]
    np.testing.assert_allclose(by_row[:, :300], by_example[:, :300], atol=1e-5)


def test_packed_equals_unpacked_gradients(params):
    packed, single = packed_and_unpacked()
    value, gradient = loss_and_gradient(params, packed)
    value_1, gradient_1 = loss_and_gradient(params, single)
    assert float(value) == pytest.approx(float(value_1), abs=1e-5)
    assert_trees_close(gradient, gradient_1, 1e-5)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("separate", [False, True])
def test_the_first_tokens_alone_are_what_they_are_among_all(params, layers, separate):
    _, single = packed_and_unpacked()
    config = dataclasses.replace(MODEL, num_layers=layers)
    params = params | {"layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
    if separate:
        params = separate_layers(params, layers)
    weights = jax.random.normal(jax.random.key(3), (8, MODEL.hidden_size))

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda params: (jnp.sin(function(params)) * weights).sum()))

    wanted = loss(lambda params: encode(config, params, single)[:, 0])(params)
    found = loss(lambda params: encode_first(config, params, single))(params)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert_trees_close(found[1], wanted[1], 1e-4)


def test_first_tokens_alone_have_dropout_too(params):
    _, single = packed_and_unpacked()
    for changes in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        config = dataclasses.replace(MODEL, **changes)
        function = jax.jit(functools.partial(encode_first, config))
        one, other = (function(params, single, jax.random.key(seed)) for seed in (0, 1))
        assert np.abs(one - other).max() > 0.1


def test_an_example_does_not_see_its_neighbours(params):
    packed, _ = packed_and_unpacked()
    changed = dict(packed, input_ids=np.where(packed["segment_ids"] == 2, 7, packed["input_ids"]))
    one, other = (np.array(vectors(MODEL, params, batch)) for batch in (packed, changed))
    same = packed["segment_ids"] != 2
    np.testing.assert_array_equal(one[same], other[same])
    assert np.abs(one[~same] - other[~same]).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_remat_and_unrolling_change_no_number(params, changes):
    packed, _ = packed_and_unpacked()
    expected = loss_and_gradient(params, packed)
    found = loss_and_gradient(params, packed, dataclasses.replace(MODEL, **changes))
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-6)
    assert_trees_close(found[1], expected[1], 1e-5)


@pytest.mark.parametrize("separate", [True, False])
def test_remat_computes_layers_twice(params, separate):
    """A compiler that may see both for one would compute them once, and keep all."""
    packed, _ = packed_and_unpacked()
    given = separate_layers(params, MODEL.num_layers) if separate else params

    def products(remat):
        config = dataclasses.replace(MODEL, remat=remat)
        loss = jax.grad(lambda params: pretrain.sums(config, params, packed, None)["masked_lm_loss"][0])
        return jax.jit(loss).lower(given).compile().cost_analysis()["flops"]

    assert products("full") > 1.1 * products("none")


def test_remat_keeps_the_dropout_masks(params):
    packed, _ = packed_and_unpacked()

    def with_dropout(params, config):
        return pretrain.sums(config, params, packed, jax.random.key(3))["masked_lm_loss"][0]

    noisy = dataclasses.replace(MODEL, hidden_dropout=0.2, attention_dropout=0.2)
    gradient = jax.jit(jax.value_and_grad(with_dropout), static_argnums=1)
    expected = gradient(params, noisy)
    found = gradient(params, dataclasses.replace(noisy, remat="full"))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for gradients in (found[1], expected[1]):  # softmax does not see a key's bias: its gradient is rounding
        assert float(jnp.abs(gradients["layers"]["attention"]["key"].pop("bias")).max()) < 1e-5
    assert_trees_close(found[1], expected[1], 1e-5)


def test_bfloat16_stays_near_float32_and_keeps_float32_gradients(params):
    packed, _ = packed_and_unpacked()
    half = dataclasses.replace(MODEL, dtype="bfloat16")
    value, gradient = loss_and_gradient(params, packed, half)
    assert float(value) == pytest.approx(float(loss(params, packed)), rel=0.02)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_padding_columns_of_the_vocabulary_take_no_probability(params):
    packed, _ = packed_and_unpacked()
    masked_lm, _ = forward(MODEL, params, packed)
    assert masked_lm.shape[-1] == 384
    assert float(jax.nn.softmax(masked_lm)[..., 300:].max()) == 0.0
    gradient = loss_and_gradient(params, packed)[1]
    assert not np.array(gradient["embeddings"]["token_embedding"][300:]).any()


def test_attention_is_the_textbook_s():
    """Against a plain loop over heads and queries (Vaswani et al. 2017, eq. 1)."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 3, 6, 4)).astype(np.float32)  # [B, N, S, H]
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    found = np.array(attend(query, key, value, segment_ids))
    for b, n, q in np.ndindex(2, 3, 6):
        seen = segment_ids[b] == segment_ids[b, q]
        scores = key[b, n, seen] @ query[b, n, q] / 2.0
        probabilities = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(found[b, n, q], probabilities @ value[b, n, seen], atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    x = jnp.ones((1000, 1001))
    y = np.array(dropout(x, rate, jax.random.key(0)))
    assert abs((y == 0).mean() - round(rate * 256) / 256) < 0.002
    assert abs(y.mean() - 1) < 0.005
    assert np.array_equal(dropout(x, rate, None), x)
    rows, columns = (y == 0).mean(1), (y == 0).mean(0)
    assert rows.std() < 0.02 and columns.std() < 0.02


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_activations_are_told_apart(params, act):
    packed, _ = packed_and_unpacked()
    hidden = vectors(dataclasses.replace(MODEL, hidden_act=act), params, packed)
    assert np.isfinite(np.array(hidden)).all()
    if act != "gelu_new":
        assert np.abs(hidden - vectors(MODEL, params, packed)).max() > 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_the_erf_form(dtype):
    x = jnp.linspace(-12, 12, 100_001).astype(dtype)
    exact = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in np.array(x, np.float64)])
    np.testing.assert_allclose(np.array(gelu(x), np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize(("mean", "close"), [(0.0, 1e-6), (10.0, 1e-4)])
def test_layer_norm_and_its_gradients_are_the_textbook_s(mean, close):
    """Against JAX's own derivative of the formula in two passes (Ba et al. 2016, eq. 4)."""

    def textbook(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * scale + bias

    rng = np.random.default_rng(0)
    x = mean + rng.normal(size=(3, 5, 64)) * rng.uniform(0.1, 10, size=(3, 5, 1))
    arguments = [np.float32(value) for value in (x, *rng.normal(size=(2, 64)))]
    weights = rng.normal(size=x.shape)

    def loss_and_gradients(norm):
        return jax.value_and_grad(lambda *given: (jnp.sin(norm(*given)) * weights).sum(), argnums=(0, 1, 2))(*arguments)

    found = loss_and_gradients(functools.partial(layer_norm, epsilon=1e-12))
    assert_trees_close(found, loss_and_gradients(textbook), close)


def test_layer_norm_keeps_the_type():
    x = jax.random.normal(jax.random.key(0), (4, 64))
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def gradient(x):
        return jax.grad(lambda x: (layer_norm(x, jnp.ones(64), jnp.ones(64), 1e-12) * weights).sum())(x)

    assert layer_norm(x.astype(jnp.bfloat16), jnp.ones(64), jnp.ones(64), 1e-12).dtype == jnp.bfloat16
    assert gradient(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient(x.astype(jnp.bfloat16)).astype(jnp.float32), gradient(x), atol=0.03)


def test_layer_norm_of_constant_rows_is_finite():
    """Rounding gives some of them a variance below 0."""
    x = jnp.linspace(0.1, 9, 500)[:, None] * jnp.ones(768)
    raw = jax.jit(lambda x: jnp.square(x).mean(-1) - jnp.square(x.mean(-1)))(x)
    assert float(raw.min()) < -1e-12
    value, gradient = jax.value_and_grad(lambda x: layer_norm(x, jnp.ones(768), jnp.ones(768), 1e-12).sum())(x)
    assert np.isfinite(float(value)) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("td,df->tf", [(12, 8), (8, 10), (10,)]),
        ("bsf,fd->bsd", [(3, 4, 8), (8, 10), (10,)]),
        ("bsd,dnh->bnsh", [(3, 4, 8), (8, 2, 5), (2, 5)]),
        ("bnsh,nhd->bsd", [(3, 2, 4, 5), (2, 5, 10), (10,)]),
    ],
)
def test_affine_and_its_gradients_are_those_of_jax_s_own(spec, shapes):
    rng = np.random.default_rng(0)
    arguments = [np.float32(rng.normal(size=shape)) for shape in shapes]

    def plain(x, kernel, bias):
        return jnp.einsum(spec, x, kernel) + (bias[:, None] if spec.endswith("bnsh") else bias)

    def loss_and_gradients(apply):
        return jax.value_and_grad(lambda *given: jnp.sin(apply(*given)).sum(), argnums=(0, 1, 2))(*arguments)

    own = functools.partial(affine, spec)
    assert_trees_close(loss_and_gradients(own), loss_and_gradients(plain), 1e-5)
    x, *weights = arguments
    narrow = x.astype(jnp.bfloat16)
    value, pull = jax.vjp(own, narrow, *weights)
    found = pull(jnp.ones_like(value))
    assert [leaf.dtype for leaf in (value, *found)] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert_trees_close([np.float32(leaf) for leaf in found], jax.vjp(plain, *arguments)[1](jnp.ones(value.shape)), 0.02)


def test_mlp_on_tpus_computes_what_it_does_here(monkeypatch):
    """There it keeps rows apart."""
    x = jax.random.normal(jax.random.key(0), (2, 5, MODEL.hidden_size))
    mlp = Mlp(MODEL)
    weights = mlp.init(jax.random.key(1), x)
    here = mlp.apply(weights, x)
    monkeypatch.setattr(model, "platform", lambda: "tpu")
    np.testing.assert_allclose(mlp.apply(weights, x), here, rtol=0, atol=1e-6)


def test_separate_layers_give_what_the_stack_gives(params):
    packed, _ = packed_and_unpacked()
    run = jax.jit(functools.partial(encode, MODEL, all_layers=True))
    separate = separate_layers(params, MODEL.num_layers)
    assert "layers" not in separate and separate["layers_2"]["mlp"]["wi"]["kernel"].shape == (32, 64)
    np.testing.assert_allclose(run(separate, packed), run(params, packed), rtol=0, atol=2e-5)


def test_first_weights_have_the_configured_spread():
    config = dataclasses.replace(MODEL, initializer_range=0.02)
    params = jax.jit(functools.partial(pretrain.init, config))(jax.random.key(0))
    table = np.array(params["embeddings"]["token_embedding"])
    assert np.abs(table).max() <= 0.04  # truncated at two standard deviations
    assert 0.015 < table.std() < 0.02
    layers = np.array(params["layers"]["mlp"]["wi"]["kernel"])
    assert not np.array_equal(layers[0], layers[1])
    assert DataConfig().gather_width == 20 and DataConfig(max_seq_len=512).gather_width == 80
