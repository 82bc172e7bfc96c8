"""The report's sections on experts: what each serves, domain by domain and place by place, and how that came about."""

import re

import numpy as np

from shodh.evaluation import report_page as html
from shodh.evaluation.report_figures import EXPERT_COLOURS, draw_expert_slices, draw_loads
from shodh.evaluation.report_run import Run, format_number, pick

MAX_LAYERS, MAX_SLICES = 6, 4  # in one picture of expert maps

LOAD_NOTE = (
    "Share of a domain's tokens that each expert serves, in percent. Purity: mean over tokens of the largest domain "
    "share of the token's expert, 1 where no expert is shared. I / H: information between domain and expert, "
    "corrected for bias, over the most it can be."
)
MAP_NOTE = (
    "One held-out snapshot per domain. Rows: slices along the third axis, from first to last. Left: the true field; "
    "then the best expert of every token, layer by layer. The first axis points right, the second up."
)


def show_routing(run: Run) -> str:
    loads = {name: pick(d, "routing", "load") for name, d in run.domains.items()}
    loads = {name: load for name, load in loads.items() if load}
    parts = []
    if loads:
        tables = []
        for layer in range(min(map(len, loads.values()))):
            rows = {name: load[layer] for name, load in loads.items()}
            tables.append(html.heat_table(f"Layer {layer}{_say_separation(run, layer)}", rows, EXPERT_COLOURS))
        parts.append(html.paragraph(LOAD_NOTE, quiet=True))
        parts.append(f'<div class="heats">{"".join(tables)}</div>')
    else:
        parts.append(html.paragraph("No load per expert and domain has been measured yet."))
    return "".join(parts) + _show_expert_maps(run) + _show_load_history(run)


def _say_separation(run: Run, layer: int) -> str:
    layers = run.evaluation.get("routing_layers") or []
    measured = layers[layer] if layer < len(layers) else {}
    names = {"purity": "purity", "normalised_mutual_information": "I / H", "mutual_information": "I"}
    said = [f"{label} {format_number(measured[key])}" for key, label in names.items() if key in measured]
    return f": {', '.join(said)} nats" if said else ""


def _show_expert_maps(run: Run) -> str:
    maps = {key.split("/")[0]: v for key, v in run.slices.items() if key.endswith("/experts") and v.ndim == 4}
    if not maps:
        return html.paragraph("There are no maps of experts yet. Evaluation writes them to slices.npz.")
    experts = sorted({int(e) for expert in maps.values() for e in np.unique(expert)})
    colours = [(EXPERT_COLOURS[e % len(EXPERT_COLOURS)], f"expert {e}") for e in experts]
    pictures = []
    for name, expert in maps.items():
        places = np.unique(np.linspace(0, expert.shape[-1] - 1, MAX_SLICES).round().astype(int))
        field = run.slices.get(f"{name}/truth_slices")
        shown = field[..., places] if field is not None and field.shape[-1:] == expert.shape[-1:] else None
        for first in range(0, len(expert), MAX_LAYERS):
            layers = expert[first : first + MAX_LAYERS, ..., places].astype(int)
            pictures.append(draw_expert_slices(layers, shown, first, name))
    heading = html.subheading("Which expert serves which place") + html.legend(colours)
    return heading + html.figures(pictures, 480) + html.paragraph(MAP_NOTE, quiet=True)


def _show_load_history(run: Run) -> str:
    layers: dict[int, dict[int, str]] = {}
    for key in dict.fromkeys(key for record in run.metrics for key in record):
        found = re.fullmatch(r"load/layer(\d+)/expert(\d+)", key)
        if found:
            layers.setdefault(int(found[1]), {})[int(found[2])] = key
    pictures = []
    for layer, keys in sorted(layers.items()):
        names = [keys[expert] for expert in sorted(keys)]
        records = [r for r in run.metrics if all(name in r for name in names)]
        if len(records) > 1:
            steps = np.array([r["step"] for r in records])
            load = np.array([[r[name] for name in names] for r in records])
            load = load / np.maximum(load.sum(1, keepdims=True), 1e-30)
            pictures.append(draw_loads(steps, load, f"layer {layer}: share of tokens per expert over training"))
    return (html.subheading("Load over training") + html.figures(pictures, 330)) if pictures else ""
