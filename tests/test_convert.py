"""Model directories: out and in again bit for bit, whatever path leads to them."""

import dataclasses
import functools
import json
import os
import pickle
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForPreTraining

from bert_jax import checkpoint, convert
from bert_jax.command import load_config
from bert_jax.config import ModelConfig
from bert_jax.errors import CheckpointError, ConfigError
from bert_jax.optimizer import build_optimizer
from bert_jax.sharding import named_leaves
from bert_jax.tasks import classify, pretrain
from bert_jax.train import train
from tests.test_config import CONFIGS

MODEL = ModelConfig(
    vocab_size=150, hidden_size=16, num_layers=2, num_heads=4, mlp_dim=24, max_position_embeddings=20, hidden_act="gelu"
)


@pytest.fixture(scope="module")
def params():
    key = jax.random.key(0)
    trees = jax.jit(lambda: pretrain.init(MODEL, key) | classify.init(MODEL, 3, key))()
    keys = iter(jax.random.split(jax.random.key(2), 100))
    trees = jax.device_get(jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), trees))
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
def test_every_config_goes_out_and_in_again(path):
    config = load_config(str(path)).model
    with torch.device("meta"):
        theirs = BertForPreTraining(BertConfig(**convert.to_settings(config, ("nsp_head", "embeddings"), ())))
    expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    params = jax.eval_shape(lambda: pretrain.init(config, jax.random.key(0)))
    tensors = jax.eval_shape(lambda params: convert.to_huggingface(params, config), params)
    assert {name: leaf.shape for name, leaf in tensors.items()} == expected
    shapes = convert.parameter_shapes(config, {})
    load = functools.partial(convert.from_huggingface, shapes=shapes, vocab_size=config.vocab_size, numpy=jnp)
    back = jax.eval_shape(load, tensors)
    assert checkpoint.describe_tree(back) == checkpoint.describe_tree(params)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_goes_into_a_checkpoint_s_description_and_out_again(path, tmp_path):
    config = load_config(str(path))
    params = jax.eval_shape(lambda: pretrain.init(config.model, jax.random.key(0)))
    optimizer = build_optimizer(config.optimizer, config.model.num_layers)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    items = {"params": params, "train": {"step": step, "opt_state": jax.eval_shape(optimizer.init, params)}}
    checkpoint.write_manifest(
        str(tmp_path), checkpoint.manifest_values(7, config, ("a", "b"), "regression", "print", items)
    )
    found = checkpoint.read_manifest(str(tmp_path))
    assert (found.step, found.config, found.labels) == (7, config, ("a", "b"))
    assert (found.problem, found.tokenizer) == ("regression", "print")
    checkpoint.check_tree(str(tmp_path), found.tree, checkpoint.describe_tree(items))
    empty = checkpoint.empty_params(found)
    assert jax.tree.structure(empty) == jax.tree.structure(params)
    assert checkpoint.describe_tree(empty) == checkpoint.describe_tree(params)
    shapes = convert.parameter_shapes(found.config.model, {})
    assert {name: tuple(shape) for name, (shape, _) in checkpoint.describe_tree(empty).items()} == shapes


def test_workdir_step_and_model_directory_are_the_same_weights(small_config, tmp_path, capsys):
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
    capsys.readouterr()
    damaged = next((workdir / "checkpoints" / "30" / "params").rglob("d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    table = convert.load_model(str(workdir)).params["embeddings"]["token_embedding"]
    np.testing.assert_array_equal(table, models[0].params["embeddings"]["token_embedding"])
    assert "checkpoint 30 is left out" in capsys.readouterr().err


def test_training_does_not_go_on_from_weights_alone(small_config, tokenizer, tmp_path):
    params = jax.device_get(pretrain.init(small_config.model, jax.random.key(0)))
    checkpoint.save_params(str(tmp_path / "w"), params, small_config.model, tokenizer)
    with pytest.raises(CheckpointError, match="weights alone.*--train.init-from"):
        train(small_config, str(tmp_path / "w"))


def older(tensors):
    """The spellings of early releases: no prefix, gamma and beta, a buffer, the decoder's copies."""
    renamed = {}
    for name, value in tensors.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[name] = value
    renamed["embeddings.position_ids"] = np.arange(20)[None]
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    renamed["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    return renamed


def shard(folder, tensors):
    """Three files and an index instead of one."""
    names = sorted(tensors)
    weight_map = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_older_names_and_several_files_are_understood(params, tokenizer, tmp_path):
    folder = tmp_path / "model"
    convert.save_model(str(folder), params, MODEL, tokenizer, labels=("a", "b", "c"))
    tensors = load_file(folder / "model.safetensors")
    save_file(older(tensors) | {"some.other": np.zeros(3, np.float32)}, folder / "model.safetensors")
    found = [convert.load_model(str(folder))]
    assert found[0].ignored == ("embeddings.position_ids", "some.other")
    save_file(
        {f"module.{name}": value.astype(np.float32) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    found.append(convert.load_model(str(folder)))
    shard(folder, tensors)
    found.append(convert.load_model(str(folder)))
    for model in found:
        assert model.labels == ("a", "b", "c")
        for name, value in named_leaves(params).items():
            np.testing.assert_array_equal(named_leaves(model.params)[name], value, err_msg=name)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00003.safetensors, which is not in the folder"):
        convert.load_model(str(folder))


def test_a_decoder_of_its_own_is_refused(params, tokenizer, tmp_path):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    untied = tensors["bert.embeddings.word_embeddings.weight"] + 1
    save_file(tensors | {"cls.predictions.decoder.weight": untied}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: cls.predictions.decoder.weight differs"):
        convert.load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(params, tokenizer, tmp_path, dtype):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    half = {name: value.astype(jnp.dtype(dtype)) for name, value in tensors.items()}
    save_file(half, tmp_path / "m" / "model.safetensors")
    found = named_leaves(convert.load_model(str(tmp_path / "m")).params)
    for name, value in named_leaves(params).items():
        if not name.startswith("classifier"):
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], value.astype(jnp.dtype(dtype)).astype(np.float32))


def test_numbers_that_are_no_weights_and_lost_tensors_are_told(params, tokenizer, tmp_path):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for dtype in (np.int32, np.float64):
        pooler = tensors["bert.pooler.dense.weight"].astype(dtype)
        save_file(tensors | {"bert.pooler.dense.weight": pooler}, tmp_path / "m" / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{dtype.__name__} numbers; save the weights as float32"):
            convert.load_model(str(tmp_path / "m"))
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    shard(tmp_path / "m", tensors)
    part = tmp_path / "m" / "model-00002-of-00003.safetensors"
    kept = load_file(part)
    lost = sorted(kept)[0]
    save_file({name: value for name, value in kept.items() if name != lost}, part)
    with pytest.raises(CheckpointError, match=f"{lost} is not in model-00002"):
        convert.load_model(str(tmp_path / "m"))


def test_float8_ends_in_one_line(params, tokenizer, tmp_path):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        convert.load_model(str(tmp_path / "m"))


def test_old_pickles_are_told_by_their_names(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path / "checkpoints" / "epoch=1-step=2.ckpt", tmp_path / "pytorch_model.bin"):
        path.write_bytes(pickle.dumps({"a": 1}, protocol=0))
        with pytest.raises(CheckpointError, match="a Python pickle.*model.safetensors"):
            convert.load_model(str(tmp_path))
        path.unlink()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "epoch=1.ckpt", "model.safetensors"])
def test_pickles_are_refused_by_their_first_bytes(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    for content in (pickle.dumps(Trap()), b"PK\x03\x04" + b"zip of torch.save"):
        (tmp_path / name).write_bytes(content)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(CheckpointError, match="a Python pickle.*model.safetensors"):
                convert.load_model(str(path))
    assert not (tmp_path / "run").exists()


def test_damaged_safetensors_end_in_one_line(params, tokenizer, tmp_path):
    folder = tmp_path / "m"
    convert.save_model(str(folder), params, MODEL, tokenizer)
    whole = (folder / "model.safetensors").read_bytes()
    rng, refused = random.Random(0), 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 3])):
                data[rng.randrange(8 if trial % 3 == 1 else 3000)] = rng.randrange(256)
        (folder / "model.safetensors").write_bytes(data)
        try:
            convert.load_model(str(folder))
        except CheckpointError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 100


def test_a_header_whose_length_looks_like_a_pickle_is_read(params, tokenizer, tmp_path):
    """The format begins with the header's length; 640 + 65,536 n begins with pickle's opcode."""
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = 640 + 65536 * 1
    path.write_bytes(padded.to_bytes(8, "little") + data[8 : 8 + size] + b" " * (padded - size) + data[8 + size :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    found = named_leaves(convert.load_model(str(tmp_path / "m")).params)
    np.testing.assert_array_equal(found["layers/mlp/wi/kernel"], params["layers"]["mlp"]["wi"]["kernel"])


@pytest.mark.parametrize("wrong", ["transposed", "not a number", "infinite"])
def test_weights_that_fit_by_their_size_alone_are_refused(params, tokenizer, tmp_path, wrong):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    if wrong == "transposed":
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    else:
        tensors[name][3, 4] = np.nan if wrong == "not a number" else -np.inf
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has shape" if wrong == "transposed" else "not finite"):
        convert.load_model(str(tmp_path / "m"))


def test_part_of_a_module_is_refused(params, tokenizer, tmp_path):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("bert.encoder.layer.1.output.dense.bias", "cls.predictions.transform.dense.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "m" / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            convert.load_model(str(tmp_path / "m"))


BAD_SETTINGS = {
    "another family": ({"model_type": "roberta"}, "model_type 'roberta'"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "only absolute"),
    "a decoder": ({"is_decoder": True}, "is_decoder True"),
    "an unknown activation": ({"hidden_act": "silu"}, "model.hidden_act: 'silu' is none of gelu_new, gelu, relu"),
    "sizes that do not fit": ({"num_attention_heads": 5}, "does not divide"),
    "a size that is no number": ({"num_hidden_layers": True}, "model.num_layers: True must be a whole number"),
    "a size that is no integer": ({"hidden_size": 16.0}, "model.hidden_size: 16.0 must be a whole number"),
    "a size past all bounds": ({"vocab_size": 2**40}, "vocab_size 1099511627776 is out of bounds"),
    "a classifier of choices": ({"architectures": ["BertForMultipleChoice"]}, "neither of whole texts nor of words"),
    "two labels of one name": ({"id2label": {"0": "x", "1": "x"}}, "two labels have one name: x, x"),
    "labels in a list": ({"id2label": ["a"]}, "id2label is .'a'., no dict"),
    "fewer layers than weights": ({"num_hidden_layers": 1}, "encoder.layer.1.* beyond the 1 of config.json"),
    "more layers than weights": ({"num_hidden_layers": 3}, "encoder.layer.2.* is missing"),
    "fewer pieces than rows": ({"vocab_size": 149}, r"shape .150, 16., config.json asks for .149, 16."),
    "more pieces than rows": ({"vocab_size": 151}, r"shape .150, 16., config.json asks for .151, 16."),
}


@pytest.mark.parametrize("fault", BAD_SETTINGS)
def test_settings_of_other_models_are_told(params, tokenizer, tmp_path, fault):
    change, message = BAD_SETTINGS[fault]
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        convert.load_model(str(tmp_path / "m"))


def test_the_command_goes_to_orbax_and_back(params, tokenizer, tmp_path, capsys):
    source, orbax, again = (str(tmp_path / name) for name in ("source", "orbax", "again"))
    convert.save_model(source, params, MODEL, tokenizer, labels=("a", "b", "c"))
    assert convert.main(["--input", source, "--output", orbax, "--to", "orbax"]) == 0
    told = capsys.readouterr().err
    assert "loaded" in told and "mlm_head" in told and "classifier" in told
    assert checkpoint.main(["verify", orbax]) == 0
    assert convert.main(["--input", orbax, "--output", again]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()
    assert convert.load_model(again).labels == ("a", "b", "c")
    with pytest.raises(ConfigError, match="is there already"):
        convert.main(["--input", source, "--output", again])


def test_what_scores_mean_goes_both_ways(params, tokenizer, tmp_path):
    for problem in convert.PROBLEMS:
        folder = str(tmp_path / problem)
        convert.save_model(folder, params, MODEL, tokenizer, labels=("a", "b", "c"), problem=problem)
        assert transformers.AutoConfig.from_pretrained(folder).problem_type == problem
        assert convert.load_model(folder).problem == problem
        assert convert.main(["--input", folder, "--output", f"{folder}-orbax", "--to", "orbax"]) == 0
        assert convert.load_model(f"{folder}-orbax").problem == problem


def test_one_class_of_modules_alone(params, tokenizer, tmp_path, capsys):
    source = str(tmp_path / "m")
    convert.save_model(source, params, MODEL, tokenizer, labels=("a", "b", "c"))
    for name, heads in convert.CLASSES.items():
        target = str(tmp_path / name)
        if set(heads) <= set(params):
            assert convert.main(["--input", source, "--output", target, "--as", name]) == 0
            assert "ignored" in capsys.readouterr().err
            _, told = getattr(transformers, name).from_pretrained(target, output_loading_info=True)
            assert not told["missing_keys"] and not told["unexpected_keys"]
            assert transformers.AutoConfig.from_pretrained(target).architectures == [name]
        else:
            with pytest.raises(ConfigError, match=f"--as {name}: the model has no {heads[-1]}"):
                convert.main(["--input", source, "--output", target, "--as", name])


def test_nothing_in_place_is_overwritten(params, tokenizer, tmp_path, monkeypatch):
    convert.save_model(str(tmp_path / "m"), params, MODEL, tokenizer)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(victim)
    for output in ("", ".", str(victim), str(tmp_path / "link")):
        for kind in ("huggingface", "orbax"):
            with pytest.raises(ConfigError, match="is there already"):
                convert.main(["--input", str(tmp_path / "m"), "--output", output, "--to", kind])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m", "victim"]
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]


def test_tiny_goes_through_orbax_and_hugging_face_bit_for_bit(tmp_path, tokenizer):
    config = load_config(str(CONFIGS[0].parent / "tiny.py")).model
    params = jax.device_get(jax.jit(functools.partial(pretrain.init, config))(jax.random.key(3)))
    params["embeddings"]["token_embedding"] = np.array(params["embeddings"]["token_embedding"])
    params["embeddings"]["token_embedding"][config.vocab_size :] = 0  # rows that only pad are not written
    orbax, model, again = (str(tmp_path / name) for name in ("orbax", "model", "again"))
    checkpoint.save_params(orbax, params, config, tokenizer)
    assert convert.main(["--input", orbax, "--output", model]) == 0
    assert convert.main(["--input", model, "--output", again, "--to", "orbax"]) == 0
    found = convert.load_model(again)
    assert found.config == config
    for name, value in named_leaves(params).items():
        np.testing.assert_array_equal(named_leaves(found.params)[name], value, err_msg=name)


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
    with pytest.raises(CheckpointError, match="a Python pickle"):
        convert.load_model(str(folder))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a configuration"):
        convert.load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: missing"):
        convert.load_model(str(folder))
