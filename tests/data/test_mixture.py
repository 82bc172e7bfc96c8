"""A batch is a function of the step alone, whatever the ranks, and goes through every training sample once an epoch."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from data.latents import open_latents, write_latents
from data.mixture import (
    FieldMixture,
    LatentMixture,
    MixtureConfig,
    prefetch,
    stream,
)
from data.statistics import measure_statistics
from shodh.config import ConfigError
from shodh.fields import NUM_GIVEN
from shodh.physics.exterior import divergence_of_faces


@pytest.fixture
def make_mixture(channel, sound):
    statistics = [measure_statistics(channel), measure_statistics(sound)]

    def make(batch_size=3, **config):
        return FieldMixture([channel, sound], statistics, MixtureConfig(batch_size=batch_size, **config))

    return make


def _encode(velocity, pressure, medium):
    """A latent that says which snapshot it is: the first pressure value in every channel."""
    return pressure[:, :, ::2, ::2, ::2].expand(-1, 2, -1, -1, -1), medium[:, :, ::2, ::2, ::2]


@pytest.fixture(scope="module")
def latents(templates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for name in ("channel", "sound"):
        write_latents(folder / name, templates[name], _encode, "tokenizer")
    return [open_latents(folder / "channel"), open_latents(folder / "sound")]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))


def test_a_batch_depends_on_seed_and_step_alone(make_mixture):
    one, other = make_mixture(augment=True), make_mixture(augment=True, cache_bytes=0)
    other.batch(9)
    for step in (5, 0, 11):
        assert _equal(one.batch(step), other.batch(step))
    assert not _equal(one.batch(0), make_mixture(augment=True, seed=1).batch(0))


def test_ranks_share_one_global_batch(make_mixture, latents):
    fields = make_mixture(batch_size=6, augment=True)
    states = LatentMixture(latents, MixtureConfig(batch_size=12, windows=2))
    for mixture, step in itertools.product((fields, states), range(3)):
        whole = mixture.batch(step)
        for world in (2, 3):
            parts = [mixture.batch(step, rank=rank, world=world) for rank in range(world)]
            for n, tensor in enumerate(whole):
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(tensor, torch.cat([part[n] for part in parts]))
    with pytest.raises(ConfigError, match="batch_size=6"):
        fields.batch(0, rank=0, world=4)


def test_first_batches_hold_every_domain_even_where_a_step_holds_each_once(make_mixture):
    """Statistics of the latents are measured on these: with micro step 0 alone they would be of one domain."""
    mixture = make_mixture(accumulation=2)
    names = [batch.domain.name for batch in mixture.first(8)]
    assert sorted(names) == sorted([mixture.stores[0].domain.name, mixture.stores[1].domain.name] * 4)
    assert len({mixture.batch(step).domain.name for step in range(8)}) == 1


def test_equal_weights_take_turns_over_micro_steps(make_mixture):
    mixture = make_mixture(accumulation=3)
    visited = [mixture.batch(step, micro).domain.name for step in range(4) for micro in range(3)]
    assert visited == ["channel", "sound"] * 6


def test_weights_set_how_often_a_domain_is_drawn(make_mixture):
    visited = Counter(make_mixture(weights=(1.0, 3.0)).batch(step).domain.name for step in range(40))
    assert visited == {"channel": 10, "sound": 30}
    assert {make_mixture(weights=(0.0, 1.0)).batch(step).domain.name for step in range(3)} == {"sound"}
    with pytest.raises(ConfigError, match="there are 2 domains"):
        make_mixture(weights=(1.0,))
    with pytest.raises(ValueError, match="none may be negative"):
        make_mixture(weights=(1.0, -1.0))


def _pressures(store, scale):
    """The first pressure value of each normalised snapshot names it."""
    states = [(i, t) for i in range(store.num_trajectories) for t in range(store.num_snapshots)]
    return {np.float32(store.snapshot(i, t)[1][0, 0, 0]) / np.float32(scale): (i, t) for i, t in states}


def test_an_epoch_holds_every_training_snapshot_once_and_no_other(make_mixture, channel):
    mixture = make_mixture()
    names = _pressures(channel, mixture.statistics[0].pressure_scale)
    epochs = []
    for epoch in range(2):  # 3 trajectories of 5 snapshots: 5 batches of 3, every second step
        steps = range(10 * epoch, 10 * epoch + 10, 2)
        epochs.append([names[np.float32(p)] for s in steps for p in mixture.batch(s).pressure[:, 0, 0, 0, 0].numpy()])
    everything = [(i, t) for i in channel.trajectories("train") for t in range(5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_fields_are_normalised_velocities(make_mixture, channel):
    mixture = make_mixture(batch_size=15)
    batch = mixture.batch(0)  # the whole training split
    for field in (batch.velocity, batch.pressure):
        assert field.double().square().mean().item() == pytest.approx(1, rel=1e-6)
    assert batch.medium.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert batch.medium.double().std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert batch.velocity.shape == (15, 3, 4, 6, 8) and batch.medium.shape == (15, 1, 4, 6, 8)
    assert batch.domain == channel.domain and batch.grid == channel.grid


def test_translations_move_all_fields_together_along_periodic_axes_only(make_mixture):
    plain, moved = make_mixture(), make_mixture(augment=True)
    shifts = set()
    for step in range(0, 12, 2):
        before, after = plain.batch(step), moved.batch(step)
        for b in range(3):
            place = (after.pressure[b, 0] == before.pressure[b, 0, 0, 0, 0]).nonzero()[0].tolist()
            assert place[1] == 0  # the wall-normal axis stays
            shifts.add(tuple(place))
            for name in ("velocity", "pressure", "medium"):
                moved_back = torch.roll(getattr(after, name)[b], [-n for n in place], (-3, -2, -1))
                assert torch.equal(moved_back, getattr(before, name)[b])
        area = torch.from_numpy(after.grid.face_area)
        flux = after.velocity.double() * area
        # normalising rounds each value once more: at most 12 roundings of 2^-24 a cell
        assert divergence_of_faces(flux, after.grid.boundary).abs().max() <= 12 * 2.0**-24 * flux.abs().max()
    assert len(shifts) > 6
    assert _equal(plain.batch(1), moved.batch(1))  # sound in an open box is not moved


def test_latent_states_follow_one_another_in_one_trajectory(latents, channel, sound):
    mixture = LatentMixture(latents, MixtureConfig(batch_size=8))
    for step in range(6):
        batch = mixture.batch(step)
        for b in range(8):
            store = (channel, sound)[int(batch.domain[b])]
            names = _pressures(store, 1)
            states = [names[np.float32(z[b, 0, 0, 0, 0])] for z in batch.states.unbind(1)]
            (i, t) = states[0]
            assert states == [(i, t + k) for k in range(NUM_GIVEN + 1)] and i in store.trajectories("train")
            np.testing.assert_array_equal(batch.parameters[b], store.parameters(i))
            np.testing.assert_array_equal(batch.medium[b, 0], store.medium(i)[::2, ::2, ::2])


def test_every_latent_batch_holds_all_domains_by_weight(latents):
    for weights, expected in (((), [4, 4]), ((1.0, 3.0), [2, 6])):
        mixture = LatentMixture(latents, MixtureConfig(weights=weights, batch_size=8, accumulation=2))
        for step, micro in itertools.product(range(5), range(2)):
            assert mixture.batch(step, micro).domain.bincount().tolist() == expected


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_windows_of_a_trajectory_stand_side_by_side_and_an_epoch_holds_none_twice(latents, channel, windows):
    names = _pressures(channel, 1)
    mixture = LatentMixture(latents[:1], MixtureConfig(batch_size=windows, windows=windows))
    trajectories, num_starts = channel.trajectories("train"), channel.num_snapshots - NUM_GIVEN
    num_draws = len(trajectories) * (num_starts // windows)
    for epoch in range(3):
        drawn = []
        for step in range(epoch * num_draws, (epoch + 1) * num_draws):
            firsts = [names[np.float32(z)] for z in mixture.batch(step).states[:, 0, 0, 0, 0, 0].numpy()]
            assert len({trajectory for trajectory, _ in firsts}) == 1
            drawn += firsts
        assert len(set(drawn)) == len(drawn) == num_draws * windows


def test_a_trajectory_of_too_few_windows_gives_some_twice(latents, channel):
    num_starts = channel.num_snapshots - NUM_GIVEN
    mixture = LatentMixture(latents[:1], MixtureConfig(batch_size=num_starts + 1, windows=num_starts + 1))
    firsts = mixture.batch(0).states[:, 0]
    assert torch.equal(firsts[0], firsts[-1]) and not torch.equal(firsts[0], firsts[1])


def test_ranks_must_take_whole_draws(latents):
    mixture = LatentMixture(latents, MixtureConfig(batch_size=6, windows=2))
    with pytest.raises(ConfigError, match="batch_size=6: not a multiple of the 2 ranks, each with draws of 2 windows"):
        mixture.batch(0, rank=0, world=2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_domain_alone_gives_the_samples_that_it_gives_among_others_in_the_same_order(latents, accumulation):
    """So a model of one domain, its share of the batch as its batch, sees what the joint one sees of the domain."""
    joint = LatentMixture(latents[::-1], MixtureConfig(batch_size=6, accumulation=accumulation, seed=5))
    for index, store in enumerate(latents[::-1]):
        alone = LatentMixture([store], MixtureConfig(batch_size=3, accumulation=accumulation, seed=5))
        for step, micro in itertools.product(range(7), range(accumulation)):
            whole, own = joint.batch(step, micro), alone.batch(step, micro)
            chosen = whole.domain == index
            for values, all_values in zip(own[:3], whole[:3], strict=True):
                assert torch.equal(values, all_values[chosen])


def test_held_out_trajectories_are_drawn_only_when_asked_for(latents, channel):
    mixture = LatentMixture(latents[:1], MixtureConfig(batch_size=3, split="test"))
    names = _pressures(channel, 1)
    assert {names[np.float32(z)][0] for z in mixture.batch(0).current[:, 0, 0, 0, 0].numpy()} == {3}


def test_latents_of_different_shapes_do_not_mix(latents, stores, tmp_path):
    write_latents(tmp_path / "c", stores.make(tmp_path / "d", "channel", shape=(8, 8, 8)), _encode, "tokenizer")
    with pytest.raises(ConfigError, match="shapes differ between domains"):
        LatentMixture([latents[0], open_latents(tmp_path / "c")], MixtureConfig(batch_size=2))


def test_streamed_batches_are_the_batches_and_resume_anywhere(make_mixture):
    mixture = make_mixture(accumulation=2)
    ahead = stream(mixture, first_step=3, device=torch.device("cpu"))
    for step, micro in ((3, 0), (3, 1), (4, 0), (4, 1), (5, 0)):
        assert _equal(next(ahead), mixture.batch(step, micro))
    ahead.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_prefetch_raises_the_error_of_its_thread_where_the_item_was_due():
    def produce():
        yield from (1, 2)
        raise OSError("disk gone")

    ahead = prefetch(produce)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)


def test_prefetch_ends_when_its_items_end():
    assert list(prefetch(lambda: range(5), depth=1)) == [0, 1, 2, 3, 4]
