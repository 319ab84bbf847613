"""What a configuration costs, told without the hardware: parameters, memory, work of a step; for TPUs by their own
compiler, which runs on a CPU (`--plan v5e:2x4`).
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bert_jax import hlo
from bert_jax.config import Config, ModelConfig
from bert_jax.data.packing import max_examples_of
from bert_jax.errors import ConfigError
from bert_jax.progress import say

# Peak bf16 matrix products of one chip in FLOP/s, from the makers' data sheets; by `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def parameter_counts(params: Any, config: ModelConfig) -> dict[str, int]:
    """Top-level module -> parameters, without the rows that only pad the vocabulary."""
    padding = config.padded_vocab_size - config.vocab_size
    pad_counts = {"embeddings": padding * config.hidden_size, "mlm_head": padding}
    return {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) - pad_counts.get(name, 0)
        for name, tree in params.items()
    }


def step_flops(config: ModelConfig, rows: int, seq_len: int, gather_width: int, examples: int) -> float:
    """Matrix-product FLOPs of one training step (forward and twice that backward), rows [rows, seq_len] full.

    Two for each multiply-add; attention over the whole row; heads on gathered positions only; no recomputation.
    """
    hidden, mlp, layers = config.hidden_size, config.mlp_dim, config.num_layers
    token = layers * (4 * hidden * hidden + 2 * hidden * mlp + 2 * seq_len * hidden)
    masked = hidden * hidden + hidden * config.padded_vocab_size
    pooled = hidden * hidden + 2 * hidden
    return 6.0 * rows * (seq_len * token + gather_width * masked + examples * pooled)


def peak_flops() -> float | None:
    """Peak of all devices of this run together; None where it is not known (CPUs)."""
    device = jax.devices()[0]
    peak = PEAK_FLOPS.get(device.device_kind)
    return peak * jax.device_count() if peak else None


def state_bytes(params: Any) -> int:
    """float32 parameters, their gradient and Adam's two moments."""
    return 16 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def activation_bytes(config: Config) -> int:
    """What the backward pass of one micro-batch keeps, an estimate from the shapes of a layer and of the MLM head."""
    model, data = config.model, config.data
    width = np.dtype(np.float32).itemsize if config.model.dtype == "float32" else 2
    tokens = config.train.global_batch_size // config.optimizer.accumulate * data.max_seq_len
    hidden = tokens * model.hidden_size
    layer = width * (9 * hidden + 2 * tokens * model.mlp_dim) + 2 * hidden  # + dropout masks, a byte an element
    layer += (width + 4 + 1) * tokens * data.max_seq_len * model.num_heads  # probabilities, scores, mask
    kept = {"none": model.num_layers * layer, "full": layer + model.num_layers * width * hidden}
    kept["dots"] = layer + model.num_layers * width * (6 * hidden + tokens * model.mlp_dim)
    logits = 0
    if config.task.name == "pretrain":
        logits = 2 * 4 * tokens // data.max_seq_len * data.gather_width * model.padded_vocab_size
    return kept[model.remat] + logits


def report(config: Config, params: Any, steps: int, rows: int | None) -> str:
    """The table that `--dry-run` prints. `rows`: training rows of an epoch, None when not known yet."""
    counts = parameter_counts(params, config.model)
    batch, length = config.train.global_batch_size, config.data.max_seq_len
    lines = [f"{name:<12} {count:>13,} parameters" for name, count in counts.items()]
    encoder = sum(counts.get(name, 0) for name in ("embeddings", "layers", "pooler"))
    lines.append(f"{'encoder':<12} {encoder:>13,} parameters (embeddings, layers, pooler)")
    lines.append(f"{'all':<12} {sum(counts.values()):>13,} parameters")
    lines.append(f"tokens a step: {batch * length:,} ({batch} rows of {length}, padding included)")
    epochs = f", {steps * batch / rows:.2f} epochs of {rows:,} rows" if rows else ""
    lines.append(f"steps: {steps:,}{epochs}")
    memory = state_bytes(params), activation_bytes(config)
    lines.append(
        f"memory, estimated, unsharded: {sum(memory) / 2**30:.2f} GiB "
        f"({memory[0] / 2**30:.2f} parameters, gradients and moments; {memory[1] / 2**30:.2f} activations)"
    )
    return "\n".join(lines)


# TPUs


class Chip(NamedTuple):
    """One TPU chip, by Google's pages on its system architecture."""

    flops: float
    """bfloat16, a second."""
    cycle_flops: float
    """The same in a cycle: twice the size of all its matrix units."""
    memory: float
    """Bytes that the compiler grants a program: some of the chip's are the runtime's."""
    bandwidth: float
    """Bytes a second, between memory and chip."""
    link: float
    """Bytes a second over one link to a neighbour, one way."""
    options: dict[str, str]
    """What `libtpu` must be told of it."""


CHIPS = {
    "v4": Chip(275e12, 2 * 8 * 128**2, 30.75 * 2**30, 1228e9, 50e9, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 2 * 4 * 128**2, 15.75 * 2**30, 819e9, 50e9, {}),
    "v5p": Chip(459e12, 2 * 8 * 128**2, 95.73 * 2**30, 2765e9, 100e9, {}),
    "v6e": Chip(918e12, 2 * 4 * 256**2, 31.24 * 2**30, 1640e9, 100e9, {}),
}
SCALES = (8, 16, 32, 64, 128, 256)  # chips of `weak_scaling`
KERNEL_LANES = 128  # a matrix unit is this wide: heads of 64 use half of it
FORCED = "Involuntary full rematerialization"
# Without these libtpu asks a metadata server that is not there, and lets one process alone load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "0",  # FORCED is said as a warning, on the stderr that `captured_stderr` holds back
    "TPU_STDERR_LOG_LEVEL": "0",
}


class Compiled(NamedTuple):
    """What the compiler says of one program, for one chip."""

    seconds: float
    """To compile it, and to write its text."""
    arguments: int
    """Bytes: the training state and the batch."""
    temporaries: int
    """Bytes besides."""
    peak: int
    """Most bytes held at once."""
    flops: float
    cycles: int
    """Its estimate of each operation, added up."""
    optimal_seconds: float
    """Its estimate of the whole, without what it counts as -1 s for each operation it does not know."""
    unknown_operations: int
    traffic: float
    """Bytes between memory and chip, on-chip memory included."""
    collectives: list[hlo.Collective]
    kernels: int
    """Calls of Pallas kernels."""
    forced: bool
    """Whether it had to replicate an array (FORCED)."""


def plan(config: Config, topology: str) -> dict[str, Any]:
    """Compiles the training step for a slice such as `v5e:2x4`, and tells what comes of it; touches no device.

    Raises ConfigError for a topology that is none, without `libtpu`, or where mesh and batch do not fit the slice.
    """
    from bert_jax.sharding import check_batch, make_mesh

    chip = chip_of(topology)
    if config.task.name != "pretrain":
        raise ConfigError("--plan: it is for pre-training")
    devices = topology_devices(topology, chip)
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    say(f"compiling {config.model.num_layers} layers for {len(devices)} chips; some minutes")
    try:
        whole = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return refusal_of(config, topology, chip, mesh, needed)
    micro = None
    if config.optimizer.accumulate > 1:  # its loop is counted once
        say("and one micro-batch alone")
        micro = compile_gradient(config, mesh)
    return report_of(config, topology, chip, dict(mesh.shape), whole, micro)


def chip_of(topology: str) -> Chip:
    """The chip of `v5e:2x4`. Raises ConfigError."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ConfigError(f"--plan {topology}: give a slice such as v5e:2x4, v5p:4x4x4; known are {', '.join(CHIPS)}")
    return CHIPS[kind]


def topology_devices(topology: str, chip: Chip) -> list[Any]:
    """Devices of a slice, to compile for alone. Raises ConfigError."""
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--plan: needs the TPU's compiler; pip install 'bert_jax[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("XLA_FLAGS", None)  # libtpu ends the process, without a word, at one that jaxlib alone knows
    with captured_stderr():  # it complains of the metadata that it was told not to look for
        try:
            return list(topologies.get_topology_desc(topology, platform="tpu", **chip.options).devices)
        except Exception as error:  # whatever libtpu throws
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--plan {topology}: libtpu knows no such slice ({reason})") from error


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Yields a list that has, once the block is left, all that libraries wrote on stderr meanwhile."""
    sys.stderr.flush()
    before, lines = os.dup(2), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines.append(file.read().decode(errors="replace"))


def compile_step(config: Config, mesh: Any) -> Compiled:
    """The training step as `train.py` would run it."""
    from bert_jax.optimizer import build_optimizer
    from bert_jax.tasks import pretrain
    from bert_jax.train_state import abstract_state, jit_step

    objective = pretrain.objective(config)
    optimizer = build_optimizer(config.optimizer, config.model.num_layers)
    with jax.set_mesh(mesh):
        step = jit_step(objective, optimizer, mesh, accumulate=config.optimizer.accumulate)
        state = abstract_state(objective, optimizer, mesh)
        return compile_for(step, mesh, state, _batch(config, mesh), _scalar(np.uint32, mesh), _scalar(np.float32, mesh))


def compile_gradient(config: Config, mesh: Any) -> Compiled:
    """Forward and backward pass of one micro-batch: what a loop over micro-batches repeats."""
    from bert_jax.optimizer import build_optimizer
    from bert_jax.tasks import pretrain
    from bert_jax.train_state import abstract_state, jit_gradient

    rows = config.train.global_batch_size // config.optimizer.accumulate
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=rows))
    objective = pretrain.objective(config)
    optimizer = build_optimizer(config.optimizer, config.model.num_layers)
    with jax.set_mesh(mesh):
        state = abstract_state(objective, optimizer, mesh)
        gradient = jit_gradient(objective, mesh)
        return compile_for(gradient, mesh, state.params, _batch(config, mesh), _scalar(np.uint32, mesh))


def _scalar(dtype: Any, mesh: Any) -> jax.ShapeDtypeStruct:
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _batch(config: Config, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    from jax.sharding import NamedSharding

    from bert_jax.sharding import BATCH
    from bert_jax.tasks import pretrain

    sharding = NamedSharding(mesh, BATCH)
    shapes = pretrain.batch_shapes(config)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in shapes.items()}


def compile_for(function: Any, mesh: Any, *arguments: Any) -> Compiled:
    """Lowers and compiles a jitted function for the devices of a mesh."""
    began = time.perf_counter()
    # The text is what the compiler writes: `as_text` of jaxlib cannot read programs with gathers on cores of their own
    # (v5p, v6e).
    with tempfile.TemporaryDirectory() as folder:
        with captured_stderr() as said:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            program = function.lower(*arguments).compile(compiler_options=options)
        seconds = time.perf_counter() - began
        (written,) = Path(folder).glob("*.after_codegen.txt")
        text = written.read_text()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    optimal = cost.get("optimal_seconds", 0.0)
    unknown = max(0, math.ceil(-optimal))  # a step takes less than a second
    return Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=cost.get("flops", 0.0),
        cycles=hlo.cycles(text),
        optimal_seconds=optimal + unknown,
        unknown_operations=unknown,
        traffic=cost.get("bytes accessed", 0.0),
        collectives=hlo.collectives(text, dict(mesh.shape)),
        kernels=len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        forced=FORCED in said[0],
    )


def report_of(
    config: Config, topology: str, chip: Chip, mesh: dict[str, int], whole: Compiled, micro: Compiled | None
) -> dict[str, Any]:
    """What `plan.json` holds; seconds and rates as [from, to]."""
    model, data, train = config.model, config.data, config.train
    chips, accumulate = math.prod(mesh.values()), config.optimizer.accumulate
    examples = max_examples_of(data.max_seq_len, data.pack)
    flops = step_flops(model, train.global_batch_size, data.max_seq_len, data.gather_width, examples) / chips
    optimal = whole.optimal_seconds + (accumulate - 1) * (micro.optimal_seconds if micro else 0.0)
    kernels = kernel_seconds(config, chip, chips) if whole.kernels else 0.0
    compute = sorted(value + kernels for value in (whole.cycles / (chip.flops / chip.cycle_flops), optimal))
    dimensions = sum(int(size) > 1 for size in topology.split(":")[1].split("x"))
    network = network_range(whole.collectives, chip, dimensions)
    seconds = step_range(compute, network)
    tokens = train.global_batch_size * data.max_seq_len
    steps = train.num_steps if train.num_epochs == 0 else None
    limit, found = chip.memory, whole.peak
    return {
        "topology": topology,
        "chips": chips,
        "mesh": mesh,
        "compile_seconds": round(whole.seconds + (micro.seconds if micro else 0.0), 1),
        "bytes_per_chip": {
            "arguments": whole.arguments,
            "temporaries": whole.temporaries,
            "peak": found,
            "memory": int(limit),
        },
        "fits": found <= limit,
        "would_fit": [] if found <= limit else remedies(config, mesh, whole.arguments, found, limit),
        "model_flops_per_chip": flops,
        "compiled_flops_per_chip": whole.flops,
        "collectives": [one._asdict() for one in whole.collectives],
        "forced_rematerialization": whole.forced,
        "seconds": {
            "step": seconds,
            "compute": compute,
            "memory": whole.traffic / chip.bandwidth,
            "network": network,
            "unknown_operations": whole.unknown_operations,
            "at_peak": flops / chip.flops,
        },
        "mfu": [flops / chip.flops / value for value in reversed(seconds)],
        "tokens_per_second": [tokens / value for value in reversed(seconds)],
        "weak_scaling": weak_scaling(compute[0], whole.collectives, chip, chips, dimensions),
        "steps": steps,
        "days": [steps * value / 86_400 for value in seconds] if steps else None,
        "chip_hours": [steps * value / 3600 * chips for value in seconds] if steps else None,
    }


def kernel_seconds(config: Config, chip: Chip, chips: int) -> float:
    """Attention in a Pallas kernel, of which the compiler knows nothing: its products, forward twice and backward five
    times, at what heads narrower than the matrix unit leave of its peak.
    """
    model, length = config.model, config.data.max_seq_len
    product = 2.0 * config.train.global_batch_size / chips * length * length * model.hidden_size
    used = min(1.0, model.head_dim / KERNEL_LANES)
    return model.num_layers * 7 * product / (chip.flops * used)


def step_range(compute: list[float], network: list[float]) -> list[float]:
    """Seconds of a step: the network hidden behind the computation, or after it."""
    (least, most), (fast, slow) = compute, network
    return [max(least, fast), most + slow]


def network_range(collectives: list[hlo.Collective], chip: Chip, dimensions: int) -> list[float]:
    """Seconds of the network: over all dimensions of the torus at once, or in one ring."""
    return [network_seconds(collectives, chip, links) for links in (2 * max(1, dimensions), 2)]


def weak_scaling(
    compute: float, collectives: list[hlo.Collective], chip: Chip, chips: int, dimensions: int
) -> list[dict[str, Any]]:
    """Share of the speed of one chip alone, compute / step, that is left with other numbers of chips, each with the
    same rows: compute stays, and of the collectives over `data` the rings grow, their bytes do not. Where that axis is
    1, what it will add up is what a chip has left of the gradients.
    """
    if not any("data" in one.axes.split("+") for one in collectives):
        scattered = sum(one.bytes // one.group for one in collectives if one.kind == "reduce-scatter")
        collectives = [*collectives, hlo.Collective("all-reduce", "data", 1, 1, scattered)]
    found = []
    for number in SCALES:
        grown = [
            one._replace(group=max(1, one.group * number // chips)) if "data" in one.axes.split("+") else one
            for one in collectives
        ]
        seconds = step_range([compute, compute], network_range(grown, chip, dimensions))
        found.append({"chips": number, "efficiency": [compute / value for value in reversed(seconds)]})
    return found


def network_seconds(collectives: list[hlo.Collective], chip: Chip, links: int) -> float:
    """Time of all collectives by ring algorithms over `links` links of a chip.

    Of V bytes in a ring of n, each chip sends 2 V (n - 1) / n to reduce for all, V (n - 1) / n to gather or to scatter,
    and V to permute.
    """
    factors = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
    total = 0.0
    for one in collectives:
        share = (one.group - 1) / one.group if one.group else 1.0
        total += one.bytes * (factors[one.kind] * share if one.kind in factors else 1.0)
    return total / (links * chip.link)


_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def needed_bytes(message: str) -> int | None:
    """What the compiler says that a program needs, where it refuses one for its memory; else None."""
    found = re.search(r"Ran out of memory on HBM, .*\(([\d.]+)([KMGT])\) exceeds", message)
    return round(float(found[1]) * _SIZES[found[2]]) if found else None


def refusal_of(config: Config, topology: str, chip: Chip, mesh: Any, needed: int) -> dict[str, Any]:
    """What `plan.json` holds of a program that the compiler refuses: it needs `needed` bytes of a chip."""
    from bert_jax.optimizer import build_optimizer
    from bert_jax.tasks import pretrain
    from bert_jax.train_state import abstract_state

    optimizer = build_optimizer(config.optimizer, config.model.num_layers)
    state = jax.tree.leaves(abstract_state(pretrain.objective(config), optimizer, mesh))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in state)
    shape = dict(mesh.shape)
    return {
        "topology": topology,
        "chips": math.prod(shape.values()),
        "mesh": shape,
        "bytes_per_chip": {"arguments": held, "peak": needed, "memory": int(chip.memory)},
        "fits": False,
        "would_fit": remedies(config, shape, held, needed, chip.memory),
    }


def remedies(config: Config, mesh: dict[str, int], state: int, needed: int, limit: float) -> list[str]:
    """Flags by which it would fit, as far as proportion tells: what is not state shrinks with the micro-batch."""
    found = []
    if state < limit:
        parts = 2 ** math.ceil(math.log2((needed - state) / (limit - state)))
        accumulate = config.optimizer.accumulate * parts
        if config.train.global_batch_size % (accumulate * mesh["data"] * mesh["fsdp"]) == 0:
            found.append(f"--optimizer.accumulate {accumulate}")
        if config.model.remat == "none":
            found.append("--model.remat full")
    if mesh["data"] % 2 == 0 and needed - state // 2 <= limit:
        found.append(f"--mesh.fsdp {2 * mesh['fsdp']}")
    return found or ["a slice of more chips"]


def describe(found: dict[str, Any]) -> str:
    """The report as text."""
    memory, seconds = found["bytes_per_chip"], found.get("seconds")

    def ms(*values: float) -> str:
        return " to ".join(f"{1000 * value:.1f}" for value in values) + " ms"

    where = f"{found['topology']}: {found['chips']} chips, mesh "
    where += " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    if "seconds" not in found:
        return (
            f"{where}\nIT DOES NOT FIT: the compiler refuses it, which needs {memory['peak'] / 1e9:.2f} GB of a chip's "
            f"{memory['memory'] / 1e9:.1f}; by proportion it would with {' or '.join(found['would_fit'])}"
        )
    lines = [
        f"{where}; compiled in {found['compile_seconds']:.0f} s",
        f"memory a chip: {memory['peak'] / 1e9:.2f} GB of {memory['memory'] / 1e9:.1f} at its peak "
        f"({memory['arguments'] / 1e9:.2f} state and batch, {memory['temporaries'] / 1e9:.2f} besides)",
    ]
    if not found["fits"]:
        lines.append(f"IT DOES NOT FIT; by proportion it would with {' or '.join(found['would_fit'])}")
    lines += [
        f"{one['kind']} over {one['axes']} ({one['group']} chips): {one['count']} a step, {one['bytes'] / 1e6:,.1f} MB"
        for one in found["collectives"]
    ]
    if found["forced_rematerialization"]:
        lines.append(f"warning: the compiler says {FORCED!r}: it could not follow the shardings")
    lines += [
        f"step: {ms(*seconds['step'])}, of which compute {ms(*seconds['compute'])} (at the chip's peak "
        f"{ms(seconds['at_peak'])}), network {ms(*seconds['network'])}",
        f"MFU {found['mfu'][0]:.2f} to {found['mfu'][1]:.2f}; "
        f"{found['tokens_per_second'][0]:,.0f} to {found['tokens_per_second'][1]:,.0f} tokens a second",
    ]
    shares = (
        f"{one['chips']} {one['efficiency'][0]:.3f} to {one['efficiency'][1]:.3f}" for one in found["weak_scaling"]
    )
    lines.append(f"weak scaling, of the speed without network, by chips: {'; '.join(shares)}")
    if found["steps"]:
        (days, most), (hours, most_hours) = found["days"], found["chip_hours"]
        lines.append(
            f"{found['steps']:,} steps: {days:.2f} to {most:.2f} days, {hours:,.0f} to {most_hours:,.0f} chip-hours"
        )
    return "\n".join(lines)
