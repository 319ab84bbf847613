"""Every setting of bert_jax, its type, its default and what it does.

A file in `configs/` returns a `Config` from `get_config()`; the command line overrides single fields
(`--optimizer.learning-rate 2e-5`); `validate` lists all faults at once.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bert_jax.errors import ConfigError

VOCAB_MULTIPLE = 128  # vocabulary rows are padded to this, so that every mesh and matrix unit divides them
MOST_SHARES = 8  # of the training state, where MeshConfig.fsdp is 0


@dataclass(frozen=True)
class ModelConfig:
    """Size and numerics of the encoder (Devlin et al. 2019, table 1 and appendix A.2)."""

    vocab_size: int = 30522
    """Pieces in the vocabulary; the tables are padded inside the model to a multiple of 128."""
    hidden_size: int = 768
    """Width of a token's vector (D)."""
    num_layers: int = 12
    """Transformer layers (L)."""
    num_heads: int = 12
    """Attention heads (N); head_dim is hidden_size / num_heads."""
    mlp_dim: int = 3072
    """Width inside the feed-forward block (F)."""
    max_position_embeddings: int = 512
    """Longest sequence the position table can address."""
    type_vocab_size: int = 2
    """Rows of the A/B table."""
    hidden_act: Literal["gelu_new", "gelu", "relu"] = "gelu_new"
    """Hugging Face's names: gelu_new is the tanh form (Google's BERT), gelu the erf form."""
    layer_norm_epsilon: float = 1e-12
    """Added to the variance in every LayerNorm."""
    hidden_dropout: float = 0.1
    """Dropout after the embeddings and after each block; rates are rounded to 1/256."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities; rounded to 1/256."""
    initializer_range: float = 0.02
    """Standard deviation of the truncated normal that makes the first weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters and optimizer stay float32."""
    attention: Literal["xla", "splash", "cudnn"] = "xla"
    """Attention back end: xla, splash (a TPU kernel, for rows of 512 and more), cudnn (GPUs, bfloat16). The latter two
    have no dropout, so attention_dropout must be 0 with them; on other devices xla computes the same."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again: nothing, whole layers, or all but matrix products."""
    scan_unroll: int = 0
    """Layers laid out per step of a loop over them; 0 trains without a loop, from layers taken apart (fast to run,
    slower to compile)."""

    @property
    def layers_apart(self) -> int:
        """Layers that a training program runs one by one, from parameters of their own; 0 where a loop runs all."""
        return 0 if self.scan_unroll else self.num_layers

    @property
    def head_dim(self) -> int:
        """Width of one attention head (H)."""
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows that the token table really has."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    path: str = ""
    """A prepared folder, or raw text (file, glob, folder, tfds:NAME, builtin) that is prepared into a cache."""
    tokenizer: str = ""
    """Tokenizer folder or file; empty trains a WordPiece vocabulary of model.vocab_size on the text first."""
    lowercase: bool = True
    """Lower-case, when a vocabulary is trained here."""
    strip_accents: bool = True
    """Strip accents, when a vocabulary is trained here."""
    language: str = "en"
    """Language code for splitting prose into sentences."""
    text_field: str = "text"
    """Key of the text in JSONL lines and TFDS examples."""
    documents: Literal["auto", "blank-line", "file", "line"] = "auto"
    """What separates documents in text files."""
    max_seq_len: int = 128
    """Tokens in a row (S)."""
    pack: bool = True
    """Several examples in a row; off gives one example a row, as Google's."""
    short_seq_prob: float = 0.1
    """Share of examples made shorter than they could be."""
    dupe_factor: int = 1
    """How often the corpus is cut into pairs, each time with other random choices."""
    eval_fraction: float = 0.02
    """Share of documents held out for evaluation."""
    mask_rate: float = 0.15
    """Share of the non-special tokens that are predicted."""
    max_predictions: int = 0
    """Gather width P of a row; 0 takes mask_rate * max_seq_len, rounded up to a multiple of 4."""
    whole_word_masking: bool = False
    """Mask all pieces of a word together."""
    workers: int = 0
    """Processes that prepare text; 0 takes all cores."""
    seed: int = 0
    """Seed of pairs, order and masks."""

    @property
    def gather_width(self) -> int:
        """Masked positions of a row, P."""
        slack = 4 if self.whole_word_masking else 0  # room for the last word
        width = math.ceil((self.mask_rate * self.max_seq_len + slack) / 4) * 4
        return self.max_predictions or min(width, self.max_seq_len)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule, defaults as in BERT's paper, appendix A.2 (Adam's epsilon from its code)."""

    name: Literal["adamw", "lamb"] = "adamw"
    """adamw, or lamb for very large batches (You et al. 2020)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up, if warmup_fraction is 0."""
    warmup_fraction: float = 0.0
    """Warm-up as a share of all steps; used when above 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls to 0 after warm-up."""
    weight_decay: float = 0.01
    """Decoupled decay; never on biases and LayerNorm."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    bias_correction: bool = True
    """Adam's bias correction; Google's BERT had none."""
    layer_decay: float = 1.0
    """Learning-rate factor from one layer to the one below; 1 treats all layers alike."""
    accumulate: int = 1
    """Micro-batches that make one global batch."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. -1 takes what the other axes leave."""

    data: int = -1
    """Copies of the training state, which share the batch."""
    fsdp: int = 0
    """Shares of the token table, the layers' kernels and their moments, put together once a step; the batch is split
    over this axis too. It has to divide head_dim. 0 takes 8, or what of 4 and 2 the devices of a slice allow."""
    tensor: int = 1
    """Shares of heads and MLP columns."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what it leaves behind."""

    global_batch_size: int = 256
    """Rows a step, over all devices and micro-batches."""
    num_steps: int = 1_000_000
    """Optimizer steps, if num_epochs is 0."""
    num_epochs: float = 0.0
    """Passes over the training rows; used when above 0."""
    log_every: int = 100
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_batches: int = 0
    """Held-out batches of one evaluation; 0 takes all."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Checkpoints kept."""
    seed: int = 0
    """Seed of first weights and dropout."""
    early_stop: int = 0
    """Evaluations (of dev, each eval_every steps) without a better score that end the run; 0 never does."""
    select: Literal["last", "best"] = "last"
    """Which weights are exported and judged on test: the last, or those with the best score on dev."""
    reinit_layers: int = 0
    """Top layers, and the pooler, that are made anew instead of taken from init_from (Zhang et al. 2021)."""
    embedding_init: Literal["normal", "cooccurrence"] = "normal"
    """First embeddings: random, as the paper's; or tokens from what stands together in the text and positions as
    sinusoids, which spares a short pre-training its plateau."""
    init_from: str = ""
    """Model directory, workdir or checkpoint whose weights start this run; its step and optimizer are not taken."""


FROM_FILES = ("classify", "regress", "ner", "squad")  # fine-tuning on files that the configuration names
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


@dataclass(frozen=True)
class TaskConfig:
    """What is learned, and for fine-tuning from which labels."""

    name: Literal["pretrain", *FROM_FILES, *GLUE, "all"] = "pretrain"
    """pretrain (masked language model and next sentence), classify (labels of a text or pair), regress (a number of
    one), ner (a label for each word), squad (answers as spans of a text), a task of GLUE, or all of GLUE."""
    data_dir: str = ""
    """Folder of train, dev and test; of GLUE that of the official files, without which it is read from TFDS."""
    train: str = ""
    """Labelled training file: CSV, TSV, JSONL or XML, told by its ending, or tfds:NAME/CONFIG:SPLIT; for ner columns as
    CoNLL's; for squad its JSON, or none to judge the model of train.init_from on dev and test."""
    dev: str = ""
    """File that models are judged on while they are made."""
    test: str = ""
    """File that the finished model is judged on."""
    text_column: str = "text"
    """Column of the text."""
    text_pair_column: str = ""
    """Column of the second text; empty when there is one text."""
    label_column: str = "label"
    """Column of the label."""
    multi_label: bool = False
    """Each text has any number of labels: a JSON list, or one cell in which label_separator stands between them."""
    version_2: bool = False
    """Questions may have no answer in their text, as in SQuAD 2.0; when none is given is tuned on dev."""
    label_separator: str = ","
    """What stands between the labels of a cell, with multi_label."""
    null_threshold: float = 0.0
    """Of SQuAD 2.0 without dev: by how much "no answer" must score above the best one; a finished model brings its own.
    """
    max_train_examples: int = 0
    """Use only this many training examples, drawn by train.seed; 0 uses all."""

    @property
    def files(self) -> dict[str, str]:
        """Those of "train", "dev" and "test" that are named, with their folder."""
        named = {"train": self.train, "dev": self.dev, "test": self.test}
        return {
            part: path if path.startswith("tfds:") else os.path.join(self.data_dir, path)
            for part, path in named.items()
            if path
        }


# Hugging Face's names of what a classifier's scores mean: one class, several labels, or numbers.
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class SweepConfig:
    """Values to try, each with each; several values make many runs, chosen by their score on dev."""

    learning_rate: tuple[float, ...] = ()
    """Peak learning rates; the paper's are 5e-5 3e-5 2e-5."""
    batch_size: tuple[int, ...] = ()
    """Global batch sizes; the paper's are 16 32."""
    num_epochs: tuple[float, ...] = ()
    """Passes over the training rows; the paper's are 2 3 4."""
    seeds: tuple[int, ...] = ()
    """Seeds of every point, for mean and standard deviation."""


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def cache_folder() -> Path:
    """What is made once and found again, prepared text and compiled programs: `$BERT_JAX_CACHE`, else the user's."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BERT_JAX_CACHE") or Path(user) / "bert_jax")


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run, from num_epochs where it is set; none without training rows."""
    if config.train.num_epochs > 0:
        steps = config.train.num_epochs * rows / config.train.global_batch_size
        if steps > LARGEST_COUNT:
            raise ConfigError(f"train.num_epochs: {config.train.num_epochs:g} make {steps:.3g} steps; ask for fewer")
        return max(min(rows, 1), round(steps))
    return config.train.num_steps


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary, as written to `config.json`."""
    return dataclasses.asdict(config)


def fingerprint(values: Any) -> str:
    """sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def from_dict(values: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """Inverse of `to_dict`. Raises ConfigError on an unknown key, with the nearest known one."""
    hints = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(f"unknown key {prefix}{unknown[0]}{did_you_mean(unknown[0], hints)}")
    return kind(**{key: _parsed(value, hints[key], f"{prefix}{key}.") for key, value in values.items()})


def _parsed(value: Any, hint: Any, prefix: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, prefix)
    return tuple(value) if typing.get_origin(hint) is tuple else value  # JSON has lists only


QUIET = frozenset(
    {"log_every", "eval_every", "eval_batches", "save_every", "keep", "init_from", "workers", "tokenizer"}
)


def differences(before: Config, after: Config, *, quiet: frozenset[str] = QUIET) -> list[str]:
    """`section.field: old -> new` for what changes the course of a run, but for the fields `quiet`: by default how
    often it logs, saves or evaluates, and what is seen to fit in other ways.
    """
    found = []
    for section, old in to_dict(before).items():
        new = dataclasses.asdict(getattr(after, section))
        found += [
            f"{section}.{key}: {old[key]} -> {value}"
            for key, value in new.items()
            if old[key] != value and key not in quiet and section not in ("mesh", "sweep")
        ]
    return found


def adopt(run: ModelConfig, weights: ModelConfig) -> ModelConfig:
    """The architecture of `weights` with what a run may choose freely: numerics, dropout, memory for time."""
    free = ("dtype", "attention", "remat", "scan_unroll", "hidden_dropout", "attention_dropout")
    return dataclasses.replace(weights, **{name: getattr(run, name) for name in free})


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`" (did you mean X?)"`, or nothing when no known word is near; `lr` is near to `learning_rate`."""
    known, asked = list(known), word.rsplit(".", 1)[-1]
    near = [name for name in known if len(asked) > 1 and asked == _initials(name.rsplit(".", 1)[-1])]
    near = near or difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.replace("-", "_").split("_"))


_ABOVE_ZERO = (
    *("model.vocab_size", "model.hidden_size", "model.num_layers", "model.num_heads", "model.mlp_dim"),
    *("model.max_position_embeddings", "model.type_vocab_size", "model.layer_norm_epsilon", "data.dupe_factor"),
    *("optimizer.learning_rate", "optimizer.epsilon", "optimizer.layer_decay", "optimizer.accumulate"),
    *("train.global_batch_size", "train.log_every", "train.save_every", "train.keep"),
)
_NOT_BELOW_ZERO = (
    *("model.scan_unroll", "model.initializer_range", "data.max_predictions", "data.workers", "data.seed"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm", "train.num_epochs"),
    *("train.eval_every", "train.eval_batches", "train.seed", "task.max_train_examples"),
    *("train.early_stop", "train.reinit_layers"),
)
_SHARES = (
    *("model.hidden_dropout", "model.attention_dropout", "data.short_seq_prob", "data.mask_rate"),
    *("data.eval_fraction", "optimizer.warmup_fraction", "optimizer.beta1", "optimizer.beta2"),
)
_LARGEST_SEED = 2**32 - 1
LARGEST_COUNT = 2**31 - 1  # steps and ids are int32
_MOST_DROPOUT = 255 / 256  # dropout is decided by a byte
_LARGEST_ROW = 2**16 - 1  # rows store lengths in 16 bits
_KINDS = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False"}


def type_faults(config: Config) -> list[str]:
    """Values that are not of their field's type: files of `configs/` and JSON can hold anything."""
    found = []
    for section, keys in to_dict(config).items():
        hints = typing.get_type_hints(type(getattr(config, section)))
        for key, value in keys.items():
            hint = hints[key]
            if typing.get_origin(hint) is tuple:
                kind = typing.get_args(hint)[0]
                wrong = [item for item in value if not _is_of(item, kind)]
                found += [f"{section}.{key}: {item!r} must be {_KINDS[kind]}" for item in wrong]
            elif typing.get_origin(hint) is Literal:
                known = typing.get_args(hint)
                if value not in known:
                    near = did_you_mean(str(value).lower(), known)
                    found.append(f"{section}.{key}: {value!r} is none of {', '.join(known)}{near}")
            elif not _is_of(value, hint):
                found.append(f"{section}.{key}: {value!r} must be {_KINDS[hint]}")
    return found


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value is of a field's type; a whole number is a float too, what is not finite is none."""
    return type(value) is kind and (kind is not float or math.isfinite(value)) or (kind is float and type(value) is int)


def faults(config: Config) -> list[str]:
    """Everything wrong with a configuration that can be told without data and devices: `key: fault, way out`."""
    if found := type_faults(config):
        return found
    values = {f"{section}.{key}": value for section, keys in to_dict(config).items() for key, value in keys.items()}
    found = [f"{key}: {values[key]} must be above 0" for key in _ABOVE_ZERO if not values[key] > 0]
    found += [f"{key}: {values[key]} must not be below 0" for key in _NOT_BELOW_ZERO if not values[key] >= 0]
    found += [f"{key}: {values[key]} must be at least 0 and below 1" for key in _SHARES if not 0 <= values[key] < 1]
    largest = (
        *((key, _LARGEST_SEED) for key in ("data.seed", "train.seed")),
        *((key, LARGEST_COUNT) for key in ("train.num_steps", "optimizer.warmup_steps", "model.vocab_size")),
        *((key, _MOST_DROPOUT) for key in ("model.hidden_dropout", "model.attention_dropout")),
        ("data.max_seq_len", _LARGEST_ROW),
    )
    found += [f"{key}: {values[key]}, but at most {most:.10g}" for key, most in largest if values[key] > most]
    return found + _contradictions(config)


def _contradictions(config: Config) -> list[str]:
    """Settings that are sound alone and not together."""
    model, data, train, mesh = config.model, config.data, config.train, config.mesh
    accumulate = config.optimizer.accumulate
    sweeps = any(dataclasses.astuple(config.sweep))
    without_dev = config.task.name in FROM_FILES and not config.task.dev
    axes = (mesh.data, mesh.fsdp, mesh.tensor)
    # A finished model of questions may be judged alone: of other tasks the training file tells the labels.
    judges = config.task.name == "squad" and train.init_from != "" and (config.task.dev or config.task.test) != ""
    checks = {
        f"model.num_heads: {model.num_heads} does not divide model.hidden_size {model.hidden_size}": (
            model.num_heads > 0 and model.hidden_size % model.num_heads
        ),
        f"model.attention: {model.attention} has no dropout; set --model.attention-dropout 0": (
            model.attention != "xla" and model.attention_dropout > 0
        ),
        f"data.max_seq_len: {data.max_seq_len} is longer than model.max_position_embeddings "
        f"{model.max_position_embeddings}; shorten the one or lengthen the other": (
            data.max_seq_len > model.max_position_embeddings
        ),
        f"data.max_seq_len: {data.max_seq_len} leaves no room for a pair; take 8 or more": data.max_seq_len < 8,
        f"data.max_predictions: {data.max_predictions} is more than data.max_seq_len {data.max_seq_len}": (
            data.max_predictions > data.max_seq_len
        ),
        f"train.global_batch_size: {train.global_batch_size} is not divisible by optimizer.accumulate {accumulate}": (
            accumulate > 0 and train.global_batch_size % accumulate
        ),
        "train.num_steps: set it, or train.num_epochs, above 0": train.num_steps <= 0 and train.num_epochs <= 0,
        f"mesh: axes {axes} must be 1 or more, fsdp may be 0, and at most one of them -1": (
            any(axis < 1 and axis != -1 for axis in (mesh.data, mesh.fsdp or 1, mesh.tensor)) or axes.count(-1) > 1
        ),
        f"mesh.tensor: {mesh.tensor} does not divide model.num_heads {model.num_heads}": (
            mesh.tensor > 0 and model.num_heads % mesh.tensor
        ),
        "task.train: name the training file (--help tells of which kind)": (
            config.task.name in FROM_FILES and not config.task.train and not judges
        ),
        "task.multi_label: a number is no label; use it with --task.name classify": (
            config.task.multi_label and config.task.name != "classify"
        ),
        "task.label_separator: must not be empty": config.task.multi_label and not config.task.label_separator,
        f"train.{'early_stop' if train.early_stop else 'select'}: needs scores on dev while training; set "
        "--train.eval-every, and --task.dev": (
            (train.early_stop > 0 or train.select == "best")
            and (not train.eval_every or without_dev or config.task.name == "pretrain")
        ),
        "train.early_stop: goes with --train.select best, the weights it waits for": (
            train.early_stop > 0 and train.select != "best"
        ),
        f"train.reinit_layers: {train.reinit_layers}, without --train.init-from all layers are new": (
            train.reinit_layers > 0 and not train.init_from
        ),
        "train.embedding_init: cooccurrence is for a pre-training from scratch; with --train.init-from, and for "
        "classify, use --train.embedding-init normal": (
            train.embedding_init == "cooccurrence" and (train.init_from != "" or config.task.name != "pretrain")
        ),
        "sweep: needs scores on dev; name --task.dev": sweeps and without_dev,
        f"task.max_train_examples: {config.task.name} takes all; cut the file": (
            config.task.max_train_examples > 0 and config.task.name in ("pretrain", "ner", "squad")
        ),
        "sweep: a value is there twice": any(
            len(set(values)) < len(values) for values in dataclasses.astuple(config.sweep)
        ),
        "sweep: it is for fine-tuning": sweeps and config.task.name == "pretrain",
        "sweep.num_epochs: all must be above 0": any(epochs <= 0 for epochs in config.sweep.num_epochs),
        "data.path: name a prepared folder or raw text ('builtin' is always there)": (
            config.task.name == "pretrain" and not data.path
        ),
    }
    return [message for message, wrong in checks.items() if wrong]


def validate(config: Config) -> Config:
    """Returns the configuration, or raises one ConfigError that lists all its faults."""
    found = faults(config)
    if found:
        raise ConfigError("; ".join(found))
    return config
