"""Labels from tables: reading, truncation, batches, and a run that learns from pre-trained weights."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig
from bert_jax.convert import PROBLEMS, Model
from bert_jax.data.tables import Example, read_examples
from bert_jax.errors import ConfigError, DataError
from bert_jax.tasks import classify
from bert_jax.train import start_from, train
from bert_jax.train_state import TrainState

GOOD, BAD = ["good", "great", "useful"], ["bad", "wrong", "error"]


def write_rows(path: Path, rows, columns=("text", "label")) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\n".join(sep.join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    return str(path)


def labelled(count: int, seed: int):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["no", "yes"])
        words = ["the", "function", rng.choice(GOOD if label == "yes" else BAD), "is", rng.choice(["here", "there"])]
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return {
        part: write_rows(folder / f"{part}.csv", labelled(count, seed))
        for seed, (part, count) in enumerate({"train": 200, "dev": 61, "test": 40}.items())
    }


@pytest.fixture(scope="module")
def pretrained(small_config, tmp_path_factory):
    """A pre-trained workdir of few steps."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    train(small_config, str(workdir))
    return workdir


def finetune(tables, **more) -> Config:
    return Config(
        data=DataConfig(max_seq_len=64),
        task=TaskConfig(name="classify", **tables),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=5, log_every=5, **more),
    )


def test_from_pretrained_weights_to_results(tables, pretrained, tmp_path):
    workdir = tmp_path / "run"
    assert train(finetune(tables, init_from=str(pretrained)), str(workdir)) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert results["task"] == "classify"
    assert results["step"] == round(5 * 200 / 16)
    assert set(results["metrics"]) == {"dev", "test"}
    assert results["metrics"]["dev"]["accuracy"] > 0.9
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["learning_rate"] > 0 and rows[0]["step"] == 5  # the schedule starts at step 0, not where W stopped
    assert any("eval/accuracy" in row for row in rows)
    lines = (workdir / "predictions" / "test.tsv").read_text().splitlines()
    assert len(lines) == 41
    right = np.mean([line.split("\t")[1] == line.split("\t")[3] for line in lines[1:]])
    assert right == pytest.approx(results["metrics"]["test"]["accuracy"])
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["hidden_size"] == 32  # taken from the weights


def test_from_scratch_needs_a_tokenizer(tables, small_config, tokenizer_folder, tmp_path):
    config = dataclasses.replace(finetune(tables), model=small_config.model)
    with pytest.raises(ConfigError, match="data.tokenizer"):
        train(config, str(tmp_path / "none"))
    config = dataclasses.replace(config, data=DataConfig(max_seq_len=64, tokenizer=str(tokenizer_folder)))
    assert train(config, str(tmp_path / "scratch")) == 0


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_the_three_kinds_of_table_read_alike(tmp_path, ending):
    path = write_rows(tmp_path / f"t.{ending}", [("one text", "a"), ("another", "b")])
    found = read_examples(path, TaskConfig())
    assert [(example.text, example.label) for example in found] == [("one text", "a"), ("another", "b")]


def test_quirks_of_real_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftext,label\r\n"two\nlines, and a comma",1\r\nplain,0\r\n'.encode())
    found = read_examples(str(path), TaskConfig())
    assert [example.text for example in found] == ["two\nlines, and a comma", "plain"]
    tsv = tmp_path / "t.tsv"
    tsv.write_text('text\tlabel\nan "unbalanced quote\t1\nfine\t0\n')
    assert read_examples(str(tsv), TaskConfig())[0].text == 'an "unbalanced quote'


BAD_TABLES = {
    "no such column": ("t.csv", b"sentence,label\nx,1\ny,0\n", r"line 2: no column 'text'"),
    "too few columns": ("t.tsv", b"text\tlabel\nonly text\n", "line 2: not as many columns"),
    "too many columns": ("t.csv", b"text,label\na,1,extra\n", "line 2: not as many columns"),
    "two columns of a name": ("t.csv", b"text,label,label\na,1,2\n", "line 1: two columns are named 'label'"),
    "empty label": ("t.csv", b"text,label\nx,\n", "line 2: empty label"),
    "no rows": ("t.csv", b"text,label\n", "no examples"),
    "one class": ("t.csv", b"text,label\nx,1\ny,1\n", "every example has the label '1'"),
    "not UTF-8": ("t.csv", b"text,label\ncaf\xe9,1\n", "not UTF-8"),
    "not JSON": ("t.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2: not JSON"),
    "a list": ("t.jsonl", b"[1, 2]\n", "line 1: a JSON object"),
    "open quote": ("t.csv", b'text,label\n"never closed,1\n', "line"),
    "null label": ("t.jsonl", b'{"text": "x", "label": null}\n', "line 1: 'label' holds neither"),
    "unknown ending": ("t.txt", b"x", "ending"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_end_in_one_line(tmp_path, name, tokenizer_folder, small_config):
    file, content, message = BAD_TABLES[name]
    (tmp_path / file).write_bytes(content)
    config = dataclasses.replace(
        finetune({"train": str(tmp_path / file)}),
        model=small_config.model,
        data=DataConfig(max_seq_len=64, tokenizer=str(tokenizer_folder)),
    )
    with pytest.raises(DataError, match=message) as error:
        train(config, str(tmp_path / "run"))
    assert file in str(error.value)


def test_a_label_only_in_dev_names_file_and_line(tables, tmp_path, tokenizer_folder, small_config):
    dev = write_rows(tmp_path / "dev.csv", [("x", "yes"), ("y", "perhaps")])
    config = dataclasses.replace(
        finetune({**tables, "dev": dev}),
        model=small_config.model,
        data=DataConfig(max_seq_len=64, tokenizer=str(tokenizer_folder)),
    )
    with pytest.raises(DataError, match=r"dev.csv: line 3: label 'perhaps'"):
        train(config, str(tmp_path / "run"))


def test_labels_become_numbers_in_their_order():
    examples = [Example("x", None, label, line) for line, label in enumerate("bab", 2)]
    assert classify.label_numbers(examples, ("a", "b"), "t.csv").tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="t.csv: line 2: label 'b' is not among"):
        classify.label_numbers(examples, ("a", "c"), "t.csv")


def test_tables_with_an_unnamed_column_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",text,label\n0,one,\u00b2\n1,two,3\n", encoding="utf-8")
    found = read_examples(str(path), TaskConfig())
    assert [example.text for example in found] == ["one", "two"]
    assert classify.label_names(str(path), found) == ("3", "\u00b2")


def test_resuming_with_other_labels_or_another_tokenizer_is_refused(tables, pretrained, tmp_path):
    workdir = tmp_path / "run"
    config = finetune(tables, init_from=str(pretrained))
    assert train(config, str(workdir)) == 0
    before = (workdir / "config.json").read_bytes()
    lines = Path(tables["train"]).read_text().replace(",yes", ",ja").replace(",no", ",nein")
    (tmp_path / "other.csv").write_text(lines)
    other = dataclasses.replace(config, task=TaskConfig(name="classify", train=str(tmp_path / "other.csv")))
    with pytest.raises(ConfigError, match="labels ja, nein are not those of step 62, no, yes"):
        train(other, str(workdir))
    assert (workdir / "config.json").read_bytes() == before
    small = tmp_path / "vocab.txt"
    small.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    clash = dataclasses.replace(config, data=DataConfig(max_seq_len=64, tokenizer=str(small)))
    with pytest.raises(ConfigError, match="not the tokenizer of the weights"):
        train(clash, str(tmp_path / "clash"))


@pytest.mark.parametrize("labels, taken", [(("no", "yes"), True), (("ja", "nein"), False)], ids=str)
def test_a_classifier_of_other_labels_is_not_taken_over(labels, taken, small_config):
    params = jax.jit(lambda key: classify.init(small_config.model, 2, key))(jax.random.key(0))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
    state = TrainState(step=0, params=params, opt_state=())
    model = Model(weights, small_config.model, "", ("no", "yes"))
    found = start_from(state, model, None, labels, PROBLEMS[0]).params
    same = np.array_equal(found["classifier"]["dense"]["kernel"], weights["classifier"]["dense"]["kernel"])
    assert same == taken
    np.testing.assert_array_equal(found["pooler"]["dense"]["kernel"], weights["pooler"]["dense"]["kernel"])


def test_label_order_is_numeric_then_alphabetic():
    examples = [Example("x", None, label, 0) for label in ("10", "2", "b", "a", "2")]
    assert classify.label_names("t", examples) == ("2", "10", "a", "b")
