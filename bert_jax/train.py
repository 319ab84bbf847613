"""The one entrypoint: pre-training and fine-tuning, on a CPU, a GPU or a TPU.

    python -m bert_jax.train --config configs/tiny.py --workdir W [--optimizer.learning-rate 2e-5 ...]

Reads top to bottom: `main` parses, `train` runs. Heavy imports wait until the command line is known to be good.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

from bert_jax import config as config_lib
from bert_jax import storage
from bert_jax.command import parse_command
from bert_jax.config import Config
from bert_jax.errors import (
    INTERRUPTED,
    PREEMPTED,
    ConfigError,
    NonFiniteLossError,
    PeerError,
    StorageError,
    run_command,
)
from bert_jax.process import keep_memory
from bert_jax.progress import Progress, log_to, say

# What a run makes in its workdir, and makes anew when there is something of that name.
WRITTEN = {
    *("best.json", "config.json", "env.json", "metrics.jsonl", "results.json", "sweep.csv", "sweep.json"),
    *("hosts", "model", "predictions", "runs", "tb", "tokenizer"),
}


def main(argv: list[str]) -> int:
    """Parses, validates, then prints or trains. Returns the exit code."""
    command = parse_command(argv)
    config = config_lib.validate(command.settings)
    if command.print_config:
        print(json.dumps(config_lib.to_dict(config), indent=1))
        return 0
    if command.dry_run:
        print(dry_run(config))
        return 0
    if command.plan:
        return plan_for(config, command.plan, command.workdir)
    if not command.workdir:
        raise ConfigError("--workdir: name the folder of the run")
    keep_memory()
    import jax

    from bert_jax import hosts, sweep

    flags = command.coordinator, command.num_processes, command.process_id
    hosts.join(hosts.find_meeting(os.environ, flags, hosts.tpu_metadata()), timeout=command.host_timeout)
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, end_at_once)
    run_all = sweep.suite if config.task.name == "all" else sweep.sweep if sweep.is_sweep(config) else train
    if run_all is not train and jax.process_count() > 1:
        raise ConfigError("sweep, task.name all: many runs go in one process; start the runs one by one")
    if run_all is not train and storage.is_remote(command.workdir):
        raise ConfigError(
            f"--workdir {command.workdir}: many runs go into a folder of a file system, not into a bucket"
        )
    return run_all(config, command.workdir, resume=command.resume, debug=command.debug)


def task_module(config: Config) -> Any:
    """The file of `tasks/` that the configuration names."""
    from bert_jax.tasks import classify, glue, ner, pretrain, squad

    if config.task.name in config_lib.GLUE:
        return glue
    if config.task.name == "all":
        raise ConfigError("task.name: all is many runs; name one task for this")
    modules = {"pretrain": pretrain, "classify": classify, "regress": classify, "ner": ner, "squad": squad}
    return modules[config.task.name]


def dry_run(config: Config) -> str:
    """What a run would cost, as text. No text is prepared and no parameter is made; weights to start from are read."""
    import jax

    from bert_jax import convert, plan
    from bert_jax.sharding import check_batch, make_mesh, tree_shardings

    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    if config.train.init_from:
        weights = convert.load_model(config.train.init_from).config
        config = config_lib.validate(dataclasses.replace(config, model=config_lib.adopt(config.model, weights)))
    module = task_module(config)
    params = jax.eval_shape(lambda: module.init_params(config, jax.random.key(0)))
    tree_shardings(params, mesh)
    rows = module.known_rows(config)
    if config.train.num_epochs > 0 and rows is None:
        return plan.report(config, params, 0, None) + "\n(steps follow from train.num_epochs when the text is prepared)"
    return plan.report(config, params, config_lib.total_steps(config, rows or 0), rows)


def plan_for(config: Config, topology: str, workdir: str) -> int:
    """`--plan`: prints what a slice of TPUs would do, and writes it to `plan.json` of a workdir. 0."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bert_jax import plan
    from bert_jax.checkpoint import write_json

    found = plan.plan(config, topology)
    print(plan.describe(found))
    if workdir:
        storage.place(workdir).mkdir(parents=True, exist_ok=True)
        write_json(os.path.join(workdir, "plan.json"), found)
    return 0


def write_beginning(config: Config, workdir: str, task: Any, *, new: bool) -> None:
    """`config.json`, `env.json`, and for a new run `tokenizer/`, which a resumed one has and was seen to share."""
    from bert_jax.checkpoint import write_json
    from bert_jax.data.tokenizer_model import publish

    write_json(os.path.join(workdir, "config.json"), config_lib.to_dict(config))
    write_environment(workdir)
    if new:
        shutil.rmtree(os.path.join(workdir, "tokenizer"), ignore_errors=True)
        publish(task.tokenizer, os.path.join(workdir, "tokenizer"))


def write_environment(workdir: str) -> None:
    """`env.json`: what this run runs on."""
    import platform
    from importlib.metadata import version

    import jax

    from bert_jax import __version__
    from bert_jax.checkpoint import write_json

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "versions": {"bert_jax": __version__, **{name: version(name) for name in names}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(os.path.join(workdir, "env.json"), facts)


def end_at_once(_number: int, _frame: Any) -> None:
    """SIGTERM before the first step, while there is nothing to save: JAX's own handler would only take note of it."""
    say("stopped before the first step; the same command begins anew, or goes on from the last checkpoint")
    raise SystemExit(PREEMPTED)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the exit code when Ctrl-C or SIGTERM asks the run to save and stop."""
    wanted: list[int] = []

    import jax

    alone = jax.process_count() == 1

    def note(number: int, _frame: Any) -> None:
        if wanted:  # asked twice: at once
            raise KeyboardInterrupt
        wanted.append(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        say("stopping after this step; the state is saved (once more to stop at once)")
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    # Of many processes JAX notices SIGTERM, and they agree on a step; a handler of ours would keep it from that.
    noticed = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, note) for number in noticed}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_from(state: Any, model: Any, mesh: Any, labels: tuple[str, ...], problem: str, reinit_layers: int = 0) -> Any:
    """Puts loaded weights where name and shape agree; a table says what was loaded, newly made and ignored.

    A classifier is taken only if its labels are `labels` and mean the same `problem`: rows of other classes of the same
    number would fit as well. With `reinit_layers`, the pooler and that many top layers stay as they were made.
    """
    from bert_jax.convert import table
    from bert_jax.optimizer import STACKED
    from bert_jax.sharding import host_arrays, named_leaves

    ours, theirs = named_leaves(state.params), named_leaves(model.params)
    loaded = {name for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    if (model.labels, model.problem) != (labels, problem):
        loaded = {name for name in loaded if not name.startswith(("classifier/", "tagger/"))}
    if reinit_layers:
        if reinit_layers > model.config.num_layers:
            raise ConfigError(
                f"train.reinit_layers: {reinit_layers}, the weights have {model.config.num_layers} layers"
            )
        loaded = {name for name in loaded if not name.startswith("pooler/")}
        say(f"the top {reinit_layers} layers and the pooler are newly made")
        stacked = {name: ours[name] for name in loaded if name.startswith(STACKED)}
        made = host_arrays(stacked, mesh)
        theirs |= {name: keep_top(theirs[name], made[name], reinit_layers) for name in stacked}
    unused = sorted({name.split("/")[0] for name in theirs.keys() - loaded})
    new = {name: array for name, array in ours.items() if name not in loaded}
    say(f"weights:\n{table({name: ours[name] for name in sorted(loaded)}, new, (*unused, *model.ignored))}")
    return with_params(state, {name: theirs[name] for name in loaded})


def keep_top(theirs: Any, ours: Any, count: int) -> Any:
    """The layers [L, ...] of `theirs`, but the last `count` of them of `ours`."""
    import numpy as np

    return np.concatenate([theirs[: len(theirs) - count], ours[len(theirs) - count :]])


def with_params(state: Any, arrays: dict[str, Any]) -> Any:
    """The state with host arrays (path -> array) in the place of its own, laid out and typed as those are."""
    import jax

    from bert_jax.sharding import named_leaves, unflatten

    def place(value: Any, like: Any) -> Any:
        value = value.astype(like.dtype)
        return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])

    params = {
        name: place(arrays[name], array) if name in arrays else array
        for name, array in named_leaves(state.params).items()
    }
    return dataclasses.replace(state, params=unflatten(params))


def check_ours(workdir: str) -> None:
    """Raises ConfigError where a new run would overwrite what no run has made: every run leaves `lock`."""
    place = storage.place(workdir)
    found = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if not found & {"lock", "checkpoints"} and (lost := sorted(found & WRITTEN)):
        raise ConfigError(f"--workdir {workdir}: its {', '.join(lost)} are no run's and would be lost; take another")


def lock(workdir: str) -> Any:
    """Takes the workdir for this process until the returned file is closed. Raises ConfigError when another has it."""
    import fcntl

    file = open(os.path.join(workdir, "lock"), "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"--workdir {workdir}: another run is at work in it; wait for it or take another") from None
    return file


def first_step(folder: str, resume: str) -> int | None:
    """The checkpoint to go on from; None for a new run. Later steps, which are not whole, are set aside.

    Raises ConfigError or CheckpointError where `resume` asks for what is not there.
    """
    from bert_jax import checkpoint

    if resume == "never" and checkpoint.steps(folder):
        raise ConfigError(f"--resume never: {folder} holds checkpoints; take another --workdir or remove it")
    with storage.reached(folder):
        start = checkpoint.newest_whole(folder, warn=say)
        if resume == "must" and start is None:
            raise checkpoint.CheckpointError(f"--resume must: {folder} holds no checkpoint")
        checkpoint.set_aside(folder, -1 if start is None else start)
    return start


def fill_in(config: Config, workdir: str, before: Any) -> tuple[Config, Any]:
    """Settles what data and starting weights decide (sizes, vocabulary, prepared folder), and loads those weights.

    A resumed run, whose checkpoint says `before`, finds it in its workdir: the weights it began with may be gone.
    """
    from bert_jax import convert

    starting, tokenizer = None, ""
    if config.train.init_from:
        if before is None:
            starting = convert.load_model(config.train.init_from)
            source, tokenizer = starting.config, starting.tokenizer
        else:
            source, tokenizer = before.config.model, os.path.join(workdir, "tokenizer")
        config = dataclasses.replace(config, model=config_lib.adopt(config.model, source))
        threshold = before.config.task.null_threshold if starting is None else starting.null_threshold
        if threshold is not None:
            config = dataclasses.replace(config, task=dataclasses.replace(config.task, null_threshold=threshold))
    return config_lib.validate(task_module(config).complete(config, tokenizer)), starting


def check_resumed(config: Config, task: Any, before: Any, num_steps: int) -> None:
    """Raises ConfigError where going on from the checkpoint `before` would give silent nonsense; says what differs."""
    if before.tokenizer != task.tokenizer.fingerprint:
        raise ConfigError(f"--workdir: step {before.step} was trained with another tokenizer; take another --workdir")
    if before.labels != task.labels:
        raise ConfigError(
            f"task.train: its labels {', '.join(task.labels)} are not those of step {before.step}, "
            f"{', '.join(before.labels)}; take another --workdir"
        )
    if before.step > num_steps:
        raise ConfigError(f"train.num_steps: {num_steps}, but the workdir is at step {before.step}; ask for more steps")
    if changed := config_lib.differences(before.config, config):
        say(f"note: not as the checkpoint was trained: {'; '.join(changed)}")


def export(config: Config, workdir: str, params: Any, task: Any, results: dict, step: int, last: int) -> None:
    """Writes the model directory and `results.json`: host arrays of `step`, of a run whose last one is `last`."""
    from bert_jax import checkpoint, convert

    folder = os.path.join(workdir, "model")
    about = {"labels": task.labels, "problem": task.problem, "step": last}
    if config.task.name == "squad" and config.task.version_2:
        about["null_threshold"] = results.get("dev", {}).get("null_threshold", config.task.null_threshold)
    convert.save_model(folder, params, config.model, task.tokenizer, **about)
    summary = {"task": config.task.name, "step": step, "metrics": results, "seed": config.train.seed}
    if task.metric:
        summary["metric"] = task.metric
    checkpoint.write_json(os.path.join(workdir, "results.json"), summary)


def train(config: Config, workdir: str, *, resume: str = "auto", debug: bool = False) -> int:
    """Runs a configuration to its end, or to the signal that stops it. Returns the exit code of DESIGN: 0, 130, 143.

    Raises NonFiniteLossError, CheckpointError, DataError, StorageError and ConfigError with their remedies.
    """
    began = time.perf_counter()
    bucket = workdir if storage.is_remote(workdir) else ""
    import jax

    from bert_jax import hosts
    from bert_jax.process import keep_programs
    from bert_jax.sharding import check_batch, make_mesh

    keep_programs()
    jax.config.update("jax_debug_nans", debug)
    with contextlib.ExitStack() as stack:

        def open_workdir() -> None:
            if os.path.exists(workdir) and not os.path.isdir(workdir):
                raise StorageError(f"--workdir {workdir}: a file, not a folder")
            check_ours(bucket or workdir)
            os.makedirs(workdir, exist_ok=True)
            stack.enter_context(contextlib.closing(lock(workdir)))

        mesh = make_mesh(config.mesh)
        check_batch(config, mesh)
        if bucket:  # each host has a disk of its own
            workdir = hosts.together(lambda: storage.stage(bucket))
        hosts.from_first(open_workdir)
        if not hosts.is_first():
            log_to(os.path.join(workdir, "hosts", f"{jax.process_index()}.log"))
        stack.enter_context(jax.set_mesh(mesh))
        try:
            return run(config, workdir, bucket, mesh, resume, began)
        except jax.errors.JaxRuntimeError as error:  # so a collective says that a process has died
            if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise PeerError(f"another process of the run, or the network to it, is gone ({reason})") from error


def run(config: Config, workdir: str, bucket: str, mesh: Any, resume: str, began: float) -> int:
    """The run itself, in a workdir that is ours. Nothing in it is overwritten before the checkpoint is seen to fit.

    `bucket`, unless it is empty, is what the workdir is a copy of: it has the checkpoints, and is given the rest.
    `began` is when it was asked for (`time.perf_counter`).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bert_jax import checkpoint, hosts, plan
    from bert_jax.data import pipeline
    from bert_jax.evaluate import evaluate, evaluator
    from bert_jax.optimizer import build_optimizer, learning_rate_schedule, warmup_steps
    from bert_jax.recorder import Clock, Recorder
    from bert_jax.sharding import global_batch, host_arrays, local_rows, named_leaves
    from bert_jax.train_state import abstract_state, all_finite, create_state, jit_step

    folder, asked, first = checkpoint.checkpoints_folder(bucket or workdir), config, hosts.is_first()

    def carry_up() -> None:
        if bucket and first:
            storage.carry(workdir, bucket, leave=storage.CHECKPOINTS | {"hosts"})
        elif bucket:  # of the others their logs
            logs = os.path.join(workdir, "hosts")
            not_mine = frozenset(os.listdir(logs)) - {f"{jax.process_index()}.log"}
            storage.carry(logs, f"{bucket}/hosts", leave=not_mine)

    start = hosts.from_first(lambda: first_step(folder, resume))

    def set_up() -> tuple[Config, Any, Any, Any]:
        before = None if start is None else checkpoint.read_manifest(os.path.join(folder, str(start)))
        config, starting = fill_in(asked, workdir, before)
        return config, starting, before, task_module(config).build(config)

    config, starting, before, task = hosts.together(set_up)
    told = {"code": hosts.code_digest(), "configuration": config_lib.fingerprint(config_lib.to_dict(asked))}
    hosts.check_same(told | {"data": task.data_digest})
    num_steps = config_lib.total_steps(config, task.rows)
    if before is not None:
        check_resumed(config, task, before, num_steps)
    optimizer = build_optimizer(config.optimizer, config.model.num_layers)
    if warmup_steps(config.optimizer, num_steps) >= num_steps > 0:
        say(f"note: optimizer.warmup_steps {config.optimizer.warmup_steps} is not below the run's {num_steps} steps")
    size = f"{num_steps:,} steps of {config.train.global_batch_size} on {mesh.size} devices"
    if jax.process_count() > 1:
        size += f" of {jax.process_count()} processes"
    say(f"{config.task.name}: {task.facts}; {size}")

    with contextlib.ExitStack() as stack:
        manager = checkpoint.Checkpointer(folder, keep=config.train.keep)
        checkpoints = stack.enter_context(contextlib.closing(manager))
        if start is not None:
            state = checkpoints.restore(start, abstract_state(task.objective, optimizer, mesh))
            say(f"resumed at step {start:,}")
        else:
            state = create_state(task.objective, optimizer, mesh, config.train.seed)
            if task.first_params:
                state = with_params(state, task.first_params())
            if starting:
                state = start_from(state, starting, mesh, task.labels, task.problem, config.train.reinit_layers)
        hosts.from_first(lambda: write_beginning(config, workdir, task, new=start is None))
        hosts.together(carry_up)
        start = start or 0
        recorder = stack.enter_context(contextlib.closing(Recorder(workdir if first else None, start)))
        stop = stack.enter_context(stop_signals())

        clock = Clock()
        step_function = jit_step(task.objective, optimizer, mesh, accumulate=config.optimizer.accumulate)
        seed = np.uint32(config.train.seed)
        evaluate_batch = evaluator(task)
        peak = plan.peak_flops()
        # All at once: to ask the device for one would wait until the step that it works on is done.
        learning_rates = np.asarray(learning_rate_schedule(config.optimizer, num_steps)(jnp.arange(num_steps)))
        progress = Progress("train", num_steps, "steps", start=start)
        pending = None  # metrics of the step before: fetched while the device works on the next

        def finish(pending: tuple[int, dict]) -> dict[str, float]:
            step, metrics = pending
            values = record(task, metrics)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise not_finite(f"loss {values['loss']}, gradient norm {values['grad_norm']}", step)
            return values

        def log(values: dict[str, float], step: int) -> None:
            clock.examples += values.pop("examples")
            if step == start + 1:
                clock.first_step = time.perf_counter() - began
            if step % config.train.log_every == 0 or step == num_steps:
                lap = clock.lap()
                values["learning_rate"] = float(learning_rates[step - 1])
                values["examples_per_second"] = lap.examples / lap.seconds
                values["real_tokens_per_second"] = lap.tokens / lap.seconds
                values["data_wait_fraction"] = min(1.0, lap.waited / lap.seconds)
                if clock.first_step:
                    values["first_step_seconds"], clock.first_step = clock.first_step, 0.0
                if peak:
                    values["mfu"] = model_flops(config, lap.tokens) / lap.seconds / peak
                recorder.write(step, values)
            progress.update(step, f"loss {values['loss']:.4f}")

        def not_finite(what: str, step: int) -> NonFiniteLossError:
            remedy = f"; if step {saved} fails again, remove {os.path.join(folder, str(saved))}" if saved else ""
            return NonFiniteLossError(
                f"{what} at step {step}: lower optimizer.learning_rate or lengthen the warm-up, and resume{remedy}"
            )

        def save(step: int) -> None:
            if not all_finite(state.params):
                raise not_finite("parameters past all bounds", step)
            about = {"labels": task.labels, "problem": task.problem, "tokenizer": task.tokenizer.fingerprint}
            checkpoints.save(state, config=config, **about)
            carry_up()

        def evaluate_all(params: Any, step: int, *, last: bool, quiet: bool = False) -> dict[str, dict[str, float]]:
            """Scores of every set, of test sets and with prediction files only at the end; `quiet` records nothing."""
            results = {}
            for name in task.eval_sets:
                if name.startswith("test") and not last:
                    continue
                scores, outputs = evaluate(task, name, evaluate_batch, params, mesh)
                if outputs and last and first:
                    task.write_predictions(os.path.join(workdir, "predictions"), name, outputs)
                if name in task.unlabelled:
                    continue
                results[name] = scores
                if not all(math.isfinite(value) for value in scores.values()):
                    raise not_finite(f"{name} metrics {scores}", step)
                if name in ("dev", "eval") and not quiet:
                    recorder.write(step, {f"eval/{metric}": value for metric, value in scores.items()})
                if not quiet:
                    say(f"step {step:,} {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
            return results

        def choose(results: dict[str, dict[str, float]], step: int) -> None:
            """Notes the step with the best score on dev, in `best.json` and by keeping its checkpoint."""
            nonlocal best, saved
            if config.train.select != "best" or (best and results["dev"][task.metric] <= best["value"]):
                return
            if saved < step:
                save(step)
                saved = step
            checkpoints.wait()
            best = {"step": step, "metric": task.metric, "value": results["dev"][task.metric]}
            checkpoints.kept_step = step
            if first:
                checkpoint.write_json(os.path.join(workdir, "best.json"), best)

        settings, saved, step, stopping = config.train, start, start, False
        best = hosts.from_first(lambda: best_so_far(workdir, start))
        checkpoints.kept_step = best["step"] if best else None
        if settings.select == "best" and start and start % settings.eval_every == 0:
            choose(evaluate_all(state.params, start, last=False, quiet=True), start)  # a kill may have come before it
        batches = pipeline.stream(task.train_batch, start, num_steps)
        share = config.train.global_batch_size / max(1, len(local_rows(config.train.global_batch_size)))
        while step < num_steps and not stopping and not gave_up(settings, best, step):
            waiting = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - waiting
            state, metrics = step_function(state, global_batch(batch, mesh), seed, learning_rates[step])
            if pending is not None:
                log(finish(pending), step)
            step += 1
            clock.tokens += int((batch["segment_ids"] > 0).sum() * share)
            pending = step, metrics
            stopping = bool(stop) if jax.process_count() == 1 else hosts.asked_to_stop(step)
            evaluating, saving = (
                every > 0 and step % every == 0 for every in (settings.eval_every, settings.save_every)
            )
            if (evaluating or saving) and step < num_steps:
                log(finish(pending), step)  # a loss that is not finite must end the run before its state is saved
                pending = None
                with clock.excluding():
                    if evaluating:
                        choose(evaluate_all(state.params, step, last=False), step)
                    if saving and saved < step:
                        save(step)
                        saved = step
        if pending is not None:
            log(finish(pending), step)
        progress.close()
        if saved < step or not checkpoint.steps(folder):
            save(step)
            saved = step
        hosts.together(checkpoints.wait)  # or the others would be gone while the first one signs
        hosts.together(carry_up)
        if stopping:
            say(f"saved step {step:,} in {folder}; the same command goes on from there")
            return stop[0] if stop else PREEMPTED
        hosts.from_first(lambda: checkpoint.verify(os.path.join(folder, str(step))) and None)
        params, chosen = state.params, step
        if settings.select == "best":
            choose(evaluate_all(params, step, last=False), step)
            chosen = best["step"]
            say(f"step {chosen:,} is the best on dev: {task.metric} {best['value']:.4f}")
            if chosen != step:
                weights, _ = checkpoint.load_params(os.path.join(folder, str(chosen)))
                params = with_params(state, named_leaves(weights)).params
        results = evaluate_all(params, chosen, last=True, quiet=chosen != step)
        weights = host_arrays(params, mesh)
        hosts.from_first(lambda: export(config, workdir, weights, task, results, chosen, step))
        hosts.together(carry_up)
        place = bucket or workdir
        say(f"done: model in {os.path.join(place, 'model')}, results in {os.path.join(place, 'results.json')}")
    return 0


def best_so_far(workdir: str, start: int) -> dict[str, Any] | None:
    """What `best.json` says, unless the run goes on from before that step."""
    try:
        with open(os.path.join(workdir, "best.json"), encoding="utf-8") as file:
            best = json.load(file)
    except FileNotFoundError:
        return None
    return best if 0 < best["step"] <= start else None


def gave_up(settings: config_lib.TrainConfig, best: dict[str, Any] | None, step: int) -> bool:
    """Whether `early_stop` evaluations have not bettered the score."""
    return bool(best and settings.early_stop) and (step - best["step"]) // settings.eval_every >= settings.early_stop


def record(task: Any, metrics: dict[str, Any]) -> dict[str, float]:
    """Device metrics of a step -> plain numbers: loss, grad_norm, examples, and the task's means."""
    import jax

    from bert_jax.evaluate import means

    metrics = jax.device_get(metrics)
    values, losses = means([metrics["sums"]]), task.objective.losses
    return {
        "loss": sum(values.get(name, 0.0) for name in losses),
        "grad_norm": float(metrics["grad_norm"]),
        "examples": float(metrics["sums"][losses[-1]][1]),
        **values,
    }


def model_flops(config: Config, tokens: int) -> float:
    """FLOPs that `tokens` real tokens need."""
    from bert_jax import plan

    data = config.data
    masked = data.gather_width if config.task.name == "pretrain" else 0
    full = plan.step_flops(config.model, 1, data.max_seq_len, masked, 1)
    return full * tokens / data.max_seq_len


if __name__ == "__main__":
    run_command(main)
