"""Raw text in `data.path`: prepared once, found again, made anew when text or settings change."""

import dataclasses
import shutil

import pytest

from bert_jax.config import DataConfig
from bert_jax.data import cache, prepare
from bert_jax.errors import DataError


@pytest.fixture
def text(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("BERT_JAX_CACHE", str(tmp_path / "cache"))
    lines = corpus.read_text(encoding="utf-8").split("\n\n")[:40]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def test_prepared_once_and_found_again(text, capsys):
    data = DataConfig(path=str(text), max_seq_len=64, documents="blank-line", workers=1)
    folder = cache.prepared_folder(data, 400)
    assert "preparing" in capsys.readouterr().err
    manifest = prepare.load_manifest(folder)
    assert manifest["vocab_size"] == 400 and manifest["settings"]["max_seq_len"] == 64
    assert cache.prepared_folder(data, 400) == folder
    assert not capsys.readouterr().err
    assert cache.prepared_folder(dataclasses.replace(data, path=folder), 1) == folder
    assert cache.prepared_folder(dataclasses.replace(data, seed=1), 400) != folder
    text.write_text(text.read_text(encoding="utf-8") + "\n\nOne more document is here.\n", encoding="utf-8")
    assert cache.prepared_folder(data, 400) != folder


def test_a_tokenizer_of_one_s_own_is_used(text, tokenizer_folder, tokenizer):
    data = DataConfig(
        path=str(text), max_seq_len=64, documents="blank-line", workers=1, tokenizer=str(tokenizer_folder)
    )
    assert prepare.load_manifest(cache.prepared_folder(data, 30522))["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_a_run_that_finishes_at_the_same_time_is_no_fault(text, monkeypatch):
    data = DataConfig(path=str(text), max_seq_len=64, documents="blank-line", workers=1)
    folder = cache.prepared_folder(data, 400)
    shutil.move(folder, f"{folder}.aside")
    real = prepare.prepare

    def meanwhile(inputs, output, **more):
        shutil.copytree(f"{folder}.aside", folder)
        return real(inputs, output, **more)

    monkeypatch.setattr(prepare, "prepare", meanwhile)
    assert cache.prepared_folder(data, 400) == folder


def test_missing_text_is_told(text):
    with pytest.raises(DataError, match="absent"):
        cache.prepared_folder(DataConfig(path="absent-*.txt"), 400)
