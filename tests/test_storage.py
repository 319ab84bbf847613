"""Buckets: what is read is fetched once, what is written comes up whole. The bucket is a folder that epath takes for
one.
"""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from etils import epath
from etils.epath import register

import bert_jax
from bert_jax import storage
from bert_jax.config import cache_folder
from bert_jax.data import prepare
from bert_jax.errors import ConfigError, DataError, StorageError
from bert_jax.train import train
from tests.test_train import metrics_of


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind gs://b."""
    root = tmp_path / "bucket"
    root.mkdir()

    def local(first, *rest):
        return epath.Path(os.fspath(first).replace("gs://b", str(root), 1), *rest)

    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "gs://", local)
    forget()
    yield root
    forget()


def forget():
    """As on a machine that never saw the bucket; compiled programs stay."""
    shutil.rmtree(cache_folder() / "remote", ignore_errors=True)


def test_a_folder_is_fetched_once_and_follows_the_bucket(bucket, monkeypatch):
    (bucket / "f" / "deep").mkdir(parents=True)
    (bucket / "f" / "a.txt").write_text("one")
    (bucket / "f" / "deep" / ".b").write_text("two")
    here = storage.fetch("gs://b/f")
    found = {name: path.read_text() for name, path in storage.files(epath.Path(here))}
    assert found == {"a.txt": "one", "deep/.b": "two"}
    copies = []
    monkeypatch.setattr(shutil, "copyfileobj", lambda *args: copies.append(args))
    storage.fetch("gs://b/f")
    assert not copies


def test_what_changes_in_the_bucket_is_fetched_again(bucket):
    (bucket / "f").mkdir()
    (bucket / "f" / "a.txt").write_text("one")
    (bucket / "f" / "b.txt").write_text("two")
    storage.fetch("gs://b/f")
    (bucket / "f" / "a.txt").write_text("other")
    (bucket / "f" / "b.txt").unlink()
    here = storage.fetch("gs://b/f")
    assert {name: path.read_text() for name, path in storage.files(epath.Path(here))} == {"a.txt": "other"}


def test_what_stays_here_is_not_removed(bucket):
    (bucket / "f").mkdir()
    (bucket / "f" / "a.txt").write_text("one")
    here = storage.cached("gs://b/f")
    here.mkdir(parents=True)
    (here / "lock").write_text("")
    (here / "old.txt").write_text("")
    storage.fetch("gs://b/f", leave=frozenset({"lock"}))
    assert sorted(os.listdir(here)) == ["a.txt", "lock"]


def test_globs_and_folders_name_files(bucket):
    for name in ("x/a.txt", "x/b.txt", "x/c.json", "x/y/d.txt"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text(name)

    def names(pattern):
        return [os.path.relpath(path, bucket) for path in storage.expand(pattern)]

    assert names("gs://b/x/*.txt") == ["x/a.txt", "x/b.txt"]
    assert names("gs://b/*/y/d.txt") == ["x/y/d.txt"]
    assert names("gs://b/x/c.json") == ["x/c.json"]
    assert len(names("gs://b/x")) == 4
    assert names("gs://b/none") == []


def test_no_path_leaves_the_cache():
    with pytest.raises(ConfigError, match=r"'\.\.'"):
        storage.cached("gs://b/../../etc")


def test_what_is_not_there_and_what_fails_is_one_line(bucket, monkeypatch):
    with pytest.raises(StorageError, match="gs://b/none: no such file"):
        storage.fetch("gs://b/none")

    def broken(path):
        raise RuntimeError("401 Unauthorized\nplease log in")

    monkeypatch.setattr(storage, "place", broken)
    with pytest.raises(StorageError, match=r"gs://b/x: the bucket .*401 Unauthorized please log in"):
        storage.fetch("gs://b/x")


def test_rows_of_a_bucket_are_those_of_a_file(bucket, corpus, tokenizer_folder, tmp_path, capsys):
    (bucket / "text").mkdir()
    lines = corpus.read_text().split("\n\n")
    for number in range(3):
        (bucket / "text" / f"{number}.txt").write_text("\n\n".join(lines[number::3]))
    shutil.copytree(tokenizer_folder, bucket / "t")
    common = ["--max-seq-len", "64", "--workers", "1", "--documents", "blank-line"]
    local = ["--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "p")]
    prepare.main(["--input", f"{bucket}/text/*.txt", *local, *common])
    remote = ["--tokenizer", "gs://b/t", "--output", "gs://b/p"]
    for part in ("1/2", "2/2"):
        prepare.main(["--input", "gs://b/text/*.txt", "--part", part, *remote, *common])
    assert not (bucket / "p").exists()
    finished = bucket / "p.parts" / "00001-of-00002" / "tokens"
    written = finished.stat().st_mtime_ns
    forget()
    beside = prepare.parts_folder(storage.cached("gs://b/p")) / "00002-of-00002.partial-another-1"
    beside.mkdir(parents=True)  # of a process on this machine that is at work
    prepare.main(["--input", "gs://b/text/*.txt", "--part", "1/2", *remote, *common])
    assert "is there already" in capsys.readouterr().err and finished.stat().st_mtime_ns == written
    assert beside.is_dir() and sorted(os.listdir(bucket / "p.parts")) == ["00001-of-00002", "00002-of-00002"]
    prepare.main(["--merge", *remote, *common])
    for file in (tmp_path / "p").iterdir():
        if file.is_file() and file.name != prepare.MANIFEST:
            assert file.read_bytes() == (bucket / "p" / file.name).read_bytes()
    assert not (bucket / "p.parts").exists()
    with pytest.raises(ConfigError, match="gs://b/p is there already"):
        prepare.main(["--input", "gs://b/text/*.txt", *remote, *common])
    with pytest.raises(DataError, match="no such file"):
        prepare.main(["--input", "gs://b/none*", "--tokenizer", "gs://b/t", "--output", "gs://b/q", *common])


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics_of(workdir) if "loss" in row}


def test_a_run_goes_on_from_a_bucket_on_a_machine_that_never_saw_it(bucket, small_config, tmp_path):
    shutil.copytree(small_config.data.path, bucket / "rows")
    constant = dataclasses.replace(small_config.optimizer, schedule="constant")
    whole = dataclasses.replace(small_config, optimizer=constant)
    config = dataclasses.replace(whole, data=dataclasses.replace(whole.data, path="gs://b/rows"))
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=10))
    assert train(whole, str(tmp_path / "whole")) == 0
    assert train(half, "gs://b/w") == 0
    forget()
    assert train(config, "gs://b/w") == 0
    assert losses(bucket / "w") == losses(tmp_path / "whole")
    assert json.loads((bucket / "w" / "results.json").read_text())["step"] == 20
    assert sorted(os.listdir(bucket / "w" / "checkpoints")) == ["10", "20"]
    forget()
    wanted = bert_jax.load(str(tmp_path / "whole")).embed(["the lamp was burning"])
    for path in ("gs://b/w", "gs://b/w/checkpoints/20", "gs://b/w/model"):
        np.testing.assert_array_equal(bert_jax.load(path).embed(["the lamp was burning"]), wanted)
