"""From run folders to the AP gain: page, JSON and text, for `wsl-d2 compare` and for studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from wsl_d2.analysis import compare_runs
from wsl_d2.analysis.records import without_nan
from wsl_d2.files import write_atomically
from wsl_d2.report.comparison import describe_gain, describe_settling, describe_values, format_cell, write_report
from wsl_d2.report.plots import IOU_NAMES

GAINS = "ap_gain.json"


def write_gains(
    folders: Mapping[str, Sequence[Path]],
    ground_truth: str | Path,
    baselines: Sequence[str],
    output: str | Path,
    *,
    title: str,
    command: str,
    images: str | Path | None = None,
    curves: Mapping[str, Path] | None = None,
    **options,
) -> str:
    """Compares runs, and writes ``ap_gain.json`` and ``report.html``.

    Args:
        folders, ground_truth, baselines: see :func:`wsl_d2.analysis.compare_runs`.
        output: folder to write to.
        title: of the page.
        command: that makes the same page again.
        images: folder of the evaluated images, for the pictures.
        curves: initialization -> folder of its pretraining, whose loss is drawn.
        options: of :func:`wsl_d2.analysis.compare_runs`.

    Returns:
        The answer as text for a terminal.

    Raises:
        UserError: as :func:`wsl_d2.analysis.compare_runs`.
    """
    output = Path(output)
    comparison = compare_runs(
        {name: list(members) for name, members in folders.items()}, ground_truth, baselines, **options
    )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / GAINS, json.dumps(without_nan(comparison), indent=1, allow_nan=False))
    write_report(
        comparison,
        output / "report.html",
        title=title,
        image_folder=None if images is None else Path(images),
        curves=dict(curves or {}),
        command=command,
    )
    return _as_text(comparison)


def _as_text(comparison: dict) -> str:
    columns = [(t, m) for t in comparison["iou_types"] for m in ("AP", "AP50", "AP75")]
    rows = [[name, *(format_cell(run[t][m], m) for t, m in columns)] for name, run in comparison["runs"].items()]
    headers = ["initialization", *(f"{IOU_NAMES[t]} {m}" for t, m in columns)]
    lines = [tabulate(rows, headers, disable_numparse=True), ""]
    lines += [f"{IOU_NAMES[t]} AP is not compared: {reason}" for t, reason in comparison["left_out"].items()]
    for row in comparison["gains"]:
        for iou_type in comparison["iou_types"]:
            known = row[iou_type]["AP"]["method_interval"]
            lines.append(describe_gain(row, iou_type) + (f": {row[iou_type]['verdict']}" if known else ""))
        main = comparison["iou_types"][0]
        lines.append(f"  more certain ({IOU_NAMES[main]} AP): {describe_settling(row, main)}")
    for key, values in comparison["initialization"].items():
        lines.append(f"{key} differs: " + "; ".join(f"{n}: {describe_values(v)}" for n, v in values.items()))
    lines += [f"compared by force, although {line}" for line in comparison["differences"]]
    return "\n".join(lines)
