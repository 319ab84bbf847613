"""BERT in JAX: raw text to a pre-trained model, fine-tuning and prediction."""

from typing import Any

__version__ = "0.1.0"


def load(path: str) -> Any:
    """A model directory, a workdir or a checkpoint step, ready for use (`bert_jax.bert.Bert`)."""
    from bert_jax.bert import load as load_bert  # JAX is imported when a model is

    return load_bert(path)
