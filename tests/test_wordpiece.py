"""WordPiece: Google's rules, told again here, character by character; the vocabulary file."""

import random
import re
import unicodedata

import pytest

from bert_jax.data.tokenizer_model import load_tokenizer
from tests.test_tokenizer import NASTY, VOCAB, write_vocab


def reference(text, vocab, *, lowercase, strip_accents, word_chars=100):
    """Google's published WordPiece, told again: Devlin et al. 2019's release, in the fewest words."""
    ideograph = re.compile(
        "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
    )
    kept = (c for c in text if c in "\t\n\r" or not (c in "\0\ufffd" or unicodedata.category(c) in ("Cc", "Cf")))
    spaced = "".join(f" {c} " if ideograph.match(c) else " " if unicodedata.category(c) == "Zs" else c for c in kept)
    found = []
    for chunk in spaced.split():
        chunk = chunk.lower() if lowercase else chunk
        if strip_accents:
            chunk = "".join(c for c in unicodedata.normalize("NFD", chunk) if unicodedata.category(c) != "Mn")
        symbol = {c for c in chunk if unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"}
        for word in "".join(f" {c} " if c in symbol else c for c in chunk).split():
            found += longest_pieces(word, vocab) if len(word) <= word_chars else ["[UNK]"]
    return found


def longest_pieces(word, vocab):
    pieces, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1)
        piece = next((p for e in ends if (p := "##" * (start > 0) + word[start:e]) in vocab), None)
        if piece is None:
            return ["[UNK]"]
        pieces.append(piece)
        start += len(piece) - 2 * (start > 0)
    return pieces


def random_texts(count, seed=0):
    draw = random.Random(seed)
    ranges = [(32, 127), (0, 32), (0xA0, 0x250), (0x370, 0x400), (0x590, 0x700), (0x900, 0xE00), (0x1680, 0x1800)]
    ranges += [(0x1E00, 0x2100), (0x2C00, 0x3100), (0xA000, 0xD800), (0xE000, 0xE003), (0xF900, 0x12000)]
    ranges += [(0xE000, 0x110000)]
    for _ in range(count):
        spans = [draw.choice(ranges) if draw.random() < 0.4 else (97, 123) for _ in range(draw.randint(0, 25))]
        yield "".join(chr(draw.randrange(*span)) + " " * (draw.random() < 0.2) for span in spans)


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("strip_accents", [False, True])
def test_wordpiece_equals_googles(tmp_path, lowercase, strip_accents):
    tokenizer = load_tokenizer(write_vocab(tmp_path), lowercase=lowercase, strip_accents=strip_accents)
    vocab = set(VOCAB) - {"\ue000"}  # a private character as a piece is the one thing that cannot be had
    texts = NASTY + list(random_texts(4000))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        wanted = reference(text, vocab, lowercase=lowercase, strip_accents=strip_accents)
        assert [tokenizer.id_to_token(index) for index in ids] == wanted, ascii(text)


def test_every_character_is_treated_as_by_google(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path), lowercase=True, strip_accents=True)
    chars = [chr(code) for code in range(0x80, 0x30000, 3)] + [chr(code) for code in range(0x80, 0x3100)]
    texts = [f"a{char}b" for char in chars]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        wanted = reference(text, set(VOCAB), lowercase=True, strip_accents=True)
        assert [tokenizer.id_to_token(index) for index in ids] == wanted, ascii(text)


def test_line_ends_and_bom_make_no_difference(tmp_path):
    plain = load_tokenizer(write_vocab(tmp_path / "a"))
    windows = write_vocab(tmp_path / "b", newline="\r\n")
    windows.write_bytes(b"\xef\xbb\xbf" + windows.read_bytes())
    assert load_tokenizer(windows).fingerprint == plain.fingerprint
