"""Pre-training (Devlin et al. 2019, section 3.1): masked language model and next-sentence prediction on packed rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax import storage
from bert_jax.config import Config, ModelConfig, fingerprint
from bert_jax.data import cache, cooccurrence, packing, pipeline, prepare
from bert_jax.data.corpus import resolve_inputs
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.errors import ConfigError
from bert_jax.heads import ClassifierHead, MlmHead, Pooler
from bert_jax.progress import say
from bert_jax.sharding import local_rows
from bert_jax.tasks import (
    Batch,
    Objective,
    Params,
    Sums,
    Task,
    choose_tokenizer,
    encode,
    gather,
    init_encoder,
    loss_and_accuracy,
)

LOSSES = ("masked_lm_loss", "next_sentence_loss")
SETTLED = ("pack", "short_seq_prob", "dupe_factor", "eval_fraction")  # of DataConfig: once rows are prepared


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Encoder, pooler and both heads: embeddings, layers, pooler, mlm_head, nsp_head."""
    keys = jax.random.split(key, 4)
    hidden = jnp.zeros((1, config.hidden_size))
    table = jnp.zeros((config.padded_vocab_size, config.hidden_size))
    return init_encoder(config, keys[0]) | {
        "pooler": Pooler(config).init(keys[1], hidden)["params"],
        "mlm_head": MlmHead(config).init(keys[2], hidden, table)["params"],
        "nsp_head": ClassifierHead(config, 2).init(keys[3], hidden)["params"],
    }


def masked_lm_logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] scores of the vocabulary."""
    table = params["embeddings"]["token_embedding"]
    return MlmHead(config).apply({"params": params["mlm_head"]}, hidden, table)


def next_sentence_logits(config: ModelConfig, params: Params, first: jax.Array) -> jax.Array:
    """[..., D] vectors of [CLS] -> [..., 2] scores: 0 is the true next sentence, 1 a random one."""
    pooled = Pooler(config).apply({"params": params["pooler"]}, first)
    return ClassifierHead(config, 2).apply({"params": params["nsp_head"]}, pooled)


def forward(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """MLM logits [B, P, V] of the masked positions and NSP logits [B, E, 2] of the packed examples."""
    hidden = encode(config, params, batch, key)
    masked = gather(hidden, batch["masked_lm_positions"])  # [B, P, D]: the head on all positions costs a fifth more
    first = gather(hidden, batch["next_sentence_positions"])  # [B, E, D]
    return masked_lm_logits(config, params, masked), next_sentence_logits(config, params, first)


def sums(config: ModelConfig, params: Params, batch: Batch, key: jax.Array | None) -> Sums:
    """Loss and accuracy of both objectives, as sums over weighted positions and examples."""
    masked_lm, next_sentence = forward(config, params, batch, key)
    return loss_and_accuracy(
        "masked_lm", masked_lm, batch["masked_lm_ids"], batch["masked_lm_weights"]
    ) | loss_and_accuracy("next_sentence", next_sentence, batch["next_sentence_labels"], batch["next_sentence_weights"])


def weights(batch: Batch) -> dict[str, jax.Array]:
    """How many masked positions and examples a batch holds."""
    return {name: batch[name.replace("loss", "weights")].sum() for name in LOSSES}


def init_params(config: Config, key: jax.Array) -> Params:
    """`init` for a whole configuration."""
    return init(config.model, key)


def known_rows(config: Config) -> int | None:
    """Training rows of an epoch, if the text is prepared already; raises DataError if there is no such text."""
    if not cache.is_prepared(config.data.path):
        resolve_inputs([config.data.path])
        return None
    folder = storage.fetch(config.data.path)
    manifest = prepare.load_manifest(folder)
    check_fit(config, folder, manifest)
    return manifest["splits"]["train"]["rows"]


def complete(config: Config, tokenizer: str) -> Config:
    """Prepares raw text, so that `data.path` is a folder of rows, with `tokenizer` if the run starts from weights.

    A vocabulary that is trained here may find fewer pieces than asked for; the model then has as many as there are.
    """
    data = dataclasses.replace(config.data, tokenizer=choose_tokenizer(config.data.tokenizer, tokenizer))
    trained = not data.tokenizer and not cache.is_prepared(data.path)
    folder = cache.prepared_folder(data, config.model.vocab_size)
    manifest, model = prepare.load_manifest(folder), config.model
    if trained:
        model = dataclasses.replace(model, vocab_size=manifest["vocab_size"])
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(data, path=folder))
    check_fit(config, folder, manifest)
    settled = {name: manifest["settings"][name] for name in SETTLED}
    if other := [f"{name} {settled[name]}" for name in SETTLED if settled[name] != getattr(data, name)]:
        say(f"note: {folder} was prepared with {', '.join(other)}, which this run cannot change")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settled))


def objective(config: Config) -> Objective:
    """The functions above, bound to a configuration."""
    return Objective(
        init=functools.partial(init, config.model),
        sums=functools.partial(sums, config.model),
        weights=weights,
        losses=LOSSES,
        layers=config.model.layers_apart,
    )


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch, as `pipeline.train_batch` makes it."""
    data, rows = config.data, config.train.global_batch_size
    widths = {"examples": packing.max_examples_of(data.max_seq_len, data.pack), "masked": data.gather_width}
    integers = dict.fromkeys(("input_ids", "token_type_ids", "segment_ids", "position_ids"), data.max_seq_len)
    integers |= dict.fromkeys(("masked_lm_positions", "masked_lm_ids"), widths["masked"])
    integers |= dict.fromkeys(("next_sentence_positions", "next_sentence_labels"), widths["examples"])
    floats = {"masked_lm_weights": widths["masked"], "next_sentence_weights": widths["examples"]}
    return {name: jax.ShapeDtypeStruct((rows, width), jnp.int32) for name, width in integers.items()} | {
        name: jax.ShapeDtypeStruct((rows, width), jnp.float32) for name, width in floats.items()
    }


def build(config: Config) -> Task:
    """Opens the prepared rows and binds the functions above to them."""
    data, train, folder = config.data, config.train, config.data.path
    manifest = prepare.load_manifest(folder)
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    rows = pipeline.open_rows(folder, manifest, "train")
    held_out = pipeline.open_rows(folder, manifest, "eval")
    batch_size = train.global_batch_size
    share = {"share": local_rows(batch_size)}
    vocabulary = pipeline.masking_vocabulary(tokenizer, data.whole_word_masking)
    return Task(
        objective=objective(config),
        rows=len(rows),
        train_batch=lambda step: pipeline.train_batch(rows, vocabulary, data, batch_size, step, **share),
        eval_sets={
            "eval": lambda: pipeline.eval_batches(
                held_out, vocabulary, data, batch_size, limit=train.eval_batches, **share
            )
        }
        if len(held_out)
        else {},
        tokenizer=tokenizer,
        first_params=functools.partial(first_params, config.model, rows, vocabulary.regular, train.seed)
        if train.embedding_init == "cooccurrence"
        else None,
        data_digest=fingerprint(manifest),
        facts=f"{len(rows):,} rows of {data.max_seq_len}, {len(held_out):,} held out, from {folder}",
    )


def first_params(
    config: ModelConfig, rows: pipeline.PreparedRows, regular: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Tables of tokens [V, D] (pad rows are zeros) and positions, with the scale that random vectors would have."""
    say("first embeddings: from what stands together in the text")
    tokens = cooccurrence.token_vectors(rows, regular, config.hidden_size, seed)
    positions = sinusoids(config.max_position_embeddings, config.hidden_size)
    return {
        "embeddings/token_embedding": config.initializer_range
        * np.pad(tokens, ((0, config.padded_vocab_size - len(tokens)), (0, 0))),
        "embeddings/position_embedding": config.initializer_range * positions,
    }


def sinusoids(count: int, size: int) -> np.ndarray:
    """Sines and cosines of positions, float32 [count, size], mean square 1 (Vaswani et al. 2017, section 3.5).

    With them a token finds its neighbours before positions are learned.
    """
    waves = -(-size // 2)
    angle = np.arange(count)[:, None] / 10_000 ** (np.arange(waves) / waves)  # [count, waves]
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)[:, :size]
    return (2**0.5 * table).astype(np.float32)


def check_fit(config: Config, folder: str, manifest: dict) -> None:
    """Raises ConfigError where prepared rows and configuration do not belong together."""
    settings = manifest["settings"]
    if manifest["vocab_size"] != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, but {folder} was prepared with a vocabulary of "
            f"{manifest['vocab_size']}; set --model.vocab-size {manifest['vocab_size']}"
        )
    named = config.data.tokenizer
    if named and load_tokenizer(named).fingerprint != manifest["tokenizer_fingerprint"]:
        raise ConfigError(
            f"data.tokenizer: {folder} was prepared with another one than {named}; prepare the text again"
        )
    if settings["max_seq_len"] != config.data.max_seq_len:
        raise ConfigError(
            f"data.max_seq_len: {config.data.max_seq_len}, but {folder} holds rows of {settings['max_seq_len']}; "
            f"set --data.max-seq-len {settings['max_seq_len']} or prepare the text again"
        )
    if manifest["splits"]["train"]["rows"] == 0:
        raise ConfigError(f"data.path: {folder} holds no training rows; give more text")
