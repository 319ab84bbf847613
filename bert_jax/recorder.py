"""What a run writes while it goes: rows of metrics, and the rates in them."""

import contextlib
import json
import os
import sys
import time
from typing import NamedTuple


def cut_metrics(path: str, step: int) -> None:
    """Drops rows after `step` (and a last line that a kill tore), so that a resumed run writes them once."""
    if not os.path.isfile(path):
        return
    kept = []
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
    with open(f"{path}.partial", "wb") as file:
        file.writelines(kept)
    os.replace(f"{path}.partial", path)


def _summary_writer() -> type:
    """tensorboardX's. It imports PyTorch where there is one, for two seconds, and does as well without."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class Recorder:
    """Writes rows of metrics to `metrics.jsonl` (the record) and to TensorBoard; without a workdir nothing."""

    def __init__(self, workdir: str | None, step: int):
        self._file = self._board = None
        if workdir is None:
            return
        path = os.path.join(workdir, "metrics.jsonl")
        cut_metrics(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _summary_writer()(os.path.join(workdir, "tb"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One object a line, flushed at once; a value that is not finite is written as null."""
        if self._file is None:
            return
        finite = {name: value if abs(value) < float("inf") else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


class Lap(NamedTuple):
    """One logging interval."""

    seconds: float
    waited: float
    """Of them for data."""
    tokens: int
    examples: float


class Clock:
    """Rates over one logging interval, without what evaluation and saving took."""

    def __init__(self):
        self.first_step = 0.0  # seconds from the command to the end of its first step, until they are written
        self.restart()

    def restart(self) -> None:
        """Begins an interval."""
        self._began, self._excluded = time.perf_counter(), 0.0
        self.waited, self.tokens, self.examples = 0.0, 0, 0.0

    @contextlib.contextmanager
    def excluding(self):
        """Time spent in this block does not count."""
        began = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - began

    def lap(self) -> Lap:
        """What was counted in the interval; begins the next one."""
        seconds = max(time.perf_counter() - self._began - self._excluded, 1e-9)
        found = Lap(seconds, self.waited, self.tokens, self.examples)
        self.restart()
        return found
