"""What the rate ladder counts: CPU time of every attempt, loud snapshots, equally many fields of each domain; and that
it takes no rung for another that was trained otherwise.
"""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # last: its tokenizer.py must not be taken for the package

from conftest import cpu_environment  # noqa: E402
from parts import training_velocities  # noqa: E402
from random_store import write_random_store  # noqa: E402
from rate_ladder import agree_on_scales, list_overrides  # noqa: E402
from rate_ladder_identity import read_settings, require_same_training  # noqa: E402
from rate_ladder_rungs import CPU_FILE, compare, read_cpu_seconds, set_rung, train_rung  # noqa: E402
from settings import identity_of  # noqa: E402

from data.reader import Store  # noqa: E402
from data.simulate import open_channel, porous_media  # noqa: E402
from shodh.config import ConfigError, to_plain  # noqa: E402
from shodh.training.checkpoint import write_checkpoint  # noqa: E402
from tokenizer.autoencoder import Autoencoder  # noqa: E402
from tokenizer.export import Tokenizer, digest_weights, save_tokenizer  # noqa: E402

SMALL = ("autoencoder.widths=[8, 16, 32]", "domains=[open_channel]", "weights=[1.0]")
SCALES = {"velocity_scale": 2.0, "pressure_scale": 1.0, "medium_mean": 0.0, "medium_scale": 1.0}


def test_cpu_time_of_all_attempts_adds_up_and_a_lost_attempt_leaves_it_unknown(tmp_path):
    assert math.isnan(read_cpu_seconds(tmp_path))
    (tmp_path / CPU_FILE).write_text(json.dumps([1.5, 2.0]))
    assert read_cpu_seconds(tmp_path) == 3.5
    (tmp_path / CPU_FILE).write_text(json.dumps([1.5, None]))
    assert math.isnan(read_cpu_seconds(tmp_path))


def test_a_rung_that_fails_says_why_and_its_cpu_time_is_kept(tmp_path):
    with pytest.raises(RuntimeError, match="C=4: training ended with code 1.*no such store"):
        train_rung(4, tmp_path / "c4", [f"stores={tmp_path}/nowhere"], stores=[])
    assert read_cpu_seconds(tmp_path / "c4") > 0


def test_truth_has_no_error_its_mean_has_1_and_silent_snapshots_do_not_count():
    truth = torch.randn(3, 3, 8, 8, 8)
    truth[1] *= 1e-12
    mean = truth.mean((-3, -2, -1), keepdim=True).expand_as(truth)
    errors = compare(truth, [truth, mean])
    assert errors[1].isnan().all()
    assert errors[[0, 2], 0].eq(0).all()
    torch.testing.assert_close(errors[[0, 2], 1], torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)  # FP32 means


@pytest.mark.parametrize("most", [None, 3])
def test_codes_are_fitted_to_equally_many_fields_of_each_domain(tmp_path, most):
    stores = [
        write_random_store(tmp_path / domain.name, domain, 8, num, num_snapshots=2)
        for domain, num in ((open_channel.DOMAIN, 3), (porous_media.DOMAIN, 6))
    ]  # one trajectory of each is held out
    statistics = {store.domain.name: {"velocity_scale": 2.0} for store in stores}
    velocities = list(training_velocities(stores, statistics, most))
    num = most or 2 * 2
    states = [(i, t) for i in stores[1].trajectories("train") for t in range(2)]
    last = stores[1].snapshot(*states[(num - 1) * len(states) // num])[0]
    assert len(velocities) == 2 * num
    torch.testing.assert_close(velocities[-1][0], torch.from_numpy(last) / 2, rtol=0, atol=0)
    assert len({velocity.numpy().tobytes() for velocity in velocities[num:]}) == num


@pytest.fixture
def store(tmp_path) -> Store:
    return write_random_store(tmp_path / "stores" / "open_channel", open_channel.DOMAIN, 16, 3, num_snapshots=2)


def overrides_of(store: Store, *changes: str) -> list[str]:
    return [f"stores={store.path.parent}", "loop.seed=0", *SMALL, *changes]


def leave_a_finished_rung(run: Path, store: Store) -> dict[str, Any]:
    """What training, export and certificate leave behind, and what the checkpoint says of the training."""
    settings = read_settings(set_rung(4, run, overrides_of(store)))
    identity = json.loads(json.dumps(identity_of(settings) | {"data": {store.domain.name: store.digest}}))
    saved = {"identity": identity, "record": {"config": to_plain(settings)}}
    write_checkpoint(run / "checkpoints" / "tokenizer", 8, {"parameter/weight": torch.zeros(1)}, saved)
    model, domains = Autoencoder(settings.autoencoder), {store.domain.name: store.domain}
    certificate = {"verdict": "exact", "failures": [], "weights": digest_weights(model), "num_fields": 1, "domains": {}}
    save_tokenizer(run / "tokenizer.safetensors", model, domains, {store.domain.name: SCALES}, certificate)
    return saved


def test_finished_rung_is_not_trained_again_and_no_time_is_added_to_its_own(tmp_path, store, capsys):
    run = tmp_path / "c4"
    leave_a_finished_rung(run, store)
    (run / CPU_FILE).write_text(json.dumps([1.5]))
    train_rung(4, run, overrides_of(store), [store])
    assert "trained already" in capsys.readouterr().out and read_cpu_seconds(run) == 1.5


@pytest.mark.parametrize(
    ("channels", "change", "said"),
    [
        (4, "loop.seed=1", "loop.seed: 0 -> 1"),
        (4, "loop.schedule.num_steps=9", r"loop.schedule.num_steps: \d+ -> 9"),
        (4, "engine.betas=[0.5, 0.5]", r"engine.betas: \[0.9, 0.95\] -> \[0.5, 0.5\]"),
        (16, "loop.seed=0", "autoencoder.latent_channels: 4 -> 16"),
    ],
)
def test_rung_trained_with_other_options_is_refused_before_anything_runs(tmp_path, store, channels, change, said):
    run = tmp_path / "c4"
    leave_a_finished_rung(run, store)
    with pytest.raises(ConfigError, match=f"run={run}: was trained with another configuration .*{said}.*--runs"):
        train_rung(channels, run, overrides_of(store, change), [store])
    assert not (run / CPU_FILE).exists() and not (run / "training.log").exists()


def test_rung_trained_on_other_stores_is_refused(tmp_path, store):
    run = tmp_path / "c4"
    leave_a_finished_rung(run, store)
    other = write_random_store(tmp_path / "other" / "open_channel", open_channel.DOMAIN, 16, 4, num_snapshots=2)
    for stores, said in (([other], store.digest[:8]), ([], store.digest[:8]), ([store, porous(tmp_path)], "None -> ")):
        with pytest.raises(ConfigError, match=f"another configuration .*data.*{said}"):
            require_same_training(run, read_settings(set_rung(4, run, overrides_of(store))), stores)


def porous(folder: Path) -> Store:
    return write_random_store(folder / "stores" / "porous_media", porous_media.DOMAIN, 16, 3, num_snapshots=2)


@pytest.mark.parametrize(("betas", "is_same"), [([0.9, 0.95], True), ([0.5, 0.5], False)])
def test_rung_of_an_older_identity_is_known_by_its_recorded_configuration(tmp_path, store, betas, is_same):
    run = tmp_path / "c4"
    saved = leave_a_finished_rung(run, store)
    del saved["identity"]["engine"]["betas"]  # decided the weights before identities said so
    saved["identity"]["autoencoder"]["an_option_since_dropped"] = True
    saved["record"]["config"]["engine"]["betas"] = betas
    write_checkpoint(run / "checkpoints" / "tokenizer", 8, {"parameter/weight": torch.zeros(1)}, saved)
    settings = read_settings(set_rung(4, run, overrides_of(store)))
    if is_same:
        require_same_training(run, settings, [store])
    else:
        with pytest.raises(ConfigError, match=r"engine.betas: \[0.5, 0.5\] -> \[0.9, 0.95\]"):
            require_same_training(run, settings, [store])


def test_tokenizer_that_nothing_says_the_training_of_is_refused(tmp_path, store):
    (tmp_path / "tokenizer.safetensors").touch()
    with pytest.raises(ConfigError, match="has no checkpoint left that says what it was trained with"):
        require_same_training(tmp_path, read_settings(overrides_of(store)), [store])


def test_option_set_both_ways_is_refused_and_stores_are_given_by_their_whole_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = Namespace(set=["augment=false"], stores=Path("here"), seed=3, quick=False)
    assert list_overrides(options) == [f"stores={tmp_path}/here", "loop.seed=3", "augment=false"]
    with pytest.raises(ConfigError, match="--set loop.seed=4: has an option of its own. Use --seed"):
        list_overrides(Namespace(set=["loop.seed=4"], stores=Path("here"), seed=3, quick=False))


def test_rungs_with_different_scales_are_not_compared(tmp_path, store):
    def scaled(velocity: float) -> Tokenizer:
        model = Autoencoder(read_settings(overrides_of(store)).autoencoder)
        name = store.domain.name
        return Tokenizer(model, {name: store.domain}, {name: SCALES | {"velocity_scale": velocity}}, "")

    assert agree_on_scales([scaled(2.0), scaled(2.0)], [store])["open_channel"].velocity_scale == 2.0
    with pytest.raises(ConfigError, match="rungs normalise open_channel differently"):
        agree_on_scales([scaled(2.0), scaled(3.0)], [store])


@pytest.mark.slow
def test_quick_ladder_trains_anew_each_time_and_judges_only_what_was_trained_so(tmp_path, store):
    def ladder(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, ROOT / "benchmarks" / "rate_ladder.py", "--quick", "--rungs", "4"]
        call += ["--stores", store.path.parent, "--runs", tmp_path / "runs", *arguments, "--set", *SMALL]
        return subprocess.run(call, env=cpu_environment(), capture_output=True, text=True)

    run, metrics = tmp_path / "runs" / "quick4", []
    for seed in ("0", "1"):
        done = ladder("--seed", seed)
        assert "C=4 open_channel: velocity VRMSE" in done.stdout, done.stderr[-2000:]
        metrics.append((run / "metrics.jsonl").read_text())
        assert len(json.loads((run / CPU_FILE).read_text())) == 1
    assert metrics[0] != metrics[1]
    done = ladder("--seed", "0", "--evaluate-only")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: run={run}: was trained with")
    assert "loop.seed: 1 -> 0" in done.stderr and "Traceback" not in done.stderr
    assert "velocity VRMSE" in ladder("--seed", "1", "--evaluate-only").stdout
    assert (run / "metrics.jsonl").read_text() == metrics[1]
