"""A label for each word, with the paper's recipe (Devlin et al. 2019, section 5.3).

    python -m bert_jax.train --config configs/ner.py --task.train train.conll --task.dev dev.conll \\
        --train.init-from M --workdir W

Files have a word a line, its label in the last column (IOB1 or IOB2), and a blank line between sentences. The size of
the model and the tokenizer come from M (a model directory, a workdir or a checkpoint).
"""

from bert_jax.config import Config, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="ner"),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=32, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
