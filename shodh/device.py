"""Where tensors are computed, and how precisely."""

import ctypes
import os
import re

import torch

# Floating-point operations a second of dense bfloat16 products, without sparsity, by the first words of the name that
# CUDA gives a device: NVIDIA's datasheet of each, which may state twice as many, with sparsity.
PEAKS = {
    ("NVIDIA", "H100", "PCIe"): 756e12,
    ("NVIDIA", "H100", "NVL"): 835e12,
    ("NVIDIA", "H100"): 989e12,  # SXM
    ("NVIDIA", "H200", "NVL"): 835e12,
    ("NVIDIA", "H200"): 989e12,  # SXM
    ("NVIDIA", "GH200"): 989e12,
    ("NVIDIA", "A100"): 312e12,  # PCIe and SXM
    ("NVIDIA", "L40S"): 362e12,
    ("NVIDIA", "L4"): 121e12,
    ("NVIDIA", "A10"): 125e12,
}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def find_device(local_rank: int = 0) -> torch.device:
    """The process's CUDA device where there is one and ``DS_ACCELERATOR=cpu`` does not forbid it, else the CPU.

    FP32 there stays FP32: left to itself, PyTorch lets cuDNN round what FP32 convolutions multiply to TF32's 10 bits,
    which shows in potentials and in latents that another machine made. bfloat16 is no slower for it.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let this process use again what it frees, large arrays too, where the C library is glibc.

    By itself glibc maps every array of 32 MiB or more anew, and the kernel clears each of its pages on first use. A
    training step asks for the same arrays as the last: they took a tenth to a quarter of its time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def find_peak(device: torch.device) -> float | None:
    """Operations a second that the device's bfloat16 products can reach; None where it is not known, and on a CPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same by the device's name; of a share of a device (MIG) it is not known."""
    words = tuple(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak for first, peak in PEAKS.items() if words[: len(first)] == first), None)
