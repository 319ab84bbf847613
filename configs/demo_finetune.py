"""The demo's second half: Rotten Tomatoes labels on the model of configs/demo_pretrain.py, or from scratch.

    python -m bert_jax.train --config configs/demo_finetune.py --task.train T.csv --task.dev D.csv --workdir W \
        --train.init-from PRETRAINED          # or, from scratch: --data.tokenizer PRETRAINED/tokenizer
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(
            vocab_size=8192, hidden_size=128, num_layers=2, num_heads=2, mlp_dim=512, initializer_range=0.05
        ),
        data=DataConfig(max_seq_len=64),
        task=TaskConfig(name="classify"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=1000, keep=1),
    )
