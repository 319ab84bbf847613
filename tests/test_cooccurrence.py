"""First token vectors: counts against a plain loop, factors against NumPy, and a run that starts there."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csc_array

from bert_jax import convert
from bert_jax.data import cooccurrence, pipeline
from bert_jax.data.packing import unpack_rows
from bert_jax.data.prepare import load_manifest
from bert_jax.errors import DataError
from bert_jax.tasks import pretrain
from bert_jax.train import train


@pytest.fixture(scope="module")
def rows(prepared):
    return pipeline.open_rows(str(prepared), load_manifest(str(prepared)), "train")


@pytest.fixture(scope="module")
def regular(tokenizer):
    return pipeline.masking_vocabulary(tokenizer, False).regular


def test_information_is_that_of_a_loop_over_the_windows(rows, regular, monkeypatch):
    monkeypatch.setattr(cooccurrence, "READ_ROWS", 100)
    monkeypatch.setattr(cooccurrence, "_BLOCK", 300)
    monkeypatch.setattr(cooccurrence, "MAX_CONTEXTS", 500)
    present = cooccurrence.presence(rows, regular)
    information = cooccurrence.positive_information(present)
    batch = unpack_rows(rows.read(np.arange(len(rows))))
    windows = {}
    for row in range(len(rows)):
        for piece, segment, kind in zip(
            *(batch[name][row] for name in ("input_ids", "segment_ids", "token_type_ids")), strict=True
        ):
            if regular[piece]:
                windows.setdefault((row, segment, kind), set()).add(int(piece))
    single = Counter(itertools.chain.from_iterable(windows.values()))
    frequency = np.array([single[piece] for piece in range(len(regular))])
    assert present.shape[0] == len(windows) and np.asarray(present.sum(0)).tolist() == frequency.tolist()
    contexts = np.argsort(-frequency, kind="stable")[:500].tolist()
    pairs = Counter(pair for window in windows.values() for pair in itertools.permutations(sorted(window), 2))
    assert information.shape == (len(regular), 500)
    for column in (0, 7, 300):
        context = contexts[column]
        for piece in range(0, len(regular), 7):
            ratio = pairs[piece, context] * len(windows) / max(single[piece] * single[context], 1)
            expected = math.log(max(ratio, 1)) if piece != context else 0
            assert information[piece, column] == pytest.approx(expected, abs=1e-5)


def test_factors_are_those_of_the_whole_decomposition():
    rng = np.random.default_rng(0)
    low = (rng.normal(size=(80, 6)) * [9, 7, 5, 4, 3, 2]) @ rng.normal(size=(6, 60))
    matrix = (low + 0.01 * rng.normal(size=(80, 60))).astype(np.float32)
    left, singular, _ = np.linalg.svd(matrix)
    expected = left[:, :5] * np.sqrt(singular[:5])
    expected *= np.where(np.take_along_axis(expected, np.abs(expected).argmax(0)[None], 0) < 0, -1, 1)
    np.testing.assert_allclose(cooccurrence.factors(matrix, 5, seed=3), expected, atol=1e-3)
    assert cooccurrence.factors(matrix, 70, seed=0).shape == (80, 70)  # wider than the matrix: the rest is 0


def test_pieces_of_one_surrounding_are_near():
    """Two topics, whose words never meet: nearest to a word are the words of its topic."""
    rng = np.random.default_rng(0)
    present = np.zeros((400, 20), np.float32)
    for window in range(len(present)):
        present[window, 10 * (window % 2) + rng.choice(10, 4, replace=False)] = 1
    vectors = cooccurrence.factors(cooccurrence.positive_information(csc_array(present)), 2, seed=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[:10, :10].min() > 0.8 > 0.3 > np.abs(cosine[:10, 10:]).max()


def test_text_without_any_pair_is_told(rows, regular):
    with pytest.raises(DataError, match="too little text for train.embedding_init cooccurrence"):
        cooccurrence.token_vectors(rows, np.zeros_like(regular), 8, seed=0)


def test_a_run_starts_from_them_and_special_pieces_from_zero(small_config, rows, regular, tmp_path):
    config = dataclasses.replace(
        small_config,
        optimizer=dataclasses.replace(small_config.optimizer, learning_rate=1e-12),
        train=dataclasses.replace(small_config.train, num_steps=1, embedding_init="cooccurrence"),
    )
    assert train(config, str(tmp_path / "run")) == 0
    tables = convert.load_model(str(tmp_path / "run")).params["embeddings"]
    first = pretrain.first_params(config.model, rows, regular, config.train.seed)
    tokens, positions = first["embeddings/token_embedding"], first["embeddings/position_embedding"]
    np.testing.assert_allclose(tables["token_embedding"], tokens, atol=1e-6)
    np.testing.assert_allclose(tables["position_embedding"], positions, atol=1e-6)
    vectors = cooccurrence.token_vectors(rows, regular, 32, 0)
    seen = np.abs(vectors).sum(1) > 0
    assert not vectors[~regular].any() and seen.sum() > 900
    assert np.square(vectors[seen]).mean() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(vectors[seen].mean(0), 0, atol=1e-4)


def test_positions_begin_where_a_shift_is_a_rotation():
    table = pretrain.sinusoids(50, 32)
    np.testing.assert_allclose(table[0], [0] * 16 + [2**0.5] * 16, atol=1e-6)
    products = table @ table.T
    for distance in (0, 1, 7):  # how near two positions are depends on their distance alone
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-5)
    assert products[0, 1] < products[0, 0] and np.square(table).mean() == pytest.approx(1)
    assert pretrain.sinusoids(9, 7).shape == (9, 7)
