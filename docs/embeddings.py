"""Writes the page that follows two sentences through BERT's embeddings, from text to vectors.

python docs/embeddings.py --output docs/embeddings.html

The vocabulary is learned here from two lines, and the weights are drawn, small enough to show every number; the
functions are those that training calls.
"""

import argparse
import html
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bert_jax.config import ModelConfig
from bert_jax.data.features import collate, featurize
from bert_jax.data.tokenizer_model import Tokenizer
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.model import Embeddings
from bert_jax.page import shell

A, B, LENGTH = "Uma sentença.", "E outra!", 12
PROSE = [
    "Uma sentença. E outra! Uma sentença, e mais outra. E mais uma!",
    "A presença da criança. A licença, a diferença. Outra criança! Ele sente. Ela sentou.",
]
CONFIG = ModelConfig(vocab_size=56, hidden_size=4, num_heads=1, mlp_dim=8, max_position_embeddings=LENGTH)
STYLE = """caption { text-align: left; padding: .3rem 0; color: var(--faint); }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll th, .scroll td { text-align: right; padding: .2rem .5rem; white-space: nowrap; }
.scroll th[scope=row], .scroll th[scope=colgroup] { text-align: left; }
.scroll .first { border-left: 2px solid var(--line); }
.pieces { display: flex; flex-wrap: wrap; gap: .1rem .9rem; padding: 0; list-style: none; }
@media print {
  .scroll { overflow: visible; break-inside: avoid; }
  h2, h2 + p { break-after: avoid; }
  .scroll th, .scroll td { font-size: 8pt; padding: .1rem .2rem; }
}
"""


def page() -> str:
    """The page. What it shows of the vectors is checked against the module's own output."""
    tokenizer = train_tokenizer("wordpiece", iter(PROSE), vocab_size=CONFIG.vocab_size)
    batch = collate(featurize([A], [B], tokenizer, LENGTH), np.array([0]), tokenizer.pad_id, LENGTH)
    ids = {name: rows[0] for name, rows in batch.items()}  # [S]

    rng = np.random.default_rng(0)
    sizes = (CONFIG.padded_vocab_size, CONFIG.max_position_embeddings, CONFIG.type_vocab_size)
    token, position, token_type = (
        rng.integers(-4, 5, (size, CONFIG.hidden_size)).astype(np.float32) / 4 for size in sizes
    )  # quarters: their sums and means are exact, so rounding shows the same on every machine
    vectors = {
        "token": token[ids["input_ids"]],
        "position": position[ids["position_ids"]],
        "token type": token_type[ids["token_type_ids"]],
    }
    summed = sum(vectors.values())  # [S, D]
    mean, variance = summed.mean(-1, keepdims=True), summed.var(-1, keepdims=True)
    output = (summed - mean) / np.sqrt(variance + CONFIG.layer_norm_epsilon)

    params = {"token_embedding": token, "position_embedding": position, "token_type_embedding": token_type}
    params["norm"] = {"scale": np.ones(CONFIG.hidden_size), "bias": np.zeros(CONFIG.hidden_size)}
    inputs = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids"))
    own = Embeddings(CONFIG, deterministic=True).apply({"params": params}, *inputs)
    np.testing.assert_allclose(output, own[0], atol=1e-5)
    added, normed = vectors | {"sum": summed}, {"mean": mean, "variance": variance, "output": output}
    return shell("From text to vectors", _body(tokenizer, ids, added, normed), STYLE)


def _body(tokenizer: Tokenizer, ids: dict, added: dict[str, np.ndarray], normed: dict[str, np.ndarray]) -> str:
    """What is read, top to bottom. `added` and `normed` are columns [S, D] or [S, 1] of the two tables of vectors."""
    pieces = [tokenizer.id_to_token(index) for index in ids["input_ids"]]
    kinds = zip(ids["segment_ids"], ids["token_type_ids"], strict=True)
    whose = ("AB"[token_type] if segment else "padding" for segment, token_type in kinds)
    parts = [(name, len(list(group))) for name, group in itertools.groupby(whose)]
    known = enumerate(map(tokenizer.id_to_token, range(tokenizer.vocab_size)))
    vocabulary = "".join(f"<li>{index} <code>{html.escape(piece)}</code></li>" for index, piece in known)
    rows = [
        ("token ids", ids["input_ids"]),
        ("token type ids", ids["token_type_ids"]),
        ("segment ids (mask)", ids["segment_ids"]),
        ("position ids", ids["position_ids"]),
    ]
    return f"""<h1>From text to vectors: the embeddings of “{A} {B}”</h1>
<p>BERT's layers read a vector for each token. This page shows every number on the way there, for two sentences, A and
B, with four numbers a vector and made-up weights. It is written by <code>docs/embeddings.py</code>, which calls the
functions that training calls and checks the last table against <code>bert_jax.model.Embeddings</code>.</p>
<h2>1. Text to pieces</h2>
<p>The tokenizer cuts the texts into pieces of its vocabulary; <code>##</code> continues a word. <code>[CLS]</code>
begins the input and <code>[SEP]</code> ends each sentence. This vocabulary was learned from two lines of text:</p>
<ul class="pieces" aria-label="Vocabulary">{vocabulary}</ul>
<h2>2. Pieces to ids</h2>
<p>The input is filled up with <code>[PAD]</code> to a fixed length, here {LENGTH}, and told in four rows of numbers.
<b>Token ids</b> number the pieces. <b>Token type ids</b> say whether a piece is of A (0) or B (1). <b>Segment ids</b>
are the mask of attention: tokens see only those of the same number. Here is one example, 1, and 0 is padding; where a
row is packed with several, they are 1, 2, 3 and so on. <b>Position ids</b> count from 0, anew in each packed
example.</p>
{_table("The model's input", parts, pieces, rows)}
<h2>3. Ids to vectors, and their sum</h2>
<p>Each id picks a row of a learned table, and the three rows are added: <i>x</i> = token[<i>token id</i>] +
position[<i>position id</i>] + type[<i>token type id</i>]. A piece has one token vector wherever it stands, such as
<code>[SEP]</code>; position and type tell the two apart.</p>
{_vectors("Three vectors a token, and their sum", pieces, added)}
<h2>4. LayerNorm</h2>
<p>From each sum its mean is taken, and the rest is divided by its standard deviation: <i>y</i> = <i>scale</i> ·
(<i>x</i> − mean) / √(variance + ε) + <i>bias</i>, with ε = {CONFIG.layer_norm_epsilon:g}. Scale and bias are learned;
here they are 1 and 0, as when training starts. In training, dropout comes next. Padding gets vectors, too, but no token
of the text sees them.</p>
{_vectors("What the first layer reads", pieces, normed)}
"""


def _vectors(caption: str, pieces: list[str], groups: dict[str, np.ndarray]) -> str:
    """A table of one row a token and, for each of the groups [S, ...], its columns side by side."""
    widths = [(name, values.shape[1]) for name, values in groups.items()]
    numbers = [number for _, width in widths for number in range(1, width + 1)]
    rows = np.round(np.concatenate(list(groups.values()), axis=1), 2) + 0.0  # no -0.00
    cells = ([f"{value:.2f}".replace("-", "−") for value in row] for row in rows)
    return _table(caption, widths, numbers, zip(pieces, cells, strict=True))


def _table(caption: str, groups: list[tuple[str, int]], columns: Iterable, rows: Iterable[tuple[str, Iterable]]) -> str:
    """`columns` under `groups` (name, how many columns), and rows (name, cells); the keyboard can scroll it."""
    firsts = set(itertools.accumulate((width for _, width in groups), initial=0))

    def line(tag: str, cells: Iterable) -> str:
        marks = (' class="first"' if place in firsts else "" for place in itertools.count())
        return "".join(f"<{tag}{mark}>{html.escape(str(cell))}" for cell, mark in zip(cells, marks, strict=False))

    heads = "".join(f'<th scope="colgroup" class="first" colspan="{width}">{name}' for name, width in groups)
    titles = line('th scope="col"', columns)
    body = "".join(f'<tr><th scope="row">{html.escape(name)}{line("td", cells)}\n' for name, cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>\n<caption>{caption}</caption>\n'
        f"<thead><tr><td>{heads}\n<tr><td>{titles}\n<tbody>{body}</table></div>"
    )


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="page to write (.html)")
    Path(parser.parse_args(argv).output).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
