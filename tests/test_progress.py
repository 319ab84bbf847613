"""What the person who watches is told of long work."""

import time

import pytest

from bert_jax.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_leaves_out_what_is_done_once(clock, capsys):
    """60 s of compiling before the first of steps that take 1 s each."""
    progress = Progress("train", 100, "steps")
    for step, seconds in enumerate(range(60, 71), 1):
        clock[0] = seconds
        progress.update(step)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: 1/100 steps (1 %), 1:00"  # nobody knows yet
    assert last == "train: 11/100 steps (11 %), 1 steps/s, 1:10, 1:29 left"
    progress.close()
    assert capsys.readouterr().err == "train: 11/100 steps (11 %), 0.1571 steps/s, 1:10\n"  # of all of it


def test_work_of_unknown_size_and_work_that_goes_on(clock, capsys):
    unknown, resumed = Progress("read", None, "bytes"), Progress("train", 100, "steps", start=90)
    clock[0] = 20.0
    unknown.update(1000)
    resumed.update(91)
    clock[0] = 40.0
    unknown.update(3000)
    resumed.close()
    assert capsys.readouterr().err.splitlines()[2:] == [
        "read: 3,000 bytes, 100 bytes/s, 0:40",
        "train: 91/100 steps (91 %), 0.025 steps/s, 0:40",
    ]


def test_seconds():
    assert [format_seconds(value) for value in (7, 75, 4000)] == ["0:07", "1:15", "1:06:40"]
