"""The loop end to end: resume bit for bit, stop on signals, learn, and leave what the contract says."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bert_jax import checkpoint, train_state
from bert_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, cache_folder
from bert_jax.data import pipeline
from bert_jax.data.prepare import load_manifest, prepare
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.errors import CheckpointError, ConfigError, NonFiniteLossError
from bert_jax.recorder import Clock, cut_metrics
from bert_jax.tasks import pretrain
from bert_jax.train import lock, train
from tests.conftest import QUICKLY

STEPS = 200
ROOT = Path(__file__).parent.parent


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def final_params(workdir) -> dict:
    folder = checkpoint.checkpoints_folder(workdir)
    return checkpoint.load_params(os.path.join(folder, str(checkpoint.steps(folder)[0])))[0]


def command(workdir, config, *more) -> list[str]:
    """The command line of a run in a process of its own, on one device."""
    flags = [
        f"--model.{name}={getattr(config.model, name)}"
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "max_position_embeddings")
    ]
    flags += [f"--data.path={config.data.path}", f"--data.max_seq_len={config.data.max_seq_len}"]
    flags += [f"--train.num_steps={STEPS}", "--train.global_batch_size=16", "--train.log_every=1"]
    flags += ["--train.save_every=20", "--train.eval_batches=2"]
    tiny = ROOT / "configs" / "tiny.py"
    return [sys.executable, "-m", "bert_jax.train", "--config", str(tiny), "--workdir", str(workdir), *flags, *more]


def start(workdir, config, *more) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    return subprocess.Popen(
        command(workdir, config, *more),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def signal_at(process, workdir, step, number) -> tuple[int, str]:
    """Sends a signal once `step` stands in metrics.jsonl; returns exit code and stderr."""
    path = Path(workdir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_stopped_three_times_and_resumed_is_bit_identical(small_config, tmp_path):
    """Ctrl-C, SIGTERM and kill -9 against an uninterrupted run: every step's row and the final parameters."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(whole, small_config)
    assert signal_at(start(broken, small_config), broken, 37, signal.SIGINT)[0] == 130
    code, errors = signal_at(start(broken, small_config), broken, 75, signal.SIGTERM)
    assert code == 143 and "resumed at step" in errors and "saved step" in errors
    assert signal_at(start(broken, small_config), broken, 131, signal.SIGKILL)[0] == -signal.SIGKILL
    last = start(broken, small_config, "--resume", "must")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert re.search(r"resumed at step 1[0-3]\d\b", errors)
    _, errors = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, errors

    exact = ("step", "loss", "learning_rate", "grad_norm", "masked_lm_loss", "next_sentence_accuracy")
    rows = {
        name: [tuple(row[key] for key in exact) for row in metrics_of(name) if "loss" in row]
        for name in (whole, broken)
    }
    assert [row[0] for row in rows[whole]] == list(range(1, STEPS + 1))
    assert rows[broken] == rows[whole]
    for one, other in zip(jax.tree.leaves(final_params(whole)), jax.tree.leaves(final_params(broken)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert json.loads((whole / "results.json").read_text()) == json.loads((broken / "results.json").read_text())


def test_sigterm_before_the_first_step_ends_it_at_once(small_config, tmp_path):
    process = start(tmp_path / "run", small_config)
    for line in process.stderr:
        if line.startswith("pretrain:"):  # data is there; parameters are not made yet
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopp" in errors, errors


def test_a_run_leaves_what_the_contract_says(small_config, tmp_path):
    workdir = tmp_path / "run"
    assert train(small_config, str(workdir)) == 0
    for name in (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "tb",
        "checkpoints/20",
        "model/model.safetensors",
        "model/config.json",
        "model/vocab.txt",
        "model/tokenizer_config.json",
        "results.json",
    ):
        assert (workdir / name).exists(), name
    row = next(row for row in metrics_of(workdir) if row["step"] == 20 and "loss" in row)
    for key in (
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "examples_per_second",
        "real_tokens_per_second",
        "data_wait_fraction",
        "masked_lm_loss",
        "masked_lm_accuracy",
        "next_sentence_loss",
        "next_sentence_accuracy",
    ):
        assert math.isfinite(row[key]), key
    assert [row["step"] for row in metrics_of(workdir) if row.get("first_step_seconds", 0) > 0] == [1]
    evaluation = next(row for row in metrics_of(workdir) if "eval/masked_lm_loss" in row)
    results = json.loads((workdir / "results.json").read_text())
    assert results["task"] == "pretrain" and results["step"] == 20 and results["seed"] == 0
    assert results["metrics"]["eval"]["masked_lm_loss"] == evaluation["eval/masked_lm_loss"]
    # A finished run has nothing left to do, and says the same again.
    assert train(small_config, str(workdir)) == 0
    assert json.loads((workdir / "results.json").read_text()) == results
    with pytest.raises(ConfigError, match="--resume never"):
        train(small_config, str(workdir), resume="never")
    # A damaged newest step is left out, set aside, and made again.
    file = next(path for path in (workdir / "checkpoints" / "20").rglob("d/*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    assert train(small_config, str(workdir)) == 0
    assert json.loads((workdir / "results.json").read_text()) == results
    assert (workdir / "checkpoints" / "20.unusable").is_dir()


def test_the_first_step_is_timed_from_the_command_on(small_config, tmp_path, monkeypatch):
    """It cannot be over before the parameters are there."""
    made, create_state = [], train_state.create_state

    def timed(*args):
        state = create_state(*args)
        made.append(time.perf_counter())
        return state

    monkeypatch.setattr(train_state, "create_state", timed)
    began = time.perf_counter()
    train(small_config, str(tmp_path / "run"))
    first = next(row["first_step_seconds"] for row in metrics_of(tmp_path / "run") if "first_step_seconds" in row)
    assert made[0] - began < first < time.perf_counter() - began


def test_runs_that_differ_in_seed_rate_and_length_share_programs(small_config, tmp_path):
    """The second one compiles nothing that takes time; and the first and later steps of a run are one program."""

    def programs():
        return {path.name for path in (cache_folder() / "xla").glob("jit_step-*-cache")}

    model = dataclasses.replace(small_config.model, mlp_dim=72)  # no other test's
    kept = [programs()]
    for count in (2, 3):
        settings = dataclasses.replace(small_config.train, seed=count, num_steps=count)
        optimizer = dataclasses.replace(small_config.optimizer, learning_rate=count * 1e-3)
        config = dataclasses.replace(small_config, model=model, train=settings, optimizer=optimizer)
        train(config, str(tmp_path / str(count)))
        kept.append(programs())
    before, first, second = kept
    assert len(first - before) == 1 and first == second


def test_what_no_run_has_made_is_not_overwritten(small_config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="its model are no run's"):
        train(small_config, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.txt"]


def test_rows_of_metrics_that_are_none_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n5\n[]\n{"step": "x"}\n{"a\xff": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(str(path), 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_settings_of_prepared_rows_are_theirs(small_config, capsys):
    asked = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, pack=False))
    assert pretrain.complete(asked, "").data.pack
    assert "was prepared with pack True, eval_fraction 0.05, which this run cannot change" in capsys.readouterr().err


def test_two_runs_do_not_share_a_workdir(small_config, tmp_path):
    with contextlib.closing(lock(str(tmp_path))), pytest.raises(ConfigError, match="another run"):
        train(small_config, str(tmp_path))


def test_a_resume_that_cannot_go_on_changes_nothing(small_config, tmp_path):
    workdir = tmp_path / "run"
    assert train(small_config, str(workdir)) == 0
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    wider = dataclasses.replace(small_config, model=dataclasses.replace(small_config.model, mlp_dim=128))
    with pytest.raises(CheckpointError, match="another --workdir"):
        train(wider, str(workdir))
    shorter = dataclasses.replace(small_config, train=dataclasses.replace(small_config.train, num_steps=4))
    with pytest.raises(ConfigError, match="train.num_steps: 4, but the workdir is at step 20"):
        train(shorter, str(workdir))
    assert {path: path.read_bytes() for path in files} == files


def test_rows_of_another_tokenizer_are_refused(small_config, corpus, tokenizer, tmp_path):
    """The same number of pieces, and other pieces."""
    vocabulary = tmp_path / "vocab.txt"
    pieces = [tokenizer.id_to_token(number) for number in range(tokenizer.vocab_size)]
    vocabulary.write_text("\n".join([*pieces[:5], *reversed(pieces[5:])]) + "\n", encoding="utf-8")
    other = load_tokenizer(vocabulary, lowercase=True, strip_accents=True)
    other.save(tmp_path / "other")
    data = dataclasses.replace(small_config.data, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="data.tokenizer: .* was prepared with another"):
        train(dataclasses.replace(small_config, data=data), str(tmp_path / "run"))
    workdir = tmp_path / "resumed"
    assert train(small_config, str(workdir)) == 0
    rows = DataConfig(max_seq_len=64, documents="blank-line", workers=1)
    prepare([str(corpus)], tmp_path / "rows", tokenizer=other, data=rows, report=False)
    data = dataclasses.replace(small_config.data, path=str(tmp_path / "rows"))
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        train(dataclasses.replace(small_config, data=data), str(workdir))


def test_a_kill_in_the_first_save_starts_anew(small_config, tmp_path):
    torn = tmp_path / "run" / "checkpoints" / "10"
    torn.mkdir(parents=True)
    (torn / "something").write_text("half")
    assert train(small_config, str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "checkpoints" / "10.unusable").is_dir()


@pytest.mark.parametrize("rate, steps", [(1e38, 1), (1e30, 3)])
def test_weights_past_all_bounds_are_never_saved(small_config, tmp_path, rate, steps):
    hot = dataclasses.replace(
        small_config,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=0, schedule="constant"),
        train=dataclasses.replace(small_config.train, num_steps=steps, save_every=1),
    )
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        train(hot, str(tmp_path))
    assert checkpoint.steps(checkpoint.checkpoints_folder(tmp_path)) == []
    assert not (tmp_path / "results.json").exists()


def test_a_full_disk_is_a_storage_error(small_config, tmp_path):
    words = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command(tmp_path / "run", small_config)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": QUICKLY}, timeout=120, cwd=ROOT
    )
    assert done.returncode == 5, done.stderr[-2000:]
    assert "cannot be written" in done.stderr.splitlines()[-1]  # TensorStore's own threads may print before it


def test_resume_must_find_something(small_config, tmp_path):
    with pytest.raises(CheckpointError, match="--resume must"):
        train(small_config, str(tmp_path / "empty"), resume="must")


def test_a_loss_that_is_not_finite_ends_the_run_without_saving_it(small_config, tmp_path):
    hot = dataclasses.replace(
        small_config, optimizer=OptimizerConfig(learning_rate=1e20, warmup_steps=0, clip_norm=0.0, schedule="constant")
    )
    with pytest.raises(NonFiniteLossError, match="loss (nan|inf)"):
        train(hot, str(tmp_path / "hot"))
    for step in checkpoint.steps(checkpoint.checkpoints_folder(tmp_path / "hot")):
        params = checkpoint.load_params(str(tmp_path / "hot" / "checkpoints" / str(step)))[0]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("change", [{"global_batch_size": 12}, {"global_batch_size": 20}], ids=str)
def test_a_batch_that_devices_cannot_share(small_config, tmp_path, change):
    config = dataclasses.replace(small_config, train=dataclasses.replace(small_config.train, **change))
    with pytest.raises(ConfigError, match="train.global_batch_size.*8 devices"):
        train(config, str(tmp_path / "run"))


def test_rows_that_do_not_fit_the_configuration(small_config, tmp_path):
    for section, change in (("model", {"vocab_size": 500}), ("data", {"max_seq_len": 32})):
        config = dataclasses.replace(
            small_config, **{section: dataclasses.replace(getattr(small_config, section), **change)}
        )
        with pytest.raises(ConfigError, match=f"{section}.{next(iter(change))}"):
            train(config, str(tmp_path / "run"))


def unigram_loss(prepared, small_config, tokenizer) -> float:
    """Mean negative log-probability of the held-out targets under the token frequencies of the training rows."""
    manifest = load_manifest(prepared)
    rows, held_out = (pipeline.open_rows(prepared, manifest, split) for split in ("train", "eval"))
    vocabulary = pipeline.masking_vocabulary(tokenizer, whole_words=False)
    ids = rows.read(np.arange(len(rows)))["input_ids"].ravel()
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)[: tokenizer.vocab_size] + 1.0
    counts[~vocabulary.regular] = 0
    frequency = counts / counts.sum()
    batches = list(pipeline.eval_batches(held_out, vocabulary, small_config.data, 64))
    targets = np.concatenate([batch["masked_lm_ids"][batch["masked_lm_weights"] > 0] for batch in batches])
    return float(-np.log(frequency[targets]).mean())


def test_it_learns_more_than_token_frequencies(small_config, prepared, tokenizer, tmp_path):
    config = dataclasses.replace(
        small_config,
        model=ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            mlp_dim=512,
            max_position_embeddings=64,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        train=TrainConfig(global_batch_size=32, num_steps=300, log_every=50),
    )
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"from bert_jax.config import *\n\ndef get_config():\n    return {config!r}\n")
    words = [sys.executable, "-m", "bert_jax.train", "--config", recipe, "--workdir", tmp_path / "run"]
    # On one device, by optimised programs: this one computes.
    subprocess.run(words, env={**os.environ, "XLA_FLAGS": ""}, cwd=ROOT, check=True, capture_output=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["eval"]["masked_lm_loss"] < unigram_loss(prepared, small_config, tokenizer) - 0.1


def test_laps_leave_no_time_out(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = Clock()  # at 0
    clock.tokens += 7
    with clock.excluding():  # from 1 to 2
        pass
    first, second = clock.lap(), clock.lap()  # at 3, begun again at 4, and at 5
    assert (first.seconds, first.tokens) == (2.0, 7)
    assert (second.seconds, second.tokens) == (1.0, 0)
