"""BERT-mini (L=4, H=256) with a vocabulary of 8,192, on the 25,000 IMDb reviews that the demo prepares."""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            mlp_dim=1024,
            initializer_range=0.035,  # 0.02 is BERT's for 768: about half of 1/sqrt(hidden_size)
            hidden_dropout=0.0,  # a few passes over the text do not overfit
            attention_dropout=0.0,
        ),
        data=DataConfig(path="builtin", max_seq_len=128, mask_rate=0.25),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.05, beta2=0.98),
        train=TrainConfig(global_batch_size=32, num_steps=7000, log_every=100, eval_every=500, eval_batches=20),
    )
