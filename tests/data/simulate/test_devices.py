"""Solvers stay on the device of the fields they are given: a tensor made elsewhere meets a meta tensor and is refused.

No CUDA device is needed for that: operations on a meta tensor and one in memory raise, and what comes back from memory
would not be a meta tensor.
"""

import pytest
import torch

from data.simulate import porous_flow
from data.simulate.channel_flow import Channel, advance, refine, solve_pressure
from data.simulate.open_channel import OpenChannelConfig, make_grid

META = torch.device("meta")


def test_a_tensor_in_memory_does_not_mix_with_one_on_another_device():
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(3, 4, device=META) * torch.ones(4) @ torch.ones(4, 2)


@pytest.mark.parametrize("stencil", ["narrow", "wide"])
@pytest.mark.parametrize("stretching", [0.0, 1.7])
@pytest.mark.parametrize("top", ["free", "wall"])
def test_channel_stays_on_its_device(stencil, stretching, top):
    config = OpenChannelConfig(resolution=16, stretching=stretching, top=top)
    grid, fine = make_grid(config, 16), make_grid(config, 32)
    channel = Channel(grid, torch.empty(2, device=META), top=top, stencil=stencil)
    velocity = advance(torch.empty(2, 3, 16, 16, 16, device=META), channel, 0.01, 2)
    assert velocity.device == META and velocity.shape == (2, 3, 16, 16, 16)
    assert solve_pressure(velocity, channel).device == META
    assert refine(velocity, fine, top).device == META


@pytest.mark.parametrize("walls", ["smooth", "voxel"])
def test_flow_through_rock_stays_on_its_device(walls, monkeypatch):
    class Steps:  # an iteration count that a device decides stops after two: a meta tensor has no truth to ask for
        def __iter__(self):
            return iter(range(2))

    monkeypatch.setattr(porous_flow, "range", lambda *ends: Steps() if ends == (2000,) else range(*ends), raising=False)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    rock = porous_flow.prepare_rock(torch.empty(2, 8, 8, 8, dtype=torch.bool, device=META), walls=walls)
    force, viscosity = (torch.empty(2, dtype=torch.float64, device=META) for _ in range(2))
    state = porous_flow.advance(porous_flow.rest(rock), rock, viscosity, force, 0.01)
    assert all(part.device == META for part in state)
    exact = porous_flow.Rock(*(part.double() for part in rock))
    flux, potential = porous_flow.project(state.velocity.double(), exact, 1e-8)
    assert flux.device == potential.device == META
