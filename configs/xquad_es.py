"""XQuAD-es: how well a model that learned to answer does so in Spanish (Artetxe et al. 2020). Nothing is trained.

    python -m bert_jax.train --config configs/xquad_es.py --task.data-dir XQUAD --train.init-from M --workdir W

XQUAD is the folder of xquad.es.json; M what `configs/squad.py` or `configs/faquad.py` made. `results.json` has exact
match and F1, `predictions/test.json` every answer.
"""

from bert_jax.config import Config, DataConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    """All settings of the run."""
    return Config(
        task=TaskConfig(name="squad", test="xquad.es.json"),
        data=DataConfig(max_seq_len=384),
        train=TrainConfig(global_batch_size=16, num_epochs=1, keep=1),
    )
