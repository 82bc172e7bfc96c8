"""The rate ladder as a picture: error against rate, ours and the block KLT's, one panel per domain."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rate_ladder_rungs import Rung

CELLS = 8**3  # of the field, per latent cell
CURVES = {
    "vrmse": ("tokenizer, C values a block", "tab:blue", "o-"),
    "vrmse_of_klt": ("block KLT of C values", "tab:gray", "s--"),
    "vrmse_of_klt_with_medium": ("block KLT of C + M values", "tab:brown", "^:"),
}


def plot_ladder(rungs: Sequence[Rung], path: Path) -> None:
    """Velocity VRMSE over latent values per cell of the field, written as PNG."""
    ladder = sorted(rungs, key=lambda rung: rung.latent_channels)
    domains = list(ladder[0].domains)
    figure, axes = plt.subplots(1, len(domains), figsize=(4 * len(domains), 3.6), sharey=True, squeeze=False)
    for axis, domain in zip(axes[0], domains, strict=True):
        for name, (label, colour, style) in CURVES.items():
            rates = [rung.latent_channels for rung in ladder]
            axis.plot(rates, [getattr(rung.domains[domain], name) for rung in ladder], style, color=colour, label=label)
        axis.set(title=domain, xscale="log", xlabel=f"latent channels C, of {CELLS} cells each")
        axis.set_xticks(rates, [str(rate) for rate in rates], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)  # of all, which share it, once all are drawn
    axes[0][0].set_ylabel("velocity VRMSE, held out")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot -> {path}")
