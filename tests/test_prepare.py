"""Text to rows: same bytes on any number of workers, whole or not at all, and every fault in one line."""

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from bert_jax.config import DataConfig
from bert_jax.data import prepare as module
from bert_jax.data.packing import unpack_rows
from bert_jax.data.prepare import inspect, load_manifest, main, prepare, read_records, verify
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.errors import BertJaxError, ConfigError, DataError, StorageError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DOCUMENTS, WORDS = 120, 20
DATA = DataConfig(max_seq_len=64, workers=1, documents="blank-line")


def word(document, number):
    """Every document has words of its own, so that a token tells where it is from."""
    letters = "abcdefghij"
    return "".join(letters[int(digit)] for digit in f"{document:03d}{number:02d}")


def write_text(path, documents=DOCUMENTS, sentences=30):
    rng = Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for document in range(documents):
            for _ in range(1 + int(rng.random() * 2 * sentences)):
                words = [word(document, int(rng.random() * WORDS)) for _ in range(1 + int(rng.random() * 24))]
                file.write(" ".join(words) + "\n")
            file.write("\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder / "text.txt")
    words = [word(document, number) for document in range(DOCUMENTS) for number in range(WORDS)]
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus / "vocab.txt")


def build(corpus, output, tokenizer, **settings):
    data = replace(DATA, **settings)
    return prepare([str(corpus / "text.txt")], output, tokenizer=tokenizer, data=data, report=False)


@pytest.fixture(scope="module")
def prepared(corpus, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "P"
    build(corpus, output, tokenizer)
    return output


def all_records(folder, split):
    manifest = load_manifest(folder)
    return np.concatenate([read_records(folder, manifest, file["name"]) for file in manifest["splits"][split]["files"]])


def examples_of(records):
    """(A ids, B ids, is_random_next) of every example, read back from the rows."""
    batch = unpack_rows(records)
    for ids, types, segments, labels in zip(
        *(batch[name] for name in ("input_ids", "token_type_ids", "segment_ids", "next_sentence_labels")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            a, b = ids[(segments == segment) & (types == 0)], ids[(segments == segment) & (types == 1)]
            assert (a[0], a[-1], b[-1]) == (2, 3, 3)
            yield a[1:-1], b[:-1], bool(labels[segment - 1])


def content(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def leftovers(folder):
    return [path.name for path in Path(folder).iterdir() if "partial" in path.name]


def test_same_bytes_for_any_number_of_workers(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_CHARS", 20_000)
    monkeypatch.setattr(module, "_UNIT_TOKENS", 10_000)
    for workers in (1, 2, 3):
        build(corpus, tmp_path / str(workers), tokenizer, workers=workers, dupe_factor=2)
    expected = content(tmp_path / "1")
    assert content(tmp_path / "2") == expected and content(tmp_path / "3") == expected
    assert len([name for name in expected if name.startswith("train")]) >= 6
    monkeypatch.setattr(module, "_GROUP_CHARS", 3_000)
    build(corpus, tmp_path / "4", tokenizer, dupe_factor=2)
    assert content(tmp_path / "4") == expected


@pytest.fixture(scope="module")
def files(corpus, tmp_path_factory):
    """The text in seven files of unlike size, one of them blank, cut between documents."""
    folder = tmp_path_factory.mktemp("files")
    documents = (corpus / "text.txt").read_text(encoding="utf-8").split("\n\n")
    cuts = [0, 3, 50, 50, 51, 80, 119, len(documents)]
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        (folder / f"{number}.txt").write_text("\n\n".join(documents[first:last]) + "\n\n", encoding="utf-8")
    return folder


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_parts_make_the_same_bytes(files, tokenizer, tmp_path, count):
    settings = {"tokenizer": tokenizer, "data": DATA, "report": False}
    prepare([str(files)], tmp_path / "whole", **settings)
    output = tmp_path / "P"
    numbers = list(range(1, count + 1))
    Random(0).shuffle(numbers)  # in any order
    for number in numbers:
        module.prepare_part([str(files)], output, (number, count), **settings)
    module.merge(output, **settings)
    assert everything(output) == everything(tmp_path / "whole")
    assert not module.parts_folder(output).exists()


def test_a_killed_part_is_in_nobody_s_way(files, tokenizer, tmp_path):
    """What a dead run left is removed by the next one on its host, and is no part to `merge`."""
    output, settings = tmp_path / "P", {"tokenizer": tokenizer, "data": DATA, "report": False}
    here, elsewhere = (f"00002-of-00002.partial-{host}-4194305" for host in (socket.gethostname(), "another"))
    for name in (here, elsewhere):
        (tmp_path / "P.parts" / name).mkdir(parents=True)
    for number in (1, 2):
        module.prepare_part([str(files)], output, (number, 2), **settings)
    assert not (tmp_path / "P.parts" / here).exists()
    assert module.merge(output, **settings)["splits"]


def test_a_part_that_lost_some_of_its_text_is_refused(files, tokenizer, tmp_path):
    output, settings = tmp_path / "P", {"tokenizer": tokenizer, "data": DATA, "report": False}
    for number in (1, 2):
        folder = module.prepare_part([str(files)], output, (number, 2), **settings)
    os.truncate(folder / "tokens", (folder / "tokens").stat().st_size - 2)
    with pytest.raises(DataError, match="00002-of-00002/tokens: not the .* bytes that were written; remove"):
        module.merge(output, **settings)


def test_a_part_is_made_once_and_its_faults_are_told(files, tokenizer, tmp_path, capsys):
    output, settings = tmp_path / "P", {"tokenizer": tokenizer, "data": DATA, "report": False}
    with pytest.raises(DataError, match="no parts"):
        module.merge(output, **settings)
    first = module.prepare_part([str(files)], output, (1, 2), **settings)
    before = (first / "part.json").stat().st_mtime_ns
    module.prepare_part([str(files)], output, (1, 2), **settings)
    assert (first / "part.json").stat().st_mtime_ns == before and "is there already" in capsys.readouterr().err
    with pytest.raises(DataError, match="00002-of-00002 missing"):
        module.merge(output, **settings)
    with pytest.raises(ConfigError, match="other files or with other settings"):
        module.prepare_part([str(files)], output, (1, 2), **settings | {"data": replace(DATA, seed=1)})
    module.prepare_part([str(files)], output, (2, 2), **settings)
    with pytest.raises(ConfigError, match="give the same again"):
        module.merge(output, **settings | {"data": replace(DATA, seed=1)})
    (first / "part.json").write_text("{}")
    with pytest.raises(DataError, match=r"part\.json: damaged"):
        module.merge(output, **settings)
    assert not output.exists()


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "a/b", "1/0", "-1/2"])
def test_a_part_is_one_of_some(corpus, tmp_path, text):
    words = ["--input", str(corpus / "text.txt"), "--tokenizer", str(corpus / "vocab.txt")]
    with pytest.raises(ConfigError, match="--part"):
        main([*words, "--output", str(tmp_path / "P"), f"--part={text}"])


def test_rows_of_this_text_are_known(prepared):
    """A change of these digests means that every user's prepared rows change: raise FORMAT_VERSION."""
    digests = [hashlib.sha256(all_records(prepared, split).tobytes()).hexdigest()[:16] for split in ("train", "eval")]
    assert digests == ["060e628658c4569c", "a156a5ca718416d9"]


def test_seed_changes_rows(corpus, tokenizer, prepared, tmp_path):
    build(corpus, tmp_path / "P", tokenizer, seed=1)
    assert not np.array_equal(all_records(tmp_path / "P", "eval"), all_records(prepared, "eval"))


def test_next_sentences_and_splits(prepared):
    sources, random_next = {"train": set(), "eval": set()}, {"train": [], "eval": []}
    for split in sources:
        for a, b, is_random_next in examples_of(all_records(prepared, split)):
            from_a, from_b = set((a - 5) // WORDS), set((b - 5) // WORDS)
            assert len(from_a) == len(from_b) == 1
            assert (from_a != from_b) == is_random_next
            sources[split] |= from_a | from_b
            random_next[split].append(is_random_next)
            assert len(a) + len(b) + 3 <= 64
    assert not sources["train"] & sources["eval"]
    assert len(sources["eval"]) == 2 and len(sources["train"]) == DOCUMENTS - 2
    assert abs(np.mean(random_next["train"]) - 0.5) < 0.01


def test_manifest_tells_the_truth(prepared, tokenizer):
    manifest = load_manifest(prepared)
    assert (manifest["vocab_size"], manifest["tokenizer_fingerprint"]) == (tokenizer.vocab_size, tokenizer.fingerprint)
    assert load_tokenizer(prepared / "tokenizer").fingerprint == tokenizer.fingerprint
    assert manifest["settings"]["max_examples"] == 4 and "workers" not in manifest["settings"]
    splits = manifest["splits"]
    for name in ("documents", "sentences", "tokens"):
        assert splits["train"][name] + splits["eval"][name] == manifest["corpus"][name]
    for split in ("train", "eval"):
        records, told = all_records(prepared, split), splits[split]
        examples = list(examples_of(records))
        assert (told["rows"], told["examples"]) == (len(records), len(examples))
        assert told["fill_rate"] == pytest.approx((records["input_ids"] != 0).mean(), abs=1e-6)
        assert told["random_next_share"] == pytest.approx(np.mean([e[2] for e in examples]), abs=1e-6)
    assert splits["train"]["fill_rate"] > 0.95
    verify(prepared)


def test_without_packing_one_example_a_row(corpus, tokenizer, prepared, tmp_path):
    manifest = build(corpus, tmp_path / "P", tokenizer, pack=False)
    train = manifest["splits"]["train"]
    assert train["examples"] == train["rows"] == load_manifest(prepared)["splits"]["train"]["examples"]
    key = [sorted((tuple(a), tuple(b), n) for a, b, n in examples_of(all_records(p, "train"))) for p in
           (tmp_path / "P", prepared)]  # fmt: skip
    assert key[0] == key[1]  # the same examples, packed or not


def test_dupe_factor_repeats_text_with_other_choices(corpus, tokenizer, prepared, tmp_path):
    manifest, once = build(corpus, tmp_path / "P", tokenizer, dupe_factor=2), load_manifest(prepared)
    train = manifest["splits"]["train"]
    assert train["tokens"] == once["splits"]["train"]["tokens"] and len(train["files"]) == 2
    assert train["files"][0] == once["splits"]["train"]["files"][0] | {"name": train["files"][0]["name"]}
    assert train["files"][0]["sha256"] != train["files"][1]["sha256"]
    assert manifest["splits"]["eval"] == once["splits"]["eval"]


def test_two_documents_at_least(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(f"{word(0, 1)} {word(0, 2)}\n{word(0, 3)}\n\n\u200b\n", encoding="utf-8")
    with pytest.raises(DataError, match="two documents at least.*--documents") as error:
        build(tmp_path, tmp_path / "P", tokenizer)
    assert error.value.exit_code == 6 and sorted(os.listdir(tmp_path)) == ["text.txt"]


def test_few_documents_hold_nothing_out(tmp_path, tokenizer):
    write_text(tmp_path / "text.txt", documents=3)
    manifest = build(tmp_path, tmp_path / "P", tokenizer)
    assert manifest["splits"]["eval"]["rows"] == 0 and "fewer than four" in inspect(tmp_path / "P")


def test_documents_of_one_sentence_are_told(tmp_path, tokenizer):
    text = "\n\n".join(f"{word(number % DOCUMENTS, 1)} {word(number % DOCUMENTS, 2)}" for number in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    manifest = build(tmp_path, tmp_path / "P", tokenizer)
    assert manifest["splits"]["train"]["random_next_share"] == 1.0
    assert "no true next sentence" in module.describe(manifest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_len": 7}, "data.max_seq_len"),
        ({"short_seq_prob": 1.5}, "data.short_seq_prob"),
        ({"dupe_factor": 0}, "data.dupe_factor"),
        ({"workers": -1}, "data.workers"),
    ],
)
def test_wrong_settings(corpus, tokenizer, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(corpus, tmp_path / "P", tokenizer, **settings)


def test_output_is_never_overwritten(corpus, tokenizer, prepared, tmp_path):
    before = content(prepared)
    with pytest.raises(ConfigError, match="is there already; remove it"):
        build(corpus, prepared, tokenizer)
    assert content(prepared) == before
    (tmp_path / "empty").mkdir()
    build(corpus, tmp_path / "empty", tokenizer)
    verify(tmp_path / "empty")


def corrupt(prepared, folder):
    for name, data in content(prepared).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return next(folder.glob("train-*"))


def test_faults_of_a_prepared_folder(prepared, tmp_path):
    with pytest.raises(DataError, match="no prepared rows"):
        load_manifest(tmp_path)
    shard = corrupt(prepared, tmp_path)
    good = shard.read_bytes()
    shard.write_bytes(good[:-100])
    with pytest.raises(DataError, match=f"{shard.name}: {len(good) - 100} bytes instead of {len(good)}"):
        load_manifest(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: missing"):
        load_manifest(tmp_path)
    shard.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    load_manifest(tmp_path)
    with pytest.raises(DataError, match=f"{shard.name}: content has changed"):
        verify(tmp_path)


def test_faults_of_a_manifest(prepared, tmp_path):
    corrupt(prepared, tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for text, message in [
        (path.read_text()[:-10], "not readable"),
        (json.dumps({"rows": 1}), "not a manifest of bert_jax"),
        (json.dumps(manifest | {"format_version": 99}), "format version 99, this program reads 2"),
        (json.dumps(manifest | {"vocab_size": 7}), "not what was written"),
        (json.dumps({key: value for key, value in manifest.items() if key != "splits"}), "not what was written"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_manifest(tmp_path)


class Deadly:
    """Stands for a tokenizer whose process is killed, as by a machine out of memory."""

    vocab_size = 100

    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_an_error_and_leaves_nothing(corpus, tmp_path):
    with pytest.raises(BertJaxError, match="worker process was killed.*fewer --workers"):
        build(corpus, tmp_path / "P", Deadly(), workers=2)
    assert os.listdir(tmp_path) == []


def test_full_disk_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        module.write_records(tmp_path / "missing" / "rows", np.zeros(3, "<u2"))


def loaded_modules(context, task):
    return [name for name in ("jax", "tensorflow") if name in sys.modules] + [os.environ["TOKENIZERS_PARALLELISM"]]


def test_workers_load_neither_jax_nor_tensorflow(tokenizer, tmp_path):
    context = module.Context(tokenizer, replace(DATA, workers=2), tmp_path)
    with module._worker_map(context) as worker_map:
        assert list(worker_map(loaded_modules, range(3))) == [["false"]] * 3


def command(*words):
    return [sys.executable, "-W", "error", "-m", "bert_jax.data.prepare", *map(str, words)]


def start_and_interrupt(corpus, folder, number):
    """Starts a run with two workers and sends it a signal in the middle."""
    text = folder.with_suffix(".txt")  # so long that the signal comes in the middle
    text.write_bytes((corpus / "text.txt").read_bytes() * 100)
    arguments = ("--input", text, "--tokenizer", corpus / "vocab.txt", "--output", folder / "P")
    run = subprocess.Popen(command(*arguments, "--workers", 2), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 20
    while not leftovers(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert leftovers(folder) and run.poll() is None
    time.sleep(0.2)
    os.kill(run.pid, number) if number == signal.SIGKILL else os.killpg(run.pid, number)
    return run.communicate(timeout=20)[1].decode(), run


def test_killed_run_leaves_nothing_that_looks_finished(corpus, tokenizer, tmp_path):
    _, run = start_and_interrupt(corpus, tmp_path, signal.SIGKILL)  # its workers end too, else stderr stays open
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "P").exists() and len(leftovers(tmp_path)) == 1
    build(corpus, tmp_path / "P", tokenizer)
    verify(tmp_path / "P")
    assert leftovers(tmp_path) == []


def test_interrupted_run_cleans_up(corpus, tmp_path):
    stderr, run = start_and_interrupt(corpus, tmp_path, signal.SIGINT)
    assert run.returncode == 130 and "Traceback" not in stderr
    assert os.listdir(tmp_path) == []


def test_command(corpus, prepared, tmp_path, capsys):
    words = ["--input", str(corpus / "text.txt"), "--tokenizer", str(corpus / "vocab.txt")]
    output = str(tmp_path / "P")
    assert main([*words, "--output", output, "--max_seq_len=64", "--workers", "1", "--documents", "blank-line"]) == 0
    assert "fill rate" in capsys.readouterr().out
    assert content(output) == content(prepared)
    assert main(["--inspect", output]) == 0
    shown = capsys.readouterr().out
    assert "118 documents" in shown and "A: " in shown and "true next" in shown and "random next" in shown
    for wrong, message in [
        (words, "--output is missing"),
        ([*words, "--output", output], "is there already"),
        (["--seed", "x"], "invalid int value"),
        (["--no-such-flag"], "unrecognized"),
    ]:
        with pytest.raises(ConfigError, match=message):
            main(wrong)


def test_help_is_quick_and_light():
    code = "import sys; from bert_jax.data.prepare import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('jax', 'tensorflow', 'tokenizers', 'array_record') if name in sys.modules])"
    began = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - began < 2 and shown.endswith("[]\n")
    assert "--max-seq-len" in shown and "--no-pack" in shown
