"""Answers as spans: windows, the window with most context, and the best spans, against the plain search."""

import numpy as np
import pytest

from bert_jax.tasks import squad


@pytest.mark.parametrize("length, room", [(1, 8), (8, 8), (9, 8), (300, 200), (1000, 380), (129, 128)])
def test_windows_cover_the_text(length, room):
    ranges = squad.windows(length, room)
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    assert all(0 < last - first <= room for first, last in ranges)
    assert all(after[0] <= before[1] for before, after in zip(ranges, ranges[1:], strict=False))
    assert len({last for _, last in ranges}) == len(ranges)  # none is part of another


def test_each_piece_is_taken_from_one_window_where_it_has_most_context():
    ranges = squad.windows(500, 200)
    taken = np.zeros(500, int)
    for number, (first, last) in enumerate(ranges):
        taken[first:last] += squad.has_most_context(ranges, number)
    assert (taken == 1).all()
    margins = [min(300 - first, last - 1 - 300) for first, last in ranges]
    best = int(np.argmax(margins))
    assert squad.has_most_context(ranges, best)[300 - ranges[best][0]]


def test_best_spans_are_those_of_the_plain_search():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, starts, ends = rng.normal(size=(15, 2)), rng.random(15) < 0.7, rng.random(15) < 0.7
        starts[3] = ends[5] = True
        found = squad.best_spans(scores, starts, ends, count=4)
        plain = sorted(
            (
                squad.Span(scores[first, 0] + scores[last, 1], first, last)
                for first in np.flatnonzero(starts)
                for last in np.flatnonzero(ends)
                if first <= last
            ),
            reverse=True,
        )
        assert [span[1:] for span in found] == [span[1:] for span in plain[:4]]
    far = np.zeros((100, 2))
    far[0, 0] = far[60, 1] = 5
    span = squad.best_spans(far, np.ones(100, bool), np.ones(100, bool))[0]
    assert span.last - span.first < squad.MAX_ANSWER
    apart = np.stack([np.arange(100), -np.arange(100)], axis=1)  # likely ends stand before likely starts
    assert squad.best_spans(apart, np.ones(100, bool), np.ones(100, bool))[0][1:] == (0, 0)
    assert squad.best_spans(apart, np.zeros(100, bool), np.ones(100, bool)) == []
