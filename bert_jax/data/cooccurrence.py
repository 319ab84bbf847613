"""First vectors of the pieces from what stands together in the text: factors of their pointwise mutual information.

Levy & Goldberg 2014: what word2vec learns is such a factorisation. A short pre-training that begins with these vectors
spares itself the long plateau in which it would learn no more than which pieces are frequent.
"""

import numpy as np

from bert_jax.data.packing import unpack_rows
from bert_jax.data.pipeline import PreparedRows

MAX_TOKENS = 30_000_000  # counted; spread evenly over longer texts
MAX_CONTEXTS = 8192  # pieces, the most frequent, that the others are counted with: memory is V x this
READ_ROWS = 8192  # rows in memory at a time
_OVERSAMPLING, _ITERATIONS = 16, 4  # of the randomised decomposition


def token_vectors(rows: PreparedRows, regular: np.ndarray, size: int, seed: int) -> np.ndarray:
    """float32 [V, size] of mean 0 and mean square 1: pieces that share their surroundings have near vectors.

    Args:
      rows: prepared rows; the surroundings of a piece are the A or the B that it stands in.
      regular: bool [V], pieces that are counted; special ones get zeros, and so do pieces that never occur.
      size: D, at most the number of contexts.
      seed: of the randomised decomposition.
    """
    counts, frequency, windows = count(rows, regular)
    vectors = factors(positive_information(counts, frequency, windows), size, seed)
    seen = regular & (frequency > 0)
    vectors[~seen] = 0
    vectors[seen] -= vectors[seen].mean(0)
    return (vectors / np.sqrt(np.square(vectors[seen]).mean())).astype(np.float32)


def count(rows: PreparedRows, regular: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(counts float32 [V, C], frequency [V], windows): in how many windows a piece stands, and with each context.

    The contexts are the most frequent pieces. Each window, the A or B of an example, counts a piece once.
    """
    from scipy.sparse import csr_matrix

    length = rows.dtype["input_ids"].shape[0]
    wanted = np.arange(0, len(rows), max(1, len(rows) * length // MAX_TOKENS))
    chunks = [wanted[start : start + READ_ROWS] for start in range(0, len(wanted), READ_ROWS)]
    presence, frequency = [], np.zeros(len(regular), np.int64)
    for numbers in chunks:
        window, piece = pieces_of_windows(rows.read(numbers), regular)
        ones = np.ones(len(piece), np.float32)
        presence.append(csr_matrix((ones, (window, piece)), (window[-1] + 1, len(regular))))
        frequency += np.bincount(piece, minlength=len(regular))
    contexts = np.argsort(-frequency, kind="stable")[: min(MAX_CONTEXTS, len(regular))]
    counts = np.zeros((len(regular), len(contexts)), np.float32)
    for part in presence:
        counts += (part.T @ part[:, contexts]).toarray()
    counts[contexts, np.arange(len(contexts))] = 0  # a piece stands with itself always
    return counts, frequency, sum(part.shape[0] for part in presence)


def pieces_of_windows(rows: np.ndarray, regular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(window, piece) of each distinct regular piece of each A and B of some rows; windows are numbered from 0."""
    batch = unpack_rows(rows)
    ids, kept = batch["input_ids"], regular[batch["input_ids"]]
    segments = 2 * batch["segment_ids"].astype(np.int64) + batch["token_type_ids"]
    place = np.arange(len(ids))[:, None] * (segments.max() + 1) + segments
    pairs = np.unique(place[kept] * len(regular) + ids[kept])
    return np.unique(pairs // len(regular), return_inverse=True)[1], pairs % len(regular)


def positive_information(counts: np.ndarray, frequency: np.ndarray, windows: int) -> np.ndarray:
    """max(0, log p(piece, context) / p(piece) p(context)) [V, C]; 0 where they never meet."""
    contexts = np.argsort(-frequency, kind="stable")[: counts.shape[1]]
    expected = np.outer(np.maximum(frequency, 1), np.maximum(frequency[contexts], 1)) / windows
    return np.log(np.maximum(counts / expected.astype(np.float32), 1))


def factors(matrix: np.ndarray, size: int, seed: int) -> np.ndarray:
    """U sqrt(S) [V, size] of the `size` largest singular values (Halko et al. 2011, randomised, algorithm 4.4).

    Signs are set so that the largest entry of a column is positive. Columns beyond the rank of a small matrix are 0.
    """
    rng = np.random.default_rng(seed)
    width = min(size + _OVERSAMPLING, *matrix.shape)
    basis = matrix @ rng.standard_normal((matrix.shape[1], width), dtype=np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        basis = matrix @ np.linalg.qr(matrix.T @ basis)[0]
    basis = np.linalg.qr(basis)[0]
    left, singular, _ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = min(size, width)
    vectors = (basis @ left[:, :kept]) * np.sqrt(singular[:kept])
    vectors *= np.where(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0) < 0, -1, 1)
    return np.pad(vectors, ((0, 0), (0, size - kept)))
