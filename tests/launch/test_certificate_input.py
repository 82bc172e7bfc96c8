"""Certificates of what cannot be certified: whose fault it is, in one line, and no trained tokenizer is lost."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from certification import export_certified
from conftest import make_domain
from evaluate_model import write_certified

from data.chunks import write_chunk
from data.digests import read_digests, seal
from data.layout import StoreHeader, field_arrays
from data.reader import Store
from shodh.config import ConfigError
from shodh.evaluation.certificate import CertificateConfig
from shodh.fields import DomainSpec, FieldSpec, Grid
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from tokenizer.export import digest_weights, load_tokenizer, save_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is no package

from random_store import write_random_store  # noqa: E402

SCALES = {"velocity_scale": 2.0, "pressure_scale": 1.0, "medium_mean": 0.0, "medium_scale": 1.0}
CHANNEL = replace(make_domain(), name="channel")
PORES = FieldSpec(name="pore_space", units="1", location="cell", long_name="1 in pores, 0 in the solid")
FEW = CertificateConfig(num_random=1)


@pytest.fixture
def model() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(latent_channels=8, medium_channels=4, widths=(8, 16, 32)))


def make_store(folder: Path, domain: DomainSpec = CHANNEL, resolution: int = 16) -> Store:
    """Two trajectories of three snapshots, the last trajectory held out; the medium is noise."""
    return write_random_store(folder / "stores" / "channel", domain, resolution, num_trajectories=2, num_snapshots=3)


def put_nan_into_pressure(store: Store) -> None:
    """As another program could write it, digests and all: our own writer refuses it."""
    array = field_arrays(StoreHeader(store.plan, store.grid))["pressure"]
    values = np.zeros((store.num_snapshots, *store.grid.shape), np.float32)
    values[2, 0, 0, 0] = np.nan
    seal(store.path, {**read_digests(store.path), **write_chunk(store.path, array, (1, 0, 0, 0, 0), values)})


def certify_stores(folder: Path, model: Autoencoder, known: DomainSpec = CHANNEL) -> None:
    """The certificate of a tokenizer that knows one domain, by a config that names the store ``channel``."""
    save_tokenizer(folder / "tokenizer.safetensors", model, {known.name: known}, {known.name: SCALES})
    config = folder / "evaluate.yaml"
    paths = {"stores": folder / "stores", "latents": folder, "tokenizer": folder / "tokenizer.safetensors"}
    lines = [*(f"{key}: {path}" for key, path in paths.items()), f"run: {folder / 'run'}", "domains: [channel]"]
    config.write_text("\n".join([*lines, "threads: 1", "certificate: {num_random: 1}"]))
    write_certified([str(config)])


@pytest.mark.parametrize("statistics", [{}, {"velocity_scale": 2.0}, SCALES | {"pressure_scale": 0.0}])
def test_domain_without_whole_statistics_is_named(tmp_path, model, statistics):
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, model, {"channel": CHANNEL}, {"channel": statistics} if statistics else {})
    with pytest.raises(ConfigError, match="^tokenizer: has no statistics of channel.*Export it again") as error:
        write_certified([str(path), "num_random=1"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("domain", "resolution", "said"),
    [
        (replace(CHANNEL, velocity=replace(CHANNEL.velocity, units="m3 s-1")), 16, "velocity.units is 'm3"),
        (CHANNEL, 20, r"grid \(20, 20, 20\) is not divisible by 8"),
    ],
)
def test_store_that_the_tokenizer_was_not_trained_for_is_refused(tmp_path, model, domain, resolution, said):
    make_store(tmp_path, domain, resolution)
    with pytest.raises(ConfigError, match=f"store=.*channel: .*{said}"):
        certify_stores(tmp_path, model)


def test_store_of_an_unknown_domain_is_refused_instead_of_skipped(tmp_path, model):
    make_store(tmp_path)
    with pytest.raises(ConfigError, match="domains=channel: the tokenizer was trained without it"):
        certify_stores(tmp_path, model, replace(CHANNEL, name="another"))


def test_nan_in_a_held_out_field_is_the_stores_fault_and_its_place_is_named(tmp_path, model):
    store = make_store(tmp_path)
    put_nan_into_pressure(store)
    with pytest.raises(ConfigError, match=f"store={store.path}: trajectory 1, snapshot 2: pressure holds NaN"):
        certify_stores(tmp_path, model)
    assert not (tmp_path / "run" / "certificate.json").exists()


def test_held_out_medium_that_is_no_pore_space_is_the_stores_fault(tmp_path, model):
    porous = replace(CHANNEL, medium=PORES)
    store = make_store(tmp_path, porous)
    with pytest.raises(ConfigError, match=f"store={store.path}: trajectory 1, snapshot 0: medium: not 0 or 1"):
        certify_stores(tmp_path, model, porous)


def export(run: Path, model: Autoencoder, grids: dict[str, Grid], domain: DomainSpec = CHANNEL) -> Path:
    return export_certified(run, model, {"channel": domain}, {"channel": SCALES}, grids, FEW)


def test_certifying_changes_no_weight_and_no_digest_of_an_export(tmp_path, model):
    plain = save_tokenizer(tmp_path / "plain.safetensors", model, {"channel": CHANNEL}, {"channel": SCALES})
    loaded = load_tokenizer(export(tmp_path, model, {}))
    assert loaded.certificate is not None and loaded.certificate["verdict"] == "exact"
    assert loaded.digest == plain and digest_weights(loaded.autoencoder) == digest_weights(model)


def test_weights_that_fail_are_exported_with_their_verdict_and_end_in_an_error(tmp_path, model):
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    with pytest.raises(
        RuntimeError, match="does not conserve exactly. channel, random latents on 16x24x32: potentials"
    ):
        export(tmp_path, model, {})
    loaded = load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert loaded.certificate is not None and loaded.certificate["verdict"] == "FAILED"
    assert digest_weights(loaded.autoencoder) == digest_weights(model)
    assert (tmp_path / "certificate.json").is_file()


def test_certification_that_breaks_down_leaves_the_export_behind(tmp_path, model):
    widths = tuple(0.2 * 1.05**k for k in range(20))
    uneven = Grid(shape=(16, 20, 16), spacing=(1.0, widths, 1.0), boundary=CHANNEL.boundary)  # 8 does not divide it
    with pytest.raises(RuntimeError, match="saved, but could not be certified.*evaluate_model.py certificate"):
        export(tmp_path, model, {"channel": uneven})
    loaded = load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert loaded.certificate is None and digest_weights(loaded.autoencoder) == digest_weights(model)
