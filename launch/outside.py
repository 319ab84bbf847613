"""What the launch scripts share: the one way to an outside command, what exit codes mean, and when to try again.

Nothing but Python's standard library: they run where nothing is installed.
"""

import argparse
import atexit
import contextlib
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
# What gcloud and kubectl say when the network or the far side is at fault, and when it is who one is. Without a
# network gcloud advises to log in, too, since it cannot renew its token: so the first are looked for first.
PASSING = (
    *("connection", "max retries", "timed out", "timeout", "dial tcp", "unreachable", "resolve", "name or service"),
    *("unavailable", "deadline", "internal error", "transport"),
)
DENIED = (
    *("permission", "forbidden", "unauthorized", "unauthenticated", "logged in", "auth login", "credential"),
    *("invalid_grant", "active account", "reauthenticat", "required property"),
)


class Result(NamedTuple):
    """What became of an outside command; `error` only of one that was captured."""

    code: int
    output: str
    error: str = ""

    @property
    def said(self) -> str:
        """All that it said."""
        return self.output + self.error

    @property
    def last(self) -> str:
        """The last line that it said."""
        return (self.said.strip().splitlines() or ["no reason given"])[-1].strip()


class LaunchError(Exception):
    """A fault with a way out; its text is one line."""


class PassingError(LaunchError):
    """A fault that may be gone at the next try."""


def passing(said: str) -> bool:
    """Whether the network or the far side failed, as far as one can tell from what a command said."""
    return any(word in said.lower() for word in PASSING)


def denied(said: str) -> bool:
    """Whether one is not logged in, or not permitted: trying again does not help."""
    return not passing(said) and any(word in said.lower() for word in DENIED)


def missing(said: str) -> bool:
    """Whether what was looked at is not there."""
    return not passing(said) and any(word in said.lower() for word in ("not found", "not_found", "notfound"))


def shown(words: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(words)


def run(words: list[str], *, dry_run: bool = False, capture: bool = False, stdin: str | None = None) -> Result:
    """Runs an outside command; every one passes here. `capture` takes its output, else it is shown.

    A dry run prints the command on stdout instead, with what it would read, and says that it went well.
    """
    if dry_run:
        print(shown(words) if stdin is None else f"{shown(words)} <<'END'\n{stdin.rstrip()}\nEND", flush=True)
        return Result(0, "")
    if not capture:
        say(f"+ {shown(words)}")
    try:
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # Apart when captured: gcloud's warnings would stand in what is parsed.
            stderr=subprocess.PIPE if capture else subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            if capture:
                output, error = process.communicate(stdin)
                return Result(process.returncode, output, error)
            if stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it ended without reading; its code tells
                    process.stdin.write(stdin)
                    process.stdin.close()
            marks = []
            for line in process.stdout:
                print(line, end="", flush=True)
                if EXIT_MARK in line:
                    marks.append(line)
    except FileNotFoundError:
        raise LaunchError(
            f"{words[0]}: no such command here; install it, or see what would be run with --dry-run"
        ) from None
    return Result(process.returncode, "".join(marks))


def must(words: list[str], **how: object) -> str:
    """`run`, where failure is a LaunchError with the last line that was said, or a PassingError: the output."""
    found = run(words, **how)
    if found.code:
        raise failure(words, found)
    return found.output


def failure(words: list[str], found: Result) -> LaunchError:
    """The error that tells of a command that failed."""
    fault = PassingError if passing(found.said) else LaunchError
    reason = found.last if found.said else "see above"
    return fault(f"{' '.join(words[:4])} … failed with code {found.code}: {reason}")


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
    """Repeats `attempt`, which gives an exit code, until it is FINAL or `tries` restarts are used up; the last code.

    A PassingError of `attempt` counts as a lost connection.
    """
    waits = pauses()
    for number in range(tries + 1):
        began = time.monotonic()
        try:
            code = attempt()
        except PassingError as error:
            say(str(error))
            code = LOST
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


def parse(
    parser: argparse.ArgumentParser, argv: list[str], *, bundled: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """(options, the arguments of `bert_jax.train` after `--`). `bundled`: machines get `bundle()` and nothing else."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    if not argv[split + 1 :]:
        parser.error("after -- come the arguments of bert_jax.train: -- --config configs/… --workdir …")
    if not args.name.replace("-", "").isalnum() or args.name != args.name.lower() or not args.name[0].isalpha():
        parser.error(f"--name {args.name!r}: small letters, digits and -, a letter first")
    if unset := [name for name in args.env if name not in os.environ]:
        parser.error(f"--env {unset[0]}: not set here")
    words = argv[split + 1 :]
    if bundled and (strange := [path for path in configs_of(words) if not in_bundle(path)]):
        parser.error(f"--config {strange[0]}: machines get only configs/ of this checkout; put it there, as configs/…")
    return args, words


def configs_of(words: list[str]) -> list[str]:
    """What stands after --config."""
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return joined + [after for word, after in zip(words, words[1:], strict=False) if word == "--config"]


def in_bundle(path: str) -> bool:
    """Whether it is a file that the bundle has under the same name."""
    there = (ROOT / path).resolve()
    return not os.path.isabs(path) and there.is_file() and there.is_relative_to(ROOT / "configs")


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


def environment_file(names: list[str]) -> str:
    """A temporary file with the variables, as a shell reads them: values stand in no command line."""
    path = _temporary(".env")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)
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
