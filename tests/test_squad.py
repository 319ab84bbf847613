"""Questions: reading and repairing, windows and targets, decoding, SQuAD's own scores, a run from file to results."""

import dataclasses
import json
import random

import numpy as np
import pytest

import bert_jax
from bert_jax import config as config_lib
from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig
from bert_jax.errors import ConfigError, DataError
from bert_jax.tasks import squad
from bert_jax.tasks.squad import Question
from bert_jax.train import train

pytestmark = pytest.mark.usefixtures("one_device")


def layout(*questions):
    """SQuAD's JSON of (id, question, context, [(text, start)], impossible)."""
    return {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": key,
                                "question": text,
                                "answers": [{"text": answer, "answer_start": start} for answer, start in answers],
                                "is_impossible": impossible,
                            }
                        ],
                    }
                ]
            }
            for key, text, context, answers, impossible in questions
        ]
    }


@pytest.mark.parametrize(
    "prediction, answer, exact, overlap",
    [
        ("The Cat.", "cat", 1, 1),
        ("an apple-tree", "appletree", 1, 1),
        ("  a   red\tcar ", "red car", 1, 1),
        ("red big car", "red car", 0, 0.8),
        ("red red", "red", 0, 2 / 3),
        ("cat", "dog", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "dog", 0, 0),
        ("theatre", "atre", 0, 0),
        ("O gato", "o GATO!", 1, 1),
    ],
)
def test_normalisation_and_overlap_are_squad_s(prediction, answer, exact, overlap):
    assert squad.exact_match(prediction, answer) == exact
    assert squad.f1(prediction, answer) == pytest.approx(overlap)


def test_the_best_of_the_answers_counts():
    assert squad.best_over_answers("red car", ["blue car", "a red car", "the"]) == (1.0, 1.0)
    assert squad.best_over_answers("", []) == (1.0, 1.0)
    assert squad.best_over_answers("x", []) == (0.0, 0.0)
    assert squad.best_over_answers("", ["x"]) == (0.0, 0.0)
    questions = [Question("1", "?", "c", [("red", 0)]), Question("2", "?", "c", [])]
    assert squad.score_predictions(questions, ["red", "x"]) == {"exact_match": 0.5, "f1": 0.5}


def test_the_threshold_is_the_best_of_all():
    rng = random.Random(0)
    for _ in range(50):
        questions = [Question(str(i), "?", "c", [("red", 0)] if rng.random() < 0.5 else []) for i in range(12)]
        texts = [rng.choice(["red", "blue"]) for _ in questions]
        odds = [float(rng.randrange(6)) for _ in questions]

        def score(limit, questions=questions, texts=texts, odds=odds):
            chosen = ["" if value > limit else text for text, value in zip(texts, odds, strict=True)]
            return squad.score_predictions(questions, chosen)["f1"]

        best = squad.best_threshold(questions, texts, odds)
        assert score(best) == max(score(limit) for limit in [-1, *odds])


def test_wrong_offsets_are_moved_or_left_out(capsys):
    context = "red fish, blue fish, red bird. " + "x " * 100 + "blue fish"
    questions = [
        Question("right", "?", context, [("blue fish", 10)]),
        Question("moved", "?", context, [("blue fish", 13)]),
        Question("twice", "?", context, [("red", 2)]),
        Question("far", "?", context, [("bird", 150)]),
        Question("none", "?", context, []),
        Question("negative", "?", context, [("bird", -3)]),
    ]
    found = {question.id: question.answers for question in squad.repair(questions, "t.json")}
    assert found == {
        "right": [("blue fish", 10)],
        "moved": [("blue fish", 10)],
        "none": [],
        "negative": [("bird", 25)],
    }
    assert "t.json: 4 answers are not where they should be: 2 moved, 2 left out" in capsys.readouterr().err


def test_every_answer_is_found_again_in_the_window_that_holds_it(tokenizer):
    """Whatever stands where: the pieces between the targets spell the answer, and decoding gives its characters."""
    rng = random.Random(0)
    words = ["value", "caf\u00e9", "function", "(x)", "unbelievable", "a", "\u6211\u5728", "list;", "na\u00efve"]
    questions = []
    for number in range(30):
        parts = [rng.choice(words) for _ in range(rng.randrange(20, 120))]
        first = rng.randrange(len(parts))
        last = first + 1  # what is longer than the windows overlap may be held by none in which it begins best
        context, answer = "  ".join(parts), "  ".join(parts[first:last])
        start = len("  ".join(parts[:first])) + 2 * (first > 0)
        assert context[start : start + len(answer)] == answer
        questions.append(Question(str(number), "which " * rng.randrange(1, 60), context, [(answer, start)]))
    texts, contexts = [q.text for q in questions], [q.context for q in questions]
    shown = squad.featurize(texts, contexts, tokenizer, 64)
    targets = squad.answer_pieces(shown, questions)
    holding = 0
    for question, numbers in zip(questions, shown.of_question, strict=True):
        scores = [np.zeros((len(shown.features.ids[number]), 2)) for number in range(len(shown.ranges))]
        held = [number for number in numbers if targets["ends"][number]]
        holding += len(held)
        for number in held:
            scores[number][targets["starts"][number], 0] = scores[number][targets["ends"][number], 1] = 5.0
        if held:
            answers = squad.decode(shown, scores)[int(question.id)]
            assert question.context[answers[0].start : answers[0].end] == question.answers[0][0]
        covered = sorted({piece for number in numbers for piece in range(*shown.ranges[number])})
        assert covered == list(range(len(shown.spans[int(question.id)])))
    assert holding > 30


BAD_FILES = {
    "no answer": (layout(("1", "who?", "a man", [], False)), "question 1 has no answer; for SQuAD 2.0 set"),
    "not JSON": ("{", "not in SQuAD's JSON layout"),
    "no questions": ({"data": []}, "no questions in it"),
    "an answer of null": (layout(("1", "who?", "a man", [(None, 0)], False)), "question 1: an answer is None"),
    "only wrong offsets": (layout(("1", "who?", "a man", [("dog", 0)], False)), "no question has an answer"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_end_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message):
        squad.read_set(str(path), version_2=False, train=True)


@pytest.mark.parametrize("version_2", [False, True])
def test_it_learns_where_the_answer_stands(small_config, tokenizer_folder, tmp_path, version_2):
    """The answer is what follows "value"; in version 2 there may be no such word."""
    rng, paths = random.Random(0), {}
    for name, count in (("train", 400), ("dev", 60)):
        questions = []
        for number in range(count):
            words = [rng.choice(["function", "list", "object", "name", "error"]) for _ in range(8)]
            place, impossible = rng.randrange(6), version_2 and rng.random() < 0.4
            if not impossible:
                words[place] = "value"
            start = len(" ".join(words[: place + 1])) + 1
            answers = [] if impossible else [(words[place + 1], start)]
            questions.append((f"{name}{number}", "which value", " ".join(words), answers, impossible))
        paths[name] = str(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text(json.dumps(layout(*questions)))
    config = Config(
        model=dataclasses.replace(small_config.model, hidden_dropout=0.0, attention_dropout=0.0),
        data=DataConfig(max_seq_len=32, tokenizer=str(tokenizer_folder)),
        task=TaskConfig(name="squad", version_2=version_2, **paths),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=24, log_every=50),
    )
    assert train(config, str(tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["dev"]
    assert results["f1"] > 0.6 and results["exact_match"] <= results["f1"]
    assert ("null_threshold" in results) == version_2
    answers = json.loads((tmp_path / "run" / "predictions" / "dev.json").read_text())
    contexts = {question.id: question.context for question in squad.read_questions(paths["dev"])}
    assert set(answers) == set(contexts) and all(text in contexts[key] for key, text in answers.items())
    assert ("" in answers.values()) == version_2

    # The finished model answers as it was judged, and judged alone it gets the same scores.
    bert = bert_jax.load(str(tmp_path / "run" / "model"))
    asked = squad.read_questions(paths["dev"])
    found = bert.answer_stream((question.text, question.context) for question in asked)
    assert {q.id: best["text"] for q, (best,) in zip(asked, found, strict=True)} == answers
    alone = dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, train=""),
        train=dataclasses.replace(config.train, init_from=str(tmp_path / "run")),
    )
    assert train(config_lib.validate(alone), str(tmp_path / "alone")) == 0
    judged = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert judged["step"] == 0 and judged["metrics"]["dev"] == pytest.approx(results)


def test_a_training_file_is_asked_for():
    with pytest.raises(ConfigError, match="task.train"):
        config_lib.validate(Config(task=TaskConfig(name="squad", dev="dev.json")))
