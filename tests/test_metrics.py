"""Metrics against goldens from scikit-learn 1.9.1 and SciPy 1.17.1, and in the corners where they are undefined."""

import numpy as np
import pytest

from bert_jax import metrics

PREDICTED = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1])
LABELS = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1])
PREDICTED_3 = np.array([0, 2, 0, 0, 2, 1, 0, 0, 1, 2, 1, 2, 0, 0, 2, 2, 0, 0, 2, 1, 1, 0, 2, 1, 2, 2, 2, 0, 2, 0])
LABELS_3 = np.array([0, 2, 0, 0, 2, 0, 0, 2, 1, 2, 2, 2, 0, 0, 2, 2, 1, 2, 1, 1, 0, 0, 2, 0, 2, 2, 0, 2, 2, 0])
X = np.array([-11, 9, -13, -7, 6, -23, 4, -6, 1, -1, 2, 7, -8, 14, 7, 8, 12, 8, 8, 1]) / 10
Y = np.array([-25, 8, -21, -21, 9, -29, -6, -16, 4, 3, 15, 7, 2, 28, 19, -16, 24, 11, 12, 5]) / 10
SEVERAL = np.array(
    [
        [1, 0, 1],
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 0],
        [0, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [1, 1, 0],
        [0, 1, 0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
    ]
)
TRUE = np.array(
    [
        [1, 0, 1],
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 1],
        [0, 1, 1],
        [1, 0, 0],
        [1, 1, 1],
        [1, 1, 1],
        [0, 1, 0],
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 1],
    ]
)


def test_two_classes():
    assert metrics.accuracy(PREDICTED, LABELS) == pytest.approx(0.8)
    assert metrics.f1(PREDICTED, LABELS) == pytest.approx(0.8333333333333334)
    assert metrics.matthews_correlation(PREDICTED, LABELS) == pytest.approx(0.6141922686399942)


def test_three_classes():
    assert metrics.macro_f1(PREDICTED_3, LABELS_3, 3) == pytest.approx(0.611965811965812)
    assert metrics.matthews_correlation(PREDICTED_3, LABELS_3) == pytest.approx(0.4716211091418993)


def test_several_labels_a_text():
    assert metrics.accuracy(SEVERAL, TRUE) == pytest.approx(1 / 3)
    assert metrics.f1(SEVERAL, TRUE) == pytest.approx(2 / 3)  # over all decisions: micro


def test_correlations_with_ties():
    assert metrics.pearson(X, Y) == pytest.approx(0.8194554763223114)
    assert metrics.spearman(X, Y) == pytest.approx(0.8024142857, abs=1e-7)


def test_corners_without_a_definition_are_zero():
    ones, some = np.ones(5, int), np.array([0, 1, 1, 0, 1])
    assert metrics.matthews_correlation(ones, some) == metrics.matthews_correlation(some, ones) == 0.0
    assert metrics.f1(np.zeros(5, int), some) == metrics.f1(some, np.zeros(5, int)) == 0.0
    for constant in (np.full(5, 0.1), np.full(5, 1e9 + 0.1, np.float32)):
        assert metrics.pearson(constant, some) == metrics.spearman(some, constant) == 0.0
