"""Uses a trained model: fill-mask and classify, as a command and from Python.

python -m bert_jax.predict fill-mask --model M --text "Paris is the [MASK] of France."
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bert_jax.config import TaskConfig
from bert_jax.errors import CommandParser, DataError, run_command

if TYPE_CHECKING:
    from bert_jax.bert import Bert


def input_texts(path: str, columns: TaskConfig) -> Iterator[str | tuple[str, str]]:
    """Texts of a table with named columns (.csv, .tsv, .jsonl), else of a plain file with one text a line."""
    if path.rsplit(".", 1)[-1].lower() in ("csv", "tsv", "jsonl"):
        from bert_jax.tasks.classify import iterate_examples

        for example in iterate_examples(path, columns, labelled=False):
            yield example.text if example.pair is None else (example.text, example.pair)
        return
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; name a table (.csv, .tsv, .jsonl) or a file with one text a line")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    columns = TaskConfig()
    parser = CommandParser(prog="python -m bert_jax.predict", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fill = commands.add_parser("fill-mask", help="the likeliest pieces for each [MASK]")
    fill.add_argument("--text", required=True, help="text with one or more [MASK]")
    fill.add_argument("--top", type=_positive, default=5, help="pieces for each mask (default: 5)")
    label = commands.add_parser("classify", help="labels of texts")
    source = label.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--input", help="table (.csv, .tsv, .jsonl) or one text a line")
    label.add_argument("--text-column", default=columns.text_column, help="column of the text (default: text)")
    label.add_argument("--text-pair-column", default="", help="column of the second text")
    for command in (fill, label):
        command.add_argument("--model", required=True, help="model directory, workdir or checkpoint step")
        command.add_argument("--output", help="file for the JSON lines (default: stdout)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def results(bert: "Bert", args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One dictionary an output line."""
    if args.command == "fill-mask":
        for number, pieces in enumerate(bert.fill_mask(args.text, args.top)):
            yield from ({"mask": number, **piece} for piece in pieces)
    elif args.text is not None:
        yield from bert.classify([args.text])
    else:
        columns = TaskConfig(text_column=args.text_column, text_pair_column=args.text_pair_column)
        yield from bert.classify_stream(input_texts(args.input, columns))


def main(argv: list[str]) -> int:
    """JSON lines to stdout, or to `--output`."""
    args = parse(argv)
    from bert_jax.bert import load  # JAX is imported when there is something to do

    bert = load(args.model)
    output = open(args.output, "w", encoding="utf-8") if args.output else sys.stdout  # noqa: SIM115
    for line in results(bert, args):
        print(json.dumps(line, ensure_ascii=False), file=output)
    if args.output:
        output.close()
    return 0


if __name__ == "__main__":
    run_command(main)
