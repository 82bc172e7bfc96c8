"""One rung of the rate ladder: trained in a process whose CPU time is kept, and measured on held-out fields."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from figures import ROOT
from parts import normalised_batch
from rate_ladder_identity import CONFIG, read_settings, require_same_training
from torch import Tensor

from data.reader import Store
from data.statistics import FieldStatistics
from shodh.evaluation.reconstruction import TrueFields, sample_trajectory, summarise_reconstruction
from shodh.evaluation.rollout import SILENT
from shodh.fields import DecodedFields, FieldBatch
from shodh.physics.spectra import vrmse
from tokenizer.block_klt import BlockKLT
from tokenizer.export import Tokenizer, load_tokenizer

CPU_FILE = "cpu_seconds.json"  # in the run's folder: of every attempt, null for one whose end nobody saw
SNAPSHOTS_AT_ONCE = 8


class Measured(NamedTuple):
    """One domain at one rung; errors are means over snapshots that are not silent."""

    vrmse: float
    vrmse_of_klt: float  # of as many values a block as the state's latents
    vrmse_of_klt_with_medium: float  # of as many as state and medium latents together
    vrmse_of_pressure: float
    energy_ratio: float  # of the highest resolved octave, decoded over true
    correlation: float  # of the modes there


class Rung(NamedTuple):
    """One tokenizer of the ladder."""

    latent_channels: int
    medium_channels: int
    cpu_seconds: float  # NaN where an attempt was lost
    domains: dict[str, Measured]


def train_rung(latent_channels: int, run: Path, overrides: Sequence[str], stores: Sequence[Store]) -> None:
    """Train to the end, or continue what was begun, in one process on one core, and add its CPU time to the run's.

    Raises ConfigError, before any process starts, for a run that was begun otherwise or on other ``stores``, and
    RuntimeError with the process's last line where it fails.
    """
    overrides = set_rung(latent_channels, run, overrides)
    require_same_training(run, read_settings(overrides), stores)
    if is_finished(run):
        print(f"C={latent_channels}: trained already, {run}")
        return
    command = [sys.executable, "launch/train_tokenizer.py", CONFIG, *overrides]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run.mkdir(parents=True, exist_ok=True)
    attempts = _read_attempts(run)
    _write_attempts(run, [*attempts, None])
    log = run / "training.log"
    print(f"C={latent_channels}: training, see {log}", flush=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, however many run at once
    process.returncode = os.waitstatus_to_exitcode(status)
    _write_attempts(run, [*attempts, usage.ru_utime + usage.ru_stime])
    if process.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"C={latent_channels}: training ended with code {process.returncode}: {''.join(last)}")


def set_rung(latent_channels: int, run: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of one rung, in its own folder and on one thread."""
    rung = (f"autoencoder.latent_channels={latent_channels}", f"run={run.absolute()}", "engine.threads_per_rank=1")
    return [*overrides, *rung]


def is_finished(run: Path) -> bool:
    """Whether the rung is trained, exported and certified; one killed while it was certified is continued."""
    path = run / "tokenizer.safetensors"
    return path.is_file() and load_tokenizer(path).certificate is not None


def read_cpu_seconds(run: Path) -> float:
    """CPU time of all attempts together; NaN where there is none or one was lost."""
    attempts = _read_attempts(run)
    return math.fsum(math.nan if seconds is None else seconds for seconds in attempts) if attempts else math.nan


def _read_attempts(run: Path) -> list[float | None]:
    path = run / CPU_FILE
    return json.loads(path.read_text()) if path.is_file() else []


def _write_attempts(run: Path, attempts: Sequence[float | None]) -> None:
    (run / CPU_FILE).write_text(json.dumps(list(attempts)) + "\n")


@torch.no_grad()
def measure_rung(
    tokenizer: Tokenizer,
    stores: Sequence[Store],
    scales: Mapping[str, FieldStatistics],
    codes: Mapping[int, BlockKLT],
    cpu_seconds: float,
    most: int | None,
) -> Rung:
    """The tokenizer on the held-out trajectories of each store, ``most`` at most, beside the codes in its scales."""
    sizes = tokenizer.autoencoder.config
    compared = codes[sizes.latent_channels], codes[sizes.latent_channels + sizes.medium_channels]
    domains = {s.domain.name: measure_domain(tokenizer, s, scales[s.domain.name], compared, most) for s in stores}
    return Rung(sizes.latent_channels, sizes.medium_channels, cpu_seconds, domains)


def measure_domain(
    tokenizer: Tokenizer, store: Store, scales: FieldStatistics, codes: tuple[BlockKLT, BlockKLT], most: int | None
) -> Measured:
    rows, errors = [], []
    grid = store.grid.relative
    for i in store.trajectories("test")[:most]:
        fields, batch = read_trajectory(store, i, scales)
        decoded = decode(tokenizer, batch)
        rows.append(sample_trajectory(decoded, fields, grid))
        guesses = [decoded.velocity, *(code.reconstruct(fields.velocity) for code in codes)]
        errors.append(compare(fields.velocity, guesses))
    summary = summarise_reconstruction(rows, grid)
    pressure = summary["vrmse"]["pressure"]
    highest = {key: summary["octaves"]["velocity"][key][-1] for key in ("energy_ratio", "correlation")}
    ours, of_klt, of_klt_with_medium = torch.cat(errors).nanmean(0).tolist()
    return Measured(
        vrmse=ours,
        vrmse_of_klt=of_klt,
        vrmse_of_klt_with_medium=of_klt_with_medium,
        vrmse_of_pressure=math.nan if pressure is None else pressure,
        **highest,
    )


def read_trajectory(store: Store, trajectory: int, scales: FieldStatistics) -> tuple[TrueFields, FieldBatch]:
    """A trajectory in the tokenizer's normalisation, its medium as stored; and the batch that the encoder takes."""
    states = [store.snapshot(trajectory, t) for t in range(store.num_snapshots)]
    velocity, pressure = (torch.stack([torch.from_numpy(f) for f in part]) for part in zip(*states, strict=True))
    medium = torch.from_numpy(store.medium(trajectory))
    still = medium.expand(len(velocity), 1, *medium.shape)
    batch = normalised_batch(velocity, pressure[:, None], still, store, scales)
    return TrueFields(batch.velocity, batch.pressure, medium), batch


def decode(tokenizer: Tokenizer, batch: FieldBatch) -> DecodedFields:
    """The batch through the latents and back, some snapshots at a time."""
    model, parts = tokenizer.autoencoder, []
    for velocity, pressure, medium in zip(*(field.split(SNAPSHOTS_AT_ONCE) for field in batch[:3]), strict=True):
        chunk = batch._replace(velocity=velocity, pressure=pressure, medium=medium)
        parts.append(model.decode_fields(*model.encode(chunk), batch.domain, batch.grid))
    return DecodedFields(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def compare(truth: Tensor, guesses: Sequence[Tensor]) -> Tensor:
    """VRMSE (snapshot, guess) of velocity; NaN where the truth is silent beside the loudest of its trajectory."""
    deviation = truth.double().var(dim=(-3, -2, -1), correction=0).mean(1).sqrt()
    errors = torch.stack([vrmse(guess, truth) for guess in guesses], 1)
    return errors.masked_fill((deviation <= SILENT * deviation.max())[:, None], math.nan)
