"""Raw text to documents and sentences, streaming: text files, JSONL, TFDS, and the built-in corpus.

    texts/*.txt  folder  more.jsonl.gz  tfds:NAME/CONFIG:SPLIT  builtin   ->   Document, Document, ...   ->   sentences

Memory is bounded by one document piece (about 1.5 million characters), whatever the size of the corpus. Faults in the
text are `DataError`s that name file, line and way out; other `OSError`s pass through.
"""

import glob
import gzip
import io
import json
import os
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from bert_jax import storage
from bert_jax.data import tfds
from bert_jax.data.builtin import builtin_texts
from bert_jax.data.tfds import TFDS
from bert_jax.errors import ConfigError, DataError

BUILTIN = "builtin"
_TEXT_ENDINGS = (".txt", ".text", ".jsonl", ".txt.gz", ".text.gz", ".jsonl.gz")  # what a folder is searched for
_GZIP_FAULTS = (EOFError, zlib.error, gzip.BadGzipFile)

_DOCUMENT_CHARS = 1_000_000  # a longer document comes in pieces
_LINE_CHARS = 1 << 18  # a longer line comes in pieces
_RECORD_CHARS = 1 << 26  # a longer JSONL line is an error: it must be parsed whole
_SAMPLE_CHARS = 1 << 18  # what layouts are told from
_SEGMENT_CHARS = 10_000  # sentencex does 50 MB/s on paragraphs but 0.2 MB/s on a text of 1 MB

_TITLE = re.compile(r"\s*= [^=].* =\s*$")  # wikitext, level 1: = Title =
_SENTENCE_ENDS = tuple(".!?…:;。！？：；।؟۔")
_CLOSERS = "\"'”’»)]】」』 "

DocumentRule = Literal["auto", "blank-line", "file", "line"]


class Document(NamedTuple):
    """A document, or one piece of a very long one."""

    text: str  # raw text, universal newlines, no BOM
    source: int  # number of the original document; the pieces of one very long document share it
    sentence_per_line: bool


class Layout(NamedTuple):
    """How a text file is laid out: what ends a document, and whether each line is one sentence."""

    rule: Literal["blank-line", "title", "line", "file"]
    sentence_per_line: bool


class _Piece(NamedTuple):
    text: str
    is_first: bool  # starts a document
    sentence_per_line: bool


def read_documents(
    inputs: Sequence[str], *, text_field: str = "text", documents: DocumentRule = "auto"
) -> Iterator[Document]:
    """Documents of all inputs, in a fixed order; blank ones are left out.

    Args:
      inputs: files, globs, folders, `.gz`, `.jsonl`, `tfds:NAME/CONFIG:SPLIT`, `builtin`.
      text_field: key of the text in JSONL lines and TFDS examples, each of which is a document.
      documents: what separates documents in text files; "auto" looks at each file's beginning (`detect_layout`).

    Raises:
      DataError: a missing or empty input, or text that is not UTF-8, compressed or structured as it should be.
    """
    names = resolve_inputs(inputs)  # here, not in the generator: a missing file is told at once
    return _at_least_one(documents_of(names, text_field, documents), inputs)


def _at_least_one(found: Iterator[tuple[str, Document]], inputs: Sequence[str]) -> Iterator[Document]:
    document = None
    for _, document in found:
        yield document
    if document is None:
        raise DataError(f"{' '.join(inputs)}: holds no text; give files with text in them")


def split_sentences(document: Document, language: str = "en") -> list[str]:
    """Sentences of a document: stripped, not empty, on one line each. Wikitext headings are left out, as BERT's were.

    Raises:
      ConfigError: `language` is no ISO 639 code such as `en`, `pt` or `pt-BR`. Codes that sentencex has no rules
        for get its language-neutral ones.
    """
    if document.sentence_per_line:
        return [line.strip() for line in document.text.split("\n") if line.strip()]
    code = re.split("[-_]", language.lower())[0]  # sentencex knows pt, but not pt-BR or PT
    if not re.fullmatch("[a-z]{2,3}", code):
        raise ConfigError(f"language {language!r} is no language code; give one such as en, pt or zh")
    return [sentence for paragraph in _paragraphs(document.text) for sentence in _segment(paragraph, code)]


def input_bytes(inputs: Sequence[str]) -> int | None:
    """Bytes that reading will pass over, for progress; None where that is not known (.gz, TFDS, builtin)."""
    names = resolve_inputs(inputs)
    if any(_is_no_file(name) or name.endswith(".gz") for name in names):
        return None
    return sum(storage.size_and_time(name)[0] for name in names)


def resolve_inputs(inputs: Sequence[str]) -> list[str]:
    """Sorted file paths, `tfds:` names and `builtin` that the inputs stand for, each once, however it is spelt.

    Raises:
      DataError: a missing file, a glob without a match, a folder without text files, a pipe.
    """
    names = {name for pattern in inputs for name in _expand(pattern)}
    places = {
        name if _is_no_file(name) or storage.is_remote(name) else os.path.realpath(name): name
        for name in sorted(names, reverse=True)
    }
    return sorted(places.values())


def _is_no_file(name: str) -> bool:
    return name == BUILTIN or name.startswith(TFDS)


def _expand(pattern: str) -> list[str]:
    if _is_no_file(pattern):
        return [pattern]
    if storage.is_remote(pattern):
        found = storage.expand(pattern)
        if not found:
            raise DataError(f"{pattern}: the bucket has no such file, and none matches it")
        return found
    path = os.path.expanduser(pattern)
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    if not matches:
        raise DataError(
            f"{pattern}: no such file, and no file matches it; "
            f"give files, globs, folders, {TFDS}NAME/CONFIG:SPLIT or {BUILTIN}"
        )
    files = [file for match in matches for file in (_folder_files(match) if os.path.isdir(match) else [match])]
    if not files:
        raise DataError(f"{pattern}: no text files ({' '.join(_TEXT_ENDINGS)}) in it; name others with a glob")
    if odd := [file for file in files if not os.path.isfile(file)]:  # text is read more than once
        raise DataError(f"{odd[0]}: a pipe, a device or a broken link; put the text into a file")
    return files


def _folder_files(folder: str) -> list[str]:
    return [
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.endswith(_TEXT_ENDINGS) and not file.startswith(".")
    ]


def _read_pieces(name: str, text_field: str, documents: DocumentRule) -> Iterator[_Piece]:
    if name == BUILTIN:
        return _record_pieces(builtin_texts())
    if name.startswith(TFDS):
        return _record_pieces(_tfds_texts(name, text_field))
    if name.removesuffix(".gz").endswith(".jsonl"):
        return _record_pieces(_jsonl_texts(name, text_field))
    return _file_pieces(name, documents)


def documents_of(names: Sequence[str], text_field: str, documents: DocumentRule) -> Iterator[tuple[str, Document]]:
    """(name, document) of all of the names, which are such as `resolve_inputs` gives, numbered through."""
    source = -1
    for name in names:
        is_new = True
        for text, is_first, sentence_per_line in _read_pieces(name, text_field, documents):
            is_new |= is_first
            if text.strip():
                source += is_new
                is_new = False
                yield name, Document(text, source, sentence_per_line)


# Text files


def _file_pieces(path: str, documents: DocumentRule) -> Iterator[_Piece]:
    layout = file_layout(path, documents)
    held, size, is_first = [], 0, True
    for line in _read_lines(path):
        if held and layout.rule == "title" and _TITLE.match(line):
            yield _Piece("".join(held), is_first, layout.sentence_per_line)
            held, size, is_first = [], 0, True
        held.append(line)
        size += len(line)
        ends = (layout.rule == "blank-line" and line.isspace()) or (layout.rule == "line" and line.endswith("\n"))
        # a piece ends with a sentence if one ends soon
        if ends or (size >= _DOCUMENT_CHARS and (_ends_sentence(line) or size >= _DOCUMENT_CHARS + _LINE_CHARS)):
            yield _Piece("".join(held), is_first, layout.sentence_per_line)
            held, size, is_first = [], 0, ends
    yield _Piece("".join(held), is_first, layout.sentence_per_line)


def file_layout(path: str, documents: DocumentRule = "auto") -> Layout:
    """Layout of a text file, told from its first 256 K characters where `documents` leaves it open."""
    if documents == "line":
        return Layout("line", sentence_per_line=False)
    lines, size = [], 0
    for line in _read_lines(path):
        lines.append(line)
        size += len(line)
        if size >= _SAMPLE_CHARS:
            break
    detected = detect_layout(lines)
    return detected if documents == "auto" else detected._replace(rule=documents)


def detect_layout(lines: Sequence[str]) -> Layout:
    """Layout that a file's first lines show.

    At least 80 % of the lines one sentence each: Google's layout, where a blank line ends a document. Else prose: a
    document starts at each wikitext title; without titles, each line is one if the lines are long paragraphs with no
    blank line between; else the file is one document.
    """
    kept = [text for line in lines if (text := line.strip()) and not _is_heading(text)]
    if not kept:
        return Layout("file", sentence_per_line=False)
    wrapped = _is_wrapped([line.strip() for line in lines], _line_width(kept))
    singles = sum(len(_segment(line[:_SEGMENT_CHARS], "en")) == 1 for line in kept)
    if singles >= 0.8 * len(kept) and not wrapped:
        return Layout("blank-line", sentence_per_line=True)
    if any(map(_TITLE.match, lines)):
        return Layout("title", sentence_per_line=False)
    if not wrapped and not any(map(str.isspace, lines)) and statistics.median(map(len, kept)) > 200:
        return Layout("line", sentence_per_line=False)
    return Layout("file", sentence_per_line=False)


def _read_lines(path: str, limit: int = _LINE_CHARS) -> Iterator[str]:
    """Lines with their newline; one longer than `limit` characters comes in pieces, cut at a space if there is one."""
    number, held = 1, ""
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig") as stream:
            while line := stream.readline(limit):
                if "\0" in line:
                    _check_gzip(path, number)
                    raise DataError(
                        f"{path}: line {number}: NUL byte, so this is binary or UTF-16; "
                        f"convert it with: iconv -f UTF-16 -t UTF-8"
                    )
                if line.endswith("\n"):
                    number += 1
                    yield held + line
                    held = ""
                elif len(line) == limit:
                    cut = _cut_point(line, 0, limit - 1)
                    yield held + line[:cut]
                    held = line[cut:]
                else:
                    held += line
            if held:
                yield held
    except UnicodeDecodeError as error:
        number += len(re.findall(b"\r\n|\r|\n", error.object[: error.start]))
        _check_gzip(path, number)
        raise DataError(
            f"{path}: line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); "
            f"convert it with: iconv -f LATIN1 (or UTF-16, ...) -t UTF-8"
        ) from error
    except _GZIP_FAULTS as error:
        raise _damaged(path, number, error) from error


def _damaged(path: str, number: int, error: Exception) -> DataError:
    return DataError(f"{path}: line {number}: truncated or corrupt gzip ({error}); copy or download it again")


def _check_gzip(path: str, number: int) -> None:
    """Raises DataError where a compressed file is damaged: what is odd in its text is then no fault of the text."""
    if path.endswith(".gz"):
        try:
            with _open(path) as stream:
                while stream.read(2**20):
                    pass
        except _GZIP_FAULTS as error:
            raise _damaged(path, number, error) from error


def _open(path: str) -> io.BufferedIOBase:
    path = storage.fetch(path)  # text is read twice, and in parts by many processes
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _cut_point(text: str, start: int, limit: int) -> int:
    """End of a piece from `start` of at most `limit` characters, after white space if there is any in its last half."""
    end = start + limit
    if end >= len(text):
        return len(text)
    return max(text.rfind("\n", start + limit // 2, end), text.rfind(" ", start + limit // 2, end)) + 1 or end


# Records: one document each


def _record_pieces(texts: Iterable[str]) -> Iterator[_Piece]:
    for text in texts:
        # JSON can carry half surrogates and NULs, which no tokenizer takes
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        start = 0
        while start < len(text):
            end = _cut_point(text, start, _DOCUMENT_CHARS)
            yield _Piece(text[start:end], start == 0, sentence_per_line=False)
            start = end


def _jsonl_texts(path: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path, _RECORD_CHARS), 1):
        if not line.isspace():
            try:
                text = _json_text(line, f"{path}: line {number}", text_field)
            except DataError:
                _check_gzip(path, number)
                raise
            yield text


def _json_text(line: str, place: str, text_field: str) -> str:
    if len(line) >= _RECORD_CHARS // 2 and not line.endswith("\n"):
        raise DataError(f"{place}: longer than {_RECORD_CHARS // 2:,} characters; cut the record up")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}); JSONL has one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: {type(record).__name__} where an object was expected, one a line")
    if text_field not in record:
        raise DataError(f"{place}: no field {text_field!r}; choose with --text-field among: {', '.join(record)}")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise DataError(f"{place}: field {text_field!r} is {kind}, not a string; choose another with --text-field")
    return record[text_field]


def _tfds_texts(name: str, text_field: str) -> Iterator[str]:
    features = tfds.features(name)
    if type(features.get(text_field)).__name__ != "Text":
        raise DataError(f"{name}: no text in {text_field!r}; choose with --text-field among: {', '.join(features)}")
    return (row[text_field].decode("utf-8", "replace") for row in tfds.rows(name, [text_field]))


# Sentences


def _segment(paragraph: str, language: str) -> list[str]:
    """Sentences of one line of text. Cuts of long ones fall between sentences: the last is taken up again."""
    import sentencex  # here, because readers of the other layouts need none

    sentences, start = [], 0
    while start < len(paragraph):
        end = _cut_point(paragraph, start, _SEGMENT_CHARS)
        found = sentencex.segment(language, paragraph[start:end])
        if end < len(paragraph) and len(found) > 1:
            end -= len(found.pop())
        sentences += [text for sentence in found if (text := sentence.strip())]
        start = end
    return sentences


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of prose, each on one line: hard-wrapped lines are joined, other lines are paragraphs."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    width = _line_width([line for line in lines if line])
    wrapped = _is_wrapped(lines, width)
    paragraphs, held = [], []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line and not _is_heading(line):
            held.append(line)
            if wrapped and _continues(line, following, width):
                continue
        if held:
            paragraphs.append(" ".join(held))
            held = []
    return paragraphs


def _continues(line: str, following: str, width: int) -> bool:
    """Whether a hard-wrapped paragraph goes on in the next line: no short last line, no change to or from a heading."""
    if not following or (_ends_sentence(line) and not _is_full(line, following, width)):
        return False
    return _is_capitals(line) == _is_capitals(following)


def _is_wrapped(lines: Sequence[str], width: int) -> bool:
    """Whether lines of at most about `width` characters stop where the next word had no room, and not at sentence ends.

    In hard-wrapped novels half of the lines do, in text with a sentence or a paragraph a line almost none.
    """
    broken = sum(
        1
        for line, following in zip(lines, lines[1:], strict=False)
        if line and following and _is_full(line, following, width) and not _ends_sentence(line)
    )
    return width >= 40 and broken >= 0.2 * sum(map(bool, lines))


def _line_width(lines: Sequence[str]) -> int:
    """Length that nine in ten lines keep to."""
    return sorted(map(len, lines))[len(lines) * 9 // 10] if lines else 0


def _is_full(line: str, following: str, width: int) -> bool:
    word = following[:20].partition(" ")[0]  # no more than 20, for scripts without spaces
    return len(line) + 1 + len(word) > width


def _ends_sentence(line: str) -> bool:
    return line.rstrip().rstrip(_CLOSERS).endswith(_SENTENCE_ENDS)


def _is_heading(line: str) -> bool:
    return line.startswith("=") and line.endswith("=")


def _is_capitals(line: str) -> bool:
    return len(line) > 3 and line.isupper()
