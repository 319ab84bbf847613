"""The tokenizer command: learn a vocabulary, use it, compare several.

python -m bert_jax.data.tokenizer train   --kind wordpiece --input 'texts/*.txt' --vocab-size 30522 --output T
python -m bert_jax.data.tokenizer encode  --tokenizer T < lines          # JSON lines
python -m bert_jax.data.tokenizer compare --tokenizer T1 T2 --text "…"   # side by side
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_jax.data.tokenizer_model import KINDS, load_tokenizer, publish
from bert_jax.errors import CommandParser, ConfigError, DataError, run_command


def _run_train(args: argparse.Namespace) -> None:
    from bert_jax.data.corpus import read_documents
    from bert_jax.data.tokenizer_training import train_tokenizer

    output = Path(args.output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists already; name a new folder or remove it")
    documents = read_documents(args.input, text_field=args.text_field, documents=args.documents)
    tokenizer = train_tokenizer(
        args.kind,
        (document.text for document in documents),
        vocab_size=args.vocab_size,
        lowercase=args.lowercase,
        strip_accents=args.strip_accents,
    )
    publish(tokenizer, output)
    print(f"{output}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint[:16]}")


def _run_encode(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer, lowercase=args.lowercase, strip_accents=args.strip_accents)
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text, tab, pair = line.decode("utf-8").rstrip("\r\n").partition("\t" if args.pair else "\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: not UTF-8; convert it") from error
        if args.pair and not tab:
            raise DataError(f"standard input, line {number}: --pair wants text, a TAB and a second text")
        found = tokenizer.encode(text, pair if args.pair else None)
        print(json.dumps({"tokens": found.tokens, "ids": found.ids, "type_ids": found.type_ids}), flush=True)


def _run_compare(args: argparse.Namespace) -> None:
    print(compare(args.tokenizer, args.text, lowercase=args.lowercase, strip_accents=args.strip_accents), flush=True)


def compare(paths: list[str], text: str, **switches: bool | None) -> str:
    """A table: one row a word of `text`, one column a tokenizer with its pieces, and their number at the foot."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    columns = [["", *(text[start:end] for start, end in words), "pieces"]]
    for path in paths:
        found = load_tokenizer(path, **switches).encode(text)
        pieces = [(piece, end - 1) for piece, (_, end) in zip(found.tokens, found.offsets, strict=True) if end]
        cells = [" ".join(piece for piece, at in pieces if start <= at < end) for start, end in words]
        columns.append([str(path), *cells, str(len(pieces))])
    widths = [max(map(len, column)) for column in columns]
    rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m bert_jax.data.tokenizer", description="Train, use and compare tokenizers.")
    commands = parser.add_subparsers(required=True, metavar="train|encode|compare")
    train = _command(commands, "train", _run_train, "learn a vocabulary from text", switch_default=False)
    train.add_argument("--kind", choices=KINDS, default="wordpiece")
    train.add_argument(
        "--input", nargs="+", required=True, help="files, globs, folders, .gz, .jsonl, tfds:NAME:SPLIT or builtin"
    )
    train.add_argument("--text-field", default="text", help="key of the text in JSONL and TFDS examples")
    train.add_argument("--documents", choices=("auto", "blank-line", "file", "line"), default="auto")
    train.add_argument("--vocab-size", type=int, default=30522, help="pieces, special ones included")
    train.add_argument("--output", required=True, help="folder to make")
    encode = _command(commands, "encode", _run_encode, "lines on standard input to JSON lines")
    encode.add_argument("--tokenizer", required=True, help="folder, vocab.txt, tokenizer.json or .model")
    encode.add_argument("--pair", action="store_true", help="a line is text, TAB, second text")
    table = _command(commands, "compare", _run_compare, "pieces of one text, side by side")
    table.add_argument("--tokenizer", nargs="+", required=True, help="folders, vocab.txt, tokenizer.json or .model")
    table.add_argument("--text", required=True)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, switch_default: bool | None = None
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("--lowercase", action=argparse.BooleanOptionalAction, default=switch_default)
    command.add_argument("--strip-accents", action=argparse.BooleanOptionalAction, default=switch_default)
    command.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    return command


def main(argv: list[str]) -> int:
    """The commands `train`, `encode` and `compare`."""
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    run_command(main)
