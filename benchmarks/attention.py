"""How long the attention page of BERT-base takes, and how large it is, by the number of tokens.

    python benchmarks/attention.py --tokenizer T [--tokens 128 512]

Weights are random: neither time nor size depends on what the model has learned. The text is the built-in documentation.
Seconds are those of the whole command, from the start of Python to the written page.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from bert_jax import convert
from bert_jax.config import ModelConfig
from bert_jax.data.corpus import read_documents
from bert_jax.data.tokenizer_model import Tokenizer, load_tokenizer
from bert_jax.tasks import pretrain


def text_of(tokenizer: Tokenizer, count: int) -> str:
    """Prose of `count` pieces, with those at its ends."""
    words = (word for document in read_documents(["builtin"]) for word in document.text.split())
    text = " ".join(itertools.islice(words, count))  # a word has a piece or more
    end = tokenizer.pieces(text)[count - 3][2][1]
    return text[:end]


def main() -> None:
    """Makes the model and prints a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or vocab.txt")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    config = ModelConfig(vocab_size=tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        params = jax.device_get(jax.jit(lambda key: pretrain.init(config, key))(jax.random.key(0)))
        convert.save_model(f"{folder}/model", params, config, tokenizer)
        for count in args.tokens:
            page = Path(folder, "view.html")
            words = ["attention", "--model", f"{folder}/model", "--text", text_of(tokenizer, count), "--output", page]
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "bert_jax.explain", *map(str, words)], check=True, capture_output=True
            )
            seconds = time.perf_counter() - began
            print(f"{count} tokens: {seconds:.1f} s, {page.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
