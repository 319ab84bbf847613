"""Fine-tuning on the labels of any text or pair, with the defaults of the paper (Devlin et al. 2019, appendix A.3).

    python -m bert_jax.train --config configs/classify.py --task.train train.csv --task.dev dev.csv \
        --train.init-from M --workdir W

The size of the model and the tokenizer come from M (a model directory, a workdir or a checkpoint).
"""

from bert_jax.config import Config, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="classify"),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
