"""What a program will take on a slice of TPUs: parsing, arithmetic, and the TPU's compiler where it is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bert_jax import hlo, plan
from bert_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from bert_jax.errors import ConfigError
from bert_jax.hlo import Collective
from bert_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
PROGRAM = """HloModule jit_step
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}
%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.3 = f32[8,4]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %all-reduce.1 = (f32[100]{0}, /*index=1*/bf16[10,2]{1,0}) all-reduce(%a), replica_groups=mesh['axis_0'=8] {'axis_0'}
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%c), replica_groups=[4,2]<=[4,2]T(0,1), to_apply=%sum
  %reduce-scatter.1 = f32[2]{0} reduce-scatter(%d), replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%sum
  %all-gather-start.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%e), replica_groups=[4,2]<=[2,4]T(1,0)
  %while.1 = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_counted_with_their_axes_and_bytes():
    found = {(one.kind, one.axes): one for one in hlo.collectives(PROGRAM, {"data": 2, "fsdp": 2, "tensor": 2})}
    assert found["all-reduce", "data+fsdp+tensor"] == Collective("all-reduce", "data+fsdp+tensor", 8, 1, 440)
    assert found["all-reduce", "tensor"] == Collective("all-reduce", "tensor", 2, 1, 4)
    assert found["reduce-scatter", "fsdp"] == Collective("reduce-scatter", "fsdp", 2, 1, 16)
    assert found["all-gather", "data"] == Collective("all-gather", "data", 2, 1, 24)
    assert found["all-gather", "fsdp+tensor"] == Collective("all-gather", "fsdp+tensor", 4, 3, 3 * 128)  # in a loop
    assert len(found) == 5


def test_collectives_that_the_compiler_cuts_or_renames_are_counted_as_what_they_are():
    """As a TPU's compiler writes them: a chain of one gather, and a reduce-scatter as an all-reduce and a slice."""
    gather = (
        "  %g.{0} = f32[64]{{0}} all-gather(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {{'b'}}, "
        'frontend_attributes={{chain_id="{1}"}}\n'
    )
    text = f"""HloModule jit_step
%async_collective_fusion.1 (x: f32[16]) -> f32[64] {{
{gather.format(1, 0)}}}
%async_collective_fusion.2 (x: f32[16]) -> f32[64] {{
{gather.format(2, 0)}}}
%all-reduce-scatter.3 (x: f32[64]) -> f32[16] {{
  %all-reduce.1 = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%sum
}}
ENTRY %main (x: f32[16]) -> f32[64] {{
{gather.format(3, 1)}}}
"""
    assert hlo.collectives(text, {"data": 2, "fsdp": 4}) == [
        Collective("all-gather", "fsdp", 4, 2, 2 * 256),
        Collective("reduce-scatter", "fsdp", 4, 1, 256),
    ]


def test_cycles_in_a_loop_count_as_often_as_it_turns():
    estimate = ', backend_config={"window_config":{"estimated_cycles":"%d"}}'
    text = PROGRAM.replace("dimensions={0}", "dimensions={0}" + estimate % 70)
    text = text.replace("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "replica_groups={{0,2}}" + estimate % 5)
    text = text.replace("to_apply=%sum\n", "to_apply=%sum" + estimate % hlo.UNKNOWN + "\n", 1)
    assert hlo.cycles(PROGRAM) == 0 and hlo.cycles(text) == 3 * 70 + 5


@pytest.mark.parametrize("direction, trips", [("LT", 4), ("NE", 1)])
def test_a_loop_that_does_not_tell_counts_to_the_number_in_its_condition(direction, trips):
    """As in what a TPU's compiler writes."""
    condition = f"""%cond (p: (s32[], f32[8,4])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(4), metadata={{op_name="jit(step)/shard_map"}}
  %index = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%index, %limit), direction={direction}
}}
ENTRY"""
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "").replace("ENTRY", condition, 1)
    assert hlo.loop_trips(text)["body.1"] == trips


def test_ring_times():
    chip = plan.Chip(flops=1, cycle_flops=1, memory=1, bandwidth=1, link=10.0, options={})
    reduce = Collective("all-reduce", "data", 8, 1, 800)
    assert plan.network_seconds([reduce], chip, 2) == pytest.approx(2 * 800 * 7 / 8 / 20)
    gather = Collective("all-gather", "fsdp", 4, 1, 800)
    assert plan.network_seconds([gather], chip, 1) == pytest.approx(800 * 3 / 4 / 10)
    assert plan.network_seconds([reduce, gather], chip, 1) == pytest.approx(140 + 60)


@pytest.mark.parametrize("topology", ["v5e", "v5e:8", "v9:2x4", "v5e:2xx4", "2x4"])
def test_a_topology_is_one(topology):
    with pytest.raises(ConfigError, match="--plan"):
        plan.chip_of(topology)


def test_a_report_adds_up():
    config = Config(
        model=ModelConfig(), mesh=MeshConfig(), train=TrainConfig(global_batch_size=512, num_steps=1_000_000)
    )
    reduced = [Collective("all-reduce", "data", 8, 1, 440_000_000)]
    cycles = round(0.040 * 197e12 / (2 * 4 * 128**2))  # of matrix units that each multiply and add once a cycle
    whole = plan.Compiled(60.0, 10**9, 2 * 10**9, 3 * 10**9, 4e12, cycles, 0.050, 3, 1e10, reduced, 0, False)
    found = plan.report_of(config, "v5e:2x4", plan.CHIPS["v5e"], {"data": 8, "fsdp": 1, "tensor": 1}, whole, None)
    assert found["fits"] and found["would_fit"] == []
    low, high = found["seconds"]["step"]
    assert low == pytest.approx(0.040) and high == pytest.approx(0.050 + 0.0077)
    assert found["mfu"][0] == pytest.approx(found["model_flops_per_chip"] / 197e12 / high)
    assert found["days"][1] == pytest.approx(1e6 * high / 86_400)
    assert found["chip_hours"][0] == pytest.approx(8 * 1e6 * low / 3600)
    # A base model: six times its matrix parameters for each token, and a little for attention and heads.
    assert 1 < found["model_flops_per_chip"] / (6 * 85e6 * 64 * 128) < 1.3
    assert "does not fit" not in plan.describe(found).lower()
    # The same rows a chip on 16 times as many: the ring grows from 7/8 of its bytes to 127/128, compute does not.
    shares = {one["chips"]: one["efficiency"] for one in found["weak_scaling"]}
    slow = 2 * 440e6 / (2 * 50e9)
    assert shares[8] == pytest.approx([0.040 / (0.040 + slow * 7 / 8), 1])
    assert shares[128] == pytest.approx([0.040 / (0.040 + slow * 127 / 128), 1])
    # In shares over fsdp there is nothing to add up over data yet: on 128 chips, an eighth over 16 of them.
    shares = [Collective("all-gather", "fsdp", 8, 1, 220e6), Collective("reduce-scatter", "fsdp", 8, 1, 440e6)]
    found = plan.weak_scaling(0.040, shares, plan.CHIPS["v5e"], 8, 2)
    once = 660e6 * 7 / 8 / (2 * 50e9)
    assert [one["chips"] for one in found if one["efficiency"][0] == pytest.approx(0.040 / (0.040 + once))] == [8]
    more = once + 2 * 55e6 * 15 / 16 / (2 * 50e9)
    assert found[4]["chips"] == 128 and found[4]["efficiency"][0] == pytest.approx(0.040 / (0.040 + more))
    large = whole._replace(peak=40 * 2**30, arguments=10**9)
    found = plan.report_of(config, "v5e:2x4", plan.CHIPS["v5e"], {"data": 8, "fsdp": 1, "tensor": 1}, large, None)
    assert not found["fits"] and "--optimizer.accumulate 4" in found["would_fit"]
    assert "DOES NOT FIT" in plan.describe(found)


def test_a_program_that_the_compiler_refuses_is_told_with_what_would_fit():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
    )
    needed = plan.needed_bytes(f"{message} temporaries (21.95G) exceeds available HBM (15.75G). HLO module: jit_step.")
    assert needed == round(21.95 * 2**30) and plan.needed_bytes("INTERNAL: something else") is None
    config = Config(model=ModelConfig(num_layers=2), train=TrainConfig(global_batch_size=512, num_steps=10))
    mesh = make_mesh(MeshConfig(), jax.devices())
    found = plan.refusal_of(config, "v5e:2x4", plan.CHIPS["v5e"], mesh, needed)
    assert not found["fits"] and "--optimizer.accumulate 2" in found["would_fit"]
    told = plan.describe(found)
    assert "DOES NOT FIT" in told and "needs 23.57 GB of a chip's 16.9" in told
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=8))
    remedies = plan.refusal_of(odd, "v5e:2x4", plan.CHIPS["v5e"], mesh, needed)["would_fit"]
    assert remedies and not any("accumulate" in word for word in remedies)
    # Shares of the state alone: of 24 GB they spare 12 or, where all devices are one share's already, nothing.
    shares = [
        plan.remedies(odd, {"data": 8 // f, "fsdp": f, "tensor": 1}, 24 * 10**9, 26 * 10**9, 16e9) for f in (4, 8)
    ]
    assert shares == [["--mesh.fsdp 8"], ["a slice of more chips"]]


def test_what_libraries_write_is_held_back(capfd):
    with plan.captured_stderr() as said:
        os.write(2, b"noise\n")
    os.write(2, b"word\n")
    assert said == ["noise\n"] and capfd.readouterr().err == "word\n"


def run_plan(*words):
    command = [sys.executable, "-m", "bert_jax.train", "--config", "configs/tiny.py", "--data.path", "builtin", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_the_compiler_it_says_what_to_install():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    done = run_plan("--plan", "v5e:2x4")
    assert done.returncode == 2 and "pip install 'bert_jax[tpu]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def compiler():
    """Skips where the TPU's compiler is not installed."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed: pip install 'bert_jax[tpu]'")


def test_what_does_not_fit_is_told(compiler, tmp_path):
    done = run_plan("--plan", "v5e:2x4", "--workdir", str(tmp_path / "w"), "--train.global-batch-size", "524288")
    assert done.returncode == 0 and "IT DOES NOT FIT" in done.stdout, done.stderr
    found = json.loads((tmp_path / "w" / "plan.json").read_text())
    assert found["bytes_per_chip"]["peak"] > found["bytes_per_chip"]["memory"] and found["would_fit"]


def test_a_forced_replication_is_heard_from_the_compiler(compiler):
    """XLA's words of it come from inside libtpu: the same resharding as in test_sharding, for a slice of TPUs."""
    code = """
from bert_jax import plan
devices = plan.topology_devices("v5e:2x4", plan.chip_of("v5e:2x4"))
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
one, other = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("a", None), (None, "b")))
place = jax.lax.with_sharding_constraint
step = jax.jit(lambda x: place(jnp.sin(place(x, one)), other))
print(plan.compile_for(step, mesh, jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=one)).forced)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_any_torus_is_split_into_shares(compiler):
    code = """
from bert_jax import plan, sharding
from bert_jax.config import MeshConfig
for topology in ("v5e:16x16", "v6e:4x4", "v5p:4x4x4", "v4:8x8x8"):
    devices = plan.topology_devices(topology, plan.chip_of(topology))
    mesh = sharding.make_mesh(MeshConfig(), devices)
    assert len({device.id for device in mesh.devices.flat}) == len(devices)
    print(*mesh.shape.values())
from jax.experimental import topologies
two = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
for devices in sharding.make_mesh(MeshConfig(), two).devices:
    assert len({device.slice_index for device in devices.flat}) == 1
    print(devices.shape)
try:
    sharding.make_mesh(MeshConfig(data=1, fsdp=8), two)
except sharding.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *meshes, refused = done.stdout.splitlines()
    assert meshes == ["32 8 1", "2 8 1", "8 8 1", "64 8 1", "(4, 1)", "(4, 1)"], done.stderr
    assert refused.startswith("mesh.data: 2 slices do not divide 1;")


SPLASH = ("--model.attention", "splash", "--model.attention-dropout", "0", "--data.max-seq-len", "512")


@pytest.mark.parametrize(
    ("topology", "accumulate", "more"),
    [("v5e:2x4", 1, ()), ("v5e:2x4", 4, ()), ("v5p:2x2x2", 1, ()), ("v6e:2x4", 1, SPLASH)],
)
def test_tiny_compiles_for_a_slice(compiler, topology, accumulate, more, tmp_path):
    batch = ("--train.global-batch-size", str(64 * accumulate), "--optimizer.accumulate", str(accumulate))
    done = run_plan("--plan", topology, "--workdir", str(tmp_path / "w"), *batch, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "w" / "plan.json").read_text())
    assert found["chips"] == 8 and found["fits"] and not found["forced_rematerialization"]
    # Parameters are gathered once, kernels in bfloat16, and gradients reduced once in float32, whatever the number of
    # micro-batches; no more of size.
    gathered, reduced = [one for one in found["collectives"] if one["bytes"] > 1e6]
    assert (gathered["kind"], gathered["axes"]) == ("all-gather", "fsdp")
    # What each keeps is a share; on v5p the compiler adds up arrays as small as these whole, and cuts them then.
    assert reduced["axes"] == "fsdp"
    assert reduced["kind"] == ("all-reduce" if topology.startswith("v5p") else "reduce-scatter")
    table, all_parameters = 30592 * 128, 4.4e6
    assert 4 * table + 2 * (4.2e6 - table) < gathered["bytes"] < 4 * table + 2 * (4.6e6 - table)
    assert 4 * 0.95 * all_parameters < reduced["bytes"] < 4 * 1.05 * all_parameters
    assert 0 < found["mfu"][0] <= found["mfu"][1] < 1
