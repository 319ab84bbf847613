"""What the person who watches is told, on stderr.

Progress of long work is a bar on a terminal, else one line now and then; both with rate and time left.
"""

import os
import sys
import time
from typing import TextIO

_BAR_WIDTH = 24
_log: TextIO | None = None  # instead of stderr


def say(message: str) -> None:
    """One line for the person who watches."""
    print(message, file=_log or sys.stderr, flush=True)


def log_to(path: str) -> None:
    """From now on all goes into a file: of many processes one speaks."""
    global _log
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _log = open(path, "a", encoding="utf-8")  # noqa: SIM115


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Shows how far a task is. `total` may be None when nobody knows it; `done` counts in `unit`s."""

    def __init__(self, label: str, total: int | None, unit: str, *, start: int = 0, every: float = 10.0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start = start
        self._began = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done, and when, at the first update
        self._terminal = _log is None and sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every

    def update(self, done: int, note: str = "") -> None:
        """Sets how much is done; prints only when enough time has passed."""
        self.done = done
        self._first = self._first or (done, time.monotonic())
        if time.monotonic() - self._shown >= self._every:
            self._show(note)

    def close(self, note: str = "") -> None:
        """Prints the last line, whatever the time."""
        self._show(note, end="\n")

    def _show(self, note: str, end: str = "") -> None:
        self._shown = time.monotonic()
        elapsed = self._shown - self._began
        # Before the first update lies what is done once, such as compiling: it says nothing of the time left.
        before, since = (self._start, self._began) if end or not self._first else self._first
        rate = (self.done - before) / max(self._shown - since, 1e-9)
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f"/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        text += f", {rate:,.4g} {self.unit}/s" if rate else ""
        text += f", {format_seconds(elapsed)}"
        if self.total and rate > 0 and not end:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        if note:
            text += f", {note}"
        if self._terminal:
            filled = int(_BAR_WIDTH * min(1, self.done / self.total)) if self.total else 0
            bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] " if self.total else ""
            print(f"\r\x1b[K{bar}{text}", end=end, file=sys.stderr, flush=True)
        else:
            say(text)
