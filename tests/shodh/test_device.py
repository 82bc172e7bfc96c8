"""Peaks are known by the names that CUDA gives devices, and of no other device."""

import pytest
import torch

from shodh.device import find_peak, peak_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),  # half an L40S, no L4
        ("NVIDIA A10G", None),  # slower than an A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_a_peak_is_that_of_the_device_named(name, peak):
    assert peak_of(name) == peak


def test_a_cpu_has_no_known_peak():
    assert find_peak(torch.device("cpu")) is None
