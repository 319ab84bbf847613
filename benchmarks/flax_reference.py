"""The plan of a plain reference, for `--plan`'s figures to stand against: transformers' FlaxBertForPreTraining.

    pip install '.[tpu]' transformers==4.57.1        # the last release with Flax
    python benchmarks/flax_reference.py [--topology v5e:2x4] [--rows 64] [--length 128] [--large]

What its own pre-training script does: bfloat16 activations, dropout 0.1, logits of the whole vocabulary at every
position, `optax.adamw`, parameters on every chip, the batch over all of them. The same estimator reads the compiled
program, and counts as model FLOPs those of our step of the same rows: masked positions only.
"""

import argparse
import math

from bert_jax import plan
from bert_jax.config import Config, DataConfig, ModelConfig, TrainConfig


def main() -> None:
    """Compiles the reference for a slice and prints its plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--rows", type=int, default=64, help="a chip (default: 64)")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--large", action="store_true", help="BERT-large (default: base)")
    args = parser.parse_args()
    chip = plan.chip_of(args.topology)
    devices = plan.topology_devices(args.topology, chip)

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from transformers import BertConfig, FlaxBertForPreTraining

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    model = FlaxBertForPreTraining(BertConfig(**sizes if args.large else {}), dtype=jnp.bfloat16, _do_init=False)
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    ids = jnp.zeros((1, args.length), jnp.int32)

    def init(key: jax.Array) -> dict:
        inputs = {"token_type_ids": ids, "position_ids": ids, "head_mask": None, "return_dict": False}
        return model.module.init({"params": key, "dropout": key}, ids, ids, **inputs)["params"]

    def loss(params: dict, batch: dict, key: jax.Array) -> jax.Array:
        keys = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        words, next_sentence = model.module.apply(
            {"params": params},
            *(batch[name] for name in keys),
            head_mask=None,
            deterministic=False,
            return_dict=False,
            rngs={"dropout": key},
        )
        masked = optax.softmax_cross_entropy_with_integer_labels(words.astype(jnp.float32), batch["labels"])
        nsp = optax.softmax_cross_entropy_with_integer_labels(next_sentence.astype(jnp.float32), batch["is_random"])
        return (masked * batch["weights"]).sum() / batch["weights"].sum() + nsp.mean()

    def step(params: dict, opt_state: tuple, batch: dict, seed: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, batch, jax.random.key(seed))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def placed(tree: object, sharding: NamedSharding) -> object:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    rows = args.rows * len(devices)
    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")
    batch = {name: jax.ShapeDtypeStruct((rows, args.length), jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct((rows, args.length), jnp.float32)
    batch["is_random"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = placed(params, whole), placed(jax.eval_shape(optimizer.init, params), whole)
    seed = placed(jax.ShapeDtypeStruct((), jnp.int32), whole)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = plan.compile_for(jitted, mesh, *state, placed(batch, split), seed)
    ours = {name.replace("num_hidden_", "num_"): size for name, size in sizes.items()} if args.large else {}
    ours = {name.replace("attention_", "").replace("intermediate_size", "mlp_dim"): ours[name] for name in ours}
    config = Config(
        model=ModelConfig(**ours),
        data=DataConfig(max_seq_len=args.length),
        train=TrainConfig(global_batch_size=rows),
    )
    assert math.prod(mesh.devices.shape) == len(devices)
    print(plan.describe(plan.report_of(config, args.topology, chip, {"data": len(devices)}, compiled, None)))


if __name__ == "__main__":
    main()
