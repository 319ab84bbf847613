"""Scores from arrays of predictions, as the field defines them. NumPy only."""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries of two arrays [n]."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of class `positive`; 0 when nothing of it was found."""
    found, real = predictions == positive, labels == positive
    both = np.sum(found & real)
    return float(2 * both / (np.sum(found) + np.sum(real))) if both else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean of the F1 of each class."""
    return float(np.mean([f1(predictions, labels, number) for number in range(classes)]))
