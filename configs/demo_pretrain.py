"""The demo's first half: a two-layer BERT of 128 on IMDb reviews, made to finish in minutes on two CPU cores.

    bash launch/demo.sh

One run, two CPU cores that other work kept busy, 452 s: masked LM loss 8.585 at step 50, 5.910 on held-out reviews at
the end; next-sentence accuracy 0.514, that is, chance. This is too short for transfer: Rotten Tomatoes test accuracy
afterwards (configs/demo_finetune.py) was 70.1 % with these weights and 73.6 % from scratch (500 labels: 54.6 and
63.0 %). It shows the machinery, not what pre-training buys.
"""

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
            hidden_dropout=0.0,  # a model this small, which sees its text about once, does not overfit
            attention_dropout=0.0,
        ),
        data=DataConfig(path="builtin", max_seq_len=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
        train=TrainConfig(
            global_batch_size=32, num_steps=3000, log_every=50, eval_every=500, eval_batches=20, save_every=1000
        ),
    )
