"""Eight simulated CPU devices for the whole suite, and small data sets made of real prose."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("VENV", None)  # the suite's own environment, which scripts under test would take for theirs
# Programs are compiled here more often than run: without LLVM's optimisations, and by XLA's older emitters, that
# takes a third of the time.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import itertools
import shutil
import signal
from pathlib import Path

import jax
import pytest

from bert_jax import sharding
from bert_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bert_jax.data.corpus import read_documents
from bert_jax.data.prepare import prepare
from bert_jax.data.tokenizer_model import load_tokenizer
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.process import keep_programs

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell's background ignore it, and pass that on

QUICKLY = os.environ["XLA_FLAGS"].split(maxsplit=1)[1]  # for processes that have devices of their own
VOCAB_SIZE = 1000
SEQ_LEN = 64
SENTENCES = [
    "The lighthouse keeper wrote a letter to his sister every Sunday evening.",
    "Nobody on the mainland believed that Mr. Alder could live alone for so long!",
    "Was the winter of 1887 not the coldest that anyone there remembered?",
    "He kept two goats, a garden, and a shelf of books about the stars.",
    "When the boat came back in April, the lamp was still burning.",
]
LETTER = " ".join(SENTENCES)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps the suite out of the user's cache, in one of its own: a program of several tests is compiled once."""
    os.environ["BERT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    keep_programs()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About 1 MB of the built-in documentation: one paragraph a line, blank lines between documents."""
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    documents = itertools.islice(read_documents(["builtin"]), 400)
    path.write_text("\n\n".join(document.text.replace("\n\n", "\n") for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, corpus) -> Path:
    """A WordPiece vocabulary of that prose."""
    folder = tmp_path_factory.mktemp("tokenizer") / "wordpiece"
    texts = iter(corpus.read_text(encoding="utf-8").split("\n\n"))
    train_tokenizer("wordpiece", texts, vocab_size=VOCAB_SIZE, lowercase=True, strip_accents=True).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """That vocabulary, loaded."""
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus, tokenizer) -> Path:
    """That prose as packed rows."""
    folder = tmp_path_factory.mktemp("prepared") / "rows"
    data = DataConfig(max_seq_len=SEQ_LEN, documents="blank-line", workers=1, eval_fraction=0.05)
    prepare([str(corpus)], folder, tokenizer=tokenizer, data=data, report=False)
    return folder


@pytest.fixture(scope="session")
def small_config(prepared, tokenizer) -> Config:
    """A pre-training run that takes seconds."""
    return Config(
        model=ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            mlp_dim=64,
            max_position_embeddings=SEQ_LEN,
        ),
        data=DataConfig(path=str(prepared), max_seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
        train=TrainConfig(global_batch_size=16, num_steps=20, log_every=1, save_every=10, eval_batches=2),
    )


@pytest.fixture
def one_device(monkeypatch):
    """Runs of this process train on one of the devices: for what is not about meshes, in two thirds of the time."""
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory) -> str:
    """A small TFDS data set, `tiny/letters`, made here: texts, a class, and a list of classes."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # so that it is found by its files alone

        class Tiny(tfds.core.GeneratorBasedBuilder):
            __module__ = "tiny"  # in a package such as `tests`, TFDS wants importlib_resources to find it
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="letters")]

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        "text": tfds.features.Text(),
                        "mark": tfds.features.ClassLabel(num_classes=10),
                        "kinds": tfds.features.Sequence(tfds.features.ClassLabel(names=["even", "small"])),
                    }
                )
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {
                    "train": enumerate(
                        {"text": f"Letter {i} came. {LETTER}", "mark": i, "kinds": [0][i % 2 :] + [1] * (i < 5)}
                        for i in range(10)
                    )
                }

            def _generate_examples(self):
                raise NotImplementedError

    folder = str(tmp_path_factory.mktemp("tfds"))
    Tiny(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window; tests of pages are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """(path) -> the page at it. At the end: it told the console nothing, and asked for nothing but itself."""
    window = browser.new_page(viewport={"width": 1200, "height": 800})
    window.set_default_timeout(60_000)
    faults, requests, paths = [], [], []
    window.on("console", lambda message: faults.append(message.text))
    window.on("pageerror", lambda error: faults.append(str(error)))
    window.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
    window.on("request", lambda request: requests.append(request.url))

    def go(path):
        paths.append(path.as_uri())
        window.goto(path.as_uri())
        return window

    yield go
    window.close()
    assert faults == [] and requests == paths
