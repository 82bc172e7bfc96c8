"""Maps in OpenFWI's ten styles, and the loudness of their gathers against the published constants."""

import numpy as np
import pytest
import torch

from data.simulate.openfwi_families import FAMILIES, Family, FamilyName, draw_velocity_map
from data.simulate.seismic_survey import Survey, record_gathers


def draw(name: FamilyName, num: int) -> np.ndarray:
    return np.stack([draw_velocity_map(FAMILIES[name], np.random.default_rng([7, seed])) for seed in range(num)])


def num_speeds(velocity_map: np.ndarray) -> int:
    return len(np.unique(velocity_map))


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_stay_within_the_published_labels_and_fill_their_range(name: FamilyName):
    maps = draw(name, 60)
    assert maps.dtype == np.float32 and maps.shape == (60, 70, 70)
    assert 1500 <= maps.min() < 1600 and 4300 < maps.max() <= 4500


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.is_texture])
def test_layers_are_as_many_curved_cut_and_ordered_as_their_family_says(name: FamilyName):
    family = FAMILIES[name]
    maps = draw(name, 30)
    for velocity_map in maps:
        assert num_speeds(velocity_map) <= max(family.num_layers)
    assert (np.ptp(maps, axis=2).max() > 0) == (family.curved or family.faulted)
    middle = maps[:, :, 35]
    falls = (np.diff(middle, axis=1) < 0).any(axis=1)
    if not family.increasing:
        assert falls.any()
    elif not family.faulted:  # a fault of reverse throw may lay slow rock under fast
        assert not falls.any()


def test_number_of_layers_can_be_chosen():
    for name, layers in (("flatfault-a", 2), ("flatfault-b", 8), ("flatvel-a", 5)):
        family: Family = FAMILIES[name]
        drawn = [draw_velocity_map(family, np.random.default_rng(seed), num_layers=layers) for seed in range(10)]
        assert max(num_speeds(d) for d in drawn) == layers


def test_textures_of_style_b_are_sharper_and_all_grow_faster_with_depth():
    roughness = {}
    for name in ("style-a", "style-b"):
        maps = draw(name, 30)
        assert (maps[:, -20:].mean((1, 2)) > maps[:, :10].mean((1, 2))).mean() > 0.9
        roughness[name] = np.square(np.diff(maps, axis=1)).mean()
    assert roughness["style-b"] > 4 * roughness["style-a"]


def require_published_amplitudes(name: FamilyName, num_maps: int) -> None:
    """Within the published extremes and beyond half of each: a wrong sign, scale or source cannot pass."""
    family, lowest, highest = FAMILIES[name], 0.0, 0.0
    maps = torch.from_numpy(draw(name, num_maps))
    for batch in maps.split(10):
        gathers = record_gathers(batch, Survey())
        lowest, highest = min(lowest, gathers.min().item()), max(highest, gathers.max().item())
    assert family.data_min <= lowest < family.data_min / 2, name
    assert family.data_max / 2 < highest <= family.data_max, name


@pytest.mark.parametrize("name", FAMILIES)
def test_gathers_are_as_loud_as_the_published_ones(name: FamilyName):
    require_published_amplitudes(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gathers_of_many_maps_stay_within_the_published_extremes(name: FamilyName):
    require_published_amplitudes(name, 100)
