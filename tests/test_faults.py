"""What users get wrong, through the real commands: one line on stderr, the exit code of its kind, nothing left over."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICKLY

ROOT = Path(__file__).parent.parent
PROSE = "The first sentence is here. The second follows it.\nA third one ends the document.\n"
TWO = (PROSE * 30 + "\n" + "Another document begins. It has words as well.\n" * 30).encode()


def run(*words, timeout=60, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "XLA_FLAGS": QUICKLY, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def prepare(tmp_path, tokenizer_folder, text: bytes | None, name="text.txt", *more, timeout=60):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    return run(
        "bert_jax.data.prepare",
        "--input",
        tmp_path / name,
        "--tokenizer",
        tokenizer_folder,
        "--output",
        tmp_path / "rows",
        "--max-seq-len",
        "64",
        "--workers",
        "1",
        "--documents",
        "blank-line",
        *more,
        timeout=timeout,
    )


def assert_one_line(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("tokenise:", "write rows:"))]
    assert len(lines) == 1 and lines[0].startswith("bert_jax: error: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert not done.stdout


BAD_TEXTS = {
    "empty": (b"", "text.txt"),
    "only blanks": (b"\n \n\n", "text.txt"),
    "latin-1": (TWO + "São Paulo.\n".encode("latin-1"), "line"),
    "UTF-16": (TWO.decode().encode("utf-16"), "text.txt"),
    "NUL": (TWO + b"a\0b\n", "NUL"),
    "one document": (PROSE.encode(), "document"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_text(tmp_path, tokenizer_folder, name):
    text, word = BAD_TEXTS[name]
    assert_one_line(prepare(tmp_path, tokenizer_folder, text), 6, word)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


GOOD_TEXTS = {
    "CRLF": TWO.replace(b"\n", b"\r\n"),
    "BOM": b"\xef\xbb\xbf" + TWO,
    "one long line": TWO.replace(b"\n\n", b"\f").replace(b"\n", b" ").replace(b"\f", b"\n\n") + b"word " * 300_000,
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
def test_odd_but_sound_text(tmp_path, tokenizer_folder, name):
    done = prepare(tmp_path, tokenizer_folder, GOOD_TEXTS[name])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows" / "manifest.json").is_file()


def test_one_line_of_a_hundred_megabytes(tmp_path, tokenizer_folder):
    sentence = "The function returns a value that nobody has asked for. "
    text = TWO + b"\n" + (sentence * (100_000_000 // len(sentence))).encode() + b"\n"
    done = prepare(tmp_path, tokenizer_folder, text, timeout=600)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    assert tokens > 100_000_000 // len(sentence) * 10  # a piece a word at least: nothing of the line is lost


def test_missing_and_truncated_inputs(tmp_path, tokenizer_folder):
    assert_one_line(prepare(tmp_path, tokenizer_folder, None, "absent-*.txt"), 6, "absent-*.txt")
    cut = gzip.compress(TWO * 50)[:-40]
    assert_one_line(prepare(tmp_path, tokenizer_folder, cut, "text.txt.gz"), 6, "text.txt.gz")
    assert_one_line(prepare(tmp_path, tokenizer_folder, b'{"text": 3}\n', "t.jsonl"), 6, "t.jsonl", "line 1")


def test_bad_vocabularies(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n")
    switches = ("--lowercase", "--strip-accents")
    assert_one_line(prepare(tmp_path, vocabulary, TWO, "text.txt", *switches), 6, "vocab.txt", "[MASK]")
    assert_one_line(prepare(tmp_path, tmp_path / "absent", TWO, "text.txt", *switches), 6, "absent")


def train(tmp_path, *more):
    return run("bert_jax.train", "--config", "configs/tiny.py", "--workdir", tmp_path / "run", *more)


WRONG_SETTINGS = {
    "unknown key": (("--model.num-layer", "3"), "did you mean --model.num-layers"),
    "not a number": (("--model.num-layers", "many"), "num-layers"),
    "rows longer than positions": (("--data.max-seq-len", "1024"), "model.max_position_embeddings"),
    "heads": (("--model.num-heads", "3"), "model.num_heads"),
    "micro-batches": (("--optimizer.accumulate", "3"), "optimizer.accumulate"),
    "mesh": (("--mesh.fsdp", "2"), "--mesh.data"),
    "no such config": (("--config", "configs/tinny.py"), "configs/tinny.py"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings(tmp_path, name):
    flags, word = WRONG_SETTINGS[name]
    assert_one_line(train(tmp_path, *flags), 2, word)
    assert not (tmp_path / "run").exists()


def test_vocabulary_and_model_that_differ(tmp_path, prepared):
    done = train(tmp_path, "--data.path", prepared, "--data.max-seq-len", "64")
    assert_one_line(done, 2, "model.vocab_size: 30522", "--model.vocab-size")


def test_missing_text_weights_and_checkpoints(tmp_path):
    assert_one_line(train(tmp_path, "--data.path", "absent.txt"), 6, "absent.txt")
    assert_one_line(train(tmp_path, "--train.init-from", tmp_path / "absent"), 4, "absent")
    assert_one_line(train(tmp_path, "--resume", "must"), 4, "--resume must")


def test_storage_that_cannot_be_written(tmp_path, prepared, tokenizer):
    (tmp_path / "run").write_text("a file, not a folder")
    flags = ("--data.path", prepared, "--data.max-seq-len", "64", "--model.vocab-size", tokenizer.vocab_size)
    assert_one_line(train(tmp_path, *flags), 5, "run")


def test_debug_shows_the_traceback(tmp_path):
    done = train(tmp_path, "--model.num-heads", "3", "--debug")
    assert "Traceback" in done.stderr and done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("bert_jax: error: model.num_heads")
