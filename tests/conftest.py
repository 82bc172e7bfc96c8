"""Shared fixtures; shapes written in annotations are checked at run time for every package."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["shodh", "tokenizer", "data"], "beartype.beartype")

from shodh.fields import DomainSpec, FieldBatch, FieldSpec, Grid  # noqa: E402 - after the hook

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Real public data, where they are at hand."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not at hand: {SHARED_DATA} does not exist")
    return SHARED_DATA


def deepspeed_command(num_ranks: int) -> list[str]:
    """The launcher's command up to the script, on a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--quiet", "--master_port", str(port), "--num_accelerators", str(num_ranks)]


def cpu_environment() -> dict[str, str]:
    """For subprocesses: one thread a rank, no accelerator, our own interpreter first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def make_domain(
    space="solenoidal", boundary=("periodic", "wall", "periodic"), name="anything", parameters=("dt",)
) -> DomainSpec:
    cell = {"units": "1", "location": "cell"}
    return DomainSpec(
        name=name,
        velocity_space=space,
        boundary=boundary,
        velocity=FieldSpec(name="flux", units="1", location="face", long_name="flux"),
        pressure=FieldSpec(name="pressure", long_name="pressure", **cell),
        medium=FieldSpec(name="wall_distance", long_name="distance to the wall", **cell),
        parameters=parameters,
    )


def make_batch(domain: DomainSpec, n: int = 16, batch: int = 2, spacing=(0.2, 0.03, 0.1)) -> FieldBatch:
    grid = Grid(shape=(n, n, n), spacing=spacing, boundary=domain.boundary)
    shape = (n, n, n)
    return FieldBatch(
        torch.randn(batch, 3, *shape), torch.randn(batch, 1, *shape), torch.randn(batch, 1, *shape), domain, grid
    )
