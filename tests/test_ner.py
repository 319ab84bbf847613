"""Labels of words: windows that cover every word, and the entities that labels spell."""

import random

import pytest

from bert_jax.tasks.ner import Entity, best_window, entities, windows


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-LOC I-LOC I-PER", [("LOC", 0, 2), ("PER", 2, 3)]),
        ("B-LOC I-PER", [("LOC", 0, 1), ("PER", 1, 2)]),
        ("I-LOC O I-LOC", [("LOC", 0, 1), ("LOC", 2, 3)]),
        ("LOC LOC O PER", [("LOC", 0, 2), ("PER", 3, 4)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_labels(labels, expected):
    assert entities(labels.split()) == [Entity(*entity) for entity in expected]


def test_windows_fit_and_show_every_word_away_from_an_edge():
    rng = random.Random(0)
    for _ in range(200):
        counts = [rng.choice([1, 1, 2, 3, 9, 40]) for _ in range(rng.randrange(1, 80))]
        room = rng.choice([4, 16, 30])
        ranges = windows(counts, room)
        assert ranges[0][0] == 0 and ranges[-1][1] == len(counts)
        for first, last in ranges:
            assert first < last and sum(min(count, room) for count in counts[first:last]) <= room
        for (_, before), (first, last) in zip(ranges, ranges[1:], strict=False):
            assert first <= before < last
        for word in range(len(counts)):
            first, last = ranges[best_window(word, ranges)]
            assert first <= word < last
    assert windows([1] * 10, 16) == [(0, 10)]
    ranges = windows([1] * 100, 16)
    inner = range(8, 92)
    margins = [min(word - ranges[w][0], ranges[w][1] - 1 - word) for word in inner for w in [best_window(word, ranges)]]
    assert min(margins) >= 1
    assert windows([], 16) == []
