"""Learns a vocabulary from text: the same texts give the same one, in every process and on any number of cores."""

import collections
import io
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from bert_jax.config import LARGEST_COUNT
from bert_jax.data.tokenizer_model import (
    ACCENT_STEPS,
    KINDS,
    SPECIAL,
    Spec,
    Tokenizer,
    finished_json,
    fold,
    replace_surrogates,
)
from bert_jax.data.wordpiece import WORD_CHARS, as_google, bert_rules, wordpiece_engine
from bert_jax.errors import ConfigError, DataError

_ALPHABET = 1000  # characters a trained WordPiece vocabulary may spell words with


def train_tokenizer(
    kind: str, texts: Iterator[str], *, vocab_size: int, lowercase: bool = False, strip_accents: bool = False
) -> Tokenizer:
    """The tokenizer that the texts give.

    Args:
      kind: wordpiece, bpe (byte-level), unigram, or sentencepiece (a `.model`, by its own library).
      texts: documents; read once.
      vocab_size: pieces wanted, special ones included; too little text gives fewer, which is told on stderr.
      lowercase, strip_accents: two switches of their own.

    Raises:
      ConfigError: an unknown kind, or no room in `vocab_size` for the special pieces and the characters.
      DataError: no text.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    smallest = 256 + len(SPECIAL) if kind == "bpe" else 2 * len(SPECIAL)
    if vocab_size > LARGEST_COUNT:
        raise ConfigError(f"vocab_size: {vocab_size}, but at most {LARGEST_COUNT}")
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size: {vocab_size} is too small; {kind} needs {smallest} or more")
    trainers = dict(zip(KINDS, (_train_wordpiece, _train_bpe, _train_unigram, _train_sentencepiece), strict=True))
    payload = trainers[kind](_some_text(texts), vocab_size, lowercase, strip_accents)
    tokenizer = Tokenizer(Spec(payload, kind == "sentencepiece", {}, lowercase, strip_accents, f"trained {kind}"))
    if tokenizer.vocab_size < vocab_size:
        print(f"bert_jax: the text gives {tokenizer.vocab_size} pieces, fewer than {vocab_size}", file=sys.stderr)
    return tokenizer


def _some_text(texts: Iterable[str]) -> Iterator[str]:
    words = (text for text in texts if text.strip())
    first = next(words, None)
    if first is None:
        raise DataError("the training input holds no text; name files with some")
    return itertools.chain([first], words)


def _train_wordpiece(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> bytes:
    """The trainer numbers `##` characters and cuts the alphabet in hash order, which then breaks ties between merges:
    so the words are counted here, and the trainer is given alphabet and `##` characters in a fixed order."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers, trainers

    rules = bert_rules(lowercase, strip_accents)
    words, alphabet = _spellable(_count_words(texts, rules), min(_ALPHABET, (vocab_size - len(SPECIAL)) // 2))
    inner = sorted({f"##{char}" for word in words for char in word[1:]})
    initial = sorted({word[0] for word in words})
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=SPECIAL + initial + inner,
        show_progress=False,
    )
    engine.train_from_iterator(_repeat(words), trainer)
    ids = engine.get_vocab()
    return finished_json(wordpiece_engine(sorted(ids, key=ids.__getitem__), rules))


def _count_words(texts: Iterator[str], rules: dict[str, bool]) -> dict[str, int]:
    from tokenizers import normalizers, pre_tokenizers

    normalizer, splitter = normalizers.BertNormalizer(**rules), pre_tokenizers.BertPreTokenizer()
    chunks: collections.Counter[str] = collections.Counter()  # many times fewer than words in the text
    for text in texts:
        chunks.update(normalizer.normalize_str(as_google(rules, text)).split())
    words: collections.Counter[str] = collections.Counter()
    for chunk, count in chunks.items():
        for word, _ in splitter.pre_tokenize_str(chunk):
            if len(word) <= WORD_CHARS:
                words[word] += count
    return words


def _spellable(words: dict[str, int], room: int) -> tuple[dict[str, int], list[str]]:
    """The `room` most frequent characters, and the words that they spell; both in a fixed order."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    alphabet = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:room])
    known = set(alphabet)
    return {word: count for word, count in sorted(words.items()) if known.issuperset(word)}, alphabet


def _repeat(words: dict[str, int], batch: int = 1000) -> Iterator[str]:
    for word, count in words.items():
        for start in range(0, count, batch):
            yield f"{word} " * min(batch, count - start)


def _train_bpe(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> bytes:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.normalizer = _normalizer(lowercase, strip_accents)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(map(replace_surrogates, texts), trainer)
    return finished_json(engine)


def _train_unigram(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> bytes:
    """Learned by sentencepiece: the trainer of `tokenizers` gives another vocabulary at each run."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    normalizer = _normalizer(lowercase, strip_accents, compose=True)
    lines = (normalizer.normalize_str(replace_surrogates(text)) for text in texts)
    learned = _learned_pieces(_learn_unigram(lines, vocab_size, "identity"))
    engine = Engine(models.Unigram(learned, unk_id=1))
    engine.normalizer = normalizer
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    engine.decoder = decoders.Metaspace()
    return finished_json(engine)


def _train_sentencepiece(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> bytes:
    return _learn_unigram((fold(text, lowercase, strip_accents) for text in texts), vocab_size, "nmt_nfkc")


def _normalizer(lowercase: bool, strip_accents: bool, compose: bool = False) -> Any:
    from tokenizers import normalizers

    steps = [normalizers.Nmt(), normalizers.NFKC()] if compose else []
    if strip_accents:
        steps += [getattr(normalizers, kind)() for kind in ACCENT_STEPS]
    if lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)


def _learned_pieces(model: bytes) -> list[tuple[str, float]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return [(processor.id_to_piece(index), processor.get_score(index)) for index in range(processor.get_piece_size())]


def _learn_unigram(texts: Iterator[str], vocab_size: int, rule: str) -> bytes:
    import sentencepiece

    pad, unk, cls, sep, mask = SPECIAL
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.replace("\0", " ").splitlines() if line.strip()),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # little text gives a small vocabulary, not an error
            normalization_rule_name=rule,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],
            max_sentence_length=1 << 24,  # bytes; longer lines would be left out
            input_sentence_size=2_000_000,  # lines drawn, with the seed above: bounds the memory
            shuffle_input_sentence=True,
            num_threads=4,  # not the number of cores: sums of floats depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "too little text"
        fault = ConfigError if "vocab" in reason.lower() else DataError
        raise fault(f"sentencepiece cannot learn from this text: {reason}") from error
    return model.getvalue()
