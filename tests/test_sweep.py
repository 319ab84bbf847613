"""Sweeps and what they choose by: grids, seeds, the best on dev, early stopping, going on after a kill."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from bert_jax import checkpoint, convert, sweep
from bert_jax import train as train_module
from bert_jax.config import Config, DataConfig, OptimizerConfig, SweepConfig, TaskConfig, TrainConfig, faults
from bert_jax.errors import ConfigError
from bert_jax.sharding import named_leaves
from bert_jax.tasks import classify
from bert_jax.train import train
from tests.test_classify import labelled, write_rows

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(small_config, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    paths = {
        part: write_rows(folder / f"{part}.csv", labelled(count, seed))
        for seed, (part, count) in enumerate({"train": 80, "dev": 40, "test": 20}.items())
    }
    return Config(
        model=dataclasses.replace(small_config.model, num_layers=1),
        data=DataConfig(max_seq_len=16, tokenizer=str(tokenizer_folder)),
        task=TaskConfig(name="classify", **paths),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=2, log_every=5),
    )


def replaced(config, **train_fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_fields))


def test_every_point_with_every_seed(config):
    asked = dataclasses.replace(
        config, sweep=SweepConfig(learning_rate=(5e-5, 3e-5), batch_size=(16, 32), num_epochs=(2, 3), seeds=(0, 1, 2))
    )
    runs = sweep.runs_of(asked)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 3
    last = runs[-1]
    assert last.name == "lr3e-05-batch32-epochs3-seed2" and not sweep.is_sweep(last.config)
    assert (last.config.optimizer.learning_rate, last.config.train.seed) == (3e-5, 2)


def test_the_point_with_the_best_mean_and_its_best_seed_are_chosen(config):
    runs = sweep.runs_of(dataclasses.replace(config, sweep=SweepConfig(learning_rate=(1e-3, 2e-3), seeds=(0, 1))))
    dev = [0.9, 0.1, 0.6, 0.7]  # the best single run is not of the best point
    results = [{"metrics": {"dev": {"accuracy": value}}} for value in dev]
    best, summary = sweep.choose(runs, results, "accuracy")
    assert best == 3 and summary["learning_rate"] == 2e-3 and summary["seeds"] == 2
    assert summary["mean"]["dev"]["accuracy"] == pytest.approx(0.65)
    assert summary["standard_deviation"]["dev"]["accuracy"] == pytest.approx(np.std([0.6, 0.7], ddof=1))


def test_a_sweep_goes_on_where_it_was_and_ends_in_one_table(config, tmp_path, monkeypatch, capsys):
    asked = dataclasses.replace(config, sweep=SweepConfig(learning_rate=(1e-4, 3e-3), seeds=(0, 1)))
    workdir, done = tmp_path / "sweep", []
    real = train_module.train

    def counted(one, folder, **more):
        done.append(folder)
        if len(done) == 3:
            raise KeyboardInterrupt  # as a kill would end it, in the third run
        return real(one, folder, **more)

    monkeypatch.setattr(train_module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(asked, str(workdir))
    assert not (workdir / "results.json").exists()
    assert sweep.sweep(asked, str(workdir)) == 0
    assert len(done) == 5 and done[3] == done[2]  # the two that were done are not run again
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3 and "accuracy x 100" in printed
    with open(workdir / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    results = json.loads((workdir / "results.json").read_text())
    points = [rows[:2], rows[2:]]
    chosen = max(points, key=lambda point: sum(float(row["dev/accuracy"]) for row in point))
    best = max(chosen, key=lambda row: float(row["dev/accuracy"]))
    assert results["sweep"]["learning_rate"] == float(best["learning_rate"]) and results["seed"] == int(best["seed"])
    assert results["metrics"]["test"]["accuracy"] == float(best["test/accuracy"])
    name = f"lr{float(best['learning_rate']):g}-batch16-epochs2-seed{best['seed']}"
    of_best = workdir / "runs" / name / "model" / "model.safetensors"
    assert (workdir / "model" / "model.safetensors").read_bytes() == of_best.read_bytes()
    wider = dataclasses.replace(asked, sweep=SweepConfig(learning_rate=(1e-4, 3e-3), seeds=(0, 1, 2)))
    assert sweep.sweep(wider, str(workdir)) == 0 and len(done) == 7  # the grid may grow
    with pytest.raises(ConfigError, match="its runs were made otherwise .task.max_train_examples: 0 -> 40"):
        sweep.sweep(
            dataclasses.replace(asked, task=dataclasses.replace(asked.task, max_train_examples=40)), str(workdir)
        )


def test_the_best_on_dev_is_exported_and_survives_a_resume(config, tmp_path):
    """Evaluations every two steps; dev is best somewhere, and that checkpoint stays though only one is kept."""
    one = replaced(config, select="best", eval_every=2, save_every=2, keep=1, num_epochs=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(one, str(whole)) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    best = json.loads((whole / "best.json").read_text())
    assert best == {"step": max(scores, key=scores.get), "metric": "accuracy", "value": max(scores.values())}
    results = json.loads((whole / "results.json").read_text())
    assert results["step"] == best["step"] and results["metrics"]["dev"]["accuracy"] == best["value"]
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {str(best["step"]), "20"}
    exported = named_leaves(convert.load_model(str(whole)).params)
    params, _ = checkpoint.load_params(str(whole / "checkpoints" / str(best["step"])))
    np.testing.assert_array_equal(exported["layers/mlp/wi/kernel"], params["layers"]["mlp"]["wi"]["kernel"])
    # Stopped in the middle and gone on: a run of 10 steps that is then asked for 20 has another schedule, so cut here.
    assert train(one, str(broken)) == 0
    for path in (broken / "results.json", broken / "best.json"):
        path.unlink()
    for step in checkpoint.steps(str(broken / "checkpoints")):
        if step > best["step"]:
            (broken / "checkpoints" / str(step)).rename(tmp_path / f"gone{step}")
    assert train(one, str(broken)) == 0
    assert json.loads((broken / "results.json").read_text()) == results


def test_early_stopping_waits_as_long_as_it_is_told(config, tmp_path):
    still = dataclasses.replace(config.optimizer, learning_rate=1e-9)  # dev never gets better
    one = dataclasses.replace(
        replaced(config, select="best", eval_every=2, early_stop=3, num_epochs=10), optimizer=still
    )
    assert train(one, str(tmp_path / "run")) == 0
    assert checkpoint.steps(str(tmp_path / "run" / "checkpoints"))[0] == 8  # best at 2, then three more
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["step"] == 2 and set(results["metrics"]) == {"dev", "test"}
    assert train(one, str(tmp_path / "run")) == 0  # it does not go on either
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_top_layers_can_be_made_anew(config, small_config, tmp_path):
    whole = dataclasses.replace(config, model=small_config.model)
    assert train(replaced(whole, num_epochs=1), str(tmp_path / "first")) == 0
    one = replaced(whole, num_epochs=0.01, init_from=str(tmp_path / "first"), reinit_layers=1)
    frozen = dataclasses.replace(one, optimizer=OptimizerConfig(learning_rate=1e-12, warmup_steps=1))
    assert train(frozen, str(tmp_path / "second")) == 0
    with pytest.raises(ConfigError, match="train.reinit_layers: 3, the weights have 2 layers"):
        train(dataclasses.replace(frozen, train=dataclasses.replace(one.train, reinit_layers=3)), str(tmp_path / "no"))
    before, after = (named_leaves(convert.load_model(str(tmp_path / name)).params) for name in ("first", "second"))
    same = [
        np.allclose(before[name], after[name], atol=1e-8) for name in ("pooler/dense/kernel", "embeddings/norm/scale")
    ]
    assert same == [False, True]
    kernels = before["layers/mlp/wi/kernel"], after["layers/mlp/wi/kernel"]
    assert [np.allclose(a, b, atol=1e-8) for a, b in zip(*kernels, strict=True)] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"early_stop": 2}},
        {"train": {"select": "best"}},
        {"train": {"reinit_layers": 1}},
        {"train": {"select": "best", "eval_every": 2}, "task": {"name": "pretrain"}},
        {"sweep": {"seeds": (0, 1)}, "task": {"dev": ""}},
        {"sweep": {"num_epochs": (0.0,)}},
        {"sweep": {"learning_rate": ("x",)}},
        {"task": {"multi_label": True, "name": "regress"}},
        {"task": {"name": "pretrain"}, "sweep": {"seeds": (0, 1)}},
    ],
    ids=str,
)
def test_wrong_wishes_are_faults(config, changes):
    wrong = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **its) for part, its in changes.items()}
    )
    assert faults(config) == [] and faults(wrong)


def test_numbers_and_several_labels_from_tables_to_results(config, tmp_path):
    cells = {"yes": ("1.5", "a,b"), "no": ("-0.5", "")}
    rows = [(text, *cells[label]) for text, label in labelled(120, 0)]
    path = write_rows(tmp_path / "t.tsv", rows, ("text", "number", "kinds"))
    for name, column, several in (("regress", "number", False), ("classify", "kinds", True)):
        task = TaskConfig(name=name, train=path, dev=path, label_column=column, multi_label=several)
        one = replaced(dataclasses.replace(config, task=task), num_epochs=12)
        assert train(one, str(tmp_path / name)) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())["metrics"]["dev"]
        settings = json.loads((tmp_path / name / "model" / "config.json").read_text())
        written = (tmp_path / name / "predictions" / "dev.tsv").read_text().splitlines()
        assert len(written) == 121
        if several:
            assert settings["id2label"] == {"0": "a", "1": "b"} and results["f1"] > 0.7
            assert settings["problem_type"] == classify.SEVERAL
        else:
            assert results["spearman"] > 0.5 and set(results) == {"loss", "pearson", "spearman"}
            assert settings["problem_type"] == classify.NUMBER and settings["id2label"] == {"0": "number"}


def test_a_regression_begins_at_the_mean_unless_weights_say_more(config, tmp_path):
    rows = [(f"the function {number}", f"{number}") for number in (1, 2, 6)]
    path = write_rows(tmp_path / "t.csv", rows)
    still = OptimizerConfig(learning_rate=1e-12, warmup_steps=1)
    one = dataclasses.replace(config, task=TaskConfig(name="regress", train=path, dev=path), optimizer=still)
    assert train(replaced(one, num_epochs=1), str(tmp_path / "first")) == 0
    found = named_leaves(convert.load_model(str(tmp_path / "first")).params)["classifier/dense/bias"]
    assert found == pytest.approx(3)
    other = write_rows(tmp_path / "o.csv", [("the function", "10"), ("a value", "20")])
    two = dataclasses.replace(one, task=TaskConfig(name="regress", train=other, dev=other))
    assert train(replaced(two, num_epochs=1, init_from=str(tmp_path / "first")), str(tmp_path / "second")) == 0
    found = named_leaves(convert.load_model(str(tmp_path / "second")).params)["classifier/dense/bias"]
    assert found == pytest.approx(3)
