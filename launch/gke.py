"""A run on a GKE cluster with a TPU node pool, as a JobSet (or with --xpk as a workload of xpk).

python launch/gke.py --name bert --image REGISTRY/bert_jax:1 --accelerator tpu-v5-lite-podslice --topology 2x4 \\
    --chips-per-host 4 --spot --dry-run -- --config configs/pretrain_base.py --workdir gs://BUCKET/bert

The image holds an installed bert_jax[tpu]; `docker build --file launch/Dockerfile --tag IMAGE .` makes it. GKE tells
the processes where they meet. A job that is preempted or dies starts again; a wrong configuration or broken data ends
it. The same command again follows a job that runs.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import time

import outside
from outside import LaunchError, must, run, say, shown

LABEL = "bert-jax-launch"
DIGEST = "bert-jax-launch-digest"  # annotation by which the same arguments are known
POLL = 30.0  # seconds between looks at the job


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line."""
    parser = outside.arguments(*__doc__.split("\n\n", 1))
    parser.add_argument("--image", required=True, help="container with bert_jax[tpu]")
    parser.add_argument("--accelerator", required=True, help="label of the node pool, such as tpu-v5-lite-podslice")
    parser.add_argument("--topology", required=True, help="of the slice, such as 2x4 or 4x4x4")
    parser.add_argument("--chips-per-host", type=int, default=4)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--spot", action="store_true", help="nodes that may be taken away at any time")
    parser.add_argument(
        "--xpk", metavar="CLUSTER", help="submit with xpk to this cluster instead; it restarts by rules of its own"
    )
    parser.add_argument("--tpu-type", default="", help="with --xpk, such as v5litepod-8")
    args, words = outside.parse(parser, argv)
    try:
        chips = math.prod(int(size) for size in args.topology.split("x"))
    except ValueError:
        parser.error(f"--topology {args.topology}: sizes with x between them, such as 2x4")
    if chips % args.chips_per_host:
        parser.error(f"--topology {args.topology}: {chips} chips are not whole hosts of {args.chips_per_host}")
    if args.xpk and not args.tpu_type:
        parser.error("--xpk: name the --tpu-type too")
    if args.xpk and args.env:
        parser.error("--env: not with --xpk, which makes no Secret; leave out one of them")
    args.hosts = chips // args.chips_per_host
    return args, words


def manifest(args: argparse.Namespace, words: list[str]) -> dict:
    """The JobSet: a Job a slice, a Pod a host."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": args.accelerator,
        "cloud.google.com/gke-tpu-topology": args.topology,
    }
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "train",
        "image": args.image,
        "command": ["python", "-m", "bert_jax.train"],
        "args": [escaped(word) for word in words],
        "ports": [{"containerPort": 8476}],
        "resources": {"limits": {"google.com/tpu": args.chips_per_host}},
    }
    if args.env:
        container["envFrom"] = [{"secretRef": {"name": secret_name(args)}}]
    final = sorted(code for code in outside.FINAL if code)
    pod = {
        "spec": {
            "restartPolicy": "Never",
            "nodeSelector": selector,
            "terminationGracePeriodSeconds": 120,
            "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
            "containers": [container],
        }
    }
    job = {
        "spec": {
            "parallelism": args.hosts,
            "completions": args.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": final}}]},
            "template": pod,
        }
    }
    # The Job fails at once by a final exit code, with a reason that no restart follows; all else restarts the set.
    rules = [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    spec = {
        "failurePolicy": {"maxRestarts": args.restarts, "rules": rules},
        "network": {"enableDNSHostnames": True},
        "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": job}],
    }
    digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "namespace": args.namespace,
            "labels": {LABEL: args.name},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
                DIGEST: digest,
            },
        },
        "spec": spec,
    }


def secret_name(args: argparse.Namespace) -> str:
    """Of the Secret with the variables."""
    return f"{args.name}-env"


def secret(args: argparse.Namespace, values: dict[str, str]) -> str:
    """The Secret with the variables, as kubectl reads it."""
    labels = {LABEL: args.name}
    metadata = {"name": secret_name(args), "namespace": args.namespace, "labels": labels}
    found = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": values}
    return json.dumps(found, indent=1, ensure_ascii=False)


def escaped(word: str) -> str:
    """Kubernetes replaces $(NAME) in arguments, and $$ by $."""
    return word.replace("$", "$$")


def kubectl(args: argparse.Namespace, *words: str) -> list[str]:
    """A command of kubectl in the namespace."""
    return ["kubectl", *words, f"--namespace={args.namespace}"]


def workload(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Hands the job to xpk."""
    job = shown(["python", "-m", "bert_jax.train", *words])
    xpk = ["xpk", "workload", "create", f"--cluster={args.xpk}", f"--workload={args.name}"]
    xpk += [f"--docker-image={args.image}", f"--tpu-type={args.tpu_type}", f"--num-slices={args.slices}"]
    return [*xpk, f"--max-restarts={args.restarts}", f"--command={job}"]


def look(args: argparse.Namespace) -> list[str]:
    """Whose the JobSet is, and how it stands."""
    return kubectl(args, "get", "jobset", args.name, "--output=json")


def look_at_secret(args: argparse.Namespace) -> list[str]:
    """Whose the Secret is, without its values: its name and our label, nothing where there is none."""
    shape = f"--output=jsonpath={{.metadata.name}}/{{.metadata.labels.{LABEL}}}"
    return kubectl(args, "get", "secret", secret_name(args), "--ignore-not-found", shape)


def apply(args: argparse.Namespace) -> list[str]:
    """Makes what is described on stdin."""
    return kubectl(args, "apply", "--filename=-")


def remove(args: argparse.Namespace) -> list[str]:
    """Deletes the JobSet, and the Secret where there is one."""
    return kubectl(args, "delete", f"jobset/{args.name}", *([f"secret/{secret_name(args)}"] if args.env else []))


def state_of(jobset: dict) -> str:
    """Completed, Failed, or "" while it goes on."""
    return jobset.get("status", {}).get("terminalState", "")


def runs_already(args: argparse.Namespace, wanted: dict) -> bool:
    """Whether this very job is there and goes on. Raises LaunchError where the name is taken by another."""
    found = run(look(args), capture=True)
    if found.code and outside.missing(found.said):
        return False
    if found.code:
        raise outside.failure(look(args), found)
    there = json.loads(found.output)
    metadata = there["metadata"]
    if metadata.get("labels", {}).get(LABEL) != args.name:
        raise LaunchError(f"JobSet {args.name} is there already and was not made by this script; take another --name")
    same = metadata.get("annotations", {}).get(DIGEST) == wanted["metadata"]["annotations"][DIGEST]
    if state_of(there) or not same:
        how = state_of(there) or "running with other arguments"
        raise LaunchError(
            f"JobSet {args.name} is there already: {how}; take another --name, or delete it: {shown(remove(args))}"
        )
    return True


def make_secret(args: argparse.Namespace) -> None:
    """Makes the Secret. What kubectl says of it is not shown, since it may repeat what it read."""
    owner = must(look_at_secret(args), capture=True).strip()
    if owner not in ("", f"{secret_name(args)}/{args.name}"):
        raise LaunchError(f"Secret {secret_name(args)} is there already, of somebody else; take another --name")
    values = {name: base64.b64encode(os.environ[name].encode()).decode() for name in args.env}
    if code := run(apply(args), capture=True, stdin=secret(args, values)).code:
        raise LaunchError(
            f"Secret {secret_name(args)} could not be made (kubectl ended with {code}, and its words may hold values); "
            f"see whether you may: {shown(kubectl(args, 'auth', 'can-i', 'create', 'secrets'))}"
        )


def follow(args: argparse.Namespace) -> str:
    """Waits for the end of the JobSet: Completed or Failed. Raises LaunchError where it is gone or one may not look."""
    waits, told = outside.pauses(POLL), False
    while True:
        found = run(look(args), capture=True)
        if not found.code:
            if state := state_of(json.loads(found.output)):
                return state
            waits, told = outside.pauses(POLL), False
            time.sleep(POLL)
            continue
        if outside.missing(found.said):
            raise LaunchError(f"JobSet {args.name} is gone: somebody deleted it")
        if outside.denied(found.said):
            raise LaunchError(f"{args.name} cannot be looked at: {found.last}; end it with: {shown(remove(args))}")
        if not told:
            say(f"{args.name} cannot be looked at: {found.last}; trying on")
            told = True
        time.sleep(next(waits))


def dry_run(args: argparse.Namespace, wanted: str) -> None:
    """Prints all commands and what they read, without values of variables."""
    run(look(args), dry_run=True)
    if args.env:
        run(look_at_secret(args), dry_run=True)
        run(apply(args), dry_run=True, stdin=secret(args, dict.fromkeys(args.env, "…")))
    run(apply(args), dry_run=True, stdin=wanted)
    run(remove(args), dry_run=True)


def script(argv: list[str]) -> int:
    """0 when the set completed, 1 when it failed."""
    args, words = parse(argv)
    if args.xpk:
        must(workload(args, words), dry_run=args.dry_run)
        return 0
    wanted = manifest(args, words)
    text = json.dumps(wanted, indent=1)
    if args.dry_run:
        dry_run(args, text)
        return 0
    known = runs_already(args, wanted)
    if known:
        say(f"JobSet {args.name} runs already, with the same arguments; following it")
    say(f"its nodes cost money while it runs; what is there goes with: {shown(remove(args))}")
    if args.env and not known:
        make_secret(args)
    if not known:
        must(apply(args), stdin=text)
    state = follow(args)
    logs = kubectl(args, "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}", "--tail=50")
    say(f"{args.name}: {state}; what it said: {shown(logs)}; what is there goes with: {shown(remove(args))}")
    return int(state != "Completed")


if __name__ == "__main__":
    outside.main(script)
