"""Uses a trained model: masks filled, vectors, similarity, labels, entities, answers; JSON lines on stdout.

python -m bert_jax.predict fill-mask --model M --text "Paris is the [MASK] of France."
"""

import argparse
import json
import os
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from bert_jax.config import TaskConfig
from bert_jax.data.tables import ENDINGS, iterate_examples
from bert_jax.errors import CommandParser, ConfigError, DataError, run_command
from bert_jax.process import keep_memory
from bert_jax.storage import check_output, whole_file

if TYPE_CHECKING:
    from bert_jax.bert import Bert, Text


def input_texts(path: str, columns: TaskConfig) -> Iterator["Text"]:
    """Texts, or pairs where a pair column is named, of a table (.csv, .tsv, .jsonl); else one text a line."""
    if path.rsplit(".", 1)[-1].lower() in ENDINGS:
        for example in iterate_examples(path, columns, labelled=False):
            yield example.text if example.pair is None else (example.text, example.pair)
    elif columns != TaskConfig():
        raise ConfigError(f"--input {path}: columns are of tables, whose names end in .csv, .tsv, .jsonl or .xml")
    else:
        yield from _lines(path)


def input_pairs(path: str, columns: TaskConfig) -> Iterator[tuple[str, str]]:
    """Pairs of texts: two columns that are named, else the two cells of each line of a file without header."""
    if columns.text_pair_column:
        yield from input_texts(path, columns)
        return
    for number, line in enumerate(_lines(path), 1):
        cells = line.split("\t")
        if len(cells) != 2:
            raise DataError(
                f"{path}: line {number}: {len(cells)} cells, not two with a tab between them; in a table with a header "
                "name the columns with --text-column and --text-pair-column"
            )
        yield cells[0], cells[1]


def _lines(path: str) -> Iterator[str]:
    if not os.path.exists(path) or os.path.isdir(path):
        raise DataError(f"{path}: no such file; name a table (.csv, .tsv, .jsonl) or a file with one text a line")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); unpack or convert it") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m bert_jax.predict", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, use: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=use, description=use)
        added.add_argument("--model", required=True, help="model directory, workdir or checkpoint step")
        added.add_argument("--output", help="file for the results (default: JSON lines on stdout)")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    def texts(parser: argparse.ArgumentParser, one: bool = True, pairs: bool = True) -> None:
        source = parser.add_mutually_exclusive_group(required=True) if one else parser
        if one:
            source.add_argument("--text", help="one text")
        source.add_argument("--input", required=not one, help="table (.csv, .tsv, .jsonl) or one text a line")
        parser.add_argument("--text-column", default="text", help="column of the text (default: text)")
        if pairs:
            parser.add_argument("--text-pair-column", default="", help="column of the second text")
        else:
            parser.set_defaults(text_pair_column="")

    fill = command("fill-mask", "the likeliest pieces for each [MASK]")
    fill.add_argument("--text", required=True, help="text with one or more [MASK]")
    fill.add_argument("--top", type=_positive, default=5, help="pieces for each mask (default: 5)")
    vectors = command("embed", "vectors of texts; with --output a NumPy file")
    texts(vectors)
    vectors.add_argument("--pooling", choices=("mean", "cls", "last4"), default="mean", help="default: mean")
    vectors.add_argument("--layers", nargs="+", default=[], help="numbers from 0 (embeddings), or all; default: last")
    texts(command("similarity", "cosine of the vectors of two texts; --input has a tab between them"), one=False)
    texts(command("classify", "labels of texts"))
    texts(command("tag", "a label for each word, and entities"), pairs=False)
    reply = command("answer", "the answer to a question in a text")
    source = reply.add_mutually_exclusive_group(required=True)
    source.add_argument("--question", help="one question")
    source.add_argument("--input", help="questions in SQuAD's JSON layout; the output is its predictions.json")
    reply.add_argument("--context", help="the text that --question is about")
    reply.add_argument("--top", type=_positive, default=1, help="answers to --question (default: 1)")
    return parser.parse_args(argv)


def results(bert: "Bert", args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One dictionary an output line."""
    if args.command == "fill-mask":
        for number, pieces in enumerate(bert.fill_mask(args.text, args.top)):
            yield from ({"mask": number, **piece} for piece in pieces)
    elif args.command == "answer" and args.question is not None:
        yield from bert.answer(args.question, args.context, args.top)
    elif args.command == "answer":
        from bert_jax.tasks.squad import read_questions

        questions = read_questions(args.input)
        asked = ((question.text, question.context) for question in questions)
        for question, found in zip(questions, bert.answer_stream(asked), strict=True):
            yield {"id": question.id, **found[0]}
    else:
        if args.command == "similarity":
            pairs = input_pairs(args.input, columns_of(args))
            yield from ({"similarity": value} for value in bert.similarity_stream(pairs))
            return
        texts = texts_of(args)
        if args.command == "classify":
            yield from bert.classify_stream(texts)
        elif args.command == "tag":
            yield from bert.tag_stream(texts)
        else:
            found = bert.embed_stream(texts, args.pooling, layer_numbers(args.layers))
            yield from ({"embedding": vector.tolist()} for vector in found)


def columns_of(args: argparse.Namespace) -> TaskConfig:
    """The columns that the command line names."""
    return TaskConfig(text_column=args.text_column, text_pair_column=args.text_pair_column)


def texts_of(args: argparse.Namespace) -> Iterator["Text"]:
    """The texts that the command line gives or names."""
    return iter([args.text]) if args.text is not None else input_texts(args.input, columns_of(args))


def layer_numbers(words: list[str]) -> list[int] | str:
    """`--layers`: numbers, or "all". Raises ConfigError."""
    if words == ["all"]:
        return "all"
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--layers {' '.join(words)}: give numbers from 0, or all")
    return [int(word) for word in words]


def write_vectors(
    bert: "Bert", texts: Iterator["Text"], pooling: str, layers: list[int] | str, file: IO[bytes]
) -> None:
    """`embed` as a NumPy file, in memory that does not grow with the input."""
    from numpy.lib.format import write_array_header_1_0

    header = {"descr": "<f4", "fortran_order": False, "shape": (0, *bert.vector_shape(pooling, layers))}
    write_array_header_1_0(file, header)
    begin, count = file.tell(), 0
    for vector in bert.embed_stream(texts, pooling, layers):
        file.write(vector.astype("<f4").tobytes())
        count += 1
    file.seek(0)
    write_array_header_1_0(file, header | {"shape": (count, *header["shape"][1:])})  # NumPy leaves room for the count
    assert file.tell() == begin


def main(argv: list[str]) -> int:
    """JSON lines to stdout; to `--output` the same, or a NumPy file (embed), or SQuAD's predictions (answer)."""
    args = parse(argv)
    if args.output:
        check_output("--output", args.output)
    if args.command == "answer" and (args.question is None) != (args.context is None):
        raise ConfigError("answer: --question needs --context, and --input has its own")
    keep_memory()
    from bert_jax.bert import load  # JAX is imported when there is something to do

    bert = load(args.model)
    if not args.output:
        for line in results(bert, args):
            print(json.dumps(line, ensure_ascii=False))
        return 0
    vectors = args.command == "embed"
    if vectors and os.path.exists(args.output) and not os.path.isfile(args.output):
        raise ConfigError(f"--output {args.output}: a NumPy file cannot go into a pipe or device; name a file")
    with whole_file(args.output, "wb" if vectors else "w") as file:
        if vectors:
            write_vectors(bert, texts_of(args), args.pooling, layer_numbers(args.layers), file)
        elif args.command == "answer" and args.input:
            texts = (f"{json.dumps(line['id'])}: {json.dumps(line['text'])}" for line in results(bert, args))
            file.writelines(f"{',' if number else '{'}\n {text}" for number, text in enumerate(texts))
            file.write("\n}\n")
        else:
            file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in results(bert, args))
    return 0


if __name__ == "__main__":
    run_command(main)
