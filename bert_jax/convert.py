"""Hugging Face's BERT layout <-> our parameters, from one table, both ways; and where any `--model` is found.

A *model directory* is Hugging Face's: config.json, model.safetensors and the tokenizer's files.
"""

import json
import os
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from bert_jax import checkpoint
from bert_jax.config import Config, DataConfig, ModelConfig, faults
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.errors import CheckpointError
from bert_jax.model import ACTIVATIONS
from bert_jax.sharding import named_leaves
from bert_jax.tasks import Params, classify, pretrain

WEIGHTS, SETTINGS = "model.safetensors", "config.json"

# Ours -> theirs. `kernel` becomes `weight`, transposed ([in, out] -> [out, in]); LayerNorm's scale and bias become
# weight and bias; a path under `layers/` is one slice of our stacked array for each number in {}.
MODULES = {
    "layers/attention/query": "bert.encoder.layer.{}.attention.self.query",
    "layers/attention/key": "bert.encoder.layer.{}.attention.self.key",
    "layers/attention/value": "bert.encoder.layer.{}.attention.self.value",
    "layers/attention/out": "bert.encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers/mlp/wi": "bert.encoder.layer.{}.intermediate.dense",
    "layers/mlp/wo": "bert.encoder.layer.{}.output.dense",
    "layers/mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "embeddings/norm": "bert.embeddings.LayerNorm",
    "pooler/dense": "bert.pooler.dense",
    "mlm_head/transform": "cls.predictions.transform.dense",
    "mlm_head/norm": "cls.predictions.transform.LayerNorm",
    "nsp_head/dense": "cls.seq_relationship",
    "classifier/dense": "classifier",
}
LEAVES = {
    "embeddings/token_embedding": "bert.embeddings.word_embeddings.weight",
    "embeddings/position_embedding": "bert.embeddings.position_embeddings.weight",
    "embeddings/token_type_embedding": "bert.embeddings.token_type_embeddings.weight",
    "mlm_head/bias": "cls.predictions.bias",
}
PADDED = ("embeddings/token_embedding", "mlm_head/bias")  # ours have rows that only pad the vocabulary
# ModelConfig field -> key of Hugging Face's config.json
SETTING_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "hidden_act": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}


class Model(NamedTuple):
    """Weights on the host and what belongs to them."""

    params: Params
    config: ModelConfig
    tokenizer: str
    """Path of the tokenizer's folder."""
    labels: tuple[str, ...]


def unflatten(flat: dict[str, np.ndarray]) -> Params:
    """Inverse of `named_leaves` for nested dictionaries."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def their_name(path: str) -> str:
    """Hugging Face's name of our parameter; `{}` stands for the layer number."""
    if path in LEAVES:
        return LEAVES[path]
    module, leaf = path.rsplit("/", 1)
    return f"{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def to_huggingface(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters -> their name -> array, without the rows that pad the vocabulary."""
    tensors = {}
    for path, value in named_leaves(params).items():
        value = np.asarray(value)
        if path in PADDED:
            value = value[: config.vocab_size]
        stacked = path.startswith("layers/")
        slices = value if stacked else [value]
        for number, part in enumerate(slices):
            tensors[their_name(path).format(number)] = np.ascontiguousarray(_to_theirs(path, part))
    return tensors


def _to_theirs(path: str, value: np.ndarray) -> np.ndarray:
    """[in..., out...] kernel -> [out, in] weight; biases are flattened; LayerNorm and tables stay."""
    if path.endswith("/kernel"):
        inputs = int(np.prod(value.shape[:2])) if path.endswith("attention/out/kernel") else value.shape[0]
        return value.reshape(inputs, -1).T
    return value.reshape(-1) if path.endswith("/bias") else value


def from_huggingface(tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> Params:
    """Their tensors -> those of our parameters in `shapes` (path -> shape) that they hold; pad rows are zeros."""
    found = {}
    for path, shape in shapes.items():
        name = their_name(path)
        stacked = path.startswith("layers/")
        names = [name.format(number) for number in range(shape[0])] if stacked else [name]
        if all(part in tensors for part in names):
            parts = [_to_ours(path, tensors[part], shape[1:] if stacked else shape, part) for part in names]
            found[path] = np.stack(parts) if stacked else parts[0]
    return unflatten(found)


def _to_ours(path: str, value: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    value = value.astype(np.float32)
    if path.endswith("/kernel"):
        value = value.T
    if path in PADDED and value.shape[0] <= shape[0] and value.shape[1:] == shape[1:]:
        return np.pad(value, [(0, shape[0] - value.shape[0])] + [(0, 0)] * (value.ndim - 1))
    if value.size != np.prod(shape):
        raise CheckpointError(f"{WEIGHTS}: {name} has shape {value.shape}, which does not fit {SETTINGS}")
    return value.reshape(shape)


def save_model(
    folder: str,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    labels: tuple[str, ...] = (),
    step: int = 0,
) -> None:
    """Writes a model directory, whole or not at all; one of that name is replaced."""
    from safetensors.numpy import save_file

    partial = f"{folder}.partial"  # one run a workdir, so a leftover is a dead run's
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    save_file(to_huggingface(params, config), os.path.join(partial, WEIGHTS), metadata={"format": "pt"})
    checkpoint.write_json(os.path.join(partial, SETTINGS), _to_settings(config, tokenizer, labels, step))
    tokenizer.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _to_settings(config: ModelConfig, tokenizer: Tokenizer, labels: tuple[str, ...], step: int) -> dict[str, Any]:
    settings = {theirs: getattr(config, ours) for ours, theirs in SETTING_NAMES.items()}
    settings |= {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification" if labels else "BertForPreTraining"],
        "pad_token_id": tokenizer.pad_id,
        "dtype": "float32",
        "bert_jax_step": step,
    }
    if labels:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {name: number for number, name in enumerate(labels)}
    return settings


def _from_settings(path: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The architecture that a config.json tells. Raises CheckpointError where it is not one that this encoder has."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = dict(json.load(file))
        config = ModelConfig(**{ours: settings[theirs] for ours, theirs in SETTING_NAMES.items() if theirs in settings})
        wrong = faults(Config(model=config, data=DataConfig(path="any", max_seq_len=8)))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a configuration ({error})") from error
    if config.hidden_act not in ACTIVATIONS:
        wrong.append(f"hidden_act {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}")
    positions = settings.get("position_embedding_type", "absolute")
    if positions != "absolute":
        wrong.append(f"position_embedding_type {positions!r} is not supported, only absolute")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}")
    return config, settings


def parameter_shapes(config: ModelConfig, num_labels: int = 0) -> dict[str, tuple[int, ...]]:
    """path -> shape of encoder, pooler, both pre-training heads and, with labels, the classifier."""
    key = jax.random.key(0)
    tree = jax.eval_shape(lambda: pretrain.init(config, key) | classify.init(config, max(1, num_labels), key))
    shapes = {path: leaf.shape for path, leaf in named_leaves(tree).items()}
    return {path: shape for path, shape in shapes.items() if num_labels or not path.startswith("classifier/")}


def load_model(path: str) -> Model:
    """Weights from a model directory, a workdir, or one of its checkpoint steps. Raises CheckpointError (exit 4)."""
    folder = os.fspath(path).rstrip("/")
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        return _load_directory(folder)
    if os.path.isfile(os.path.join(folder, checkpoint.MANIFEST)):
        return _load_step(folder)
    if os.path.isdir(checkpoint.checkpoints_folder(folder)):
        return _load_workdir(folder)
    raise CheckpointError(
        f"{path}: neither a model directory ({SETTINGS}, {WEIGHTS}) nor a workdir (checkpoints/) nor one of its steps"
    )


def _load_directory(folder: str) -> Model:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    settings_path, weights_path = os.path.join(folder, SETTINGS), os.path.join(folder, WEIGHTS)
    if not os.path.isfile(settings_path):
        raise CheckpointError(f"{settings_path}: missing, and {WEIGHTS} does not say how large the model is")
    config, settings = _from_settings(settings_path)
    try:
        tensors = load_file(weights_path)
    except SafetensorError as error:
        raise CheckpointError(f"{weights_path}: cannot be read ({error})") from error
    names = settings.get("id2label", {}) if "classifier.weight" in tensors else {}
    labels = tuple(names[key] for key in sorted(names, key=int))
    params = from_huggingface(tensors, parameter_shapes(config, len(labels)))
    if "layers" not in params or "embeddings" not in params:
        raise CheckpointError(f"{weights_path}: holds no BERT encoder")
    return Model(params, config, folder, labels)


def _load_step(folder: str) -> Model:
    params, manifest = checkpoint.load_params(folder)
    workdir = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
    return Model(params, manifest.config.model, os.path.join(workdir, "tokenizer"), manifest.labels)


def _load_workdir(folder: str) -> Model:
    """The exported model, unless training has gone on since."""
    steps_folder = checkpoint.checkpoints_folder(folder)
    newest = checkpoint.newest_whole(steps_folder, warn=lambda message: None)
    exported = os.path.join(folder, "model")
    if os.path.isfile(os.path.join(exported, WEIGHTS)):
        step = _from_settings(os.path.join(exported, SETTINGS))[1].get("bert_jax_step", 0)
        if newest is None or step >= newest:
            return _load_directory(exported)
    if newest is None:
        raise CheckpointError(f"{steps_folder}: no checkpoints")
    return _load_step(os.path.join(steps_folder, str(newest)))
