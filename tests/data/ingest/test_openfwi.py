"""OpenFWI's pairs come back to the last bit, and wrong units, signs and axes are told by the figures published."""

import numpy as np
import pytest
import torch

from data.gathers import open_gathers
from data.ingest.arrivals import arrival_errors, onset_table
from data.ingest.openfwi import LATE_FILE, LATE_PAIR, OpenFWIConfig, ingest
from data.simulate.openfwi_families import FAMILIES, draw_velocity_map
from data.simulate.seismic_survey import Survey, record_gathers
from shodh.config import ConfigError

SMALL = OpenFWIConfig(times=240, receivers=24, depth=24, num_test=2, unverified="accept")


@pytest.fixture
def source(published, tmp_path):
    return published.openfwi(tmp_path / "FlatVel_A")


def edit(path, change):
    np.save(path, change(np.load(path)))


def test_pairs_come_back_to_the_last_bit_in_the_order_of_their_files(source, tmp_path, said):
    written = ingest(source, tmp_path / "gathers", SMALL, said.append)
    store = open_gathers(tmp_path / "gathers", deep=True)
    assert store.num_trajectories == 6 and written.digest == store.digest
    assert store.trajectories("train") == [0, 1, 2, 3] and store.trajectories("test") == [4, 5]
    np.testing.assert_array_equal(store.seismogram(4), np.load(source / "data/data2.npy")[1])
    np.testing.assert_array_equal(store.wave_speed(4), np.load(source / "model/model2.npy")[1, 0])
    np.testing.assert_array_equal(store.coordinate("shot"), [0, 60, 120, 170, 230])  # to the grid, as published
    np.testing.assert_allclose(store.coordinate("time")[[0, -1]], [1e-3, 0.24])  # sample n is after step n + 1


def test_fault_families_lie_flat(source, tmp_path, said):
    for number in (1, 2):
        (source / f"data/data{number}.npy").rename(source / f"seis{number}_1_0.npy")
        (source / f"model/model{number}.npy").rename(source / f"vel{number}_1_0.npy")
    for kind in ("data", "model"):
        (source / kind).rmdir()
    ingest(source, tmp_path / "gathers", SMALL, said.append)
    np.testing.assert_array_equal(
        open_gathers(tmp_path / "gathers").seismogram(0), np.load(source / "seis1_1_0.npy")[0]
    )


def test_an_interrupted_ingest_continues_and_ends_with_the_same_digest(source, tmp_path, said, monkeypatch):
    whole = ingest(source, tmp_path / "whole", SMALL, said.append)
    from data.ingest import openfwi

    read, count = openfwi._read_sample, iter(range(100))

    def stop_late(*arguments):
        if arguments[3] == "speed" and next(count) > 8:  # 6 while it is inspected, then while it is written
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(openfwi, "_read_sample", stop_late)
    with pytest.raises(KeyboardInterrupt):
        ingest(source, tmp_path / "half", SMALL, said.append)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="incomplete"):
        open_gathers(tmp_path / "half")
    continued = ingest(source, tmp_path / "half", SMALL, said.append)
    assert continued.digest == whole.digest and 0 < continued.num_written < whole.num_written
    again = ingest(source, tmp_path / "half", SMALL, said.append)
    assert again.digest == whole.digest and again.num_written == 0


def test_another_source_does_not_continue_a_store(source, tmp_path, said):
    ingest(source, tmp_path / "gathers", SMALL, said.append)
    edit(source / "model/model1.npy", lambda m: m + 1)
    with pytest.raises(ConfigError, match="source is .* there, .* now"):
        ingest(source, tmp_path / "gathers", SMALL, said.append)


def sideways(model):
    return np.ascontiguousarray(model.swapaxes(2, 3))


FASTER = np.array([0.8, 1, 1], np.float32)[:, None, None, None]


REFUSED = {
    "km/s": ("model/model1.npy", lambda m: m / 1000, "it looks like km/s. Multiply by 1000"),
    "normalised speed": ("model/model1.npy", lambda m: (m - 3000) / 1500, "normalised labels"),
    "feet per second": ("model/model2.npy", lambda m: m / np.float32(0.3048), "it looks like ft/s. Multiply by 0.3048"),
    "z and x swapped": ("model/model1.npy", sideways, "axes are swapped. Transpose z and x"),
    "reversed sign": ("data/data1.npy", lambda d: -d, "the sign is reversed"),
    "normalised gathers": ("data/data1.npy", lambda d: d / 60, "It was normalised"),
    "other unit": ("data/data2.npy", lambda d: d * 1000, "Another unit"),
    "receivers before times": ("data/data1.npy", lambda d: d.swapaxes(2, 3).copy(), "axes are swapped"),
    "reversed time": ("data/data1.npy", lambda d: d[:, :, ::-1].copy(), "the direct wave is"),
    "reversed depth": ("model/model1.npy", lambda m: m[:, :, ::-1].copy(), "the direct wave is"),
    "reversed order of shots": ("data/data2.npy", lambda d: d[:, ::-1].copy(), "the direct wave is"),
    "gathers of other models": ("data/data2.npy", lambda d: np.roll(d, 1, 0), "the direct wave is"),
    "one model a fifth slower": ("model/model2.npy", lambda m: m * FASTER, "the direct wave is"),
    "fewer gathers": ("data/data1.npy", lambda d: d[:2], "2 gathers, model1.npy has 3 models"),
    "NaN": ("data/data2.npy", lambda d: np.where(d == d.max(), np.nan, d).astype(np.float32), "NaN or infinite"),
    "float64": ("model/model2.npy", lambda m: m.astype(np.float64), "float64, not float32"),
    "no channel axis": ("model/model2.npy", lambda m: m[:, 0], "another layout"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_as_published_is_refused_in_one_line(kind, source, tmp_path, said):
    name, change, reason = REFUSED[kind]
    edit(source / name, change)
    with pytest.raises(ConfigError, match=reason) as error:
        ingest(source, tmp_path / "gathers", SMALL, said.append)
    assert "\n" not in str(error.value)


def test_pictures_without_a_trend_are_no_swapped_layers(source, published, tmp_path, said):
    """Style families: few models, steep along x, each another way."""
    slopes = np.array([1, -1, 0.4])[:, None, None, None] * np.linspace(-1000, 1000, 24)
    models = np.broadcast_to(3000 + slopes, (3, 1, 24, 24)).astype(np.float32)
    np.save(source / "model/model1.npy", models)
    np.save(source / "data/data1.npy", published.record(models))
    assert ingest(source, tmp_path / "gathers", SMALL, said.append).num_written > 0


def test_a_file_without_its_counterpart_is_named(source, tmp_path, said):
    (source / "model/model2.npy").unlink()
    with pytest.raises(ConfigError, match="model2.npy: missing"):
        ingest(source, tmp_path / "gathers", SMALL, said.append)


@pytest.mark.slow
def test_direct_waves_of_every_family_fit_their_models_and_no_wrong_ones():
    """30 pairs a family: sound ones stay within half the limits; every wrong file of 30 is beyond them."""
    survey = OpenFWIConfig().survey
    table = onset_table(survey)
    for number, (name, family) in enumerate(FAMILIES.items()):
        random = [np.random.default_rng([0, number, index]) for index in range(30)]
        models = np.stack([draw_velocity_map(family, generator) for generator in random])
        gathers = np.concatenate(
            [record_gathers(batch, Survey()).numpy() for batch in torch.from_numpy(models).split(10)]
        )

        def errors(gathers, models):
            return np.array([arrival_errors(g, m, survey, table) for g, m in zip(gathers, models, strict=True)])

        sound = errors(gathers, models)
        assert sound.mean() < LATE_FILE / 2 and sound.max() < LATE_PAIR / 2
        wrong = {
            "z and x swapped": errors(gathers, models.swapaxes(1, 2)),
            "depth reversed": errors(gathers, models[:, ::-1]),
            "time reversed": errors(gathers[:, :, ::-1], models),
            "other models": errors(gathers, np.roll(models, 1, 0)),
        }
        assert all(found.mean() > LATE_FILE for found in wrong.values())
        figures = ", ".join(f"{kind} {found.mean():.1f}" for kind, found in wrong.items())
        print(f"\n{name}: sound {sound.mean():.2f}, at most {sound.max():.2f}; {figures}")
