"""Words: CoNLL files, windows in which each is scored once, entities as conlleval counts them, a run to results."""

import json
import random

import numpy as np
import pytest

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig
from bert_jax.errors import DataError
from bert_jax.tasks import ner
from bert_jax.train import train

pytestmark = pytest.mark.usefixtures("one_device")

# Labels of a sentence, and its entities as conlleval.pl (CoNLL-2003) reads them.
READINGS = [
    ("B-X I-X O B-X", [("X", 0, 2), ("X", 3, 4)]),
    ("I-X I-X O I-X", [("X", 0, 2), ("X", 3, 4)]),  # IOB1
    ("I-X B-X I-X", [("X", 0, 1), ("X", 1, 3)]),  # IOB1: neighbours of one kind
    ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
    ("B-X I-Y", [("X", 0, 1), ("Y", 1, 2)]),
    ("I-X I-Y I-X", [("X", 0, 1), ("Y", 1, 2), ("X", 2, 3)]),
    ("O O", []),
    ("O I-X", [("X", 1, 2)]),
    ("B-A-B I-A-B", [("A-B", 0, 2)]),
    ("PER PER O LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
]


@pytest.mark.parametrize("labels, expected", READINGS)
def test_entities_are_conlleval_s(labels, expected):
    assert ner.entities(labels.split()) == [ner.Entity(*entity) for entity in expected]


def test_scores_count_whole_entities():
    real = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"], ["O"]]
    found = [["B-X", "O", "O", "B-Y"], ["B-X", "B-X"], ["O"]]
    scores = ner.score_entities(real, found)  # right: Y and the second sentence's X; found 4, real 3
    assert scores == {"precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)}
    nothing = [["O"] * 4, ["O"] * 2, ["O"]]
    zeros = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert ner.score_entities(real, nothing) == ner.score_entities(nothing, found) == zeros
    assert ner.score_entities(nothing, nothing) == zeros


def test_conll_files_in_their_forms(tmp_path):
    path = tmp_path / "t.conll"
    path.write_bytes(
        "\ufeff-DOCSTART- -X- O O\r\n\r\nEU NNP I-NP B-ORG\r\nrejects VBZ O\r\n\r\n\r\nS\u00e3o\tB-LOC\n".encode()
    )
    found = ner.read_sentences(str(path))
    assert found == [
        ner.Sentence(["EU", "rejects"], ["B-ORG", "O"], 3),
        ner.Sentence(["S\u00e3o"], ["B-LOC"], 7),
    ]
    assert ner.label_names("t", found) == ("O", "B-LOC", "B-ORG")
    assert [row.tolist() for row in ner.label_numbers("t", found, ("O", "B-LOC", "B-ORG"))] == [[2, 0], [1]]
    with pytest.raises(DataError, match="t: line 7: label 'B-LOC' is not among"):
        ner.label_numbers("t", found, ("O", "B-ORG"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"word\n", "line 1: 'word' has no label"),
        (b"\n\n", "no sentences"),
        (b"caf\xe9 O\n", "not UTF-8"),
        (None, "no such file"),
        (b"a O\nb O\n", "every word has the label 'O'"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, content, message):
    path = tmp_path / "t.conll"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        ner.label_names(str(path), ner.read_sentences(str(path)))


@pytest.mark.parametrize("longest", [16, 64])
def test_each_word_is_scored_once_whatever_the_windows(tokenizer, longest):
    rng = random.Random(0)
    words = [
        "value",
        "caf\u00e9",
        "unbelievable",
        "\u6211\u5728",
        "x" * 150,
        "\u200b",
        "na\u00efve",
        "antidisestablishmentarianism",
    ]
    sentences = [[rng.choice(words) for _ in range(rng.randrange(1, 90))] for _ in range(20)]
    labels = [np.array([rng.randrange(1, 5) for _ in mine], np.int32) for mine in sentences]
    shown = ner.featurize(ner.word_ids(sentences, tokenizer), tokenizer, longest)
    assert max(len(ids) for ids in shown.features.ids) <= longest
    targets = ner.piece_labels(shown, labels)
    assert sum(weights.sum() for weights in targets["label_weights"]) == sum(map(len, sentences))
    found = ner.decode(shown, targets["labels"])
    for one, other in zip(found, labels, strict=True):
        np.testing.assert_array_equal(one, other)
    for numbers, mine in zip(shown.of_sentence, sentences, strict=True):
        if len(numbers) == 1:
            assert targets["label_weights"][numbers[0]].sum() == len(mine)


def test_it_learns_names_and_writes_them(small_config, tokenizer_folder, tmp_path):
    """Here "value" begins a name, and "list" behind it is its second word."""
    rng, paths = random.Random(0), {}
    for part, count in (("train", 300), ("dev", 50), ("test", 20)):
        lines = []
        for _ in range(count):
            words = [rng.choice(["function", "object", "name", "error"]) for _ in range(rng.randrange(5, 12))]
            labels = ["O"] * len(words)
            place = rng.randrange(len(words) - 1)
            words[place : place + 2], labels[place : place + 2] = ["value", "list"], ["B-N", "I-N"]
            lines += [f"{word} x {label}" for word, label in zip(words, labels, strict=True)] + [""]
        paths[part] = str(tmp_path / f"{part}.conll")
        (tmp_path / f"{part}.conll").write_text("\n".join(lines))
    config = Config(
        model=small_config.model,
        data=DataConfig(max_seq_len=16, tokenizer=str(tokenizer_folder)),
        task=TaskConfig(name="ner", **paths),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=8, log_every=50),
    )
    workdir = tmp_path / "run"
    assert train(config, str(workdir)) == 0
    results = json.loads((workdir / "results.json").read_text())["metrics"]
    assert results["dev"]["f1"] > 0.8 and set(results["test"]) >= {"precision", "recall", "f1", "accuracy"}
    written = ner.read_sentences(str(workdir / "predictions" / "test.conll"))
    real = ner.read_sentences(paths["test"])
    assert [sentence.words for sentence in written] == [sentence.words for sentence in real]
    again = ner.score_entities([s.labels for s in real], [s.labels for s in written])
    assert again["f1"] == pytest.approx(results["test"]["f1"])
    settings = json.loads((workdir / "model" / "config.json").read_text())
    assert settings["architectures"] == ["BertForTokenClassification"]
    assert settings["id2label"] == {"0": "O", "1": "B-N", "2": "I-N"}
