"""The certificate: exact zeros where there are, FAILED with the place where there are not."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_domain

from shodh.config import ConfigError
from shodh.evaluation.careless import CENTRAL, RESCALED, SPECTRAL, careless_curls, careless_divergences
from shodh.evaluation.certificate import (
    Case,
    Decode,
    certify,
    format_certificate,
    require_exact,
    write_certificate,
)
from shodh.evaluation.report_certificate import find_certificate, show_certificate
from shodh.evaluation.report_run import read_run
from shodh.fields import Grid
from shodh.physics.exterior import curl_of_edges, gradient_of_cells
from shodh.physics.helmholtz import Potentials, compose_velocity, snap_potentials

PERIODIC = ("periodic", "periodic", "periodic")
CHANNEL = ("periodic", "wall", "periodic")
SHAPE = (8, 10, 12)


def make_grid(boundary=CHANNEL) -> Grid:
    widths = 0.5 if boundary[1] == "periodic" else tuple(0.2 * 1.1**k for k in range(SHAPE[1]))
    return Grid(shape=SHAPE, spacing=(1.0, widths, 0.7), boundary=boundary).relative


def random_flux(boundary=CHANNEL, space="solenoidal", num: int = 3) -> torch.Tensor:
    potentials = Potentials(torch.randn(num, 3, *SHAPE), torch.randn(num, *SHAPE), torch.randn(num, 3))
    return compose_velocity(snap_potentials(potentials), boundary, space)


def make_case(*decodes: Decode, boundary=CHANNEL, space="solenoidal") -> Case:
    domain = make_domain(space, boundary)
    return Case("random latents", domain, make_grid(boundary), True, 3.7, lambda: decodes)


def test_exact_decodes_are_certified_as_exact_with_all_that_gives_the_zero_meaning():
    pore = torch.rand(3, *SHAPE) < 0.7
    certificate = certify([make_case(Decode(random_flux(), None, pore), Decode(random_flux(), None))], "5eed")
    assert certificate["verdict"] == "exact" and certificate["failures"] == []
    assert certificate["num_fields"] == 6 and certificate["weights"] == "5eed"
    (block,) = certificate["domains"]["anything"]
    measured = block["divergence"]
    for name in ("max_abs", "rms", "mean_abs", "rms_over_rms_gradient"):
        assert measured[name] == 0.0
    assert (measured["stored"], measured["evaluated"]) == ("float32", "float64")
    assert "incidence" in measured["operator"] and measured["mean_flow"] > 0
    assert block["wall_flux"] == 0.0 and block["mean_flow_on"] is True
    solid = block["solid_flux"]
    assert solid["max_before"] > 0 and solid["max_after"] == 0.0
    assert solid["divergence_after"]["max_abs"] == 0.0 and solid["divergence_after"]["num_fields"] == 3
    assert json.loads(json.dumps(certificate)) == certificate


def test_one_tampered_value_fails_with_domain_field_and_worst_cell():
    exact, tampered = random_flux(), random_flux()
    tampered[1, 0, 4, 5, 6] += 1.0
    certificate = certify([make_case(Decode(exact, None), Decode(tampered, None))], "")
    assert certificate["verdict"] == "FAILED"
    (failure,) = certificate["failures"]
    # the face lies between cells (3, 5, 6) and (4, 5, 6) of the second field of the second batch of three
    assert failure.startswith("anything, random latents on 8x10x12: divergence of 1 in cell (")
    assert failure.endswith(("(3, 5, 6) of field 4", "(4, 5, 6) of field 4"))
    assert "FAILED" in format_certificate(certificate) and failure in format_certificate(certificate)


def test_bad_input_is_no_fault_of_the_weights_and_not_put_into_a_certificate():
    def batches():
        yield Decode(random_flux(), None)
        raise ConfigError("store=s: trajectory 1, snapshot 2: pressure holds NaN.")

    with pytest.raises(ConfigError, match="snapshot 2"):
        certify([make_case()._replace(batches=batches)], "")


def test_only_an_exact_certificate_of_something_passes():
    require_exact(certify([make_case(Decode(random_flux(), None))], ""), Path("t.safetensors"))
    with pytest.raises(RuntimeError, match="tokenizer=t.safetensors: .*anything.*divergence of"):
        require_exact(certify([make_case(Decode(torch.randn(1, 3, *SHAPE), None))], ""), Path("t.safetensors"))
    with pytest.raises(RuntimeError, match="Nothing was decoded"):
        require_exact(certify([], ""), Path("t.safetensors"))


def test_the_last_bit_of_one_value_is_enough_to_fail():
    flux = random_flux()
    flux[2, 2, 1, 1, 1] = torch.nextafter(flux[2, 2, 1, 1, 1], torch.tensor(torch.inf))
    assert certify([make_case(Decode(flux, None))], "")["verdict"] == "FAILED"


def test_tampered_circulation_fails_by_its_curl():
    circulation = random_flux(space="irrotational")
    exact = certify([make_case(Decode(None, circulation), space="irrotational")], "")
    assert exact["verdict"] == "exact" and exact["domains"]["anything"][0]["curl"]["max_abs"] == 0.0
    circulation[0, 2, 3, 4, 5] += 1.0
    (failure,) = certify([make_case(Decode(None, circulation), space="irrotational")], "")["failures"]
    assert "curl of" in failure and "of field 0" in failure


def test_flux_through_a_wall_fails():
    flux = random_flux()
    flux[0, 1] += 1.0  # a uniform flow through the lower wall
    failures = certify([make_case(Decode(flux, None))], "")["failures"]
    assert any("flux of 1 through a wall" in failure for failure in failures)


def test_decodes_that_are_not_finite_and_certificates_of_nothing_fail():
    flux = torch.full((1, 3, *SHAPE), torch.nan)
    certificate = certify([make_case(Decode(flux, None))], "")
    assert certificate["verdict"] == "FAILED" and "not finite" in certificate["failures"][0]
    assert certify([], "")["verdict"] == "FAILED"


def test_careless_divergences_of_a_plane_wave_are_those_of_their_operators():
    """u = sin(kx) along x, on faces. Its exact slope has rms k / sqrt 2; a staggered difference sees k sinc(kh/2)."""
    n = 16
    grid = Grid(shape=(n, 4, 4), spacing=(1.0, 1.0, 1.0), boundary=PERIODIC)
    k = 2 * math.pi / n
    flux = torch.zeros(1, 3, n, 4, 4, dtype=torch.float64)
    flux[:, 0] = torch.sin(k * torch.arange(n, dtype=torch.float64))[:, None, None]
    rms = {name: float(d.square().mean().sqrt()) for name, d in careless_divergences(flux, grid, 3.7).items()}
    assert rms[SPECTRAL] == pytest.approx(k / math.sqrt(2), rel=1e-12)
    assert rms[RESCALED] == pytest.approx(2 * math.sin(k / 2) / math.sqrt(2), rel=1e-6)  # FP32
    assert rms[CENTRAL] == pytest.approx(math.sin(k) * math.cos(k / 2) / math.sqrt(2), rel=1e-12)


def test_rescaling_in_fp32_costs_round_off_and_wrong_operators_cost_percents():
    grid = make_grid(PERIODIC)
    flux = curl_of_edges(torch.randn(2, 3, *SHAPE), PERIODIC)
    gradient = float(flux.square().mean().sqrt())  # of white noise, of the order of its gradient
    seen = {name: float(d.square().mean().sqrt()) for name, d in careless_divergences(flux, grid, 3.7).items()}
    assert 0 < seen[RESCALED] < 100 * torch.finfo(torch.float32).eps * gradient
    assert seen[CENTRAL] > 1e-2 * gradient and seen[SPECTRAL] > 1e-2 * gradient
    circulation = gradient_of_cells(torch.randn(2, *SHAPE), PERIODIC)
    curls = {name: float(c.square().mean().sqrt()) for name, c in careless_curls(circulation, grid, 3.7).items()}
    assert 0 < curls[RESCALED] < 100 * torch.finfo(torch.float32).eps < 1e-2 < min(curls[CENTRAL], curls[SPECTRAL])


def write_run(folder: Path, certificate: dict | None, shipped: dict | None) -> str:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"certificate": shipped, "domains": {}}))
    if certificate is not None:
        write_certificate(folder, certificate)
    return show_certificate(read_run(folder))


def test_report_shows_the_certificate_of_the_evaluated_weights_and_no_other(tmp_path):
    exact = certify([make_case(Decode(random_flux(), None))], "aaaa")
    tampered = random_flux()
    tampered[0, 0, 1, 2, 3] += 1.0
    failed = certify([make_case(Decode(tampered, None))], "aaaa")
    assert "There is none yet" in write_run(tmp_path / "none", None, None)
    assert "Verdict: exact" in write_run(tmp_path / "shipped", None, exact)
    shown = write_run(tmp_path / "failed", failed, exact)
    assert "Certificate FAILED" in shown and ", 2, 3) of field 0" in shown
    other = write_run(tmp_path / "other", failed | {"weights": "bbbb"}, exact)
    assert "of other weights" in other and "Verdict: exact" in other


def test_a_broken_certificate_is_named(tmp_path):
    (tmp_path / "certificate.json").write_text('{"verdict": "exa')
    found, problem = find_certificate(read_run(tmp_path))
    assert found is None and "broken" in problem
