"""BERT-large (Devlin et al. 2019), 128 tokens a row.

    python -m bert_jax.train --config configs/pretrain_large.py --workdir W --data.path 'texts/*.txt'

For accelerators (bfloat16 products). The recipe is the paper's (appendix A.2): 256 rows, 1,000,000 steps, of which the
last tenth runs at 512 tokens with configs/pretrain_large_512.py. Not run by us to the end: no accelerator.
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096, dtype="bfloat16"),
        data=DataConfig(path="builtin"),
        optimizer=OptimizerConfig(),
        train=TrainConfig(
            global_batch_size=256, num_steps=900_000, eval_every=10_000, eval_batches=40, save_every=5000
        ),
    )
