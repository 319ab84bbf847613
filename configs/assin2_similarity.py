"""ASSIN 2: how similar are two Portuguese sentences, from 1 to 5? (Real, Fonseca and Gonçalo Oliveira 2020.)

    python -m bert_jax.train --config configs/assin2_similarity.py --task.data-dir ASSIN2 \\
        --train.init-from M --workdir W

ASSIN2 is the folder of assin2-train-only.xml, assin2-dev.xml and assin2-test.xml; M a BERT that reads Portuguese, such
as BERTimbau (a model directory, a workdir or a checkpoint), which also gives the size and the tokenizer.
"""

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(
            name="regress",
            train="assin2-train-only.xml",
            dev="assin2-dev.xml",
            test="assin2-test.xml",
            text_column="t",
            text_pair_column="h",
            label_column="similarity",
        ),
        data=DataConfig(max_seq_len=128),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=5, log_every=20, save_every=500, keep=1),
    )
