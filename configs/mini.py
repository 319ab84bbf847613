"""Google's BERT-Mini (Turc et al. 2019): L=4, H=256, A=4. Pre-training on any text.

python -m bert_jax.train --config configs/mini.py --workdir W --data.path 'texts/*.txt'
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024),
        data=DataConfig(path="builtin"),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=64, num_steps=20_000, log_every=100, eval_every=2000),
    )
