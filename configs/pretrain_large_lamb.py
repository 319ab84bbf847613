"""BERT-large in large batches with LAMB (You et al. 2020): 65,536 rows of 128 tokens.

    python -m bert_jax.train --config configs/pretrain_large_lamb.py --workdir W --data.path ROWS

For pods: 7,038 steps here, then 1,562 of configs/pretrain_large_lamb_512.py. `--optimizer.accumulate` makes the batch
of as many micro-batches as the memory asks for; `--plan v5e:16x16` tells. Not run by us to the end: no accelerator.
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096, dtype="bfloat16"),
        data=DataConfig(path="builtin"),
        optimizer=OptimizerConfig(name="lamb", learning_rate=6e-3, warmup_fraction=0.2843, accumulate=8),
        train=TrainConfig(global_batch_size=65_536, num_steps=7038, log_every=10, eval_every=500, save_every=200),
    )
