"""Buckets (`gs://…`, `s3://…`): what is read of them is fetched into the user's cache, what a run writes is carried up.

Through `epath`. Only checkpoints are written to a bucket directly, by Orbax. Also, of disks, files that appear whole.
"""

import contextlib
import os
import posixpath
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from bert_jax.config import cache_folder
from bert_jax.errors import BertJaxError, ConfigError, StorageError

if TYPE_CHECKING:
    from etils import epath

SCHEMES = ("gs://", "s3://")
PARTIAL = ".partial"  # ending of what another process may be fetching
CHECKPOINTS = frozenset({"checkpoints"})  # of a workdir: they are in the bucket alone


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is of a bucket."""
    return os.fspath(path).startswith(SCHEMES)


def place(path: str | os.PathLike) -> "epath.Path":
    """`path`, of a bucket or of a file system, with the methods of `pathlib.Path`."""
    from etils import epath

    return epath.Path(path)


@contextlib.contextmanager
def reached(path: str | os.PathLike) -> Iterator[None]:
    """Makes one StorageError of whatever a bucket's client throws; what goes wrong on disks stays what it is."""
    try:
        yield
    except BertJaxError:
        raise
    except Exception as error:  # TensorFlow's, fsspec's and the operating system's have no common ancestor
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StorageError(f"{path}: the bucket cannot be read or written ({reason})") from error


def cached(path: str | os.PathLike) -> Path:
    """Where a bucket's file or folder stands in the cache once it is fetched. Raises ConfigError."""
    scheme, _, rest = os.fspath(path).partition("://")
    if ".." in rest.split("/"):
        raise ConfigError(f"{path}: a bucket has no '..'; name the folder itself")
    return cache_folder() / "remote" / scheme / posixpath.normpath(rest)


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes of a file, and when it was written: in nanoseconds, of buckets to the second."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with reached(path):
        status = place(path).stat()
        return status.length, status.mtime * 10**9


def fetch(path: str | os.PathLike, *, leave: frozenset[str] = frozenset()) -> str:
    """A file or folder of a bucket, copied into the cache unless it is there already; other paths as they are.

    A file is taken to be the same while size and time are. `leave` are names in the folder that are not fetched, nor
    removed here. Raises StorageError.
    """
    if not is_remote(path):
        return os.fspath(path)
    with reached(path):
        source, target = place(path), cached(path)
        if not source.is_dir():
            if not source.exists():
                raise StorageError(f"{path}: no such file or folder")
            _fetch_file(os.fspath(source), target)
            return str(target)
        wanted = {name for name, _ in files(source, leave=leave)}
        for name in wanted:
            _fetch_file(os.fspath(source / name), target / name)
        for old in [file for file in target.rglob("*") if file.is_file()]:
            name = old.relative_to(target)
            if name.as_posix() not in wanted and name.parts[0] not in leave and old.suffix != PARTIAL:
                old.unlink(missing_ok=True)
    return str(target)


def files(folder: "epath.Path", *, leave: frozenset[str] = frozenset()) -> Iterator[tuple[str, "epath.Path"]]:
    """(name below the folder, path) of every file, but for what is called as one of `leave` says."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name in leave:
            continue
        if path.is_dir():
            yield from ((posixpath.join(path.name, name), file) for name, file in files(path))
        else:
            yield path.name, path


def _fetch_file(source: str, target: Path) -> None:
    size, written = size_and_time(source)
    with contextlib.suppress(OSError):
        if (target.stat().st_size, target.stat().st_mtime_ns) == (size, written):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        with place(source).open("rb") as stream, open(partial, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 22)
        os.utime(partial, ns=(written, written))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def carry(folder: str | os.PathLike, target: str, *, leave: frozenset[str] = frozenset()) -> None:
    """Writes the files of a folder to a bucket, but what is there already in the same size and is not newer here.

    `leave` are names in the folder that stay. Raises StorageError.
    """
    with reached(target):
        there = place(target)
        for name, path in files(place(folder), leave=leave):
            goal, mine = there / name, path.stat()
            if goal.exists() and (known := goal.stat()).length == mine.length and known.mtime > mine.mtime:
                continue
            goal.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as stream, goal.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 22)


def stage(workdir: str) -> str:
    """Where a run on this machine keeps a bucket's workdir: a copy of what is there, but the checkpoints."""
    here = cached(workdir)
    with reached(workdir):
        if place(workdir).exists():
            fetch(workdir, leave=CHECKPOINTS | {"lock"})
    here.mkdir(parents=True, exist_ok=True)
    return str(here)


def expand(pattern: str) -> list[str]:
    """The file that `pattern` names in a bucket, all files of a folder, or those that match a glob; sorted."""
    with reached(pattern):
        fixed, wild = _split_glob(pattern)
        base = place(fixed)
        if not wild:
            if base.is_dir():
                return [os.fspath(path) for _, path in files(base)]
            return [os.fspath(base)] if base.exists() else []
        return sorted(os.fspath(path) for path in base.glob(wild) if not path.is_dir())


def _split_glob(pattern: str) -> tuple[str, str]:
    """`gs://b/a/x*/y` -> (`gs://b/a`, `x*/y`)."""
    found = re.search(r"[^/]*[*?\[]", pattern)
    return (pattern[: found.start()].rstrip("/"), pattern[found.start() :]) if found else (pattern, "")


def check_output(option: str, path: str) -> None:
    """Raises ConfigError where `path`, the value of `option`, is no place for a file: told before any work."""
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path}: a folder; name a file")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"{option} {path}: no such folder; make it, or name another")


@contextlib.contextmanager
def whole_file(path: str, mode: str) -> Iterator[IO]:
    """A file that gets its name when all is written, and goes when something fails; a pipe or device is written to."""
    how = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **how) as file:
            yield file
        return
    path = os.path.realpath(path)
    partial = f"{path}.partial"
    try:
        with open(partial, mode, **how) as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
