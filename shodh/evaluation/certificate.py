"""A certificate of what a decoder conserves: every figure with its operator, its storage and what a wrong one sees.

The stored FP32 arrays are evaluated in FP64. Divergence of fluxes, curl of circulations, flux through walls and, after
the masked projection, flux through solid must be exactly 0.0; if one is not, the verdict is FAILED and says where.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shodh.config import ConfigError, to_plain
from shodh.evaluation.careless import CENTRAL, careless_curls, careless_divergences
from shodh.evaluation.divergence import (
    CURL_OPERATOR,
    ConservationSums,
    find_worst,
    merge_sums,
    sum_curl,
    sum_divergence,
    summarise_sums,
)
from shodh.evaluation.report_run import format_number
from shodh.fields import DomainSpec, Grid
from shodh.physics.masked_projection import open_faces, project_into_pores

EXACT, FAILED = "exact", "FAILED"
PROJECTED_CELLS = 2**20  # of a case are projected into its pores, at least one field: 128^3 takes a quarter minute


@dataclass(frozen=True, kw_only=True)
class CertificateConfig:
    """How many fields are decoded for a certificate, per domain."""

    num_random: int = 4  # of random latents, per grid, with mean flow and without
    num_held_out: int = 32  # of encoded held-out snapshots, where there are stores
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_random < 1 or self.num_held_out < 0:
            raise ValueError(f"num_random={self.num_random}, num_held_out={self.num_held_out}: must be from 1 and 0.")


class Decode(NamedTuple):
    """A batch of decodes as stored, in normalised units and on ``Grid.relative``."""

    solenoidal: Float[Tensor, "b 3 x y z"] | None  # fluxes, whose divergence must be 0
    irrotational: Float[Tensor, "b 3 x y z"] | None  # circulations, whose curl must be 0
    pore: Bool[Tensor, "b x y z"] | None = None  # where there is solid, to project the fluxes


class Case(NamedTuple):
    """Decodes of one domain and grid that are certified together."""

    source: str  # what was decoded
    domain: DomainSpec
    grid: Grid  # ``Grid.relative``
    mean_flow: bool
    velocity_scale: float  # physical units, for readers who rescale
    batches: Callable[[], Iterable[Decode]]


class _Kind(NamedTuple):
    name: str
    sums: Callable[[Tensor, Grid], ConservationSums]
    careless: Callable[[Tensor, Grid, float], dict[str, Tensor]]


KINDS = {
    "solenoidal": _Kind("divergence", sum_divergence, careless_divergences),
    "irrotational": _Kind("curl", sum_curl, careless_curls),
}


@torch.no_grad()
def certify(cases: Sequence[Case], weights: str) -> dict[str, Any]:
    """The certificate of all cases, as JSON holds it; ``weights`` is the digest of the weights that decoded them.

    Raises ConfigError where a case has bad input, which says nothing of the weights.
    """
    domains: dict[str, list[dict[str, Any]]] = {}
    failures: list[str] = []
    for case in cases:
        shape = "x".join(map(str, case.grid.shape))
        place = f"{case.domain.name}, {case.source} on {shape}"
        try:
            block, faults = _certify_case(case)
        except ConfigError:
            raise
        except ValueError as error:  # not finite: nothing to measure
            block, faults = {"decoded": case.source, "grid": to_plain(case.grid), "num_fields": 0}, [str(error)]
        domains.setdefault(case.domain.name, []).append(block)
        failures += [f"{place}: {fault}" for fault in faults]
    return {
        "verdict": FAILED if failures or not cases else EXACT,
        "failures": failures,
        "weights": weights,
        "num_fields": sum(block["num_fields"] for blocks in domains.values() for block in blocks),
        "domains": domains,
    }


def write_certificate(folder: Path, certificate: Mapping[str, Any]) -> Path:
    """Write ``certificate.json`` into a folder, whole or not at all, and return its path."""
    path, partial = folder / "certificate.json", folder / "certificate.json.tmp"
    partial.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def require_exact(certificate: Mapping[str, Any], file: Path) -> None:
    """RuntimeError naming the first failure, unless the verdict on the tokenizer in ``file`` is exact."""
    if certificate["verdict"] != EXACT:
        first = next(iter(certificate["failures"]), "Nothing was decoded: it knows no domain.")
        raise RuntimeError(f"tokenizer={file}: does not conserve exactly. {first}")


def format_certificate(certificate: Mapping[str, Any]) -> str:
    """The certificate as aligned text, one row a case, the verdict and every failure below."""
    header = ("domain", "decoded", "grid", "fields", "mean flow", "max |div| or |curl|", "wall flux", "solid flux")
    lines: list[tuple[str, ...]] = [header]
    for name, blocks in certificate["domains"].items():
        for block in blocks:
            measured = [block[kind.name]["max_abs"] for kind in KINDS.values() if kind.name in block]
            solid = block.get("solid_flux")
            lines.append(
                (
                    name[:24],
                    block["decoded"],
                    "x".join(map(str, block["grid"]["shape"])),
                    str(block["num_fields"]),
                    "on" if block.get("mean_flow_on") else "off",
                    ", ".join(map(format_number, measured)) or "-",
                    format_number(block.get("wall_flux")),
                    f"{format_number(solid['max_before'])} -> {format_number(solid['max_after'])}" if solid else "-",
                )
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    verdict = f"{certificate['verdict']}: {certificate['num_fields']} decodes of weights {certificate['weights'][:12]}"
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], verdict, *certificate["failures"]])


def _certify_case(case: Case) -> tuple[dict[str, Any], list[str]]:
    measured: dict[str, _Measured] = {}
    projection = _Projection(case.grid)
    faults: list[str] = []
    wall_flux, num_fields = None, 0
    for decode in case.batches():
        for part in (name for name in KINDS if getattr(decode, name) is not None):
            stored = getattr(decode, part)
            measured.setdefault(part, _Measured(KINDS[part], case)).add(stored, num_fields, faults)
            wall_flux = _largest_wall_flux(stored, case.grid, wall_flux)
        if decode.pore is not None and decode.solenoidal is not None:
            projection.add(decode.solenoidal, decode.pore, num_fields, faults)
        num_fields += len(decode.solenoidal if decode.solenoidal is not None else decode.irrotational)  # type: ignore
    if wall_flux:
        faults.append(f"flux of {wall_flux:.3g} through a wall")
    block: dict[str, Any] = {
        "decoded": case.source,
        "grid": to_plain(case.grid),
        "num_fields": num_fields,
        "mean_flow_on": case.mean_flow,
        **{KINDS[part].name: values.summary() for part, values in measured.items()},
        "wall_flux": wall_flux,
    }
    return block | ({"solid_flux": projection.summary()} if projection.sums else {}), faults


class _Measured:
    """Divergence or curl of one case, batch by batch."""

    def __init__(self, kind: _Kind, case: Case) -> None:
        self.kind, self.case = kind, case
        self.sums: list[ConservationSums] = []
        self.careless: dict[str, float] = {}  # sums of squares by operator

    def add(self, stored: Tensor, num_before: int, faults: list[str]) -> None:
        self.sums.append(self.kind.sums(stored, self.case.grid))
        _note_leak(self.sums[-1], stored, self.case.grid, num_before, faults)
        for name, values in self.kind.careless(stored, self.case.grid, self.case.velocity_scale).items():
            self.careless[name] = self.careless.get(name, 0.0) + float(values.square().sum())

    def summary(self) -> dict[str, Any]:
        sums = merge_sums(self.sums)
        gradient = max(sums.gradient_squares, 1e-300)
        careless = {name: (squares / gradient) ** 0.5 for name, squares in self.careless.items()}
        return summarise_sums(sums) | {
            "stored": sums.stored,
            "evaluated": "float64",
            "mismatched_operator": CENTRAL,
            "what_others_see_rms_over_rms_gradient": careless,
        }


class _Projection:
    """Flux through solid before and after the masked projection, and its divergence after."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.left = max(1, PROJECTED_CELLS // torch.Size(grid.shape).numel())
        self.sums: list[ConservationSums] = []
        self.largest, self.largest_after, self.squares, self.solid_squares = 0.0, 0.0, 0.0, 0.0

    def add(self, flux: Tensor, pore: Tensor, num_before: int, faults: list[str]) -> None:
        flux, pore = flux[: self.left], pore[: self.left]
        if not len(flux):
            return
        self.left -= len(flux)
        closed = ~open_faces(pore, self.grid.boundary)
        projected = project_into_pores(flux, pore, self.grid)
        self.sums.append(sum_divergence(projected, self.grid))
        _note_leak(self.sums[-1], projected, self.grid, num_before, faults, " after the masked projection")
        before, after = flux[closed].double(), projected[closed].double()
        if after.numel() and bool(after.any()):
            faults.append(f"flux of {after.abs().max():.3g} through solid after the masked projection")
        self.largest = max(self.largest, float(before.abs().max()) if before.numel() else 0.0)
        self.largest_after = max(self.largest_after, float(after.abs().max()) if after.numel() else 0.0)
        self.squares += float(flux.double().square().sum())
        self.solid_squares += float(before.square().sum())

    def summary(self) -> dict[str, Any]:
        return {
            "max_before": self.largest,
            "rms_share_before": (self.solid_squares / max(self.squares, 1e-300)) ** 0.5,
            "max_after": self.largest_after,
            "divergence_after": summarise_sums(merge_sums(self.sums)),
        }


def _note_leak(
    sums: ConservationSums, stored: Tensor, grid: Grid, num_before: int, faults: list[str], when: str = ""
) -> None:
    if sums.max_abs != 0:
        field, *cell = find_worst(stored, grid, sums.operator)
        name = "curl" if sums.operator == CURL_OPERATOR else "divergence"
        faults.append(f"{name} of {sums.max_abs:.3g} in cell {tuple(cell)} of field {num_before + field}{when}")


def _largest_wall_flux(stored: Tensor, grid: Grid, before: float | None) -> float | None:
    """Largest magnitude on faces in lower walls; None without walls. Upper walls are not stored: nothing crosses."""
    walls = [axis for axis in range(3) if grid.boundary[axis] == "wall"]
    found = [float(stored[:, axis].select(axis + 1, 0).abs().max()) for axis in walls]
    return max([*found, before or 0.0]) if found else None
