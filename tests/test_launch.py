"""Launch scripts against stand-ins for gcloud, kubectl and sbatch that replay states and keep what they were told."""

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


@pytest.mark.parametrize("script", CASES)
def test_a_dry_run_prints_exactly_what_would_be_run(script):
    """Without credentials or the tools; the golden files are what was reviewed by eye."""
    done = launch(script, *CASES[script], "--dry-run", "--", *JOB, *HARD)
    assert done.returncode == 0, done.stderr
    golden = GOLDEN / f"{script}.txt"
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
        ("get jobset", [(0, "Completed")]), ("describe", [(0, "ACTIVE\tbert")]), ("on_host", [(0, MARK + "0")])
    )
    for how in (["--dry-run"], []):
        done = launch(script, *CASES[script], *how, "--env", "TOKEN", "--", *JOB, path=folder, TOKEN="s3cret")
        assert done.returncode == 0, done.stderr
        assert "s3cret" not in done.stdout + done.stderr + (folder / "calls.jsonl").read_text()


MARK = "bert_jax exit code "


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
    text = done.stdout.split("<<'END'\n", 1)[1].split("\nEND\n", 1)[0]
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


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", "--shell=bash", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
