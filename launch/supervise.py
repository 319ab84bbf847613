"""Runs a command until its exit code is final, with pauses that grow: on a machine that comes back by itself.

python launch/supervise.py [--restarts 100] -- bash launch/on_host.sh --config … --workdir …
"""

import argparse
import subprocess
import sys

from outside import main, supervise


def run(command: list[str]) -> int:
    """Its exit code; 128 and the signal's number where one ended it, as a shell tells it."""
    code = subprocess.call(command)
    return code if code >= 0 else 128 - code


def script(argv: list[str]) -> int:
    """The last exit code of the command."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=100)
    args = parser.parse_args(argv[:split])
    if not argv[split + 1 :]:
        parser.error("after -- comes the command")
    return supervise(lambda: run(argv[split + 1 :]), tries=args.restarts)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(script)
