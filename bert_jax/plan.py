"""What a configuration costs, told without the hardware: parameters, memory, work of a step."""

import math
from typing import Any

import jax
import numpy as np

from bert_jax.config import Config, ModelConfig

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
