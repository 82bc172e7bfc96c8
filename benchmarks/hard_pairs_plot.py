"""Maps of which expert serves which place: slices of one held-out state, coloured by expert, beside its flow."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from einops import rearrange
from hard_pairs_measures import Visit
from hard_pairs_models import Pair
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from shodh.fields import NUM_GIVEN

COLOURS = "tab10"


class ExpertMaps(NamedTuple):
    """One state: its speed, NaN in rock, and each layer's expert per token."""

    setting: str
    speed: Float[np.ndarray, "x y z"]
    expert: Int[np.ndarray, "layer u v w"]  # tokens along x, y, z

    @classmethod
    def of(cls, setting: str, pair: Pair, visit: Visit, patch: int) -> "ExpertMaps":
        """The middle one of a trajectory's states."""
        store, num_states = pair.stores[visit.member], len(visit.change)
        middle = num_states // 2
        speed = np.linalg.norm(store.snapshot(visit.trajectory, NUM_GIVEN - 1 + middle)[0], axis=0)
        if pair.domain == "porous_media":
            speed = np.where(store.medium(visit.trajectory) > 0.5, speed, np.nan)
        cells = np.array(pair.latents[visit.member].header.latent_shape[3:]) // patch
        routed = [routing.expert[:, 0].numpy().reshape(num_states, *cells) for routing in visit.routings]
        return cls(setting, speed, np.stack(routed)[:, middle])


def plot_maps(maps: Sequence[ExpertMaps], path: Path) -> None:
    """A row per model: the speed in every token's middle plane along z, side by side, then each layer's experts."""
    depth = len(maps[0].expert)
    figure, axes = plt.subplots(len(maps), depth + 1, figsize=(3.6 * (depth + 1), 1.1 * len(maps)), squeeze=False)
    for row, found in zip(axes, maps, strict=True):
        thickness = found.speed.shape[2] // found.expert.shape[3]
        _draw(row[0], found.speed[:, :, thickness // 2 :: thickness], "viridis", None)
        row[0].set_ylabel(found.setting.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize="small")
        for layer, axis in enumerate(row[1:]):
            _draw(axis, found.expert[layer], COLOURS, (0, 9))
    axes[0][0].set_title("speed (rock white): x-y planes along z", fontsize="small")
    for layer, axis in enumerate(axes[0][1:]):
        axis.set_title(f"expert of each token, layer {layer + 1}", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot -> {path}")


def _draw(axis: Axes, planes: np.ndarray, colours: str, limits: tuple[int, int] | None) -> None:
    """Planes (x, y) of a field (x, y, z), y upwards, side by side with a gap between."""
    gap = np.full((max(1, planes.shape[0] // 8), *planes.shape[1:]), np.nan)
    beside = rearrange(np.concatenate([planes, gap]), "x y z -> y (z x)")[:, : -len(gap)]
    low, high = limits or (None, None)
    axis.imshow(beside, origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
