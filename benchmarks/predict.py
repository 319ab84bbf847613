"""Sentence vectors a second, and seconds from command to first answer, beside what a user would pick instead.

    pip install sentence-transformers onnxruntime onnx onnxscript
    python benchmarks/predict.py --model MINILM --input sts-test.tsv [--columns 5 6] [--scores 4] [--rounds 5]

MINILM is a Hugging Face folder of an encoder; the input is a tab-separated file, of which two columns are sentences and
one says how similar they are, for Spearman's correlation with our cosines; `--rounds 0` prints only that.
All contenders embed the same sentences, in the order in which they come, by mean pooling in float32 on the CPU, each
with its own batching; rounds are interleaved, so that what else the machine does falls on all alike. The first round,
in which programs are compiled, does not count. Prints medians and ratios.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Embed = Callable[[list[str]], np.ndarray]


def ours(model: str) -> Embed:
    """bert_jax."""
    import bert_jax

    return bert_jax.load(model).embed


def sentence_transformers(model: str) -> Embed:
    """sentence-transformers with mean pooling, batches of 32 as by default."""
    from sentence_transformers import SentenceTransformer, models

    encoder = models.Transformer(model)
    pooling = models.Pooling(encoder.get_word_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[encoder, pooling], device="cpu").encode


def onnx_runtime(model: str) -> Embed:
    """ONNX Runtime on the exported encoder; sorted by length and padded to the longest of 32, then mean pooling."""
    import onnxruntime
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    shapes = tuple({0: batch, 1: length} for _ in names)
    program = torch.onnx.export(encoder, example, input_names=names, dynamic_shapes=shapes, dynamo=True)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)

    def embed(texts: list[str]) -> np.ndarray:
        encodings = tokenizer.encode_batch(texts)
        order = sorted(range(len(texts)), key=lambda number: len(encodings[number].ids))
        vectors: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for start in range(0, len(order), 32):
            numbers = order[start : start + 32]
            longest = len(encodings[numbers[-1]].ids)
            ids, mask = np.zeros((2, len(numbers), longest), np.int64)
            for row, number in enumerate(numbers):
                ids[row, : len(encodings[number].ids)] = encodings[number].ids
                mask[row, : len(encodings[number].ids)] = 1
            feeds = dict(zip(names, (ids, mask, np.zeros_like(ids)), strict=True))
            hidden = session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})[0]
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            for row, number in enumerate(numbers):
                vectors[number] = pooled[row]
        return np.stack(vectors)

    return embed


CONTENDERS = {"bert_jax": ours, "sentence-transformers": sentence_transformers, "ONNX Runtime": onnx_runtime}
PIPELINE = "from transformers import pipeline; print(pipeline('feature-extraction', {model!r})({text!r})[0][0][:3])"


def spearman(model: str, pairs: list[tuple[str, str]], scores: list[float]) -> None:
    """Prints the rank correlation of our cosines with the file's scores."""
    from scipy.stats import spearmanr

    import bert_jax

    found = spearmanr(bert_jax.load(model).similarity(pairs), scores).statistic
    print(f"bert_jax: Spearman {found:.4f} over {len(pairs):,} pairs", flush=True)


def rates(model: str, texts: list[str], rounds: int) -> None:
    """Prints sentences a second of every contender."""
    embedders = {name: make(model) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in embedders}
    vectors = {name: np.asarray(embed(texts)) for name, embed in embedders.items()}
    for name, found in vectors.items():
        print(f"{name}: largest difference from bert_jax {np.abs(found - vectors['bert_jax']).max():.1e}", flush=True)
    for _ in range(rounds):
        for name, embed in embedders.items():
            began = time.perf_counter()
            embed(texts)
            seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        ratios = [other / mine for other, mine in zip(values, seconds["bert_jax"], strict=True)]
        print(
            f"{name}: {len(texts) / statistics.median(values):,.0f} sentences a second (median of {rounds}); "
            f"bert_jax is {statistics.median(ratios):.2f} times as fast",
            flush=True,
        )


def layouts(model: str, rounds: int = 50) -> None:
    """Prints milliseconds for one sentence of 16 pieces with the layers apart, as prediction has them, and stacked."""
    import jax
    import jax.numpy as jnp

    import bert_jax
    from bert_jax.convert import load_model
    from bert_jax.tasks import embed

    bert = bert_jax.load(model)
    trees = {"apart": bert.params, "stacked": jax.tree.map(jnp.asarray, load_model(model).params)}
    ids = np.ones((1, 16), np.int32)
    batch = {"input_ids": ids, "token_type_ids": 0 * ids, "segment_ids": ids, "position_ids": np.arange(16)[None]}
    run = jax.jit(lambda params: embed.vectors(bert.config, params, batch))
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for number in range(rounds + 1):
        for name, params in trees.items():
            began = time.perf_counter()
            np.asarray(run(params))
            if number:
                seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"layers {name}: {1000 * statistics.median(values):.1f} ms for one sentence (median of {rounds})")


def first_answers(model: str, text: str, rounds: int) -> None:
    """Prints seconds from command to first answer, compiled programs being there from an earlier run."""
    commands = {
        "bert_jax": [sys.executable, "-m", "bert_jax.predict", "embed", "--model", model, "--text", text],
        "transformers pipeline": [sys.executable, "-c", PIPELINE.format(model=model, text=text)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, words in commands.items():
            began = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s from command to first answer (median of {rounds})")
    ratio = statistics.median(seconds["bert_jax"]) / statistics.median(seconds["transformers pipeline"])
    print(f"bert_jax takes {ratio:.2f} of the pipeline's time")


def main() -> None:
    """Parses the command line and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder of an encoder")
    parser.add_argument("--input", required=True, help="tab-separated file")
    parser.add_argument("--columns", type=int, nargs=2, default=[5, 6], help="of the sentences (default: 5 6)")
    parser.add_argument("--scores", type=int, default=4, help="column of the similarity (default: 4)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [line.split("\t") for line in Path(args.input).read_text(encoding="utf-8").splitlines()]
    first, second = args.columns
    spearman(args.model, [(row[first], row[second]) for row in rows], [float(row[args.scores]) for row in rows])
    texts = [row[column] for row in rows for column in args.columns]
    if not args.rounds:
        return
    layouts(args.model)
    rates(args.model, texts, args.rounds)
    first_answers(args.model, texts[0], args.rounds)


if __name__ == "__main__":
    main()
