"""GLUE: official files with their quirks, TFDS, scores, the server's files, the paper's table."""

import json

import numpy as np
import pytest

from bert_jax import sweep
from bert_jax.config import GLUE, Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig
from bert_jax.errors import DataError
from bert_jax.tasks import classify, glue
from bert_jax.train import main, task_module, train

pytestmark = pytest.mark.usefixtures("one_device")

WORDS = ("good value", "bad error", "the function returns", "a list of names")


def line(*cells):
    return "\t".join(map(str, cells)) + "\n"


def official(folder, count=12):
    """The nine folders as GLUE publishes them, small."""
    text = [f'{WORDS[i % 4]} number {i} "open' for i in range(count)]
    entail = ["entailment", "not_entailment"]

    def write(name, file, header, rows):
        (folder / name).mkdir(parents=True, exist_ok=True)
        body = "".join(line(*row) for row in rows)
        (folder / name / f"{file}.tsv").write_bytes((line(*header) if header else "").encode() + body.encode())

    for file in ("train", "dev"):
        write("CoLA", file, None, [("gj04", i % 2, "*" if i % 2 else "", t) for i, t in enumerate(text)])
        write("SST-2", file, ("sentence", "label"), [(t, i % 2) for i, t in enumerate(text)])
        header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        write("MRPC", file, header, [(i % 2, 7, 8, t, t[::-1]) for i, t in enumerate(text)])
        header = [
            "index",
            "genre",
            "filename",
            "year",
            "old_index",
            "source1",
            "source2",
            "sentence1",
            "sentence2",
            "score",
        ]
        write("STS-B", file, header, [(i, *"abcdef", t, t, f"{i % 6}.000") for i, t in enumerate(text)])
        rows = [(i, 1, 2, t, t, i % 2) for i, t in enumerate(text)]
        write("QQP", file, ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], [*rows, (99, 1, "torn")])
        for name, first, second in (("QNLI", "question", "sentence"), ("RTE", "sentence1", "sentence2")):
            write(name, file, ("index", first, second, "label"), [(i, t, t, entail[i % 2]) for i, t in enumerate(text)])
        write(
            "WNLI", file, ["index", "sentence1", "sentence2", "label"], [(i, t, t, i % 2) for i, t in enumerate(text)]
        )
    names = ["contradiction", "entailment", "neutral"]
    for file in ("train", "dev_matched", "dev_mismatched"):
        rows = [(i, t, t, names[i % 3]) for i, t in enumerate(text)]
        write("MNLI", file, ["index", "sentence1", "sentence2", "gold_label"], [*rows, (98, "x", "y", "-")])
    for file in ("test_matched", "test_mismatched"):
        write("MNLI", file, ["index", "sentence1", "sentence2"], [(i, t, t) for i, t in enumerate(text)])
    write("CoLA", "test", ("index", "sentence"), list(enumerate(text)))
    write("STS-B", "test", ["index", "genre", "sentence1", "sentence2"], [(i, "a", t, t) for i, t in enumerate(text)])
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return official(tmp_path_factory.mktemp("glue"))


def test_official_files_with_their_quirks(folder, capsys):
    for name in GLUE:
        spec = glue.SPECS[name]
        found = glue.read_split(name, "train", folder)
        assert len(found.examples) == 12 and found.labelled  # torn lines and "-" are left out
        assert found.examples[1].text == 'bad error number 1 "open'
        assert (found.examples[0].pair is None) == (len(spec.texts) == 1)
        wanted = classify.targets(glue.problem_of(name), found, spec.labels)
        assert len(wanted) == 12 and (glue.problem_of(name) == classify.NUMBER or set(wanted) <= {0, 1, 2})
        assert glue.read_split(name, "train", f"{folder}/{spec.folder}").examples == found.examples
    assert "QQP/train.tsv: 1 lines have too few cells" in capsys.readouterr().err
    assert glue.read_split("cola", "train", folder).examples[0].line == 1
    assert glue.read_split("cola", "test", folder).examples[0].text == 'good value number 0 "open'
    assert not glue.read_split("mnli", "test_matched", folder).labelled


def test_files_that_are_not_glue_s(folder, tmp_path):
    with pytest.raises(DataError, match="train.tsv: no such file"):
        glue.read_split("rte", "train", str(tmp_path))
    (tmp_path / "train.tsv").write_text("a\tb\nc\td\n")
    with pytest.raises(DataError, match="line 1: no column 'sentence1' among a, b"):
        glue.read_split("rte", "train", str(tmp_path))
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tx\n")
    with pytest.raises(DataError, match="line 2: 2 cells, not the header's 4"):
        glue.read_split("rte", "train", str(tmp_path))


def test_scores_are_those_of_the_leaderboard():
    logits, labels = np.array([[0, 1], [1, 0], [0, 1], [0, 1]]), np.array([1, 0, 0, 1])
    found = {"logits": logits, "labels": labels}
    assert set(glue.score("cola", found)) == {"matthews_correlation"}
    assert glue.score("mrpc", found) == {"f1": pytest.approx(0.8), "accuracy": 0.75}
    assert glue.score("rte", found) == {"accuracy": 0.75}
    numbers = {"logits": np.array([[1.0], [2.0], [4.0]]), "labels": np.array([0, 3, 5])}
    assert glue.score("stsb", numbers)["spearman"] == pytest.approx(1)


def test_files_that_the_server_takes(tmp_path):
    classes = {"logits": np.eye(3)[[0, 2]], "labels": np.zeros(2, int)}
    glue.write_predictions("mnli", str(tmp_path), "test_mismatched", classes)
    glue.write_predictions("mnli", str(tmp_path), "test", classes)
    assert (tmp_path / "MNLI-mm.tsv").read_text() == "index\tprediction\n0\tcontradiction\n1\tneutral\n"
    assert (tmp_path / "MNLI-m.tsv").exists()
    glue.write_predictions("stsb", str(tmp_path), "test", {"logits": np.array([[6.2], [-1], [2.5]])})
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n2\t2.500\n"
    glue.write_predictions("rte", str(tmp_path), "dev", {"logits": np.eye(2)})
    assert not (tmp_path / "RTE.tsv").exists() and (tmp_path / "dev.tsv").exists()


def test_the_paper_s_table():
    found = {name: {"dev": {"accuracy": 0.5, "f1": 0.5, "matthews_correlation": 0.5, "spearman": 0.5}} for name in GLUE}
    found["mnli"]["dev_mismatched"] = {"accuracy": 0.7}
    rows = sweep.paper_table(found).splitlines()
    assert rows[0].split(" | ")[1:3] == ["MNLI-m/mm", "QQP"]
    assert rows[2] == "| this run (dev) | 50.0/70.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 52.2 |"
    assert rows[3].endswith("84.6/83.4 | 71.2 | 90.5 | 93.5 | 52.1 | 85.8 | 88.9 | 66.4 | 79.6 |")


def test_averages_of_the_published_rows_are_theirs():
    """Which shows how the paper averages: both sets of MNLI count."""
    for both, *scores, average in sweep.PUBLISHED.values():
        mean = np.mean([*map(float, both.split("/")), *scores])
        assert mean == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_a_task_from_files_to_results(folder, small_config, tokenizer_folder, tmp_path, name):
    config = Config(
        model=small_config.model,
        data=DataConfig(max_seq_len=32, tokenizer=str(tokenizer_folder)),
        task=TaskConfig(name=name, data_dir=folder),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=8, num_epochs=1, log_every=1),
    )
    assert task_module(config) is glue
    assert train(config, str(tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = {"stsb": {"dev"}, "mnli": {"dev", "dev_mismatched"}}[name]
    assert results["task"] == name and set(results["metrics"]) == expected
    files = {path.name for path in (tmp_path / "run" / "predictions").iterdir()}
    assert files >= {"stsb": {"STS-B.tsv"}, "mnli": {"MNLI-m.tsv", "MNLI-mm.tsv"}}[name]
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert settings["problem_type"] == glue.problem_of(name)


def test_all_nine_in_one_command(folder, small_config, tokenizer_folder, tmp_path, capsys):
    path = tmp_path / "small.py"
    path.write_text(
        "from bert_jax.config import *\n"
        "def get_config():\n"
        "    return Config(\n"
        f"        model=ModelConfig(vocab_size={small_config.model.vocab_size}, hidden_size=16, num_layers=1,\n"
        "            num_heads=2, mlp_dim=16, max_position_embeddings=32),\n"
        f"        data=DataConfig(max_seq_len=16, tokenizer={str(tokenizer_folder)!r}),\n"
        f"        task=TaskConfig(name='all', data_dir={folder!r}),\n"
        "        train=TrainConfig(global_batch_size=8, num_epochs=0.7),\n"
        "    )\n"
    )
    words = ["--config", str(path), "--workdir", str(tmp_path / "run")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| this run (dev) |" in printed and "BERT-large (published, test)" in printed
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]) == set(GLUE)
    assert main(words) == 0  # all is done already
    assert capsys.readouterr().out == printed


def test_from_tfds_examples_come_in_glue_s_order(tmp_path, monkeypatch):
    """TFDS stores GLUE shuffled, and the server's files go by GLUE's own numbers."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Glue(tfds.core.GeneratorBasedBuilder):
            __module__ = "tiny"
            VERSION = tfds.core.Version("2.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="rte")]

            def _info(self):
                features = {"sentence1": tfds.features.Text(), "sentence2": tfds.features.Text(), "idx": np.int32}
                features["label"] = tfds.features.ClassLabel(names=["entailment", "not_entailment"])
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                def rows(known):
                    for i in range(12):
                        yield i, {"sentence1": f"{i}", "sentence2": "b", "idx": i, "label": i % 2 if known else -1}

                return {"train": rows(True), "validation": rows(True), "test": rows(False)}

            def _generate_examples(self):
                raise NotImplementedError

    Glue(config="rte", data_dir=str(tmp_path)).download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for split in ("dev", "test"):
        found = glue.read_split("rte", split, "")
        assert [example.text for example in found.examples] == [str(number) for number in range(12)]
        assert found.labelled == (split == "dev")
    assert [example.label for example in glue.read_split("rte", "dev", "").examples][:2] == [
        "entailment",
        "not_entailment",
    ]
