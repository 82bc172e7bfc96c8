"""OpenFWI: .npy pairs of seismic gathers (n, shot, time, receiver) and wave speeds (n, 1, z, x), float32.

Vel and Style families: data/dataN.npy with model/modelN.npy; Fault families: seisK_1_I.npy with velK_1_I.npy in one
folder. 10 m grid, 1 ms, 15 Hz Ricker, sources and receivers 10 m deep, speeds in m/s.
Source: Deng et al., OpenFWI, NeurIPS Datasets and Benchmarks 2022; ranges: dataset_config.json of lanl/OpenFWI.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.array_store import write_array_store
from data.gathers import KIND, gather_arrays
from data.ingest.arrivals import Survey, arrival_errors, onset_table
from data.ingest.source import Say, Unverified, find_files, open_npy, require_finite, verify_files
from data.writer import WrittenStore
from shodh.config import ConfigError

SPEED = 1400.0, 4600.0  # m/s; published labels lie in 1500-4500
# Published extremes over all families are -29.04 and 57.03; a file of loud models may pass them by this factor.
AMPLITUDE, MARGIN = (-29.04, 57.03), 1.5
QUIETEST = 10.0  # a file whose largest amplitude is below this has been normalised
SIDEWAYS = 3.0  # a mean speed that changes so many times more along x than along z has its axes swapped
SIGNIFICANT = 5.0  # standard errors over the models of a file
TREND = 100.0  # m/s over the model, below which neither axis says anything
# Samples that the direct wave may be off its model. An onset is found to one sample, which bounds the mean over a file
# (300 sound pairs of ten families: 0.2 at most over a family); in one pair faulted rock adds to it (0.9 at most).
LATE_FILE, LATE_PAIR = 1.0, 3.0
UNITS = {"km/s": (1e-3, "1000"), "ft/s": (1 / 0.3048, "0.3048"), "kft/s": (1e-3 / 0.3048, "304.8")}


@dataclass(frozen=True, kw_only=True)
class OpenFWIConfig:
    """The published layout; lengths differ only for data made in its format."""

    num_test: int = 1  # pairs held out, the last ones
    shots: int = 5
    times: int = 1000
    receivers: int = 70
    depth: int = 70
    spacing: float = 10.0  # m, of grid and receivers
    time_step: float = 1e-3  # s
    frequency: float = 15.0  # Hz, peak of the Ricker wavelet
    unverified: Unverified = "refuse"  # a source without SHA256SUMS

    def __post_init__(self) -> None:
        for name in ("shots", "times", "receivers", "depth", "spacing", "time_step", "frequency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive. Give a larger value.")

    @property
    def survey(self) -> Survey:
        """Where and when is recorded; sources and receivers in the second row of the model."""
        columns = tuple(round(c) for c in np.linspace(0, self.receivers - 1, self.shots))
        return Survey(self.spacing, self.time_step, self.frequency, 1, columns)


class _Pair(NamedTuple):
    gathers: Path
    speeds: Path
    num: int


def ingest(source: Path, store: Path, config: OpenFWIConfig, say: Say) -> WrittenStore:
    """Write the store of gathers of a family's folder, one pair of samples a chunk."""
    files = _find_pairs(source)
    provenance = verify_files([path for pair in files for path in pair], source, config.unverified, say)
    pairs = [_inspect(gathers, speeds, config) for gathers, speeds in files]
    num = sum(pair.num for pair in pairs)
    if not 0 < config.num_test < num:
        raise ConfigError(
            f"num_test={config.num_test}: of {num} pairs one must be held out and one left. Change num_test."
        )
    say(f"{store}: {len(pairs)} pairs of files, {num} gathers")
    attributes = {
        "Conventions": "CF-1.11",
        "title": f"OpenFWI: {num} gathers and wave speeds",
        "num_trajectories": num,
        "num_test": config.num_test,
        "gather_shape": [config.shots, config.times, config.receivers],
        "model_shape": [config.depth, config.receivers],
        "frequency": config.frequency,
        "depth_of_sources_and_receivers": config.survey.row * config.spacing,
        "files": [pair.gathers.name for pair in pairs],
        "source": provenance.as_config(),
    }

    def produce(is_done: Callable[[str, Sequence[int]], bool]) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
        index = 0
        for pair in pairs:
            gathers, speeds = open_npy(pair.gathers), open_npy(pair.speeds)
            for i in range(pair.num):
                if not is_done("seismogram", (index, 0, 0, 0)):
                    yield "seismogram", (index, 0, 0, 0), _read_sample(gathers, i, pair.gathers, "seismogram")
                if not is_done("wave_speed", (index, 0, 0)):
                    yield "wave_speed", (index, 0, 0), _read_sample(speeds, i, pair.speeds, "speed")[0]
                index += 1
        for name, values in _coordinates(config).items():
            yield name, (0,), values

    return write_array_store(store, KIND, gather_arrays(attributes), attributes, produce)


def _find_pairs(source: Path) -> list[tuple[Path, Path]]:
    """Files of gathers with their files of speeds; ConfigError naming one that stands alone."""
    if not source.is_dir():
        raise ConfigError(
            f"source={source}: no such folder. Give a family's folder, with data/ and model/ or seis*.npy and vel*.npy."
        )
    if (source / "data").is_dir() or (source / "model").is_dir():
        for part in ("data", "model"):
            if not (source / part).is_dir():
                raise ConfigError(f"source={source}: has no folder {part}/. Download it too.")
        gathers, speeds = (find_files(source / part, (".npy",)) for part in ("data", "model"))
        return _match(gathers, speeds, "data", "model")
    files = find_files(source, (".npy",))
    gathers, speeds = ([p for p in files if re.fullmatch(rf"{kind}\d[\d_]*\.npy", p.name)] for kind in ("seis", "vel"))
    if not gathers and not speeds:
        raise ConfigError(
            f"source={source}: neither data/ and model/ nor seis1_1_0.npy and vel1_1_0.npy. Give a family's folder."
        )
    return _match(gathers, speeds, "seis", "vel")


def _match(gathers: list[Path], speeds: list[Path], first: str, second: str) -> list[tuple[Path, Path]]:
    by_name = {path.name.removeprefix(second): path for path in speeds}
    names = {path.name.removeprefix(first) for path in gathers}
    for key in sorted(names ^ set(by_name)):
        missing = f"{second}{key}" if key in names else f"{first}{key}"
        raise ConfigError(f"source={missing}: missing, its counterpart is there. Download it too, or remove that.")
    return [(path, by_name[path.name.removeprefix(first)]) for path in gathers]


def _inspect(gathers_file: Path, speeds_file: Path, config: OpenFWIConfig) -> _Pair:
    """Shapes, units and sign of a pair of files, read sample by sample."""
    gathers, speeds = open_npy(gathers_file), open_npy(speeds_file)
    wanted = {
        gathers_file: (gathers.shape, (config.shots, config.times, config.receivers), "shot, time, receiver"),
        speeds_file: (speeds.shape, (1, config.depth, config.receivers), "1, z, x"),
    }
    for path, (shape, must, names) in wanted.items():
        if len(shape) != 4 or shape[1:] != must or shape[0] < 1:
            swapped = "axes are swapped" if sorted(shape[1:]) == sorted(must) else "it is another layout"
            raise ConfigError(
                f"source={path}: shape {shape}, must be (n, {names}) = (n, {str(must)[1:]}: {swapped}. Transpose it."
            )
    if len(gathers) != len(speeds):
        raise ConfigError(
            f"source={gathers_file}: {len(gathers)} gathers, {speeds_file.name} has {len(speeds)} models. Download "
            "both again."
        )
    _require_amplitude(gathers, gathers_file)
    _require_speed(speeds, speeds_file)
    _require_arrivals(gathers, speeds, gathers_file, config)
    return _Pair(gathers_file, speeds_file, len(gathers))


def _require_amplitude(gathers: np.ndarray, path: Path) -> None:
    """ConfigError unless amplitudes are of the published range and sign."""
    low = min(float(_read_sample(gathers, i, path, "seismogram").min()) for i in range(len(gathers)))
    high = max(float(gathers[i].max()) for i in range(len(gathers)))
    if high < -low:
        raise ConfigError(
            f"source={path}: amplitudes from {low:.3g} to {high:.3g}: the sign is reversed. Multiply by -1."
        )
    if high < QUIETEST:
        raise ConfigError(
            f"source={path}: amplitudes up to {high:.3g}, published are 46-57. It was normalised: undo it."
        )
    if low < MARGIN * AMPLITUDE[0] or high > MARGIN * AMPLITUDE[1]:
        raise ConfigError(
            f"source={path}: amplitudes from {low:.3g} to {high:.3g}, published are {AMPLITUDE[0]} to {AMPLITUDE[1]}. "
            "Another "
            "unit or a damaged file: give the published one."
        )


def _require_speed(speeds: np.ndarray, path: Path) -> None:
    """ConfigError unless speeds are m/s and grow along depth rather than along x."""
    low = min(float(_read_sample(speeds, i, path, "speed").min()) for i in range(len(speeds)))
    high = max(float(speeds[i].max()) for i in range(len(speeds)))
    if low < SPEED[0] or high > SPEED[1]:
        raise ConfigError(
            f"source={path}: speeds from {low:.4g} to {high:.4g}, must be 1500-4500 m/s: {_guess_unit(low, high)}."
        )
    rows = np.stack([m[0, [0, -1]].mean(1, dtype=np.float64) for m in speeds])  # (n, 2): top and bottom
    columns = np.stack([m[0, :, [0, -1]].mean(1, dtype=np.float64) for m in speeds])  # left and right
    down, sideways = (abs(float(np.diff(ends).mean())) for ends in (rows, columns))
    chance = float(np.diff(columns).std()) / math.sqrt(len(speeds))  # standard error: pictures (Style) have no trend
    if sideways > max(TREND, SIDEWAYS * down, SIGNIFICANT * chance):
        raise ConfigError(
            f"source={path}: the mean speed changes by {sideways:.0f} m/s along x, {down:.0f} m/s along z: axes are "
            "swapped. Transpose z "
            "and x."
        )


def _guess_unit(low: float, high: float) -> str:
    """What speeds outside the range of m/s probably are, and what to do."""
    if low < 0:
        return "normalised labels. Undo that"
    for name, (factor, back) in UNITS.items():
        if SPEED[0] * factor <= low and high <= SPEED[1] * factor:
            return f"it looks like {name}. Multiply by {back}"
    return "no unit fits. Give the published file"


def _require_arrivals(gathers: np.ndarray, speeds: np.ndarray, path: Path, config: OpenFWIConfig) -> None:
    """ConfigError unless the direct waves come when the uppermost speeds of their models say."""
    survey = config.survey
    if config.times < survey.num_samples or config.depth <= survey.row:
        raise ConfigError(
            f"times={config.times}: fewer than the {survey.num_samples} samples in which the direct wave passes, so "
            "that gathers cannot be compared with models. Give longer gathers."
        )
    table = onset_table(survey)
    errors = np.array([arrival_errors(g, m[0], survey, table) for g, m in zip(gathers, speeds, strict=True)])
    mean, worst = float(errors.mean()), int(errors.argmax())
    if mean > LATE_FILE or errors[worst] > LATE_PAIR:
        raise ConfigError(
            f"source={path}: the direct wave is {mean:.1f} samples off its model on the mean, {errors[worst]:.1f} in "
            f"pair {worst} (at most {LATE_FILE:g} and {LATE_PAIR:g}). Time or z is reversed, axes are swapped, gathers "
            "and models do not belong together, or time_step, spacing or frequency is another. Give the published pair."
        )


def _read_sample(array: np.ndarray, index: int, path: Path, name: str) -> np.ndarray:
    return require_finite(np.array(array[index]), f"{name} {index}", path)


def _coordinates(config: OpenFWIConfig) -> dict[str, Any]:
    return {
        "time": np.arange(1, config.times + 1) * config.time_step,  # sample n is the pressure after step n + 1
        "shot": np.array(config.survey.columns) * config.spacing,
        "receiver": np.arange(config.receivers) * config.spacing,
        "z": np.arange(config.depth) * config.spacing,
        "x": np.arange(config.receivers) * config.spacing,
    }
