"""What a rung is, or was, trained with: one that was trained otherwise is never taken for the one that is asked for."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import ROOT

sys.path.append(str(ROOT / "launch"))

from settings import TokenizerTraining, identity_of  # noqa: E402 - beside the launch scripts

from data.reader import Store  # noqa: E402
from shodh.config import ConfigError, load_config, to_plain  # noqa: E402
from shodh.training.checkpoint import list_checkpoints, read_newest  # noqa: E402

CONFIG = "configs/train_tokenizer/ladder.yaml"
MENDED = "Give another folder with --runs, or the --stores, --seed and --set that it was trained with."


def read_settings(overrides: Sequence[str]) -> TokenizerTraining:
    """What launch/train_tokenizer.py would make of the same overrides; raises ConfigError as it would."""
    return load_config(TokenizerTraining, ROOT / CONFIG, overrides)


def require_same_training(run: Path, settings: TokenizerTraining, stores: Sequence[Store]) -> None:
    """ConfigError, in one line, where a run that was begun differs from ``settings`` on ``stores`` in what decides its
    weights, or where a finished one no longer says what it was trained with.

    An option that the run's code did not have yet, or that ours no longer has, is in one of the two alone and tells
    nothing apart: it is passed over. One that decided the weights before the identity said so is in the recorded
    configuration.
    """
    checkpoints = run / "checkpoints" / "tokenizer"
    if not list_checkpoints(checkpoints):
        if (run / "tokenizer.safetensors").is_file():
            raise ConfigError(f"run={run}: has no checkpoint left that says what it was trained with. {MENDED}")
        return
    saved = read_newest(checkpoints)[1]
    wanted = identity_of(settings) | {"data": {store.domain.name: store.digest for store in stores}}
    stored = _merge(saved["record"]["config"], saved["identity"])
    differences = [
        f"{path}: {str(old)[:32]} -> {str(new)[:32]}" for path, old, new in _differences(stored, to_plain(wanted))
    ]
    if differences:
        raise ConfigError(f"run={run}: was trained with another configuration ({'; '.join(differences[:3])}). {MENDED}")


def _merge(old: Any, new: Any) -> Any:
    """``new`` over ``old``, section by section."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new


def _differences(stored: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, stored and wanted value of what both have and is not the same; of stores, of which each must be in both."""
    if not (isinstance(stored, Mapping) and isinstance(wanted, Mapping)):
        if stored != wanted:
            yield path, stored, wanted
        return
    both = stored.keys() & wanted.keys() if path != "data" else stored.keys() | wanted.keys()
    for key in sorted(both):
        yield from _differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
