"""Scores from arrays of predictions, as the field defines them; on the host.

Where a score is not defined (no positive predicted or labelled, everything constant) it is 0, as in scikit-learn.
"""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries of two arrays [n]; of arrays [n, C], share of rows that are equal throughout."""
    equal = predictions == labels
    return float(np.mean(equal.all(-1) if equal.ndim > 1 else equal))


def f1(predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of class `positive`, over all entries."""
    found, real = predictions == positive, labels == positive
    both = np.sum(found & real)
    return float(2 * both / (np.sum(found) + np.sum(real))) if both else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean of the F1 of each class."""
    return float(np.mean([f1(predictions, labels, number) for number in range(classes)]))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of two labellings with any number of classes [n] (Gorodkin 2004, R_K); CoLA's measure."""
    classes = int(max(predictions.max(initial=0), labels.max(initial=0))) + 1
    one, other = np.eye(classes)[predictions], np.eye(classes)[labels]  # [n, C]
    one, other = one - one.mean(0), other - other.mean(0)
    scale = np.sqrt(np.sum(one * one) * np.sum(other * other))
    return float(np.sum(one * other) / scale) if scale else 0.0


def pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Linear correlation of two arrays [n]."""
    one, other = (np.asarray(values, np.float64) for values in (predictions, targets))
    if not len(one) or np.ptp(one) == 0 or np.ptp(other) == 0:  # rounding leaves a constant's deviations above 0
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Linear correlation of the ranks of two arrays [n]; equal values share their mean rank."""
    from scipy.stats import rankdata  # JAX depends on SciPy; here, because it takes a while to load

    return pearson(rankdata(predictions), rankdata(targets))
