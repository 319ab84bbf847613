"""BERT-base (Devlin et al. 2019), 512 tokens a row.

    python -m bert_jax.train --config configs/pretrain_base_512.py --workdir W --data.path 'texts/*.txt'

The second phase of configs/pretrain_base.py: the last 100,000 steps, at 512 tokens, starting from its weights with
--train.init-from. On TPUs attention runs in the splash kernel, which has no dropout; `--model.attention xla
--model.attention-dropout 0.1` is the paper's. Not run by us to the end: no accelerator.
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SPLASH = {"attention": "splash", "attention_dropout": 0.0}


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072, dtype="bfloat16", **SPLASH),
        data=DataConfig(path="builtin", max_seq_len=512),
        optimizer=OptimizerConfig(),
        train=TrainConfig(global_batch_size=256, num_steps=100_000, eval_every=5000, eval_batches=40, save_every=5000),
    )
