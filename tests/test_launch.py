"""Launch scripts against stand-ins for gcloud, kubectl and sbatch that replay states and keep what they were told."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
HARD = ["--note", "two words", "it's", 'say "x"', "a;b", "$(id)", "$HOME", "`id`", "*", "back\\slash", "é\tx", ""]
JOB = ["--config", "configs/tiny.py", "--workdir", "gs://b/w"]

# Appends its arguments to calls.jsonl, then answers as the first rule in replies.json whose words are all among them;
# a rule is used as often as it has answers, the last one for ever.
STUB = """#!{python}
import json, os, subprocess, sys
here = os.path.dirname(os.path.abspath(__file__))
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = "" if sys.stdin.isatty() else sys.stdin.read()
with open(os.path.join(here, "calls.jsonl"), "a") as file:
    file.write(json.dumps({{"words": words, "stdin": stdin}}) + "\\n")
with open(os.path.join(here, "replies.json")) as file:
    rules = json.load(file)
for rule in rules:
    if all(any(part in word for word in words) for part in rule["when"]):
        code, text = rule["answers"][0]
        if len(rule["answers"]) > 1:
            rule["answers"].pop(0)
            with open(os.path.join(here, "replies.json"), "w") as file:
                json.dump(rules, file)
        print(text)
        sys.exit(code)
"""


@pytest.fixture
def outside(tmp_path):
    """A folder on PATH with the stand-ins; `outside(rules)` sets what they answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "xpk"):
        (folder / name).write_text(STUB.format(python=sys.executable))
        (folder / name).chmod(0o755)

    def answer(*rules):
        replies = [{"when": when.split(), "answers": answers} for when, answers in rules]
        (folder / "replies.json").write_text(json.dumps(replies))
        (folder / "calls.jsonl").write_text("")
        return folder

    return answer


def calls_of(folder) -> list[list[str]]:
    return [json.loads(line)["words"] for line in (folder / "calls.jsonl").read_text().splitlines()]


def launch(script, *words, path=None, timeout=60, **more):
    """Runs a launch script with pauses of no length."""
    code = "import runpy, sys, time; time.sleep = lambda _: None; sys.argv = sys.argv[1:]; sys.path.insert(0, 'launch')"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else "/nowhere", **more}
    command = [sys.executable, "-c", code, f"launch/{script}.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


TPU = ["--name", "bert", "--zone", "us-west4-a", "--type", "v5litepod-8"]
CASES = {
    "tpu_vm": [*TPU, "--spot"],
    "gce": ["--name", "bert", "--zone", "us-central1-a", "--machine-type", "a2-highgpu-8g", "--size", "2"]
    + ["--bucket", "gs://b", "--spot"],
    "slurm": ["--name", "bert", "--nodes", "2", "--partition", "gpu"],
    "gke": ["--name", "bert", "--image", "r/bert:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "2x4"]
    + ["--spot"],
}
GOLDENS = {
    **CASES,
    "gke_env": [*CASES["gke"], "--env", "TOKEN"],
    "gke_xpk": [*CASES["gke"], "--xpk", "cluster", "--tpu-type", "v5litepod-8"],
}


@pytest.mark.parametrize("case", GOLDENS)
def test_a_dry_run_prints_exactly_what_would_be_run(case):
    """Without credentials or the tools; the golden files are what was reviewed by eye."""
    done = launch(case.split("_env")[0].split("_xpk")[0], *GOLDENS[case], "--dry-run", "--", *JOB, *HARD, TOKEN="s3")
    assert done.returncode == 0, done.stderr
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()


@pytest.mark.parametrize("script", CASES)
def test_no_secret_is_ever_printed(script, outside):
    if script == "gce":
        done = launch(script, *CASES[script], "--dry-run", "--env", "TOKEN", "--", *JOB, TOKEN="s3cret")
        assert done.returncode == 2 and "Secret Manager" in done.stderr
        return
    folder = outside(
        ("get jobset", [(1, "NotFound"), (0, jobset("Completed"))]),
        ("describe", [(0, "ACTIVE\tbert")]),
        ("on_host", [(0, MARK + "0")]),
    )
    for how in (["--dry-run"], []):
        done = launch(script, *CASES[script], *how, "--env", "TOKEN", "--", *JOB, path=folder, TOKEN="s3cret")
        assert done.returncode == 0, done.stderr
        words = [word for call in calls_of(folder) for word in call]
        hidden = ["s3cret", base64.b64encode(b"s3cret").decode()]
        assert not any(value in text for value in hidden for text in [done.stdout, done.stderr, *words])


MARK = "bert_jax exit code "


def jobset(state="", label="bert", digest=None):
    """What kubectl tells of a JobSet."""
    metadata = {"labels": {"bert-jax-launch": label}, "annotations": {"bert-jax-launch-digest": digest}}
    return json.dumps({"metadata": metadata, "status": {"terminalState": state} if state else {}})


OFFLINE = "ERROR: Max retries exceeded: Failed to establish a new connection. Please run: $ gcloud auth login"


def kinds(folder) -> list[str]:
    """The calls, in a word each."""
    known = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "on_host.sh": "job",
        "scp": "copy",
    }
    found = []
    for words in calls_of(folder):
        line = " ".join(words)
        found += [short for part, short in known.items() if part in line]
    return found


def test_created_trained_and_told_that_it_costs_money(outside):
    folder = outside(
        ("describe", [(1, "NOT_FOUND: no such"), (0, "WAITING_FOR_RESOURCES\tbert"), (0, "ACTIVE\tbert")]),
        ("on_host.sh", [(0, f"step 1\n{MARK}0\n{MARK}0")]),
    )
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 0 and kinds(folder) == ["create", "copy", "job"], done.stderr
    assert "still there and costs money" in done.stderr and "WAITING_FOR_RESOURCES" in done.stderr
    assert "step 1" not in done.stderr


def test_suspended_in_the_middle_it_is_made_again_and_goes_on(outside):
    states = ["ACTIVE", "SUSPENDED", "ACTIVE"]
    folder = outside(
        ("describe", [(1, "NOT_FOUND"), *((0, f"{state}\tbert") for state in states)]),
        ("on_host.sh", [(255, "connection lost"), (0, f"{MARK}0")]),
    )
    done = launch("tpu_vm", *TPU, "--spot", "--", *JOB, path=folder)
    assert done.returncode == 0, done.stderr
    assert kinds(folder) == ["create", "copy", "job", "delete", "create", "copy", "job"]


def test_a_lost_connection_is_made_again_without_a_new_machine(outside):
    folder = outside(("describe", [(0, "ACTIVE\tbert")]), ("on_host.sh", [(255, ""), (255, ""), (0, f"{MARK}0")]))
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 0 and kinds(folder) == ["copy", "job", "job", "job"]


@pytest.mark.parametrize(("code", "jobs"), [(143, 2), (134, 2), (5, 2), (2, 1), (3, 1), (4, 1), (6, 1), (1, 1)])
def test_which_exit_codes_are_tried_again(outside, code, jobs):
    folder = outside(
        ("describe", [(0, "ACTIVE\tbert")]), ("on_host.sh", [(1, f"{MARK}0\n{MARK}{code}"), (0, f"{MARK}0")])
    )
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert kinds(folder).count("job") == jobs
    assert done.returncode == (0 if jobs == 2 else code)


def test_restarts_are_limited(outside):
    folder = outside(("describe", [(0, "ACTIVE\tbert")]), ("on_host.sh", [(1, f"{MARK}143")]))
    done = launch("tpu_vm", *TPU, "--restarts", "3", "--", *JOB, path=folder)
    assert done.returncode == 143 and kinds(folder).count("job") == 4 and "given up" in done.stderr


def test_without_quota_it_ends_with_a_word(outside):
    folder = outside(
        ("describe", [(1, "NOT_FOUND")]),
        ("create", [(1, "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.")]),
    )
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 2 and "ask for more quota" in done.stderr and kinds(folder) == ["create"]
    assert len(done.stderr.splitlines()) <= 2


def test_a_hiccup_of_the_network_is_waited_out(outside):
    """In the queue, when asking, and at the end, where the job's code is kept."""
    looks = [(1, "NOT_FOUND"), (0, "WAITING_FOR_RESOURCES\tbert"), (1, OFFLINE), (0, "ACTIVE\tbert"), (1, OFFLINE)]
    folder = outside(("describe", [(1, OFFLINE), (1, "NOT_FOUND"), *looks]), ("on_host.sh", [(0, f"{MARK}0")]))
    rules = json.loads((folder / "replies.json").read_text())
    rules.insert(0, {"when": ["queued-resources", "create"], "answers": [[1, OFFLINE], [0, ""]]})
    (folder / "replies.json").write_text(json.dumps(rules))
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 0 and kinds(folder) == ["create", "create", "copy", "job"], done.stderr
    assert done.stderr.count("again in") == 3 and "['" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot be looked at" in last and "queued-resources delete bert" in last


def test_without_permission_it_ends_and_says_what_costs_money(outside):
    denied = (1, "ERROR: PERMISSION_DENIED: tpu.googleapis.com")
    folder = outside(("describe", [denied]))
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 2 and done.stderr == f"launch: bert cannot be looked at: {denied[1]}\n"
    folder = outside(("describe", [(0, "WAITING_FOR_RESOURCES\tbert"), denied]))
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 2 and "costs money; delete it with" in done.stderr.splitlines()[-1]


def test_what_fails_right_after_it_was_made_is_made_again_with_pauses(outside):
    failed = (0, "FAILED\tbert\tno such network: fog")
    folder = outside(("describe", [(1, "NOT_FOUND"), failed] * 3 + [(1, "NOT_FOUND")]))
    done = launch("tpu_vm", *TPU, "--restarts", "2", "--", *JOB, path=folder)
    assert done.returncode == 255 and kinds(folder) == ["create", "delete"] * 3, done.stderr
    assert done.stderr.count("FAILED: no such network: fog") == 3 and done.stderr.count("again in") == 2


def test_what_failed_earlier_is_made_again_at_once(outside):
    folder = outside(
        ("describe", [(0, "FAILED\tbert\tno capacity"), (0, "ACTIVE\tbert\t")]), ("on_host.sh", [(0, f"{MARK}0")])
    )
    done = launch("tpu_vm", *TPU, "--", *JOB, path=folder)
    assert done.returncode == 0 and kinds(folder) == ["delete", "create", "copy", "job"], done.stderr


GCE = CASES["gce"]
URL = "https://compute/projects/p/"


def startup_script(*words) -> str:
    """As a dry run shows it."""
    return launch("gce", *GCE, "--dry-run", "--", *words).stdout.split("# startup.sh:\n")[1]


def template(script: str, label="bert") -> str:
    """What gcloud tells of an instance template."""
    items = [{"key": "enable-guest-attributes", "value": "TRUE"}, {"key": "startup-script", "value": script}]
    return json.dumps({"properties": {"labels": {"bert-jax-launch": label}, "metadata": {"items": items}}})


def changes(folder) -> list[str]:
    """The calls of gcloud that change something."""
    lines = [" ".join(words) for words in calls_of(folder)]
    parts = ["storage cp", "templates create", "managed create ", "--instance=bert-0", "--instance=bert-1", "delete"]
    return [part for line in lines for part in parts if part in line]


NOT_THERE = (1, "ERROR: The resource was not found")
NEW = [("templates describe", [NOT_THERE]), ("managed describe", [NOT_THERE])]
MADE = ["storage cp", "templates create", "managed create ", "--instance=bert-0", "--instance=bert-1"]
GROUP = ("managed describe", [(0, URL + "global/instanceTemplates/bert\n")])
BOTH = ("list-instances", [(0, URL + "instances/bert-0\n" + URL + "instances/bert-1")])


def test_a_group_is_made_followed_and_its_code_read(outside):
    folder = outside(
        *NEW,
        ("get-guest-attributes", [NOT_THERE, NOT_THERE, (1, OFFLINE), (1, OFFLINE), (0, "143")]),
        ("list-errors", [(0, "QUOTA_EXCEEDED\tno GPUs"), (0, "QUOTA_EXCEEDED\tno GPUs"), (1, OFFLINE), (0, "")]),
    )
    done = launch("gce", *GCE, "--delete", "--", *JOB, path=folder)
    assert done.returncode == 143 and changes(folder) == MADE, done.stderr
    lines = done.stderr.splitlines()
    assert "costs money until" in lines[0] and "still there and costs money" in lines[-1]
    assert done.stderr.count("QUOTA_EXCEEDED\tno GPUs") == done.stderr.count("trying on") == 1


def test_a_finished_group_is_deleted_when_asked_for(outside):
    folder = outside(*NEW, ("get-guest-attributes", [(0, "0")]))
    done = launch("gce", *GCE, "--delete", "--", *JOB, path=folder)
    assert done.returncode == 0 and changes(folder) == [*MADE, "delete", "delete"]


def test_money_is_told_of_before_a_machine_cannot_be_made_and_the_next_call_makes_it(outside):
    folder = outside(*NEW, ("--instance=bert-1", [(1, "ERROR: no capacity")]))
    done = launch("gce", *GCE, "--", *JOB, path=folder)
    assert done.returncode == 2 and "costs money until" in done.stderr.splitlines()[0]
    script = startup_script(*JOB)
    described = ("templates describe", [(0, template(script))])
    folder = outside(described, GROUP, ("list-instances", [(0, URL + "bert-0")]), ("get-guest", [(0, "0")]))
    done = launch("gce", *GCE, "--", *JOB, path=folder)
    assert done.returncode == 0 and changes(folder) == ["--instance=bert-1"], done.stderr
    folder = outside(described, ("managed describe", [NOT_THERE]), ("get-guest", [(0, "0")]))
    done = launch("gce", *GCE, "--", *JOB, path=folder)
    assert done.returncode == 0 and changes(folder) == MADE[2:], done.stderr


def test_the_same_group_is_followed(outside):
    folder = outside(
        ("templates describe", [(0, template(startup_script(*JOB).rstrip()))]), GROUP, BOTH, ("get-guest", [(0, "3")])
    )
    done = launch("gce", *GCE, "--", *JOB, path=folder)
    assert done.returncode == 3 and changes(folder) == [] and "same arguments" in done.stderr


@pytest.mark.parametrize(
    ("described", "grouped", "message"),
    [
        ((0, template("#!/bin/bash")), GROUP[1][0], "other arguments; take another --name, or delete it: gcloud"),
        ((0, template("#!/bin/bash", "somebody")), GROUP[1][0], "not made by this script"),
        (NOT_THERE, GROUP[1][0], "not made by this script"),
        ((0, template("", "bert")), (0, URL + "instanceTemplates/x"), "not made by this script"),
        ((1, "ERROR: Required 'compute.instanceTemplates.get' permission"), NOT_THERE, "permission"),
    ],
)
def test_another_group_is_left_alone(outside, described, grouped, message):
    folder = outside(("templates describe", [described]), ("managed describe", [grouped]))
    done = launch("gce", *GCE, "--delete", "--", *JOB, path=folder)
    assert done.returncode == 2 and message in done.stderr and changes(folder) == []
    assert len(done.stderr.splitlines()) == 1 and ("delete it" in done.stderr) == ("other arguments" in message)


@pytest.mark.parametrize(
    ("reply", "message"), [((1, "ERROR: Required permission is missing"), "costs money"), (NOT_THERE, "is gone")]
)
def test_following_a_group_ends_where_nothing_can_come(outside, reply, message):
    folder = outside(*NEW, ("get-guest", [NOT_THERE]), ("list-errors", [reply]))
    done = launch("gce", *GCE, "--", *JOB, path=folder)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and message in last and "instance-groups managed delete bert" in last


def test_a_machine_waits_for_the_code_and_leaves_the_supervisors_code(tmp_path):
    """The startup script itself, with stand-ins for what it calls."""
    script = startup_script(*HARD).replace("/opt/bert_jax", str(tmp_path / "opt"))
    stubs = {
        "gcloud": 'echo x >>$LOG.tries; [ "$(wc -l <$LOG.tries)" -gt 2 ] && tar cz -C $LOG.code . || exit 1',
        "curl": 'printf "%s " "$@" >$LOG.curl',
        "sleep": ":",
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    launched = tmp_path / "log.code" / "launch"
    launched.mkdir(parents=True)
    for name in ("supervise.py", "outside.py"):
        shutil.copy(ROOT / "launch" / name, launched)
    (launched / "on_host.sh").write_text('printf "%s\\0" "$@" >$LOG.heard; exit 3\n')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "log.tries").read_text().count("x") == 3
    assert "--data 3 " in (tmp_path / "log.curl").read_text()
    assert (tmp_path / "log.heard").read_text().split("\0")[:-1] == HARD


GKE = CASES["gke"]


def digest_of(*words) -> str:
    text = launch("gke", *GKE, "--dry-run", "--", *words).stdout.split("<<'END'\n", 1)[1].split("\nEND\n", 1)[0]
    return json.loads(text)["metadata"]["annotations"]["bert-jax-launch-digest"]


def applied(folder) -> list[dict]:
    """What kubectl apply was given."""
    calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return [json.loads(call["stdin"]) for call in calls if "apply" in call["words"]]


def test_a_jobset_is_made_and_followed_through_hiccups(outside):
    down = (1, "Unable to connect to the server: dial tcp: lookup k8s")
    states = [(1, 'Error from server (NotFound): "bert" not found'), (0, jobset()), down, down, (0, jobset("Failed"))]
    folder = outside(("get jobset", states))
    done = launch("gke", *GKE, "--", *JOB, path=folder)
    assert done.returncode == 1 and [text["kind"] for text in applied(folder)] == ["JobSet"], done.stderr
    assert done.stderr.count("trying on") == 1 and "kubectl delete jobset/bert --namespace=default" in done.stderr


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((1, "error: You must be logged in to the server (Unauthorized)"), "kubectl delete jobset/bert"),
        ((1, 'Error from server (NotFound): "bert" not found'), "is gone"),
    ],
)
def test_following_a_jobset_ends_where_nothing_can_come(outside, reply, message):
    done = launch("gke", *GKE, "--", *JOB, path=outside(("get jobset", [(1, "NotFound"), (0, jobset()), reply])))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"state": "Completed", "same": True}, "Completed; take another --name, or delete it: kubectl delete"),
        ({"same": False}, "running with other arguments"),
        ({"label": "somebody", "same": True}, "not made by this script"),
    ],
)
def test_a_jobset_that_is_there_is_refused(outside, found, message):
    digest = digest_of(*JOB) if found.pop("same") else "another"
    folder = outside(("get jobset", [(0, jobset(digest=digest, **found))]))
    done = launch("gke", *GKE, "--", *JOB, path=folder)
    assert done.returncode == 2 and message in done.stderr and applied(folder) == []
    assert len(done.stderr.splitlines()) == 1 and ("delete" in done.stderr) == ("label" not in found)


def test_the_same_jobset_is_followed(outside):
    digest = digest_of(*JOB)
    folder = outside(("get jobset", [(0, jobset(digest=digest)), (0, jobset("Completed", digest=digest))]))
    done = launch("gke", *GKE, "--", *JOB, path=folder)
    assert done.returncode == 0 and applied(folder) == [] and "following it" in done.stderr


def test_variables_become_a_secret_byte_for_byte(outside):
    value = "two\nlines 'é'"
    folder = outside(
        ("get jobset", [(1, "NotFound"), (0, jobset("Completed"))]), ("get secret", [(0, "bert-env/bert")])
    )
    done = launch("gke", *GKE, "--env", "TOKEN", "--", *JOB, path=folder, TOKEN=value)
    made = applied(folder)[0]
    assert done.returncode == 0 and made["kind"] == "Secret" and made["metadata"]["name"] == "bert-env"
    assert base64.b64decode(made["data"]["TOKEN"]).decode() == value
    assert "kubectl delete jobset/bert secret/bert-env" in done.stderr.splitlines()[-1]


def test_a_secret_that_cannot_be_made_is_not_shown(outside):
    rules = [("get jobset", [(1, "NotFound")]), ("apply", [(1, "cannot parse: s3cret")])]
    done = launch("gke", *GKE, "--env", "TOKEN", "--", *JOB, path=outside(*rules), TOKEN="s3cret")
    assert done.returncode == 2 and "could not be made" in done.stderr and "s3cret" not in done.stdout + done.stderr
    folder = outside(*rules, ("get secret", [(0, "bert-env/")]))
    done = launch("gke", *GKE, "--env", "TOKEN", "--", *JOB, path=folder, TOKEN="s3cret")
    assert done.returncode == 2 and "somebody else" in done.stderr and applied(folder) == []


def test_what_another_made_is_left_alone(outside):
    folder = outside(("describe", [(0, "SUSPENDED\tsomebody")]))
    done = launch("tpu_vm", *TPU, "--delete", "--", *JOB, path=folder)
    assert done.returncode == 2 and "not made by this script" in done.stderr and kinds(folder) == []


def test_arguments_arrive_byte_for_byte(outside, tmp_path):
    """What ssh's far shell would run is run here, with a Python that prints its arguments."""
    folder = outside(("describe", [(0, "ACTIVE\tbert")]), ("on_host.sh", [(0, f"{MARK}0")]))
    launch("tpu_vm", *TPU, "--", *HARD, path=folder)
    (command,) = [word for words in calls_of(folder) for word in words if word.startswith("--command=bash")]
    far = tmp_path / "bert_jax" / "launch"
    far.mkdir(parents=True)
    (far / "on_host.sh").write_text('printf "%s\\0" "$@"\n')
    heard = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=")], cwd=tmp_path, capture_output=True, text=True
    )
    assert heard.stdout.split("\0")[:-1] == HARD


def test_on_a_host_arguments_and_exit_code_come_through(tmp_path):
    """The real on_host.sh, with stand-ins for the environment and for Python."""
    host = tmp_path / "bert_jax"
    (host / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "on_host.sh", host / "launch")
    (host / "launch" / "environment.sh").write_text("VENV=venv\ninstall_extras() { :; }\n")
    (host / "job.env").write_text("export TOKEN='a b'\n")
    python = host / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$TOKEN" "$@" >heard\nexit 143\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/on_host.sh", *HARD],
        cwd=host,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": "x"},
    )
    assert done.returncode == 143 and done.stdout.strip() == f"{MARK}143"
    assert (host / "heard").read_text().split("\0")[:-1] == ["a b", "-m", "bert_jax.train", *HARD]


def test_on_a_host_what_a_lost_connection_left_is_ended_first(tmp_path):
    host = tmp_path / "bert_jax"
    (host / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "on_host.sh", host / "launch")
    (host / "launch" / "environment.sh").write_text("VENV=venv\ninstall_extras() { :; }\n")
    python = host / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\ntrap "exit 143" TERM\necho run >>runs\nif [ "$3" = wait ]; then while :; do sleep 0.1; done; fi\n'
    )
    python.chmod(0o755)
    settings = {"cwd": host, "env": {**os.environ, "PYTHON": "x"}}
    first = subprocess.Popen(["bash", "launch/on_host.sh", "wait"], stdout=subprocess.PIPE, **settings)
    while not (host / "job.pid").exists() or not (host / "runs").exists():
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)  # as a lost connection may leave it
    done = subprocess.run(["bash", "launch/on_host.sh", "go"], capture_output=True, text=True, timeout=60, **settings)
    first.stdout.close()
    first.wait()
    assert done.returncode == 0 and "an earlier connection left running" in done.stderr
    assert (host / "runs").read_text() == "run\nrun\n"


def test_slurm_hands_in_a_script_that_runs(outside, tmp_path):
    """The batch script itself, with stand-ins for srun and scontrol: arguments, and what follows from exit codes."""
    folder = outside(("sbatch", [(0, "77")]))
    done = launch("slurm", *CASES["slurm"], "--restarts", "1", "--", *HARD, path=folder)
    assert done.returncode == 0 and "scancel 77" in done.stderr
    (call,) = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    (folder / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >heard\nexit "$CODE"\n')
    (folder / "scontrol").write_text('#!/bin/bash\necho "$@" >>requeued\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    for code, restarts, again in ((0, 0, False), (143, 0, True), (143, 1, False), (2, 0, False)):
        settings = {"CODE": str(code), "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_ID": "77"}
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **settings}
        (tmp_path / "requeued").unlink(missing_ok=True)
        found = subprocess.run(
            ["bash"], input=call["stdin"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == code and (tmp_path / "requeued").exists() == again, found
    assert (tmp_path / "heard").read_text().split("\0")[-len(HARD) - 1 : -1] == HARD


def test_the_jobset_is_one():
    """Its shape by the rules of Kubernetes and JobSet that matter here."""
    done = launch("gke", *CASES["gke"], "--env", "HOME", "--dry-run", "--", *HARD, HOME="/x")
    text = done.stdout.split("<<'END'\n")[2].split("\nEND\n", 1)[0]
    found = json.loads(text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 2
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy wants it
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2, 3, 4, 6, 130]  # ascending and without 0, as the API wants
    (container,) = pod["containers"]
    # Kubernetes turns $$ into $, and $(NAME) into a value.
    assert [word.replace("$$", "$") for word in container["args"]] == HARD
    assert all("$(" not in word.replace("$$", "") for word in container["args"])
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["envFrom"][0]["secretRef"]["name"] == "bert-env"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_vm", [*TPU], "after --"),
        ("tpu_vm", [*TPU[:-1], "v9-8", "--", "x"], "--image"),
        ("tpu_vm", ["--name", "Bert_1", *TPU[2:], "--", "x"], "small letters"),
        ("tpu_vm", [*TPU, "--env", "NOT_SET_HERE", "--", "x"], "not set here"),
        ("gke", [*CASES["gke"][:-2], "2by4", "--", "x"], "2x4"),
        ("gce", [*CASES["gce"], "--size", "0", "--", "x"], "one machine or more"),
        ("gce", [*CASES["gce"], "--", "--config=/tmp/mine.py"], "only configs/"),
        ("tpu_vm", [*TPU, "--", "--config", "mine.py"], "only configs/"),
        ("tpu_vm", [*TPU, "--", "--config", "configs/../setup.cfg"], "only configs/"),
        ("tpu_vm", [*TPU, "--", "--config", str(ROOT / "configs/tiny.py")], "only configs/"),
        ("gke", [*GOLDENS["gke_xpk"], "--env", "HOME", "--", "x"], "not with --xpk"),
    ],
)
def test_wrong_use_is_told(script, words, message):
    done = launch(script, *words)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_a_tool_that_is_not_there_is_named():
    done = launch("tpu_vm", *TPU, "--", *JOB)
    assert done.returncode == 2 and done.stderr.strip().startswith("launch: gcloud: no such command here")


def test_the_supervisor_waits_longer_each_time(tmp_path):
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import outside
    finally:
        sys.path.remove(str(ROOT / "launch"))
    waited, codes = [], iter([143, 137, 134, 255, 143, 143, 143, 143, 143, 0])
    assert outside.supervise(lambda: next(codes), tries=20, pause=waited.append) == 0
    assert len(waited) == 9 and max(waited) <= 1.1 * outside.LONGEST_PAUSE
    assert all(later > earlier for earlier, later in zip(waited, waited[1:6], strict=False))


@pytest.mark.parametrize(
    ("command", "code"), [("kill -ABRT $$", 134), ("kill -INT $$", 130), ("kill -HUP $$", 129), ("exit 5", 5)]
)
def test_a_death_by_a_signal_is_told_as_a_shell_would(command, code):
    words = [sys.executable, "launch/supervise.py", "--restarts", "0", "--", "bash", "-c", f"ulimit -c 0; {command}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and ("given up" in done.stderr) == (code != 130)


def test_ctrl_c_reaches_the_processes_of_this_machine(tmp_path):
    """They are in the background of a script, so the terminal's signal does not end them."""
    stub = 'trap "echo TERM >>ended; exit 143" TERM; echo >>began; while :; do sleep 0.1; done'
    words = ["bash", ROOT / "launch" / "local.sh", "2", "1", "bash", "-c", stub]
    # A test that runs in the background would hand on that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        script = subprocess.Popen(words, cwd=tmp_path, start_new_session=True, env={**os.environ, "PORT": "1"})
    finally:
        signal.signal(signal.SIGINT, before)
    while not (tmp_path / "began").exists() or len((tmp_path / "began").read_text()) < 2:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    try:
        assert script.wait(timeout=30) == 143 and (tmp_path / "ended").read_text() == "TERM\n" * 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts, and a Python of which `fails` says what it cannot do."""
    (tmp_path / "launch").mkdir()
    for name in ("environment.sh", "on_host.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_text("")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
echo "$*" >>"{tmp_path}/calls"
case "$*" in *"$(cat "{tmp_path}/fails")"*) exit 1 ;; esac
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/pip"; chmod +x "$3/bin/pip" ;;
    "- "*) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)

    def run(script, *, fails="nothing at all", **more):
        (tmp_path / "fails").write_text(fails)
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "PYTHON": str(python), "VENV": str(tmp_path / "venv"), **more}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60
        )
        return done, (tmp_path / "calls").read_text()

    return run


@pytest.mark.parametrize(
    "script", ["bash launch/on_host.sh --config x", "set -euo pipefail; . launch/environment.sh; install_extras tpu"]
)
def test_what_could_not_be_installed_is_installed_the_next_time(checkout, script):
    on_host = "on_host" in script
    for part, code in (("-m venv", 5), ("-m pip install", 5 if on_host else 1)):
        done, _ = checkout(script, fails=part)
        assert done.returncode == code and done.stdout == (f"{MARK}5\n" if on_host else ""), done.stderr
    done, calls = checkout(script)
    assert done.returncode == 0 and "pip install" in calls and ("bert_jax.train" in calls) == on_host, done.stderr
    done, calls = checkout(script)
    assert done.returncode == 0 and "pip install" not in calls and "venv" not in calls


def test_a_python_that_is_too_old_is_told_with_a_mark(checkout):
    done, _ = checkout("bash launch/on_host.sh --config x", fails="version_info")
    assert done.returncode == 2 and done.stdout == f"{MARK}2\n" and "3.11 or newer" in done.stderr


def test_a_host_without_python_gets_it_after_the_lists_of_packages(checkout, tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "sudo").write_text(f'#!/bin/bash\necho "$@" >>"{tmp_path}/sudo"\n')
    shutil.copy(tmp_path / "python", stubs / "python3.11")
    (stubs / "sudo").chmod(0o755)
    path = f"{stubs}:{os.environ['PATH']}"
    done, calls = checkout("bash launch/on_host.sh --config x", fails="import ensurepip", PYTHON="", PATH=path)
    assert done.returncode == 0 and "bert_jax.train" in calls, done.stderr
    assert [line.split()[1] for line in (tmp_path / "sudo").read_text().splitlines()] == ["update", "install"]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", "--shell=bash", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
