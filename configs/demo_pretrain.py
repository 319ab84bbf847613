"""The demo's first half: a two-layer BERT of 128 on IMDb reviews, made to finish in minutes on two CPU cores."""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            mlp_dim=512,
            initializer_range=0.05,  # BERT's 0.02 is about half of 1/sqrt(hidden_size) at 768; so is this at 128
            hidden_dropout=0.0,  # a model this small, which sees its text about once, does not overfit
            attention_dropout=0.0,
        ),
        data=DataConfig(path="builtin", max_seq_len=128, mask_rate=0.25),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.05, beta2=0.98),
        train=TrainConfig(
            global_batch_size=32,
            num_steps=3000,
            log_every=50,
            eval_every=500,
            eval_batches=20,
            save_every=1000,
            token_init="cooccurrence",
        ),
    )
