"""BERT-mini (L=4, H=256) with a vocabulary of 8,192, on the 25,000 IMDb reviews that the demo prepares.

    python -m bert_jax.train --config configs/imdb_mini.py --workdir W --data.path work/demo/rows

One run, two CPU cores shared with other work, 53 min, 12 million tokens: held-out masked LM loss 6.32 at step 1,000,
5.10 at 3,000 and 4.49 at the end (accuracy 0.284); next-sentence accuracy 0.609.

Transfer, single seeds and not yet what it should be: Rotten Tomatoes test accuracy after two epochs over 6,530 labels
at a rate of 3e-4 was 73.4 % with these weights and 73.5 % from scratch. The vector of [CLS] learns from the
next-sentence task alone, which had only begun to be learned; a longer run is the next thing to try.
Measure it with: python benchmarks/transfer.py --pretrained W --data work/demo/data
"""

from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        model=ModelConfig(vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024),
        data=DataConfig(path="builtin", max_seq_len=64),
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_steps=6000, log_every=100, eval_every=1000, eval_batches=20),
    )
