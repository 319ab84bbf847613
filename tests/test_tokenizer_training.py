"""Training of tokenizers: what is learned, that it is the same everywhere, and input without text."""

import os
import subprocess
import sys

import pytest

from bert_jax.data.tokenizer_model import KINDS
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.errors import ConfigError, DataError
from tests.test_tokenizer import PROSE, SPECIAL


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(kind, iter(PROSE), vocab_size=400) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_trained_vocabulary(trained, kind):
    tokenizer = trained[kind]
    assert [tokenizer.id_to_token(index) for index in range(5)] == SPECIAL
    assert tokenizer.vocab_size <= 400
    assert sum(map(len, tokenizer.encode_batch(PROSE))) < 0.6 * sum(map(len, PROSE))
    assert not any(tokenizer.unk_id in ids for ids in tokenizer.encode_batch(PROSE[:3]))
    folded = train_tokenizer(kind, iter(PROSE), vocab_size=400, lowercase=True, strip_accents=True)
    assert folded.encode_batch(["CARTÃO Não"]) == folded.encode_batch(["cartao nao"])


def test_training_is_deterministic_across_processes(trained):
    code = (
        "from tests.test_tokenizer import PROSE\n"
        "from bert_jax.data.tokenizer_training import train_tokenizer, KINDS\n"
        "for kind in KINDS: print(train_tokenizer(kind, iter(PROSE), vocab_size=400).fingerprint)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed, "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [trained[kind].fingerprint for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_nothing_or_into_nothing(kind):
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(kind, iter(["", " \n"]), vocab_size=500)
    with pytest.raises(ConfigError, match="vocab"):
        train_tokenizer(kind, iter(PROSE), vocab_size=3)
    assert train_tokenizer(kind, iter(["ab\0 \ud800 [MASK] é"]), vocab_size=500).vocab_size < 500
