"""Checkpoints: every flipped bit is noticed, the newest whole step is found, trees and types must agree."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bert_jax import checkpoint
from bert_jax.checkpoint import Checkpointer, load_params, newest_whole, steps, verify
from bert_jax.config import MeshConfig
from bert_jax.errors import CheckpointError, StorageError
from bert_jax.optimizer import build_optimizer
from bert_jax.sharding import make_mesh
from bert_jax.tasks import pretrain
from bert_jax.train_state import abstract_state, create_state


@pytest.fixture(scope="module")
def parts(small_config):
    return pretrain.objective(small_config), build_optimizer(small_config.optimizer, 2)


def mesh_of(*shape):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


@pytest.fixture(scope="module")
def saved(parts, small_config, tmp_path_factory) -> Path:
    """Steps 1, 2 and 3 of a run on two devices; keep is 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    mesh = mesh_of(1, 2, 1)
    with jax.set_mesh(mesh):
        state = create_state(*parts, mesh, seed=0)
        checkpoints = Checkpointer(folder, keep=3)
        for step in (1, 2, 3):
            checkpoints.save(
                dataclasses.replace(state, step=state.step + step),
                config=small_config,
                labels=("a", "b"),
                tokenizer="t",
            )
        checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(folder, parts, mesh, step=3):
    checkpoints = Checkpointer(folder, keep=3)
    with jax.set_mesh(mesh):
        state = checkpoints.restore(step, abstract_state(*parts, mesh))
    checkpoints.close()
    return state


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (2, 2, 2)], ids=str)
def test_any_mesh_restores_the_same_bits(copy, parts, shape):
    mesh = mesh_of(*shape)
    found = restore(copy, parts, mesh)
    with jax.set_mesh(mesh_of(1, 2, 1)):
        expected = create_state(*parts, mesh_of(1, 2, 1), seed=0)
    assert int(found.step) == 3
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    kernel = found.params["layers"]["mlp"]["wi"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (shape[1] * shape[2])


def test_a_flipped_bit_anywhere_is_noticed(copy):
    files = [path for path in (copy / "3").rglob("*") if path.is_file()]
    assert len(files) > 5
    verify(copy / "3")
    for path in files:
        content = path.read_bytes()
        if not content:
            continue
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(CheckpointError, match=path.name):
            verify(copy / "3")
        path.write_bytes(content)
    verify(copy / "3")


def damage(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def test_falls_back_to_the_newest_whole_step_and_says_so(copy):
    heard = []
    assert newest_whole(copy, warn=heard.append) == 3 and not heard
    damage(copy / "3")
    (copy / "2" / checkpoint.MANIFEST).unlink()
    assert newest_whole(copy, warn=heard.append) == 1
    assert "checkpoint 3 is left out" in heard[0] and "never finished" in heard[1]
    damage(copy / "1")
    with pytest.raises(CheckpointError, match="none of the steps"):
        newest_whole(copy, warn=heard.append)


def test_no_step_at_all_is_no_fault(tmp_path):
    assert newest_whole(tmp_path / "absent", warn=print) is None
    (tmp_path / "7.orbax-checkpoint-tmp-1").mkdir()
    assert steps(tmp_path) == []


def test_only_the_newest_are_kept(copy, parts, small_config):
    mesh = mesh_of(1, 1, 1)
    state = restore(copy, parts, mesh)
    checkpoints = Checkpointer(copy, keep=2)
    with jax.set_mesh(mesh):
        checkpoints.save(dataclasses.replace(state, step=state.step + 1), config=small_config, tokenizer="t")
    checkpoints.close()
    assert steps(copy) == [4, 3]


def test_later_steps_are_set_aside_not_deleted(copy):
    checkpoint.set_aside(copy, 1)
    assert steps(copy) == [1]
    assert (copy / "3.unusable" / checkpoint.MANIFEST).is_file()


@pytest.mark.parametrize("change", [{"mlp_dim": 128}, {"num_layers": 3}], ids=str)
def test_another_architecture_is_refused_by_name(copy, small_config, parts, change):
    config = dataclasses.replace(small_config, model=dataclasses.replace(small_config.model, **change))
    with pytest.raises(CheckpointError, match=r"layers/\S+ is float32\[2, .* in the checkpoint"):
        restore(copy, (pretrain.objective(config), parts[1]), mesh_of(1, 1, 1))


def test_another_optimizer_is_refused(copy, small_config, parts):
    frozen = dataclasses.replace(small_config.optimizer, clip_norm=0.0)
    with pytest.raises(CheckpointError, match="opt_state"):
        restore(copy, (parts[0], build_optimizer(frozen, 2)), mesh_of(1, 1, 1))


def test_weights_load_without_the_optimizer(copy, small_config, parts):
    params, manifest = load_params(str(copy / "2"))
    assert manifest.step == 2 and manifest.labels == ("a", "b") and manifest.config == small_config
    expected = jax.eval_shape(parts[0].init, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_a_manifest_that_is_no_manifest(copy):
    (copy / "3" / checkpoint.MANIFEST).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        verify(copy / "3")
    (copy / "3" / checkpoint.MANIFEST).write_text("[1")
    with pytest.raises(CheckpointError, match="damaged"):
        verify(copy / "3")


def test_a_disk_without_room_is_told_before_anything_is_written(copy, parts, small_config, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with jax.set_mesh(mesh_of(1, 1, 1)), contextlib.closing(Checkpointer(str(copy), keep=9)) as manager:
        state = dataclasses.replace(restore(copy, parts, mesh_of(1, 1, 1)), step=jax.numpy.int32(4))
        with pytest.raises(StorageError, match="bytes to write and 1,000 are free"):
            manager.save(state, config=small_config, tokenizer="", labels=())
    assert not (copy / "4").exists()
    with pytest.raises(StorageError, match="1,000 are free"):
        checkpoint.save_params(str(copy.parent / "w"), state.params, small_config.model, None)
    assert not list(copy.parent.glob("w*"))


def test_command_lists_and_verifies(copy, capsys):
    workdir = str(copy.parent)
    assert checkpoint.main(["list", workdir]) == 0
    assert capsys.readouterr().out.count("finished") == 3
    assert checkpoint.main(["verify", workdir]) == 0
    damage(copy / "3")
    assert checkpoint.main(["verify", workdir]) == 4
    assert "unusable" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no checkpoints"):
        checkpoint.main(["verify", workdir + "x"])
