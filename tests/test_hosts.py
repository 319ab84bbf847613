"""Many processes: where they meet by each scheduler's word, the same run on every topology, and what can go wrong."""

import http.server
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from bert_jax import checkpoint, hosts
from bert_jax.errors import BertJaxError, ConfigError, PeerError, code_and_words
from bert_jax.hosts import Meeting, find_meeting
from tests.conftest import QUICKLY

ROOT = Path(__file__).parent.parent
FINAL = runpy.run_path(str(ROOT / "launch" / "outside.py"))["FINAL"]  # exit codes after which nothing starts again
NO_FLAGS = ("", 0, -1)
STEPS = 6


def slurm(nodes, count=2, index=1, **more):
    known = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": nodes, "SLURM_NTASKS": count, "SLURM_PROCID": index}
    return {name: str(value) for name, value in (known | more).items()}


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, NO_FLAGS, None),
        ({}, ("a:1", 2, 1), ("a:1", 2, 1)),
        ({}, ("a", 2, 0), ("a:8476", 2, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:7", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            NO_FLAGS,
            ("b:7", 3, 2),
        ),
        (slurm("node001"), NO_FLAGS, ("node001:62344", 2, 1)),
        (slurm("node001,host2"), NO_FLAGS, ("node001:62344", 2, 1)),
        (slurm("node[001-015],host2"), NO_FLAGS, ("node001:62344", 2, 1)),
        (slurm("gpu-[007,009-015]"), NO_FLAGS, ("gpu-007:62344", 2, 1)),
        (slurm("node001", count=1, index=0), NO_FLAGS, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2"}, NO_FLAGS, ("t0:8476", 3, 2)),
        ({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}, NO_FLAGS, None),
        (
            {"TPU_WORKER_HOSTNAMES": "t2,t3", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
            | {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "t0:8080"},
            NO_FLAGS,
            ("t0:8476", 4, 3),
        ),
    ],
)
def test_where_processes_meet(environ, flags, expected):
    found = find_meeting(environ, flags)
    assert (found and found[:3]) == expected


def test_tasks_that_share_a_node_take_a_gpu_each():
    apart = find_meeting(slurm("n[1-2]", SLURM_STEP_NUM_NODES=2), NO_FLAGS)
    shared = find_meeting(slurm("n[1-2]", 4, 3, SLURM_STEP_NUM_NODES=2, SLURM_LOCALID=1), NO_FLAGS)
    assert apart.local_devices is None and shared.local_devices == (1,)


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, ("a:1", 2, 2)),
        ({}, ("a:1", 0, -1)),
        ({}, ("", 2, 0)),
        ({}, ("a:port", 2, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, NO_FLAGS),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, NO_FLAGS),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, NO_FLAGS),
    ],
)
def test_half_a_meeting_is_refused(environ, flags):
    with pytest.raises(ConfigError):
        find_meeting(environ, flags)


@pytest.mark.parametrize("endpoints", ["10.0.0.1,10.0.0.2", "a:0:10.0.0.1,b:1:10.0.0.2"])
def test_the_metadata_of_a_tpu_vm(endpoints):
    attributes = {"worker-network-endpoints": endpoints, "agent-worker-number": "1", "tpu-env": "ZONE: 'x'\n"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            found = attributes.get(self.path.rsplit("/", 1)[1])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        metadata = hosts.metadata_of(f"127.0.0.1:{server.server_port}")
        assert metadata("no-such") == ""
        assert find_meeting({}, NO_FLAGS, metadata)[:3] == ("10.0.0.1:8476", 2, 1)
        server.shutdown()
    with pytest.raises(PeerError, match="no answer"):
        find_meeting({}, NO_FLAGS, metadata)


def test_a_port_that_is_taken_and_a_process_0_that_is_not_there():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            hosts.await_peers(Meeting(f"localhost:{port}", 2, 0, "x"), timeout=1)
        hosts.reach(Meeting(f"localhost:{port}", 2, 1, "x"), timeout=1).close()
    began = time.monotonic()
    with pytest.raises(PeerError, match="process 1, 2 of 3 did not come"):
        hosts.await_peers(Meeting(f"localhost:{port}", 3, 0, "x"), timeout=1)
    with pytest.raises(PeerError, match=f"process 0 does not answer at localhost:{port}"):
        hosts.reach(Meeting(f"localhost:{port}", 2, 1, "x"), timeout=1)
    assert time.monotonic() - began < 10


# Real processes


def words_of(config, workdir, *more):
    """The command of a run of STEPS steps with dropout."""
    flags = [
        f"--model.{name}={getattr(config.model, name)}"
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "max_position_embeddings")
    ]
    flags += [f"--data.path={config.data.path}", f"--data.max_seq_len={config.data.max_seq_len}"]
    flags += [f"--train.num_steps={STEPS}", "--train.global_batch_size=8", "--train.log_every=1"]
    flags += ["--train.save_every=3", "--train.eval_batches=1", "--optimizer.warmup_steps=2"]
    tiny = str(ROOT / "configs" / "tiny.py")
    return [sys.executable, "-m", "bert_jax.train", "--config", tiny, "--workdir", str(workdir), *flags, *more]


def environment(devices=1, **more):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICKLY}"
    return {**os.environ, "XLA_FLAGS": flags, **{name: str(value) for name, value in more.items()}}


def start(words, index, count, port, devices=1, **more):
    meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    settings = environment(devices, **meeting, **more)
    return subprocess.Popen(words, env=settings, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(config, workdir, processes, devices, *more):
    """By `launch/local.sh`, as a user would."""
    words = ["bash", str(ROOT / "launch" / "local.sh"), str(processes), str(devices), *words_of(config, workdir, *more)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def parameters_of(workdir):
    return jax.tree.leaves(checkpoint.load_params(str(workdir / "checkpoints" / str(STEPS)))[0])


@pytest.mark.slow
def test_one_run_on_every_topology_and_from_one_to_another(small_config, tmp_path):
    two = tmp_path / "2x1"
    run(small_config, two, 2, 1)
    assert len(losses_of(two)) == STEPS
    assert "pretrain:" in (two / "hosts" / "1.log").read_text()
    for processes, devices, before in ((1, 4, None), (2, 2, two)):
        workdir = tmp_path / f"{processes}x{devices}"
        if before:  # a checkpoint of another topology
            shutil.copytree(before, workdir)
            shutil.rmtree(workdir / "checkpoints" / str(STEPS))
        done = run(small_config, workdir, processes, devices)
        assert ("resumed at step 3" in done.stderr) == bool(before)
        np.testing.assert_allclose(losses_of(workdir), losses_of(two), rtol=1e-5)
        for one, other in zip(parameters_of(workdir), parameters_of(two), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-6)
    one = tmp_path / "1x4"  # and back
    shutil.rmtree(one / "checkpoints" / str(STEPS))
    wanted = losses_of(two)
    assert "resumed at step 3" in run(small_config, one, 2, 1, "--mesh.fsdp=2").stderr
    np.testing.assert_allclose(losses_of(one), wanted, rtol=1e-5)
    # Its weights, but for new top layers, which each process has a part of.
    again = run(small_config, tmp_path / "new", 2, 1, f"--train.init_from={two}", "--train.reinit_layers=1")
    assert "the top 1 layers and the pooler are newly made" in again.stderr


def finish(processes, timeout=120):
    return [(*process.communicate(timeout=timeout), process.returncode) for process in processes]


def pair_at_work(config, workdir):
    """Two processes in the middle of a long run."""
    words, port = words_of(config, workdir, "--train.num_steps=5000"), hosts.free_port()
    processes = [start(words, index, 2, port) for index in range(2)]
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return processes


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(small_config, tmp_path):
    processes = pair_at_work(small_config, tmp_path / "w")
    processes[1].send_signal(signal.SIGTERM)
    for _, said, code in finish(processes):
        assert code == 143, said
    saved = checkpoint.steps(str(tmp_path / "w" / "checkpoints"))[0]
    assert checkpoint.verify(str(tmp_path / "w" / "checkpoints" / str(saved))).step == saved
    log = (tmp_path / "w" / "hosts" / "1.log").read_text()
    assert f"saved step {saved:,} in" in log


@pytest.mark.slow
def test_where_one_process_is_killed_the_other_ends_so_that_it_is_started_again(small_config, tmp_path):
    processes = pair_at_work(small_config, tmp_path / "w")
    processes[1].kill()
    (_, said, code), _ = finish(processes, timeout=240)
    assert code not in FINAL, said


def test_a_tpu_is_told_from_other_accelerators(tmp_path):
    vendor = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:05.0" / "vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x1ae0\n")
    assert not hosts.has_tpu(str(tmp_path))  # Google's network card
    (tmp_path / "dev" / "accel").mkdir(parents=True)
    assert hosts.has_tpu(str(tmp_path))
    vendor.write_text("0x8086\n")
    assert not hosts.has_tpu(str(tmp_path))  # a laptop's NPU


@pytest.mark.parametrize("fault", [BertJaxError("a worker died"), OSError(28, "No space left", "w"), KeyError("k")])
def test_whatever_fails_in_one_process_is_told_to_all(monkeypatch, fault):
    """Another process than the failing one raises an error of the same code; nobody waits."""
    said = []

    def fail():
        raise fault

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda pair: said.append(pair) or pair)
    with pytest.raises(type(fault)):  # a bug keeps its traceback
        hosts.together(fail)
    codes, words = (np.stack([np.zeros_like(part), part]) for part in said[0])
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda pair: (codes, words))
    with pytest.raises(BertJaxError, match="process 1: ") as theirs:
        hosts.together(lambda: None)
    code, message = code_and_words(fault)
    assert theirs.value.exit_code == code == (5 if isinstance(fault, OSError) else 1)
    assert message in str(theirs.value)


def test_peers_that_do_not_come(small_config, tmp_path):
    words = words_of(small_config, tmp_path / "w", "--host-timeout=4")
    port, other = hosts.free_port(), hosts.free_port()
    processes = [start(words, 0, 2, port), start(words, 1, 2, other)]
    for _, said, code in finish(processes):
        lines = [line for line in said.splitlines() if line.startswith("bert_jax: error:")]
        assert code == 5 and len(lines) == 1, said
        assert "Traceback" not in said


def test_hosts_that_differ_say_in_what(small_config, tmp_path, corpus, tokenizer):
    """Code, configuration, or data: every process ends, at once, with one line and code 2."""
    from bert_jax.config import DataConfig
    from bert_jax.data.prepare import prepare

    other_code, other_rows = tmp_path / "code", tmp_path / "rows"
    shutil.copytree(ROOT / "bert_jax", other_code / "bert_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other_code / "bert_jax" / "plan.py", "a") as file:
        file.write("# changed\n")
    data = DataConfig(max_seq_len=64, documents="blank-line", workers=1, eval_fraction=0.05, seed=9)
    prepare([str(corpus)], other_rows, tokenizer=tokenizer, data=data, report=False)

    def differing(what, index):
        words, more = words_of(small_config, tmp_path / what), {}
        if what == "configuration" and index:
            words.append("--optimizer.learning-rate=0.5")
        if what == "code":
            more["PYTHONPATH"] = str(other_code if index else ROOT)
        if what == "data":
            place = tmp_path / f"host{index}"
            place.mkdir(exist_ok=True)
            link = place / "rows"
            link.symlink_to(other_rows if index else small_config.data.path)
            words = [f"--data.path={link.name}" if word.startswith("--data.path") else word for word in words]
            return words, more, place
        return words, more, tmp_path if what == "code" else ROOT

    for what in ("code", "configuration", "data"):
        port, processes = hosts.free_port(), []
        for index in range(2):
            words, more, place = differing(what, index)
            meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": index}
            settings = {"PYTHONPATH": str(ROOT), **meeting, **more}
            pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(words, env=environment(**settings), cwd=place, **pipes))
        for _, said, code in finish(processes):
            assert code == 2 and f"process 1 has other {what} than process 0" in said, said
            assert "Traceback" not in said
        assert not (tmp_path / what / "checkpoints" / "3").exists()
