"""A task of GLUE with the paper's recipe: batches of 32, 3 epochs (Devlin et al. 2019, section 4.1).

    python -m bert_jax.train --config configs/glue.py --task.name rte --task.data-dir GLUE/RTE \
        --train.init-from M --workdir W

The data come from GLUE's official files in `--task.data-dir`, the task's folder or the one that holds all nine, and
without it from TFDS. The size of the model and the tokenizer come from M (a model directory, workdir or checkpoint).
"""

from bert_jax.config import Config, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="sst2"),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
