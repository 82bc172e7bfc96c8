"""What the hard pairs count: experts that know the member, the trajectory or nothing; and the whole run, twice."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # last: its tokenizer.py must not be taken for the package

from conftest import cpu_environment  # noqa: E402
from hard_pairs_measures import Visit, _other_halvings, measure_pair  # noqa: E402
from hard_pairs_models import PAIRS  # noqa: E402
from hard_pairs_plot import ExpertMaps, plot_maps  # noqa: E402
from random_store import write_random_store  # noqa: E402

from data.simulate import porous_media  # noqa: E402
from shodh.fields import CONDITIONS, PARAMETERS, Routing  # noqa: E402
from tokenizer.autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from tokenizer.export import save_tokenizer  # noqa: E402

NUM_STATES, NUM_TOKENS, PER_MEMBER = 6, 8, 4


def route(expert: torch.Tensor) -> Routing:
    probability = torch.nn.functional.one_hot(expert, 2).float()
    return Routing(expert[:, None], torch.ones(len(expert), 1), probability, probability)


class Told:
    """What a member's latents say of its trajectories: the viscosity alternates, all else is 0."""

    def parameters(self, trajectory: int) -> np.ndarray:
        values = np.zeros(len(CONDITIONS), np.float32)
        values[PARAMETERS.index("viscosity")] = 0.01 * (1 + trajectory % 2)
        return values


TOLD: Any = SimpleNamespace(latents=(Told(), Told()))  # all of a pair that is asked for


def visit_all(choose) -> list[Visit]:
    """Trajectories of both members whose tokens go where ``choose(member, trajectory, state, token)`` says."""
    change = torch.arange(float(NUM_STATES))
    visits = []
    for member in (0, 1):
        for i in range(PER_MEMBER):
            places = [(t, n) for t in range(NUM_STATES) for n in range(NUM_TOKENS)]
            expert = torch.tensor([int(choose(member, i, t, n)) for t, n in places])
            visits.append(Visit(member, i, (route(expert),), change, 0.5))
    return visits


@pytest.mark.parametrize(
    ("choose", "known", "unknown"),
    [
        (lambda member, i, t, n: member, "I/H(member)", "I/H(viscosity)"),
        (lambda member, i, t, n: i % 2, "I/H(viscosity)", "I/H(member)"),
        (lambda member, i, t, n: t >= NUM_STATES // 2, "I/H(change of state)", "I/H(member)"),
    ],
)
def test_what_the_experts_follow_is_known_and_nothing_else(choose, known, unknown):
    found = {name: layers[0] for name, layers in measure_pair(visit_all(choose), TOLD).items()}
    assert found[known] == pytest.approx(1, abs=1e-12)
    assert found[unknown] < 1e-12
    assert found["purity"] == pytest.approx(1 if known == "I/H(member)" else 0.5, abs=1e-12)
    if known == "I/H(viscosity)":  # as one of the other halves, of which the largest is said
        assert next(value for name, value in found.items() if "other halves" in name) == pytest.approx(1, abs=1e-12)


def test_choice_by_place_alone_says_nothing_of_members_or_trajectories():
    found = measure_pair(visit_all(lambda member, i, t, n: n % 2), TOLD)
    for name in ("I/H(member)", "I(trajectory; expert)/H(expert)", "I/H(viscosity)", "I/H(change of state)"):
        assert found[name][0] == pytest.approx(0, abs=1e-12)


def test_other_halves_are_all_but_the_members_and_none_twice():
    halves = _other_halvings([0, 0, 0, 0, 1, 1, 1, 1])
    assert len(halves) == 35 - 1  # half of 8 over 4, less the members
    reversed_too = {tuple(h) for h in halves} | {tuple(1 - x for x in h) for h in halves}
    assert len(reversed_too) == 70 - 2 and (0, 0, 0, 0, 1, 1, 1, 1) not in reversed_too
    assert _other_halvings([0, 1]) == []


def test_maps_are_drawn_for_every_model_and_layer(tmp_path):
    speed = np.random.default_rng(0).random((16, 16, 16))
    maps = [ExpertMaps(f"model {k}", speed, np.zeros((3, 2, 2, 2), int)) for k in range(2)]
    plot_maps(maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_says_the_same(tmp_path):
    for k, member in enumerate(PAIRS["porous_media"]):
        write_random_store(tmp_path / member / "porous_media", porous_media.DOMAIN, 16, 3 + k, num_snapshots=4)
    statistics = {"velocity_scale": 2.0, "pressure_scale": 1.0, "medium_mean": 0.0, "medium_scale": 1.0}
    autoencoder = Autoencoder(AutoencoderConfig(widths=(8, 16, 32)))
    domain = porous_media.DOMAIN
    save_tokenizer(tmp_path / "tokenizer.safetensors", autoencoder, {domain.name: domain}, {domain.name: statistics})
    options = [f"--{name}={tmp_path / path}" for name, path in (("stores", ""), ("runs", "runs"))]
    options += [f"--tokenizer={tmp_path / 'tokenizer.safetensors'}", "--domains=porous_media", "--quick"]
    command = [sys.executable, "benchmarks/hard_pairs.py", *options, f"--plot={tmp_path / 'maps.png'}"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=cpu_environment()) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert len(re.findall("steps 1 to 4", first.stderr)) == 4  # twice as many experts or not, informed or not
    assert len(re.findall("all 4 steps are done", second.stderr)) == 4
    tables = [re.findall(r"^\|.*\|$", said.stdout, re.MULTILINE) for said in (first, second)]
    assert tables[0] == tables[1] and len(tables[0]) > 40
    found = json.loads((ROOT / "runs" / "benchmarks" / "hard_pairs_quick_seeds.json").read_text())
    purity = [value for seeds in found.values() for layer in seeds.values() for value in layer["purity"]]
    assert len(purity) == 16 and all(0.5 <= value <= 1 for value in purity)
