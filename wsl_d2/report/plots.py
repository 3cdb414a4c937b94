"""Plots of the pages: SVGs as wide as a phone, in the page's colors, readable in black and white."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wsl_d2.analysis.gain import shown_interval
from wsl_d2.report.page import escape

IOU_NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
INK, LINE, PAPER, QUIET = "#1a1a1a", "#d5d5d5", "#fdfdfd", "#8a8a8a"  # all but the last are the page's
_STYLES = [("#1f77c9", "-", "o"), ("#d1453b", "--", "s"), ("#c77d0a", "-.", "^"), ("#808080", ":", "D"),
           ("#8e5bbf", (0, (5, 1, 1, 1)), "v"), ("#2e9e4f", (0, (1, 1)), "P")]  # fmt: skip
_HATCHES = ("", "//", "..", "xx", "--", "oo")
_RC = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "axes.titlesize": 10,
       "savefig.transparent": True, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
       "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
       "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "legend.frameon": False,
       "hatch.color": "#ffffff"}  # fmt: skip


def style_of(position: int) -> tuple[str, object, str]:
    """Returns (color, line style, marker) of the n-th initialization; distinguishable without color."""
    return _STYLES[position % len(_STYLES)]


@contextmanager
def panel(plots: list[str], shows: str, height: float = 3.3, **settings: Any) -> Iterator[Axes]:
    """Appends what is drawn within as an SVG, which goes dark with the page.

    Args:
        plots: list of SVGs.
        shows: what, for those who cannot see it.
        height: in inches, of a width of 5.
        settings: of the axes, such as xlabel; a title is the figure's and wraps, as names beside narrow axes are long.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5, height), layout="constrained")
        axes = figure.subplots()
        if title := settings.pop("title", ""):
            figure.suptitle(title, fontsize=10, wrap=True)
        axes.set(**settings)
        yield axes
        if names := axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside upper left", ncols=2)
            figure.set_figheight(height + 0.18 * math.ceil(len(names) / 2))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, name in ((INK, "currentColor"), (LINE, "var(--line)"), (PAPER, "var(--paper)")):
        text = text.replace(color, name)
    start, end = text.split(">", 1)
    plots.append(f'{start} role="img" aria-label="{escape(shows)}"><title>{escape(shows)}</title>{end}')


def log_ticks(axis, numbers: Sequence[float] = ()) -> None:
    """Makes an axis with something on it logarithmic, with plain numbers at its ticks: those given, or round ones."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    round_ones = ticker.LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5))
    axis.set_major_locator(ticker.FixedLocator(numbers) if numbers else round_ones)
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")


def plot_gains(comparison: dict) -> list[str]:
    """Returns an SVG for each kind of AP: the gain of each initialization over each baseline with its 95% intervals,
    thick over images, thin over images and training seeds."""
    plots: list[str] = []
    names, rows = list(comparison["runs"]), comparison["gains"][::-1]
    for iou_type in comparison["iou_types"]:
        what = f"{IOU_NAMES[iou_type]} AP"
        with panel(plots, f"Gains in {what}", 1.2 + 0.75 * len(rows), xlabel=f"gain in {what}, points") as axis:
            for y, row in enumerate(rows):
                color, _, _ = style_of(names.index(row["candidate"]))
                for metric, offset, marker in (("AP", 0.14, "o"), ("AP50", -0.14, "s")):
                    gain = row[iou_type][metric]
                    if gain["method_interval"]:
                        axis.plot(gain["method_interval"], [y + offset] * 2, "|-", color=color, linewidth=1)
                    axis.plot(gain["interval"], [y + offset] * 2, color=color, linewidth=3)
                    face = color if metric == "AP" else PAPER
                    axis.plot(gain["gain"], y + offset, marker, color=color, markerfacecolor=face, markersize=7)
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_yticks(range(len(rows)), [f"{row['candidate']}\n− {row['baseline']}" for row in rows])
            axis.set_ylim(-0.6, len(rows) - 0.4)
            axis.plot([], [], "o", color=INK, label="AP")
            axis.plot([], [], "s", color=INK, markerfacecolor=PAPER, label="AP50")
    return plots


def plot_curves(series: Mapping[str, tuple[Sequence[int], Sequence[float]]], names: list[str], ylabel: str) -> str:
    """Returns an SVG of one line per initialization over iterations; ``names`` fixes their styles."""
    plots: list[str] = []
    with panel(plots, f"{ylabel} over iterations", xlabel="iterations", ylabel=ylabel) as axis:
        for name, (iterations, values) in series.items():
            color, line, _ = style_of(names.index(name)) if name in names else (QUIET, "-", "o")
            axis.plot(np.asarray(iterations) + 1, values, linestyle=line, color=color, label=name)
    return plots[0]


def plot_precision(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Returns two SVGs of precision over recall.

    Args:
        curves: initialization -> "0.50" and "0.75" -> (101,) mean over classes.
    """
    plots: list[str] = []
    for threshold in ("0.50", "0.75"):
        labels: dict[str, Any] = {"xlabel": f"recall at IoU {threshold}", "ylabel": "precision, mean over classes"}
        with panel(plots, f"Precision over recall at IoU {threshold}", xlim=(0, 1), ylim=(0, 1.02), **labels) as axis:
            for position, (name, values) in enumerate(curves.items()):
                color, line, _ = style_of(position)
                recall = np.linspace(0, 1, len(values[threshold]))
                axis.plot(recall, values[threshold], linestyle=line, color=color, label=name)
    return plots


def plot_errors(daps: Mapping[str, Mapping[str, float]]) -> str:
    """Returns an SVG of bars.

    Args:
        daps: initialization -> kind of error -> dAP, in points of AP50.
    """
    plots: list[str] = []
    kinds = list(next(iter(daps.values())))
    height = 0.8 / len(daps)
    size = 1 + 0.22 * len(kinds) * len(daps)
    with panel(plots, "AP50 lost to each kind of error", size, xlabel="dAP, points of AP50") as axis:
        for position, (name, values) in enumerate(daps.items()):
            places = np.arange(len(kinds)) + (position - (len(daps) - 1) / 2) * height
            look = {"color": style_of(position)[0], "hatch": _HATCHES[position % len(_HATCHES)]}
            axis.barh(places, [values[kind] for kind in kinds], height, label=name, linewidth=0, **look)
        axis.set_yticks(range(len(kinds)), kinds)
        axis.invert_yaxis()
    return plots[0]


def plot_groups(gains: Mapping[str, dict], kind: str, title: str, xlabel: str, few: int) -> str:
    """Returns an SVG: the gain of each class or supercategory with its interval, the largest first.

    Args:
        gains: name -> see :func:`wsl_d2.analysis.ap_gain.gains_by`.
        kind: "class" or "supercategory".
        title, xlabel: of the plot.
        few: those with fewer objects are drawn in gray.
    """
    plots: list[str] = []
    order = sorted(gains, key=lambda name: gains[name]["gain"])
    with panel(plots, f"Gain of each {kind}, {title}", 1.1 + 0.22 * len(order), title=title, xlabel=xlabel) as axis:
        for y, name in enumerate(order):
            gain = gains[name]
            color = QUIET if gain["num_objects"] < few else INK
            face = color if gain["p_value_holm"] < 0.05 else PAPER
            axis.plot(shown_interval(gain), [y, y], color=color, linewidth=1.5)
            axis.plot(gain["gain"], y, "o", color=color, markerfacecolor=face, markersize=5)
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_yticks(range(len(order)), [f"{name} ({gains[name]['num_objects']})" for name in order])
        axis.set_ylim(-0.7, len(order) - 0.3)
    return plots[0]


def draw_ranks(axis: Axes, curves: Mapping[str, np.ndarray], ylabel: str) -> None:
    """Draws numbers of each label, the most frequent of the first curve first, on logarithmic axes.

    Args:
        axis: to draw on.
        curves: name -> (C,) counts or shares; the first is a broad band, so that it shows below the others.
        ylabel: what they are.
    """
    first = next(iter(curves.values()))
    order = np.argsort(-first, kind="stable")
    order = order[first[order] > 0]
    ranks = np.unique(np.geomspace(1, max(1, len(order)), 400).astype(int))[: len(order)]
    for position, (name, values) in enumerate(curves.items()):
        look = {"color": "#e0a458", "linewidth": 7} if position == 0 else {"color": style_of(0)[0], "linewidth": 1.5}
        axis.plot(ranks, values[order[ranks - 1]], label=name, gid=f"curve{position}", **look)
    log_ticks(axis.xaxis)
    log_ticks(axis.yaxis)
    axis.set(xlabel="label, by its number of images", ylabel=ylabel)
