"""What the launch scripts share: the one way to an outside command, what exit codes mean, and when to try again.

Nothing but Python's standard library: they run where nothing is installed.
"""

import argparse
import atexit
import os
import random
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ("bert_jax", "configs", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds between tries; doubled each time
LONG_RUN = 900.0  # seconds after which a run counts as having worked, and pauses begin anew
EXIT_MARK = "bert_jax exit code"  # printed by each worker, since ssh to many tells one code only
LOST = 255  # ssh's code of a connection that broke
# What `bert_jax.train` says by its exit code (README). All others are deaths that it could not tell of: a lost
# connection (255), a process killed (137) or ended by JAX because its peer died (134).
FINAL = {
    0: "done",
    1: "a bug of bert_jax",
    2: "wrong usage or configuration",
    3: "the loss is not finite",
    4: "no usable checkpoint",
    6: "data that cannot be used",
    130: "interrupted by a person",
}


class Result(NamedTuple):
    """What became of an outside command."""

    code: int
    output: str


class LaunchError(Exception):
    """A fault with a way out; its text is one line."""


def shown(words: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(words)


def run(words: list[str], *, dry_run: bool = False, capture: bool = False, stdin: str | None = None) -> Result:
    """Runs an outside command; every one passes here. `capture` takes its output (both streams), else it is shown.

    A dry run prints the command on stdout instead, with what it would read, and says that it went well.
    """
    if dry_run:
        print(shown(words) if stdin is None else f"{shown(words)} <<'END'\n{stdin.rstrip()}\nEND", flush=True)
        return Result(0, "")
    if not capture:
        say(f"+ {shown(words)}")
    try:
        # What is read is shown at once and kept: exit marks of workers are in it.
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            if stdin is not None:
                process.stdin.write(stdin)
                process.stdin.close()
            lines = []
            for line in process.stdout:
                if not capture:
                    print(line, end="", flush=True)
                if capture or EXIT_MARK in line:
                    lines.append(line)
    except FileNotFoundError:
        raise LaunchError(
            f"{words[0]}: no such command here; install it, or see what would be run with --dry-run"
        ) from None
    return Result(process.returncode, "".join(lines))


def must(words: list[str], **how: object) -> str:
    """`run`, where failure ends the script: the output. Raises LaunchError with the last line that it printed."""
    found = run(words, **how)
    if found.code:
        last = found.output.strip().splitlines()[-1:] or ["see above"]
        raise LaunchError(f"{' '.join(words[:4])} … failed with code {found.code}: {last[0].strip()}")
    return found.output


def say(message: str) -> None:
    """One line for the person who watches."""
    print(message, file=sys.stderr, flush=True)


def pauses(first: float = FIRST_PAUSE, longest: float = LONGEST_PAUSE) -> Iterator[float]:
    """Seconds to wait before each new try: doubled up to `longest`, with a tenth of luck so that hosts do not meet."""
    pause = first
    while True:
        yield pause * random.uniform(0.9, 1.1)
        pause = min(2 * pause, longest)


def worst(output: str) -> int:
    """The exit code that counts among the marks of all workers: a final fault, then one to be tried again, then 0.

    Without any mark the connection was lost.
    """
    marks = [int(line.rsplit(" ", 1)[1]) for line in output.splitlines() if EXIT_MARK in line]
    final = [mark for mark in marks if mark and mark in FINAL]
    other = [mark for mark in marks if mark]
    return (final or other or [0 if marks else LOST])[0]


def supervise(attempt: Callable[[], int], *, tries: int, pause: Callable[[float], None] = time.sleep) -> int:
    """Repeats `attempt`, which gives an exit code, until it is FINAL or `tries` restarts are used up; the last code."""
    waits = pauses()
    for number in range(tries + 1):
        began = time.monotonic()
        code = attempt()
        if code in FINAL:
            say(f"exit code {code}: {FINAL[code]}")
            return code
        if number == tries:
            break
        if time.monotonic() - began > LONG_RUN:
            waits = pauses()
        seconds = next(waits)
        say(f"exit code {code}: again in {seconds:.0f} s (restart {number + 1} of {tries})")
        pause(seconds)
    say(f"exit code {code}: given up after {tries} restarts")
    return code


def marked(command: list[str]) -> str:
    """A shell command that runs `command`, then prints its exit code as `worst` reads it."""
    return f'{shown(command)}; code=$?; echo "{EXIT_MARK} $code"; exit $code'


def arguments(description: str, example: str) -> argparse.ArgumentParser:
    """A parser with what all scripts take; what follows `--` goes to `bert_jax.train` as it is."""
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the machines and of the job; letters, digits and -")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop; needs no credentials")
    parser.add_argument("--restarts", type=int, default=100, help="of a job that was preempted or died (default: 100)")
    parser.add_argument(
        "--env", nargs="*", default=[], metavar="NAME", help="variables that the job gets as they are here, unseen"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, the arguments of `bert_jax.train` after `--`)."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    if not argv[split + 1 :]:
        parser.error("after -- come the arguments of bert_jax.train: -- --config configs/… --workdir …")
    if not args.name.replace("-", "").isalnum() or args.name != args.name.lower() or not args.name[0].isalpha():
        parser.error(f"--name {args.name!r}: small letters, digits and -, a letter first")
    if missing := [name for name in args.env if name not in os.environ]:
        parser.error(f"--env {missing[0]}: not set here")
    return args, argv[split + 1 :]


def bundle() -> str:
    """A new archive of the code: what a host needs of this checkout."""
    path = _temporary(".tgz")
    with tarfile.open(path, "w:gz") as archive:
        for name in BUNDLED:
            archive.add(ROOT / name, name, filter=_without_caches)
    return path


def _temporary(ending: str) -> str:
    """A file that we alone can read, and that goes when the script ends."""
    handle, path = tempfile.mkstemp(prefix="bert_jax-", suffix=ending)
    os.close(handle)
    atexit.register(os.remove, path)
    return path


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def environment_file(names: list[str], *, plain: bool = False) -> str:
    """A temporary file with the variables: values stand in no command line.

    As a shell reads them, or `plain`: NAME=value, without quotes.
    """
    path = _temporary(".env")
    with open(path, "w", encoding="utf-8") as file:
        for name in names:
            value = os.environ[name]
            file.write(f"{name}={value}\n" if plain else f"export {name}={shlex.quote(value)}\n")
    return path


def main(script: Callable[[list[str]], int]) -> None:
    """Runs a script; a fault is one line and code 2, Ctrl-C code 130."""
    try:
        sys.exit(script(sys.argv[1:]))
    except LaunchError as error:
        say(f"launch: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("launch: interrupted; what was created is still there and may cost money")
        sys.exit(130)
