"""The stages of `launch/demo.sh`, each one of the project's own commands, and the table at the end.

python launch/demo.py FOLDER [--labels 500]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LOOKED_AT = "the film was long but never dull ."
SENTENCES = ("this movie is really [MASK] .", "the plot was [MASK] and the acting was terrible .")


def run(title: str, *words: object) -> float:
    """Runs a command of this Python, shown as a user would type it; returns its seconds."""
    print(f"\n== {title}\n   python {' '.join(map(str, words))}", flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, *map(str, words)], check=True)
    return time.monotonic() - began


def finetune(folder: Path, name: str, labels: int, *weights: object) -> tuple[float, float]:
    """Fine-tunes on Rotten Tomatoes sentences; returns seconds and test accuracy."""
    data = [f"--task.{part}={folder}/data/rotten_tomatoes_{part}.csv" for part in ("train", "dev", "test")]
    words = ["-m", "bert_jax.train", "--config", HERE.parent / "configs/demo_finetune.py", *data]
    words += ["--task.max-train-examples", labels, "--workdir", folder / name, *weights]
    if labels:  # as many steps as it takes to see few labels often enough
        words += ["--train.num-epochs", 20]
    seconds = run(f"fine-tune: {name}", *words)
    return seconds, json.loads((folder / name / "results.json").read_text())["metrics"]["test"]["accuracy"]


def read_metrics(workdir: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def draw(rows: list[dict], path: Path) -> None:
    """The pre-training loss curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    train = [row for row in rows if "masked_lm_loss" in row]
    held_out = [row for row in rows if "eval/masked_lm_loss" in row]
    axes.plot([row["step"] for row in train], [row["masked_lm_loss"] for row in train], label="training batch")
    axes.plot(
        [row["step"] for row in held_out], [row["eval/masked_lm_loss"] for row in held_out], "o-", label="held out"
    )
    axes.set(xlabel="step", ylabel="masked language model loss (nats)", title="Pre-training on IMDb reviews")
    axes.legend()
    figure.savefig(path, dpi=120)


def text_to_rows(folder: Path) -> dict[str, float]:
    """Text, vocabulary and prepared rows, what is not there yet; seconds of each."""
    reviews, vocabulary, rows = folder / "data" / "imdb.jsonl", folder / "vocabulary", folder / "rows"
    seconds = {"text": run("the text", HERE / "demo_data.py", folder / "data")}
    if not vocabulary.exists():
        words = ["-m", "bert_jax.data.tokenizer", "train", "--kind", "wordpiece", "--input", reviews]
        words += ["--vocab-size", 8192, "--lowercase", "--strip-accents", "--output", vocabulary]
        seconds["vocabulary"] = run("train a vocabulary", *words)
    if not rows.exists():
        words = ["-m", "bert_jax.data.prepare", "--input", reviews, "--tokenizer", vocabulary]
        seconds["prepare"] = run("prepare rows", *words, "--output", rows, "--max-seq-len", 128)
    return seconds


def use(folder: Path) -> dict[str, float]:
    """Asks the models, and shows what they look at; seconds of both."""
    pretrained, classifier = folder / "pretrain", folder / "pretrained-all"
    predict, explain = ("-m", "bert_jax.predict"), ("-m", "bert_jax.explain")
    review = ("--model", classifier, "--text", "a moving and beautifully acted film .")
    masked = (("--model", pretrained, "--text", text) for text in SENTENCES)
    looked_at = ("--model", pretrained, "--text", LOOKED_AT)
    answers = sum(run("fill a mask", *predict, "fill-mask", *words) for words in masked)
    answers += run("classify a sentence", *predict, "classify", *review)
    pages = run("why that label", *explain, "attribution", *review, "--output", folder / "words.html")
    pages += run("what its heads look at", *explain, "attention", *looked_at, "--output", folder / "attention.html")
    return {"predict": answers, "explain": pages}


def main() -> None:
    """Runs every stage and prints what was measured, whatever it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=int, default=500, help="size of the small training set (default: 500)")
    parser.add_argument("--installed-in", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, pretrained = args.folder, args.folder / "pretrain"
    seconds = {"install": args.installed_in, **text_to_rows(folder)}
    words = ["-m", "bert_jax.train", "--config", HERE.parent / "configs/demo_pretrain.py"]
    seconds["pre-train"] = run("pre-train", *words, "--workdir", pretrained, "--data.path", folder / "rows")
    starts = {"pretrained": ("--train.init-from", pretrained), "scratch": ("--data.tokenizer", folder / "vocabulary")}
    accuracies = {}
    for labels in (args.labels, 0):
        for name, weights in starts.items():
            stage = f"{name}-{labels or 'all'}"
            seconds[stage], accuracies[stage] = finetune(folder, stage, labels, *weights)
    seconds |= use(folder)
    draw(read_metrics(pretrained), folder / "loss.png")
    report(folder, pretrained, seconds, accuracies)


def report(folder: Path, pretrained: Path, seconds: dict[str, float], accuracies: dict[str, float]) -> None:
    """The closing table."""
    first = next(row for row in read_metrics(pretrained) if "masked_lm_loss" in row)
    before = sum(seconds.get(stage, 0.0) for stage in ("install", "text", "vocabulary", "prepare"))
    last = json.loads((pretrained / "results.json").read_text())["metrics"]["eval"]
    print("\n== what was measured")
    print(f"masked LM loss        {first['masked_lm_loss']:.3f} at step {first['step']}")
    print(f"                      {last['masked_lm_loss']:.3f} held out, at the end")
    print(f"next-sentence accuracy {last['next_sentence_accuracy']:.3f} held out, at the end")
    for stage, accuracy in accuracies.items():
        print(f"test accuracy         {100 * accuracy:.1f} %  {stage} labels")
    for stage, took in seconds.items():
        print(f"seconds               {took:6.1f}  {stage}")
    print(
        f"seconds               {before + first['first_step_seconds']:6.1f}  from the start to the first training step"
    )
    print(f"seconds               {sum(seconds.values()):6.1f}  all together")
    print(f"loss curve            {folder / 'loss.png'}")
    print(f"pre-trained model     {pretrained / 'model'}")
    print(f"sentiment model       {folder / 'pretrained-all' / 'model'}")
    print(f"pages to look at      {folder / 'words.html'}, {folder / 'attention.html'}")


if __name__ == "__main__":
    main()
