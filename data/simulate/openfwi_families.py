"""Velocity maps in the styles of OpenFWI's ten 2-D families, drawn by us; and the families' published constants.

Flat and curved layers ("Vel"), the same cut by faults ("Fault"), and maps with the texture of pictures ("Style"). In
version A speed grows with depth; in version B layers come in random order (and in Fault there are more of them), or the
texture is sharper (Style). Family, number of layers and ranges follow C. Deng et al., OpenFWI: Large-scale
Multi-structural Benchmark Datasets for Full Waveform Inversion, NeurIPS 2022, arXiv:2111.02926; what it leaves open is
our choice, so these maps resemble the published ones and are not samples of the same distribution.

How loud a gather is depends on the speed around the sources: over uniform rock its minimum falls from -20.7 at 1500 m/s
to -27.2 at 4500 m/s. The published minima therefore say how fast each family's rock is at the surface at most;
`Family.surface` is that speed less a few percent, for what echoes add.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr

FamilyName = Literal[
    "flatvel-a",
    "flatvel-b",
    "curvevel-a",
    "curvevel-b",
    "flatfault-a",
    "flatfault-b",
    "curvefault-a",
    "curvefault-b",
    "style-a",
    "style-b",
]
CELLS = 70  # per axis
SLOWEST, FASTEST = 1500.0, 4500.0  # m/s
TOP_LAYER = 10  # cells that the top layer is thick at least, before it is bent or cut
OUTCROP = 14  # rows: a layer that comes nearer to the surface is bound by `Family.surface`
DEEP = 16  # cells below the surface from where on `Family.surface` bounds textures no more


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family's maps look like, and its published constants."""

    folder: str  # as OpenFWI spells it
    num_layers: tuple[int, ...] = ()  # none for textures
    increasing: bool = False  # speed grows with depth
    curved: bool = False
    faulted: bool = False
    smoothing: tuple[float, float] = (0.0, 0.0)  # cells, of textures
    surface: float  # m/s, the fastest at the surface
    # smallest and largest pressure of the published data: github.com/lanl/OpenFWI, dataset_config.json
    data_min: float
    data_max: float

    @property
    def is_texture(self) -> bool:
        return not self.num_layers


VEL = (2, 3, 4, 5)
FEW, MANY = (2, 3, 4), (6, 7, 8)
FAMILIES: dict[FamilyName, Family] = {
    "flatvel-a": Family(
        folder="FlatVel_A", num_layers=VEL, increasing=True, surface=4300.0, data_min=-26.95, data_max=52.77
    ),
    "flatvel-b": Family(folder="FlatVel_B", num_layers=VEL, surface=4450.0, data_min=-27.17, data_max=56.05),
    "curvevel-a": Family(
        folder="CurveVel_A",
        num_layers=VEL,
        increasing=True,
        curved=True,
        surface=4300.0,
        data_min=-27.11,
        data_max=55.10,
    ),
    "curvevel-b": Family(
        folder="CurveVel_B", num_layers=VEL, curved=True, surface=4450.0, data_min=-29.04, data_max=57.03
    ),
    "flatfault-a": Family(
        folder="FlatFault_A",
        num_layers=FEW,
        increasing=True,
        faulted=True,
        surface=3200.0,
        data_min=-26.10,
        data_max=50.86,
    ),
    "flatfault-b": Family(
        folder="FlatFault_B", num_layers=MANY, faulted=True, surface=2900.0, data_min=-24.86, data_max=50.28
    ),
    "curvefault-a": Family(
        folder="CurveFault_A",
        num_layers=FEW,
        increasing=True,
        curved=True,
        faulted=True,
        surface=3500.0,
        data_min=-26.48,
        data_max=52.32,
    ),
    "curvefault-b": Family(
        folder="CurveFault_B",
        num_layers=MANY,
        curved=True,
        faulted=True,
        surface=2900.0,
        data_min=-24.93,
        data_max=50.98,
    ),
    "style-a": Family(folder="Style_A", smoothing=(3.0, 5.0), surface=2800.0, data_min=-24.96, data_max=48.93),
    "style-b": Family(folder="Style_B", smoothing=(0.5, 1.5), surface=2150.0, data_min=-23.76, data_max=46.01),
}


def draw_velocity_map(family: Family, rng: np.random.Generator, *, num_layers: int | None = None) -> np.ndarray:
    """Wave speed (z, x) [m/s], float32, within SLOWEST and FASTEST; ``num_layers`` is drawn if not given."""
    if family.is_texture:
        speed = _draw_texture(family, rng)
    else:
        speed = _draw_layers(family, int(rng.choice(family.num_layers)) if num_layers is None else num_layers, rng)
    return speed.clip(SLOWEST, FASTEST).astype(np.float32)


def _draw_layers(family: Family, num_layers: int, rng: np.random.Generator) -> np.ndarray:
    """Layers of one speed each with sharp interfaces, as cells see them at their centres."""
    z, x = np.meshgrid(*[np.arange(CELLS) + 0.5] * 2, indexing="ij")
    depth = z
    if family.curved:
        depth = depth + _fold(x, rng)
    if family.faulted:
        depth = depth + _fault_throw(x, z, rng)
    thickness = rng.uniform(0.5, 1.5, num_layers)
    interfaces = TOP_LAYER + (CELLS - TOP_LAYER) * np.cumsum(thickness)[:-1] / thickness.sum()
    interfaces[0] = max(TOP_LAYER, interfaces[0] - TOP_LAYER)
    layer = np.searchsorted(interfaces, depth.ravel()).reshape(depth.shape)
    return _layer_speeds(family, num_layers, int(layer[:OUTCROP].max()) + 1, rng)[layer]


def _layer_speeds(family: Family, num_layers: int, num_outcrops: int, rng: np.random.Generator) -> np.ndarray:
    """Speeds from top to bottom, each equally likely in the range; the first ``num_outcrops`` up to the surface's."""
    if family.increasing:
        speeds = np.sort(rng.uniform(SLOWEST, FASTEST, num_layers))
        speeds[:num_outcrops] = speeds[:num_outcrops].clip(max=family.surface)
        return speeds
    fastest = np.where(np.arange(num_layers) < num_outcrops, family.surface, FASTEST)
    return rng.uniform(SLOWEST, fastest)


def _fold(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far [cells] layers are bent upwards: a sine of drawn height and length, and half as much of another."""
    fold = np.zeros_like(x)
    for height in rng.uniform(2.0, 8.0) * np.array([1.0, 0.5]):
        length = CELLS * rng.uniform(0.5, 2.0)
        fold += height * np.sin(2 * math.pi * (x / length + rng.uniform()))
    return fold


def _fault_throw(x: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far [cells] rock has slipped upwards beyond one or two straight faults that cross the map's middle."""
    throw = np.zeros_like(x)
    for _ in range(rng.integers(1, 3)):
        dip, middle = rng.uniform(math.radians(30), math.radians(80)), rng.uniform(0.25, 0.75) * CELLS
        side = rng.choice([-1.0, 1.0])
        beyond = side * (x - middle) * math.tan(dip) > z - CELLS / 2
        throw += np.where(beyond, rng.uniform(4.0, 14.0) * rng.choice([-1.0, 1.0]), 0.0)
    return throw


def _draw_texture(family: Family, rng: np.random.Generator) -> np.ndarray:
    """A picture-like texture (amplitude spectrum 1 / k, drawn out sideways), smoothed, on speed growing with depth."""
    kz, kx = np.meshgrid(np.fft.fftfreq(2 * CELLS), np.fft.rfftfreq(2 * CELLS), indexing="ij")
    stretch = rng.uniform(1.5, 4.0)
    radius = np.hypot(kz, stretch * kx)
    radius[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((2 * CELLS, 2 * CELLS)))
    texture = gaussian_filter(np.fft.irfft2(noise / radius)[:CELLS, :CELLS], rng.uniform(*family.smoothing))
    texture = (texture - texture.mean()) / texture.std()
    depth = ((np.arange(CELLS) + 0.5) / CELLS)[:, None]
    ceiling = family.surface + (FASTEST - family.surface) * np.minimum(depth * CELLS / DEEP, 1.0)
    return SLOWEST + (ceiling - SLOWEST) * ndtr(0.6 * texture + rng.uniform(0.5, 1.5) * (depth - 0.5))
