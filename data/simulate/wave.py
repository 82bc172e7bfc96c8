"""The scalar wave equation in 3-D, (1 / c^2) phi_tt = laplace(phi) + s(x, t), stepped from rest in an absorbing box.

Solver: deepwave (A. Richardson, doi:10.5281/zenodo.3829886), leapfrog, 8th order in space, convolutional PML.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import deepwave
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ABSORBING_CELLS = 10


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How a wave is stepped. All shots share it, so a shot's result does not depend on its batch."""

    spacing: float  # m
    time_step: float  # s
    steps_per_observation: int
    fastest: float  # m/s, bounds every wave speed
    frequency: float  # Hz, where the absorbing layer works best
    space_order: Literal[2, 4, 6, 8] = 8


class Sources(NamedTuple):
    """Point sources s(x, t) = amplitude(t) · delta(x - x_s), of each shot; sample n holds time n · time_step."""

    location: Int[Tensor, "b s 3"]  # cell
    amplitude: Float[Tensor, "b s t"]


class Observation(NamedTuple):
    """The wave at one time, second-order accurate in the time step."""

    time: float  # s
    potential: Float[Tensor, "b x y z"]
    pressure: Float[Tensor, "b x y z"]  # -phi_t, per unit density


def propagate(
    wave_speed: Float[Tensor, "b x y z"], sources: Sources, solver: Solver, observe: Callable[[Observation], None]
) -> None:
    """Step the wave from rest through ``sources``, handing ``observe`` the model region every so many steps.

    Two successive potentials give their mean and, by difference, the pressure, both centred half a step before the
    later one: observation k is at time (k · steps_per_observation - 1/2) · time_step, k = 1, 2, ...
    """
    cell_volume = solver.spacing**3

    def hand_over(state: deepwave.CallbackState) -> None:
        if state.step == 0:
            return
        if state.internal_dt != state.dt:
            stable = state.internal_dt
            raise ValueError(f"time_step={solver.time_step}: unstable on this grid. Use at most {stable:.3g} s.")
        now, before = state.get_wavefield("wavefield_0", mode="read"), state.get_wavefield("wavefield_m1", mode="read")
        time = state.time - solver.time_step / 2
        observe(Observation(time, (now + before) / 2, (before - now) / solver.time_step))

    with torch.no_grad():
        deepwave.scalar(
            wave_speed,
            solver.spacing,
            solver.time_step,
            source_amplitudes=-sources.amplitude / cell_volume,  # deepwave has its source on the left-hand side
            source_locations=sources.location,
            accuracy=solver.space_order,
            pml_width=ABSORBING_CELLS,
            pml_freq=solver.frequency,
            max_vel=solver.fastest,
            forward_callback=hand_over,
            callback_frequency=solver.steps_per_observation,
            check_output_finite=False,  # checked at every observation, where trajectory and time are known
        )


def ricker(time: np.ndarray, frequency: float) -> np.ndarray:
    """The Ricker wavelet (1 - 2 a) exp(-a), a = (pi f t)^2, centred at time 0, peak 1."""
    a = (math.pi * frequency * time) ** 2
    return (1 - 2 * a) * np.exp(-a)
