"""Batches: pure functions of (rows, seed, step), the same for any number of hosts, every row once an epoch."""

import functools

import numpy as np
import pytest

from bert_jax.config import DataConfig
from bert_jax.data import pipeline
from bert_jax.data.prepare import load_manifest
from bert_jax.errors import DataError
from tests.conftest import SEQ_LEN

BATCH = 16


@pytest.fixture(scope="module")
def source(prepared, tokenizer):
    manifest = load_manifest(prepared)
    return {
        "rows": pipeline.open_rows(prepared, manifest, "train"),
        "vocabulary": pipeline.masking_vocabulary(tokenizer, whole_words=False),
        "data": DataConfig(path=str(prepared), max_seq_len=SEQ_LEN, seed=5),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4096, 4097])
def test_permutation_visits_everything_once(size):
    for key in (0, 7):
        assert sorted(pipeline.permute(np.arange(size), size, key)) == list(range(size))


def test_permutations_differ_and_mix():
    first, second = (pipeline.permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.05


def test_an_epoch_is_every_row_once_even_when_batches_straddle_it():
    rows, epochs = 37, 4
    numbers = np.concatenate([pipeline.row_numbers(step, 10, rows, seed=1) for step in range(15)])[: rows * epochs]
    orders = numbers.reshape(epochs, rows)
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_feed_the_same_global_batch(source, hosts):
    whole = pipeline.train_batch(batch_size=BATCH, step=11, **source)
    shares = np.split(np.arange(BATCH), hosts)
    parts = [pipeline.train_batch(batch_size=BATCH, step=11, share=share, **source) for share in shares]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array), name
    scattered = np.array([1, 2, 5])  # of a host whose devices are not neighbours in the mesh
    for name, array in pipeline.train_batch(batch_size=BATCH, step=11, share=scattered, **source).items():
        assert np.array_equal(array, whole[name][scattered]), name


def test_a_batch_needs_no_history(source):
    make = functools.partial(pipeline.train_batch, batch_size=BATCH, **source)
    streamed = list(pipeline.stream(lambda step: make(step=step), 3, 7))
    assert len(streamed) == 4
    for step, batch in enumerate(streamed, 3):
        for name, array in make(step=step).items():
            assert batch[name].dtype == array.dtype
            assert np.array_equal(batch[name], array), name


def test_two_epochs_mask_the_same_row_differently(source):
    rows = len(source["rows"])
    orders = {}
    for step in range(2 * rows // BATCH + 1):
        batch = pipeline.train_batch(batch_size=BATCH, step=step, **source)
        for number, ids, weights, positions in zip(
            pipeline.row_numbers(step, BATCH, rows, 5),
            batch["segment_ids"],
            batch["masked_lm_weights"],
            batch["masked_lm_positions"],
            strict=True,
        ):
            orders.setdefault(number, []).append(tuple(positions[weights > 0]))
            assert ids.any()
    twice = [found for found in orders.values() if len(found) >= 2]
    assert len(twice) > 0.9 * rows
    assert np.mean([found[0] == found[1] for found in twice]) < 0.02


def test_evaluation_is_the_same_each_time_and_covers_every_row_once(prepared, source):
    rows = pipeline.open_rows(prepared, load_manifest(prepared), "eval")
    arguments = {**source, "rows": rows, "batch_size": BATCH}
    first, second = (list(pipeline.eval_batches(**arguments)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name])
    examples = sum(batch["next_sentence_weights"].sum() for batch in first)
    assert examples == load_manifest(prepared)["splits"]["eval"]["examples"]
    shares = np.split(np.arange(BATCH), 2)
    halves = [list(pipeline.eval_batches(share=share, **arguments)) for share in shares]
    for whole, *parts in zip(first, *halves, strict=True):
        for name in whole:
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert len(list(pipeline.eval_batches(limit=1, **arguments))) == 1


def test_packed_rows_are_what_the_model_expects(source, tokenizer):
    batch = pipeline.train_batch(batch_size=BATCH, step=0, **source)
    assert batch["input_ids"].max() < tokenizer.vocab_size
    starts = batch["position_ids"] == 0
    cls = np.take_along_axis(batch["input_ids"], batch["next_sentence_positions"], 1)
    assert (cls[batch["next_sentence_weights"] > 0] == tokenizer.cls_id).all()
    real = batch["segment_ids"] > 0
    assert (starts & real).sum() == batch["next_sentence_weights"].sum()
    assert (batch["input_ids"][~real] == tokenizer.pad_id).all()


def test_a_damaged_row_file_is_named(tmp_path, prepared):
    import shutil

    folder = tmp_path / "rows"
    shutil.copytree(prepared, folder)
    file = next(folder.glob("train-*"))
    content = bytearray(file.read_bytes())
    content[200:5000] = b"\xff" * 4800
    file.write_bytes(content)
    rows = pipeline.open_rows(folder, load_manifest(folder), "train")
    with pytest.raises(DataError, match=file.name):
        rows.read(np.arange(20))


def test_an_error_in_the_pipeline_keeps_its_kind():
    def make(step):
        if step == 2:
            raise DataError("row 2 is bad")
        return {"x": np.zeros(3, np.float32)}

    with pytest.raises(DataError, match="row 2 is bad"):
        list(pipeline.stream(make, 0, 4))
