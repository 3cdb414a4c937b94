"""Plots of the reports, as SVG that stands in a page; all of them can be read in black and white."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from wsl_d2.analysis.gain import shown_interval

IOU_NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
_STYLES = [("#555555", ":", "s"), ("#0b5cad", "-", "o"), ("#7aa6d6", "--", "^"), ("#c23b22", "-", "D"),
           ("#7a4fa3", "-.", "v"), ("#2b8a3e", "--", "P")]  # fmt: skip
STYLE_SHEET = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1100px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
.headline{font-size:1.15rem;margin:.4rem 0}.verdict{font-weight:700}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.baseline td{background:#f2f2f2}
img,svg{max-width:100%;height:auto}figure{margin:1rem 0;overflow-x:auto}
@media(max-width:640px){figure svg{max-width:none;width:640px}}figcaption{color:#444;font-size:.9rem}
.pictures td,.pictures th{padding:.2rem;text-align:center;border:0}.pictures img{width:205px;max-width:none}
code,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
"""


def style_of(position: int) -> tuple[str, str, str]:
    """Returns (colour, line style, marker) of the n-th initialisation; distinguishable without colour."""
    return _STYLES[position % len(_STYLES)]


def svg_of(figure) -> str:
    """Returns a figure as SVG, and closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plot_gains(comparison: dict) -> str:
    """Returns an SVG: the gain of each initialisation over each baseline with its 95% intervals: thick over images,
    thin over images and training seeds."""
    rows, iou_types = comparison["gains"], comparison["iou_types"]
    size = (9, 1.1 + 0.75 * max(1, len(rows)))
    figure, all_axes = plt.subplots(1, len(iou_types), figsize=size, sharey=True, layout="constrained", squeeze=False)
    axes = all_axes[0]
    names = list(comparison["runs"])
    for axis, iou_type in zip(axes, iou_types, strict=True):
        for y, row in enumerate(reversed(rows)):
            color, _, _ = style_of(names.index(row["candidate"]))
            for metric, offset, marker in (("AP", 0.14, "o"), ("AP50", -0.14, "s")):
                gain = row[iou_type][metric]
                if gain["method_interval"]:
                    axis.plot(gain["method_interval"], [y + offset] * 2, "|-", color=color, linewidth=1)
                axis.plot(gain["interval"], [y + offset] * 2, color=color, linewidth=3)
                face = color if metric == "AP" else "white"
                axis.plot(gain["gain"], y + offset, marker, color=color, markerfacecolor=face, markersize=7)
        axis.axvline(0, color="#1a1a1a", linewidth=1)
        axis.set_yticks(range(len(rows)), [f"{r['candidate']} − {r['baseline']}" for r in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(f"{IOU_NAMES[iou_type]} gain, AP points")
        axis.grid(axis="x", color="#ddd")
    axes[0].plot([], [], "o", color="#1a1a1a", label="AP")
    axes[0].plot([], [], "s", color="#1a1a1a", markerfacecolor="white", label="AP50")
    figure.legend(loc="outside upper center", ncol=2, frameon=False)
    return svg_of(figure)


def plot_curves(series: dict[str, tuple[list[int], list[float]]], names: list[str], xlabel: str, ylabel: str) -> str:
    """Returns an SVG of one line per initialisation; ``names`` fixes their styles."""
    figure, axis = plt.subplots(figsize=(9, 3.2))
    for name, (iterations, values) in series.items():
        color, line, _ = style_of(names.index(name)) if name in names else ("#1a1a1a", "-", "o")
        axis.plot(np.asarray(iterations) + 1, values, line, color=color, label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(color="#ddd")
    axis.legend(frameon=False)
    return svg_of(figure)


def plot_precision(curves: dict[str, dict[str, np.ndarray]]) -> str:
    """Returns an SVG of precision over recall.

    Args:
        curves: initialisation -> "0.50" and "0.75" -> (101,) mean over classes.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, threshold in zip(axes, ("0.50", "0.75"), strict=True):
        for position, (name, values) in enumerate(curves.items()):
            color, line, _ = style_of(position)
            axis.plot(np.linspace(0, 1, len(values[threshold])), values[threshold], line, color=color, label=name)
        axis.set(xlabel=f"recall at IoU {threshold}", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(color="#ddd")
    axes[0].set_ylabel("precision, mean over classes")
    axes[0].legend(frameon=False)
    return svg_of(figure)


def plot_errors(daps: dict[str, dict[str, float]]) -> str:
    """Returns an SVG of bars.

    Args:
        daps: initialisation -> kind of error -> dAP, in points of AP50.
    """
    kinds = list(next(iter(daps.values())))
    figure, axis = plt.subplots(figsize=(9, 3.2))
    width = 0.8 / len(daps)
    for position, (name, values) in enumerate(daps.items()):
        color, _, _ = style_of(position)
        places = np.arange(len(kinds)) + (position - (len(daps) - 1) / 2) * width
        hatch = ("", "//", "..", "xx", "--", "oo")[position % 6]
        axis.bar(places, [values[k] for k in kinds], width, color=color, edgecolor="white", hatch=hatch, label=name)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_ylabel("dAP, points of AP50")
    axis.grid(axis="y", color="#ddd")
    axis.set_axisbelow(True)
    axis.legend(frameon=False)
    return svg_of(figure)


def plot_classes(gains: dict[str, dict], xlabel: str, few: int) -> str:
    """Returns an SVG: the gain of each class with its interval, the largest first.

    Args:
        gains: class -> see :func:`wsl_d2.analysis.ap_gain.class_gains`.
        few: classes with fewer objects are drawn in grey.
    """
    order = sorted(gains, key=lambda name: gains[name]["gain"])
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.24 * len(order)))
    for y, name in enumerate(order):
        gain = gains[name]
        color = "#aaaaaa" if gain["num_objects"] < few else "#1a1a1a"
        clear = gain["p_value_holm"] < 0.05
        axis.plot(shown_interval(gain), [y, y], color=color, linewidth=1.5)
        axis.plot(gain["gain"], y, "o", color=color, markerfacecolor=color if clear else "white", markersize=5)
    axis.axvline(0, color="#1a1a1a", linewidth=1)
    axis.set_yticks(range(len(order)), [f"{name} ({gains[name]['num_objects']})" for name in order], parse_math=False)
    axis.set_ylim(-0.7, len(order) - 0.3)
    axis.set_xlabel(xlabel)
    axis.grid(axis="x", color="#ddd")
    return svg_of(figure)
