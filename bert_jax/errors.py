"""Errors a user can cause, each with the exit code of its kind, and the edge that turns them into one line."""

import sys
from collections.abc import Callable


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


class DataError(BertJaxError):
    """Text, labels, vocabulary or prepared rows that cannot be used."""

    exit_code = 6


INTERRUPTED, PREEMPTED = 130, 143  # Ctrl-C and SIGTERM, in both cases after saving


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` and exits with its code; a known error is one line on stderr (a traceback with `--debug`)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = main(argv) or 0
    except BertJaxError as error:
        if "--debug" in argv:
            raise
        print(f"bert_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if "--debug" in argv:
            raise
        print(f"bert_jax: error: {error.filename or 'storage'}: {error.strerror or error}", file=sys.stderr)
        code = StorageError.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
