"""A text as one row that a model reads, with what each piece of the row stands for. Shapes: S sequence."""

from typing import NamedTuple

import numpy as np

from bert_jax.data.features import truncate_pair
from bert_jax.data.tokenizer_model import Piece, Tokenizer


class Reading(NamedTuple):
    """One row: `[CLS] text [SEP]`, or `[CLS] text [SEP] second [SEP]`."""

    texts: tuple[str, ...]
    tokens: list[str]
    ids: np.ndarray
    """int32 [S]."""
    sides: np.ndarray
    """int32 [S], which of the texts a piece is of."""
    spans: list[tuple[int, int] | None]
    """The characters of each piece in its text; None for the pieces added around the texts."""
    left_out: int
    """Pieces of the texts that the row does not show."""


def assemble(tokenizer: Tokenizer, texts: tuple[str, ...], parts: list[list[Piece]], whole: int) -> Reading:
    """The row that shows `parts`, some pieces of each text; the texts have `whole` pieces."""
    cls, sep = ((tokenizer.id_to_token(index), index, None) for index in (tokenizer.cls_id, tokenizer.sep_id))
    pieces, sides = [cls], [0]
    for side, part in enumerate(parts):
        pieces += [*part, sep]
        sides += [side] * (len(part) + 1)
    tokens, ids, spans = map(list, zip(*pieces, strict=True))
    left_out = whole - sum(map(len, parts))
    return Reading(texts, tokens, np.array(ids, np.int32), np.array(sides, np.int32), spans, left_out)


def read(tokenizer: Tokenizer, texts: tuple[str, ...], pieces: list[list[Piece]], longest: int) -> Reading:
    """The row of a text or pair, cut to `longest` pieces as in fine-tuning: from the end of the longer text."""
    first, second = [*pieces, []][:2]
    parts = truncate_pair(first, second, longest - 1 - len(texts))[: len(texts)]
    return assemble(tokenizer, texts, list(parts), len(first) + len(second))
