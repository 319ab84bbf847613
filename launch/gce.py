"""A run on Compute Engine: a managed instance group whose machines install, train, and come back by themselves.

python launch/gce.py --name bert --zone us-central1-a --machine-type a2-highgpu-8g --size 2 --bucket gs://BUCKET \\
    --spot --dry-run -- --config configs/pretrain_base.py --workdir gs://BUCKET/bert --data.path gs://BUCKET/rows

Template, group and machines are called NAME and NAME-0, NAME-1, …; process 0 is on NAME-0. A machine that Spot takes is
made again by the group, under the same name, and its startup script goes on. Nothing that was there before is changed;
the same command again makes what is missing, and follows the job.
"""

import argparse
import json
import shlex
import tempfile
import time

import outside
from outside import LaunchError, must, run, say, shown

LABEL = "bert-jax-launch"

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
    args, words = outside.parse(parser, argv, bundled=True)
    if args.env:
        parser.error("--env: metadata of a machine can be read by all of the project; use Secret Manager there")
    if args.size < 1 or not args.bucket.startswith("gs://"):
        parser.error(f"--size {args.size} --bucket {args.bucket}: one machine or more, and a gs:// address")
    return args, words


def machine(args: argparse.Namespace) -> list[str]:
    """The flags that say what machines are made."""
    words = [f"--machine-type={args.machine_type}", f"--image-family={args.image_family}"]
    words += [f"--image-project={args.image_project}", f"--boot-disk-size={args.disk}", "--scopes=cloud-platform"]
    words += ["--metadata=enable-guest-attributes=TRUE", "--maintenance-policy=TERMINATE"]
    return [*words, *(["--provisioning-model=SPOT", "--instance-termination-action=STOP"] if args.spot else [])]


def startup_script(args: argparse.Namespace, words: list[str]) -> str:
    """What each machine does whenever it boots; all that was asked for stands in it, so it tells whether that is new.

    An exit code is left by the supervisor alone: where the code cannot be fetched, there is none yet.
    """
    job = shown(["bash", "launch/on_host.sh", *words])
    attribute = f"http://metadata.google.internal/computeMetadata/v1/instance/guest-attributes/{ATTRIBUTE}"
    return f"""#!/bin/bash
# {json.dumps(machine(args))}
set -o pipefail
export HOME=/root EXTRAS={shlex.quote(args.extras)}
export JAX_COORDINATOR_ADDRESS={args.name}-0:{PORT} JAX_NUM_PROCESSES={args.size} JAX_PROCESS_ID="${{HOSTNAME##*-}}"
mkdir -p /opt/bert_jax && cd /opt/bert_jax || exit 5
until gcloud storage cp {shlex.quote(archive(args))} - | tar xz; do
    echo "the code cannot be fetched yet; again in 30 s"
    sleep 30
done
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


def of_group(args: argparse.Namespace, verb: str, *words: str) -> list[str]:
    """A command about the group."""
    return compute(args, "instance-groups", "managed", verb, args.name, *words)


def of_template(args: argparse.Namespace, verb: str, *words: str) -> list[str]:
    """A command about the instance template."""
    return compute(args, "instance-templates", verb, args.name, *words, zone=False)


def create_template(args: argparse.Namespace, script: str, bundle: str) -> list[list[str]]:
    """Puts the code in place and makes the template, with the startup script that is in the file `script`."""
    words = [*machine(args), f"--metadata-from-file=startup-script={script}", f"--labels={LABEL}={args.name}"]
    return [["gcloud", "storage", "cp", bundle, archive(args)], of_template(args, "create", *words)]


def create_group(args: argparse.Namespace) -> list[str]:
    """Makes the group, empty."""
    return of_group(args, "create", f"--template={args.name}", "--size=0")


def create_machines(args: argparse.Namespace, there: set[str]) -> list[list[str]]:
    """Makes one machine after the other, but those that are there."""
    names = [f"{args.name}-{number}" for number in range(args.size)]
    return [of_group(args, "create-instance", f"--instance={name}") for name in names if name not in there]


def delete(args: argparse.Namespace) -> list[list[str]]:
    """Deletes group (with its machines) and template."""
    return [of_group(args, "delete"), of_template(args, "delete")]


def removal(args: argparse.Namespace) -> str:
    """`delete` as one would type it."""
    return "; ".join(map(shown, delete(args)))


def describe_template(args: argparse.Namespace) -> list[str]:
    """Whose it is, and what its machines do."""
    return of_template(args, "describe", "--format=json")


def describe_group(args: argparse.Namespace) -> list[str]:
    """The template of the group."""
    return of_group(args, "describe", "--format=value(instanceTemplate)")


def list_machines(args: argparse.Namespace) -> list[str]:
    """The machines of the group."""
    return of_group(args, "list-instances", "--format=value(instance)")


def list_errors(args: argparse.Namespace) -> list[str]:
    """Why the group could not make machines."""
    return of_group(args, "list-errors", "--format=value(error.code,error.message)")


def left(args: argparse.Namespace) -> list[str]:
    """Asks machine 0 for the job's exit code."""
    words = ("instances", "get-guest-attributes", f"{args.name}-0", f"--query-path={ATTRIBUTE}")
    return compute(args, *words, "--format=value(value)")


def there(command: list[str]) -> str | None:
    """What `describe` tells, None where there is no such thing. Raises LaunchError when it fails otherwise."""
    found = run(command, capture=True)
    if found.code and not outside.missing(found.said):
        raise outside.failure(command, found)
    return None if found.code else found.output


def own(args: argparse.Namespace, startup: str, template: str | None, group: str | None) -> None:
    """Raises LaunchError where template or group are not ours, or made for something else."""
    made = json.loads(template)["properties"] if template is not None else {}
    others = template is not None and made.get("labels", {}).get(LABEL) != args.name
    if others or (group is not None and (template is None or _last(group) != args.name)):
        kind = "template" if others else "group"
        raise LaunchError(f"{kind} {args.name} is there already and was not made by this script; take another --name")
    items = {item["key"]: item["value"] for item in made.get("metadata", {}).get("items", [])}
    if template is not None and items.get("startup-script", "").strip() != startup.strip():
        raise LaunchError(
            f"{args.name} was made with other arguments; take another --name, or delete it: {removal(args)}"
        )


def _last(address: str) -> str:
    """The name at the end of the address of a resource."""
    return address.strip().rsplit("/", 1)[-1]


def make(args: argparse.Namespace, startup: str) -> None:
    """Makes what is missing of template, group and machines."""
    template, group = there(describe_template(args)), there(describe_group(args))
    own(args, startup, template, group)
    if template is not None:
        say(f"{args.name} is there already, with the same arguments; following its job (to run it again, delete it)")
    say(f"from now on {args.name} costs money until it is deleted: {removal(args)}")
    if template is None:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(startup)
            file.flush()
            for command in create_template(args, file.name, outside.bundle()):
                must(command)
    if group is None:
        must(create_group(args))
    listed = must(list_machines(args), capture=True) if group is not None else ""
    for command in create_machines(args, set(map(_last, listed.split()))):
        must(command)


def follow(args: argparse.Namespace) -> int:
    """Waits for the job's exit code; new errors, of the group or in looking, are shown once each.

    Raises LaunchError where one may not look, or the group is gone.
    """
    told, blind = set(), []
    while True:
        found = run(left(args), capture=True)
        if found.code == 0 and found.output.strip().isdecimal():
            return int(found.output)
        errors = run(list_errors(args), capture=True)
        was_blind = blind
        # Before the job ends there is no such attribute.
        blind = [look for look in (found, errors) if look.code and not outside.missing(look.said)]
        for look in blind:
            if outside.denied(look.said):
                raise LaunchError(
                    f"{args.name} cannot be looked at: {look.last}; it costs money until: {removal(args)}"
                )
        if errors.code and outside.missing(errors.said):
            raise LaunchError(f"group {args.name} is gone; what may be left of it goes with: {removal(args)}")
        if blind and not was_blind:
            say(f"{args.name} cannot be looked at: {blind[0].last}; trying on")
        lines = {line.strip() for line in errors.output.splitlines() if not errors.code}
        for line in sorted(lines - told):
            say(f"{args.name}: {line}")
        told |= lines
        time.sleep(POLL)


def dry_run(args: argparse.Namespace, startup: str) -> None:
    """Prints all commands and the startup script."""
    looks = [describe_template(args), describe_group(args)]
    makes = [*create_template(args, "startup.sh", "bert_jax.tgz"), create_group(args), *create_machines(args, set())]
    for command in (*looks, *makes, left(args), list_errors(args), *delete(args)):
        run(command, dry_run=True)
    print(f"# startup.sh:\n{startup}", end="")


def script(argv: list[str]) -> int:
    """The exit code of the job."""
    args, words = parse(argv)
    startup = startup_script(args, words)
    if args.dry_run:
        dry_run(args, startup)
        return 0
    make(args, startup)
    log = compute(args, "instances", "get-serial-port-output", f"{args.name}-0")
    say(f"waiting for the job to end; what it says: {shown(log)}")
    code = follow(args)
    say(f"exit code {code}: {outside.FINAL.get(code, 'given up')}")
    deleted = args.delete and code == 0 and all(run(command).code == 0 for command in delete(args))
    if not deleted:
        say(f"{args.name} is still there and costs money; delete it with: {removal(args)}")
    return code


if __name__ == "__main__":
    outside.main(script)
