"""Labelled texts from TFDS and from JSON with lists; the three kinds of file are in test_classify."""

import json

import numpy as np
import pytest

from bert_jax.config import TaskConfig
from bert_jax.data.tables import read_examples
from bert_jax.errors import DataError
from bert_jax.tasks import classify


def test_tfds_rows_have_labels_by_name(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_folder)
    found = read_examples("tfds:tiny/letters:train[:4]", TaskConfig(label_column="mark"))
    assert [example.label for example in found] == ["0", "1", "2", "3"]
    assert found[2].text.startswith("Letter 2 came.") and found[2].line == 3
    several = read_examples("tfds:tiny/letters:train", TaskConfig(label_column="kinds"))
    assert [several[number].label for number in (0, 1, 6, 7)] == [("even", "small"), ("small",), ("even",), ()]
    with pytest.raises(DataError, match="no column 'body'"):
        read_examples("tfds:tiny/letters:train", TaskConfig(text_column="body", label_column="mark"))
    with pytest.raises(DataError, match="'kinds' holds neither"):
        read_examples("tfds:tiny/letters:train", TaskConfig(text_column="kinds", label_column="mark"))


def test_lists_in_json_are_several_labels(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": []}, {"text": "z", "label": ["b"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(str(path), TaskConfig())
    assert classify.label_names("t", examples) == ("a", "b")
    np.testing.assert_array_equal(classify.label_matrix(examples, ("a", "b"), "t"), [[1, 1], [0, 0], [0, 1]])
    with pytest.raises(DataError, match="t: line 3: label 'b' is not among the training labels a, c"):
        classify.label_matrix(examples[2:], ("a", "c"), "t")


@pytest.mark.parametrize("label", ["nan", "inf", "x", "", ("1", "2")])
def test_what_is_no_number_is_told(tmp_path, label):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 1}) + "\n" + json.dumps({"text": "a", "label": label}) + "\n")
    examples = read_examples(str(path), TaskConfig())
    with pytest.raises(DataError, match="t.jsonl: line 2: .* is no finite number"):
        classify.numbers(examples, str(path))


def test_cells_with_separators_are_several_labels(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\nx,"a, b"\ny,\nz,b\n')
    found = classify.split_labels(read_examples(str(path), TaskConfig()), ",")
    assert [example.label for example in found] == [("a", "b"), (), ("b",)]


def test_xml_pairs_are_rows(tmp_path):
    path = tmp_path / "t.xml"
    rows = "".join(
        f'<pair entailment="{label}" id="{i}" similarity="{i}.5">\n <t>S\u00e3o &lt;{i}&gt;</t>\n <h>h{i}</h></pair>\n'
        for i, label in enumerate(("Entailment", "None"))
    )
    path.write_text(f"<?xml version='1.0' encoding='utf-8'?>\n<corpus>\n{rows}</corpus>\n", encoding="utf-8")
    columns = TaskConfig(text_column="t", text_pair_column="h", label_column="entailment")
    found = read_examples(str(path), columns)
    assert [tuple(example) for example in found] == [
        ("S\u00e3o <0>", "h0", "Entailment", 1),
        ("S\u00e3o <1>", "h1", "None", 2),
    ]
    path.write_text("<corpus><pair>", encoding="utf-8")
    with pytest.raises(DataError, match="not whole XML"):
        read_examples(str(path), columns)


def test_files_are_in_their_folder():
    task = TaskConfig(data_dir="d", train="a.csv", dev="/b.csv", test="tfds:x:test")
    assert task.files == {"train": "d/a.csv", "dev": "/b.csv", "test": "tfds:x:test"}
