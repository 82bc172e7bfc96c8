"""The report's sections, each from a run to HTML."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from shodh.evaluation import report_page as html
from shodh.evaluation.report_certificate import show_certificate
from shodh.evaluation.report_figures import (
    ROLLOUT_KINDS,
    draw_curves,
    draw_image,
    draw_rollout,
)
from shodh.evaluation.report_page import Cell
from shodh.evaluation.report_run import Run, format_count, format_number, largest_leak, pick

PHASES = {"tokenizer": "Tokenizer", "pretrain": "Pretraining"}

EVALUATION_NOTE = (
    "On held-out trajectories. VRMSE: root mean square error over the truth's standard deviation, so the mean field "
    "scores 1; the tokenizer's leaves out snapshots at rest. Block KLT: the best linear code of as many values a "
    "block. Persistence: the next state is the current."
)
FIELDS_NOTE = (
    "A slice through one held-out snapshot: the truth, what the model decodes, and the difference. Truth and decoded "
    "share their colours. The stored array's first axis points right, its second up."
)
ROLLOUT_NOTE = (
    "Predicted from a few true states of held-out trajectories. Persistence keeps the last of them. The linear latent "
    "model maps a latent cell and its neighbours, and is fitted to each domain by itself. The floor decodes the true "
    "latents, as well as a perfect prediction would do with this tokenizer. Octaves: coarse to fine. Permeability: "
    "mean flow per force. A dash: the quantity does not apply, or a forecast was lost."
)
CONSERVATION_COLUMNS = {
    "max_abs": "max",
    "rms": "rms",
    "mean_abs": "mean",
    "rms_over_rms_gradient": "rms ÷ rms ∇u",
    "mismatched_operator_rms": "mismatched rms",
    "mismatched_rms_over_rms_gradient": "mismatched rms ÷ rms ∇u",
    "mean_flow": "mean flow",
}
CONSERVATION_NOTE = (
    "Of the stored array itself, unscaled, so that 0.0 means bit for bit. Mismatched: what central differences of "
    "cell-centred averages, the wrong operator for these fields, would have reported."
)


def show_evaluation(run: Run) -> str:
    if not run.domains:
        return html.paragraph("There is no evaluation yet.")
    header = ["domain", "max |div| or |curl|", "tokenizer VRMSE, velocity", "block KLT", "tokenizer VRMSE, pressure"]
    header += ["latent values", "latent MSE", "latent MSE ÷ persistence", "decoded MSE"]
    rows = []
    for name, domain in run.domains.items():
        rows.append(
            [
                name,
                format_number(largest_leak(domain)),
                format_number(pick(domain, "tokenizer", "vrmse", "velocity")),
                format_number(pick(domain, "tokenizer", "block_klt_vrmse", "velocity")),
                format_number(pick(domain, "tokenizer", "vrmse", "pressure")),
                format_count(pick(domain, "tokenizer", "latent_values")),
                *(format_number(domain.get(k)) for k in ("latent_mse", "latent_mse_over_persistence", "decoded_mse")),
            ]
        )
    return html.table(header, rows) + html.paragraph(EVALUATION_NOTE, quiet=True) + _say_projected(run)


def _say_projected(run: Run) -> str:
    names = [name for name, domain in run.domains.items() if domain.get("projected")]
    if not names:
        return ""
    said = "decoded fields were projected into the pores before errors, rollouts and conservation were measured."
    return html.paragraph(f"{', '.join(names)}: {said}")


def show_fields(run: Run) -> str:
    names = list(dict.fromkeys(key.split("/")[0] for key in run.slices))
    if not names:
        return html.paragraph("There are no field slices yet. Evaluation writes them to slices.npz.")
    return html.paragraph(FIELDS_NOTE, quiet=True) + "".join(_show_slices(run.slices, name) for name in names)


def _show_slices(slices: Mapping[str, np.ndarray], name: str) -> str:
    field = str(slices.get(f"{name}/field", "field"))
    heading = html.subheading(f"{name}: {field}")
    truth, decoded = _plane(slices, f"{name}/truth"), _plane(slices, f"{name}/decoded")
    shown = [image for image in (truth, decoded) if image is not None]
    if not shown:
        return heading + html.paragraph("No slice of this domain can be shown.")
    low, high = min(float(i.min()) for i in shown), max(float(i.max()) for i in shown)
    signed = low < -0.05 * high  # a decoded speed may undershoot a little; that is no second sign
    limits = (-max(-low, high), max(-low, high)) if signed else (low, high)
    colour_map = "RdBu_r" if signed else "viridis"
    pairs = (truth, "truth"), (decoded, "decoded")
    pictures = [draw_image(image, caption, limits, colour_map) for image, caption in pairs if image is not None]
    error = _plane(slices, f"{name}/error")
    if error is None and truth is not None and decoded is not None:
        error = decoded - truth
    if error is not None:
        largest = float(np.abs(error).max()) or 1.0
        bounds, colours = ((0.0, largest), "magma") if error.min() >= 0 else ((-largest, largest), "PuOr_r")
        size = format_number(float(np.sqrt(np.mean(error**2))))
        pictures.append(draw_image(error, f"error, rms {size}", bounds, colours))
    medium = _plane(slices, f"{name}/medium")
    if medium is not None:
        pictures.append(draw_image(medium, "medium", None, "gray"))
    return heading + html.figures(pictures, 240)


def show_rollout(run: Run) -> str:
    rollouts = {name: d["rollout"] for name, d in run.domains.items() if d.get("rollout")}
    if not rollouts:
        return html.paragraph("There is no rollout yet.")
    pictures = [draw_rollout(rollout, f"{name}: velocity VRMSE") for name, rollout in rollouts.items()]
    rows = []
    for name, rollout in rollouts.items():
        for key, label in ROLLOUT_KINDS.items():
            spans = [format_number(pick(rollout, key, "vrmse", span)) for span in ("1", "2-20", "20", "21-60")]
            rows.append([f"{name}, {label}", *spans, *_show_physics(rollout, key)])
    header = ["velocity VRMSE at step", "1", "2-20", "20", "21-60", "energy drift, 20", "energy per octave ÷ true, 20"]
    header += ["permeability error, 20", "wall shear error, 20"]
    table = html.table(header, rows) + html.paragraph(ROLLOUT_NOTE, quiet=True)
    return html.figures([picture for picture in pictures if picture], 300) + table


def _show_physics(rollout: Mapping[str, Any], key: str) -> list[str]:
    """What a forecast has kept of the physics by step 20."""
    octaves = pick(rollout, key, "octave_energy_ratio", "20")
    return [
        format_number(pick(rollout, key, "energy_drift", "20")),
        ", ".join(format_number(ratio) for ratio in octaves) if octaves else "-",
        format_number(pick(rollout, key, "permeability", "20", "flow_error")),
        format_number(pick(rollout, key, "wall_shear", "20", "mean_error")),
    ]


def show_training(run: Run) -> str:
    parts = []
    for phase in dict.fromkeys([*PHASES, *(record["phase"] for record in run.metrics)]):
        records = [record for record in run.metrics if record["phase"] == phase]
        keys = list(dict.fromkeys(key for record in records for key in record if key != "phase"))
        title = PHASES.get(phase, phase)
        losses = [key for key in keys if key == "loss" or key.startswith("loss/")]
        if not losses:
            parts.append(html.paragraph(f"{title}: no loss has been logged yet."))
            continue
        curves = _curves(records, {key: key.removeprefix("loss/") for key in losses})
        pictures = [draw_curves(curves, "loss (pale) and its running median", smooth=True)]
        for caption, names in _group_scalars(keys).items():
            pictures.append(draw_curves(_curves(records, names), caption))
        parts.append(html.subheading(title) + html.figures(pictures, 330))
    return "".join(parts)


def _group_scalars(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Scalars that one figure shows together, by its caption: a statistic's layers, or a measurement's domains.

    The value maps a scalar's name to its label. Losses and loads have figures of their own.
    """
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        if key in ("step", "time", "loss") or key.startswith(("loss/", "load/")):
            continue
        layered = re.fullmatch(r"routing/layer(\d+)/(.+)", key)
        *group, label = key.split("/")
        if layered:
            caption, label = f"routing: {layered[2].replace('/', ', ')}", f"layer {layered[1]}"
        else:
            caption = ", ".join(group) or label
        groups.setdefault(caption.replace("_", " "), {})[key] = label
    return groups


def show_conservation(run: Run) -> str:
    rows, operators = [], {}
    for name, domain in run.domains.items():
        for kind in ("divergence", "curl"):
            measured = domain.get(kind)
            if measured:
                facts = [str(measured[key]) for key in ("operator", "dtype", "units") if key in measured]
                operators[kind] = f"{kind.capitalize()}: {'; '.join(facts)}. "
                numbers = [format_number(measured.get(key)) for key in CONSERVATION_COLUMNS]
                rows.append([f"{name}, {kind}", *numbers, format_count(measured.get("num_fields"))])
    if not rows:
        return html.paragraph("No divergence has been measured yet.") + show_certificate(run)
    note = "".join(operators.values()) + CONSERVATION_NOTE
    table = html.table(["", *CONSERVATION_COLUMNS.values(), "fields"], rows) + html.paragraph(note, quiet=True)
    return table + show_certificate(run)


def show_provenance(run: Run) -> str:
    facts = run.facts
    if not facts:
        return html.paragraph("The run has not written its config and digests yet.")
    digests = facts.get("data_digests") or {}
    rows = [["git", Cell(str(facts.get("git_sha") or "not stated"))]]
    rows += [["tokenizer", Cell(str(facts.get("tokenizer_hash") or "not stated"))]]
    rows += [[f"data: {name}", Cell(str(digest))] for name, digest in digests.items()]
    config = facts.get("config")
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    return html.table(["", "digest"], rows) + "<p></p>" + html.preformatted("Resolved config", text)


def _curves(
    records: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each scalar, by its label."""
    curves = {}
    for key, label in labels.items():
        points = np.array([(record["step"], record[key]) for record in records if key in record], dtype=float)
        curves[label] = points[:, 0], points[:, 1]
    return curves


def _plane(slices: Mapping[str, np.ndarray], key: str) -> np.ndarray | None:
    image = slices.get(key)
    return image if image is not None and image.ndim == 2 and np.isfinite(image).all() else None
