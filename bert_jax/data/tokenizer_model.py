"""Text to pieces: WordPiece, byte-level BPE, Unigram by Hugging Face `tokenizers`, `.model` files by `sentencepiece`.

WordPiece equals Google's (Devlin et al. 2019) token for token. Special pieces are found by name, never by id.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bert_jax import storage
from bert_jax.config import fingerprint
from bert_jax.data.wordpiece import as_google, bert_rules, has_upper_case, read_vocabulary, wordpiece_engine
from bert_jax.errors import DataError

if TYPE_CHECKING:  # imported where they are used: `--help` answers at once
    import numpy as np
    import tokenizers

ROLES = {  # spellings looked for, after the one that tokenizer_config.json names
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
SPECIAL = [spellings[0] for spellings in ROLES.values()]
KINDS = ("wordpiece", "bpe", "unigram", "sentencepiece")
_CONFIG, _JSON, _VOCAB, _MODEL = "tokenizer_config.json", "tokenizer.json", "vocab.txt", "spiece.model"
_ADDED, _SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"  # of older Hugging Face folders
ACCENT_STEPS = ("NFD", "StripAccents", "NFC")
_CACHED_WORDS, _CACHED_CHARS = 200_000, 24  # some 40 MB; text without spaces is one long word a sentence

Piece = tuple[str, int, tuple[int, int]]  # piece, id, span of characters


class Encoding(NamedTuple):
    """One sequence with its special pieces; four lists of one length."""

    tokens: list[str]
    ids: list[int]
    type_ids: list[int]  # 0 for [CLS] text [SEP], 1 for pair [SEP]
    offsets: list[tuple[int, int]]  # character spans in the text (or pair); (0, 0) for added special pieces


class Spec(NamedTuple):
    """All that a tokenizer is made from: plain values, so that worker processes can be handed one."""

    payload: bytes  # tokenizer.json, or a SentencePiece model
    is_sentencepiece: bool
    names: dict[str, str]  # role -> spelling, where a configuration gives one
    lowercase: bool | None
    strip_accents: bool | None
    source: str  # for messages


class Tokenizer:
    """One small interface in front of Hugging Face `tokenizers` and SentencePiece; made by `load_tokenizer`.

    Raises DataError where the vocabulary is unreadable or lacks one of [PAD] [UNK] [CLS] [SEP] [MASK].
    """

    def __init__(self, spec: Spec):
        self._spec = spec
        self._backend = (_SentencePiece if spec.is_sentencepiece else _HuggingFace)(spec)
        self._pieces = self._backend.pieces
        self._id_of = {piece: index for index, piece in enumerate(self._pieces)}
        self.names = {role: _special_name(role, spec, self._id_of) for role in ROLES}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(self._id_of.get, self.names.values())
        special = {self._id_of[name] for name in self.names.values()} | set(self._backend.special_ids)
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        self._backend.recognise([self._pieces[index] for index in self.special_ids], set(self.names.values()))
        self.vocab_size = len(self._pieces)
        self.lowercase = spec.lowercase

    def __reduce__(self):
        return Tokenizer, (self._spec,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the output: vocabulary, rules, switches, special names; not of where it was read."""
        switches = [self._spec.lowercase, self._spec.strip_accents]
        parts = [self._backend.rules, self._pieces, self.names, self.special_ids, switches]
        return fingerprint(parts)

    @functools.cached_property
    def continuation(self) -> "np.ndarray":
        """Whether a piece continues a word, bool [V]: `##` in WordPiece, no `▁` or `Ġ` in front in the others."""
        import numpy as np

        flags = np.array([self._backend.continues(piece) for piece in self._pieces], dtype=bool)
        flags[list(self.special_ids)] = False
        return flags

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, no special pieces added. A literal "[SEP]" in a text is text, and so are the other roles'
        names; further special pieces of the vocabulary, such as markers of entities, are pieces."""
        return self._backend.batch(texts)

    def pieces(self, text: str, *, special: bool = False) -> list["Piece"]:
        """(piece, id, (start, end) in `text`) of a text; none added. A literal "[MASK]" is text, or `special`."""
        return self._backend.spans(text, literal=not special)

    def encode(self, text: str, pair: str | None = None) -> Encoding:
        """`[CLS] text [SEP]`, or `[CLS] text [SEP] pair [SEP]`; a literal "[MASK]" is the special piece."""
        cls, sep = ((self.names[role], self._id_of[self.names[role]], (0, 0)) for role in ("cls", "sep"))
        first = [cls, *self.pieces(text, special=True), sep]
        second = [] if pair is None else [*self.pieces(pair, special=True), sep]
        tokens, ids, offsets = map(list, zip(*first, *second, strict=True))
        return Encoding(tokens, ids, [0] * len(first) + [1] * len(second), offsets)

    def decode(self, ids: Iterable[int], *, shown: Iterable[int] = ()) -> str:
        """Text of the ids, special pieces left out but for those `shown`."""
        hidden = set(self.special_ids).difference(shown)
        return self._backend.decode([int(index) for index in ids if int(index) not in hidden]).strip(" ")

    def id_to_token(self, index: int) -> str:
        """The piece with this id."""
        return self._pieces[index]

    def token_to_id(self, token: str) -> int | None:
        """The id of this piece; None when the vocabulary has none."""
        return self._id_of.get(token)

    def save(self, folder: str | os.PathLike, *, longest: int | None = None) -> None:
        """Writes a folder that `load_tokenizer` and transformers' `AutoTokenizer` accept.

        `longest` is what its model reads: other programs cut to that.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = self._backend.save(folder)
        lowercase, strip_accents = self._spec.lowercase, self._spec.strip_accents
        settings = {
            "tokenizer_class": kind,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "do_lower_case": lowercase,
            "strip_accents": strip_accents,
            "keep_accents": None if strip_accents is None else not strip_accents,  # SentencePiece's word for it
            "tokenize_chinese_chars": self._backend.splits_chinese,
            "model_max_length": longest,
        }
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {f"{role}_token": name for role, name in self.names.items()}
        (folder / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_name(role: str, spec: Spec, known: dict[str, int]) -> str:
    spellings = _spellings(role, spec.names)
    for name in spellings:
        if name in known:
            return name
    raise DataError(
        f"{spec.source}: the vocabulary has no {spellings[0]} piece; add it, or name one as {role}_token in {_CONFIG}"
    )


def _spellings(role: str, names: dict[str, str]) -> tuple[str, ...]:
    return (names[role], *ROLES[role]) if role in names else ROLES[role]


class _HuggingFace:
    """A `tokenizer.json`: one copy that sees special pieces in a text, and one to which they are text.

    Both back ends have `pieces`, `special_ids`, `rules` (what decides their output), `splits_chinese`, and
    `recognise(names, roles)` (special pieces; `roles` are those that `literal` makes text), `continues(piece)`,
    `batch(texts)` -> ids, `spans(text, literal)` -> pieces with ids and offsets, `decode(ids)`, `save(folder)` -> the
    class that transformers gives such files.
    """

    def __init__(self, spec: Spec):
        self._aware, self._blind = _parse_json(spec), _parse_json(spec)
        self._blind.encode_special_tokens = True
        data = json.loads(spec.payload)
        known = {index: piece for piece, index in self._aware.get_vocab(with_added_tokens=True).items()}
        self.pieces = [known.get(index, f"[id {index}]") for index in range(max(known, default=-1) + 1)]
        added = data["added_tokens"]
        self.special_ids = [token["id"] for token in added if token["special"]]
        self._kind = data["model"]["type"]
        self._prefix = data["model"].get("continuing_subword_prefix")
        model = {key: value for key, value in data["model"].items() if key != "vocab"}
        # Nine digits: the last bit of a score changes when tokenizers reads what it has written.
        scores = [f"{score:.9g}" for _, score in data["model"]["vocab"]] if self._kind == "Unigram" else []
        plain = [(token["id"], token["content"]) for token in added if not token["special"]]
        self.rules = [_steps(data["normalizer"]), data["pre_tokenizer"], model, scores, sorted(plain)]
        bert = _bert_step(data)
        self.splits_chinese = bert["handle_chinese_chars"] if bert else None
        self._prepare = functools.partial(as_google, bert) if bert else replace_surrogates
        self._names: re.Pattern | None = None
        self._words = _WordCache(self._encode_one) if _is_blind_across_spaces(data) else None

    def recognise(self, names: list[str], roles: set[str]) -> None:
        self._aware.add_special_tokens(names)
        if not roles.issuperset(names):
            data = json.loads(self._aware.to_str())
            for token in data["added_tokens"]:
                token["special"] = token["content"] in roles
            self._blind, self._words = type(self._aware).from_str(json.dumps(data)), None
            self._blind.encode_special_tokens = True
        if self._kind == "Unigram":  # its lattice holds every piece, special ones too
            self._names = re.compile("|".join(map(re.escape, names)))

    def continues(self, piece: str) -> bool:
        return piece.startswith(self._prefix) if self._prefix else not piece.startswith(("▁", "Ġ"))

    def batch(self, texts: list[str]) -> list[list[int]]:
        if self._words is not None:
            ids_of = self._words.__getitem__
            return [list(itertools.chain.from_iterable(map(ids_of, text.split(" ")))) for text in texts]
        prepared = [self._prepare(text) for text in texts]
        if self._names:
            prepared = [self._names.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text) for text in prepared]
        return [encoding.ids for encoding in self._blind.encode_batch_fast(prepared, add_special_tokens=False)]

    def _encode_one(self, text: str) -> list[int]:
        return self._blind.encode_batch_fast([self._prepare(text)], add_special_tokens=False)[0].ids

    def spans(self, text: str, literal: bool) -> list[Piece]:
        backend = self._blind if literal else self._aware
        encoding = backend.encode(self._prepare(text), add_special_tokens=False)
        return list(zip(encoding.tokens, encoding.ids, encoding.offsets, strict=True))

    def decode(self, ids: list[int]) -> str:
        return self._aware.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path) -> str:
        (folder / _JSON).write_text(self._aware.to_str(pretty=True), encoding="utf-8")  # its own tells no OSError
        if self._kind != "WordPiece":
            return "PreTrainedTokenizerFast"
        (folder / _VOCAB).write_bytes("".join(f"{piece}\n" for piece in self.pieces).encode())
        return "BertTokenizer"


class _WordCache(dict):
    """Word -> ids. Half the time of prepare, as words recur. Threads may share one: each step on the dict is atomic."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _CACHED_CHARS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _is_blind_across_spaces(data: dict[str, Any]) -> bool:
    """Whether the pieces of a word do not depend on what stands beyond a space: so with Google's rules."""
    steps = (data["normalizer"], data["pre_tokenizer"], data["model"])
    kinds = [step and step["type"] for step in steps]
    added = any(not token["special"] for token in data["added_tokens"])  # these may span spaces
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not added


def _parse_json(spec: Spec) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        parsed = tokenizers.Tokenizer.from_buffer(spec.payload)
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{spec.source}: not a readable {_JSON} ({error}); fetch or train it again") from error
    parsed.no_truncation()
    parsed.no_padding()
    return parsed


class _SentencePiece:
    """A SentencePiece model; case and accents are folded in front of it, and special pieces cut out here."""

    splits_chinese = None

    def __init__(self, spec: Spec):
        import sentencepiece

        self._payload = spec.payload
        self._fold = functools.partial(fold, lowercase=spec.lowercase, strip_accents=spec.strip_accents)
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(spec.payload)
        except RuntimeError as error:
            raise DataError(f"{spec.source}: not a readable SentencePiece model; fetch or train it again") from error
        self.pieces = [self._model.id_to_piece(index) for index in range(self._model.get_piece_size())]
        control, unknown = self._model.is_control, self._model.is_unknown
        self.special_ids = [index for index in range(len(self.pieces)) if control(index) or unknown(index)]
        self.rules = hashlib.sha256(spec.payload).hexdigest()

    def recognise(self, names: list[str], roles: set[str]) -> None:
        self._names = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def continues(self, piece: str) -> bool:
        return not piece.startswith("▁")

    def batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(list(map(self._fold, texts)), num_threads=1)

    def spans(self, text: str, literal: bool) -> list[Piece]:
        if literal:
            return self._text_spans(text, 0)
        found, start = [], 0
        for number, part in enumerate(self._names.split(text)):
            end = start + len(part)
            if number % 2:
                found.append((part, self._model.piece_to_id(part), (start, end)))
            else:
                found += self._text_spans(part, start)
            start = end
        return found

    def _text_spans(self, text: str, start: int) -> list[Piece]:
        folded = [self._fold(char) for char in text]
        origin = [start + index for index, chars in enumerate(folded) for _ in chars] + [start + len(text)]
        mapping = self._model.encode("".join(folded), return_type="offset_mapping")
        spans = (
            (origin[begin], origin[end - 1] + 1 if end > begin else origin[begin]) for begin, end in mapping["offsets"]
        )
        return [(self.pieces[index], index, span) for index, span in zip(mapping["ids"], spans, strict=True)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def save(self, folder: Path) -> str:
        (folder / _MODEL).write_bytes(self._payload)
        return "AlbertTokenizer"


def fold(text: str, lowercase: bool | None, strip_accents: bool | None) -> str:
    """The two switches for SentencePiece, which knows neither."""
    text = replace_surrogates(text)
    if strip_accents:
        marks = unicodedata.normalize("NFD", text)
        text = unicodedata.normalize("NFC", "".join(char for char in marks if unicodedata.category(char) != "Mn"))
    return text.lower() if lowercase else text


_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot


def replace_surrogates(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, sequences flattened."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for inner in normalizer["normalizers"] for step in _steps(inner)]


def _bert_step(data: dict[str, Any]) -> dict[str, Any] | None:
    return next((step for step in _steps(data["normalizer"]) if step["type"] == "BertNormalizer"), None)


def load_tokenizer(
    path: str | os.PathLike, *, lowercase: bool | None = None, strip_accents: bool | None = None
) -> Tokenizer:
    """The tokenizer at `path`.

    Args:
      path: folder (ours or Hugging Face's; `tokenizer.json` goes before `vocab.txt`), `vocab.txt`, `tokenizer.json`, or
        SentencePiece `.model`. A `tokenizer_config.json` beside it is followed.
      lowercase, strip_accents: overrule what the files say. Without files that say it, a `vocab.txt` is lower-casing
        and accent-stripping exactly if it holds no piece with an upper-case letter; that is told on stderr.

    Raises:
      DataError: nothing there, unreadable, duplicate pieces, or a special piece is missing.
    """
    file = _vocabulary_file(Path(storage.fetch(path)))
    payload = _read(file)
    settings: dict[str, Any] = {}
    for beside in (file.parent / _SPECIAL_MAP, file.parent / _CONFIG):
        settings |= _parse(beside.read_bytes(), beside) if beside.is_file() else {}
    if settings.get("word_tokenizer_type", "basic") != "basic" or "Japanese" in str(settings.get("tokenizer_class")):
        raise DataError(f"{file}: its words are split by a Japanese analyser ({_CONFIG}), which is not read here")
    switches = lowercase, strip_accents
    if file.suffix == ".model":
        spec = Spec(payload, True, _names(settings), *_config_switches(settings, switches, str(file)), str(file))
    elif file.suffix == ".json":
        spec = _json_spec(_parse(payload, file), settings, switches, str(file))
    else:
        spec = _vocab_spec(read_vocabulary(payload, file), settings, switches, str(file), _added_tokens(file, settings))
    return Tokenizer(spec)


def _added_tokens(file: Path, settings: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(id, piece, whether special) of what Hugging Face keeps beside a `vocab.txt`, by id."""
    beside = file.parent / _ADDED
    try:
        plain = {
            int(index): name
            for name, index in (_parse(beside.read_bytes(), beside) if beside.is_file() else {}).items()
        }
        listed = {int(index): token for index, token in (settings.get("added_tokens_decoder") or {}).items()}
        further = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        special = {name["content"] if isinstance(name, dict) else name for name in further}
        found = {index: (name, name in special) for index, name in plain.items()}
        found |= {index: (token["content"], bool(token.get("special"))) for index, token in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: what {_ADDED} or {_CONFIG} say of added pieces is not understood ({error!r})"
        ) from error
    return [(index, *found[index]) for index in sorted(found)]


def _vocabulary_file(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a tokenizer folder, {_VOCAB}, {_JSON} or .model file")
    if not path.is_dir():
        return path
    models = sorted(path.glob("*.model"))
    for file in (path / _JSON, path / _VOCAB, *models[:1]):
        if file.is_file():
            return file
    raise DataError(f"{path}: holds no {_JSON}, {_VOCAB} or .model file; `train` makes such a folder")


def _read(file: Path) -> bytes:
    payload = file.read_bytes()
    if not payload.strip():
        raise DataError(f"{file}: the vocabulary file is empty; fetch or train it again")
    return payload


def _parse(payload: bytes, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise DataError(f"{file}: holds no JSON object; fetch it again")
    return data


def _names(settings: dict[str, Any]) -> dict[str, str]:
    found = {role: settings.get(f"{role}_token") for role in ROLES}
    found = {role: name.get("content") if isinstance(name, dict) else name for role, name in found.items()}
    return {role: name for role, name in found.items() if isinstance(name, str)}


def _vocab_spec(pieces: list[str], settings: dict[str, Any], switches: tuple, source: str, added: list[tuple]) -> Spec:
    lowercase, strip_accents = _config_switches(settings, switches, source)
    if lowercase is None or strip_accents is None:
        cased = has_upper_case(pieces)
        lowercase, strip_accents = (not cased if switch is None else switch for switch in (lowercase, strip_accents))
        print(
            f"bert_jax: {source}: no {_CONFIG} tells its case; {'some' if cased else 'no'} piece has upper case: text "
            f"is {'lower-cased' if lowercase else 'left cased'}, accents are {'stripped' if strip_accents else 'kept'}",
            file=sys.stderr,
        )
    chinese = settings.get("tokenize_chinese_chars", True) is not False
    names, known = _names(settings), set(pieces)
    unknown = next((name for name in _spellings("unk", names) if name in known), SPECIAL[1])
    engine = wordpiece_engine(pieces, bert_rules(lowercase, strip_accents, chinese), unknown)
    for index, name, special in added:
        (engine.add_special_tokens if special else engine.add_tokens)([name])
        if engine.token_to_id(name) != index:
            raise DataError(f"{source}: {name!r} is added as {index}, which is not where the {len(pieces)} pieces end")
    return Spec(finished_json(engine, names.values()), False, names, lowercase, strip_accents, source)


def _config_switches(settings: dict[str, Any], switches: tuple, source: str) -> tuple[bool | None, bool | None]:
    """Arguments before settings; in published settings, accents follow the case where they are not mentioned."""
    for key in ("do_lower_case", "strip_accents", "keep_accents", "tokenize_chinese_chars"):
        if not isinstance(settings.get(key), bool | None):
            raise DataError(f"{source}: {key} in its {_CONFIG} is {settings[key]!r}; write true or false")
    lowercase, strip_accents = switches
    cased = settings.get("do_lower_case")
    accents = settings.get("strip_accents")
    if accents is None and settings.get("keep_accents") is not None:
        accents = not settings["keep_accents"]
    accents = cased if accents is None else accents
    return cased if lowercase is None else lowercase, accents if strip_accents is None else strip_accents


def _json_spec(data: dict[str, Any], settings: dict[str, Any], switches: tuple, source: str) -> Spec:
    data = {"normalizer": None, "pre_tokenizer": None, "added_tokens": [], **data}
    try:
        if _bert_step(data):  # other normalizers speak for themselves
            switches = _config_switches(settings, switches, source)
        found = _set_switches(data, *switches)
        spec = Spec(json.dumps(data).encode(), False, _names(settings), *found, source)
        return spec._replace(payload=_parse_json(spec).to_str().encode())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: not a whole {_JSON} ({error!r}); fetch or train it again") from error


def _set_switches(data: dict[str, Any], lowercase: bool | None, strip_accents: bool | None) -> tuple[bool, bool]:
    """Sets the switches in the normalizer of a `tokenizer.json`, in place (None: as it is); returns what holds now."""
    if bert := _bert_step(data):  # null means "as the case", which we write out
        stripped = bert["lowercase"] if bert["strip_accents"] is None else bert["strip_accents"]
        bert["lowercase"] = bert["lowercase"] if lowercase is None else lowercase
        bert["strip_accents"] = stripped if strip_accents is None else strip_accents
        return bert["lowercase"], bert["strip_accents"]
    steps = _steps(data["normalizer"])
    if strip_accents is not None:
        steps = [step for step in steps if step["type"] not in ACCENT_STEPS]
        steps += [{"type": kind} for kind in ACCENT_STEPS if strip_accents]
    if lowercase is not None:
        steps = [step for step in steps if step["type"] != "Lowercase"] + [{"type": "Lowercase"}] * lowercase
    data["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    kinds = {step["type"] for step in steps}
    return "Lowercase" in kinds, "StripAccents" in kinds


def finished_json(engine: "tokenizers.Tokenizer", names: Iterable[str] = ()) -> bytes:
    """JSON of an engine, its special pieces marked, with the `[CLS] A [SEP] B [SEP]` rule for other programs."""
    from tokenizers import processors

    ids = {name: engine.token_to_id(name) for name in (*names, *SPECIAL)}
    engine.add_special_tokens([name for name, index in ids.items() if index is not None])
    marks = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    if all(index is not None for _, index in marks):
        engine.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", marks)
    return engine.to_str().encode()


def publish(tokenizer: Tokenizer, output: str | os.PathLike) -> None:
    """Saves into the new folder `output`, whole or not at all: a killed run leaves nothing that looks finished."""
    output = Path(output).absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save(temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
