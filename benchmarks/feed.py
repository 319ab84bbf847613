"""Feeding: masked, batched tokens a second on one core, through the whole tf.data pipeline.

    python benchmarks/feed.py [--data P] [--batch-size 256] [--batches 1000] [--repeats 5] [--whole-word-masking]

P is a prepared folder; without it the built-in documentation is prepared into rows of 128. The process and its threads
are bound to one core. Prints the rate of each repeat, by the clock and by CPU seconds (user and system, all threads:
what other processes took of the core does not count), and the medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

from bert_jax.config import DataConfig
from bert_jax.data import pipeline
from bert_jax.data.corpus import read_documents
from bert_jax.data.prepare import load_manifest, prepare
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.data.tokenizer_training import train_tokenizer


def prepare_builtin(folder: str) -> None:
    """Rows of 128 tokens of the built-in documentation, with a vocabulary of its own."""
    texts = (document.text for document in read_documents(["builtin"]))
    tokenizer = train_tokenizer("wordpiece", texts, vocab_size=8192, lowercase=True, strip_accents=True)
    prepare(["builtin"], folder, tokenizer=tokenizer, data=DataConfig(max_seq_len=128, workers=1))


def batch_maker(folder: str, batch_size: int, whole_words: bool) -> Callable[[int], pipeline.Batch]:
    """Step -> training batch, as training makes it."""
    manifest = load_manifest(folder)
    data = DataConfig(path=folder, max_seq_len=manifest["settings"]["max_seq_len"], whole_word_masking=whole_words)
    rows = pipeline.open_rows(folder, manifest, "train")
    vocabulary = pipeline.masking_vocabulary(load_tokenizer(os.path.join(folder, "tokenizer")), whole_words)
    return lambda step: pipeline.train_batch(rows, vocabulary, data, batch_size, step)


def measure(batches: Iterator[pipeline.Batch]) -> tuple[float, float]:
    """Tokens a second of the clock, and a CPU second, from building the pipeline to the last batch."""
    clock, cpu = time.perf_counter(), time.process_time()
    tokens = sum(batch["input_ids"].size for batch in batches)
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - cpu)


def main() -> None:
    """Measures the repeats and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a prepared folder (default: the built-in documentation is prepared)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=1000, help="of a repeat (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole-word-masking", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads started from here on keep to it
    with tempfile.TemporaryDirectory() as scratch:
        if not args.data:
            args.data = os.path.join(scratch, "rows")
            prepare_builtin(args.data)
        make = batch_maker(args.data, args.batch_size, args.whole_word_masking)
        shape = make(0)["input_ids"].shape
        measure(pipeline.stream(make, 0, 20))  # TensorFlow imported, files in memory
        rates = []
        for repeat in range(args.repeats):
            rates.append(measure(pipeline.stream(make, repeat * args.batches, (repeat + 1) * args.batches)))
            print(f"repeat {repeat + 1}: {rates[-1][0]:,.0f} tokens/s, {rates[-1][1]:,.0f} tokens per CPU second")
    clock, cpu = map(statistics.median, zip(*rates, strict=True))
    print(f"median, batches of {shape}: {clock:,.0f} tokens/s on one core, {cpu:,.0f} tokens per CPU second")


if __name__ == "__main__":
    main()
