"""Prediction: masks filled, texts labelled, in order and whatever the batch; bad input in one line."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import bert_jax
from bert_jax import convert, predict
from bert_jax.config import TaskConfig
from bert_jax.errors import CheckpointError, ConfigError, DataError
from bert_jax.tasks import classify, encode, pretrain


@pytest.fixture(scope="module")
def model(small_config, tokenizer, tmp_path_factory):
    """A model directory with all heads, far from zero weights."""
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    params = pretrain.init(config, jax.random.key(0)) | classify.init(config, 2, jax.random.key(1))
    folder = tmp_path_factory.mktemp("model") / "m"
    convert.save_model(str(folder), jax.device_get(params), config, tokenizer, labels=("no", "yes"))
    return str(folder)


@pytest.fixture(scope="module")
def bert(model):
    return bert_jax.load(model)


def test_fill_mask_ranks_pieces_for_each_mask(bert):
    found = bert.fill_mask("the [MASK] returns a [MASK] value", top=7)
    assert len(found) == 2 and all(len(pieces) == 7 for pieces in found)
    for pieces in found:
        probabilities = [piece["probability"] for piece in pieces]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
        assert all(bert.tokenizer.token_to_id(piece["token"]) == piece["id"] for piece in pieces)
    assert "returns a" in found[0][0]["text"]


def test_fill_mask_is_the_head_on_that_position(bert):
    text = "the [MASK] returns"
    ids = np.array([bert.tokenizer.encode(text).ids])
    zeros, ones = np.zeros_like(ids), np.ones_like(ids)
    batch = {
        "input_ids": ids,
        "token_type_ids": zeros,
        "position_ids": np.arange(ids.shape[1])[None],
        "segment_ids": ones,
    }
    hidden = encode(bert.config, bert.params, batch, None)
    place = int(np.flatnonzero(ids[0] == bert.tokenizer.mask_id)[0])
    logits = pretrain.masked_lm_logits(bert.config, bert.params, hidden)[0, place]
    best = bert.fill_mask(text, top=1)[0][0]
    assert best["id"] == int(np.argmax(logits))
    assert best["probability"] == pytest.approx(float(jax.nn.softmax(logits).max()), abs=1e-5)


def test_classify_keeps_order_and_does_not_depend_on_the_batch(bert):
    texts = [f"value {'of the function ' * (n % 7)}{n}" for n in range(70)] + [("a pair", "of texts")]
    together = bert.classify(texts)
    assert len(together) == 71
    for text, found in list(zip(texts, together, strict=True))[::23] + [(texts[-1], together[-1])]:
        alone = bert.classify([text])[0]
        assert alone["label"] == found["label"]
        assert alone["probability"] == pytest.approx(found["probability"], abs=1e-4)
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert bert.classify([]) == []


def test_commands_print_json_lines(model, tmp_path, capsys):
    assert predict.main(["fill-mask", "--model", model, "--text", "a [MASK] value", "--top", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and lines[0]["mask"] == 0
    table, plain, output = tmp_path / "t.csv", tmp_path / "t.txt", tmp_path / "o.jsonl"
    table.write_text("text,label\none value,yes\nanother,no\n")
    plain.write_text("one value\nanother\n")
    assert predict.main(["classify", "--model", model, "--input", str(table), "--output", str(output)]) == 0
    assert predict.main(["classify", "--model", model, "--input", str(plain)]) == 0
    assert capsys.readouterr().out == output.read_text()
    assert predict.main(["classify", "--model", model, "--text", "one value"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("no", "yes")


def test_wrong_use_is_told(bert, small_config, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no \[MASK\]"):
        bert.fill_mask("nothing to fill")
    with pytest.raises(DataError, match="the model reads 64"):
        bert.fill_mask("word " * 100 + "[MASK]")
    params = jax.device_get(pretrain.init(small_config.model, jax.random.key(0)))
    convert.save_model(str(tmp_path / "m"), params, small_config.model, tokenizer)
    with pytest.raises(ConfigError, match="no classifier"):
        bert_jax.load(str(tmp_path / "m")).classify(["x"])
    smaller = dataclasses.replace(small_config.model, vocab_size=500)
    params = jax.device_get(pretrain.init(smaller, jax.random.key(0)))
    convert.save_model(str(tmp_path / "other"), params, smaller, tokenizer)
    with pytest.raises(DataError, match="the model only 500"):
        bert_jax.load(str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="neither a model directory"):
        bert_jax.load(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no such file"):
        list(bert.classify_stream(predict.input_texts(str(tmp_path / "absent.csv"), TaskConfig())))


def test_loading_imports_no_tensorflow(model):
    code = f"import sys, bert_jax; bert_jax.load({model!r}); assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module", ["train", "predict", "checkpoint", "data.tokenizer", "data.prepare"], ids=lambda name: name
)
def test_help_imports_nothing_heavy(module):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('bert_jax." + module + "', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'tensorflow', 'orbax'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
