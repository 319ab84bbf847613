"""Errors a user can cause, each with the exit code of its kind, and the edge that turns them into one line."""

import argparse
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable

# `gc.set_threshold`: JAX and TensorFlow are millions of objects that stay; 700, Python's own, is a tenth of a short run
RARELY = 100_000, 20, 20


class BertJaxError(Exception):
    """A fault with a way out. `str()` is one line naming the file, line or key and the remedy."""

    exit_code = 1


class ConfigError(BertJaxError):
    """Wrong usage or configuration."""

    exit_code = 2


class NonFiniteLossError(BertJaxError):
    """The loss became NaN or infinite; no checkpoint of that state was written."""

    exit_code = 3


class CheckpointError(BertJaxError):
    """No usable checkpoint, or weights that cannot be read."""

    exit_code = 4


class StorageError(BertJaxError):
    """A disk or bucket that cannot be read or written."""

    exit_code = 5


class PeerError(BertJaxError):
    """Another process of the run, or the network to it, that does not answer."""

    exit_code = 5


class DataError(BertJaxError):
    """Text, labels, vocabulary or prepared rows that cannot be used."""

    exit_code = 6


INTERRUPTED, PREEMPTED = 130, 143  # Ctrl-C and SIGTERM, in both cases after saving


class CommandParser(argparse.ArgumentParser):
    """argparse with flags written with `-` or `_`, and a wrong command line as one line (ConfigError)."""

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        """Parses a command line."""
        return super().parse_args([_with_dashes(word) for word in args])

    def error(self, message: str) -> None:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{message}; see --help")


def _with_dashes(word: str) -> str:
    """`--max_seq_len=128` -> `--max-seq-len=128`; a text that only begins like a flag stays."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if re.fullmatch(r"--[\w-]+", flag) else word


def code_and_words(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and what tells of it; 1 is a bug of ours."""
    if isinstance(error, BertJaxError):
        return error.exit_code, str(error)
    if isinstance(error, FloatingPointError):  # of jax_debug_nans
        return NonFiniteLossError.exit_code, str(error)
    if isinstance(error, OSError):
        return StorageError.exit_code, f"{error.filename or 'storage'}: {error.strerror or error}"
    return BertJaxError.exit_code, f"{type(error).__name__}: {error}"


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` and exits with its code; a known error is one line on stderr, after its traceback with
    `--debug`."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no reason to fail
    caught, code = None, 0
    gc.set_threshold(*RARELY)
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has enough
        _drop_output()
    except (BertJaxError, FloatingPointError, OSError) as error:
        caught = error
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    except KeyboardInterrupt:
        print("bert_jax: interrupted at once; nothing more was saved", file=sys.stderr)
        code = INTERRUPTED
    if caught is not None:
        if "--debug" in argv:
            traceback.print_exception(caught)
        code, message = code_and_words(caught)
        print(f"bert_jax: error: {' '.join(message.split())}", file=sys.stderr)
    gc.freeze()  # Python would look through all once more before it ends
    sys.exit(code)


def _drop_output() -> None:
    """What Python still flushes at exit goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
