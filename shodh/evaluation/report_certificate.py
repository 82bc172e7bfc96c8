"""The certificate of conservation in the report: what the tokenizer's decodes were found to conserve, case by case."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shodh.evaluation import report_page as html
from shodh.evaluation.report_run import Run, format_count, format_number, pick

Cases = Sequence[tuple[str, Mapping[str, Any]]]  # what was decoded, and what was measured of it

KINDS = ("divergence", "curl")
COLUMNS = {"max_abs": "max", "rms": "rms", "mean_abs": "mean", "rms_over_rms_gradient": "rms ÷ rms ∇u"}
NOTE = (
    "Divergence of fluxes, curl of circulations: of stored float32, evaluated in float64, by staggered incidence "
    "operators. 0.0 means bit for bit."
)
SOLID_NOTE = (
    "Through faces that touch solid, before and after the masked projection, which inference applies on request; "
    "share: of the rms of the whole flux."
)
OTHERS_NOTE = "What other operators would report of the very same arrays, rms over the rms of the velocity gradient."


def show_certificate(run: Run) -> str:
    """The certificate as a table, its failures as alarms, or a sentence where there is none."""
    certificate, problem = find_certificate(run)
    parts = [html.subheading("Certificate of the tokenizer")] + ([html.alarm(problem)] if problem else [])
    if certificate is None:
        how = "Run launch/evaluate_model.py certificate on its config, or export the tokenizer again."
        return "".join([*parts, html.paragraph(f"There is none yet. {how}")])
    parts += [html.alarm(f"Certificate FAILED. {failure}.") for failure in certificate.get("failures") or []]
    parts.append(
        html.paragraph(
            f"Verdict: {certificate.get('verdict')}, of {format_count(certificate.get('num_fields'))} decodes with the "
            f"weights {str(certificate.get('weights'))[:12]}."
        )
    )
    cases = [(f"{n}, {b.get('decoded')}", b) for n, found in (certificate.get("domains") or {}).items() for b in found]
    return "".join([*parts, _show_conserved(cases), _show_solid(cases), _show_others(cases)])


def find_certificate(run: Run) -> tuple[dict[str, Any] | None, str]:
    """The run's ``certificate.json`` if it is of the evaluated weights, else the one its tokenizer was exported with.

    The second entry says what is wrong with a file that was passed over.
    """
    shipped = run.evaluation.get("certificate")
    path = run.folder / "certificate.json"
    if not path.is_file():
        return shipped, ""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        written = None
    if not isinstance(written, dict):
        return shipped, "certificate.json is broken, so it is left out. Certify the tokenizer again."
    if shipped and shipped.get("weights") != written.get("weights"):
        return shipped, "certificate.json is of other weights, so it is left out. Certify the tokenizer again."
    return written, ""


def _show_conserved(cases: Cases) -> str:
    header = ["", "box", "fields", "mean flow", "of", *COLUMNS.values(), "wall flux"]
    rows = []
    for name, block in cases:
        for kind in (kind for kind in KINDS if kind in block):
            numbers = [format_number(pick(block, kind, key)) for key in COLUMNS]
            flow = "on" if block.get("mean_flow_on") else "off"
            fields = format_count(block.get("num_fields"))
            rows.append([name, _box(block), fields, flow, kind, *numbers, format_number(block.get("wall_flux"))])
    return html.table(header, rows) + html.paragraph(NOTE, quiet=True)


def _show_solid(cases: Cases) -> str:
    header = ["flux through solid", "box", "fields", "before", "share", "after", "max |div| after"]
    keys = ("max_before",), ("rms_share_before",), ("max_after",), ("divergence_after", "max_abs")
    rows = []
    for name, block in cases:
        solid = block.get("solid_flux")
        if solid:
            fields = format_count(pick(solid, "divergence_after", "num_fields"))
            rows.append([name, _box(block), fields, *(format_number(pick(solid, *key)) for key in keys)])
    return html.table(header, rows) + html.paragraph(SOLID_NOTE, quiet=True) if rows else ""


def _show_others(cases: Cases) -> str:
    seen = [
        (f"{name}, {kind}", block, pick(block, kind, "what_others_see_rms_over_rms_gradient") or {})
        for name, block in cases
        for kind in KINDS
        if kind in block
    ]
    operators = list(dict.fromkeys(operator for *_, values in seen for operator in values))
    rows = [[name, _box(block), *(format_number(values.get(o)) for o in operators)] for name, block, values in seen]
    return html.table(["", "box", *operators], rows) + html.paragraph(OTHERS_NOTE, quiet=True)


def _box(block: Mapping[str, Any]) -> str:
    """Cells and boundaries of a case's grid."""
    shape, boundary = (pick(block, "grid", key) or [] for key in ("shape", "boundary"))
    return f"{'x'.join(map(str, shape))} {boundary[0] if len(set(boundary)) == 1 else ', '.join(boundary)}"
