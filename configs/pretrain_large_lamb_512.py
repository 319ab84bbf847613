"""BERT-large in large batches with LAMB (You et al. 2020): 32,768 rows of 512 tokens.

    python -m bert_jax.train --config configs/pretrain_large_lamb_512.py --workdir W --train.init-from V --data.path P

The second phase of configs/pretrain_large_lamb.py, from its weights V. On TPUs attention runs in the splash kernel,
which has no dropout. Not run by us to the end: no accelerator.
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SPLASH = {"attention": "splash", "attention_dropout": 0.0}


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096, dtype="bfloat16", **SPLASH),
        data=DataConfig(path="builtin", max_seq_len=512),
        optimizer=OptimizerConfig(name="lamb", learning_rate=4e-3, warmup_fraction=0.128, accumulate=16),
        train=TrainConfig(global_batch_size=32_768, num_steps=1562, log_every=10, eval_every=500, save_every=200),
    )
