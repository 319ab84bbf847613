"""Configuration: every file of configs/ builds, faults are told together, keys are strict."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from bert_jax import config as config_lib
from bert_jax.command import known_flags, load_config, parse_command
from bert_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from bert_jax.errors import ConfigError
from bert_jax.plan import parameter_counts
from bert_jax.tasks import pretrain
from bert_jax.train import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))

# Encoder with pooler, and with both heads (Devlin et al. 2019; Turc et al. 2019), vocabulary 30,522.
PUBLISHED = {
    "tiny": (4_385_920, 4_433_468),
    "mini": (11_170_560, 11_267_900),
    "small": (28_763_648, 29_058_876),
    "medium": (41_373_184, 41_668_412),
    "pretrain_base": (109_482_240, 110_106_428),
    "pretrain_large": (335_141_888, 336_226_108),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = load_config(str(path))
    needs_files = [fault for fault in config_lib.faults(config) if not fault.startswith(("task.train", "data.path"))]
    assert needs_files == []
    shapes = jax.eval_shape(lambda: pretrain.init(config.model, jax.random.key(0)))
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(shapes))
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    model = load_config(str(CONFIGS[0].parent / f"{name}.py")).model
    counts = parameter_counts(jax.eval_shape(lambda: pretrain.init(model, jax.random.key(0))), model)
    encoder = counts["embeddings"] + counts["layers"] + counts["pooler"]
    assert (encoder, sum(counts.values())) == PUBLISHED[name]


def test_faults_are_listed_at_once():
    config = Config(
        model=ModelConfig(hidden_size=130, num_heads=4, max_position_embeddings=64),
        data=DataConfig(max_seq_len=128),
        train=TrainConfig(global_batch_size=0),
    )
    with pytest.raises(ConfigError) as error:
        config_lib.validate(config)
    for key in ("model.num_heads", "data.max_seq_len", "train.global_batch_size", "data.path"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": DataConfig(path="x", mask_rate=1.5)},
        {"data": DataConfig(path="x", max_predictions=500)},
        {"train": TrainConfig(num_steps=0)},
        {"mesh": config_lib.MeshConfig(data=-1, fsdp=-1)},
        {"mesh": config_lib.MeshConfig(tensor=5)},
        {"optimizer": config_lib.OptimizerConfig(accumulate=3)},
        {"data": DataConfig(path="x", seed=-1)},
        {"train": TrainConfig(seed=10**20)},
        {"data": DataConfig(path="x", max_predictions=-4)},
        {"model": ModelConfig(scan_unroll=-1)},
        {"train": TrainConfig(eval_batches=-1)},
        {"task": config_lib.TaskConfig(name="classify")},
        {
            "task": config_lib.TaskConfig(name="classify", train="x"),
            "train": TrainConfig(embedding_init="cooccurrence"),
        },
        {"train": TrainConfig(embedding_init="cooccurrence", init_from="w")},
        {"train": TrainConfig(num_epochs=float("inf"))},
        {"train": TrainConfig(num_steps=2**31)},
        {"model": ModelConfig(hidden_dropout=0.999)},
        {"model": ModelConfig(max_position_embeddings=10**6), "data": DataConfig(path="x", max_seq_len=70_000)},
    ],
)
def test_each_fault_is_found(changes):
    assert config_lib.faults(dataclasses.replace(Config(data=DataConfig(path="x")), **changes))


def test_values_of_a_wrong_type_or_name_are_faults():
    config = Config(
        model=ModelConfig(hidden_size="32", num_layers=2.0, dtype="bf16"),
        data=DataConfig(path="x", pack=1),
        optimizer=config_lib.OptimizerConfig(name="LAMB", beta1=float("nan"), clip_norm=1),
        train=TrainConfig(num_steps=True),
    )
    assert config_lib.faults(config) == [
        "model.hidden_size: '32' must be a whole number",
        "model.num_layers: 2.0 must be a whole number",
        "model.dtype: 'bf16' is none of float32, bfloat16 (did you mean bfloat16?)",
        "data.pack: 1 must be True or False",
        "optimizer.name: 'LAMB' is none of adamw, lamb (did you mean lamb?)",
        "optimizer.beta1: nan must be a finite number",
        "train.num_steps: True must be a whole number",
    ]


def test_more_positions_are_never_gathered_than_a_row_has():
    assert DataConfig(max_seq_len=10, mask_rate=0.99).gather_width == 10


def test_sound_defaults_have_no_fault():
    assert config_lib.faults(Config(data=DataConfig(path="x"))) == []


def test_unknown_key_of_a_saved_configuration_names_the_nearest():
    with pytest.raises(ConfigError, match=r"model\.hidden_sise \(did you mean hidden_size\?\)"):
        config_lib.from_dict({"model": {"hidden_sise": 3}})


TINY = str(CONFIGS[0].parent / "tiny.py")


def test_flags_override_fields_with_dash_or_underscore():
    command = parse_command(
        ["--config", TINY, "--model.num-layers", "4", "--optimizer.learning_rate", "0.5", "--data.no-pack"]
    )
    assert command.settings.model.num_layers == 4
    assert command.settings.optimizer.learning_rate == 0.5
    assert command.settings.data.pack is False
    assert command.settings.model.hidden_size == 128  # the file's


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model.num-layer", "4"], "did you mean --model.num-layers"),
        (["--optimiser.learning-rate", "1"], "did you mean --optimizer.learning-rate"),
        (["--optimizer.lr", "1"], "did you mean --optimizer.learning-rate"),
        (["--model.num-layers", "four"], "^Error parsing --model.num-layers: .*'four'$"),
        (["--model.dtype", "float8"], "float32"),
        (["--resume", "perhaps"], "^invalid choice 'perhaps' .*'never'"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse_command(["--config", TINY, *flags])
    assert "\n" not in str(error.value)


def test_no_config_or_a_broken_one_is_told(tmp_path):
    with pytest.raises(ConfigError, match="--config"):
        parse_command(["--workdir", "w"])
    with pytest.raises(ConfigError, match="no such file"):
        load_config(str(tmp_path / "absent.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 3\n")
    with pytest.raises(ConfigError, match="must return"):
        load_config(str(broken))
    broken.write_text("import nothing_like_this\n")
    with pytest.raises(ConfigError, match="nothing_like_this"):
        load_config(str(broken))


def test_every_flag_is_known_and_described():
    assert "--train.global-batch-size" in known_flags()
    for section in dataclasses.fields(Config):
        source = Path(config_lib.__file__).read_text()
        for entry in dataclasses.fields(section.default_factory):
            line = next(i for i, text in enumerate(source.split("\n")) if text.startswith(f"    {entry.name}:"))
            assert source.split("\n")[line + 1].strip().startswith('"""'), entry.name


def test_print_config_and_dry_run_say_what_they_are_asked(capsys):
    assert main(["--config", TINY, "--print-config", "--train.seed", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["seed"] == 7
    assert main(["--config", TINY, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4,385,920" in printed and "4,433,468" in printed and "tokens a step: 8,192" in printed


def test_workdir_is_asked_for():
    with pytest.raises(ConfigError, match="--workdir"):
        main(["--config", TINY])
