"""Attention maps: equal to transformers', zero where nothing is seen; heads named by their patterns; page and image."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

import bert_jax
from bert_jax import convert
from bert_jax.data.features import Features, collate
from bert_jax.errors import ConfigError, DataError
from bert_jax.explain.__main__ import main
from bert_jax.explain.attention import THRESHOLD, Maps, attention_maps, maps, page, patterns, table
from bert_jax.model import separate_layers
from bert_jax.optimizer import build_optimizer
from bert_jax.sharding import make_mesh
from bert_jax.tasks import init_encoder, pretrain
from bert_jax.train_state import abstract_state, jit_step

run = jax.jit(attention_maps, static_argnums=0)
TEXT, PAIR = "The function returns a value.", 'It is "<script>alert(1)</script>" & more'


@pytest.fixture(scope="module")
def model(small_config, tokenizer, tmp_path_factory):
    """A model directory of an encoder, far from zero weights."""
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("model") / "m"
    params = jax.device_get(jax.jit(lambda key: pretrain.init(config, key))(jax.random.key(0)))
    convert.save_model(str(folder), params, config, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def bert(model):
    return bert_jax.load(model)


def synthetic(probabilities, pieces="abcdef", type_ids=None):
    """Maps of [CLS], the letters of `pieces` and [SEP], with given probabilities [L, N, S, S]."""
    tokens = ["[CLS]", *pieces, "[SEP]"]
    special = np.array([token in ("[CLS]", "[SEP]") for token in tokens])
    vectors = np.zeros((*probabilities.shape[:3], 4), np.float32)
    type_ids = np.zeros(len(tokens), np.int32) if type_ids is None else np.array(type_ids)
    return Maps(tokens, type_ids, special, probabilities.astype(np.float32), vectors, vectors)


def test_rows_see_their_example_alone(small_config):
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    params = jax.jit(init_encoder, static_argnums=0)(config, jax.random.key(0))
    params = separate_layers(params, config.num_layers)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 3, 3, 3]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 0, 1, 0, 1, 2]], np.int32)
    ids = np.random.default_rng(0).integers(5, config.vocab_size, segments.shape).astype(np.int32)
    batch = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "position_ids": positions}
    found, query, key = run(config, params, batch | {"segment_ids": segments})
    assert found.shape == (2, 2, 4, 7, 7) and query.shape == key.shape == (2, 2, 4, 7, 8)
    assert found.dtype == query.dtype == key.dtype == np.float32
    same = (segments[:, None, :, None] == segments[:, None, None, :]) & (segments > 0)[:, None, None]
    assert not np.asarray(found)[:, ~np.broadcast_to(same, found.shape[1:])].any()
    np.testing.assert_allclose(np.asarray(found).sum(-1)[:, segments[:, None].repeat(4, 1) > 0], 1, atol=1e-6)
    assert not np.asarray(found).sum(-1)[:, segments[:, None].repeat(4, 1) == 0].any()
    alone = {name: value[1:, 4:] for name, value in batch.items()} | {"segment_ids": np.ones((1, 3), np.int32)}
    np.testing.assert_allclose(found[:, 1:, :, 4:, 4:], run(config, params, alone)[0], atol=1e-5)


def test_equal_to_transformers(tmp_path):
    """On pairs, with padding: what a row of padding attends to, which no one sees, is left out."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    written = BertModel(BertConfig(vocab_size=150, initializer_range=0.2, **sizes))
    with torch.no_grad():
        for parameter in written.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    written.save_pretrained(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = convert.load_model(str(tmp_path))
    rng, lengths = np.random.default_rng(0), [9, 100, 3]
    ids = [rng.integers(1, 150, length).astype(np.int32) for length in lengths]
    types = [(np.arange(length) >= length // 2).astype(np.int32) for length in lengths]
    batch = collate(Features(ids, types), np.arange(len(ids)), 0, max(lengths))
    names = {"input_ids": "input_ids", "token_type_ids": "token_type_ids", "segment_ids": "attention_mask"}
    given = {other: torch.tensor(batch[name].astype(np.int64)) for name, other in names.items()}
    with torch.no_grad():
        expected = np.stack([layer.numpy() for layer in theirs(**given, output_attentions=True).attentions])
    params = separate_layers(ours.params, ours.config.num_layers)
    found = np.asarray(run(ours.config, params, batch)[0])
    real = np.broadcast_to((batch["segment_ids"] > 0)[:, None], found.shape[1:4])
    np.testing.assert_allclose(found[:, real], expected[:, real], atol=1e-5)


def test_maps_of_a_text_are_cut_back_to_it(bert, capsys):
    found = maps(bert, TEXT, PAIR)
    encoding = bert.tokenizer.encode(TEXT, PAIR)
    size = len(encoding.tokens)
    assert found.tokens == encoding.tokens and found.type_ids.tolist() == encoding.type_ids
    assert found.probabilities.shape == (2, 4, size, size) and found.query.shape == (2, 4, size, 8)
    np.testing.assert_allclose(found.probabilities.sum(-1), 1, atol=1e-6)
    scores = found.query @ found.key.swapaxes(-1, -2) * 8**-0.5
    np.testing.assert_allclose(found.probabilities, np.asarray(jax.nn.softmax(scores)), atol=1e-5)
    assert [found.tokens[place] for place in np.flatnonzero(found.special)] == ["[CLS]", "[SEP]", "[SEP]"]
    assert maps(bert, "a [MASK] value").tokens == ["[CLS]", "a", "[MASK]", "value", "[SEP]"]
    assert capsys.readouterr().err == ""
    long = maps(bert, "value " * 50, "one " * 50)
    assert len(long.tokens) == 64 and long.special.sum() == 3 and long.tokens[-1] == "[SEP]"
    assert "cut to the 64 pieces that the model reads; 39 are left out" in capsys.readouterr().err
    for text, pair in (("", None), (" \u200b", None), ("a value", "")):
        with pytest.raises(DataError, match=r"no words in '.*'; give some text"):
            maps(bert, text, pair)


def test_the_training_step_keeps_and_returns_no_maps(small_config, bert):
    """Neither before nor after maps are asked for: it gives the state and sums, and what maps need is no part of it."""

    def program():
        config = dataclasses.replace(small_config, model=bert.config)
        optimizer = build_optimizer(config.optimizer, config.model.num_layers)
        objective = pretrain.objective(config)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            step = jit_step(objective, optimizer, mesh, accumulate=1)
            state = abstract_state(objective, optimizer, mesh)
            lowered = step.lower(state, pretrain.batch_shapes(config), np.uint32(0), np.float32(0))
        after, metrics = lowered.out_info
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
        return lowered.as_text()

    before = program()
    maps(bert, TEXT)
    assert program() == before


def test_heads_are_named_by_their_patterns():
    size = 8
    first, last = np.zeros((2, size, size))
    first[:, 0] = last[:, -1] = 1
    words = np.zeros((size, size))
    words[:, 1:-1] = 1 / 6
    even = np.full((size, size), 1 / size)
    heads = [np.eye(size, k=1), np.eye(size, k=-1), np.eye(size), last, first, words]
    mixed = 0.5 * np.eye(size) + 0.5 * first
    known = patterns(synthetic(np.stack([np.stack(heads), np.stack([even, mixed, *heads[:4]])])))
    names = ["next token", "previous token", "same token", "[SEP]", "[CLS]", "bag of words"]
    assert list(known.scores) == known.names[0] == names
    assert known.names[1] == ["bag of words", "mixed", *names[:4]]
    for number, name in enumerate(names):
        assert known.scores[name][0, number] == pytest.approx(1)
        assert all(0 <= score <= 1 + 1e-6 for score in known.scores[name].flat)
    assert known.scores["bag of words"][1, 0] == pytest.approx(6 / 8)
    assert known.scores["bag of words"][0, 0] == pytest.approx(1 / 6 * 5 / 6)  # the last word looks at [SEP]
    assert max(scores[1, 1] for scores in known.scores.values()) == pytest.approx(THRESHOLD)
    lines = table(known).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == names
    assert re.search(r"previous token +0\.1 1\.00   1\.3 1\.00", lines[2])


def test_patterns_know_pieces_and_sentences():
    size = 8
    others = np.zeros((size, size))
    others[[1, 4], [4, 1]] = 1  # "a" looks at the other "a"
    others[[2, 3, 5, 6], [2, 3, 5, 6]] = 1
    types = [0, 0, 0, 0, 1, 1, 1, 1]
    sentence = np.zeros((size, size))
    sentence[:4, 1:4], sentence[4:, 4:7] = 1 / 3, 1 / 3
    known = patterns(synthetic(np.stack([others, sentence])[None], "abcade", types))
    assert known.names == [["same token", "bag of words"]]
    assert known.scores["bag of words"][0, 1] == pytest.approx(1)


def test_one_word_is_enough(bert):
    found = maps(bert, "value")
    known = patterns(found)
    assert known.scores["same token"].shape == (2, 4)
    assert np.isfinite(np.stack(list(known.scores.values()))).all()
    assert page(found, known, "m", ["value"])


def data_of(written):
    return json.loads(re.search(r'id="data">(.*?)</script>', written, re.DOTALL)[1])


def test_base_with_512_tokens_fits_into_20_megabytes():
    """Of numbers that no compressor would make smaller."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 12, 12, 512, 64)).astype(np.float32)
    probabilities = np.zeros((12, 12, 512, 512), np.float32)
    for layer in range(12):
        scores = query[layer] @ key[layer].swapaxes(-1, -2) / 8
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities[layer] = weights / weights.sum(-1, keepdims=True)
    tokens, special = ["[CLS]", *["word"] * 510, "[SEP]"], np.arange(512) % 511 == 0
    found = Maps(tokens, np.zeros(512, np.int32), special, probabilities, query, key)
    written = page(found, patterns(found), "random", ["word " * 510])
    assert len(written.encode()) < 20e6
    told = data_of(written)
    assert told["bits"] == 12 and told["error"] < 1e-3


def test_the_command_writes_page_and_image(model, tmp_path, capsys):
    output, image = tmp_path / "view.html", tmp_path / "map.png"
    asked = ["attention", "--model", model, "--text", TEXT, "--text-b", PAIR, "--output", str(output)]
    assert main([*asked, "--png", str(image)]) == 0
    written = output.read_text(encoding="utf-8")
    assert data_of(written)["given"] == [TEXT, PAIR] and "<script>alert" not in written
    assert image.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(re.search(r"[01]\.[0-3] [01]\.\d\d", line) for line in lines[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "view.html"]


BAD_USE = {
    "no text": ([], ConfigError, "--text"),
    "an empty text": (["--text", " "], DataError, "text: no words in ' '; give some text"),
    "an empty pair": (["--text", "a value", "--text-b", ""], DataError, "pair: no words in ''"),
    "no folder": (["--text", "x", "--output", "absent/v.html"], ConfigError, "absent/v.html: no such folder"),
    "a folder for the page": (["--text", "x", "--output", "."], ConfigError, "--output .: a folder; name a file"),
    "a page in the image's place": (["--text", "x", "--png", "./view.html"], ConfigError, "the page goes there"),
    "a folder for the image": (["--text", "x", "--png", "."], ConfigError, "--png .: a folder; name a file"),
}


@pytest.mark.parametrize("fault", BAD_USE)
def test_bad_use_is_one_line(model, tmp_path, monkeypatch, fault):
    words, kind, message = BAD_USE[fault]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=re.escape(message)):
        main(["attention", "--model", model, "--output", "view.html", *words])
    assert not list(tmp_path.iterdir())


def test_an_image_without_matplotlib_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        main(["attention", "--model", "absent", "--text", "x", "--output", str(tmp_path / "v.html"), "--png", "x.png"])
