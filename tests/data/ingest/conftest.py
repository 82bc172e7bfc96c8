"""Small files written exactly to the published layouts, holding fields whose divergence and axes are known."""

import hashlib
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data.simulate.seismic_survey import Survey, record_gathers

LENGTH = 2 * np.pi


def solenoidal_velocity(x: np.ndarray, y: np.ndarray, z: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """A velocity (3, ...) without divergence, of period 2 pi, whose parts all have other wave numbers.

    The curl of (sin(y + 2z), sin(z + 3x), sin(x + 2y + phase) + sin(x) cos(2y) sin(z)) / 4 and a mean flow along x.
    """
    u = 2 * np.cos(x + 2 * y + phase) - np.cos(z + 3 * x) - 2 * np.sin(x) * np.sin(2 * y) * np.sin(z) + 0.5
    v = 2 * np.cos(y + 2 * z) - np.cos(x + 2 * y + phase) - np.cos(x) * np.cos(2 * y) * np.sin(z)
    w = 3 * np.cos(z + 3 * x) - np.cos(y + 2 * z)
    return np.stack(np.broadcast_arrays(u, v, w)) / 4


def points_of(shape: tuple[int, ...], spacing: float, start: float = 0.0) -> list[np.ndarray]:
    return [start + spacing * np.arange(n) for n in shape]


def write_manifest(folder: Path) -> None:
    """SHA256SUMS as ``sha256sum *`` writes it, in every folder that holds files."""
    for place in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        files = sorted(p for p in place.iterdir() if p.is_file())
        if files:
            lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
            (place / "SHA256SUMS").write_text("".join(lines))


@lru_cache
def simulate_gathers(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Layered models (num, 1, 24, 24) [m/s], square as the published ones are, and their gathers (num, 5, 240, 24)."""
    random = np.random.default_rng(seed)
    layers = np.sort(np.stack([random.permutation(np.arange(1600.0, 4400.0, 150.0))[:4] for _ in range(num)]), 1)
    model = np.repeat(np.repeat(layers, 6, 1)[:, None, :, None], 24, 3).astype(np.float32)
    return model, record_models(model)


def record_models(models: np.ndarray) -> np.ndarray:
    return record_gathers(torch.from_numpy(models[:, 0]), Survey(num_samples=240)).numpy()


def write_openfwi(folder: Path, num: int = 3, files: int = 2) -> Path:
    """A Vel family whose gathers are those of its models."""
    for kind in ("data", "model"):
        (folder / kind).mkdir(parents=True)
    for number in range(1, files + 1):
        model, gathers = simulate_gathers(num, number)
        np.save(folder / f"data/data{number}.npy", gathers)
        np.save(folder / f"model/model{number}.npy", model)
    return folder


def write_jhtdb(folder: Path, shape=(16, 12, 10), *, spacing=0.125, files=2, states=2, axes="zyx", start=0.3) -> Path:
    """Cut-outs of ``shape`` points, in the layout of the present service; ``axes`` is the order of the arrays' axes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        points = points_of(shape, spacing, start + number)
        with h5py.File(folder / f"cutout{number}.h5", "w") as file:
            for state in range(1, states + 1):
                velocity = solenoidal_velocity(*np.meshgrid(*points, indexing="ij"), phase=0.1 * state)
                order = ["xyz".index(axis) for axis in axes]
                values = np.moveaxis(velocity, 0, -1).transpose(*order, 3).astype(np.float32)
                file[f"Velocity_{state:04d}"] = values
                file[f"Pressure_{state:04d}"] = values[..., :1] ** 2
            for axis, coordinate in zip("xyz", points, strict=True):
                file[f"{axis}coor"] = coordinate.astype(np.float32)
    return folder


def conserved_flow(points: list[np.ndarray], length: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Density (t, x, y, z) between 0.5 and 1.5 and velocity (t, 3, x, y, z) that conserve mass exactly, parts unlike.

    For any displacement q, here of sines: density = 1 - div q and density * velocity = dq/dt. Periodic over ``length``.
    """
    x, y, z = (2 * np.pi / length * p for p in np.meshgrid(*points, indexing="ij"))
    time = times[:, None, None, None]
    scale, rates = 0.1 * length / (2 * np.pi), np.array([6.0, 5.0, 3.0])
    phases = [x + 2 * y + 1, 2 * x + y - z, 2 * z - y + 2]  # another wave along every axis for every component
    angles = [phase + rate * time for phase, rate in zip(phases, rates, strict=True)]
    moved = [scale * rate * np.cos(angle) for rate, angle in zip(rates, angles, strict=True)]
    density = 1 - 0.1 * (np.cos(angles[0]) + np.cos(angles[1]) + 2 * np.cos(angles[2]))
    return density, np.stack(moved, 1) / density[:, None]


def write_pdebench(folder: Path, shape=(16, 16, 16), *, num=2, states=3) -> Path:
    """One file of compressible flow near Mach 1 in a cube, named as the published ones, one t-coordinate too many."""
    folder.mkdir(parents=True, exist_ok=True)
    points = [(np.arange(n) + 0.5) / n for n in shape]
    flows = [conserved_flow(points, 1.0, 0.05 * np.arange(states) + 0.3 * i) for i in range(num)]
    density, velocity = (np.stack([flow[k] for flow in flows]) for k in (0, 1))
    pressure = 0.002 * density ** (5 / 3)
    with h5py.File(folder / "3D_CFD_Rand_M1.0_Eta1e-08_Zeta1e-08_periodic_Train.hdf5", "w") as file:
        for name, values in (("density", density), ("pressure", pressure)):
            file[name] = values.astype(np.float32)
        for i, name in enumerate(("Vx", "Vy", "Vz")):
            file[name] = velocity[:, :, i].astype(np.float32)
        for axis, n in zip("xyz", shape, strict=True):
            file[f"{axis}-coordinate"] = ((np.arange(n) + 0.5) / n).astype(np.float32)
        file["t-coordinate"] = (0.05 * np.arange(states + 1)).astype(np.float32)
    return folder


def write_the_well(
    folder: Path, shape=(12, 12, 12), *, num=2, states=3, walls="z", spacing=0.25, solenoidal=False
) -> Path:
    """One file in a cube with density, velocity, a tracer and a tensor; walls (or none) across the named axes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    points = points_of(shape, spacing, spacing / 2)
    with h5py.File(folder / "flow_train.hdf5", "w") as file:
        file.attrs["simulation_parameters"], file.attrs["Atwood"] = ["Atwood"], 0.5
        file.attrs["dataset_name"], file.attrs["grid_type"] = "flow", "cartesian"
        file.attrs["n_spatial_dims"], file.attrs["n_trajectories"] = 3, num
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y", "z"]
        dimensions["time"] = (0.1 * np.arange(states)).astype(np.float32)
        conditions = file.create_group("boundary_conditions")
        for axis, coordinate in zip("xyz", points, strict=True):
            dimensions[axis] = coordinate.astype(np.float32)
            group = conditions.create_group(f"{axis}_boundary")
            group.attrs["associated_dims"] = [axis]
            group.attrs["bc_type"] = "WALL" if axis in walls else "PERIODIC"
            group["mask"] = np.isin(np.arange(len(coordinate)), (0, len(coordinate) - 1))
        file.create_group("scalars").attrs["field_names"] = ["Atwood"]
        density, velocity = conserved_flow(points, shape[0] * spacing, 0.1 * np.arange(states))
        if solenoidal:
            velocity = np.stack([solenoidal_velocity(*np.meshgrid(*points, indexing="ij"))] * states)
        factor = 1 + 0.1 * np.arange(num).reshape(num, 1, 1, 1, 1, 1) * solenoidal
        fields = {
            "t0_fields/density": np.stack([density] * num),
            "t0_fields/tracer": random.normal(size=(num, states, *shape)),
            "t1_fields/velocity": np.moveaxis(velocity, 1, -1) * factor,
            "t2_fields/stress": random.normal(size=(num, states, *shape, 3, 3)),
        }
        for name, values in fields.items():
            file[name] = values.astype(np.float32)
            file[name].attrs["sample_varying"] = file[name].attrs["time_varying"] = True
            file[name].attrs["dim_varying"] = [True, True, True]
    return folder


def draw_rock(shape=(14, 12, 10)) -> np.ndarray:
    """1 in pores: channels along every axis through a solid, 17 % of it, and nowhere symmetric."""
    pore = np.zeros(shape, np.uint8)
    pore[:, 2:5, 3:6] = pore[5:8, :, 4:6] = pore[3:5, 3:4, :] = 1
    pore[9, 7, 7:9] = 1
    return pore


def write_rock(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "rock.npz", pore=draw_rock())
    return folder


class Published:
    """What the tests write sources with."""

    velocity = staticmethod(solenoidal_velocity)
    points = staticmethod(points_of)
    manifest = staticmethod(write_manifest)
    openfwi = staticmethod(write_openfwi)
    jhtdb = staticmethod(write_jhtdb)
    pdebench = staticmethod(write_pdebench)
    the_well = staticmethod(write_the_well)
    rock = staticmethod(write_rock)
    record = staticmethod(record_models)
    draw_rock = staticmethod(draw_rock)


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()


@pytest.fixture
def said() -> list[str]:
    """Lines that an ingest told its user: pass ``said.append``."""
    return []
