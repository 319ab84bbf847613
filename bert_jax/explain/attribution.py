"""Which words a model's answer rests on, by integrated gradients: a page, and JSON beside it.

The score that is explained is a logit: of a text's label (or the number of a regression), of a word's label, of the
piece at a [MASK], or the sum of an answer's two. Each word gets its share of the difference that the text makes to it,
compared with a baseline that says nothing.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bert_jax.config import PROBLEMS, TaskConfig, did_you_mean
from bert_jax.data.tables import ENDINGS, iterate_examples
from bert_jax.errors import ConfigError, DataError
from bert_jax.explain.words import merge
from bert_jax.page import render
from bert_jax.predict import input_texts
from bert_jax.progress import Progress, say
from bert_jax.storage import check_output, whole_file

if TYPE_CHECKING:
    from bert_jax.bert import Bert, Text
    from bert_jax.explain.gradients import Integral
    from bert_jax.explain.targets import Target

# What is explained, by the names of `predict`'s commands, and the head that says it.
KINDS = {"classify": "classifier", "tag": "tagger", "answer": "span_head", "fill-mask": "mlm_head"}
BASELINES = ("pad", "mask", "zero")
STEPS = 64
LOOSE = 0.01  # share of the difference by which attributions may miss it before the user is told
PAGE_TEXTS = 1000  # more on a page are not read, and would be held in memory


class Piece(NamedTuple):
    """A piece and its attribution; `special` where it was added to the text, as [CLS] is."""

    piece: str
    score: float
    special: bool


class Word(NamedTuple):
    """A word and the sum of its pieces' attributions."""

    word: str
    score: float
    side: int
    """0 in the first text, 1 in the second."""
    start: int
    """Its first character in that text."""
    end: int
    """The character behind its last."""
    first: int
    """Its first piece in `Attribution.pieces`."""
    last: int
    """The piece behind its last."""
    asked: bool
    """Whether `target` is what the model says of this word, or part of its answer."""


class Attribution(NamedTuple):
    """Which words a score rests on."""

    words: list[Word]
    pieces: list[Piece]
    """All that the model reads, in its order: words and special pieces."""
    prediction: str
    probability: float | None
    """Of the prediction; None for a number, and for several labels."""
    target: str
    """What the score is for: a label, an answer, a piece."""
    about: str
    """Which word, mask or question `target` belongs to; "" for labels of texts."""
    total: float
    """Sum over all pieces."""
    value: float
    """The score f(x)."""
    baseline_value: float
    """The score of the baseline."""
    delta: float
    """`total - (value - baseline_value)`: the error of the integral."""
    cut: bool
    """Whether the model reads, and this shows, only a part of the text."""


def attribute(
    bert: "Bert",
    text: str,
    pair: str | None = None,
    *,
    kind: str | None = None,
    target: str | None = None,
    word: int | None = None,
    steps: int = STEPS,
    baseline: str = "pad",
    report: Callable[[int], None] = lambda done: None,
) -> Attribution:
    """Integrated gradients (Sundararajan et al. 2017) with respect to what the embeddings give, after their LayerNorm.

    Args:
      text, pair: one text or two; a question and its context.
      kind: one of KINDS; None takes what the model has: labels of texts, else of words, else of a [MASK]. Answers have
        to be asked for.
      target: the label, or piece, whose score is explained; None is the one that the model predicts.
      word: which word's label, or which [MASK], numbered from 0; None is the first with another label than O.
      steps: points of the integral.
      baseline: pad ([PAD] in the place of all words, as in Captum's tutorials), mask ([MASK]), or zero embeddings.
      report: called with how many points of `steps` + 2 are done.

    Raises ConfigError on a head, label or word that is not there, DataError on a text without the word or [MASK] that
    is asked for. A text without any word has a label, too: all of it then rests on [CLS] and [SEP].
    """
    from bert_jax.explain import gradients, targets

    if steps < 1:
        raise ConfigError(f"steps: {steps}, but the integral needs 1 or more")
    if baseline not in BASELINES:
        raise ConfigError(f"baseline: {baseline!r} is none of {', '.join(BASELINES)}")
    kind = choose_kind(bert.params, kind)
    asked = targets.TARGETS[kind](bert, text, pair, target, word)
    batch = targets.batch_of(asked.reading, bert.tokenizer, bert.config.max_position_embeddings)
    begin = targets.baseline_of(batch, bert.tokenizer, baseline)
    config = targets.float32(bert.config)
    found = gradients.integrated_gradients(
        config, bert.params, batch, asked.numbers, begin, kind=kind, steps=steps, report=report
    )
    return collect(asked, found)


def attribute_stream(bert: "Bert", texts: Iterable["Text"], **settings: Any) -> Iterator[Attribution]:
    """`attribute` to each text or (text, pair), one after the other, in memory that does not grow."""
    for text in texts:
        first, pair = (text, None) if isinstance(text, str) else text
        yield attribute(bert, first, pair, **settings)


def choose_kind(heads: Iterable[str], kind: str | None) -> str:
    """`kind`, or what a model with these heads is asked. Raises ConfigError where it lacks the head."""
    if kind is not None:
        if kind not in KINDS:
            raise ConfigError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
        if KINDS[kind] not in heads:
            raise ConfigError(f"{kind}: the model has no {KINDS[kind]}; name one that was trained for it")
        return kind
    for name in ("classify", "tag", "fill-mask"):
        if KINDS[name] in heads:
            return name
    if KINDS["answer"] in heads:
        raise ConfigError("the model answers questions; give --question and --context")
    raise ConfigError(f"attribution: the model has none of {', '.join(KINDS.values())}; fine-tune it first")


def collect(asked: "Target", found: "Integral") -> Attribution:
    """Attributions [S] of a row as those of its pieces and words."""
    reading, scores = asked.reading, found.scores
    pieces = [
        Piece(token, float(score), span is None)
        for token, score, span in zip(reading.tokens, scores, reading.spans, strict=False)  # padding has no token
    ]
    words, first = [], 1
    for side, text in enumerate(reading.texts):
        count = int((reading.sides == side).sum()) - (2 if side == 0 else 1)  # without the special pieces
        for span in merge(text, reading.spans[first : first + count]):
            inside = range(first + span.first, first + span.last)
            score = float(scores[inside.start : inside.stop].sum())
            is_asked = bool(set(inside) & set(asked.asked))
            words.append(
                Word(
                    text[span.start : span.end], score, side, span.start, span.end, inside.start, inside.stop, is_asked
                )
            )
        first += count + 1
    total = float(scores.sum())
    return Attribution(
        words,
        pieces,
        asked.prediction,
        asked.probability,
        asked.name,
        asked.about,
        total,
        found.value,
        found.baseline_value,
        total - (found.value - found.baseline_value),
        reading.left_out > 0,
    )


def is_loose(found: Attribution) -> bool:
    """Whether the sum misses the difference by more than LOOSE of it, and more than float32 explains."""
    noise = 1e-5 * max(abs(found.value), abs(found.baseline_value), 1)
    return abs(found.delta) > LOOSE * abs(found.value - found.baseline_value) + noise


# The command


class Asked(NamedTuple):
    """A text, or two, and its true label where that is known."""

    text: str
    pair: str | None
    true_label: str | None
    where: str = "--true-label"
    """What names it to the user: an option, or file and line."""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def _place(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `attribution`, but for --model, --output and --debug."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--input", help="table (.csv, .tsv, .jsonl) or one text a line")
    source.add_argument("--question", help="a question; its answer in --context is explained")
    parser.add_argument("--text-b", help="the second text, of a model of pairs")
    parser.add_argument("--context", help="the text that --question is about")
    parser.add_argument("--true-label", help="the label of --text, for the page")
    parser.add_argument("--text-column", help="of a table: column of the text (default: text)")
    parser.add_argument("--text-pair-column", help="of a table: column of the second text")
    parser.add_argument("--label-column", help="of a table: column of the true label (default: label, if there is one)")
    parser.add_argument("--kind", choices=KINDS, help="which head is asked, where the model has several")
    parser.add_argument("--target", help="label, or piece at the [MASK], to explain (default: what is predicted)")
    parser.add_argument("--word", type=_place, help="number from 0 of the word, or the [MASK], to explain")
    parser.add_argument("--steps", type=_count, default=STEPS, help=f"points of the integral (default: {STEPS})")
    parser.add_argument("--baseline", choices=BASELINES, default="pad", help="what words are compared with")


def run(args: argparse.Namespace) -> int:
    """Writes the page `--output`, and the same as JSON beside it."""
    beside = check(args)
    is_pipe = args.input is not None and Path(args.input).is_fifo()
    count = None if is_pipe else sum(1 for _ in asked_of(args))  # and what is wrong in a file is told at once
    if count == 0:
        raise DataError(f"{args.input}: no text in it")
    from bert_jax.bert import load  # JAX is imported when there is something to do

    bert = load(args.model)
    kind = choose_kind(bert.params, "answer" if args.question is not None else args.kind)
    known = bert.labels if kind in ("classify", "tag") and bert.problem == PROBLEMS[0] else None
    strange = strange_label(() if is_pipe else asked_of(args), known)
    if strange and args.true_label is not None:
        raise ConfigError(strange)
    if strange and args.label_column:
        raise DataError(strange)
    if strange:  # the column only happens to be called "label"
        say(f"note: {strange}; true labels are shown, but not compared")
    settings = {"kind": kind, "target": args.target, "word": args.word, "steps": args.steps, "baseline": args.baseline}
    # Of one text, which may be long, the points are counted.
    progress = Progress("attribution", *((count, "texts") if args.input else (args.steps + 2, "points")))
    watch = {} if args.input else {"report": progress.update}
    rows, errors, cut, done = [], [], 0, 0
    with whole_file(args.output, "w") as page, whole_file(beside, "w") as lines:
        for done, asked in enumerate(asked_of(args), 1):
            found = attribute(bert, asked.text, asked.pair, **settings, **watch)
            line = json.dumps(record(asked, found, settings), ensure_ascii=False)
            lines.write(f"{'[' if done == 1 else ','}\n{line}")
            if done <= PAGE_TEXTS:
                rows.append(page_row(asked, found))
            if is_loose(found):
                errors.append(abs(found.delta / ((found.value - found.baseline_value) or 1)))
            cut += found.cut
            if args.input:
                progress.update(done)
        if not done:
            raise DataError(f"{args.input}: no text in it")
        lines.write("\n]\n")
        facts = {"kind": kind, "steps": args.steps, "baseline": args.baseline, "model": args.model, "texts": done}
        # Of several labels one that is explained can be one of the true.
        facts["judged"] = bert.problem == PROBLEMS[0] and not strange
        page.write(render(f"Word importance: {args.model}", "attribution", facts | {"rows": rows}))
    progress.close()
    if cut:
        say(f"note: {cut:,} of the texts are longer than what the model reads at once; only that part is explained")
    if errors:
        say(
            f"note: the words of {len(errors):,} of {done:,} texts add up to the score's change only within "
            f"{100 * max(errors):.1f} %; raise --steps above {args.steps}"
        )
    if done > PAGE_TEXTS:
        say(f"note: the page shows the first {PAGE_TEXTS:,} of {done:,} texts, {beside} has all")
    return 0


def check(args: argparse.Namespace) -> str:
    """Where the JSON goes. Raises ConfigError on arguments that do not belong together."""
    stem, ending = os.path.splitext(args.output)
    check_output("--output", args.output)
    if ending.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {args.output}: name a page, such as words.html; its numbers go to .json beside it")
    if (args.question is None) != (args.context is None):
        raise ConfigError("--question needs --context, and --context a --question")
    if args.question is not None and args.kind not in (None, "answer"):
        raise ConfigError(f"--kind {args.kind}: a question has an answer; leave it out")
    if args.kind == "answer" and args.question is None:
        raise ConfigError("--kind answer: give --question and --context")
    if args.text_b is not None and args.text is None:
        raise ConfigError("--text-b goes with --text; in a table name --text-pair-column")
    for option in ("text_column", "text_pair_column", "label_column"):
        if getattr(args, option) is not None and not args.input:
            raise ConfigError(f"--{option.replace('_', '-')} goes with --input")
    if args.true_label is not None and args.input:
        raise ConfigError("--true-label goes with one text; in a table name --label-column")
    beside = f"{stem}.json"
    if args.input and os.path.realpath(args.input) in map(os.path.realpath, (args.output, beside)):
        raise ConfigError(f"--output {args.output}: {args.input} would be overwritten, since {beside} is written, too")
    return beside


def strange_label(texts: Iterable[Asked], known: tuple[str, ...] | None) -> str:
    """Of the first true label that is not among those of the model what is wrong, in words; "" where there is none."""
    for asked in texts if known is not None else ():
        if asked.true_label is not None and asked.true_label not in known:
            hint = did_you_mean(asked.true_label, known)
            return f"{asked.where}: {asked.true_label!r}, but the model's labels are {', '.join(known)}{hint}"
    return ""


def asked_of(args: argparse.Namespace) -> Iterator[Asked]:
    """The texts that the command line gives or names, from the beginning at each call."""
    if args.question is not None:
        yield Asked(args.question, args.context, args.true_label)
    elif args.text is not None:
        yield Asked(args.text, args.text_b, args.true_label)
    elif args.input.rsplit(".", 1)[-1].lower() in ENDINGS:
        columns = _columns(args)
        for example in iterate_examples(args.input, columns, labelled=bool(args.label_column)):
            label = ", ".join(example.label) if isinstance(example.label, tuple) else example.label
            yield Asked(example.text, example.pair, label, f"{args.input}: line {example.line}")
    else:
        if args.label_column:
            raise ConfigError(f"--input {args.input}: a column is of tables, whose names end in .csv, .tsv or .jsonl")
        for text in input_texts(args.input, _columns(args)):
            yield Asked(text, None, None)


def _columns(args: argparse.Namespace) -> TaskConfig:
    named = {name: getattr(args, name) for name in ("text_column", "text_pair_column", "label_column")}
    return TaskConfig(**{name: column for name, column in named.items() if column is not None})


# What is written


def record(asked: Asked, found: Attribution, settings: dict[str, Any]) -> dict[str, Any]:
    """One text of the JSON file."""
    texts = {"text": asked.text} | ({} if asked.pair is None else {"text_b": asked.pair})
    numbers = {name: _short(getattr(found, name)) for name in ("total", "value", "baseline_value", "delta")}
    return {
        **texts,
        "true_label": asked.true_label,
        "prediction": found.prediction,
        "probability": None if found.probability is None else _short(found.probability),
        "target": found.target,
        "about": found.about,
        **numbers,
        **{name: settings[name] for name in ("kind", "steps", "baseline")},
        "cut": found.cut,
        "words": [
            {"word": word.word, "score": _short(word.score), "start": word.start, "end": word.end, "text": word.side}
            for word in found.words
        ],
        "pieces": [piece._asdict() | {"score": _short(piece.score)} for piece in found.pieces],
    }


def page_row(asked: Asked, found: Attribution) -> dict[str, Any]:
    """One row of the page's table. Its items are words and special pieces in the order in which the model reads them;
    of an item `gap` says that a space stands before it, and `pieces` are named where there are several."""
    items, end = [], 0
    words = {word.first: word for word in found.words}
    for number, piece in enumerate(found.pieces):
        if piece.special:
            items.append({"text": piece.piece, "score": _short(piece.score), "special": True, "gap": True})
            end = 0
        elif number in words:
            word = words[number]
            item = {"text": word.word, "score": _short(word.score), "gap": word.start > end or end == 0}
            parts = found.pieces[word.first : word.last]
            if len(parts) > 1:
                item["pieces"] = [[part.piece, _short(part.score)] for part in parts]
            items.append(item | ({"asked": True} if word.asked else {}))
            end = word.end
    return {
        "true": asked.true_label,
        "predicted": found.prediction,
        "probability": found.probability,
        "target": found.target,
        "about": found.about,
        "total": _short(found.total),
        "delta": _short(found.delta),
        "value": _short(found.value),
        "baseline": _short(found.baseline_value),
        "loose": is_loose(found),
        "cut": found.cut,
        "items": items,
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")
