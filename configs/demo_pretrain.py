"""wip"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024),
        data=DataConfig(path="builtin", max_seq_len=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_steps=1000, log_every=50, save_every=500),
    )
