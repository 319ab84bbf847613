"""Shows what a model looks at, as pages that open without a network.

python -m bert_jax.explain attention   --model M --text "…" [--text-b "…"] --output view.html
python -m bert_jax.explain attribution --model M --text "…" --output words.html
"""

import argparse

from bert_jax.errors import CommandParser, run_command
from bert_jax.explain import attention, attribution
from bert_jax.process import keep_memory


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `run` of it is the command's function."""
    parser = CommandParser(prog="python -m bert_jax.explain", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="attention|attribution")
    for name, module in (("attention", attention), ("attribution", attribution)):
        use = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=use, description=use, allow_abbrev=False)
        command.add_argument("--model", required=True, help="model directory, workdir or checkpoint step")
        command.add_argument("--output", required=True, help="page to write (.html)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The commands `attention` and `attribution`."""
    args = parse(argv)
    keep_memory()
    return args.run(args)


if __name__ == "__main__":
    run_command(main)
