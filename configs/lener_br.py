"""LeNER-Br: names in Portuguese legal texts, six kinds (Luz de Araujo et al. 2018).

    python -m bert_jax.train --config configs/lener_br.py --task.data-dir LENER --train.init-from M --workdir W

LENER is the folder of train.conll, dev.conll and test.conll; M a BERT that reads Portuguese, such as BERTimbau (a model
directory, a workdir or a checkpoint), which also gives the size and the tokenizer.
"""

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="ner", train="train.conll", dev="dev.conll", test="test.conll"),
        data=DataConfig(max_seq_len=256),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=5, log_every=20, save_every=500, keep=1),
    )
