"""The command line of `train.py`: a configuration file, then single fields of it as flags."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from bert_jax import config as config_lib
from bert_jax.config import Config
from bert_jax.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """Train a BERT: pre-training or fine-tuning, as the configuration says."""

    config: str
    """File whose get_config() returns the configuration, such as configs/tiny.py; flags below override its fields."""
    workdir: str = ""
    """Folder of the run: configuration, metrics, checkpoints, model."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Go on from the newest whole checkpoint if there is one; insist on one; or start anew in an empty workdir."""
    print_config: bool = False
    """Print the configuration as JSON and stop."""
    dry_run: bool = False
    """Print parameters, memory and steps, and stop."""
    plan: str = ""
    """Slice of TPUs, such as v5e:2x4: compile for it, here, print what it would take, and stop."""
    coordinator: str = ""
    """host:port of process 0, where many processes make one run and neither TPU metadata, SLURM nor JobSet tell."""
    num_processes: int = 0
    """Their number; with coordinator."""
    process_id: int = -1
    """Which of them this is, from 0; with coordinator."""
    host_timeout: int = 300
    """Seconds to wait for the other processes."""
    debug: bool = False
    """Show the traceback of an error; stop at the first NaN."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def load_config(path: str) -> Config:
    """Runs a file of `configs/` and returns its configuration."""
    if not os.path.isfile(path):
        raise ConfigError(f"--config {path}: no such file")
    spec = importlib.util.spec_from_file_location("bert_jax_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        near = config_lib.did_you_mean(unknown[1], _field_names()) if unknown else ""
        raise ConfigError(f"--config {path}: {type(error).__name__}: {error}{near}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"--config {path}: get_config() must return a bert_jax.config.Config")
    return config


def parse_command(argv: list[str]) -> Command:
    """Command line -> settings. Raises ConfigError (one line) on a wrong flag or value; `--help` prints and exits."""
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    path = paths[-1] if paths else None
    asks_help = any(word in ("-h", "--help") for word in argv)
    if path is None and not asks_help:
        raise ConfigError("--config: name a file, such as configs/tiny.py")
    default = Command(config=path or "FILE", settings=load_config(path) if path else Config())
    if asks_help:
        return tyro.cli(Command, args=argv, default=default, prog="python -m bert_jax.train")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            command, unknown = tyro.cli(Command, args=argv, default=default, return_unknown_args=True)
    except SystemExit:
        raise ConfigError(_one_line(complaint.getvalue())) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        raise ConfigError(f"unknown option {flag}{config_lib.did_you_mean(flag.replace('_', '-'), known_flags())}")
    return command


def _field_names() -> list[str]:
    """The sections of a configuration, and the fields of each."""
    sections = dataclasses.fields(Config)
    names = [entry.name for section in sections for entry in dataclasses.fields(section.default_factory)]
    return [section.name for section in sections] + names


def known_flags() -> list[str]:
    """Every option, as it is written."""
    flags = [f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(Command) if entry.name != "settings"]
    for section in dataclasses.fields(Config):
        names = [entry.name for entry in dataclasses.fields(section.default_factory)]
        flags += [f"--{section.name}.{name.replace('_', '-')}" for name in names]
    return flags


def _one_line(boxed: str) -> str:
    """tyro's message without its frame, its title, and what it says of --help and of the option's meaning."""
    lines = [line.strip("│╭╮╰╯─- ") for line in boxed.splitlines()[1:] if "--help" not in line]
    words = " ".join(itertools.takewhile(lambda line: not line.startswith("Argument helptext"), filter(None, lines)))
    return " ".join(words.split()) or "wrong command line"
