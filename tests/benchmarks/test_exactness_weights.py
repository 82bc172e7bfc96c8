"""Which weights the exactness benchmark decodes under bfloat16 autocast."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: its tokenizer.py is no package

from exactness import name_groups  # noqa: E402
from exactness_weights import SMALL, Weights, make_weights, randomise  # noqa: E402

from tokenizer.autoencoder import Autoencoder  # noqa: E402


@pytest.mark.parametrize("low_precision", [True, False])
def test_how_weights_were_trained_decides_their_precision_not_what_they_are_called(low_precision):
    model, found = randomise(Autoencoder(SMALL)).eval().requires_grad_(False), []
    model.head.register_forward_pre_hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))
    name = "file plain.safetensors" if low_precision else "file my_bf16.safetensors"
    groups = name_groups({name: Weights(model, low_precision), "random weights": Weights(model)}, thin=40, sizes=())
    found_name, batches = next(groups)
    claims = next(batches)
    assert found_name == name and claims.num > 0 and found and set(found) == {low_precision}


def test_weights_trained_in_bf16_are_decoded_so_before_and_after_export(tmp_path):
    weights = make_weights(tmp_path, num_steps=1)
    assert {name for name, w in weights.items() if w.low_precision} == {"trained in bf16", "exported and loaded"}
