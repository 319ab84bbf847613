"""Fine-tuning on a number of any text or pair, such as how similar two sentences are (Devlin et al. 2019, section 4.1).

    python -m bert_jax.train --config configs/regress.py --task.train train.csv --task.dev dev.csv \
        --task.text-column first --task.text-pair-column second --task.label-column score \
        --train.init-from M --workdir W

The size of the model and the tokenizer come from M (a model directory, a workdir or a checkpoint).
"""

from bert_jax.config import Config, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="regress"),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
