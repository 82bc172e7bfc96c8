"""The linear baseline is the best linear block code."""

import torch

from shodh.physics.spectra import vrmse
from tokenizer.block_klt import BlockKLT, to_blocks


def test_reconstruction_error_equals_the_discarded_eigenvalues():
    velocity = torch.randn(40, 3, 16, 16, 16).cumsum(-1)
    blocks = to_blocks(velocity).double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(blocks.T, correction=0))
    for name, klt in BlockKLT.fit([velocity], {"few": 4, "many": 40}).items():
        error = (klt.reconstruct(velocity) - velocity).double().square().sum() / len(blocks)
        kept = {"few": 4, "many": 40}[name]
        torch.testing.assert_close(error, eigenvalues[:-kept].sum(), rtol=1e-4, atol=0)


def test_all_values_reconstruct_exactly():
    velocity = torch.randn(1, 3, 8, 8, 8)
    klt = BlockKLT.fit([velocity], {"all": 1536})["all"]
    assert vrmse(klt.reconstruct(velocity), velocity) < 1e-6
