"""A run on a GKE cluster with a TPU node pool, as a JobSet (or with --xpk as a workload of xpk).

python launch/gke.py --name bert --image REGISTRY/bert_jax:1 --accelerator tpu-v5-lite-podslice --topology 2x4 \\
    --chips-per-host 4 --spot --dry-run -- --config configs/pretrain_base.py --workdir gs://BUCKET/bert

The image holds an installed bert_jax[tpu]; `docker build --file launch/Dockerfile --tag IMAGE .` makes it. GKE tells
the processes where they meet. A job that is preempted or dies starts again; a wrong configuration or broken data ends
it.
"""

import argparse
import json
import math
import time

import outside
from outside import must, run, say, shown

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
    parser.add_argument("--xpk", metavar="CLUSTER", help="submit with xpk to this cluster instead")
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
        container["envFrom"] = [{"secretRef": {"name": f"{args.name}-env"}}]
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
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "namespace": args.namespace,
            "labels": {"bert-jax-launch": args.name},
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": rules},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": job}],
        },
    }


def escaped(word: str) -> str:
    """Kubernetes replaces $(NAME) in arguments, and $$ by $."""
    return word.replace("$", "$$")


def kubectl(args: argparse.Namespace, *words: str) -> list[str]:
    """A command of kubectl in the namespace."""
    return ["kubectl", *words, f"--namespace={args.namespace}"]


def commands(args: argparse.Namespace, words: list[str]) -> list[tuple[list[str], str | None]]:
    """What is run, and what each reads."""
    if args.xpk:
        job = shown(["python", "-m", "bert_jax.train", *words])
        xpk = ["xpk", "workload", "create", f"--cluster={args.xpk}", f"--workload={args.name}"]
        xpk += [f"--docker-image={args.image}", f"--tpu-type={args.tpu_type}", f"--num-slices={args.slices}"]
        return [([*xpk, f"--max-restarts={args.restarts}", f"--command={job}"], None)]
    found: list[tuple[list[str], str | None]] = []
    if args.env:
        file = "job.env" if args.dry_run else outside.environment_file(args.env, plain=True)
        found.append(
            (kubectl(args, "create", "secret", "generic", f"{args.name}-env", f"--from-env-file={file}"), None)
        )
    return [*found, (kubectl(args, "apply", "--filename=-"), json.dumps(manifest(args, words), indent=1))]


def script(argv: list[str]) -> int:
    """0 when the set completed, 1 when it failed."""
    args, words = parse(argv)
    state = kubectl(args, "get", "jobset", args.name, "--output=jsonpath={.status.terminalState}")
    remove = kubectl(args, "delete", "jobset", args.name)
    if args.dry_run:
        for command, text in commands(args, words):
            run(command, dry_run=True, stdin=text)
        if not args.xpk:
            run(state, dry_run=True)
            run(remove, dry_run=True)
        return 0
    for command, text in commands(args, words):
        must(command, stdin=text)
    if args.xpk:
        return 0
    say(f"its nodes cost money while it runs; end it with: {shown(remove)}")
    while not (found := must(state, capture=True).strip()):
        time.sleep(POLL)
    logs = kubectl(args, "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}", "--tail=50")
    say(f"{args.name}: {found}; what it said: {shown(logs)}")
    return int(found != "Completed")


if __name__ == "__main__":
    outside.main(script)
