"""The latent transformer: starts at persistence, sees physics only, and can learn."""

import inspect
from dataclasses import replace

import pytest
import torch

from shodh.fields import CONDITIONS, NUM_GIVEN, LatentBatch
from shodh.model.embedding import from_tokens, rotary_angles, rotate, to_tokens
from shodh.model.transformer import (
    LatentTransformer,
    TransformerConfig,
    backward_differences,
    change_scale,
    count_parameters,
    root_mean_square,
)

SMALL = TransformerConfig(
    latent_channels=4, medium_channels=2, width=24, depth=2, num_heads=2, num_experts=4, hidden=16
)


def make_batch(num: int = 6, n: int = 4) -> LatentBatch:
    states = torch.randn(num, NUM_GIVEN + 1, 4, n, n, n)
    return LatentBatch(states, torch.randn(num, 2, n, n, n), torch.rand(num, len(CONDITIONS)), torch.arange(num) % 3)


def make_model(config: TransformerConfig = SMALL) -> LatentTransformer:
    model = LatentTransformer(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def predict(model: LatentTransformer, batch: LatentBatch):
    return model(batch.given, batch.medium, batch.parameters)


def test_untrained_model_predicts_persistence():
    batch = make_batch()
    assert torch.equal(predict(LatentTransformer(SMALL), batch).latent, batch.current)


def test_model_has_no_input_for_a_domain():
    assert list(inspect.signature(LatentTransformer.forward).parameters) == ["self", "states", "medium", "parameters"]


def test_samples_of_a_batch_do_not_see_each_other():
    model, batch = make_model(), make_batch()
    alone = LatentBatch(*(field[:1] for field in batch))
    torch.testing.assert_close(predict(model, alone).latent, predict(model, batch).latent[:1], rtol=1e-5, atol=1e-5)


def test_parameters_and_medium_and_past_all_matter():
    model, batch = make_model(), make_batch()
    expected = predict(model, batch).latent
    states = 0.5 * torch.eye(NUM_GIVEN, NUM_GIVEN + 1)[:-1].reshape(NUM_GIVEN - 1, 1, -1, 1, 1, 1, 1)
    changes = [*(("states", change) for change in states), ("medium", 0.5), ("parameters", 0.5)]
    for name, change in changes:
        changed = batch._replace(**{name: getattr(batch, name) + change})
        assert not torch.allclose(predict(model, changed).latent, expected, atol=1e-4), name


def test_differences_of_a_power_of_time_end_at_its_order():
    time = torch.arange(4.0).reshape(1, 4, 1, 1, 1, 1)
    assert [float(d) for d in backward_differences(time**2)] == [9.0, 5.0, 2.0, 0.0]


def test_changes_are_seen_in_units_of_their_own_size_which_is_told():
    model, medium, parameters = make_model(), torch.randn(3, 2, 4, 4, 4), torch.rand(3, len(CONDITIONS))
    model.stencil.requires_grad_(False)
    for kernel in model.stencil.kernels:
        kernel.zero_()
    current, first, second = torch.randn(3, 3, 4, 4, 4, 4)

    def relative_change(factor: float) -> torch.Tensor:
        early = current - factor * (2 * first - second)
        states = torch.stack([early, current - factor * first, current], 1)
        scale = change_scale(current, root_mean_square(factor * first))
        return (model(states, medium, parameters).latent - current) / scale

    assert not relative_change(10.0).allclose(relative_change(1.0), rtol=1e-2)
    torch.nn.init.zeros_(model.condition[0].weight[:, len(CONDITIONS) :])
    torch.testing.assert_close(relative_change(10.0), relative_change(1.0), rtol=1e-3, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradients_to_the_last_bit_and_keep_less():
    batch, model, found = make_batch(), make_model(), []
    for recompute in (False, True):
        again = LatentTransformer(replace(SMALL, recompute=recompute))
        again.load_state_dict(model.state_dict())
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = predict(again, batch).latent.square().mean()
        found.append((sum(kept.values()), torch.autograd.grad(loss, list(again.parameters()), allow_unused=True)))
    (more, plain), (less, recomputed) = found
    assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert less < more / 2


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_return_to_their_places(patch):
    latent = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(from_tokens(to_tokens(latent, patch), (4, 6, 8), patch), latent)


def test_rotary_scores_depend_on_relative_position_only():
    angles = rotary_angles((4, 4, 4), 24, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 24)
    rotated = [rotate(v.expand(1, 1, 64, 24), angles)[0, 0] for v in (query, key)]
    scores = (rotated[0] @ rotated[1].T).reshape([4] * 6)  # query x y z, key x y z
    torch.testing.assert_close(
        scores[1:, 1:, 1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1, :-1, :-1], rtol=1e-4, atol=1e-4
    )


def test_active_parameters_count_one_expert_of_each_layer():
    total, active = count_parameters(make_model())
    expert = 3 * SMALL.width * SMALL.hidden
    assert total - active == (SMALL.num_experts - SMALL.top_k) * SMALL.depth * expert


def test_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="patch=3"):
        to_tokens(torch.zeros(1, 4, 4, 4, 4), 3)


@pytest.mark.parametrize(("key", "value"), [("num_heads", 5), ("top_k", 9), ("temperature", 0.0)])
def test_impossible_sizes_are_refused(key, value):
    with pytest.raises(ValueError, match=key if key != "num_heads" else "width"):
        TransformerConfig(**{key: value})
