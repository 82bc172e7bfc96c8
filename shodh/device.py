"""Where tensors are computed, and how precisely."""

import os

import torch


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
