"""What a compiled program says of itself in its text (XLA's HLO): its cycles; how, and how much, its devices talk."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = 2**63 - 1  # cycles of an operation that the compiler has no estimate of
_OPERATION = re.compile(rf"= (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_LOOP = re.compile(r"\bwhile\(.*\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*direction=LT")
_CALLS = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes, in one step of one device."""

    kind: str
    axes: str
    """Names of mesh axes, with + between them."""
    group: int
    """Devices that take part together."""
    count: int
    bytes: int
    """Of the whole arrays: what an all-reduce reduces, what an all-gather gives, what a reduce-scatter takes."""


def array_bytes(shape: str) -> int:
    """`(f32[128,2]{1,0}, bf16[4])` -> bytes of all arrays in it."""
    sizes = (
        math.prod(map(int, filter(None, dims.split(",")))) * BYTES[kind]
        for kind, dims in _ARRAY.findall(shape)
        if kind in BYTES
    )
    return sum(sizes)


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Those of a program's text, those in a loop as often as it turns. `mesh`: axis -> size, in the mesh's order.

    A TPU's compiler writes one that goes on beside the computation as a chain, once in each operation beside it, and
    a reduce-scatter as an all-reduce in a computation that is called so.
    """
    trips, chains = loop_trips(text), set()
    found: dict[tuple[str, str, int], list[int]] = {}
    for computation, line in lines_of(text):
        operation = _OPERATION.search(line)
        chain = _CHAIN.search(line)
        if not operation or (chain and chain.groups() in chains):
            continue
        if chain:
            chains.add(chain.groups())
        scatters = operation["kind"] == "all-reduce" and computation.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scatters else operation["kind"]
        group = first_group(line)
        axes = mesh_axes(group, mesh) if group else "?"
        size = array_bytes(operation["shape"])
        if operation["start"] and operation["kind"] != "all-reduce":
            size //= 2  # the pair of what is read and what is written
        if operation["kind"] == "reduce-scatter":  # gives a part
            size *= max(1, len(group))
        times = trips.get(computation, 1)
        entry = found.setdefault((kind, axes, len(group)), [0, 0])
        entry[0] += times
        entry[1] += times * size
    return [Collective(kind, axes, group, *entry) for (kind, axes, group), entry in sorted(found.items())]


def cycles(text: str) -> int:
    """The compiler's estimates of its operations, one after the other, those in a loop as often as it turns.

    It makes none, or UNKNOWN, for random bits, collectives, kernels of others, gathers on cores of their own, and
    copies that run beside the computation.
    """
    trips = loop_trips(text)
    found = ((computation, _CYCLES.search(line)) for computation, line in lines_of(text))
    estimates = ((computation, int(estimate[1])) for computation, estimate in found if estimate)
    return sum(trips.get(computation, 1) * number for computation, number in estimates if number != UNKNOWN)


def lines_of(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of every line."""
    computation = ""
    for line in text.splitlines():
        if started := _COMPUTATION.match(line):
            computation = started[1]
        yield computation, line


def loop_trips(text: str) -> dict[str, int]:
    """computation -> how often loops run it; loops inside loops multiply.

    Where a loop does not tell (a TPU's do not), it is taken to count from 0 to the one number in its condition, as
    those of `jax.lax.scan` do; once where its condition is another.
    """
    limits: dict[str, list[int]] = {}  # computation -> numbers in it
    below = set()  # computations that end in "less than"
    for computation, line in lines_of(text):
        if limit := _LIMIT.search(line):
            limits.setdefault(computation, []).append(int(limit[1]))
        if _BELOW.search(line):
            below.add(computation)
    inside: dict[str, list[tuple[str, int]]] = {}  # computation -> those that it runs
    for computation, line in lines_of(text):
        if loop := _LOOP.search(line):
            known, (condition, body) = _TRIPS.search(line), loop.groups()
            counted = limits.get(condition, []) if condition in below else []
            trips = int(known[1]) if known else counted[0] if len(counted) == 1 else 1
            inside.setdefault(computation, []).append((body, trips))
        elif called := _CALLS.search(line):
            inside.setdefault(computation, []).append((called[1], 1))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    trips: dict[str, int] = {}
    waiting = [(entry[1], 1)] if entry else []
    while waiting:
        name, times = waiting.pop()
        if trips.get(name, 0) >= times:
            continue
        trips[name] = times
        waiting += [(inner, times * more) for inner, more in inside.get(name, [])]
    return trips


def first_group(line: str) -> list[int]:
    """Numbers of the devices in the first group of a collective; empty where its notation is not known."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(number) for number in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        return _transposed(dims, order)[: int(iota[2])]
    if named := re.search(r"replica_groups=mesh\[(.+?)\] ?\{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        ranges = [range(size) if name in chosen else range(1) for name, size in sizes.items()]
        strides = [math.prod(list(sizes.values())[place + 1 :]) for place in range(len(sizes))]
        return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*ranges)]
    return []


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """range(prod(dims)) in the shape `dims`, its axes put in `order`, flat again."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    indices = itertools.product(*(range(dims[axis]) for axis in order))
    return [sum(i * strides[axis] for i, axis in zip(index, order, strict=True)) for index in indices]


def mesh_axes(group: list[int], mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = []
    for number in group:
        place = []
        for size in reversed(mesh.values()):
            number, index = divmod(number, size)
            place.append(index)
        places.append(place[::-1])
    varying = [name for axis, name in enumerate(mesh) if len({place[axis] for place in places}) > 1]
    return "+".join(varying) or "none"
