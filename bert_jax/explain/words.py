"""Pieces to words, by the characters that they stand for: the same for every tokenizer."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_JOINS = re.compile(r"(?<=[^\W_])['’‐‑-](?=[^\W_])|(?<=\d)[.,:/](?=\d)")
_SPACELESS = re.compile(  # Thai, Lao, Burmese, Khmer, kana and ideographs are written without spaces
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class Span(NamedTuple):
    """A word: characters `start` to `end` of its text and pieces `first` to `last`, the latter not included."""

    start: int
    end: int
    first: int
    last: int


def merge(text: str, spans: Sequence[tuple[int, int]]) -> list[Span]:
    """The words that pieces at the characters `spans` of `text` make up; each piece belongs to one of them.

    A word ends at a space. Punctuation is a word by itself, but for an apostrophe or hyphen between letters ("isn't")
    and what is inside a number ("3.5"). In scripts without spaces each piece is a word. No word ends inside a piece,
    though SentencePiece reads unknown letters and the spaces between them as one. A piece of no visible character, such
    as a lone `▁`, goes with the word behind it.
    """
    found: list[Span] = []
    for number, span in enumerate(spans):
        start, end = _trimmed(text, *span)
        if start == end:
            continue
        if found and not _parted(text, found[-1].end, start):
            found[-1] = found[-1]._replace(end=max(found[-1].end, end), last=number + 1)
        else:
            found.append(Span(start, end, found[-1].last if found else 0, number + 1))
    if not found:
        return [Span(0, len(text), 0, len(spans))] if spans else []
    found[-1] = found[-1]._replace(last=len(spans))
    return _with_marks(text, found)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without spaces and invisible characters at its edges, which some tokenizers count to the piece."""
    while start < end and _is_blank(text[start]):
        start += 1
    while start < end and _is_blank(text[end - 1]):
        end -= 1
    return start, end


def _parted(text: str, end: int, start: int) -> bool:
    """Whether a word ends between the pieces that end at `end` and start at `start`."""
    if any(map(str.isspace, text[end:start])):
        return True
    if start < end or unicodedata.category(text[start])[0] == "M":  # pieces of one letter
        return False
    left, right = text[end - 1], text[start]
    if _SPACELESS.match(left) or _SPACELESS.match(right):
        return True
    marks = [place for place in (end - 1, start) if unicodedata.category(text[place])[0] in "PS"]
    return any(not _JOINS.match(text, place) for place in marks)


def _with_marks(text: str, words: list[Span]) -> list[Span]:
    """Words with the accents and invisible characters at their edges that their tokenizer left out."""
    found, before = [], 0
    for number, word in enumerate(words):
        limit = words[number + 1].start if number + 1 < len(words) else len(text)
        start, end = word.start, word.end
        while start > before and _is_mark(text[start - 1]):
            start -= 1
        while end < limit and _is_mark(text[end]):
            end += 1
        found.append(word._replace(start=start, end=end))
        before = end
    return found


def _is_blank(char: str) -> bool:
    return char.isspace() or unicodedata.category(char)[0] == "C"


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] in "MC" and not char.isspace()
