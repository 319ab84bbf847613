"""Evaluation over fixed batches: metric sums of each on the device, added up and divided on the host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bert_jax.model import separate_layers
from bert_jax.sharding import global_batch, put_together, replicate
from bert_jax.tasks import Batch, Params, Sums, Task


def means(sums: list[Sums]) -> dict[str, float]:
    """Sum over count of each metric, over all batches; a metric that saw nothing is left out."""
    host = jax.device_get(sums)
    added = {name: np.sum([part[name] for part in host], axis=0, dtype=np.float64) for name in host[0]} if host else {}
    return {name: float(total / count) for name, (total, count) in added.items() if count > 0}


def evaluator(task: Task) -> Callable[[Params, Batch], tuple[Sums, Any]]:
    """The compiled function (params, batch) -> (sums, outputs or None)."""

    @jax.jit
    def evaluate_batch(params: Params, batch: Batch) -> tuple[Sums, Any]:
        params = put_together(separate_layers(params, task.objective.layers))
        outputs = task.outputs(params, batch) if task.outputs else None
        sums = task.objective.sums(params, batch, None)
        return sums, jax.tree.map(replicate, outputs)  # every process scores all of them

    return evaluate_batch


def evaluate(
    task: Task, name: str, evaluate_batch: Callable, params: Params, mesh: Mesh
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of the evaluation set `name`, and its outputs in their order (empty for a task without)."""
    sums, collected = [], []
    for batch in task.eval_sets[name]():
        found, outputs = evaluate_batch(params, global_batch(batch, mesh))
        sums.append(found)
        if outputs is not None:
            collected.append(jax.device_get(outputs))
    metrics = means(sums)
    if not collected:
        return metrics, {}
    outputs = {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}
    rows = outputs.pop("rows")
    real = np.flatnonzero(rows >= 0)  # the others only fill a batch
    order = real[np.argsort(rows[real], kind="stable")]
    outputs = {name: values[order] for name, values in outputs.items()}
    return metrics | task.score(name, outputs), outputs
