"""Preparing rows: tokens per core-second, against google-research/bert's create_pretraining_data.py on the same text.

    python benchmarks/prepare.py --input texts.jsonl --tokenizer vocab.txt [--google-bert CLONE] [--pairs 3]

CLONE is a clone of github.com/google-research/bert; its script runs unchanged, on TensorFlow 2's compat.v1. Both get
the same file, one sentence a line, and one core; both are measured as whole processes (user and system seconds).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bert_jax.data.corpus import read_documents, split_sentences

GOOGLE = """
import runpy, sys
import tensorflow.compat.v1 as tf
sys.modules["tensorflow"] = tf
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
sys.argv[0] = folder + "/create_pretraining_data.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_sentences(inputs: list[str], path: Path) -> None:
    """One sentence a line, a blank line after each document."""
    with open(path, "w", encoding="utf-8") as file:
        for document in read_documents(inputs):
            file.write("\n".join(split_sentences(document)) + "\n\n")


def measure(command: list[str]) -> tuple[float, int]:
    """CPU seconds and peak resident bytes of a process and those it waited for."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Runs the pairs in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", default=["builtin"])
    parser.add_argument(
        "--tokenizer", required=True, help="a lower-cased vocab.txt, which Google's script can read too"
    )
    parser.add_argument("--google-bert", help="a clone of github.com/google-research/bert")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        write_sentences(args.input, text)
        seconds: dict[str, list[float]] = {}
        for number in range(args.pairs):
            rows = Path(folder, f"rows-{number}")
            commands = {
                "bert_jax": [
                    *(sys.executable, "-m", "bert_jax.data.prepare", "--input", str(text), "--output", str(rows)),
                    *("--tokenizer", args.tokenizer, "--lowercase", "--strip-accents", "--documents", "blank-line"),
                    *("--max-seq-len", "128", "--workers", "1", "--eval-fraction", "0"),
                ]
            }
            if args.google_bert:
                commands["google-research/bert"] = [
                    *(sys.executable, "-c", GOOGLE, args.google_bert, f"--input_file={text}"),
                    *(f"--output_file={folder}/google.tfrecord", f"--vocab_file={args.tokenizer}"),
                    *("--do_lower_case=True", "--max_seq_length=128", "--max_predictions_per_seq=20"),
                    *("--masked_lm_prob=0.15", "--dupe_factor=1"),
                ]
            for name, command in commands.items():
                took, memory = measure(command)
                seconds.setdefault(name, []).append(took)
                print(f"pair {number}, {name}: {took:.2f} CPU seconds, {memory / 2**20:.0f} MiB", flush=True)
        tokens = json.loads((rows / "manifest.json").read_text())["splits"]["train"]["tokens"]
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name}: {tokens:,} tokens in {median:.2f} CPU s, {tokens / median:,.0f} tokens per core-second")
    if args.google_bert:
        ours, theirs = seconds.values()
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"ratio, median of {args.pairs} pairs: {ratio:.1f}")


if __name__ == "__main__":
    main()
