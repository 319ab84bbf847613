"""Processes that make one run together: who they are, where they meet, and that all of them run the same.

Every process calls `join` before it touches a device. Afterwards `together` and `from_first` keep them in step while
they set up: what fails in one is raised in all, so that nobody waits for a process that has gone.
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from bert_jax.errors import BertJaxError, ConfigError, PeerError, code_and_words
from bert_jax.progress import say

PORT = 8476  # where process 0 listens, unless the address says otherwise
EPHEMERAL = 61440  # first of 4096 ports, of which a SLURM job takes the one that its number says
GO = b"go"  # what process 0 answers when all are there
SAY_EVERY = 10.0  # seconds between words of who is awaited
MESSAGE_BYTES = 2048  # of what a process tells the others about its error
SHUTDOWN_SECONDS = 30  # that a finished process waits for the others
GOOGLE = "0x1ae0"  # of PCI vendors
Result = TypeVar("Result")


class Meeting(NamedTuple):
    """Where the processes of a run meet, and which of them this is."""

    address: str
    """host:port of process 0."""
    count: int
    index: int
    source: str
    """What told it, for messages."""
    local_devices: tuple[int, ...] | None = None
    """The GPUs of this process, where several processes share a machine."""


def find_meeting(
    environ: Mapping[str, str], flags: tuple[str, int, int], metadata: Callable[[str], str] | None = None
) -> Meeting | None:
    """From flags (address, count, index), JAX's variables, SLURM, a TPU pod on GKE, or the metadata of a TPU VM.

    None for a process alone. `metadata` asks the metadata server for an attribute of this TPU VM. Raises ConfigError.
    """
    address, count, index = flags
    if address or count or index >= 0:
        return _checked(address, count, index, "the flags --coordinator, --num-processes, --process-id")
    if "JAX_COORDINATOR_ADDRESS" in environ:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        if missing := [name for name in names if name not in environ]:
            raise ConfigError(f"{missing[0]}: not set, though {names[0]} is; set {', '.join(names)} or none of them")
        address, *numbers = (environ[name] for name in names)
        return _checked(address, *(_number(*pair) for pair in zip(names[1:], numbers, strict=True)), ", ".join(names))
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"} <= environ.keys():
        return _slurm(environ)
    if workers := environ.get("TPU_WORKER_HOSTNAMES"):
        names = workers.split(",")
        return _of_workers(names, _number("TPU_WORKER_ID", environ.get("TPU_WORKER_ID", "")), environ, "TPU_WORKER_*")
    if metadata is not None:
        # host names, or in older images name:id:address
        names = [worker.split(":")[-1] for worker in metadata("worker-network-endpoints").split(",")]
        index = _number("agent-worker-number", metadata("agent-worker-number"))
        return _of_workers(names, index, _tpu_environment(metadata("tpu-env")), "the metadata of this TPU VM")
    return None


def _slurm(environ: Mapping[str, str]) -> Meeting | None:
    count, index, job = (_number(f"SLURM_{name}", environ[f"SLURM_{name}"]) for name in ("NTASKS", "PROCID", "JOB_ID"))
    nodes = environ["SLURM_STEP_NODELIST"]
    first = nodes.split(",", 1)[0]
    if "[" in first:  # node[007-015,020],other
        prefix, inside = nodes.split("[", 1)
        first = prefix + inside.replace("-", ",").replace("]", ",").split(",", 1)[0]
    shared = count != _number("SLURM_STEP_NUM_NODES", environ.get("SLURM_STEP_NUM_NODES", str(count)))
    devices = (_number("SLURM_LOCALID", environ.get("SLURM_LOCALID", "0")),) if shared else None
    found = _checked(f"{first}:{EPHEMERAL + job % 4096}", count, index, "SLURM")
    return None if count == 1 else found._replace(local_devices=devices)


def _of_workers(names: list[str], index: int, environ: Mapping[str, str], source: str) -> Meeting | None:
    """Processes of a TPU pod: of one slice, or of several, as MEGASCALE_* say."""
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]
    index += int(environ.get("MEGASCALE_SLICE_ID") or 0) * len(names)
    count = slices * len(names)
    return None if count == 1 else _checked(f"{first.split(':')[0]}:{PORT}", count, index, source)


def _tpu_environment(text: str) -> dict[str, str]:
    """Lines such as `MEGASCALE_NUM_SLICES: '2'`."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'") for name, value in pairs}


def _checked(address: str, count: int, index: int, source: str) -> Meeting:
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or count < 1 or not 0 <= index < count:
        raise ConfigError(
            f"{source}: {address!r}, {count}, {index} are no address host:port of process 0, number of processes, "
            "and number of this one from 0; give all three"
        )
    return Meeting(f"{host}:{port}", count, index, source)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is no whole number")
    return int(text)


def tpu_metadata() -> Callable[[str], str] | None:
    """Asks the metadata server for attributes, on a machine that has a TPU; elsewhere None."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") or not has_tpu():
        return None
    return metadata_of(os.environ.get("GCE_METADATA_IP", "metadata.google.internal"))


def has_tpu(root: str = "/") -> bool:
    """Whether there is a TPU: others' accelerators have the same names in `/dev`, Google's network cards its vendor."""
    vendors = (path.read_text().strip() for path in Path(root).glob("sys/bus/pci/devices/*/vendor"))
    there = any(Path(root).glob("dev/accel*")) or Path(root, "dev/vfio/0").exists()
    return there and GOOGLE in vendors


def metadata_of(host: str) -> Callable[[str], str]:
    """attribute -> its text, "" where the machine has none of that name. Raises PeerError without an answer."""

    def ask(attribute: str) -> str:
        import urllib.error
        import urllib.request

        url = f"http://{host}/computeMetadata/v1/instance/attributes/{attribute}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError:
            return ""
        except OSError as error:
            raise PeerError(f"{url}: no answer ({error}); name the processes with --coordinator and others") from error

    return ask


def join(meeting: Meeting | None, *, timeout: int) -> None:
    """Meets the other processes, or opens a meeting of one. To be called before any device is touched.

    Raises ConfigError where the port is taken, PeerError where the others do not come in `timeout` seconds.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    alone = meeting is None
    if alone:
        meeting = Meeting(f"127.0.0.1:{free_port()}", 1, 0, "")
    elif meeting.index == 0:
        await_peers(meeting, timeout)
    else:
        announce(meeting, timeout)
    try:
        jax.distributed.initialize(
            meeting.address,
            meeting.count,
            meeting.index,
            local_device_ids=meeting.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        if alone:  # a program that has used JAX before; nothing is lost but the notice of preemption
            return
        raise PeerError(
            f"of {meeting.count} processes not all came to {meeting.address} within {timeout} s; look at what the "
            f"others say ({' '.join(str(error).split())[:300]})"
        ) from error
    if jax.process_count() != meeting.count:
        raise ConfigError(
            f"{meeting.source} tell of {meeting.count} processes, the devices of {jax.process_count()}; start one "
            "process on each host of the slice"
        )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_peers(meeting: Meeting, timeout: int) -> None:
    """Waits, as process 0, until all others have called, then lets them go on: JAX ends a process, with a stack trace,
    where one of them is missing. Raises ConfigError where the port is taken, PeerError after `timeout` seconds.
    """
    port = int(meeting.address.rsplit(":", 1)[1])
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of this host cannot be had ({error.strerror}): another run? End it, or take another port "
            "with --coordinator HOST:PORT"
        ) from error
    say(f"process 0 of {meeting.count} (by {meeting.source}): waiting for the others at {meeting.address}")
    came: dict[int, socket.socket] = {}
    began = told = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server).settimeout(0.5)
        while missing := ", ".join(str(index) for index in range(1, meeting.count) if index not in came):
            now = time.monotonic()
            if now - began > timeout:
                raise PeerError(
                    f"process {missing} of {meeting.count} did not come to {meeting.address} within {timeout} s; look "
                    "at what it says"
                )
            if now - told > SAY_EVERY:
                say(f"still waiting for process {missing}")
                told = now
            with contextlib.suppress(OSError, ValueError):
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(5)
                came[int(peer.recv(16))] = peer
        for peer in came.values():
            peer.sendall(GO)


def announce(meeting: Meeting, timeout: int) -> None:
    """Tells process 0 that this one is here, and waits until all are. Raises PeerError after `timeout` seconds."""
    with reach(meeting, timeout) as peer, contextlib.suppress(OSError):
        peer.settimeout(timeout + 5)
        peer.sendall(str(meeting.index).encode())
        if peer.recv(len(GO)) == GO:
            return
    raise PeerError(f"process 0 at {meeting.address} gave up, or is none of bert_jax; look at what it says")


def reach(meeting: Meeting, timeout: int) -> socket.socket:
    """A connection to process 0, once it listens. Raises PeerError after `timeout` seconds."""
    host, port = meeting.address.rsplit(":", 1)
    began = told = time.monotonic()
    say(f"process {meeting.index} of {meeting.count} (by {meeting.source}): looking for process 0 at {meeting.address}")
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5)
        except OSError as error:
            now = time.monotonic()
            if now - began > timeout:
                raise PeerError(
                    f"process 0 does not answer at {meeting.address} ({error.strerror or error}) after {timeout} s; "
                    "see whether it runs, and whether its port may be reached from here"
                ) from error
            if now - told > SAY_EVERY:
                say(f"still no process 0 at {meeting.address} ({error.strerror or error})")
                told = now
            time.sleep(0.2)


# In step


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    import jax

    return jax.process_index() == 0


def from_first(function: Callable[[], Result]) -> Result:
    """What `function` gives in process 0 (JSON's types), in every process; what it raises there is raised in all."""
    import jax

    if jax.process_count() == 1:
        return function()
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps({"value": together(lambda: function() if is_first() else None)}).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    buffer = np.frombuffer(text[:length].ljust(length), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())["value"]


def together(function: Callable[[], Result]) -> Result:
    """`function` in every process. What it raises in some is raised in all: elsewhere as an error of the same exit
    code, with the number of the process.
    """
    import jax

    if jax.process_count() == 1:
        return function()
    import numpy as np
    from jax.experimental import multihost_utils

    result, fault = None, None
    try:
        result = function()
    except Exception as error:  # whatever it is, nobody may wait for this process
        fault = error
    code, words = code_and_words(fault) if fault else (0, "")
    said = np.frombuffer(words.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)
    codes, told = multihost_utils.process_allgather((np.array(code), said))
    if fault is not None:
        raise fault
    for index, (code, said) in enumerate(zip(codes.tolist(), told, strict=True)):
        if code:
            kinds = (kind for kind in BertJaxError.__subclasses__() if kind.exit_code == code)
            kind = next(kinds, BertJaxError)
            raise kind(f"process {index}: {said.tobytes().decode(errors='replace').strip()}")
    return result


def check_same(facts: dict[str, str]) -> None:
    """Raises ConfigError in every process where one of the `facts` (what -> digest) is not alike in all of them."""
    import jax

    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(value.encode()).digest() for value in facts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(facts), -1)
    found = multihost_utils.process_allgather(mine)  # [processes, facts, 32]
    for place, name in enumerate(facts):
        if other := [index for index, one in enumerate(found) if not np.array_equal(one[place], found[0][place])]:
            numbers = ", ".join(map(str, other))
            raise ConfigError(f"process {numbers} has other {name} than process 0; make all hosts alike")


@functools.cache
def code_digest() -> str:
    """Of this package's source and the versions of what it computes with."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(" ".join(version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")).encode())
    return digest.hexdigest()


def asked_to_stop(step: int) -> bool:
    """Whether all processes stop after `step`, since one of them got SIGTERM; each is to ask at each step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
