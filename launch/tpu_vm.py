"""A run on Cloud TPU VMs: asks for a queued resource, waits, installs, trains on all hosts; made again when Spot goes.

python launch/tpu_vm.py --name bert --zone us-west4-a --type v5litepod-8 --spot --dry-run -- \\
    --config configs/pretrain_base.py --workdir gs://BUCKET/bert --data.path gs://BUCKET/rows

What it makes carries the label bert-jax-launch=NAME; nothing else is ever deleted. Stop it with Ctrl-C and start it
again: it finds its resource and goes on.
"""

import argparse
import time
from dataclasses import dataclass
from typing import NamedTuple

import outside
from outside import LaunchError, PassingError, must, run, say, shown

LABEL = "bert-jax-launch"
POLL = 30.0  # seconds between looks at a queued resource
# Software image by generation, as Google's documentation of TPU software versions has them.
IMAGES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
DEAD = ("SUSPENDING", "SUSPENDED", "FAILED")  # states that no TPU comes of any more
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
    args, words = outside.parse(parser, argv, bundled=True)
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
    """Its state, the label that says whether it is ours, and why it failed."""
    shape = f"--format=value(state.state,tpu.nodeSpec[0].node.labels.{LABEL},state.failedData.error.message)"
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


class Look(NamedTuple):
    """What `describe` tells; no state when there is no such resource."""

    state: str = ""
    label: str = ""
    reason: str = ""


@dataclass
class Known:
    """What this call knows of."""

    there: bool = False  # a resource of ours, which may cost money
    installed: bool = False


def look(args: argparse.Namespace) -> Look:
    """How the resource stands. Raises LaunchError where one may not know, PassingError where that may pass."""
    found = run(describe(args), capture=True)
    if not found.code:
        return Look(*(field.strip() for field in found.output.strip("\n").split("\t", 2)))
    if outside.missing(found.said):
        return Look()
    fault = LaunchError if outside.denied(found.said) else PassingError
    raise fault(f"{args.name} cannot be looked at: {found.last}")


def ours(args: argparse.Namespace) -> Look:
    """As `look`. Raises LaunchError where one of that name is not ours."""
    found = look(args)
    if found.state and found.label != args.name:
        raise LaunchError(f"{args.name} is there already and was not made by this script; take another --name")
    return found


def acquire(args: argparse.Namespace, known: Known) -> None:
    """Waits for the TPU, created anew where it is gone.

    Raises PassingError where one that was created here comes to nothing: then there is a pause before the next.
    """
    created, told = False, ""
    while (found := ours(args)).state != "ACTIVE":
        known.there = known.there or bool(found.state)
        if found.state != told:
            say(f"{args.name}: {found.state or 'not there'}{found.reason and f': {found.reason}'}")
            told = found.state
        if found.state in DEAD:
            must(delete(args), capture=True)
            if created:
                raise PassingError(f"{args.name}: {found.state} right after it was made, so deleted")
        if found.state in ("", *DEAD):
            ask(args)
            created, known.there, known.installed = True, True, False
        else:
            time.sleep(POLL)
    known.there = True
    say(f"{args.name}: ACTIVE; it costs money from now on until it is deleted: {shown(delete(args))}")


def ask(args: argparse.Namespace) -> None:
    """Runs `create`. Raises LaunchError with a way out where one is known, PassingError where that may pass."""
    found = run(create(args), capture=True)
    if found.code:
        remedy = "; ask for more quota, or take another zone or type" if refused(found.said) else ""
        fault = PassingError if outside.passing(found.said) and not remedy else LaunchError
        raise fault(f"{args.name} cannot be created: {found.last}{remedy}")


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
    known = Known()

    def attempt() -> int:
        acquire(args, known)
        if not known.installed:
            for command in install(args, outside.bundle()):
                if (code := run(command).code) != 0:
                    return code if code not in outside.FINAL else outside.LOST
            known.installed = True
        return outside.worst(run(job).output)

    try:
        code = outside.supervise(attempt, tries=args.restarts)
    except LaunchError as error:
        if not known.there:
            raise
        say(f"launch: {error}")
        code = 2
    if not (args.delete and code == 0 and run(delete(args)).code == 0):
        farewell(args)
    return code


def farewell(args: argparse.Namespace) -> None:
    """Says what is left, as far as one can see."""
    try:
        found = look(args)
    except LaunchError as error:
        say(f"{error}; as long as it is there it costs money; delete it with: {shown(delete(args))}")
        return
    if found.state and found.label == args.name:
        say(f"{args.name} is still there and costs money; delete it with: {shown(delete(args))}")


if __name__ == "__main__":
    outside.main(script)
