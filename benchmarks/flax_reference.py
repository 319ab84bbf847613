"""The plan of a plain reference, for `--plan`'s figures to stand against: transformers' FlaxBertForPreTraining.

    pip install '.[tpu]' transformers==4.57.1        # the last release with Flax
    python benchmarks/flax_reference.py [--topology v5e:2x4] [--rows 64] [--length 128] [--large]

What its own pre-training script does: bfloat16 activations, dropout 0.1, logits of the whole vocabulary at every
position, `optax.adamw`, parameters on every chip, the batch over all of them. The same estimator reads the compiled
program, and counts as model FLOPs those of our step of the same rows: masked positions only.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bert_jax import plan
from bert_jax.command import load_config
from bert_jax.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # in the order that the module takes them


def reference(config: Config) -> tuple[Any, Any]:
    """Its parameters' init, (key) -> tree, and its training step, for a model of our configuration's sizes."""
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import BertConfig, FlaxBertForPreTraining

    model, length = config.model, config.data.max_seq_len
    sizes = BertConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_dim,
    )
    module = FlaxBertForPreTraining(sizes, dtype=jnp.bfloat16, _do_init=False).module
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    fixed = {"head_mask": None, "return_dict": False}

    def init(key: jax.Array) -> tuple[dict, tuple]:
        ids = jnp.zeros((1, length), jnp.int32)
        params = module.init({"params": key, "dropout": key}, **dict.fromkeys(NAMES, ids), **fixed)["params"]
        return params, optimizer.init(params)

    def loss(params: dict, batch: dict, key: jax.Array) -> jax.Array:
        inputs = {name: batch[name] for name in NAMES}
        scores = module.apply({"params": params}, **inputs, **fixed, deterministic=False, rngs={"dropout": key})
        words, sentence = (
            optax.softmax_cross_entropy_with_integer_labels(part.astype(jnp.float32), batch[name])
            for part, name in zip(scores, ("labels", "is_random"), strict=True)
        )
        return (words * batch["weights"]).sum() / batch["weights"].sum() + sentence.mean()

    def step(state: tuple[dict, tuple], batch: dict, seed: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(state[0], batch, jax.random.key(seed))
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return init, step


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
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from bert_jax.sharding import compiler_options

    rows = args.rows * len(devices)
    config = load_config(str(CONFIGS / f"pretrain_{'large' if args.large else 'base'}.py"))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_seq_len=args.length),
        optimizer=dataclasses.replace(config.optimizer, accumulate=1),
        train=dataclasses.replace(config.train, global_batch_size=rows),
    )
    init, step = reference(config)
    mesh = Mesh(np.array(devices), ("data",))

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    batch = {name: jax.ShapeDtypeStruct((rows, args.length), jnp.int32) for name in (*NAMES, "labels")}
    batch["weights"] = jax.ShapeDtypeStruct((rows, args.length), jnp.float32)
    batch["is_random"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = placed(jax.eval_shape(lambda: init(jax.random.key(0))), PartitionSpec())
    seed = placed(jax.ShapeDtypeStruct((), jnp.int32), PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))
    compiled = plan.compile_for(jitted, mesh, state, placed(batch, PartitionSpec("data")), seed)
    print(plan.describe(plan.report_of(config, args.topology, chip, {"data": len(devices)}, compiled, None)))


if __name__ == "__main__":
    main()
