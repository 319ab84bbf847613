"""The tokenizer command: learn a vocabulary, use it, compare several.

python -m bert_jax.data.tokenizer train   --kind wordpiece --input 'texts/*.txt' --vocab-size 30522 --output T
python -m bert_jax.data.tokenizer encode  --tokenizer T < lines          # JSON lines
python -m bert_jax.data.tokenizer compare --tokenizer T1 T2 --text "…"   # side by side; --output compare.html
"""

import argparse
import bisect
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bert_jax.data.tokenizer_model import KINDS, Tokenizer, load_tokenizer, publish
from bert_jax.errors import CommandParser, ConfigError, DataError, run_command
from bert_jax.page import render
from bert_jax.storage import check_output, whole_file

# Black on light blue and light orange by turns, white on dark red: each says both, so any terminal's ground will do.
_SHADES = ("\x1b[38;5;16;48;5;153m", "\x1b[38;5;16;48;5;223m")
_UNKNOWN = "\x1b[1;38;5;231;48;5;124m"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control, format and half characters, line and paragraph ends


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
    if args.output:
        check_output("--output", args.output)
    switches = {"lowercase": args.lowercase, "strip_accents": args.strip_accents}
    tokenizers = [load_tokenizer(path, **switches) for path in args.tokenizer]
    found = [compare(tokenizers, text) for text in args.text]
    if args.output:
        data = {"tokenizers": args.tokenizer, "texts": [one._asdict() for one in found]}
        page = render(f"Tokenizers compared: {' / '.join(args.text)}", "compare", data)
        with whole_file(args.output, "w") as file:
            file.write(page)
        print(f"{args.output}: {len(found)} texts, {len(tokenizers)} tokenizers", flush=True)
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print("\n\n".join(table(args.tokenizer, one, colour=colour) for one in found), flush=True)


class Piece(NamedTuple):
    """A piece as it is compared."""

    text: str
    id: int
    unknown: bool


class Comparison(NamedTuple):
    """One text as several tokenizers see it."""

    words: list[str]
    """What stands between spaces; all of a text without any visible character."""
    pieces: list[list[list[Piece]]]
    """Of each tokenizer, of each word: its pieces, no [CLS] and [SEP] added."""


def compare(tokenizers: list[Tokenizer], text: str) -> Comparison:
    """The words of `text`, and the pieces that each tokenizer makes of them.

    A piece belongs to the word of its last character, and a space, such as a lone `▁`, to the word behind it.
    """
    words = list(re.finditer(r"\S+|^\s*$", text))
    ends = [word.end() for word in words]
    rows = []
    for tokenizer in tokenizers:
        row: list[list[Piece]] = [[] for _ in words]
        found = tokenizer.encode(text)
        for piece, index, (start, end) in list(zip(found.tokens, found.ids, found.offsets, strict=True))[1:-1]:
            place = bisect.bisect_right(ends, max(start, end - 1))
            row[min(place, len(words) - 1)].append(Piece(piece, index, index == tokenizer.unk_id))
        rows.append(row)
    return Comparison([word[0].strip() for word in words], rows)


def table(names: list[str], found: Comparison, *, colour: bool = False) -> str:
    """One row a word, one column a tokenizer with its pieces, and their number at the foot.

    `colour` paints the pieces for a terminal: without its escapes the text is the same.
    """
    paint = _paint if colour else lambda piece, _: piece.text
    columns = [[(word, word) for word in ("", *map(_printable, found.words), "pieces")]]  # (text, what is printed)
    for name, row in zip(_short(names), found.pieces, strict=True):
        cells = [[piece._replace(text=_printable(piece.text)) for piece in cell] for cell in row]
        texts = [" ".join(piece.text for piece in cell) for cell in cells]
        painted = [" ".join(map(paint, cell, itertools.cycle(_SHADES))) for cell in cells]
        count = str(sum(map(len, row)))
        columns.append([(name, name), *zip(texts, painted, strict=True), (count, count)])
    widths = [max(_width(text) for text, _ in column) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = (shown + " " * (width - _width(text)) for (text, shown), width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _paint(piece: Piece, shade: str) -> str:
    return f"{_UNKNOWN if piece.unknown else shade}{piece.text}\x1b[0m"


def _short(paths: list[str]) -> list[str]:
    """The ends of paths, no longer than it takes to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts))):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(set(paths)):
            return ends
    return paths


def _printable(text: str) -> str:
    """`text` with what would steer a terminal, or not show, as escapes."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) in _UNSEEN else character for character in text
    )


def _width(text: str) -> int:
    """Columns that `text` takes on a terminal: East Asian wide characters take two, accents that combine none."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


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
    compared = _command(commands, "compare", _run_compare, "pieces of texts, side by side")
    compared.add_argument("--tokenizer", nargs="+", required=True, help="folders, vocab.txt, tokenizer.json or .model")
    compared.add_argument("--text", action="append", required=True, help="may be given several times")
    compared.add_argument("--output", help="page to write (.html), instead of a table on standard output")
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
