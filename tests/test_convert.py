"""Model directories: out and in again bit for bit, whatever path leads to them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bert_jax import convert
from bert_jax.command import load_config
from bert_jax.config import ModelConfig
from bert_jax.errors import CheckpointError
from bert_jax.sharding import named_leaves
from bert_jax.tasks import classify, pretrain
from bert_jax.train import train
from tests.test_config import CONFIGS

MODEL = ModelConfig(
    vocab_size=150, hidden_size=16, num_layers=2, num_heads=4, mlp_dim=24, max_position_embeddings=20, hidden_act="gelu"
)


@pytest.fixture(scope="module")
def params():
    trees = pretrain.init(MODEL, jax.random.key(0)) | classify.init(MODEL, 3, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    trees = jax.tree.map(lambda leaf: np.asarray(jax.random.normal(next(keys), leaf.shape)), trees)
    trees["embeddings"]["token_embedding"] = trees["embeddings"]["token_embedding"].copy()
    trees["embeddings"]["token_embedding"][150:] = 0
    trees["mlm_head"]["bias"] = np.where(np.arange(256) < 150, trees["mlm_head"]["bias"], 0).astype(np.float32)
    return trees


def test_names_and_layout_are_hugging_face_s(params):
    tensors = convert.to_huggingface(params, MODEL)
    query = tensors["bert.encoder.layer.1.attention.self.query.weight"]
    assert query.shape == (16, 16)
    ours = params["layers"]["attention"]["query"]["kernel"][1]  # [D, N, H]
    np.testing.assert_array_equal(query[5], ours.reshape(16, 16)[:, 5])
    out = tensors["bert.encoder.layer.0.attention.output.dense.weight"]
    np.testing.assert_array_equal(out, params["layers"]["attention"]["out"]["kernel"][0].reshape(16, 16).T)
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (150, 16)
    assert tensors["cls.predictions.bias"].shape == (150,)
    assert tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape == (24, 16)
    assert len(tensors) == 5 + 2 * 16 + 2 + 5 + 2 + 2


def test_out_and_in_again_bit_for_bit(params, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model = dataclasses.replace(MODEL, vocab_size=150)
    convert.save_model(str(folder), params, model, tokenizer, labels=("a", "b", "c"), step=7)
    found = convert.load_model(str(folder))
    assert found.config == model and found.labels == ("a", "b", "c")
    flat = named_leaves(found.params)
    assert flat.keys() == named_leaves(params).keys()
    for name, value in named_leaves(params).items():
        np.testing.assert_array_equal(flat[name], value, err_msg=name)
    convert.save_model(str(folder), params, model, tokenizer, step=8)  # replaced
    assert json.loads((folder / "config.json").read_text())["bert_jax_step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_name_for_every_parameter(path):
    shapes = convert.parameter_shapes(load_config(str(path)).model, num_labels=2)
    names = [convert.their_name(name) for name in shapes]
    assert len(set(names)) == len(names)


def test_workdir_step_and_model_directory_are_the_same_weights(small_config, tmp_path):
    workdir = tmp_path / "run"
    train(small_config, str(workdir))
    paths = (workdir, workdir / "model", workdir / "checkpoints" / "20")
    models = [convert.load_model(str(path)) for path in paths]
    for model in models[1:]:
        assert model.config == models[0].config
        for name, value in named_leaves(model.params).items():
            if name in convert.PADDED:
                value, expected = value[: model.config.vocab_size], named_leaves(models[0].params)[name]
                np.testing.assert_array_equal(value, expected[: model.config.vocab_size])
            else:
                np.testing.assert_array_equal(value, named_leaves(models[0].params)[name], err_msg=name)
    longer = dataclasses.replace(small_config, train=dataclasses.replace(small_config.train, num_steps=30))
    exported = (workdir / "model").rename(tmp_path / "aside")
    train(longer, str(workdir))
    (workdir / "model").rename(tmp_path / "newer")
    exported.rename(workdir / "model")  # as if training had been killed before it exported
    table = convert.load_model(str(workdir)).params["embeddings"]["token_embedding"]
    assert not np.array_equal(table, models[0].params["embeddings"]["token_embedding"])


def test_what_is_no_model_is_told(tmp_path, params, tokenizer):
    with pytest.raises(CheckpointError, match="neither a model directory"):
        convert.load_model(str(tmp_path))
    folder = tmp_path / "model"
    convert.save_model(str(folder), params, MODEL, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no BERT encoder"):
        convert.load_model(str(folder))
    wrong = tensors | {"bert.pooler.dense.weight": np.zeros((3, 3), np.float32)}
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bert.pooler.dense.weight has shape \(3, 3\)"):
        convert.load_model(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert.load_model(str(folder))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a configuration"):
        convert.load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: missing"):
        convert.load_model(str(folder))
