"""A run on Cloud TPU VMs: asks for a queued resource, waits, installs, trains on all hosts; made again when Spot goes.

python launch/tpu_vm.py --name bert --zone us-west4-a --type v5litepod-8 --spot --dry-run -- \\
    --config configs/pretrain_base.py --workdir gs://BUCKET/bert --data.path gs://BUCKET/rows

What it makes carries the label bert-jax-launch=NAME; nothing else is ever deleted. Stop it with Ctrl-C and start it
again: it finds its resource and goes on.
"""

import argparse
import time

import outside
from outside import LaunchError, must, run, say, shown

LABEL = "bert-jax-launch"
POLL = 30.0  # seconds between looks at a queued resource
# Software image by generation, as Google's documentation of TPU software versions has them.
IMAGES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
GONE = ("SUSPENDING", "SUSPENDED")
QUOTA = ("quota", "resource_exhausted")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line."""
    parser = outside.arguments(*__doc__.split("\n\n", 1))
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: that of gcloud")
    parser.add_argument("--type", required=True, help=f"accelerator type, such as v5litepod-8; {', '.join(IMAGES)}")
    parser.add_argument("--image", default="", help="software version; default: the usual one of the type")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away at any time")
    parser.add_argument("--delete", action="store_true", help="delete the TPU when the job is done")
    args, words = outside.parse(parser, argv)
    args.image = args.image or IMAGES.get(args.type.split("-")[0], "")
    if not args.image:
        parser.error(f"--type {args.type}: begins with none of {', '.join(IMAGES)}; name its --image")
    return args, words


def place(args: argparse.Namespace) -> list[str]:
    """The flags that say where."""
    return [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]


def gcloud(args: argparse.Namespace, *words: str) -> list[str]:
    """A command of `gcloud compute tpus` in the zone."""
    return ["gcloud", "compute", "tpus", *words, *place(args), "--quiet"]


def create(args: argparse.Namespace) -> list[str]:
    """Asks for the resource."""
    words = [f"--node-id={args.name}", f"--accelerator-type={args.type}", f"--runtime-version={args.image}"]
    words += [f"--labels={LABEL}={args.name}", *(["--spot"] if args.spot else [])]
    return gcloud(args, "queued-resources", "create", args.name, *words)


def describe(args: argparse.Namespace) -> list[str]:
    """Its state and the label that says whether it is ours."""
    shape = f"--format=value(state.state,tpu.nodeSpec[0].node.labels.{LABEL})"
    return gcloud(args, "queued-resources", "describe", args.name, shape)


def delete(args: argparse.Namespace) -> list[str]:
    """Deletes the resource and its TPU."""
    return gcloud(args, "queued-resources", "delete", args.name, "--force")


def ssh(args: argparse.Namespace, command: str) -> list[str]:
    """Runs a shell command on every host."""
    return gcloud(args, "tpu-vm", "ssh", args.name, "--worker=all", f"--command={command}")


def copy(args: argparse.Namespace, source: str, target: str) -> list[str]:
    """Copies a file to every host."""
    return gcloud(args, "tpu-vm", "scp", source, f"{args.name}:{target}", "--worker=all")


def state_of(args: argparse.Namespace) -> str:
    """State of our resource, "" when there is none. Raises LaunchError where one of that name is not ours."""
    found = run(describe(args), capture=True)
    if found.code:
        if "NOT_FOUND" in found.output or "not found" in found.output.lower():
            return ""
        raise LaunchError(f"{args.name} cannot be looked at: {found.output.strip().splitlines()[-1:]}")
    state, _, label = found.output.strip().partition("\t")
    if label.strip() != args.name:
        raise LaunchError(f"{args.name} is there already and was not made by this script; take another --name")
    return state


def acquire(args: argparse.Namespace) -> bool:
    """Waits for the TPU, created anew where it is gone; whether it is a new one, with nothing installed."""
    new, told = False, ""
    while (state := state_of(args)) != "ACTIVE":
        if state != told:
            say(f"{args.name}: {state or 'not there'}")
            told = state
        if state in (*GONE, "FAILED"):
            must(delete(args))
        if state in (*GONE, "FAILED", ""):
            found = run(create(args), capture=True)
            if found.code:
                last = (found.output.strip().splitlines() or ["no reason given"])[-1]
                remedy = "; ask for more quota, or take another zone or type" if refused(found.output) else ""
                raise LaunchError(f"{args.name} cannot be created: {last}{remedy}")
            new = True
        else:
            time.sleep(POLL)
    say(f"{args.name}: ACTIVE; it costs money from now on until it is deleted: {shown(delete(args))}")
    return new


def refused(output: str) -> bool:
    """Whether there is no quota: trying again will not help."""
    return any(word in output.lower() for word in QUOTA)


def install(args: argparse.Namespace, bundle: str) -> list[list[str]]:
    """The commands that put the code on every host."""
    commands = [copy(args, bundle, "bert_jax.tgz")]
    unpack = "mkdir -p bert_jax && tar xzf bert_jax.tgz -C bert_jax"
    if args.env:
        commands.append(copy(args, outside.environment_file(args.env) if not args.dry_run else "job.env", "job.env"))
        unpack += " && mv job.env bert_jax/job.env && chmod 600 bert_jax/job.env"
    return [*commands, ssh(args, unpack)]


def script(argv: list[str]) -> int:
    """The exit code of the job."""
    args, words = parse(argv)
    job = ssh(args, shown(["bash", "bert_jax/launch/on_host.sh", *words]))
    if args.dry_run:
        for command in (create(args), describe(args), *install(args, "bert_jax.tgz"), job, delete(args)):
            run(command, dry_run=True)
        return 0
    installed = False

    def attempt() -> int:
        nonlocal installed
        if acquire(args):
            installed = False
        if not installed:
            for command in install(args, outside.bundle()):
                if (code := run(command).code) != 0:
                    return code if code not in outside.FINAL else outside.LOST
            installed = True
        return outside.worst(run(job).output)

    code = outside.supervise(attempt, tries=args.restarts)
    if args.delete and code == 0:
        must(delete(args))
    elif state_of(args):
        say(f"{args.name} is still there and costs money; delete it with: {shown(delete(args))}")
    return code


if __name__ == "__main__":
    outside.main(script)
