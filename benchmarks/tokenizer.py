"""What the parts of the tokenizer cost, as ratios: the Helmholtz head, the stem, lattice snapping, tiling; and on CUDA.

    python benchmarks/tokenizer.py [--quick] [--only head stem ...] [--stores stores/quickstart] [--device cuda]

One process, one thread, the default network. `head`: a decode with the Helmholtz head over one whose plain output layer
writes velocity and pressure from the same fine features. `stem`: a training step over that of a network whose first and
last convolutions run at full resolution, and the held-out errors of both after equal training, on stores of fields or
on random turbulence. `snapping` and `tiling`: shares of a decode. `accelerator`: speed and memory at 128^3 in bfloat16
(`--rehearse` runs its code on a CPU at 16^3, where its figures mean nothing).
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from figures import Figure, report
from tokenizer_accelerator import measure_accelerator
from tokenizer_decode import compare_heads, compare_snapping, compare_tiling
from tokenizer_stem import StemTraining, compare_stems

from shodh.device import find_device

PARTS = ("head", "snapping", "tiling", "stem", "accelerator")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller boxes, fewer rounds and steps")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--stores", type=Path, help="train the two stems on these fields (default: random turbulence)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda adds the accelerator's figures")
    parser.add_argument("--rehearse", action="store_true", help="run the accelerator's code on a CPU at 16^3")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: list[Figure] = []
    for part in options.only:
        figures += measure(part, options)
    return report("tokenizer_quick" if options.quick else "tokenizer", figures)


def measure(part: str, options: argparse.Namespace) -> list[Figure]:
    quick = options.quick
    if part == "head":
        return compare_heads(num_cells=16 if quick else 32)
    if part == "snapping":
        return [figure for n in ((16, 32) if quick else (32, 64, 128)) for figure in compare_snapping(n)]
    if part == "tiling":
        return compare_tiling(128, 0.75, num_rounds=3) if quick else compare_tiling(256, 0.5, num_rounds=11)
    if part == "stem":
        return compare_stems(StemTraining(num_steps=60, batch_size=2) if quick else StemTraining(), options.stores)
    if options.device == "cuda":
        return measure_accelerator(find_device(), num_cells=128, num_rounds=11)
    if options.rehearse:
        return measure_accelerator(torch.device("cpu"), num_cells=16, num_rounds=1)
    print("accelerator: not measured, no --device cuda")
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
