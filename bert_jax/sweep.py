"""Many runs of one configuration: a grid with several seeds, chosen by dev (Devlin et al. 2019, A.3), and all of GLUE.

W/runs/NAME/     one run, as `train.py` leaves it; a finished one is not run again
W/sweep.csv      a line a run            W/results.json, W/model/   of the best run
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import shutil
import statistics
from typing import NamedTuple

from bert_jax import config as config_lib
from bert_jax.config import GLUE, Config
from bert_jax.errors import ConfigError, NonFiniteLossError
from bert_jax.progress import say

# Rows of table 1 of the paper, GLUE test: MNLI-m/mm, QQP F1, QNLI, SST-2, CoLA, STS-B, MRPC F1, RTE, average.
PUBLISHED = {
    "BERT-base (published, test)": ("84.6/83.4", 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4, 79.6),
    "BERT-large (published, test)": ("86.7/85.9", 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1, 82.1),
}
HARMLESS = frozenset({"log_every", "save_every", "keep", "workers"})  # settings that no score depends on
COLUMNS = ("MNLI-m/mm", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE", "Average")


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    point: tuple[float, int, float]
    """Learning rate, batch size, epochs."""
    seed: int
    config: Config


def is_sweep(config: Config) -> bool:
    """Whether the configuration asks for more than one run."""
    return any(dataclasses.astuple(config.sweep))


def runs_of(config: Config) -> list[Run]:
    """Every point of the grid with every seed; what the sweep does not name is as the configuration says."""
    sweep, optimizer, train = config.sweep, config.optimizer, config.train
    points = itertools.product(
        sweep.learning_rate or (optimizer.learning_rate,),
        sweep.batch_size or (train.global_batch_size,),
        sweep.num_epochs or (train.num_epochs,),
    )
    found = []
    for point, seed in itertools.product(points, sweep.seeds or (train.seed,)):
        rate, batch, epochs = point
        alone = dataclasses.replace(
            config,
            optimizer=dataclasses.replace(optimizer, learning_rate=rate),
            train=dataclasses.replace(train, global_batch_size=batch, num_epochs=epochs, seed=seed),
            sweep=config_lib.SweepConfig(),
        )
        found.append(Run(f"lr{rate:g}-batch{batch}-epochs{epochs:g}-seed{seed}", point, seed, alone))
    return found


def sweep(config: Config, workdir: str, *, resume: str = "auto", debug: bool = False) -> int:
    """Does the runs that are not done yet, then chooses. Returns the exit code of the run that stopped, or 0.

    Raises ConfigError when the workdir holds a sweep of another configuration.
    """
    from bert_jax import checkpoint, train

    runs = runs_of(config)
    for run in runs:
        config_lib.validate(run.config)
    train.check_ours(workdir)
    os.makedirs(workdir, exist_ok=True)
    with contextlib.closing(train.lock(workdir)):
        check_same(config, workdir)
        done, results = [], []
        for number, run in enumerate(runs, 1):
            folder = os.path.join(workdir, "runs", run.name)
            path = os.path.join(folder, "results.json")
            if not os.path.isfile(path):
                say(f"run {number} of {len(runs)}: {run.name}")
                try:
                    code = train.train(run.config, folder, resume=resume, debug=debug)
                except NonFiniteLossError as error:  # the others may do better
                    say(f"{run.name} is left out: {error}")
                    continue
                if code:
                    return code
            with open(path, encoding="utf-8") as file:
                results.append(json.load(file))
            done.append(run)
        if not done:
            raise NonFiniteLossError("sweep: no run came to its end; lower sweep.learning_rate")
        runs = done
        metric = results[0]["metric"]
        best, summary = choose(runs, results, metric)
        write_csv(os.path.join(workdir, "sweep.csv"), runs, results)
        copy_model(os.path.join(workdir, "runs", runs[best].name, "model"), os.path.join(workdir, "model"))
        checkpoint.write_json(os.path.join(workdir, "results.json"), results[best] | {"sweep": summary})
        print(table(runs, results, metric))
        say(f"best on dev: {runs[best].name}; its model is in {os.path.join(workdir, 'model')}")
    return 0


def check_same(config: Config, workdir: str) -> None:
    """Writes `sweep.json`, or raises ConfigError where it tells of another configuration (the grid itself may grow)."""
    from bert_jax.checkpoint import write_json

    path, asked = os.path.join(workdir, "sweep.json"), config_lib.to_dict(config)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            before = config_lib.from_dict(json.load(file))
        if changed := config_lib.differences(before, config, quiet=HARMLESS):
            raise ConfigError(f"--workdir {workdir}: its runs were made otherwise ({'; '.join(changed)}); take another")
    write_json(path, asked)


def choose(runs: list[Run], results: list[dict], metric: str) -> tuple[int, dict]:
    """Number of the best run: of the point with the best mean over seeds, the best seed; and that point's means."""
    points = {}
    for number, run in enumerate(runs):
        points.setdefault(run.point, []).append(number)
    dev = [result["metrics"]["dev"][metric] for result in results]
    point = max(points, key=lambda point: statistics.mean(dev[number] for number in points[point]))
    rate, batch, epochs = point
    mean, spread = averages([results[number]["metrics"] for number in points[point]])
    summary = {"learning_rate": rate, "batch_size": batch, "num_epochs": epochs, "seeds": len(points[point])}
    return max(points[point], key=dev.__getitem__), summary | {"mean": mean, "standard_deviation": spread}


def averages(metrics: list[dict[str, dict[str, float]]]) -> tuple[dict, dict]:
    """Mean and sample standard deviation (0 of one) of each score of each set."""
    mean = {
        part: {name: statistics.mean(one[part][name] for one in metrics) for name in scores}
        for part, scores in metrics[0].items()
    }
    spread = {
        part: {name: statistics.stdev([one[part][name] for one in metrics]) if metrics[1:] else 0.0 for name in scores}
        for part, scores in metrics[0].items()
    }
    return mean, spread


def write_csv(path: str, runs: list[Run], results: list[dict]) -> None:
    """A line a run: what was varied, then every score as `set/score`."""
    rows = []
    for run, result in zip(runs, results, strict=True):
        rate, batch, epochs = run.point
        scores = {f"{part}/{name}": value for part, its in result["metrics"].items() for name, value in its.items()}
        varied = {"learning_rate": rate, "batch_size": batch, "num_epochs": epochs, "seed": run.seed}
        rows.append(varied | {"step": result["step"]} | scores)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def copy_model(source: str, target: str) -> None:
    """Puts a copy of a model directory in place, whole or not at all."""
    from bert_jax.checkpoint import partial_folder

    partial = partial_folder(target)
    try:
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def table(runs: list[Run], results: list[dict], metric: str) -> str:
    """A line a point of the grid, best first: mean and standard deviation over the seeds, x 100."""
    points: dict[tuple, list[dict]] = {}
    for run, result in zip(runs, results, strict=True):
        points.setdefault(run.point, []).append(result["metrics"])
    rows = []
    for (rate, batch, epochs), metrics in points.items():
        mean, spread = averages(metrics)
        scores = "  ".join(
            f"{part} {100 * its[metric]:.1f} ± {100 * spread[part][metric]:.1f}"
            for part, its in mean.items()
            if metric in its
        )
        rows.append((mean["dev"][metric], f"  {rate:<8g} {batch:>5} {epochs:>6g} {len(metrics):>5}  {scores}"))
    lines = [line for _, line in sorted(rows, key=lambda row: -row[0])]
    return "\n".join([f"  rate     batch epochs seeds  {metric} x 100", *lines])


# All of GLUE


def suite(config: Config, workdir: str, *, resume: str = "auto", debug: bool = False) -> int:
    """Every task of GLUE in a folder of its own below `workdir`, then the paper's table of dev scores."""
    from bert_jax import train

    train.check_ours(workdir)
    os.makedirs(workdir, exist_ok=True)
    with contextlib.closing(train.lock(workdir)):
        check_same(config, workdir)
        return _suite(config, workdir, resume, debug)


def _suite(config: Config, workdir: str, resume: str, debug: bool) -> int:
    from bert_jax import checkpoint, train

    found = {}
    for name in GLUE:
        one = dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))
        config_lib.validate(one)
        folder = os.path.join(workdir, name)
        path = os.path.join(folder, "results.json")
        if is_sweep(one):
            code = sweep(one, folder, resume=resume, debug=debug)
        else:
            code = 0 if os.path.isfile(path) else train.train(one, folder, resume=resume, debug=debug)
        if code:
            return code
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        found[name] = result.get("sweep", {}).get("mean") or result["metrics"]
    summary = {"task": "all", "metrics": found, "seed": config.train.seed}
    checkpoint.write_json(os.path.join(workdir, "results.json"), summary)
    print(paper_table(found))
    return 0


def paper_table(found: dict[str, dict]) -> str:
    """Scores x 100 in the columns of table 1 of the paper, beside the published rows.

    As there, WNLI is left out and both sets of MNLI count in the average.
    """
    wanted = {
        "qqp": "f1",
        "qnli": "accuracy",
        "sst2": "accuracy",
        "cola": "matthews_correlation",
        "stsb": "spearman",
        "mrpc": "f1",
        "rte": "accuracy",
    }
    scores = [100 * found[name]["dev"][metric] for name, metric in wanted.items()]
    matched, mismatched = (100 * found["mnli"][part]["accuracy"] for part in ("dev", "dev_mismatched"))
    average = statistics.mean([matched, mismatched, *scores])
    rows = {"this run (dev)": (f"{matched:.1f}/{mismatched:.1f}", *scores, average)} | PUBLISHED
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in rows.items():
        cells = (value if isinstance(value, str) else f"{value:.1f}" for value in values)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
