"""docs/cluster.md names only what exists, and its commands' configs and overrides are taken."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate_data import GenerateConfig
from settings import Evaluation, LatentCaching, Pretraining, TokenizerTraining

from shodh.config import load_config
from shodh.training.stop_signal import EXIT_CODE, SIGNALS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text()
PLACES = ("launch/", "configs/", "shodh/", "data/", "docs/", "benchmarks/", "tests/")
CONFIGS: dict[str, Any] = {
    "generate_data": GenerateConfig,
    "train_tokenizer": TokenizerTraining,
    "cache_latents": LatentCaching,
    "pretrain": Pretraining,
    "evaluate_model": Evaluation,
}


def commands() -> Iterator[list[str]]:
    """The words of each command on the page: its indented lines, joined where they go on, without comments."""
    lines = [line for line in PAGE.splitlines() if re.match(r" {4}\S", line) or re.match(r" {8}\S", line)]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


def trainings() -> list[tuple[str, str, tuple[str, ...]]]:
    """Launch script, config and overrides of each command that has them."""
    found = set()
    for words in commands():
        for place, script in enumerate(words):
            verb = script.removeprefix("launch/").removesuffix(".py")
            if verb in CONFIGS:
                config, *rest = words[place + 1 :]
                found.add((verb, config, tuple(word for word in rest if re.match(r"[a-z_.]+=", word))))
    return sorted(found)


def test_every_file_that_the_page_names_exists():
    words = [word for words in commands() for word in words] + re.findall(r"`([^`]+)`", PAGE)
    named = {word for word in words if word.startswith(PLACES) and re.fullmatch(r"[\w./-]+", word)}
    assert len(named) > 15
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize(("verb", "config", "overrides"), trainings())
def test_every_command_s_config_and_overrides_are_taken(verb, config, overrides):
    load_config(CONFIGS[verb], ROOT / config, overrides)


def test_all_verbs_of_the_path_are_shown():
    assert {verb for verb, _, _ in trainings()} == set(CONFIGS)
    assert ("generate_data", "configs/generate_data/base.yaml", ("shard=0/64", "num_processes=1")) in trainings()


def test_keys_in_the_text_are_keys_of_the_pretraining():
    keys = set(re.findall(r"`((?:engine|model|objective)\.\w+)`", PAGE))
    assert len(keys) >= 6
    for key in keys:
        part, name = key.split(".")
        assert name in Pretraining.__dataclass_fields__[part].type.__dataclass_fields__, key


def test_what_the_page_says_of_signals_and_ranks_is_what_the_files_say():
    assert f"exit code\n{EXIT_CODE}" in PAGE and all(number.name in PAGE for number in SIGNALS)
    batch = (ROOT / "launch/slurm/train.sbatch").read_text()
    notice = re.search(r"^#SBATCH --signal=USR1@(\d+)$", batch, re.MULTILINE)
    assert notice and f"{notice[1]} s before the limit" in PAGE
    requeues = re.search(r"MAX_REQUEUES:-(\d+)", batch)
    assert requeues and f"`MAX_REQUEUES={requeues[1]}`" in PAGE


@pytest.mark.parametrize("size", ["debug", "quickstart", "base"])
def test_a_size_s_configs_hand_their_files_on_to_one_another(size):
    def read(verb: str, name: str = size) -> dict[str, Any]:
        return yaml.safe_load((ROOT / f"configs/{verb}/{name}.yaml").read_text())

    stores, tokenizer, latents = read("generate_data")["folder"], read("train_tokenizer"), read("cache_latents")
    models = [read("pretrain"), read("evaluate_model"), *([read("pretrain", "cluster")] if size == "base" else [])]
    for config in (tokenizer, latents, *models):
        assert config["stores"] == stores and config["domains"] == tokenizer["domains"]
    for config in (latents, *models):
        assert config["tokenizer"] == f"{tokenizer['run']}/tokenizer.safetensors"
        assert config["latents"] == latents["latents"]
    for config in (models[0], *models[2:]):
        for name in ("latent_channels", "medium_channels"):
            assert config["model"][name] == tokenizer["autoencoder"][name]
