"""What pre-training buys: test accuracy of a labelled set with and without the weights, over several seeds.

    python benchmarks/transfer.py --pretrained W --data FOLDER [--labels 0 500] [--seeds 0 1 2]

FOLDER holds rotten_tomatoes_{train,dev,test}.csv, as `python launch/demo_data.py FOLDER` writes them. Both sides have
the same architecture, tokenizer, hyper-parameters, examples and seeds; one starts from W, the other from random
weights. Prints mean and standard deviation of each, and their difference.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from bert_jax.command import load_config
from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, adopt
from bert_jax.convert import load_model
from bert_jax.train import train

CLASSIFY = Path(__file__).parent.parent / "configs" / "classify.py"


def configuration(args: argparse.Namespace, labels: int, seed: int) -> Config:
    """configs/classify.py with a rate and length for small models."""
    base = load_config(str(CLASSIFY))
    data = Path(args.data)
    files = {part: str(data / f"rotten_tomatoes_{part}.csv") for part in ("train", "dev", "test")}
    return replace(
        base,
        task=TaskConfig(name="classify", max_train_examples=labels, **files),
        data=DataConfig(max_seq_len=64),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup_fraction=0.1),
        train=replace(base.train, num_epochs=args.epochs, seed=seed, save_every=100_000),
    )


def accuracy(config: Config) -> float:
    """Runs a configuration and returns its test accuracy in percent."""
    with tempfile.TemporaryDirectory() as workdir:
        train(config, f"{workdir}/run")
        return 100 * json.loads(Path(workdir, "run", "results.json").read_text())["metrics"]["test"]["accuracy"]


def main() -> None:
    """Trains every combination and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", required=True, help="workdir or model directory")
    parser.add_argument("--data", required=True, help="folder with rotten_tomatoes_{train,dev,test}.csv")
    parser.add_argument("--labels", type=int, nargs="+", default=[0], help="training set sizes; 0 is all (default)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=3, help="passes over the labels (default: 3)")
    args = parser.parse_args()
    weights = load_model(args.pretrained)
    for labels in args.labels:
        scores: dict[str, list[float]] = {"pre-trained": [], "from scratch": []}
        for seed in args.seeds:
            config = configuration(args, labels, seed)
            scores["pre-trained"].append(
                accuracy(replace(config, train=replace(config.train, init_from=args.pretrained)))
            )
            tokenizer = replace(config.data, tokenizer=str(weights.tokenizer))
            model = adopt(config.model, weights.config)  # as a run from weights gets it: its dropout, not theirs
            scores["from scratch"].append(accuracy(replace(config, model=model, data=tokenizer)))
        for name, values in scores.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(
                f"{labels or 'all'} labels, {name}: {statistics.mean(values):.1f} +- {spread:.1f} % of {values}",
                flush=True,
            )
        difference = statistics.mean(scores["pre-trained"]) - statistics.mean(scores["from scratch"])
        print(f"{labels or 'all'} labels, difference: {difference:+.1f} points", flush=True)


if __name__ == "__main__":
    main()
