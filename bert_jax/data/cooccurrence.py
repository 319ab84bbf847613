"""First vectors of the pieces from what stands together in the text: factors of their pointwise mutual information.

Levy & Goldberg 2014: what word2vec learns is such a factorisation. A short pre-training that begins with these vectors
spares itself the long plateau in which it would learn no more than which pieces are frequent.
"""

from typing import TYPE_CHECKING

import numpy as np

from bert_jax.data.packing import unpack_rows
from bert_jax.data.pipeline import PreparedRows
from bert_jax.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csc_array

MAX_TOKENS = 30_000_000  # counted; spread evenly over longer texts
MAX_CONTEXTS = 8192  # pieces, the most frequent, that the others are counted with: memory is 4 bytes x V x this
READ_ROWS = 8192  # rows in memory at a time
_BLOCK = 1024  # pieces whose counts are made at a time
_OVERSAMPLING, _ITERATIONS = 16, 4  # of the randomised decomposition


def token_vectors(rows: PreparedRows, regular: np.ndarray, size: int, seed: int) -> np.ndarray:
    """float32 [V, size] of mean 0 and mean square 1: pieces that share their surroundings have near vectors.

    Args:
      rows: prepared rows; the surroundings of a piece are the A or the B that it stands in.
      regular: bool [V], pieces that are counted; special ones get zeros, and so do pieces that never occur.
      size: D, at most the number of contexts.
      seed: of the randomised decomposition.

    Raises DataError when no two pieces stand together oftener than by chance.
    """
    present = presence(rows, regular)
    vectors = factors(positive_information(present), size, seed)
    seen = regular & (np.asarray(present.sum(0)).reshape(-1) > 0)
    vectors[~seen] = 0
    vectors[seen] -= vectors[seen].mean(0, keepdims=True) if seen.any() else 0
    scale = float(np.sqrt(np.square(vectors[seen]).mean())) if seen.any() else 0.0
    if not scale > 0:
        raise DataError("data.path: too little text for train.embedding_init cooccurrence; use normal")
    return (vectors / scale).astype(np.float32)


def presence(rows: PreparedRows, regular: np.ndarray) -> "csc_array":
    """[windows, V], 1 where a regular piece stands in a window. A window is the A or the B of an example."""
    from scipy.sparse import csr_array, vstack

    length = rows.dtype["input_ids"].shape[0]
    wanted = np.arange(0, len(rows), -(-len(rows) * length // MAX_TOKENS))
    parts = []
    for start in range(0, len(wanted), READ_ROWS):
        window, piece = pieces_of_windows(rows.read(wanted[start : start + READ_ROWS]), regular)
        shape = (int(window.max(initial=-1)) + 1, len(regular))
        parts.append(csr_array((np.ones(len(piece), np.float32), (window, piece)), shape))
    return vstack(parts, format="csc")


def pieces_of_windows(rows: np.ndarray, regular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(window, piece) of each distinct regular piece of each A and B of some rows; windows are numbered from 0."""
    batch = unpack_rows(rows)
    ids, kept = batch["input_ids"], regular[batch["input_ids"]]
    segments = 2 * batch["segment_ids"].astype(np.int64) + batch["token_type_ids"]
    place = np.arange(len(ids))[:, None] * (segments.max() + 1) + segments
    pairs = np.unique(place[kept] * len(regular) + ids[kept])
    return np.unique(pairs // len(regular), return_inverse=True)[1], pairs % len(regular)


def positive_information(present: "csc_array") -> np.ndarray:
    """max(0, log p(piece, context) / p(piece) p(context)) float32 [V, C]; 0 where they never meet, and with itself.

    The contexts are the most frequent pieces; probabilities are shares of the windows [windows, V].
    """
    windows, pieces = present.shape
    frequency = np.asarray(present.sum(0), np.float64).reshape(-1)
    contexts = np.argsort(-frequency, kind="stable")[:MAX_CONTEXTS]
    chance = np.maximum(frequency, 1)
    found = np.empty((pieces, len(contexts)), np.float32)
    in_context = present[:, contexts].tocsr()
    for start in range(0, pieces, _BLOCK):
        block = slice(start, start + _BLOCK)
        together = (present[:, block].T @ in_context).toarray()
        together *= (windows / chance[block, None]).astype(np.float32)
        together /= chance[contexts].astype(np.float32)
        found[block] = np.log(np.maximum(together, 1))
    found[contexts, np.arange(len(contexts))] = 0  # a piece stands with itself always
    return found


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
