"""Where arrays live: the device mesh, one table from parameter path to PartitionSpec, and batch assembly."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bert_jax.config import MOST_SHARES, Config, MeshConfig
from bert_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the batch is split over every axis that does not split heads
BATCH = P(ROWS)

# First match wins. Stacked layers carry a leading layer axis, which is never split. The hidden axis of the token
# table is never split either: a lookup would then gather from every device. Shares over fsdp are put together once a
# step; where that is an axis besides a TPU's lanes, they are not copied for it.
PARTITION_RULES = (
    (r"embeddings/token_embedding$", P(("fsdp", "tensor"), None)),
    (r"attention/(query|key|value)/kernel$", P(None, None, "tensor", "fsdp")),
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),
    (r"attention/out/kernel$", P(None, "tensor", "fsdp", None)),
    (r"mlp/wi/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/wi/bias$", P(None, "tensor")),
    (r"mlp/wo/kernel$", P(None, ("fsdp", "tensor"), None)),
    (r"(pooler/dense|mlm_head/transform)/kernel$", P(None, "tensor")),  # small
    (r"mlm_head/bias$", P(("fsdp", "tensor"))),
    (r"", P()),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor over `devices` (default: all); between slices of TPUs, which a slower network
    joins, there is `data` alone. Raises ConfigError when sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    rest = len(devices) // max(1, config.tensor) // max(slices, config.data)
    sizes = [config.data, config.fsdp or math.gcd(rest, MOST_SHARES), config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not cover {len(devices)} devices; "
            f"use --mesh.data -1 with --mesh.fsdp and --mesh.tensor dividing {len(devices)}"
        )
    # `jax.make_mesh` refuses 8 shares of a torus of 4 x 4 x 4, whose axes must then be split.
    if slices == 1:
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise ConfigError(
            f"mesh.data: {slices} slices do not divide {sizes[0]}; take smaller --mesh.fsdp or --mesh.tensor"
        )
    else:
        of_slice = [sizes[0] // slices, *sizes[1:]]
        placed = create_hybrid_device_mesh(of_slice, [slices, 1, 1], devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/attention/query/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, ndim: int) -> P:
    """The PartitionSpec of the parameter (or optimizer moment) that ends in `path`."""
    spec = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, path))
    if re.match(r"layers_\d+/", path):  # taken out of the stack
        spec = P(*spec[1:])
    return spec if len(spec) <= ndim else P()  # optimizer scalars under a parameter's path


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of each leaf. Optax keeps parameter paths, so one table serves the whole training state.

    Raises ConfigError where a mesh axis does not divide the axis of an array that it splits.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = partition_spec(name, leaf.ndim)
        for size, axes in zip(leaf.shape, spec, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % parts:
                raise ConfigError(
                    f"mesh: {axes} splits {name} {list(leaf.shape)} in {parts}, which does not divide {size}; "
                    "take fewer, with --mesh.fsdp and --mesh.tensor"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def specs_over(axis: str, params: Any) -> Any:
    """PartitionSpec of each parameter over one axis of the mesh alone."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        return P(*(axis if axis in (axes or ()) else None for axes in partition_spec(path_name(path), leaf.ndim)))

    return jax.tree_util.tree_map_with_path(spec, params)


def put_together(params: Any) -> Any:
    """The parameters with all shares of the axis fsdp on each device, where a mesh is set: what a program that runs
    them starts with. Left to itself, the compiler would send their parts around at every use.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(jax.lax.with_sharding_constraint, params, specs_over("tensor", params))


def named_leaves(tree: Any) -> dict[str, Any]:
    """`layers/attention/query/kernel` -> leaf, for every leaf of a tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `named_leaves` for nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the devices cannot share a micro-batch evenly."""
    size, accumulate, shards = config.train.global_batch_size, config.optimizer.accumulate, batch_shards(mesh)
    if size // accumulate % shards:
        raise ConfigError(
            f"train.global_batch_size: {size} / accumulate {accumulate} is not divisible by the {shards} devices that "
            f"share it; take a multiple of {shards * accumulate}"
        )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def local_rows(batch_size: int) -> np.ndarray:
    """int64 [n], which rows of a global batch the devices of this process hold, in order; without a mesh all.

    Processes that split a model over the tensor axis hold the same rows.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(batch_size)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique([np.arange(batch_size)[index] for index in places.values()])


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assembles the rows that `local_rows` gave this host into arrays [B, ...] split over the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def host_arrays(tree: Any, mesh: Mesh) -> Any:
    """The tree as NumPy arrays, whole in every process, wherever its parts are."""
    if mesh.is_multi_process:
        tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.device_get(tree)


def platform() -> str:
    """For what the program is compiled: `tpu`, `gpu` or `cpu`; that of the mesh, which may be of no device here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler is told of the devices of a mesh, besides what it takes by default.

    v5e chips have 128 MiB of on-chip memory (VMEM), of which one operation may use 16 by default. With 24, products
    that add up over the MLP's width have larger tiles and fewer passes.
    """
    if mesh.devices.flat[0].device_kind == "TPU v5 lite":
        return {"xla_tpu_scoped_vmem_limit_kib": "24576"}
    return {}


def inside_shard() -> bool:
    """Whether the code that is traced runs for one shard of a batch, and sees the rows of that one only."""
    return set(ROWS) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def batch_axes() -> tuple[str, ...]:
    """The axes over which rows are split here: ROWS, or none inside a shard."""
    return () if inside_shard() else ROWS


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins activations [B, ...] to the batch split, where a mesh is set; without one it returns `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(batch_axes()))


def replicate(x: jax.Array) -> jax.Array:
    """Puts all of `x` on every device, where a mesh is set; without one it returns `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())
