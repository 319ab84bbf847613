"""Attribution: shares that add up, equal to Captum's, in words of any tokenizer, for every head; bad use in a line."""

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import optax
import pytest

import bert_jax
from bert_jax import convert
from bert_jax.data.features import Features, collate, featurize
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.errors import ConfigError, DataError
from bert_jax.explain import __main__ as explain
from bert_jax.explain import gradients, targets
from bert_jax.explain.attribution import (
    BASELINES,
    KINDS,
    Asked,
    attribute,
    attribute_stream,
    choose_kind,
    is_loose,
    page_row,
)
from bert_jax.explain.words import merge
from bert_jax.tasks import classify, pretrain
from tests.conftest import LETTER

GOOD = "the function returns a good value, and the value is one that you'd use"
BAD = "the function raises an error; it isn't used"
FIRST, SECOND = "a value that the function returns", "it isn't the value, but an error!"


@pytest.fixture(scope="module")
def bert(small_config, tokenizer, tmp_path_factory):
    """A model with a classifier that was trained to tell GOOD from BAD, and with a masked language model's head."""
    config = dataclasses.replace(small_config.model, initializer_range=0.1)
    params = pretrain.init(config, jax.random.key(0)) | classify.init(config, 2, jax.random.key(1))
    halves = [(text[:cut], text[cut:]) for text in (GOOD, BAD) for cut in (0, 12, 20, 30)]
    firsts, pairs = zip(*halves, strict=True)
    batch = collate(featurize(firsts, pairs, tokenizer, 64), np.arange(8), tokenizer.pad_id, 32)
    batch |= {"labels": np.repeat([1, 0], 4), "label_weights": np.ones(8, np.float32)}
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return classify.sums(config, params, batch, None, problem=classify.ONE)["loss"][0] / 8

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(40):
        params, state = step(params, state)
    folder = tmp_path_factory.mktemp("explained") / "m"
    convert.save_model(str(folder), jax.device_get(params), config, tokenizer, labels=("bad", "good"))
    loaded = bert_jax.load(str(folder))
    loaded.folder = str(folder)
    return loaded


@pytest.fixture(scope="module")
def heads(small_config, tokenizer, tmp_path_factory):
    """A model directory for words, one for spans, and classifiers of other problems, of 64 positions."""
    config = dataclasses.replace(small_config.model, initializer_range=0.2)
    params = jax.device_get(jax.jit(functools.partial(classify.init, config, 3))(jax.random.key(0)))
    encoder = {name: params[name] for name in ("embeddings", "layers")}

    def head(count):  # all heads are one linear map
        return {"dense": {name: weights[..., :count] for name, weights in params["classifier"]["dense"].items()}}

    folder = tmp_path_factory.mktemp("heads")
    single, several, number = convert.PROBLEMS
    for name, found, labels, problem in (
        ("tag", encoder | {"tagger": head(3)}, ("O", "B-X", "I-X"), single),
        ("answer", encoder | {"span_head": head(2)}, (), single),
        ("several", params, ("a", "b", "c"), several),
        ("number", params | {"classifier": head(1)}, ("score",), number),
    ):
        convert.save_model(str(folder / name), found, config, tokenizer, labels=labels, problem=problem)
    return folder


def summed(found):
    return sum(word.score for word in found.words) + sum(piece.score for piece in found.pieces if piece.special)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("text", [(GOOD, None), (FIRST, SECOND)], ids=["one", "pair"])
def test_shares_add_up_to_the_change_of_the_score(bert, text, baseline):
    found = attribute(bert, *text, baseline=baseline)
    change = found.value - found.baseline_value
    assert abs(change) > 0.01
    assert abs(found.delta) < 0.01 * abs(change) and not is_loose(found)
    assert found.total == pytest.approx(change + found.delta, abs=1e-9) == pytest.approx(summed(found), abs=1e-9)
    coarse = attribute(bert, *text, baseline=baseline, steps=1)
    assert abs(coarse.delta) > abs(found.delta)
    assert (coarse.value, coarse.baseline_value) == pytest.approx((found.value, found.baseline_value), abs=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("text", [(GOOD, None), (FIRST, SECOND)], ids=["one", "pair"])
@pytest.mark.parametrize("target", [0, 1])
def test_equal_to_captum(bert, text, target):
    """Its LayerIntegratedGradients with its defaults, on the folder that we wrote and transformers reads."""
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bert.folder, attn_implementation="eager").eval()
    reading = targets.of_label(bert, *text, None, None).reading
    ids, types = (torch.tensor(array[None].astype(np.int64)) for array in (reading.ids, reading.sides))
    special = np.array([span is None for span in reading.spans])
    reference = torch.tensor(np.where(special, reading.ids, bert.tokenizer.pad_id)[None].astype(np.int64))

    def logits(ids, types, mask):
        return model(input_ids=ids, token_type_ids=types, attention_mask=mask).logits

    method = captum.LayerIntegratedGradients(logits, model.bert.embeddings)
    theirs, delta = method.attribute(
        ids,
        baselines=reference,
        additional_forward_args=(types, torch.ones_like(ids)),
        target=target,
        n_steps=50,
        method="gausslegendre",
        return_convergence_delta=True,
    )
    theirs = theirs.sum(-1)[0].detach().numpy()
    found = attribute(bert, *text, target=bert.labels[target], steps=50)
    ours = np.array([piece.score for piece in found.pieces])
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=1e-4)
    assert found.delta == pytest.approx(float(delta), abs=2e-5)


def test_steps_at_once_give_the_same_as_one_by_one(bert):
    asked = targets.of_label(bert, GOOD, None, None, None)
    features = Features([asked.reading.ids], [asked.reading.sides])
    batch = collate(features, np.array([0]), bert.tokenizer.pad_id, 32)
    begin = targets.baseline_of(batch, bert.tokenizer, "pad")
    run = functools.partial(gradients.integrated_gradients, bert.config, bert.params, batch, asked.numbers, begin)
    found = [run(kind="classify", steps=10, tokens=tokens) for tokens in (1, 120, 1024)]
    for other in found[1:]:
        np.testing.assert_allclose(other.scores, found[0].scores, atol=1e-6)
        assert other.value == pytest.approx(found[0].value, abs=1e-5)
    assert (found[0].scores[len(asked.reading.ids) :] == 0).all()  # padding has no part in it
    long = attribute(bert, f"{GOOD} " * 9)
    assert long.cut and len(long.pieces) == 64 and long.total == pytest.approx(summed(long), abs=1e-9)


TEXTS = {
    "It isn't bad: 3.5 stars!": ["It", "isn't", "bad", ":", "3.5", "stars", "!"],
    "a well-made, “quiet” film": ["a", "well-made", ",", "“", "quiet", "”", "film"],
    "Das ist schön...": ["Das", "ist", "schön", ".", ".", "."],
    "cafe\u0301 na\u0303o \u200b soft\u00adhyphen": ["cafe\u0301", "na\u0303o", "soft\u00adhyphen"],
    "我在 ab我": ["我", "在", "ab", "我"],
}


@pytest.mark.parametrize("text", TEXTS)
def test_words_of_a_known_text(tokenizer, text):
    pieces = tokenizer.pieces(text)
    found = [text[word.start : word.end] for word in merge(text, [span for _, _, span in pieces])]
    assert found == TEXTS[text]


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram", "sentencepiece"])
def any_tokenizer(request):
    return train_tokenizer(request.param, iter(LETTER.split("\n") * 20), vocab_size=300)


def blanks(pieces):
    """Those with a space inside."""
    return [piece for piece in pieces if re.search(r"\s", piece)]


def test_words_are_the_same_in_every_tokenizer(any_tokenizer):
    """Every visible character is in one word and every piece too; words of known pieces are those of the text."""
    texts = [*TEXTS, LETTER, "  two  spaces\tand\nlines ", "naïve café — 100 % 🙂🙂 done", "x" * 120, "( (a) )"]
    for text in texts:
        spans = [span for _, _, span in any_tokenizer.pieces(text)]
        words = merge(text, spans)
        bounds = [(word.first, word.last) for word in words]
        assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])] and bounds[-1][1] == len(spans)
        shown = [text[word.start : word.end] for word in words]
        inside = [text[start:end].strip() for start, end in spans]  # SentencePiece reads "— %", unknown, as one piece
        assert not any(re.search(r"\s", word) and not any(map(word.__contains__, blanks(inside))) for word in shown)
        visible = "".join(text.split())
        assert "".join(shown).replace("\u200b", "") == visible.replace("\u200b", "")
    expected = re.findall(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]", LETTER)
    spans = [span for _, _, span in any_tokenizer.pieces(LETTER)]
    assert [LETTER[word.start : word.end] for word in merge(LETTER, spans)] == expected


def test_pieces_that_stand_for_blanks_go_with_a_word():
    assert merge("", []) == []
    assert [word[:] for word in merge("  ", [(0, 2)])] == [(0, 2, 0, 1)]
    spans = [(0, 0), (0, 2), (2, 3), (3, 5), (5, 5)]  # ▁ ab ▁ cd ▁
    assert [word[:] for word in merge("ab cd", spans)] == [(0, 2, 0, 2), (3, 5, 2, 5)]
    letter = [(0, 1), (0, 1), (0, 1), (1, 2)]  # a letter of three bytes
    assert [word[:] for word in merge("é.", letter)] == [(0, 1, 0, 3), (1, 2, 3, 4)]


def test_labels_of_texts(bert, heads):
    good, bad = attribute_stream(bert, [GOOD, BAD])
    assert (good.prediction, good.target, bad.prediction) == ("good", "good", "bad")
    assert good.probability == pytest.approx(bert.classify([GOOD])[0]["probability"], abs=1e-5)
    other = attribute(bert, GOOD, target="bad")
    assert other.prediction == "good" and other.target == "bad" and other.value < good.value
    assert [word.word for word in bad.words][-4:] == [";", "it", "isn't", "used"]
    pair = attribute(bert, FIRST, SECOND)
    assert {word.side for word in pair.words} == {0, 1} and sum(piece.special for piece in pair.pieces) == 3
    for word in pair.words:
        assert (FIRST, SECOND)[word.side][word.start : word.end] == word.word
        assert word.score == pytest.approx(sum(piece.score for piece in pair.pieces[word.first : word.last]))
    several = attribute(bert_jax.load(str(heads / "several")), GOOD, target="b")
    assert several.target == "b" and several.probability is None
    number = bert_jax.load(str(heads / "number"))
    found = attribute(number, GOOD)
    assert found.probability is None and found.value == pytest.approx(number.classify([GOOD])[0]["score"], abs=1e-4)
    empty = attribute(bert, "")
    assert empty.words == [] and empty.total == pytest.approx(0, abs=1e-6) and not is_loose(empty)


def test_the_label_of_a_word(heads):
    bert = bert_jax.load(str(heads / "tag"))
    said = bert.tag(GOOD)
    found = attribute(bert, GOOD)
    chosen = next((place for place, label in enumerate(said["labels"]) if label != "O"), 0)
    assert found.prediction == found.target == said["labels"][chosen]
    assert found.about == f"label of word {chosen}, {said['words'][chosen]!r}"
    assert [word.word for word in found.words if word.asked] == [said["words"][chosen]]
    second = attribute(bert, GOOD, word=2, target="I-X")
    assert second.target == "I-X" and [word.word for word in second.words if word.asked] == ["returns"]
    long = f"{GOOD} " * 9
    words = bert.tag(long)
    late = attribute(bert, long, word=100)
    assert late.cut and late.prediction == words["labels"][100]
    asked = next(word for word in late.words if word.asked)
    assert (
        long[asked.start : asked.end].startswith(words["words"][100])
        or words["words"][100] in long[asked.start : asked.end]
    )


def test_an_answer(heads):
    bert = bert_jax.load(str(heads / "answer"))
    for context in (GOOD, f"{GOOD}. {BAD}. " * 8):
        best = bert.answer("what is returned?", context)[0]
        found = attribute(bert, "what is returned?", context, kind="answer")
        assert found.target == found.prediction == best["text"]
        assert found.value == pytest.approx(best["score"], abs=1e-3)
        asked = [word for word in found.words if word.asked]
        assert all(word.side == 1 and word.end > best["start"] and word.start < best["end"] for word in asked)
        assert asked and abs(found.total - summed(found)) < 1e-9
    bert.null_threshold = -1e9
    assert attribute(bert, "what?", GOOD, kind="answer").target == "(no answer)"


def test_a_masked_piece(bert):
    text = "the function [MASK] a value of the [MASK]"
    best = bert.fill_mask(text)
    for number in range(2):
        found = attribute(bert, text, kind="fill-mask", word=number)
        assert found.target == best[number][0]["token"]
        assert found.probability == pytest.approx(best[number][0]["probability"], abs=1e-5)
        assert [word.word for word in found.words if word.asked] == ["[MASK]"]
    assert attribute(bert, text, kind="fill-mask", target="value").target == "value"
    long = f"{GOOD} " * 9 + text
    found = attribute(bert, long, kind="fill-mask", word=1)
    assert found.cut and found.target == bert.fill_mask(long)[1][0]["token"]


def test_which_head_is_asked():
    assert choose_kind(["classifier", "mlm_head"], None) == "classify"
    assert choose_kind(["tagger", "mlm_head"], None) == "tag"
    assert choose_kind(["mlm_head"], None) == "fill-mask"
    assert choose_kind(["classifier", "mlm_head"], "fill-mask") == "fill-mask"
    assert set(KINDS) == set(targets.TARGETS)


# The command


def run(bert, *words):
    return explain.main(["attribution", "--model", bert.folder, *map(str, words)])


def test_the_command_writes_a_page_and_json(bert, tmp_path, capsys):
    """A text in a file gives what it gives alone."""
    alone, table, many = tmp_path / "one.html", tmp_path / "t.csv", tmp_path / "many.html"
    assert run(bert, "--text", GOOD, "--true-label", "bad", "--output", alone) == 0
    said = capsys.readouterr()
    assert said.out == "" and "attribution: 66/66 points (100 %)" in said.err
    table.write_text(f'text,label\n"{GOOD}",bad\n"{BAD}",bad\n')
    assert run(bert, "--input", table, "--output", many) == 0
    one, two = (json.loads(page.with_suffix(".json").read_text()) for page in (alone, many))
    assert one == two[:1] and len(two) == 2
    assert one[0]["true_label"] == "bad" and one[0]["prediction"] == "good" and one[0]["steps"] == 64
    words = sum(part["score"] for part in one[0]["words"])
    special = sum(part["score"] for part in one[0]["pieces"] if part["special"])
    assert words + special == pytest.approx(one[0]["total"], abs=1e-4)
    assert "Word importance" in alone.read_text() and not list(tmp_path.glob("*.partial"))
    said = capsys.readouterr().err
    assert "attribution: 2/2 texts (100 %)" in said and "texts/s" in said
    plain = tmp_path / "t.txt"
    plain.write_text(f"{GOOD}\n{BAD}\n")
    assert run(bert, "--input", plain, "--output", many, "--steps", 1) == 0
    assert json.loads(many.with_suffix(".json").read_text())[0]["true_label"] is None
    assert re.search(r"note: the words of \d of 2 texts add up .* raise --steps above 1", capsys.readouterr().err)


def test_questions_and_pairs_by_the_command(bert, heads, tmp_path):
    page, table = tmp_path / "p.html", tmp_path / "p.tsv"
    asked = ["--question", "what is returned?", "--context", GOOD, "--steps", "4", "--output", str(page)]
    assert explain.main(["attribution", "--model", str(heads / "answer"), *asked]) == 0
    assert json.loads(page.with_suffix(".json").read_text())[0]["text_b"] == GOOD
    assert run(bert, "--text", FIRST, "--text-b", SECOND, "--output", page, "--steps", 8) == 0
    alone = json.loads(page.with_suffix(".json").read_text())
    table.write_text(f"one\tother\tlabel\n{FIRST}\t{SECOND}\tgood\n")
    columns = ["--text-column", "one", "--text-pair-column", "other", "--label-column", "label"]
    assert run(bert, "--input", table, *columns, "--output", page, "--steps", 8) == 0
    found = json.loads(page.with_suffix(".json").read_text())
    assert found[0].pop("true_label") == "good" and alone[0].pop("true_label") is None and found == alone


def test_labels_that_are_not_the_model_s_are_shown_but_not_compared(bert, tmp_path, capsys):
    """As those of a published model, LABEL_0 and others, beside a table that has names."""
    (tmp_path / "t.tsv").write_text(f"text\tlabel\n{GOOD}\tpos\n")
    assert run(bert, "--input", tmp_path / "t.tsv", "--output", tmp_path / "w.html", "--steps", 4) == 0
    assert (
        "t.tsv: line 2: 'pos', but the model's labels are bad, good; true labels are shown" in capsys.readouterr().err
    )
    assert '"judged":false' in (tmp_path / "w.html").read_text()
    assert json.loads((tmp_path / "w.json").read_text())[0]["true_label"] == "pos"


BAD_USE = {
    "no page": (["--text", "x", "--output", "w.json"], ConfigError, "name a page, such as words.html"),
    "no folder": (["--text", "x", "--output", "absent/w.html"], ConfigError, "no such folder"),
    "its own input": (["--input", "w.json", "--output", "w.html"], ConfigError, "w.json would be overwritten"),
    "no context": (["--question", "x"], ConfigError, "--question needs --context"),
    "a kind of a question": (["--question", "x", "--context", "y", "--kind", "tag"], ConfigError, "leave it out"),
    "an answer without question": (["--text", "x", "--kind", "answer"], ConfigError, "give --question"),
    "a second text of a table": (["--input", "t.csv", "--text-b", "x"], ConfigError, "--text-pair-column"),
    "a true label of a table": (["--input", "t.csv", "--true-label", "x"], ConfigError, "--label-column"),
    "a column of a text": (["--text", "x", "--text-column", "x"], ConfigError, "--text-column goes with --input"),
    "no steps": (["--text", "x", "--steps", "0"], ConfigError, "must be 1 or more"),
    "no such file": (["--input", "absent.csv"], DataError, "absent.csv: no such file"),
    "no such column": (["--input", "t.csv", "--label-column", "labels"], DataError, "no column 'labels'"),
    "an empty table": (["--input", "empty.csv"], DataError, "empty.csv: no text in it"),
    "a column of no table": (["--input", "t.txt", "--label-column", "x"], ConfigError, "a column is of tables"),
    "no such label": (["--text", "x", "--target", "god"], ConfigError, r"labels bad, good \(did you mean good"),
    "no such true label": (["--text", "x", "--true-label", "god"], ConfigError, "labels are bad, good"),
    "no such label in a table": (
        ["--input", "g.csv", "--label-column", "label"],
        DataError,
        r"g.csv: line 3: 'god', but .*did you mean good",
    ),
    "a word of a text's label": (["--text", "x", "--word", "1"], ConfigError, "the label is of the whole text"),
    "no head for words": (["--text", "x", "--kind", "tag"], ConfigError, "tag: the model has no tagger"),
    "no head for answers": (["--question", "x", "--context", "y"], ConfigError, "answer: the model has no span_head"),
    "no mask": (["--text", "x", "--kind", "fill-mask"], DataError, r"no \[MASK\] in 'x'"),
    "a far mask": (["--text", "[MASK]", "--kind", "fill-mask", "--word", "1"], ConfigError, r"1 \[MASK\], numbered"),
    "no such piece": (["--text", "[MASK]", "--kind", "fill-mask", "--target", "qxzj"], ConfigError, "is no piece"),
}


@pytest.mark.parametrize("fault", BAD_USE)
def test_bad_use_is_one_line(bert, tmp_path, monkeypatch, fault):
    words, kind, message = BAD_USE[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("text,label\nx,good\n")
    (tmp_path / "g.csv").write_text("text,label\nx,good\ny,god\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "t.txt").write_text("x\n")
    before = sorted(tmp_path.iterdir())
    if list(BAD_USE).index(fault) < list(BAD_USE).index("no such label"):
        monkeypatch.setattr(bert_jax.bert, "load", None)  # told before the model is loaded
    with pytest.raises(kind, match=message):
        run(bert, *words, *([] if "--output" in words else ["--output", "w.html"]))
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_use_from_python_is_told(bert, heads):
    tagger, answerer = (bert_jax.load(str(heads / name)) for name in ("tag", "answer"))
    for model, words, settings, kind, message in (
        (bert, ["x"], {"baseline": "blank"}, ConfigError, "none of pad, mask, zero"),
        (bert, ["x"], {"kind": "label"}, ConfigError, "none of classify, tag"),
        (tagger, ["x", "y"], {}, ConfigError, "tag reads one"),
        (tagger, [" "], {}, DataError, "no word in ' '"),
        (bert, ["x"], {"steps": 0}, ConfigError, "steps: 0"),
        (tagger, ["a value"], {"word": 2}, ConfigError, "the text has 2 words, numbered from 0"),
        (tagger, ["a value"], {"word": -1}, ConfigError, "the text has 2 words, numbered from 0"),
        (answerer, ["x"], {}, ConfigError, "give --question and --context"),
        (answerer, ["x"], {"kind": "answer"}, ConfigError, "needs a context"),
        (answerer, ["x", "y"], {"kind": "answer", "target": "y"}, ConfigError, "the best one"),
    ):
        with pytest.raises(kind, match=message):
            attribute(model, *words, **settings)
    with pytest.raises(ConfigError, match="has none of classifier, tagger"):
        choose_kind(["embeddings"], None)


def test_memory_does_not_grow_with_the_texts(bert):
    """Of each text nothing is kept but what is returned."""
    stream = attribute_stream(bert, (f"{GOOD} {number}" for number in range(60)), steps=2)
    for _ in range(20):
        next(stream)
    tracemalloc.start()
    try:
        next(stream)
        before = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in stream) == 39
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()


def test_a_page_row_shows_what_the_model_reads(bert):
    row = page_row(Asked(FIRST, SECOND, None), attribute(bert, FIRST, SECOND))
    assert [item["text"] for item in row["items"] if item.get("special")] == ["[CLS]", "[SEP]", "[SEP]"]
    text = "".join(" " * item["gap"] + item["text"] for item in row["items"])
    assert text == f" [CLS] {FIRST} [SEP] {SECOND} [SEP]"
    assert sum(item["score"] for item in row["items"]) == pytest.approx(row["total"], abs=1e-4)


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, bert_jax.explain.attribution as a; assert not {'jax', 'tensorflow'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bfloat16_models_are_explained_in_float32(bert):
    """In bfloat16 the sum would be off by percents."""
    half = copy.copy(bert)
    half.config = dataclasses.replace(bert.config, dtype="bfloat16")
    found, expected = attribute(half, GOOD), attribute(bert, GOOD)
    assert found.total == pytest.approx(expected.total, abs=1e-6) and not is_loose(found)
