"""The report's figures as HTML: field slices, expert maps, curves over training, errors of rollouts.

Each is drawn twice, for a light and for a dark page. No pyplot, so no global state and no display.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from shodh.evaluation.report_page import figure

# Okabe and Ito's colours, which most colour-blind readers tell apart, then four more.
EXPERT_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f"),
    *("#6a3d9a", "#b15928", "#a6d854", "#1b9e9e"),
)


class Line(NamedTuple):
    """One curve of a figure; without a colour it has the page's ink."""

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    colour: str | None = None
    style: str = "-"


class Theme(NamedTuple):
    """Colours of a page's ink, panel and faint lines, as in the page's style."""

    ink: str
    panel: str
    line: str


LIGHT, DARK = Theme("#1b2330", "#ffffff", "#dde1e8"), Theme("#e6eaf0", "#1a2029", "#2e3744")
ROLLOUT_KINDS = {
    "model": "model",
    "persistence": "persistence",
    "linear": "linear latent model",
    "decoded_truth": "true latents decoded",
}  # block of a rollout -> its name on the page
WORST_SHOWN = 3.0  # VRMSE: beyond it no prediction is left to compare
CURVE_SIZE = 4.2, 2.7  # inches
MAX_POINTS = 2000  # of a curve; more than that no screen shows


def draw_image(
    image: np.ndarray, caption: str, limits: tuple[float, float] | None = None, colour_map: str = "viridis"
) -> str:
    """A slice (x, y) with x to the right and y up, and its colour bar; own limits unless given."""

    def draw(canvas: Figure, theme: Theme) -> None:
        low, high = limits or (float(image.min()), float(image.max()))
        axes, bar = canvas.add_axes((0, 0, 0.83, 1)), canvas.add_axes((0.845, 0, 0.03, 1))
        shown = axes.imshow(image.T, origin="lower", cmap=colour_map, vmin=low, vmax=high, interpolation="nearest")
        axes.set_axis_off()
        ticks = MaxNLocator(4, prune="both").tick_values(low, high)
        canvas.colorbar(shown, cax=bar, ticks=[t for t in ticks if low <= t <= high]).outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.tick_params(colors=theme.ink, labelsize=9, pad=2, length=2)

    height, width = _image_size(image.shape)
    return _render(draw, caption, (width / 0.83, height))


def draw_expert_slices(experts: np.ndarray, field: np.ndarray | None, first_layer: int, caption: str) -> str:
    """Experts (layer, x, y, slice) by colour: a column a layer, a row a slice, the field (x, y, slice) at the left."""
    colours = np.array([to_rgb(c) for c in EXPERT_COLOURS])[experts % len(EXPERT_COLOURS)]
    columns = ["field"] * (field is not None) + [f"layer {first_layer + i}" for i in range(len(experts))]
    num_slices, cell = experts.shape[-1], 1.15  # inches

    def draw(canvas: Figure, theme: Theme) -> None:
        canvas.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
        grid = canvas.subplots(num_slices, len(columns), squeeze=False)
        for row in range(num_slices):
            pictures = [layer[..., row, :].transpose(1, 0, 2) for layer in colours]
            if field is not None:
                grid[row, 0].imshow(field[..., row].T, origin="lower", cmap="viridis", interpolation="nearest")
                grid[row, 0].set_aspect("auto")
            for axes, picture in zip(grid[row, len(columns) - len(pictures) :], pictures, strict=True):
                axes.imshow(picture, origin="lower", interpolation="nearest", aspect="auto")
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(theme.line)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(name, color=theme.ink, fontsize=9, pad=3)

    height, width = _image_size(experts.shape[1:3])
    return _render(draw, caption, (cell * len(columns), cell * height / width * num_slices + 0.3))


def draw_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], caption: str, *, smooth: bool = False) -> str:
    """Values over steps, one line a name; ``smooth`` adds running medians, and a log scale if the first is positive."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = _add_axes(canvas, theme)
        for i, (name, (steps, value)) in enumerate(curves.items()):
            colour = EXPERT_COLOURS[i % len(EXPERT_COLOURS)]
            finite = np.isfinite(value)
            steps, value = _thin(steps[finite]), _thin(value[finite])
            if smooth and len(value) >= 20:
                axes.plot(steps, value, color=colour, linewidth=0.8, alpha=0.3)
                value = _running_median(value, len(value) // 20)
            axes.plot(steps, value, color=colour, linewidth=1.7, label=name, marker="o" if len(value) == 1 else None)
        if smooth and not np.any(next(iter(curves.values()))[1] <= 0):
            _use_log_scale(axes)
        axes.set_xlabel("step", color=theme.ink, fontsize=9)
        if len(curves) > 1:
            _add_legend(axes, theme)

    return _render(draw, caption, CURVE_SIZE)


def draw_lines(
    lines: Sequence[Line], caption: str, x_label: str, *, log_x: bool = False, log_y: bool = False, decades: int = 0
) -> str:
    """Curves over anything; a logarithmic y shows at most so many ``decades`` below the highest point (0: all)."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = _add_axes(canvas, theme)
        for line in lines:
            x, y = np.asarray(line.x, float), np.asarray(line.y, float)
            y = np.where(y > 0, y, np.nan) if log_y else y
            marker = "o" if len(x) < 9 else None
            style = {"color": line.colour or theme.ink, "linestyle": line.style, "marker": marker, "markersize": 3.5}
            axes.plot(x, y, label=line.label, linewidth=1.5, **style)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
            positive = [value for line in lines for value in line.y if value > 0]
            if decades and positive:
                axes.set_ylim(bottom=max(min(positive) / 2, max(positive) * 10.0**-decades))
        axes.set_xlabel(x_label, color=theme.ink, fontsize=9)
        _add_legend(axes, theme)

    return _render(draw, caption, CURVE_SIZE)


def draw_loads(steps: np.ndarray, loads: np.ndarray, caption: str) -> str:
    """The share of tokens (step, expert) of each expert over training, stacked in the experts' colours."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = _add_axes(canvas, theme)
        colours = [EXPERT_COLOURS[i % len(EXPERT_COLOURS)] for i in range(loads.shape[1])]
        axes.stackplot(_thin(steps), _thin(loads).T, colors=colours, linewidth=0)
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_xlabel("step", color=theme.ink, fontsize=9)

    return _render(draw, caption, CURVE_SIZE)


def draw_rollout(rollout: Mapping[str, Any], caption: str) -> str | None:
    """VRMSE per step of rollout, persistence, linear model and the tokenizer's floor; None where there is none."""
    lines = {label: (rollout.get(key) or {}).get("vrmse_per_step") for key, label in ROLLOUT_KINDS.items()}
    if not any(lines.values()):
        return None
    names = list(lines)

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = _add_axes(canvas, theme)
        shown = [v for values in lines.values() for v in values or () if v is not None]
        for name, values in lines.items():
            points = [(step, value) for step, value in enumerate(values or (), start=1) if value is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=EXPERT_COLOURS[names.index(name)], label=name, marker="o", markersize=3.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("predicted step", color=theme.ink, fontsize=9)
        axes.set_ylim(0, min(WORST_SHOWN, 1.1 * max(shown, default=1.0)))
        _add_legend(axes, theme)

    return _render(draw, caption, CURVE_SIZE)


def _render(draw: Callable[[Figure, Theme], None], caption: str, size: tuple[float, float]) -> str:
    pictures = []
    for theme in (LIGHT, DARK):
        canvas = Figure(figsize=size, dpi=120, facecolor=theme.panel)
        FigureCanvasAgg(canvas)
        draw(canvas, theme)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    return figure(pictures[0], pictures[1], caption)


def _image_size(shape: Sequence[int]) -> tuple[float, float]:
    """Inches (height, width) for an image of this aspect ratio, no flatter than a strip and no taller than 5:4."""
    return 2.7 * min(max(shape[1] / shape[0], 0.3), 1.25), 2.7


def _add_axes(canvas: Figure, theme: Theme) -> Axes:
    canvas.set_layout_engine("constrained")
    axes = canvas.add_subplot(facecolor=theme.panel)
    axes.tick_params(which="both", colors=theme.ink, labelsize=9, length=3)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.line)
    axes.grid(color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def _use_log_scale(axes: Axes) -> None:
    """A logarithmic axis labelled with plain numbers, at 1, 2 and 5 of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _add_legend(axes: Axes, theme: Theme) -> None:
    style = {"fontsize": 9, "labelcolor": theme.ink, "frameon": False, "columnspacing": 1.2}
    axes.figure.legend(loc="outside upper left", ncols=4, **style)


def _thin(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, -(-len(values) // MAX_POINTS))]


def _running_median(values: np.ndarray, half_width: int) -> np.ndarray:
    padded = np.pad(values, half_width, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half_width + 1), axis=-1)
