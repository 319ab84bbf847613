"""Feeding: masked, batched tokens a second on one core, through the whole tf.data pipeline.

    python benchmarks/feed.py --data P [--batch-size 256] [--batches 400] [--repeats 5]

P is a prepared folder. The process is bound to one core.
"""

import argparse
import os
import statistics
import time

from bert_jax.config import DataConfig
from bert_jax.data import pipeline
from bert_jax.data.prepare import load_manifest
from bert_jax.data.tokenizer import load_tokenizer


def main() -> None:
    """Prints the rate of each repeat and the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole-word-masking", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    manifest = load_manifest(args.data)
    rows = pipeline.open_rows(args.data, manifest, "train")
    length = manifest["settings"]["max_seq_len"]
    data = DataConfig(path=args.data, max_seq_len=length, whole_word_masking=args.whole_word_masking)
    vocabulary = pipeline.masking_vocabulary(load_tokenizer(f"{args.data}/tokenizer"), args.whole_word_masking)

    def make(step: int) -> pipeline.Batch:
        return pipeline.train_batch(rows, vocabulary, data, args.batch_size, step)

    rates = []
    for repeat in range(args.repeats + 1):
        batches = pipeline.stream(make, repeat * args.batches, (repeat + 1) * args.batches)
        next(batches)  # the pipeline is built, TensorFlow imported
        began = time.perf_counter()
        count = sum(batch["input_ids"].size for batch in batches)
        rates.append(count / (time.perf_counter() - began))
        if repeat:
            print(f"repeat {repeat}: {rates[-1]:,.0f} tokens/s")
    print(f"median: {statistics.median(rates[1:]):,.0f} tokens/s on one core, rows of {length}")


if __name__ == "__main__":
    main()
