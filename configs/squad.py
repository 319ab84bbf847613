"""Questions about a text, with the paper's recipe: batches of 32, 3 epochs, 5e-5 (Devlin et al. 2019, section 4.2).

    python -m bert_jax.train --config configs/squad.py --task.train train-v1.1.json --task.dev dev-v1.1.json \\
        --train.init-from M --workdir W          # SQuAD 2.0: --task.version-2 --optimizer.learning-rate 3e-5

The size of the model and the tokenizer come from M (a model directory, a workdir or a checkpoint).
"""

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="squad"),
        data=DataConfig(max_seq_len=384),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
