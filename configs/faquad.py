"""FaQuAD: Portuguese questions about universities, answered by a span of a text (Sayama et al. 2019).

    python -m bert_jax.train --config configs/faquad.py --task.data-dir FAQUAD --train.init-from M --workdir W

FAQUAD is the folder of train.json and dev.json; M a BERT that reads Portuguese, such as BERTimbau (a model directory,
a workdir or a checkpoint), which also gives the size and the tokenizer. Spanish: the same with files of that language;
`configs/xquad_es.py` judges what comes out.
"""

from bert_jax.config import Config, DataConfig, OptimizerConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="squad", train="train.json", dev="dev.json"),
        data=DataConfig(max_seq_len=384),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1),
        train=TrainConfig(global_batch_size=16, num_epochs=3, log_every=20, save_every=500, keep=1),
    )
