"""The report's sections on what the tokenizer decodes and on the latents that it gives to the forecaster."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from shodh.evaluation import report_page as html
from shodh.evaluation.report_figures import EXPERT_COLOURS, Line, draw_lines
from shodh.evaluation.report_run import Run, format_count, format_number, pick

BLUE, ORANGE, GREEN = EXPERT_COLOURS[:3]
GREY = EXPERT_COLOURS[7]
PERMEABILITY = "flow_error", "dissipation_error", "dissipation_bias"

SPECTRUM_NOTE = (
    "True latents decoded, on held-out trajectories; normalised fields less their means, energies pooled over "
    "snapshots. Octaves of wavenumber over the grid's Nyquist wavenumber; the last is the highest resolved one, where "
    "at least half the truth's energy is wanted. Energy alone may be noise: correlation says how much of it is the "
    "truth's. Walled and open axes are continued by their mirror image."
)
GRADIENT_NOTE = (
    "Density of velocity gradients, in units of the true rms of each snapshot. Skewness: 0 for a symmetric "
    "distribution; flatness: 3 for a Gaussian, more for one with rare strong events."
)
WALL_NOTE = (
    "du/dn at no-slip walls from the first cell, normalised velocity per mean cell size. Error of the mean: of each "
    "snapshot's mean shear vector, averaged. Pattern: rms error on the wall over the deviation of the true shear from "
    "its mean."
)
POROUS_NOTE = (
    "Permeability by flow: viscosity times mean flow over force; a tokenizer that passes the mean flow through its "
    "latent has no error in it. By dissipation: mean flow squared over mean |grad u|², which decoded throats decide. "
    "Flux in solid: share of flux² on faces that touch solid."
)
LATENT_NOTE = (
    "Latents are whitened over all domains together, per channel. Condition number and effective channels are of the "
    "covariance of channels within a latent cell. Round trip: |encode(decode(z)) - z| / |z|."
)
SMOOTHNESS_NOTE = (
    "Gain: relative change of the decoded velocity (over its deviation from the mean flow) per relative change of the "
    "latent, for random perturbations; pattern: of the velocity less its box means. The worst direction is found by "
    "power iterations at one state. Nonlinearity: gain at the largest perturbation over that at the smallest."
)


def show_reconstruction(run: Run) -> str:
    blocks = {name: d["reconstruction"] for name, d in run.domains.items() if d.get("reconstruction")}
    if not blocks:
        return html.paragraph("Decoded fields have not been measured yet.")
    return (
        _show_errors(blocks)
        + _show_spectra(blocks)
        + _show_gradients(blocks)
        + _show_walls(blocks)
        + _show_porous(blocks)
    )


def show_latents(run: Run) -> str:
    blocks = {name: d["latents"] for name, d in run.domains.items() if d.get("latents")}
    if not blocks:
        return html.paragraph("Latents have not been measured yet.")
    together = {"all domains": run.evaluation["latents"]} if run.evaluation.get("latents") else {}
    bound = next(iter(blocks.values()))["bound"]
    header = ["domain", "mean", "std", "largest |z|", f"share of |z| > {bound:g}", "condition number"]
    header += ["effective channels", "of", "round trip"]
    keys = "mean", "std", "largest", "share_outside", "condition_number", "effective_channels"
    rows = [
        [name, *(format_number(b.get(key)) for key in keys), format_count(b.get("num_channels"))]
        + [format_number(b.get("round_trip"))]
        for name, b in (blocks | together).items()
    ]
    return html.table(header, rows) + html.paragraph(LATENT_NOTE, quiet=True) + _show_smoothness(blocks)


def _show_errors(blocks: Mapping[str, Any]) -> str:
    fields = list(next(iter(blocks.values()))["vrmse"])
    rows = [[name, *(format_number(pick(b, "vrmse", field)) for field in fields)] for name, b in blocks.items()]
    return html.table(["VRMSE", *(field.replace("_", ", ") for field in fields)], rows)


def _show_spectra(blocks: Mapping[str, Any]) -> str:
    pictures = [draw_lines(*_spectrum_lines(name, b), log_x=True, log_y=True, decades=8) for name, b in blocks.items()]
    longest = max((b["octaves"]["upper_wavenumber_over_nyquist"] for b in blocks.values()), key=len)
    rows = []
    for name, block in blocks.items():
        octaves = block["octaves"]
        kinds = [("velocity", "energy_ratio", "energy ÷ true"), ("velocity", "error", "error ÷ true energy")]
        kinds += [("velocity", "correlation", "correlation"), ("block_klt", "energy_ratio", "block KLT, energy ÷ true")]
        kinds += [("pressure", "energy_ratio", "pressure, energy ÷ true")]
        for field, key, label in kinds:
            values = pick(octaves, field, key)
            if values:
                missing = [""] * (len(longest) - len(values))
                rows.append([f"{name}: {label}", *missing, *map(format_number, values)])
    header = ["octave of wavenumber ÷ Nyquist", *_octave_names(longest)]
    table = html.table(header, rows) + html.paragraph(SPECTRUM_NOTE, quiet=True)
    return html.subheading("Energy by wavenumber") + html.figures(pictures, 330) + table


def _spectrum_lines(name: str, block: Mapping[str, Any]) -> tuple[list[Line], str, str]:
    spectrum = block["spectrum"]
    styles = {"truth": (None, "-"), "decoded": (BLUE, "-"), "error": (GREY, ":"), "block_klt": (ORANGE, "--")}
    lines = [
        Line(key.replace("block_klt", "block KLT"), spectrum["wavenumber_over_nyquist"], spectrum[key], *style)
        for key, style in styles.items()
        if spectrum.get(key)
    ]
    return lines, f"{name}: velocity, energy per shell ÷ whole", "wavenumber ÷ Nyquist"


def _octave_names(upper: Sequence[float | int]) -> list[str]:
    bounds = [str(Fraction(k)) for k in upper]
    return [f"to {bounds[0]}", *(f"{low} to {high}" for low, high in zip(bounds, bounds[1:], strict=False))]


def _show_gradients(blocks: Mapping[str, Any]) -> str:
    pictures, rows = [], []
    for kind in ("longitudinal", "transverse"):
        for name, block in blocks.items():
            gradients = block["gradients"]
            truth, decoded = (gradients[kind][label] for label in ("truth", "decoded"))
            lines = [
                Line("truth", gradients["centres"], truth["density"]),
                Line("decoded", gradients["centres"], decoded["density"], BLUE),
            ]
            caption = f"{name}: {kind} gradients"
            pictures.append(draw_lines(lines, caption, "gradient ÷ true rms", log_y=True, decades=6))
            shapes = [
                f"{format_number(decoded[key])} ({format_number(truth[key])})" for key in ("skewness", "flatness")
            ]
            rows.append([f"{name}, {kind}", format_number(gradients[kind]["rms_ratio"]), *shapes])
    table = html.table(["gradients", "rms ÷ true", "skewness (true)", "flatness (true)"], rows)
    heading = html.subheading("Velocity gradients")
    return heading + html.figures(pictures, 330) + table + html.paragraph(GRADIENT_NOTE, quiet=True)


def _show_walls(blocks: Mapping[str, Any]) -> str:
    walls = [(name, wall) for name, b in blocks.items() for wall in b.get("wall_shear") or []]
    if not walls:
        return ""
    header = ["wall", "mean shear (true)", "error of the mean", "rms shear (true)", "pattern VRMSE"]
    rows = []
    for name, wall in walls:
        pairs = [wall[key] for key in ("mean", "rms")]
        mean, rms = (f"{format_number(p['decoded'])} ({format_number(p['truth'])})" for p in pairs)
        errors = [format_number(wall[key]) for key in ("mean_error", "pattern_vrmse")]
        rows.append([f"{name}, {wall['side']} {wall['axis']}", mean, errors[0], rms, errors[1]])
    return html.subheading("Wall shear") + html.table(header, rows) + html.paragraph(WALL_NOTE, quiet=True)


def _show_porous(blocks: Mapping[str, Any]) -> str:
    porous = {name: b for name, b in blocks.items() if b.get("flux_in_solid")}
    if not porous:
        return ""
    header = ["permeability", "error by flow", "error by dissipation", "bias by dissipation"]
    header += ["flux in solid", "true flux in solid"]
    rows = [
        [name, *(format_number(pick(b, "permeability", key)) for key in PERMEABILITY)]
        + [format_number(b["flux_in_solid"][key]) for key in ("decoded", "truth")]
        for name, b in porous.items()
    ]
    return html.subheading("Flow through solids") + html.table(header, rows) + html.paragraph(POROUS_NOTE, quiet=True)


def _show_smoothness(blocks: Mapping[str, Any]) -> str:
    gains = {name: b["smoothness"] for name, b in blocks.items() if b.get("smoothness")}
    if not gains:
        return ""
    lines = []
    for (name, parts), colour in zip(gains.items(), EXPERT_COLOURS, strict=False):
        for part, label, style in (("velocity", name, "-"), ("pattern", "", ":")):
            lines.append(Line(label, parts[part]["relative_sizes"], parts[part]["mean"], colour, style))
    caption = "mean gain of random perturbations: of velocity (lines) and of its pattern (dotted)"
    picture = draw_lines(lines, caption, "relative size of the perturbation", log_x=True)
    sizes = next(iter(gains.values()))["velocity"]["relative_sizes"]
    header = ["gain of", *(f"at {size:g}: mean, p90, max" for size in sizes), "worst direction", "nonlinearity"]
    rows = [
        [f"{name}, {part}", *(_spread(gain, i) for i in range(len(sizes)))]
        + [format_number(gain.get("largest_gain")), format_number(gain["nonlinearity"])]
        for name, parts in gains.items()
        for part, gain in parts.items()
    ]
    skipped = {name: b["largest_gain_skipped"] for name, b in blocks.items() if b.get("largest_gain_skipped")}
    said = "".join(html.paragraph(f"{name}, worst direction not measured: {why}") for name, why in skipped.items())
    table = html.table(header, rows) + said + html.paragraph(SMOOTHNESS_NOTE, quiet=True)
    return html.subheading("Smoothness of the decoder") + html.figures([picture], 330) + table


def _spread(gain: Mapping[str, Any], index: int) -> str:
    return ", ".join(format_number(gain[key][index]) for key in ("mean", "p90", "max"))
