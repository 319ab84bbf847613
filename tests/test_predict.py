"""Prediction: masks filled, texts labelled, in order and whatever the batch; bad input in one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import bert_jax
from bert_jax import convert, predict
from bert_jax.bert import batches
from bert_jax.config import TaskConfig
from bert_jax.data.features import Features, collate, featurize
from bert_jax.errors import CheckpointError, ConfigError, DataError
from bert_jax.tasks import classify, encode, ner, pretrain, squad


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


@pytest.fixture(scope="module")
def words_and_spans(small_config, tokenizer, tmp_path_factory):
    """A model directory for words and one for spans, of 64 positions."""
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("heads")
    for name, init, labels in (
        ("tag", lambda key: ner.init(config, 3, key), ("O", "B-X", "I-X")),
        ("answer", lambda key: squad.init(config, key), ()),
    ):
        params = jax.device_get(jax.jit(init)(jax.random.key(0)))
        convert.save_model(str(folder / name), params, config, tokenizer, labels=labels)
    return folder


def test_fill_mask_ranks_pieces_for_each_mask(bert):
    found = bert.fill_mask("the [MASK] returns a [MASK] value", top=7)
    assert len(found) == 2 and all(len(pieces) == 7 for pieces in found)
    for pieces in found:
        probabilities = [piece["probability"] for piece in pieces]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
        assert all(bert.tokenizer.token_to_id(piece["token"]) == piece["id"] for piece in pieces)
    assert "returns a" in found[0][0]["text"]


def test_the_other_masks_stay_in_the_text(bert):
    first, second = bert.fill_mask("the [MASK] returns a [MASK] value", top=1)
    assert first[0]["text"].endswith("returns a [MASK] value") and "[MASK]" not in first[0]["token"]
    assert second[0]["text"].startswith("the [MASK] returns a")


def test_a_long_text_is_seen_around_each_mask(bert, capsys):
    """What the model sees of it is 62 pieces; what it is given alone must give the same."""
    words = ["value"] * 100
    found = bert.fill_mask(" ".join([*words, "the [MASK] returns", *words, "a [MASK]"]), top=3)
    assert "204 pieces" not in capsys.readouterr().err
    assert len(found) == 2 and found[0][0]["text"].count("value") == 200
    last = bert.fill_mask(" ".join([*words[:60], "a [MASK]"]), top=3)[0]
    assert [piece["id"] for piece in found[1]] == [piece["id"] for piece in last]
    assert found[1][0]["probability"] == pytest.approx(last[0]["probability"], rel=1e-4)
    assert len(bert.fill_mask("[MASK]", top=5000)[0]) == bert.tokenizer.vocab_size


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


TEXTS = ["a value", "the function returns a value of the object " * 3, "one", "words " * 20]


def test_embeddings_are_what_the_encoder_says_and_do_not_depend_on_the_batch(bert):
    hidden = []
    for text in TEXTS:
        features = featurize([text], None, bert.tokenizer, 64)
        batch = collate(features, np.array([0]), bert.tokenizer.pad_id, len(features.ids[0]))
        hidden.append(np.asarray(encode(bert.config, bert.params, batch, all_layers=True))[:, 0])  # [L + 1, S, D]
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(bert.embed(TEXTS), [state[-1].mean(0) for state in hidden], **close)
    np.testing.assert_allclose(bert.embed(TEXTS, "cls"), [state[-1, 0] for state in hidden], **close)
    expected = [np.concatenate(state[-4:].mean(1)) for state in hidden]
    np.testing.assert_allclose(bert.embed(TEXTS, "last4"), expected, **close)
    np.testing.assert_allclose(bert.embed(TEXTS, layers="all"), [state.mean(1) for state in hidden], **close)
    np.testing.assert_allclose(bert.embed(TEXTS, layers=[2, 0])[:, 1], [state[0].mean(0) for state in hidden], **close)
    assert bert.embed([]).shape == (0, 32) and bert.embed([], "last4").shape == (0, 96)
    assert bert.embed([], layers="all").shape == (0, 3, 32)
    with pytest.raises(ConfigError, match="a list of texts, not one text"):
        bert.embed("ab")
    for pair in ("ab", ("a", "b", "c")):
        with pytest.raises(ConfigError, match="pairs of texts, not"):
            bert.similarity([pair])
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[2])]
    first, second = bert.embed(TEXTS)[:2].astype(np.float64)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    np.testing.assert_allclose(bert.similarity(pairs), [cosine, 1], rtol=1e-5)


def test_batches_hold_each_text_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 513, 3000)
    seen, shapes = [], set()
    for numbers, length in batches(lengths, 512):
        shapes.add((len(numbers), length))
        assert (lengths[numbers[numbers >= 0]] <= length).all()
        seen += numbers[numbers >= 0].tolist()
    assert sorted(seen) == list(range(3000)) and len(shapes) <= 30
    assert [length for _, length in batches(np.array([3, 40]), 40)] == [40]
    assert [(len(numbers), length) for numbers, length in batches(np.array([3]), 40)] == [(1, 8)]
    short = np.random.default_rng(0).integers(5, 40, 2000)
    padded = sum(len(numbers) * length for numbers, length in batches(short, 512))
    assert short.sum() / padded > 0.9  # little is padding
    assert list(batches(np.zeros(0, int), 512)) == []


def test_what_is_cut_is_told(bert, capsys):
    bert.embed(["word " * 100, "short"])
    assert "1 of the texts are cut to the 64 pieces" in capsys.readouterr().err
    bert.embed(["short"])
    assert capsys.readouterr().err == ""


def test_words_are_those_of_the_tokenizer(tokenizer):
    def words(text):
        return [text[slice(*word.span)] for word in ner.split_words(text, tokenizer)]

    assert words("don't stop. (yes)") == ["don", "'", "t", "stop", ".", "(", "yes", ")"]
    assert words("\u6211\u5728 ab\u6211") == ["\u6211", "\u5728", "ab", "\u6211"]
    assert words("cafe\u0301 soft\u00adhyphen a\u0303o ") == ["cafe\u0301", "soft\u00adhyphen", "a\u0303o"]
    assert words(" \u200b ") == words("") == []
    text = "the function returns caf\u00e9 values"
    ids = [index for word in ner.split_words(text, tokenizer) for index in word.ids]
    assert ids == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("problem", convert.PROBLEMS)
@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_shown_as_what_they_mean(small_config, tokenizer, tmp_path, problem, count):
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    params = jax.device_get(classify.init(config, count, jax.random.key(1)))
    names = ("a", "b", "c")[:count]
    convert.save_model(str(tmp_path / "m"), params, config, tokenizer, labels=names, problem=problem)
    bert = bert_jax.load(str(tmp_path / "m"))
    found = bert.classify(["a value"])[0]
    features = featurize(["a value"], None, tokenizer, 64)
    batch = collate(features, np.array([0]), tokenizer.pad_id, 8)
    scores = np.asarray(classify.logits(bert.config, bert.params, batch))[0]
    if problem == "regression":
        expected = dict(zip(names, scores, strict=True))
        assert (found["scores"] if count > 1 else {"a": found["score"]}) == pytest.approx(expected, abs=1e-5)
    elif problem == "multi_label_classification":
        share = dict(zip(names, 1 / (1 + np.exp(-scores)), strict=True))
        assert found["probabilities"] == pytest.approx(share, abs=1e-5)
        assert found["labels"] == [name for name in names if share[name] > 0.5]
    else:
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert found["label"] == names[scores.argmax()]


def test_with_one_row_of_types_all_are_of_it(small_config, tokenizer, tmp_path):
    config = dataclasses.replace(small_config.model, type_vocab_size=1)
    convert.save_model(str(tmp_path / "m"), jax.device_get(squad.init(config, jax.random.key(0))), config, tokenizer)
    bert = bert_jax.load(str(tmp_path / "m"))
    assert np.isfinite(bert.embed([("a value", "another")])).all()
    assert bert.answer("what?", "a value")[0]["text"]


def test_results_go_where_the_output_is(model, tmp_path, capsys):
    lines, target, link = tmp_path / "l.txt", tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    lines.write_text("one\ntwo\n")
    link.symlink_to(target)
    asked = ["classify", "--model", model, "--input", str(lines), "--output"]
    assert predict.main([*asked, str(link)]) == 0
    assert link.is_symlink() and len(target.read_text().splitlines()) == 2
    assert predict.main([*asked, "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    with pytest.raises(ConfigError, match="cannot go into a pipe or device"):
        predict.main(["embed", *asked[1:], "/dev/null"])
    lines.write_bytes(b'{"text": "a \\ud800 b"}\n')
    lines = lines.rename(tmp_path / "l.jsonl")
    assert predict.main(["classify", "--model", model, "--input", str(lines), "--output", str(target)]) == 0


def test_words_of_a_long_text_are_labelled_through_windows(words_and_spans, capsys):
    bert = bert_jax.load(str(words_and_spans / "tag"))
    short = "the function returns a value."
    found = bert.tag(short)
    assert found["words"] == ["the", "function", "returns", "a", "value", "."]
    assert set(found["labels"]) <= {"O", "B-X", "I-X"} and len(found["labels"]) == 6
    assert all(short[entity["start"] : entity["end"]] == entity["text"] for entity in found["entities"])
    capsys.readouterr()
    long, again = bert.tag_stream([short * 60, short])
    assert len(long["labels"]) == 360 and again == found
    assert "1 of the texts are longer than the 64 pieces of a window" in capsys.readouterr().err
    bert.tag("x" * 99 + "abcdefgh" * 200)
    assert capsys.readouterr().err == ""  # a word beyond 100 characters is one unknown piece
    assert bert.tag("") == {"words": [], "labels": [], "entities": []}
    ids = np.array([bert.tokenizer.encode(short).ids])
    batch = collate(Features([ids[0]], [np.zeros_like(ids[0])]), np.array([0]), 0, ids.shape[1])
    scores = np.asarray(ner.logits(bert.config, bert.params, batch))[0]
    pieces = [len(part) for part in bert.tokenizer.encode_batch(found["words"])]
    firsts = 1 + np.cumsum([0, *pieces[:-1]])
    assert [bert.labels[scores[first].argmax()] for first in firsts] == found["labels"]


def test_answers_are_parts_of_the_context(words_and_spans, capsys):
    bert = bert_jax.load(str(words_and_spans / "answer"))
    context = "The function returns a value.  It is used with caf\u00e9 objects, and [SEP] is text. " * 8
    answers = bert.answer("what is returned?", context, top=3)
    scores = [answer["score"] for answer in answers]
    assert len(answers) == 3 and scores == sorted(scores, reverse=True)
    assert all(context[answer["start"] : answer["end"]] == answer["text"] != "" for answer in answers)
    with pytest.raises(DataError, match="context: no text"):
        bert.answer("what?", "  ")
    assert bert.answer("what " * 200, "a value")[0]["text"] in "a value"
    asked = [("what is returned?", context), ("which?", "a value"), ("what " * 200, "one")] * 3
    capsys.readouterr()
    together = [found[0] for found in bert.answer_stream(asked)]
    said = capsys.readouterr().err
    assert "3 contexts do not fit into a window of 64" in said and "3 questions are cut to 32 pieces" in said
    for (question, text), found in zip(asked[:3], together, strict=False):
        alone = bert.answer(question, text)[0]
        assert alone["text"] == found["text"] and alone["score"] == pytest.approx(found["score"], abs=1e-4)


def test_embed_and_answer_write_their_files(model, words_and_spans, tmp_path, capsys):
    lines, pairs, vectors = tmp_path / "l.txt", tmp_path / "p.tsv", tmp_path / "e.npy"
    lines.write_text("\n".join(TEXTS))
    assert predict.main(["embed", "--model", model, "--input", str(lines), "--output", str(vectors)]) == 0
    found = np.load(vectors)
    assert found.shape == (4, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, bert_jax.load(model).embed(TEXTS), rtol=1e-5)
    reader, writer = os.pipe()  # what cannot be read twice
    os.write(writer, lines.read_bytes())
    os.close(writer)
    piped = ["embed", "--model", model, "--input", f"/dev/fd/{reader}", "--output", str(vectors)]
    assert predict.main(piped) == 0
    np.testing.assert_array_equal(np.load(vectors), found)
    assert predict.main(["embed", "--model", model, "--input", str(lines), "--layers", "0", "2"]) == 0
    printed = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(np.array(printed)[:, 1], found, rtol=1e-5)
    pairs.write_text("a value\tanother value\none\tone\n")
    assert predict.main(["similarity", "--model", model, "--input", str(pairs)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[1])["similarity"] == pytest.approx(1, abs=1e-5)
    questions, answers = tmp_path / "q.json", tmp_path / "a.json"
    paragraph = {"context": "the value is one", "qas": [{"id": "x1", "question": "which?"}]}
    questions.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    heads = str(words_and_spans / "answer")
    assert predict.main(["answer", "--model", heads, "--input", str(questions), "--output", str(answers)]) == 0
    assert json.loads(answers.read_text())["x1"] in paragraph["context"]
    assert predict.main(["tag", "--model", str(words_and_spans / "tag"), "--text", "the value"]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 2
    assert not list(tmp_path.glob("*.partial"))


BAD_USE = {
    "a question of null": (
        ["answer", "--input", "null.json"],
        DataError,
        "null.json: question 7: its question is None",
    ),
    "an empty context": (["answer", "--input", "empty.json"], DataError, "question 7: its context is ' '"),
    "a folder for the output": (["embed", "--text", "x", "--output", "."], ConfigError, "a folder; name a file"),
    "columns of no table": (
        ["classify", "--input", "l.txt", "--text-column", "x"],
        ConfigError,
        "columns are of tables",
    ),
    "one id twice": (["answer", "--input", "twice.json"], DataError, "two questions have the id '7'"),
    "a context of no letters": (["answer", "--input", "blank.json"], DataError, "question 7: its context"),
    "three cells": (["similarity", "--input", "bad.tsv"], DataError, "line 2: 3 cells"),
    "no such layer": (["embed", "--text", "x", "--layers", "9"], ConfigError, "go from 0 .embeddings. to 2"),
    "a layer in words": (["embed", "--text", "x", "--layers", "last"], ConfigError, "numbers from 0, or all"),
    "no context": (["answer", "--question", "x"], ConfigError, "--question needs --context"),
    "no head for words": (["tag", "--text", "x"], ConfigError, "no tagger"),
    "no head for spans": (["answer", "--question", "x", "--context", "y"], ConfigError, "no span_head"),
    "not SQuAD": (["answer", "--input", "bad.tsv"], DataError, "not in SQuAD's JSON layout"),
    "layers and last4": (["embed", "--text", "x", "--pooling", "last4", "--layers", "1"], ConfigError, "says itself"),
}


@pytest.mark.parametrize("fault", BAD_USE)
def test_bad_use_is_one_line(model, words_and_spans, tmp_path, monkeypatch, fault):
    words, kind, message = BAD_USE[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.tsv").write_text("a\tb\nc\td\te\n")
    kinds = (("null", None, "x", 1), ("empty", "x", " ", 1), ("twice", "x", "y", 2), ("blank", "x", "\u200b \u200b", 1))
    for name, question, context, times in kinds:
        paragraph = {"context": context, "qas": [{"id": "7", "question": question}] * times}
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    before = sorted(tmp_path.iterdir())
    chosen = str(words_and_spans / "answer") if words[:2] == ["answer", "--input"] else model
    output = [] if "--output" in words else ["--output", "out"]
    with pytest.raises(kind, match=message):
        predict.main([*words, "--model", chosen, *output])
    assert sorted(tmp_path.iterdir()) == before


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


@pytest.mark.parametrize("module", ["train", "predict", "checkpoint", "convert", "data.tokenizer", "data.prepare"])
def test_help_imports_nothing_heavy(module):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('bert_jax." + module + "', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'tensorflow', 'orbax'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
