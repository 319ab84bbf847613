"""Fine-tuning beside a plain `transformers` Trainer: dev scores and seconds, from the same weights, rows and settings.

    pip install accelerate torch transformers
    python benchmarks/finetune.py --model MINILM --train train.csv --dev dev.csv --task classify|regress \
        --text-column text [--text-pair-column …] --label-column label [--epochs 3] [--seeds 0 1 2]

Both sides start from the same Hugging Face folder, read the same tables, and use the same batch size, epochs, learning
rate, warm-up, decay and length limit, in float32 on the CPU, each in a process of its own that is timed from start to
end: loading, compiling, training, one evaluation, saving. Sides take turns seed by seed. Trainer pads to the longest of
a batch; nothing else of it is changed. Prints each pair, then means, standard deviations and the ratio of seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"


def ours(args: argparse.Namespace, seed: int, folder: Path) -> float:
    """Runs our train.py; the dev score."""
    words = [
        *("--config", CONFIGS / f"{args.task}.py", "--workdir", folder, "--train.init-from", args.model),
        *("--task.train", args.train, "--task.dev", args.dev),
        *("--task.text-column", args.text_column, "--task.label-column", args.label_column),
        *("--task.text-pair-column", args.text_pair_column, "--train.seed", seed),
        *("--train.num-epochs", args.epochs, "--train.global-batch-size", args.batch_size),
        *("--optimizer.learning-rate", args.learning_rate, "--data.max-seq-len", args.max_seq_len),
    ]
    subprocess.run([sys.executable, "-m", "bert_jax.train", *map(str, words)], check=True, capture_output=True)
    return json.loads((folder / "results.json").read_text())["metrics"]["dev"][args.metric]


def theirs(args: argparse.Namespace, seed: int, folder: Path) -> float:
    """Runs Trainer in a process of its own; the dev score."""
    words = [sys.executable, __file__, *sys.argv[1:], "--trainer", str(folder), "--seeds", str(seed)]
    subprocess.run(words, check=True, capture_output=True)
    return json.loads((folder / "score.json").read_text())


def run_trainer(args: argparse.Namespace) -> None:
    """A plain Trainer; writes its dev score into the folder."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from bert_jax.config import TaskConfig
    from bert_jax.data.tables import read_examples
    from bert_jax.metrics import accuracy, spearman

    columns = TaskConfig(
        text_column=args.text_column, text_pair_column=args.text_pair_column, label_column=args.label_column
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, dev = (read_examples(path, columns) for path in (args.train, args.dev))
    names = sorted({example.label for example in train})
    label = float if args.task == "regress" else names.index

    def encoded(examples: list) -> list[dict]:
        texts = [e.text for e in examples], [e.pair for e in examples] if args.text_pair_column else None
        found = tokenizer(*texts, truncation=True, max_length=args.max_seq_len)
        return [
            {name: found[name][row] for name in found} | {"labels": label(example.label)}
            for row, example in enumerate(examples)
        ]

    torch.manual_seed(args.seeds[0])
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1 if args.task == "regress" else len(names)
    )
    settings = TrainingArguments(
        args.trainer,
        seed=args.seeds[0],
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        adam_epsilon=1e-6,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, settings, train_dataset=encoded(train), data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    found = trainer.predict(encoded(dev))
    if args.task == "regress":
        score = spearman(found.predictions[:, 0], found.label_ids)
    else:
        score = accuracy(found.predictions.argmax(-1), found.label_ids)
    trainer.save_model(args.trainer)
    (Path(args.trainer) / "score.json").write_text(json.dumps(score))


def main() -> None:
    """Parses the command line, runs both sides, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder of an encoder")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--task", choices=("classify", "regress"), default="classify")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--text-pair-column", default="")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-seq-len", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.metric = "spearman" if args.task == "regress" else "accuracy"
    if args.trainer:
        run_trainer(args)
        return
    sides = {"bert_jax": ours, "Trainer": theirs}
    scores: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for seed in args.seeds:
        for name, run in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                scores[name].append(100 * run(args, seed, Path(folder) / "run"))
                seconds[name].append(time.perf_counter() - began)
            print(f"seed {seed} {name}: {args.metric} {scores[name][-1]:.2f}, {seconds[name][-1]:.0f} s", flush=True)
    for name, values in scores.items():
        spread = statistics.stdev(values) if values[1:] else 0.0
        print(f"{name}: {args.metric} {statistics.mean(values):.2f} ± {spread:.2f} x 100 on dev")
    ratios = [one / other for one, other in zip(seconds["bert_jax"], seconds["Trainer"], strict=True)]
    print(f"bert_jax takes {statistics.median(ratios):.2f} of Trainer's time (median of {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
