"""A run on Compute Engine: a managed instance group whose machines install, train, and come back by themselves.

python launch/gce.py --name bert --zone us-central1-a --machine-type a2-highgpu-8g --size 2 --bucket gs://BUCKET \\
    --spot --dry-run -- --config configs/pretrain_base.py --workdir gs://BUCKET/bert --data.path gs://BUCKET/rows

Template, group and machines are called NAME and NAME-0, NAME-1, …; process 0 is on NAME-0. A machine that Spot takes is
made again by the group, under the same name, and its startup script goes on. Nothing that was there before is changed.
"""

import argparse
import shlex
import tempfile
import time

import outside
from outside import must, run, say, shown

PORT = 8476  # of process 0, as in bert_jax/hosts.py
POLL = 60.0  # seconds between looks at the job
IMAGE = ("common-cu128-ubuntu-2204-nvidia-570", "deeplearning-platform-release")  # family and project: with drivers
ATTRIBUTE = "bert_jax/exit"  # guest attribute in which a machine leaves the job's last exit code


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line."""
    parser = outside.arguments(*__doc__.split("\n\n", 1))
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: that of gcloud")
    parser.add_argument("--machine-type", required=True, help="with its GPUs, such as a2-highgpu-8g")
    parser.add_argument("--size", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--bucket", required=True, help="gs://… where the code is put for the machines")
    parser.add_argument("--image-family", default=IMAGE[0])
    parser.add_argument("--image-project", default=IMAGE[1])
    parser.add_argument("--disk", default="200GB", help="boot disk (default: 200GB)")
    parser.add_argument("--extras", default="gpu", help="wheels to install (default: gpu)")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away at any time")
    parser.add_argument("--delete", action="store_true", help="delete all that was made when the job is done")
    args, words = outside.parse(parser, argv)
    if args.env:
        parser.error("--env: metadata of a machine can be read by all of the project; use Secret Manager there")
    if args.size < 1 or not args.bucket.startswith("gs://"):
        parser.error(f"--size {args.size} --bucket {args.bucket}: one machine or more, and a gs:// address")
    return args, words


def startup_script(args: argparse.Namespace, words: list[str]) -> str:
    """What each machine does whenever it boots."""
    job = shown(["bash", "launch/on_host.sh", *words])
    attribute = f"http://metadata.google.internal/computeMetadata/v1/instance/guest-attributes/{ATTRIBUTE}"
    return f"""#!/bin/bash
export HOME=/root EXTRAS={shlex.quote(args.extras)}
export JAX_COORDINATOR_ADDRESS={args.name}-0:{PORT} JAX_NUM_PROCESSES={args.size} JAX_PROCESS_ID="${{HOSTNAME##*-}}"
mkdir -p /opt/bert_jax && cd /opt/bert_jax || exit 5
gcloud storage cp {shlex.quote(archive(args))} - | tar xz
python3 launch/supervise.py --restarts {args.restarts} -- {job}
curl --silent --request PUT --header 'Metadata-Flavor: Google' --data "$?" {attribute}
"""


def archive(args: argparse.Namespace) -> str:
    """Where the code lies for the machines."""
    return f"{args.bucket.rstrip('/')}/{args.name}.tgz"


def compute(args: argparse.Namespace, *words: str, zone: bool = True) -> list[str]:
    """A command of `gcloud compute`."""
    where = [*([f"--zone={args.zone}"] if zone else []), *([f"--project={args.project}"] if args.project else [])]
    return ["gcloud", "compute", *words, *where, "--quiet"]


def create(args: argparse.Namespace, script: str, bundle: str) -> list[list[str]]:
    """Puts the code in place, makes template, group, and one machine after the other."""
    template = [f"--machine-type={args.machine_type}", f"--image-family={args.image_family}"]
    template += [f"--image-project={args.image_project}", f"--boot-disk-size={args.disk}", "--scopes=cloud-platform"]
    template += [f"--metadata-from-file=startup-script={script}", "--metadata=enable-guest-attributes=TRUE"]
    template += ["--maintenance-policy=TERMINATE", f"--labels=bert-jax-launch={args.name}"]
    if args.spot:
        template += ["--provisioning-model=SPOT", "--instance-termination-action=STOP"]
    group = ("instance-groups", "managed")
    return [
        ["gcloud", "storage", "cp", bundle, archive(args)],
        compute(args, "instance-templates", "create", args.name, *template, zone=False),
        compute(args, *group, "create", args.name, f"--template={args.name}", "--size=0"),
        *(
            compute(args, *group, "create-instance", args.name, f"--instance={args.name}-{number}")
            for number in range(args.size)
        ),
    ]


def delete(args: argparse.Namespace) -> list[list[str]]:
    """Deletes group (with its machines) and template."""
    return [
        compute(args, "instance-groups", "managed", "delete", args.name),
        compute(args, "instance-templates", "delete", args.name, zone=False),
    ]


def left(args: argparse.Namespace) -> list[str]:
    """Asks machine 0 for the job's exit code."""
    words = ("instances", "get-guest-attributes", f"{args.name}-0", f"--query-path={ATTRIBUTE}")
    return compute(args, *words, "--format=value(value)")


def script(argv: list[str]) -> int:
    """The exit code of the job."""
    args, words = parse(argv)
    if args.dry_run:
        for command in (*create(args, "startup.sh", "bert_jax.tgz"), left(args), *delete(args)):
            run(command, dry_run=True)
        print(f"# startup.sh:\n{startup_script(args, words)}", end="")
        return 0
    if run(compute(args, "instance-groups", "managed", "describe", args.name), capture=True).code == 0:
        say(f"group {args.name} is there already; following its job")
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(startup_script(args, words))
            file.flush()
            for command in create(args, file.name, outside.bundle()):
                must(command)
    say(f"it costs money until it is deleted: {'; '.join(map(shown, delete(args)))}")
    while not (code := run(left(args), capture=True).output.strip()).isdecimal():
        time.sleep(POLL)
    say(f"exit code {code}: {outside.FINAL.get(int(code), 'given up')}")
    if args.delete and code == "0":
        for command in delete(args):
            must(command)
    return int(code)


if __name__ == "__main__":
    outside.main(script)
