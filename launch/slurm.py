"""A run under SLURM: one process a node with all its GPUs; a job that is preempted or dies queues itself again.

python launch/slurm.py --name bert --nodes 2 --gpus-per-node 8 --time 24:00:00 --dry-run -- \\
    --config configs/pretrain_base.py --workdir /shared/bert --data.path /shared/rows

Run it from a checkout whose virtual environment ($VENV, default .venv) every node can see. The processes find each
other by SLURM's own variables.
"""

import argparse
import os

import outside
from outside import must, run, say, shown

WARNING = 120  # seconds before the end of its time in which the job is told to save


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line."""
    parser = outside.arguments(*__doc__.split("\n\n", 1))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0 for CPUs (default: 8)")
    parser.add_argument("--cpus-per-task", type=int, default=16)
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    return outside.parse(parser, argv)


def submit(args: argparse.Namespace) -> list[str]:
    """Hands the script, which comes by stdin, to the queue."""
    words = ["sbatch", "--parsable", f"--job-name={args.name}", f"--nodes={args.nodes}", "--ntasks-per-node=1"]
    words += [f"--cpus-per-task={args.cpus_per_task}", f"--time={args.time}", "--requeue", "--open-mode=append"]
    words += [f"--output={args.name}-%j.log", f"--signal=B:TERM@{WARNING}"]
    if args.gpus_per_node:
        words.append(f"--gpus-per-node={args.gpus_per_node}")
    words += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(args, name))]
    # Variables reach the job as they are; only those that are named are.
    return [*words, f"--export={','.join(['PATH', 'HOME', 'USER', *args.env])}"]


def batch_script(args: argparse.Namespace, words: list[str]) -> str:
    """What runs on the first node: the processes, then what follows from their exit code."""
    python = f"{os.environ.get('VENV', '.venv')}/bin/python"
    job = shown(["srun", "--kill-on-bad-exit=1", python, "-m", "bert_jax.train", *words])
    final = "|".join(str(code) for code in outside.FINAL)
    return f"""#!/bin/bash
trap 'kill -TERM "$child" 2>/dev/null' TERM
{job} &
child=$!
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
echo "{outside.EXIT_MARK} $code"
case $code in
    {final}) exit "$code" ;;
esac
if ((${{SLURM_RESTART_COUNT:-0}} < {args.restarts})); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def script(argv: list[str]) -> int:
    """0 once the job is in the queue."""
    args, words = parse(argv)
    text = batch_script(args, words)
    if args.dry_run:
        run(submit(args), dry_run=True, stdin=text)
        return 0
    number = must(submit(args), capture=True, stdin=text).strip()
    say(f"job {number} is in the queue; its log is {args.name}-{number}.log, and scancel {number} ends it")
    return 0


if __name__ == "__main__":
    outside.main(script)
