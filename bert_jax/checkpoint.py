"""Orbax checkpoints that can be trusted: digests, verification, fall-back to the newest step that is whole.

The one room that knows Orbax. It uses `CheckpointManager`, since the v1 API still lives under `experimental` and
renames its functions. Orbax checks no digests, never falls back and casts types in silence, so each step gets a
`manifest.json` beside Orbax's files with their sha256, the tree of shapes and types, and the configuration; a step
without one was never finished.

    W/checkpoints/STEP/{params,train}/   Orbax's arrays: weights alone, and step + optimizer
    W/checkpoints/STEP/manifest.json     written last
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bert_jax import config as config_lib
from bert_jax import storage
from bert_jax.config import Config, ModelConfig
from bert_jax.errors import CheckpointError, CommandParser, ConfigError, StorageError, run_command

if TYPE_CHECKING:
    from etils import epath

    from bert_jax.data.tokenizer_model import Tokenizer
    from bert_jax.train_state import TrainState

FORMAT = 3
MANIFEST = "manifest.json"


class Manifest(NamedTuple):
    """What `manifest.json` of a step says."""

    step: int
    config: Config
    labels: tuple[str, ...]
    problem: str  # what a classifier's scores mean: one of config.PROBLEMS
    tokenizer: str  # its fingerprint
    tree: dict[str, list]
    files: dict[str, dict]


def checkpoints_folder(workdir: str | os.PathLike) -> str:
    """Where the steps of a workdir stand."""
    return os.path.join(workdir, "checkpoints")


def steps(folder: str) -> list[int]:
    """Step numbers in a checkpoints folder, newest first, whether whole or not."""
    place = storage.place(folder)
    if not place.is_dir():
        return []
    return sorted((int(path.name) for path in place.iterdir() if path.name.isdigit()), reverse=True)


def describe_tree(tree: Any) -> dict[str, list]:
    """path -> [shape, dtype] of every array."""
    from bert_jax.sharding import named_leaves

    return {path: [list(leaf.shape), np.dtype(leaf.dtype).name] for path, leaf in named_leaves(tree).items()}


def read_manifest(folder: str) -> Manifest:
    """The manifest of one step folder. Raises CheckpointError when it is missing or not understood."""
    path = storage.place(folder) / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {values['format']}, this version reads {FORMAT}")
        if values.pop("sha256", "") != config_lib.fingerprint(values):
            raise CheckpointError(f"{path}: not what was written (sha256 differs)")
        config = config_lib.from_dict(values["config"])
        known = {**values, "config": config, "labels": tuple(values["labels"])}
        return Manifest(**{name: known[name] for name in Manifest._fields})
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so the step was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def verify(folder: str) -> Manifest:
    """Compares every file of a step with its digest; raises CheckpointError naming the first that differs."""
    with storage.reached(folder):
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            path = storage.place(folder) / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing")
            if path.stat().length != entry["bytes"] or _digest(path) != entry["sha256"]:
                raise CheckpointError(f"{path}: not what was written (size or sha256 differs)")
    return manifest


def _digest(path: "epath.Path") -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:  # a bucket's file is none that hashlib.file_digest takes
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: str, values: dict[str, Any]) -> None:
    """Signs a step: adds the digests of its files to `values` and writes that, last of all."""
    files = {
        name: {"bytes": path.stat().length, "sha256": _digest(path)}
        for name, path in sorted(storage.files(storage.place(folder)))
        if name != MANIFEST
    }
    values = values | {"files": files}
    write_json(os.path.join(folder, MANIFEST), values | {"sha256": config_lib.fingerprint(values)})


def write_json(path: str, values: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if storage.is_remote(path):  # an object of a bucket is replaced whole
        storage.place(path).write_bytes(text.encode())
        return
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def newest_whole(folder: str, warn: Callable[[str], None], after: int = -1) -> int | None:
    """The newest step past `after` that verifies; `warn` hears of each newer one that does not. None without one.

    Raises CheckpointError when all steps are asked for, some were finished, and none of them is whole.
    """
    found = [step for step in steps(folder) if step > after]
    for step in found:
        try:
            verify(os.path.join(folder, str(step)))
            return step
        except CheckpointError as error:
            warn(f"checkpoint {step} is left out: {error}")
    finished = [step for step in found if (storage.place(folder) / str(step) / MANIFEST).is_file()]
    if finished and after < 0:
        raise CheckpointError(f"{folder}: none of the steps {finished} is whole; move it away to start anew")
    return None


def set_aside(folder: str, step: int) -> None:
    """Renames every step after `step` to STEP.unusable, so that the run can write those numbers again."""
    for newer in steps(folder):
        if newer > step:
            target = storage.place(folder) / f"{newer}.unusable"
            if target.exists():
                target.rmtree()
            (storage.place(folder) / str(newer)).rename(target)


class Checkpointer:
    """Saves training states of one run in the background and keeps the newest `keep`."""

    def __init__(self, folder: str, *, keep: int):
        import orbax.checkpoint as ocp

        self._folder, self._keep, self._args = absolute(folder), keep, ocp.args
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
        )
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.kept_step: int | None = None
        """A step that stays beside the newest ones."""

    def save(
        self,
        state: "TrainState",
        *,
        config: Config,
        tokenizer: str,
        labels: tuple[str, ...] = (),
        problem: str = config_lib.PROBLEMS[0],
    ) -> None:
        """Copies the state off the devices, then writes it while training goes on. `tokenizer` is its fingerprint.

        Raises StorageError, here or at the next `wait`, where the disk refuses.
        """
        self.wait()
        step = int(state.step)
        items = {"params": state.params, "train": {"step": state.step, "opt_state": state.opt_state}}
        check_room(self._folder, items)
        with _storage(self._folder):
            self._manager.save(
                step,
                args=self._args.Composite(**{name: self._args.StandardSave(item) for name, item in items.items()}),
            )
        values = manifest_values(step, config, labels, problem, tokenizer, items)
        self._finisher = threading.Thread(target=self._finish, args=(step, values))
        self._finisher.start()

    def _finish(self, step: int, values: dict[str, Any]) -> None:
        import jax

        try:
            with _storage(self._folder):
                self._manager.wait_until_finished()
                if jax.process_index() == 0:
                    write_manifest(os.path.join(self._folder, str(step)), values)
                    for old in steps(self._folder)[self._keep :]:
                        if old != self.kept_step:
                            (storage.place(self._folder) / str(old)).rmtree()
        except BaseException as error:  # handed to the training thread by wait()
            self._failure = error

    def wait(self) -> None:
        """Returns when the last save is on disk and signed; raises what went wrong with it."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, step: int, abstract: "TrainState") -> "TrainState":
        """The state of a verified step, laid out as `abstract` says. Raises CheckpointError if the trees differ."""
        from bert_jax.train_state import TrainState

        items = {"params": abstract.params, "train": {"step": abstract.step, "opt_state": abstract.opt_state}}
        folder = os.path.join(self._folder, str(step))
        saved = read_manifest(folder).tree
        if not any(name.startswith("train/") for name in saved):
            raise CheckpointError(
                f"{folder}: weights alone, without step and optimizer; start from them in another --workdir with "
                "--train.init-from"
            )
        check_tree(folder, saved, describe_tree(items))
        restored = self._manager.restore(
            step,
            args=self._args.Composite(**{name: self._args.StandardRestore(item) for name, item in items.items()}),
        )
        return TrainState(restored["train"]["step"], restored["params"], restored["train"]["opt_state"])

    def close(self) -> None:
        """Waits for the last save and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            with _storage(self._folder):  # it tells of a failed write once more
                self._manager.close()


def absolute(folder: str | os.PathLike) -> str:
    """The folder's path from the root, as Orbax wants it; that of a bucket as it is."""
    return os.fspath(folder) if storage.is_remote(folder) else os.path.abspath(folder)


def check_room(folder: str, tree: Any) -> None:
    """Raises StorageError when the disk has not the room for the arrays: Orbax would find out halfway, and loudly."""
    import jax

    if storage.is_remote(folder):
        return
    wanted, free = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(folder).free
    if free < wanted:
        raise StorageError(f"{folder}: {wanted:,} bytes to write and {free:,} are free; make room, then resume")


@contextlib.contextmanager
def _storage(folder: str) -> Iterator[None]:
    """Orbax tells of a full disk by ValueError or RuntimeError; this makes it a StorageError."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # it would show the traceback of what is raised here anyway
    try:
        with storage.reached(folder):
            yield
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # each of its unfinished writes would log a traceback
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # nor did the rest begin
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{folder}: the checkpoint cannot be written ({reason}); make room, then resume") from error


def check_tree(folder: str, saved: dict[str, list], wanted: dict[str, list]) -> None:
    """Raises CheckpointError naming the first array that is absent or of another shape or type."""
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder}: {name} is {_array(saved.get(name))} in the checkpoint and {_array(wanted.get(name))} in "
                "this configuration; use the configuration it was trained with, or another --workdir"
            )


def _array(entry: list | None) -> str:
    return f"{entry[1]}{entry[0]}" if entry else "absent"


def load_params(folder: str) -> tuple[dict[str, Any], Manifest]:
    """Weights of one verified step folder as host arrays, without step and optimizer."""
    import orbax.checkpoint as ocp

    manifest = verify(folder)
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(os.path.join(absolute(folder), "params"), empty_params(manifest)), manifest


def empty_params(manifest: Manifest) -> dict[str, Any]:
    """Host arrays of the shapes and types of a step's weights, their memory not yet touched."""
    from bert_jax.sharding import unflatten

    return unflatten({name: np.empty(shape, dtype) for name, (shape, dtype) in manifest.tree.items()})["params"]


def partial_folder(folder: str) -> str:
    """Where a folder is made that gets its name when it is whole; what dead runs left there goes."""
    place, name = os.path.split(os.path.abspath(folder))
    for left in glob.glob(f"{glob.escape(place)}/.{glob.escape(name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    return os.path.join(place, f".{name}.{os.getpid()}.partial")


def save_params(
    workdir: str,
    params: Any,
    model: ModelConfig,
    tokenizer: "Tokenizer",
    *,
    labels: tuple[str, ...] = (),
    problem: str = config_lib.PROBLEMS[0],
) -> None:
    """Writes a workdir that holds weights alone, as its step 0, whole or not at all: to predict or to start from."""
    import orbax.checkpoint as ocp

    partial = partial_folder(workdir)
    folder = os.path.join(checkpoints_folder(partial), "0")
    check_room(os.path.dirname(partial), params)
    try:
        with _storage(folder), ocp.StandardCheckpointer() as writer:
            writer.save(os.path.join(folder, "params"), params)
        tokenizer.save(os.path.join(partial, "tokenizer"))
        config, items = Config(model=model), {"params": params}
        values = manifest_values(0, config, labels, problem, tokenizer.fingerprint, items)
        write_manifest(folder, values)
        os.rename(partial, workdir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def manifest_values(
    step: int, config: Config, labels: tuple[str, ...], problem: str, tokenizer: str, items: Any
) -> dict[str, Any]:
    """What a manifest says of a step, but for its files. `items` is the tree of arrays, or of their shapes."""
    return {
        "format": FORMAT,
        "step": step,
        "config": config_lib.to_dict(config),
        "labels": list(labels),
        "problem": problem,
        "tokenizer": tokenizer,
        "tree": describe_tree(items),
    }


def main(argv: list[str]) -> int:
    """`list W` shows the steps; `verify W` compares every file with its digest (exit 4 when none is whole)."""
    parser = CommandParser(prog="python -m bert_jax.checkpoint", description=main.__doc__)
    parser.add_argument("command", choices=("list", "verify"))
    parser.add_argument("workdir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    folder = checkpoints_folder(args.workdir)
    found, whole = steps(folder), 0
    if not found:
        raise CheckpointError(f"{folder}: no checkpoints")
    for step in found:
        path = os.path.join(folder, str(step))
        try:
            manifest = (verify if args.command == "verify" else read_manifest)(path)
            size = sum(entry["bytes"] for entry in manifest.files.values())
            print(f"{step}\t{'whole' if args.command == 'verify' else 'finished'}\t{size:,} bytes\t{path}")
            whole += 1
        except CheckpointError as error:
            print(f"{step}\tunusable\t{error}")
    if not whole:
        raise CheckpointError(f"{folder}: no usable step")
    if args.command == "verify" and whole < len(found):
        print(f"{len(found) - whole} of {len(found)} steps are damaged", file=sys.stderr)
        return CheckpointError.exit_code
    return 0


if __name__ == "__main__":
    run_command(main)
