"""Next-sentence pairs (Devlin et al. 2019, section 3.1 and appendix A.2) as spans of an on-disk store of tokens.

The store is the whole corpus as token ids, with the offsets of its sentences, and per split an index of its pieces of
text. Everything is read by position from files, so memory does not grow with the corpus and the next sentence of a
pair can come from anywhere in it. A *source* is what the user calls a document; a very long one arrives as several
*pieces*, which always stay on one side of the split and never serve each other as random next sentences.
"""

import contextlib
import os
import shutil
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import BinaryIO, NamedTuple

import numpy as np

SPLITS = ("train", "eval")
_RAW_PIECE = np.dtype([("sentence", "<u8"), ("sentences", "<u4"), ("tokens", "<u8"), ("source", "<u8")])
_PIECE = np.dtype(
    [("sentence", "<u8"), ("sentences", "<u4"), ("tokens", "<u8"), ("source_first", "<u8"), ("source_pieces", "<u4")]
)
_PIECE_STRUCT = struct.Struct("<QIQQI")  # _PIECE, without numpy's cost for a single record
_BLOCK = 1 << 16  # index records held at once
_COPY_BYTES = 1 << 24


class Piece(NamedTuple):
    """A piece of text in the store; `source_first`, `source_pieces`: which pieces of the split have its source."""

    sentence: int
    sentences: int
    tokens: int
    source_first: int
    source_pieces: int


class Example(NamedTuple):
    """Tokens [a_start, a_end) and [b_start, b_end) of the store."""

    a_start: int
    a_end: int
    b_start: int
    b_end: int
    is_random_next: bool


class Tokenised(NamedTuple):
    """Documents as arrays: all token ids, tokens of each sentence (never 0), sentences and source of a document."""

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    sentences: np.ndarray
    sources: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Narrowest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class StoreWriter:
    """Appends documents to the files of a store; drops those without tokens. Made by `create_store`."""

    def __init__(self, tokens: BinaryIO, sentences: BinaryIO, pieces: BinaryIO):
        self.sources = self.sentences = self.tokens = 0
        self._last_source = -1
        self._tokens, self._sentences, self._pieces = tokens, sentences, pieces
        sentences.write(np.zeros(1, "<u8").tobytes())  # sentence i is [offset i, offset i + 1)

    def append(self, part: Tokenised) -> None:
        """Adds documents; pieces of one source must follow each other."""
        kept = part.sentences > 0
        if not kept.any():
            return
        counts, sources = part.sentences[kept].astype(np.int64), part.sources[kept]
        lengths = part.sentence_lengths.astype(np.int64)
        first = np.cumsum(counts) - counts
        pieces = np.empty(len(counts), _RAW_PIECE)
        pieces["sentence"], pieces["sentences"] = self.sentences + first, counts
        pieces["tokens"] = np.add.reduceat(lengths, first)
        # Sources are numbered again, without gaps, so that the split can be drawn from their count alone.
        changes = np.diff(sources, prepend=self._last_source) != 0
        pieces["source"] = self.sources - 1 + np.cumsum(changes)
        self._tokens.write(part.tokens.tobytes())
        self._sentences.write((self.tokens + np.cumsum(lengths)).astype("<u8").tobytes())
        self._pieces.write(pieces.tobytes())
        self._last_source = sources[-1]
        self.sources += int(changes.sum())
        self.sentences += len(lengths)
        self.tokens += int(lengths.sum())

    def extend(self, folder: Path) -> None:
        """Adds all of another store, as if its documents had been appended here."""
        with open(folder / "tokens", "rb") as file:
            shutil.copyfileobj(file, self._tokens, _COPY_BYTES)
        sentences = sources = tokens = 0
        with open(folder / "sentences", "rb") as file:
            file.seek(np.dtype("<u8").itemsize)  # the zero before the first
            while (block := np.fromfile(file, "<u8", _BLOCK)).size:
                self._sentences.write((block + np.uint64(self.tokens)).tobytes())
                sentences, tokens = sentences + len(block), int(block[-1])
        with open(folder / "pieces", "rb") as file:
            while (block := np.fromfile(file, _RAW_PIECE, _BLOCK)).size:
                sources = int(block["source"][-1]) + 1
                block["sentence"] += self.sentences
                block["source"] += self.sources
                self._pieces.write(block.tobytes())
        self.sources += sources
        self.sentences += sentences
        self.tokens += tokens
        self._last_source = -1  # what is appended after it begins a document

    @property
    def counts(self) -> dict[str, int]:
        """How much has been added."""
        return {"documents": self.sources, "sentences": self.sentences, "tokens": self.tokens}


@contextlib.contextmanager
def create_store(folder: Path) -> Iterator[StoreWriter]:
    """An empty store in `folder`, to be filled."""
    with (
        open(folder / "tokens", "wb") as tokens,
        open(folder / "sentences", "wb") as sentences,
        open(folder / "pieces", "wb") as pieces,
    ):
        yield StoreWriter(tokens, sentences, pieces)


def held_out_sources(sources: int, eval_fraction: float, seed: int) -> np.ndarray:
    """Sorted numbers of the sources that are held out, a function of the arguments alone.

    Both splits need two sources, because a random next sentence comes from another source of the same split; where
    there are fewer than four nothing is held out.
    """
    if eval_fraction <= 0 or sources < 4:
        return np.zeros(0, np.int64)
    count = min(max(2, round(eval_fraction * sources)), sources - 2)
    rng, chosen = Random(f"{seed}/held-out"), set()
    for last in range(sources - count, sources):  # Floyd's sampling: memory for the chosen only
        number = int(rng.random() * (last + 1))
        chosen.add(last if number in chosen else number)
    return np.array(sorted(chosen), np.int64)


def split_store(folder: Path, held_out: np.ndarray) -> None:
    """Writes the index of each split from the pieces of the store."""
    written = dict.fromkeys(SPLITS, 0)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.index", "wb")) for split in SPLITS}
        for block in _whole_sources(folder / "pieces"):
            is_held_out = np.isin(block["source"], held_out)
            for split, part in zip(SPLITS, (block[~is_held_out], block[is_held_out]), strict=True):
                files[split].write(_index(part, written[split]).tobytes())
                written[split] += len(part)


def _index(pieces: np.ndarray, position: int) -> np.ndarray:
    """Index records of whole sources, the first of which gets number `position` in its split."""
    _, first, inverse, counts = np.unique(pieces["source"], return_index=True, return_inverse=True, return_counts=True)
    index = np.empty(len(pieces), _PIECE)
    for name in ("sentence", "sentences", "tokens"):
        index[name] = pieces[name]
    index["source_first"], index["source_pieces"] = position + first[inverse], counts[inverse]
    return index


def _whole_sources(path: Path) -> Iterator[np.ndarray]:
    """Blocks of pieces that never cut a source in two."""
    rest = np.empty(0, _RAW_PIECE)
    with open(path, "rb") as file:
        while (block := np.fromfile(file, _RAW_PIECE, _BLOCK)).size:
            block = np.concatenate([rest, block])
            cut = np.searchsorted(block["source"], block["source"][-1])
            yield block[:cut]
            rest = block[cut:]
    yield rest


class Unit(NamedTuple):
    """Pieces [first, last) of a split, the work of one output file."""

    first: int
    last: int
    tokens: int
    sentences: int
    sources: int


def cut_units(folder: Path, split: str, tokens_per_unit: int) -> list[Unit]:
    """Cuts a split into ranges of about equal token counts; depends on nothing but the corpus."""
    path = folder / f"{split}.index"
    total = sum(int(block["tokens"].sum()) for block in _index_blocks(path))
    count = max(1, round(total / tokens_per_unit))
    sums = np.zeros((4, count), np.int64)  # pieces, tokens, sentences, sources of each unit
    pieces = done = 0
    for block in _index_blocks(path):
        lengths = block["tokens"].astype(np.int64)
        unit = (done + np.cumsum(lengths) - lengths) * count // total
        starts_source = block["source_first"] == pieces + np.arange(len(block))
        columns = (np.ones(len(block)), lengths, block["sentences"], starts_source)
        sums += np.stack([np.bincount(unit, column, count).astype(np.int64) for column in columns])
        pieces, done = pieces + len(block), done + int(lengths.sum())
    lasts = np.cumsum(sums[0])
    units = [Unit(int(last - n), int(last), *map(int, rest)) for last, n, *rest in zip(lasts, *sums, strict=True)]
    return [unit for unit in units if unit.last > unit.first]


def _index_blocks(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while (block := np.fromfile(file, _PIECE, _BLOCK)).size:
            yield block


class Store:
    """One split of a finished store, read by position. A context manager."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.dtype = dtype
        names = ("tokens", "sentences", f"{split}.index")
        self._tokens, self._sentences, self._index = (os.open(folder / name, os.O_RDONLY) for name in names)
        self.pieces = os.fstat(self._index).st_size // _PIECE.itemsize

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in (self._tokens, self._sentences, self._index):
            os.close(descriptor)

    def piece(self, number: int) -> Piece:
        """The piece of that number within the split."""
        size = _PIECE_STRUCT.size
        return Piece(*_PIECE_STRUCT.unpack(os.pread(self._index, size, number * size)))

    def offsets(self, sentence: int, count: int) -> list[int]:
        """Token offsets at which `count` sentences start, and where the last ends."""
        return list(struct.unpack(f"<{count + 1}Q", os.pread(self._sentences, 8 * (count + 1), 8 * sentence)))

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Token ids [start, end)."""
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._tokens, (end - start) * size, start * size), self.dtype)


def unit_examples(
    store: Store, first: int, last: int, *, max_seq_len: int, short_seq_prob: float, rng: Random
) -> list[Example]:
    """All pairs from pieces [first, last) of a split; each fits `max_seq_len` with its three special tokens."""
    examples: list[Example] = []
    surplus = 0
    for number in range(first, last):
        piece = store.piece(number)
        pairs, surplus = document_pairs(
            store.offsets(piece.sentence, piece.sentences),
            lambda target, piece=piece: random_span(store, piece, target, rng),
            surplus,
            max_tokens=max_seq_len - 3,
            short_seq_prob=short_seq_prob,
            rng=rng,
        )
        examples += pairs
    return examples


def random_span(store: Store, own: Piece, target: int, rng: Random) -> tuple[int, int]:
    """Sentences of at least `target` tokens, if there are so many, from a random place outside the own source."""
    number = int(rng.random() * (store.pieces - own.source_pieces))
    other = store.piece(number + own.source_pieces if number >= own.source_first else number)
    skipped = int(rng.random() * other.sentences)
    # A sentence has one token at least, so `target` of them are always enough.
    offsets = store.offsets(other.sentence + skipped, max(1, min(other.sentences - skipped, target)))
    return offsets[0], offsets[_first_reaching(offsets, 0, target)]


def document_pairs(
    offsets: list[int],
    random_next: Callable[[int], tuple[int, int]],
    surplus: int,
    *,
    max_tokens: int,
    short_seq_prob: float,
    rng: Random,
) -> tuple[list[Example], int]:
    """Pairs of one document, and the new surplus of random over true next sentences.

    As in google-research/bert: sentences are gathered until they reach a target length, cut into A and B at a random
    sentence, B is replaced by a random place of another document half of the time, and the sentences that were not
    used then are used again. Two differences. A gathering of one sentence can only take a random B, which in Google's
    code pushes the share of random next sentences well above a half; here the choice is a coin only while both kinds
    are equally many, else it restores the balance (a lone sentence borrows the one after it for that). And the target
    is shortened per example, with probability `short_seq_prob`, not per document: documents may be whole novels.

    `offsets`: where the sentences start, and where the last ends. `random_next(target)`: a span of about so many.
    """
    examples: list[Example] = []
    start, last = 0, len(offsets) - 1
    while start < last:
        short = rng.random() < short_seq_prob
        target = 2 + int(rng.random() * (max_tokens - 1)) if short else max_tokens
        end = _first_reaching(offsets, start, target)
        if end == start + 1 < last and surplus > 0:
            end += 1
        middle = start + 1 + int(rng.random() * (end - start - 1))
        is_random_next = end == start + 1 or surplus < 0 or (surplus == 0 and rng.random() < 0.5)
        a = (offsets[start], offsets[middle])
        b = random_next(target - (a[1] - a[0])) if is_random_next else (offsets[middle], offsets[end])
        examples.append(Example(*truncate_pair(*a, *b, max_tokens, rng), is_random_next))
        surplus += 1 if is_random_next else -1
        start = middle if is_random_next else end
    return examples, surplus


def _first_reaching(offsets: list[int], start: int, target: int) -> int:
    """First sentence boundary after `start` that is `target` tokens on, or the last."""
    return min(bisect_left(offsets, offsets[start] + target, start + 1), len(offsets) - 1)


def truncate_pair(
    a_start: int, a_end: int, b_start: int, b_end: int, max_tokens: int, rng: Random
) -> tuple[int, int, int, int]:
    """Shortens two spans to `max_tokens` together: always the longer (B if equal), at either end with equal chance.

    The same distribution as taking one token after the other: the final lengths are certain, and of the tokens that a
    span loses a binomial number goes from its front.
    """
    a_length, b_length = a_end - a_start, b_end - b_start
    if a_length + b_length <= max_tokens:
        return a_start, a_end, b_start, b_end
    half_up, half = (max_tokens + 1) // 2, max_tokens // 2
    a_kept = a_length if a_length <= half_up else max_tokens - min(b_length, half)
    b_kept = max_tokens - a_kept
    a_start += _coin_flips(a_length - a_kept, rng)
    b_start += _coin_flips(b_length - b_kept, rng)
    return a_start, a_start + a_kept, b_start, b_start + b_kept


def _coin_flips(count: int, rng: Random) -> int:
    """Heads among `count` fair coins; `random()` has 53 random bits, and is the one method stable across Pythons."""
    heads = 0
    while count > 0:
        bits = int(rng.random() * (1 << 53)) & ((1 << min(count, 53)) - 1)
        heads, count = heads + bits.bit_count(), count - 53
    return heads
