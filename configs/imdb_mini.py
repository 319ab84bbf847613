"""wip"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024),
        data=DataConfig(path="builtin", max_seq_len=64),
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_steps=6000, log_every=100, eval_every=1000, eval_batches=20),
    )
