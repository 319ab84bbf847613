"""Google's WordPiece (Devlin et al. 2019), token for token: its vocabulary file, and its rules on `tokenizers`' engine.

The engine's character tables are of Unicode 8 and drop private characters, and it lower-cases letter by letter. So each
character that it would treat otherwise than Google's rules is replaced by one that it treats as they want: one for one,
so that spans stay true.
"""

import functools
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_jax.errors import DataError

if TYPE_CHECKING:
    import tokenizers

WORD_CHARS = 100  # longer words are [UNK]

_DOUBTFUL = re.compile(  # outside these blocks both agree
    "[\u061d-\u1fff\u2cef-\u2dff\u2e43-\u2e7f\ua000-\uabff\ud800-\uf8ff\U00010000-\U0010ffff]"
)
_SIGMA = re.compile("[Σσς]")
_DROPPED, _ALONE, _LETTER = "\u200b", "\U0002cea1", "\U00013000"
_IDEOGRAPH = re.compile(  # the blocks that Google's rules split into single characters
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def bert_rules(lowercase: bool, strip_accents: bool, chinese: bool = True) -> dict[str, bool]:
    """Settings of a BertNormalizer."""
    return {"lowercase": lowercase, "strip_accents": strip_accents, "handle_chinese_chars": chinese}


def wordpiece_engine(pieces: list[str], rules: dict[str, bool], unknown: str = "[UNK]") -> "tokenizers.Tokenizer":
    """WordPiece over these pieces, numbered from 0; no special pieces marked yet."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    ids = {piece: index for index, piece in enumerate(pieces)}
    engine = Engine(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=WORD_CHARS))
    engine.normalizer = normalizers.BertNormalizer(clean_text=True, **rules)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return engine


def has_upper_case(pieces: list[str]) -> bool:
    """Whether a vocabulary is cased; special pieces such as [CLS] do not count."""
    bracketed = re.compile(r"[\[<].*[\]>]")
    return any(piece != piece.lower() for piece in pieces if not bracketed.fullmatch(piece))


def read_vocabulary(payload: bytes, file: Path) -> list[str]:
    """Pieces of a `vocab.txt`, one a line. Raises DataError: not UTF-8, or a piece twice."""
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = payload[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8; convert the file") from error
    pieces = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]  # U+2028 can be a piece
    first: dict[str, int] = {}
    for number, piece in enumerate(pieces, start=1):
        if first.setdefault(piece, number) != number:
            raise DataError(f"{file}, line {number}: piece {piece!r} stands on line {first[piece]} already; remove one")
    return pieces


def as_google(rules: dict[str, Any], text: str) -> str:
    """A text of the same length for which a BertNormalizer with these settings gives what Google's rules give."""
    if text.isascii():
        return text
    if rules["lowercase"] and "Σ" in text:  # its lower case depends on its place in the word
        lowered = (char for char in "".join(filter(_is_kept, text)).lower() if char in "σς")
        text = _SIGMA.sub(lambda _: next(lowered), text)
    if not _DOUBTFUL.search(text):
        return text
    return text.translate(_stand_ins(rules["strip_accents"], rules["handle_chinese_chars"]))


def _is_kept(char: str) -> bool:
    """Whether Google's cleaning, which comes before its lower-casing, leaves a character in."""
    return char in "\t\n\r" or not (char == "\ufffd" or unicodedata.category(char) in ("Cc", "Cf"))


class _StandIns(dict):
    """Code point -> character for `str.translate`, filled as characters turn up."""

    def __init__(self, strip_accents: bool, chinese: bool):
        from tokenizers import normalizers, pre_tokenizers

        self._strip_accents, self._chinese = strip_accents, chinese
        self._normalizer = normalizers.BertNormalizer(**bert_rules(False, strip_accents, chinese))
        self._splitter = pre_tokenizers.BertPreTokenizer()

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char.isascii():
            return char
        wanted = self._treatment_by_google(char)
        self[code] = char if wanted in (None, self._treatment_by_engine(char)) else wanted
        return self[code]

    def _treatment_by_google(self, char: str) -> str | None:
        """What Google's rules do with it, as the character that stands for it; None where the engine's do the same."""
        category = unicodedata.category(char)
        if not _is_kept(char) or (self._strip_accents and category == "Mn"):
            return _DROPPED
        if category[0] == "Z" or (self._strip_accents and unicodedata.decomposition(char)[:1] not in ("", "<")):
            return None
        if category[0] == "P" or (self._chinese and _IDEOGRAPH.match(char)):
            return _ALONE
        return _LETTER

    def _treatment_by_engine(self, char: str) -> str | None:
        if unicodedata.category(char) == "Cs":  # half a surrogate pair, which the engine cannot take
            return None
        words = self._splitter.pre_tokenize_str(self._normalizer.normalize_str(f"x{char}x"))
        return {1: _DROPPED if words[0][0] == "xx" else _LETTER, 3: _ALONE}.get(len(words))


_stand_ins = functools.cache(_StandIns)
