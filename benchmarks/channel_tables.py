"""Published statistics of closed channels at Re_tau = 180, and how far a run is from them.

Lee and Moser, J. Fluid Mech. 774, 2015 (Re_tau 182.1, box 8 pi x 2 x 3 pi); Moser, Kim and Mansour, Phys. Fluids 11,
1999 (178.1, 4 pi x 2 x 4 pi / 3); del Alamo and Jimenez, Phys. Fluids 15, 2003 (186.3, 12 pi x 2 x 4 pi).
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from figures import Figure, at_most, stated
from scipy.interpolate import CubicSpline

from data.simulate.wall_statistics import WallProfiles

QUANTITIES = ("U", "uu", "vv", "ww", "uv")
TABLES = {
    "Lee-Moser": ("LM_Channel_0180_mean_prof.dat", "LM_Channel_Retau180.txt"),
    "Moser-Kim-Mansour": ("mkm_chan180.means", "mkm_chan180.reystress"),
    "del Alamo-Jimenez": ("hoyas_Re180.prof",),
}


class Profile(NamedTuple):
    """One quantity over the height, both in wall units."""

    height: np.ndarray
    value: np.ndarray


def read_tables(folder: Path) -> dict[str, dict[str, Profile]]:
    """Every quantity of every table, uv as the positive -<u'v'>. ValueError names the files that are not there."""
    missing = [name for names in TABLES.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--tables {folder}: lacks {', '.join(missing)}. Give the folder that holds the tables.")
    mean, stress = (np.loadtxt(folder / name, skiprows=1) for name in TABLES["Lee-Moser"])
    tables = {"Lee-Moser": [mean[:, 1], mean[:, 2], *(stress[:, c] for c in (12, 16, 20)), -stress[:, 13]]}
    mean, stress = (np.loadtxt(folder / name) for name in TABLES["Moser-Kim-Mansour"])
    tables["Moser-Kim-Mansour"] = [mean[:, 1], mean[:, 2], *(stress[:, c] for c in (2, 3, 4)), -stress[:, 5]]
    rows = np.loadtxt(folder / TABLES["del Alamo-Jimenez"][0], comments="%")
    tables["del Alamo-Jimenez"] = [rows[:, 1], rows[:, 2], *(rows[:, c] ** 2 for c in (3, 4, 5)), -rows[:, 10]]
    return {
        name: {quantity: Profile(columns[0], column) for quantity, column in zip(QUANTITIES, columns[1:], strict=True)}
        for name, columns in tables.items()
    }


def to_wall_units(profiles: WallProfiles, friction_reynolds: float) -> dict[str, Profile]:
    """The quantities of the first trajectory's profiles, as the tables have them."""
    cells, faces = profiles.cell_height * friction_reynolds, profiles.face_height * friction_reynolds
    return {
        "U": Profile(cells, profiles.velocity[0]),
        "uu": Profile(cells, profiles.uu[0]),
        "vv": Profile(faces, profiles.vv[0]),
        "ww": Profile(cells, profiles.ww[0]),
        "uv": Profile(faces, -profiles.uv[0]),
    }


def relative_errors(ours: Profile, table: Profile, low: float = 10.0, high: float = 170.0) -> Profile:
    """(ours - table) / table at our heights within [low, high] wall units and at both ends, by cubic splines."""
    inside = ours.height[(ours.height > low) & (ours.height < high)]
    height = np.concatenate([[low], inside, [high]])
    reference = CubicSpline(table.height, table.value)(height)
    return Profile(height, CubicSpline(ours.height, ours.value)(height) / reference - 1)


def compare(ours: dict[str, Profile], table: dict[str, Profile], name: str, bounds: dict[str, float]) -> list[Figure]:
    """The largest relative error of each quantity and where; held to its bound where it has one."""
    figures = []
    for quantity in QUANTITIES:
        error = relative_errors(ours[quantity], table[quantity])
        worst = int(np.argmax(np.abs(error.value)))
        label = f"{quantity}+ error against {name} (worst at y+ {error.height[worst]:.0f})"
        value = float(np.abs(error.value[worst]))
        figures.append(at_most(label, value, bounds[quantity]) if quantity in bounds else stated(label, value))
    return figures


def standard_errors(parts: list[dict[str, Profile]], table: dict[str, Profile]) -> dict[str, float]:
    """Largest standard error of the mean over the parts of each quantity's relative error."""
    errors = {}
    for quantity in QUANTITIES:
        values = np.array([relative_errors(part[quantity], table[quantity]).value for part in parts])
        errors[quantity] = float(values.std(0, ddof=1).max() / np.sqrt(len(values)))
    return errors


def plot(ours: dict[str, Profile], tables: dict[str, dict[str, Profile]], title: str, path: Path) -> None:
    """The run's lines over the tables' points, with the bounds of 2 % and 8 % about the first table."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    groups = (("U",), ("uu", "vv", "ww"), ("uv",))
    markers = dict(zip(tables, ("o", "^", "s"), strict=True))
    for panel, group in zip(panels, groups, strict=True):
        for colour, quantity in zip(("C0", "C1", "C2"), group, strict=False):
            panel.plot(*ours[quantity], color=colour, label=f"{quantity}+")
            for name, table in tables.items():
                points = table[quantity]
                keep = slice(1, None, 3)
                panel.plot(points.height[keep], points.value[keep], markers[name], ms=3, mfc="none", color="0.3")
            first = next(iter(tables.values()))[quantity]
            inside = (first.height >= 10) & (first.height <= 170)
            bound = 0.02 if quantity == "U" else 0.08
            height, value = first.height[inside], first.value[inside]
            panel.fill_between(height, value * (1 - bound), value * (1 + bound), color=colour, alpha=0.2, lw=0)
        panel.set_xlabel("y+")
        panel.legend(loc="best", frameon=False)
    panels[0].set_xscale("log")
    panels[0].set_xlim(1, None)
    panels[1].set_xlim(0, None)
    for name, marker in markers.items():
        panels[2].plot([], [], marker, ms=3, mfc="none", color="0.3", label=name)
    panels[2].legend(loc="upper right", frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
