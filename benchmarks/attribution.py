"""Whether attributions find the words that count: reviews without their five most positive words, or five at random.

    python benchmarks/attribution.py --model M --input reviews.csv [--positive LABEL] [--count 200] [--memory 100]

The input is a table with the columns text and label. Of `--count` positive reviews with ten words or more, drawn by
`--seed`, five words are taken out, once those with the highest attribution for the positive label and once five drawn
from the same words, and the text that is left is classified again: the deletion test (Samek et al. 2017). Prints the
mean drop of the label's probability and logit for both, with standard errors, and how well attributions add up. Then
how much memory a second pass over the first `--memory` reviews takes: programs are compiled in the first.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import bert_jax
from bert_jax.bert import Bert
from bert_jax.config import TaskConfig
from bert_jax.data.tables import read_examples
from bert_jax.explain.attribution import STEPS, Attribution, attribute, attribute_stream, is_loose
from bert_jax.progress import Progress

DELETED, LEAST = 5, 10  # words that are taken out, and words of a review
PAGE = resource.getpagesize()


def draw(path: str, positive: str, count: int, seed: int) -> list[str]:
    """Positive reviews, long enough by their spaces."""
    texts = [example.text for example in read_examples(path, TaskConfig()) if example.label == positive]
    texts = [text for text in texts if len(text.split()) >= LEAST]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[number] for number in order[:count]]


def without(text: str, found: Attribution, numbers: Sequence[int]) -> str:
    """`text` without the words of these numbers."""
    for word in sorted((found.words[number] for number in numbers), key=lambda word: -word.start):
        text = text[: word.start] + text[word.end :]
    return " ".join(text.split())


def scores(bert: Bert, texts: list[str], positive: str) -> tuple[np.ndarray, np.ndarray]:
    """Probability and logit of the positive label, [texts] each."""
    probabilities = [found["probabilities"][positive] for found in bert.classify(texts)]
    return np.array(probabilities), np.array(
        [found.value for found in attribute_stream(bert, texts, target=positive, kind="classify", steps=1)]
    )


def deletion(bert: Bert, texts: list[str], positive: str, steps: int, seed: int) -> None:
    """Prints what taking words out does."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[str]] = {"most positive": [], "random": []}
    misses, loose = [], 0
    progress = Progress("attribution", len(texts), "reviews")
    began = time.perf_counter()
    for done, text in enumerate(texts, 1):
        found = attribute(bert, text, target=positive, kind="classify", steps=steps)
        best = np.argsort([-word.score for word in found.words], kind="stable")[:DELETED]
        chosen["most positive"].append(without(text, found, best))
        chosen["random"].append(without(text, found, rng.permutation(len(found.words))[:DELETED]))
        misses.append(abs(found.delta) / abs(found.value - found.baseline_value))
        loose += is_loose(found)
        progress.update(done)
    progress.close()
    print(f"{len(texts)} reviews, {len(texts) / (time.perf_counter() - began):.2f} a second with {steps} steps")
    print(
        f"sum of attributions: median {100 * np.median(misses):.3f} % off f(x) - f(baseline), at most "
        f"{100 * max(misses):.2f} %; {loose} reviews above 1 %"
    )
    before = scores(bert, texts, positive)
    print(f"before: probability of {positive} {before[0].mean():.4f}, logit {before[1].mean():.3f}")
    drops = {}
    for name, left in chosen.items():
        drops[name] = [old - new for old, new in zip(before, scores(bert, left, positive), strict=True)]
        shown = (f"{drop.mean():.4f} ± {drop.std(ddof=1) / len(drop) ** 0.5:.4f}" for drop in drops[name])
        print("without the {} {} words: probability falls by {}, logit by {}".format(DELETED, name, *shown))
    share = (drops["most positive"][1] > drops["random"][1]).mean()
    print(f"the logit falls more without the most positive words in {100 * share:.0f} % of the reviews")


def memory(bert: Bert, texts: list[str], positive: str, steps: int) -> None:
    """Prints resident memory before and after a pass over texts whose programs are compiled."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    for _ in attribute_stream(bert, texts, target=positive, kind="classify", steps=steps):
        pass
    before, most = resident(), peak()
    for _ in attribute_stream(bert, texts, target=positive, kind="classify", steps=steps):
        pass
    after = resident()
    print(
        f"memory: {before:.0f} MB before {len(texts)} reviews and {after:.0f} after ({after - before:+.1f}); "
        f"the peak went from {most:.0f} to {peak():.0f} ({peak() - most:+.1f})"
    )


def main() -> None:
    """Parses the command line and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a classifier of reviews")
    parser.add_argument("--input", required=True, help="table with the columns text and label")
    parser.add_argument("--positive", help="the positive label (default: the model's last)")
    parser.add_argument("--count", type=int, default=200, help="reviews to delete words from (default: 200)")
    parser.add_argument("--memory", type=int, default=100, help="reviews of the memory's measure (default: 100)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bert = bert_jax.load(args.model)
    positive = args.positive or bert.labels[-1]
    texts = draw(args.input, positive, max(args.count, args.memory), args.seed)
    if args.count:
        deletion(bert, texts[: args.count], positive, args.steps, args.seed)
    if args.memory:
        memory(bert, texts[: args.memory], positive, args.steps)


if __name__ == "__main__":
    main()
