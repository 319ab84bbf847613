"""Hugging Face's and Google's BERTs <-> our parameters, from one table, both ways; and where any `--model` is found.

    python -m bert_jax.convert --input HF_DIR|W|GOOGLE_PREFIX --output DIR [--to huggingface|orbax]

A *model directory* is Hugging Face's: config.json, model.safetensors and the tokenizer's files.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bert_jax import storage
from bert_jax.config import PROBLEMS, Config, ModelConfig, faults
from bert_jax.errors import CheckpointError, CommandParser, ConfigError, StorageError, run_command

if TYPE_CHECKING:
    from bert_jax.data.tokenizer_model import Tokenizer
    from bert_jax.tasks import Params
    from bert_jax.weights import Weights

SETTINGS, GOOGLE_SETTINGS = "config.json", "bert_config.json"

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
    "tagger/dense": "classifier",
    "span_head/dense": "qa_outputs",
}
LEAVES = {
    "embeddings/token_embedding": "bert.embeddings.word_embeddings.weight",
    "embeddings/position_embedding": "bert.embeddings.position_embeddings.weight",
    "embeddings/token_type_embedding": "bert.embeddings.token_type_embeddings.weight",
    "mlm_head/bias": "cls.predictions.bias",
}
PADDED = ("embeddings/token_embedding", "mlm_head/bias")  # ours have rows that only pad the vocabulary
# Class of transformers -> the modules that it has beside the encoder. A tree is of the first of which it has all, else
# of the last.
CLASSES = {
    "BertForSequenceClassification": ("pooler", "classifier"),
    "BertForTokenClassification": ("tagger",),
    "BertForQuestionAnswering": ("span_head",),
    "BertForPreTraining": ("pooler", "mlm_head", "nsp_head"),
    "BertForNextSentencePrediction": ("pooler", "nsp_head"),
    "BertForMaskedLM": ("mlm_head",),
    "BertModel": ("pooler",),
}
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
# Other names of the two forms of GELU in files of Hugging Face.
ACTIVATION_NAMES = {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}


class Model(NamedTuple):
    """Weights on the host and what belongs to them."""

    params: "Params"
    config: ModelConfig
    tokenizer: str
    """Path of the tokenizer's folder."""
    labels: tuple[str, ...]
    problem: str = PROBLEMS[0]
    """What a classifier's scores mean: one of PROBLEMS."""
    null_threshold: float | None = None
    """Of a model that may find no answer: by how much "none" must score above the best one; None: it always answers."""
    ignored: tuple[str, ...] = ()
    """Names in the file that were not taken."""


def their_name(path: str) -> str:
    """Hugging Face's name of our parameter; `{}` stands for the layer number."""
    if path in LEAVES:
        return LEAVES[path]
    module, leaf = path.rsplit("/", 1)
    return f"{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def their_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Hugging Face's name of each slice of our parameter of that shape: one a layer, or just one."""
    name = their_name(path)
    return [name.format(number) for number in range(shape[0])] if path.startswith("layers/") else [name]


def to_huggingface(params: "Params", config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters -> their name -> array, without the rows that pad the vocabulary. Traceable."""
    from bert_jax.sharding import named_leaves

    tensors = {}
    for path, value in named_leaves(params).items():
        if path in PADDED:
            value = value[: config.vocab_size]
        slices = value if path.startswith("layers/") else [value]
        for name, part in zip(their_names(path, value.shape), slices, strict=True):
            tensors[name] = _to_theirs(path, part)
    return tensors


def _to_theirs(path: str, value: np.ndarray) -> np.ndarray:
    """[in..., out...] kernel -> [out, in] weight; biases are flattened; LayerNorm and tables stay."""
    shape = _their_shape(path, value.shape)
    return value.reshape(shape[::-1]).T if path.endswith("/kernel") else value.reshape(shape)


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one slice of our parameter has in their file, pad rows included."""
    size = math.prod(shape)
    if path.endswith("/kernel"):
        inputs = shape[0] * shape[1] if path.endswith("attention/out/kernel") else shape[0]
        return size // inputs, inputs
    return (size,) if path.endswith("/bias") else shape


def from_huggingface(
    tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], vocab_size: int, numpy: Any = np
) -> "Params":
    """Their tensors -> those modules of `shapes` (path -> shape) that they hold; pad rows are zeros.

    Traceable with `numpy=jax.numpy`.

    Raises CheckpointError when a module is there in part, or a tensor of another shape than `shapes` and `vocab_size`
    ask for.
    """
    from bert_jax.sharding import unflatten

    names = {path: their_names(path, shape) for path, shape in shapes.items()}
    held = {path.split("/")[0] for path, parts in names.items() if any(part in tensors for part in parts)}
    found = {}
    for path, shape in shapes.items():
        if path.split("/")[0] not in held:
            continue
        absent = [part for part in names[path] if part not in tensors]
        if absent:
            raise CheckpointError(f"{absent[0]} is missing, though other weights of {path.split('/')[0]} are there")
        stacked = path.startswith("layers/")
        part_shape = shape[1:] if stacked else shape
        wanted = _their_shape(path, (vocab_size, *shape[1:]) if path in PADDED else part_shape)
        for part in names[path]:
            if tensors[part].shape != wanted:
                raise CheckpointError(f"{part} has shape {tensors[part].shape}, {SETTINGS} asks for {wanted}")
            if tensors[part].dtype.name not in ("float32", "float16", "bfloat16"):
                raise CheckpointError(f"{part} holds {tensors[part].dtype} numbers; save the weights as float32")
        parts = [_to_ours(path, tensors[part].astype(np.float32), part_shape, numpy) for part in names[path]]
        found[path] = numpy.stack(parts) if stacked else parts[0]
    return unflatten(found)


def _to_ours(path: str, value: np.ndarray, shape: tuple[int, ...], numpy: Any) -> np.ndarray:
    """Inverse of `_to_theirs`; `shape` is ours, with pad rows."""
    if path in PADDED:
        return numpy.pad(value, [(0, shape[0] - value.shape[0])] + [(0, 0)] * (value.ndim - 1))
    return (value.T if path.endswith("/kernel") else value).reshape(shape)


def save_model(
    folder: str,
    params: "Params",
    config: ModelConfig,
    tokenizer: "Tokenizer",
    *,
    labels: tuple[str, ...] = (),
    problem: str = PROBLEMS[0],
    null_threshold: float | None = None,
    step: int = 0,
) -> None:
    """Writes a model directory, whole or not at all; one of that name is replaced."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from bert_jax.checkpoint import partial_folder, write_json
    from bert_jax.weights import SAFETENSORS

    folder = os.path.abspath(folder)
    partial = partial_folder(folder)
    os.makedirs(partial)
    tensors = {name: np.ascontiguousarray(value) for name, value in to_huggingface(params, config).items()}
    settings = to_settings(config, tuple(params), labels, problem) | {
        "pad_token_id": tokenizer.pad_id,
        "bert_jax_step": step,
    }
    if null_threshold is not None:
        settings["null_threshold"] = null_threshold
    try:
        save_file(tensors, os.path.join(partial, SAFETENSORS), metadata={"format": "pt"})
        write_json(os.path.join(partial, SETTINGS), settings)
        tokenizer.save(partial, longest=config.max_position_embeddings)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except SafetensorError as error:
        raise StorageError(f"{folder}: the weights cannot be written ({error}); make room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def class_of(modules: Iterable[str]) -> str:
    """The class of transformers for a tree with these top-level modules."""
    return next((name for name, its in CLASSES.items() if set(its) <= set(modules)), "BertModel")


def to_settings(
    config: ModelConfig, modules: tuple[str, ...], labels: tuple[str, ...], problem: str = PROBLEMS[0]
) -> dict[str, Any]:
    """Hugging Face's config.json of a tree with these top-level modules."""
    settings = {theirs: getattr(config, ours) for ours, theirs in SETTING_NAMES.items()}
    settings |= {"model_type": "bert", "architectures": [class_of(modules)], "dtype": "float32"}
    if "classifier" in modules:
        settings["problem_type"] = problem
    if labels:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {name: number for number, name in enumerate(labels)}
    return settings


def read_settings(path: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The architecture that a config.json tells. Raises CheckpointError where it is not one that this encoder has."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = dict(json.load(file))
        known = {ours: settings[theirs] for ours, theirs in SETTING_NAMES.items() if theirs in settings}
        known["hidden_act"] = _activation(path, settings)
        _check_types(settings)
        config = ModelConfig(**known)
        # A bound that no published model nears, so that sizes of a damaged file do not reach the compiler.
        wrong = [f"{SETTING_NAMES[name]} {size} is out of bounds" for name, size in known.items() if _is_huge(size)]
        wrong += [fault for fault in faults(Config(model=config)) if fault.startswith("model.")]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, and the weights do not say how the model is built") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a configuration ({error})") from error
    for key, wanted in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
        if settings.get(key) not in (None, wanted):
            wrong.append(f"{key} {settings[key]!r} is not supported, only {wanted}")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}")
    return config, settings


def _is_huge(size: Any) -> bool:
    return isinstance(size, int) and size > 2**24


def _check_types(settings: dict[str, Any]) -> None:
    """Raises TypeError where the settings that are not ModelConfig's have another type than they should."""
    for key, wanted in (("id2label", dict), ("architectures", list), ("bert_jax_step", int)):
        if not isinstance(settings.get(key) or wanted(), wanted):
            raise TypeError(f"{key} is {settings[key]!r}, no {wanted.__name__}")


def _activation(path: str, settings: dict[str, Any]) -> str:
    """Our name. Google's code calls the tanh form gelu, Hugging Face's the erf form."""
    name = settings.get("hidden_act", "gelu")
    if os.path.basename(path) == GOOGLE_SETTINGS and name == "gelu":
        return "gelu_new"
    return ACTIVATION_NAMES.get(name, name)


def parameter_shapes(config: ModelConfig, heads: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """path -> shape of encoder, pooler, the pre-training heads and `heads` (module -> number of labels)."""
    import jax

    from bert_jax.heads import ClassifierHead
    from bert_jax.sharding import named_leaves
    from bert_jax.tasks import pretrain

    key, hidden = jax.random.key(0), np.zeros((1, config.hidden_size), np.float32)
    trees = {
        name: jax.eval_shape(lambda labels=labels: ClassifierHead(config, labels).init(key, hidden)["params"])
        for name, labels in heads.items()
    }
    trees |= jax.eval_shape(lambda: pretrain.init(config, key))
    return {path: leaf.shape for path, leaf in named_leaves(trees).items()}


def load_model(path: str) -> Model:
    """Weights from a model directory, a workdir, one of its steps, or a TensorFlow 1 checkpoint.

    Raises CheckpointError (exit 4).
    """
    from bert_jax import checkpoint, weights

    folder = _fetched(os.fspath(path).rstrip("/"))
    if weights.has_safetensors(folder):
        return _load_directory(folder)
    if (prefix := weights.google_prefix(folder)) is not None:
        return _load_google(prefix)
    for place in (folder, checkpoint.checkpoints_folder(folder)):
        weights.refuse_pickles(place)
    if os.path.isfile(os.path.join(folder, checkpoint.MANIFEST)):
        return _load_step(folder)
    if os.path.isdir(checkpoint.checkpoints_folder(folder)):
        return _load_workdir(folder)
    raise CheckpointError(
        f"{path}: neither a model directory ({SETTINGS}, {weights.SAFETENSORS}) nor a workdir (checkpoints/) "
        "nor one of its steps nor the prefix of a TensorFlow checkpoint"
    )


def _fetched(path: str) -> str:
    """Of a bucket's workdir the finished model and the newest step, of a step also its tokenizer, else the folder."""
    from bert_jax import checkpoint

    if not storage.is_remote(path):
        return path
    with storage.reached(path):
        place = storage.place(path)
        folder = checkpoint.checkpoints_folder(path)
        if steps := checkpoint.steps(folder):
            finished = (n for n in steps if (storage.place(folder) / str(n) / checkpoint.MANIFEST).exists())
            wanted = ("model", "tokenizer", f"checkpoints/{next(finished, steps[0])}")
            wanted = [f"{path}/{name}" for name in wanted if (place / name).exists()]
        elif (place / checkpoint.MANIFEST).exists():
            wanted = [path, f"{path.rsplit('/', 2)[0]}/tokenizer"]
        else:  # a prefix of Google's checkpoints is no folder
            wanted = [path if place.is_dir() else path.rsplit("/", 1)[0]]
        for one in wanted:
            storage.fetch(one)
    return str(storage.cached(path))


def _load_directory(folder: str) -> Model:
    from bert_jax import weights

    config, settings = read_settings(os.path.join(folder, SETTINGS))
    return _assemble(weights.read_safetensors(folder), config, settings, folder)


def _load_google(prefix: str) -> Model:
    from bert_jax import weights

    folder = os.path.dirname(prefix) or "."
    path = next((p for name in (GOOGLE_SETTINGS, SETTINGS) if os.path.isfile(p := os.path.join(folder, name))), None)
    config, settings = read_settings(path or os.path.join(folder, GOOGLE_SETTINGS))
    return _assemble(weights.read_google(prefix), config, settings, folder)


def _assemble(found: "Weights", config: ModelConfig, settings: dict[str, Any], folder: str) -> Model:
    """Puts tensors into our tree; what it has no place for is ignored."""
    from bert_jax.sharding import named_leaves

    tensors = found.tensors
    try:
        heads, labels = _label_heads(tensors, settings)
    except ValueError as error:
        raise CheckpointError(f"{os.path.join(folder, SETTINGS)}: {error}") from error
    shapes = parameter_shapes(config, heads)
    try:
        params = from_huggingface(tensors, shapes, config.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if "layers" not in params or "embeddings" not in params:
        raise CheckpointError(f"{folder}: the weights hold no BERT encoder")
    for path, value in named_leaves(params).items():
        if not np.isfinite(value.sum()):  # the sum shows a NaN or an infinity anywhere
            raise CheckpointError(f"{folder}: {their_name(path)} holds a number that is not finite")
    taken = {name for path, shape in shapes.items() for name in their_names(path, shape)}
    left = sorted(tensors.keys() - taken)
    if beyond := [name for name in left if name.startswith("bert.encoder.layer.")]:
        raise CheckpointError(
            f"{folder}: {beyond[0]} is no weight of a BERT layer, or beyond the {config.num_layers} of {SETTINGS}"
        )
    threshold = settings.get("null_threshold")
    if threshold is not None and type(threshold) not in (int, float):
        raise CheckpointError(f"{os.path.join(folder, SETTINGS)}: null_threshold {threshold!r} is no number")
    problem, ignored = _problem(settings, len(labels)), (*found.ignored, *left)
    return Model(params, config, folder, labels, problem, threshold, ignored)


def _problem(settings: dict[str, Any], labels: int) -> str:
    """What the scores of a classifier mean; one score alone can only be a number (transformers reads it so too)."""
    named = settings.get("problem_type")
    return named if named in PROBLEMS else PROBLEMS[2] if labels == 1 else PROBLEMS[0]


def _label_heads(tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The heads with labels (module -> their number), and the labels' names.

    A sequence's and a token's classifier have one name in their files; the latter has no pooler.

    Raises ValueError when the classifier is of another kind, or two labels have one name.
    """
    heads = {"span_head": 2} if "qa_outputs.weight" in tensors else {}
    if "classifier.weight" not in tensors:
        return heads, ()
    kind = next(iter(settings.get("architectures") or ["BertForSequenceClassification"]))
    if kind not in CLASSES:
        raise ValueError(f"{kind} has a classifier that is neither of whole texts nor of words")
    of_tokens = kind == "BertForTokenClassification" or "bert.pooler.dense.weight" not in tensors
    count = tensors["classifier.weight"].shape[0]
    names = {int(number): str(name) for number, name in (settings.get("id2label") or {}).items()}
    labels = tuple(names.get(number, f"LABEL_{number}") for number in range(count))
    if len(set(labels)) < count:
        raise ValueError(f"id2label: two labels have one name: {', '.join(labels)}; rename one")
    return heads | {"tagger" if of_tokens else "classifier": count}, labels


def _load_step(folder: str) -> Model:
    from bert_jax import checkpoint

    params, manifest = checkpoint.load_params(folder)
    workdir = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
    tokenizer = os.path.join(workdir, "tokenizer")
    threshold = 0.0 if manifest.config.task.version_2 else None  # the tuned one is the finished model's
    return Model(params, manifest.config.model, tokenizer, manifest.labels, manifest.problem, threshold)


def _load_workdir(folder: str) -> Model:
    """The exported model, unless training has gone on since."""
    from bert_jax import checkpoint, weights
    from bert_jax.progress import say

    exported, step = os.path.join(folder, "model"), -1
    if weights.has_safetensors(exported):
        step = read_settings(os.path.join(exported, SETTINGS))[1].get("bert_jax_step", 0)
    steps_folder = checkpoint.checkpoints_folder(folder)
    newest = checkpoint.newest_whole(steps_folder, warn=say, after=step)
    if newest is None and step >= 0:
        return _load_directory(exported)
    if newest is None:
        raise CheckpointError(f"{steps_folder}: no checkpoints")
    return _load_step(os.path.join(steps_folder, str(newest)))


def table(loaded: dict[str, Any], new: dict[str, Any], ignored: tuple[str, ...]) -> str:
    """What came from a file (path -> array), what did not, and what the file held besides; a line a module."""
    rows = []
    for state, arrays in (("loaded", loaded), ("newly made", new)):
        for module in dict.fromkeys(path.split("/")[0] for path in arrays):
            mine = [array for path, array in arrays.items() if path.split("/")[0] == module]
            rows.append((state, module, f"{sum(int(np.prod(array.shape)) for array in mine):,} parameters"))
    rows += [("ignored", name, "") for name in ignored]
    return "\n".join(f"  {state:<11}{name:<28}{count}".rstrip() for state, name, count in rows)


def only(model: Model, kind: str) -> Model:
    """The model with the modules of one class of transformers alone. Raises ConfigError when it lacks one."""
    kept = ("embeddings", "layers", *CLASSES[kind])
    if absent := [name for name in kept if name not in model.params]:
        raise ConfigError(f"--as {kind}: the model has no {absent[0]}, only {', '.join(model.params)}")
    dropped = tuple(name for name in model.params if name not in kept)
    params = {name: model.params[name] for name in kept}
    labels = model.labels if {"classifier", "tagger"} & set(kept) else ()
    return model._replace(params=params, labels=labels, ignored=(*model.ignored, *dropped))


def main(argv: list[str]) -> int:
    """Converts a model directory, workdir, checkpoint step or TensorFlow 1 checkpoint."""
    parser = CommandParser(prog="python -m bert_jax.convert", description=main.__doc__)
    parser.add_argument("--input", required=True, help="model directory, workdir, step, or prefix of a TF1 checkpoint")
    parser.add_argument("--output", required=True, help="folder to make; it must not be there")
    parser.add_argument("--to", choices=("huggingface", "orbax"), default="huggingface", help="default: huggingface")
    parser.add_argument("--as", dest="kind", choices=tuple(CLASSES), help="keep only the modules that this class has")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if not args.output.strip() or os.path.lexists(args.output):
        raise ConfigError(f"--output {args.output!r} is there already; remove it or give another")
    from bert_jax import checkpoint
    from bert_jax.data.tokenizer_model import load_tokenizer
    from bert_jax.sharding import named_leaves

    model = load_model(args.input)
    if args.kind:
        model = only(model, args.kind)
    tokenizer = load_tokenizer(model.tokenizer)
    if args.to == "huggingface":
        about = {"labels": model.labels, "problem": model.problem, "null_threshold": model.null_threshold}
        save_model(args.output, model.params, model.config, tokenizer, **about)
    else:
        checkpoint.save_params(
            args.output, model.params, model.config, tokenizer, labels=model.labels, problem=model.problem
        )
    print(f"{args.input} -> {args.output}", file=sys.stderr)
    print(table(named_leaves(model.params), {}, model.ignored), file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
