"""Weight files that others wrote -> arrays under Hugging Face's present names. Pickles are never read.

Formats: safetensors, one file or several with an index; Google's TensorFlow 1 checkpoints.
"""

import glob
import json
import os
import re
from typing import NamedTuple

import numpy as np

from bert_jax.errors import CheckpointError

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Pickle's opcode PROTO with its versions 2 to 5, and the zip archive that torch.save wraps around one.
_PICKLE_STARTS = (*(bytes([0x80, version]) for version in range(2, 6)), b"PK\x03\x04")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pth.tar", ".ckpt", ".pkl", ".pickle")
_SLOTS = re.compile(r"(^|/)(global_step|adam_[mv]|lamb_[mv]|beta[12]_power)$")  # of optimizers; others hang below
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # ranges that older versions saved
_BACKBONE = ("embeddings.", "encoder.", "pooler.")


class Weights(NamedTuple):
    """What a weight file holds."""

    tensors: dict[str, np.ndarray]
    """Hugging Face's name, with the `bert.` prefix -> array as it was saved."""
    ignored: tuple[str, ...]
    """What the file holds beside weights: names of buffers, and a word on optimizer slots."""


def google_prefix(path: str) -> str | None:
    """The prefix of the TensorFlow checkpoint at `path` (itself, or the only one in the folder); None without one."""
    if os.path.isfile(f"{path}.index"):
        return path
    if path.endswith(".index") and os.path.isfile(path):
        return path.removesuffix(".index")
    found = [name.removesuffix(".index") for name in sorted(glob.glob(f"{glob.escape(path)}/*.index"))]
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {len(found)} TensorFlow checkpoints; name one, {found[-1]} say")
    return found[0] if found else None


def has_safetensors(folder: str) -> bool:
    """Whether a folder holds safetensors weights under the usual names."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (SAFETENSORS, INDEX))


def refuse_pickles(path: str) -> None:
    """Raises CheckpointError where `path` is a pickle, or a folder whose weights are one and nothing else.

    Unpickling runs whatever code the file names; the first bytes tell one, whatever its name.
    """
    files = [path] if os.path.isfile(path) else sorted(glob.glob(f"{glob.escape(path)}/*"))
    for file in files:
        if not os.path.isfile(file) or (file != path and not file.endswith((*_PICKLE_ENDINGS, ".safetensors"))):
            continue
        with open(file, "rb") as stream:
            head = stream.read(9)
            # A safetensors header of 640 bytes, say, begins like a pickle too; its ninth byte is the brace of its JSON.
            # The oldest pickles begin like text: only their name tells them.
            if file.endswith(_PICKLE_ENDINGS) or (head.startswith(_PICKLE_STARTS) and head[8:] != b"{"):
                raise CheckpointError(
                    f"{file}: a Python pickle, which can run any code when it is read, so it is not; where you trust "
                    "it, load it with transformers and save it anew: save_pretrained writes model.safetensors"
                )


def read_safetensors(folder: str) -> Weights:
    """All tensors of a folder's `model.safetensors`, or of the files that its index names. Raises CheckpointError."""
    single, index = os.path.join(folder, SAFETENSORS), os.path.join(folder, INDEX)
    if os.path.isfile(single):
        return canonical(_read_file(single), single)
    try:
        with open(index, encoding="utf-8") as file:
            places = {str(name): os.fspath(part) for name, part in json.load(file)["weight_map"].items()}
        paths = {part: os.path.join(folder, part) for part in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error})") from error
    tensors: dict[str, np.ndarray] = {}
    for part, path in paths.items():
        if os.path.basename(part) != part or not os.path.isfile(path):
            raise CheckpointError(f"{index}: names {part}, which is not in the folder; fetch it too")
        tensors |= _read_file(path)
    if lost := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: {lost[0]} is not in {places[lost[0]]}, where it should be; fetch that again")
    return canonical(tensors, index)


def _read_file(path: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    refuse_pickles(path)
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from error


def read_google(prefix: str) -> Weights:
    """The variables of a TensorFlow 1 checkpoint of google-research/bert. Raises CheckpointError."""
    import bert_jax.data  # noqa: F401 - it quiets TensorFlow

    try:
        from tensorflow.errors import OpError
        from tensorflow.train import load_checkpoint
    except ImportError as error:
        raise CheckpointError(f"{prefix}: reading TensorFlow checkpoints needs tensorflow ({error})") from error
    try:
        reader = load_checkpoint(prefix)
        names = sorted(reader.get_variable_to_shape_map())
        kept = [name for name in names if not _SLOTS.search(name) and os.path.dirname(name) not in names]
        tensors = {_from_google(name): _turned(name, reader.get_tensor(name)) for name in kept}
    except (OpError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{prefix}: cannot be read as a TensorFlow checkpoint ({reason})") from error
    found, slots = canonical(tensors, prefix), len(names) - len(kept)
    return found._replace(ignored=(*found.ignored, f"{slots} variables of the optimizer")) if slots else found


def _turned(name: str, value: np.ndarray) -> np.ndarray:
    return value.T if name.endswith("/kernel") else value


def _from_google(name: str) -> str:
    """`bert/encoder/layer_0/output/dense/kernel` -> `bert.encoder.layer.0.output.dense.weight`."""
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name)
    heads = {"cls/seq_relationship": "cls.seq_relationship", "cls/squad": "qa_outputs", "": "classifier"}
    for scope, theirs in heads.items():  # linear maps that Google keeps [out, in], as Hugging Face does
        for leaf, kind in (("output_weights", "weight"), ("output_bias", "bias")):
            if name == f"{scope}/{leaf}".lstrip("/"):
                return f"{theirs}.{kind}"
    if name == "cls/predictions/output_bias":
        return "cls.predictions.bias"
    if re.fullmatch(r"bert/embeddings/\w+_embeddings", name):
        name += "/weight"
    return re.sub(r"/kernel$", "/weight", name).replace("/", ".")


def canonical(tensors: dict[str, np.ndarray], source: str) -> Weights:
    """Older spellings -> present ones: no `bert.` or a `module.` prefix, `gamma` and `beta`, the decoder's copies.

    Raises CheckpointError where two names mean one weight and differ, as in a model whose MLM decoder is not tied.
    """
    renamed: dict[str, np.ndarray] = {}
    ignored = []
    for name, value in sorted(tensors.items()):
        new = _present_name(name)
        if new in _BUFFERS:
            ignored.append(name)
        elif new in renamed and not np.array_equal(renamed[new], value):
            raise CheckpointError(f"{source}: {name} differs from {new}, to which a BERT ties it")
        else:
            renamed[new] = value
    return Weights(renamed, tuple(ignored))


def _present_name(name: str) -> str:
    name = name.removeprefix("module.")
    name = f"bert.{name}" if name.startswith(_BACKBONE) else name
    name = re.sub(r"(LayerNorm\.)gamma$", r"\1weight", name)
    name = re.sub(r"(LayerNorm\.)beta$", r"\1bias", name)
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return tied.get(name, name)
