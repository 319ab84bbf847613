"""Corpus: what comes out of each kind of input, that it streams, and that each fault is named."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest

from bert_jax.data import corpus, tfds
from bert_jax.errors import ConfigError, DataError
from tests.conftest import LETTER, SENTENCES

PROSE = LETTER


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "text.txt") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def read(*inputs, **options):
    return list(corpus.read_documents(inputs, **options))


def sentences_of(documents):
    """Sentences by source document."""
    found = {}
    for document in documents:
        found.setdefault(document.source, []).extend(corpus.split_sentences(document))
    return list(found.values())


# Layouts of text files


def test_one_sentence_a_line_with_blank_line_documents(write):
    documents = read(write("\n".join(SENTENCES[:3]) + "\n\n\n" + "\n".join(SENTENCES[3:])))
    assert all(document.sentence_per_line for document in documents)
    assert sentences_of(documents) == [SENTENCES[:3], SENTENCES[3:]]


@pytest.mark.parametrize("width", [50, 72, 100])
def test_hard_wrapped_prose_is_joined(write, width):
    path = write(textwrap.fill(PROSE, width) + "\n" + textwrap.fill(" ".join(SENTENCES[::-1]), width) + "\n")
    assert sentences_of(read(path)) == [SENTENCES + SENTENCES[::-1]]


def test_capitals_of_a_chapter_heading_stay_out_of_the_sentence_that_follows(write):
    path = write("CHAPTER ONE\nTHE ISLAND\n" + textwrap.fill(PROSE, 60))
    assert sentences_of(read(path)) == [["CHAPTER ONE THE ISLAND", *SENTENCES]]


def test_wikitext_titles_start_documents_and_headings_are_no_sentences(write):
    path = write(f" \n = One = \n \n {PROSE} \n \n = = Part = = \n \n {PROSE} \n \n = Two ( b ) = \n \n {PROSE} \n")
    documents = read(path)
    assert corpus.file_layout(path) == ("title", False)
    assert sentences_of(documents) == [SENTENCES * 2, SENTENCES]
    assert documents[1].text.strip().startswith("= Two")


def test_long_paragraph_lines_without_blank_lines_are_documents(write):
    path = write(f"{PROSE}\n" * 3)
    assert sentences_of(read(path)) == [SENTENCES] * 3


def test_prose_with_blank_lines_is_one_document_a_file(write):
    paths = [write(f"{PROSE}\n\n{PROSE}\n", name) for name in ("a.txt", "b.txt")]
    assert sentences_of(read(*paths)) == [SENTENCES * 2] * 2


@pytest.mark.parametrize(("rule", "count"), [("blank-line", 2), ("file", 1), ("line", 3)])
def test_documents_option_overrules(write, rule, count):
    path = write(f"{PROSE}\n{PROSE}\n\n{PROSE}\n")
    found = sentences_of(read(path, documents=rule))
    assert len(found) == count
    assert sum(found, []) == SENTENCES * 3


def test_newlines_and_byte_order_mark_are_normalised(write):
    text = f"{SENTENCES[0]}\n{SENTENCES[1]}\n\n{SENTENCES[2]}\n"
    plain = read(write(text, "plain/a.txt"))
    for number, end in enumerate(["\r\n", "\r"]):
        assert read(write("\ufeff" + text.replace("\n", end), f"other/{number}.txt")) == plain


# Other inputs


def test_gzip_and_jsonl_give_what_plain_files_give(write):
    path = write(f"{PROSE}\n")
    lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in (PROSE, " ", f"\r\n{PROSE}")) + "\n\n"
    assert read(write(gzip.compress(f"{PROSE}\n".encode()), "a.txt.gz")) == read(path)
    for inputs in (write(lines, "a.jsonl"), write(gzip.compress(lines.encode()), "b.jsonl.gz")):
        assert sentences_of(read(inputs, text_field="body")) == [SENTENCES] * 2


def test_json_escapes_that_are_no_text_do_not_reach_the_tokenizer(write):
    (document,) = read(write('{"text": "a\\u0000b \\ud800 c"}', "a.jsonl"))
    assert document.text == "a b ? c"


def test_resolve_inputs_sorts_and_takes_each_file_once(write, tmp_path):
    names = ["b.txt", "a.txt", "sub/c.jsonl", "sub/d.txt.gz", "picture.png", ".hidden.txt"]
    paths = {name: write("x", name) for name in names}
    everything = sorted(paths[name] for name in names[:4])
    assert corpus.resolve_inputs([str(tmp_path), paths["a.txt"], f"{tmp_path}/*.txt"]) == everything
    assert corpus.resolve_inputs([f"{tmp_path}/**/*.jsonl", "builtin", "tfds:a/b:train"]) == sorted(
        [paths["sub/c.jsonl"], "builtin", "tfds:a/b:train"]
    )


def test_a_file_counts_once_however_it_is_spelt(write, tmp_path, monkeypatch):
    path = write(PROSE, "a.txt")
    os.symlink(path, tmp_path / "b.txt")
    monkeypatch.chdir(tmp_path)
    assert corpus.resolve_inputs([path, "a.txt", "./a.txt", "b.txt", f"{tmp_path}/../{tmp_path.name}/a.txt"]) == [
        "./a.txt"
    ]


def test_what_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "absent", tmp_path / "broken.txt")
    for name in (tmp_path / "pipe", tmp_path):
        assert_fault(["a pipe, a device or a broken link"], str(name))


def test_input_bytes(write):
    path = write(PROSE)
    assert corpus.input_bytes([path]) == len(PROSE)
    assert corpus.input_bytes([path, "builtin"]) is None
    assert corpus.input_bytes([write(gzip.compress(b"x"), "a.txt.gz")]) is None


def test_tfds_examples_are_documents(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_folder)
    expected = [[f"Letter {i} came.", *SENTENCES] for i in range(10)]
    assert sentences_of(read("tfds:tiny/letters:train")) == expected
    assert sentences_of(read("tfds:tiny/letters:1.0.0:train[:40%]")) == expected[:4]


@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("tfds:tiny", "text", ["tfds:NAME/CONFIG:SPLIT"]),
        ("tfds:nosuch:train", "text", ["nosuch", "tensorflow_datasets.load('nosuch')"]),
        ("tfds:imdb_reviews/plain_text:train", "text", ["tensorflow_datasets.load('imdb_reviews", "TFDS_DATA_DIR"]),
        ("tfds:tiny/letters:dev", "text", ["dev", "its splits: train"]),
        ("tfds:tiny/letters:train", "mark", ["'mark'", "--text-field"]),
        ("tfds:tiny/letters:train", "body", ["'body'", "among: ", "mark", "text"]),
    ],
)
def test_tfds_faults(tfds_folder, monkeypatch, name, field, words):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_folder)
    assert_fault([name, *words], name, text_field=field)


def test_damaged_tfds_files_are_told(tfds_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    shutil.copytree(tfds_folder, tmp_path, dirs_exist_ok=True)
    before = tfds.files("tfds:tiny/letters:train")
    assert len(before) >= 3 and all(file.startswith(str(tmp_path)) for file in before)
    record = next(file for file in before if "tfrecord" in file)
    Path(record).write_bytes(b"x" * os.path.getsize(record))
    assert_fault(["tfds:tiny/letters:train", "damaged"], "tfds:tiny/letters:train")
    info = next(file for file in before if file.endswith("dataset_info.json"))
    Path(info).write_text("{")
    assert_fault(["tfds:tiny/letters:train"], "tfds:tiny/letters:train")


# Sentences


def test_sentences_are_single_stripped_lines():
    document = corpus.Document("  One  thing\there.   Another\u00a0one. \n\n\n Last. ", 0, False)
    assert corpus.split_sentences(document) == ["One thing here.", "Another one.", "Last."]


def test_language_rules_and_codes():
    document = corpus.Document("O Sr. João foi. V. Ex.ª sabe disso.", 0, False)
    expected = ["O Sr. João foi.", "V. Ex.ª sabe disso."]
    assert [corpus.split_sentences(document, code) for code in ("pt", "pt-BR", "PT_br")] == [expected] * 3
    assert corpus.split_sentences(corpus.Document("今天很好。我们走吧！", 0, False), "zh") == [
        "今天很好。",
        "我们走吧！",
    ]
    with pytest.raises(ConfigError, match="portuguese"):
        corpus.split_sentences(document, "portuguese")


def test_long_paragraphs_are_cut_between_sentences():
    found = corpus.split_sentences(corpus.Document(" ".join([PROSE] * 200), 0, False))
    assert found == SENTENCES * 200


def test_text_without_any_boundary_is_cut_and_nothing_lost():
    found = corpus.split_sentences(corpus.Document("x" * 35_000, 0, False))
    assert "".join(found) == "x" * 35_000 and max(map(len, found)) <= 10_000


# Streaming


def test_long_documents_come_in_pieces_that_share_their_source(write):
    short, long = f"{PROSE}\n\n", textwrap.fill(" ".join([PROSE] * 8000), 70)
    documents = read(write(short, "a.txt"), write(long, "b.txt"), write(short, "c.txt"))
    assert [document.source for document in documents] == [0, 1, 1, 1, 2]
    assert "".join(document.text for document in documents[1:4]) == long
    assert max(len(document.text) for document in documents) < 1_600_000
    records = write(json.dumps({"text": long}), "d.jsonl")
    assert [document.source for document in read(records)] == [0, 0, 0]
    assert "".join(document.text for document in read(records)) == long


@pytest.mark.parametrize("unit", [f"{PROSE}\n", f"{PROSE} ", "é"], ids=["lines", "one line", "one word"])
def test_memory_does_not_grow_with_the_file(write, unit):
    content = unit.encode() * (30_000_000 // len(unit.encode()))
    path = write(content)
    size = len(content)
    del content
    tracemalloc.start()
    length = sum(len(document.text.encode()) for document in corpus.read_documents([path], documents="file"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == size
    assert peak < 12_000_000


def test_import_is_light():
    code = (
        "import sys, bert_jax.data.corpus; print([m for m in ('jax', 'tensorflow', 'sentencex') if m in sys.modules])"
    )
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Faults


def assert_fault(words, *inputs, **options):
    with pytest.raises(DataError) as caught:
        read(*inputs, **options)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert len(message) < 400 and "\n" not in message


LINES = b"First line.\r\nSecond line.\n"
GZIP = gzip.compress(random.Random(0).randbytes(50_000).hex().encode(), mtime=0)
STORED = gzip.compress(LINES, compresslevel=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["no text"]),
        ("blank.txt", b"\xef\xbb\xbf \n\n\t\r\n", ["no text"]),
        ("latin.txt", LINES + "Ol\xe9!".encode("latin-1"), ["line 3", "not UTF-8", "0xe9", "iconv"]),
        ("late.txt", LINES * 50_000 + b"\xff", ["line 100001", "not UTF-8"]),
        ("nul.txt", LINES + b"a\0b", ["line 3", "NUL", "UTF-16"]),
        ("wide.txt", "text".encode("utf-16"), ["line 1", "not UTF-8"]),
        ("cut.txt.gz", GZIP[:-1000], ["gzip", "truncated"]),
        ("flipped.txt.gz", GZIP[:20_000] + b"\0\0\0\0" + GZIP[20_004:], ["gzip", "corrupt"]),
        # Stored, not deflated: odd text comes out of them, and the fault after it.
        ("garbled.txt.gz", STORED.replace(b"First", b"Firs\xff"), ["gzip", "corrupt"]),
        ("zeros.txt.gz", STORED.replace(b"First", b"Firs\0"), ["gzip", "corrupt"]),
        ("garbled.jsonl.gz", STORED.replace(b"First", b"Worst"), ["gzip", "corrupt"]),
        ("plain.txt.gz", LINES, ["gzip"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ["line 3", "not valid JSON"]),
        ("b.jsonl", b'["a"]\n', ["line 1", "list", "object"]),
        ("c.jsonl", b'{"body": "a", "id": 1}\n', ["line 1", "no field 'text'", "--text-field", "body, id"]),
        ("d.jsonl", b'{"text": "a"}\n{"text": null}\n', ["line 2", "'text'", "NoneType"]),
        ("e.jsonl", b"[" * 100_000, ["line 1", "not valid JSON"]),
        ("folder/picture.png", b"x", ["no text files", ".jsonl.gz"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_name_file_line_and_way_out(write, name, content, words):
    path = write(content, name)
    if name.startswith("folder"):
        path = os.path.dirname(path)
    assert_fault([path, *words], path)


@pytest.mark.parametrize("pattern", ["nosuch.txt", "nosuch*.txt"])
def test_missing_input_is_told_before_reading(tmp_path, pattern):
    with pytest.raises(DataError, match="no such file"):
        corpus.read_documents([str(tmp_path / pattern)])


def test_other_storage_errors_pass_through(write, monkeypatch):
    path = write(PROSE)

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus, "_open", refuse)
    with pytest.raises(PermissionError):
        read(path)
