"""Preparing rows: tokens per core-second, against google-research/bert's create_pretraining_data.py on the same text.

    python benchmarks/prepare.py [--input texts.jsonl] [--tokenizer vocab.txt] [--google-bert CLONE] [--pairs 3]
    python benchmarks/prepare.py --memory [--full]

The first prints a table: for each program the tokens of the text, the median CPU seconds of the whole process (user and
system, its children included), tokens per core-second and peak memory; then the median ratio of the pairs, which run in
turn. Both get the same file, one sentence a line with blank lines between documents, one core, and the same settings:
rows of 128, dupe factor 1. CLONE is a clone of https://github.com/google-research/bert; its script runs unchanged, on
TensorFlow 2's compat.v1, whose import is measured beside it. Without CLONE only ours is measured.

The second prepares generated text of 10 MB and 100 MB (with --full also 1 GB) and prints the peak memory of the largest
process of each.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_jax.data.corpus import read_documents, split_sentences
from bert_jax.data.tokenizer_training import train_tokenizer

ROW, PREDICTIONS = 128, 20
VOCAB_SIZE = 30_522
TRAINING_DOCUMENTS = 5_000  # that a vocabulary is trained on where none is given
COMPAT = "import tensorflow.compat.v1 as tf"
GOOGLE = f"""
import runpy, sys
{COMPAT}
sys.modules["tensorflow"] = tf
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
sys.argv[0] = folder + "/create_pretraining_data.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Usage(NamedTuple):
    """What a process took."""

    seconds: float  # CPU, user and system, with the processes that it waited for
    peak: float  # MiB, resident, of the largest of these processes


def measure(command: list[str]) -> Usage:
    """Runs a command to its end; its output is shown only where it fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def write_sentences(inputs: list[str], path: Path) -> None:
    """One sentence a line, a blank line after each document."""
    with open(path, "w", encoding="utf-8") as file:
        for document in read_documents(inputs):
            file.write("\n".join(split_sentences(document)) + "\n\n")


def write_vocabulary(text: Path, folder: Path) -> str:
    """A lower-cased WordPiece vocabulary of the beginning of the text; returns its file."""
    documents = itertools.islice(read_documents([str(text)], documents="blank-line"), TRAINING_DOCUMENTS)
    texts = (document.text for document in documents)
    train_tokenizer("wordpiece", texts, vocab_size=VOCAB_SIZE, lowercase=True, strip_accents=True).save(folder)
    return str(folder / "vocab.txt")


def our_command(text: Path, vocabulary: str, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "bert_jax.data.prepare", "--input", str(text), "--output", str(output)),
        *("--tokenizer", vocabulary, "--lowercase", "--strip-accents", "--documents", "blank-line"),
        *("--max-seq-len", str(ROW), "--workers", "1", "--eval-fraction", "0"),
    ]


def google_command(clone: str, text: Path, vocabulary: str, output: Path) -> list[str]:
    return [
        *(sys.executable, "-c", GOOGLE, clone, f"--input_file={text}", f"--output_file={output}"),
        *(f"--vocab_file={vocabulary}", "--do_lower_case=True", f"--max_seq_length={ROW}"),
        *(f"--max_predictions_per_seq={PREDICTIONS}", "--masked_lm_prob=0.15", "--dupe_factor=1"),
    ]


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Runs the pairs in turn and prints the table."""
    text = folder / "text.txt"
    write_sentences(args.input, text)
    vocabulary = args.tokenizer or write_vocabulary(text, folder / "tokenizer")
    usages: dict[str, list[Usage]] = {}
    for number in range(args.pairs):
        commands = {"bert_jax": our_command(text, vocabulary, folder / f"rows-{number}")}
        if args.google_bert:
            clone = os.path.abspath(args.google_bert)
            commands["google-research/bert"] = google_command(clone, text, vocabulary, folder / "google.tfrecord")
        for name, command in commands.items():
            usages.setdefault(name, []).append(measure(command))
    tokens = json.loads((folder / "rows-0" / "manifest.json").read_text())["corpus"]["tokens"]
    print_table(tokens, usages)
    if args.google_bert:
        ours, theirs = usages.values()
        ratios = [their.seconds / our.seconds for our, their in zip(ours, theirs, strict=True)]
        seconds = measure([sys.executable, "-c", COMPAT]).seconds
        print(f"ratio, median of {args.pairs} pairs: {statistics.median(ratios):.1f}")
        print(f"of Google's CPU seconds, importing TensorFlow: {seconds:.2f}")


def print_table(tokens: int, usages: dict[str, list[Usage]]) -> None:
    print(f"{'':20} {'tokens':>14} {'CPU s':>8} {'tokens per core-second':>23} {'peak MiB':>9}")
    for name, runs in usages.items():
        seconds = statistics.median(usage.seconds for usage in runs)
        peak = max(usage.peak for usage in runs)
        print(f"{name:20} {tokens:14,} {seconds:8.2f} {tokens / seconds:23,.0f} {peak:9,.0f}")


def show_memory(sizes: Iterable[int], folder: Path) -> None:
    """Prepares generated text of each size (bytes) and prints the peak of each."""
    vocabulary = ""
    print(f"{'text MB':>8} {'CPU s':>8} {'peak MiB of the largest process':>32}")
    for size in sizes:
        text = folder / "text.txt"
        write_generated(size, text)
        vocabulary = vocabulary or write_vocabulary(text, folder / "tokenizer")
        usage = measure(our_command(text, vocabulary, folder / f"rows-{size}"))
        print(f"{size / 1e6:8,.0f} {usage.seconds:8.1f} {usage.peak:32,.0f}", flush=True)


def write_generated(size: int, path: Path) -> None:
    """Documents of 10 sentences of 20 words; words are drawn by Zipf's law from a million, so new ones never end."""
    rng, written = np.random.default_rng(0), 0
    with open(path, "w", encoding="ascii") as file:
        while written < size:
            words = [_spell(number) for number in rng.zipf(1.3, 200_000) % 1_000_000]
            sentences = [" ".join(words[at : at + 20]) + ".\n" for at in range(0, len(words), 20)]
            documents = ["".join(sentences[at : at + 10]) for at in range(0, len(sentences), 10)]
            written += file.write("\n".join(documents) + "\n")


def _spell(number: int) -> str:
    """A pronounceable word for each number: its digits in base 100, as syllables."""
    syllables = []
    while number or not syllables:
        number, digit = divmod(int(number), 100)
        syllables.append("bcdfghjklmnprstvwxyz"[digit // 5] + "aeiou"[digit % 5])
    return "".join(syllables)


def main() -> None:
    """Runs what is asked for in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", default=["builtin"], help="as of prepare (default: builtin)")
    parser.add_argument("--tokenizer", help="a lower-cased vocab.txt (default: trained on the text)")
    parser.add_argument("--google-bert", help="a clone of https://github.com/google-research/bert")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="instead: peak memory by size of the text")
    parser.add_argument("--full", action="store_true", help="with --memory: 1 GB too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            show_memory([10**7, 10**8, 10**9][: 3 if args.full else 2], Path(folder))
        else:
            compare(args, Path(folder))


if __name__ == "__main__":
    main()
