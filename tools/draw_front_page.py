#!/usr/bin/env python3
"""Draws the picture at the top of README.md, light and dark: pictures of the mini-world with their hashtags, and the AP
of a detector that starts from each initialization.

    tools/draw_front_page.py             # writes datasets/results/front_page_light.svg and front_page_dark.svg
    tools/draw_front_page.py --check     # exits 1 if they show other records than datasets/results/miniworld.jsonl

The photos are rendered as `make demo` renders them; the numbers are those of the records.
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from wsl_d2.files import sha256_of
from wsl_d2.report.records import read_records

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "datasets" / "results" / "miniworld.jsonl"
# Ink, lines and ours; the first two as GitHub shows text.
COLORS = {"light": ("#1f2328", "#d0d7de", "#0969da"), "dark": ("#f0f6fc", "#3d444d", "#4aa3ff")}
COLUMNS, ROWS, SIDE = 6, 2, 96
NAMES = {
    "scratch": "random weights",
    "imagenet": "clean labels",
    "imagenet_equal_views": "clean labels,\nas many views",
    "wsl": "hashtags",
}


def path_of(theme: str) -> Path:
    return RECORDS.with_name(f"front_page_{theme}.svg")


def photos() -> list[tuple[np.ndarray, list[str]]]:
    """Returns the first photos of the hashtag set whose hashtags are in the letters of the font, and these."""
    sys.path.insert(0, str(ROOT / "datasets"))
    from miniworld_renderer.prepare import WorldOptions
    from miniworld_renderer.render import Renderer
    from miniworld_renderer.sprites import load_sprites

    options = WorldOptions()
    renderer = Renderer(load_sprites(), options.styles("hashtags/train"), options.seed)
    found: list[tuple[np.ndarray, list[str]]] = []
    number = 0
    while len(found) < COLUMNS * ROWS:
        jpeg, metadata = renderer.hashtag_photo("hashtags/train", number, SIDE)
        tags = [f"#{tag.lstrip('#')}" for tag in metadata["hashtags"]]
        if 0 < len(tags) <= 3 and all(ord(letter) < 0x250 for tag in tags for letter in tag):
            found.append((np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")), tags))
        number += 1
    return found


def draw(theme: str, samples: list[tuple[np.ndarray, list[str]]], comparison: dict) -> str:
    """Returns the SVG."""
    ink, line, ours = COLORS[theme]
    settings = {
        **{name: ink for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
        **{"axes.edgecolor": line, "grid.color": line, "font.size": 9, "svg.hashsalt": "wsl_d2"},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "text.parse_math": False},
    }
    arms = sorted(comparison["runs"], key=lambda arm: comparison["runs"][arm]["bbox"]["mean"])
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.4, 3.4))
        for place, (pixels, tags) in enumerate(samples):
            row, column = divmod(place, COLUMNS)
            axis = figure.add_axes((0.005 + column * 0.092, 0.6 - row * 0.46, 0.085, 0.26))
            axis.imshow(pixels, interpolation="nearest")
            axis.set_axis_off()
            text = "\n".join(tag if len(tag) < 16 else f"{tag[:14]}…" for tag in tags)
            axis.text(0.5, -0.05, text, transform=axis.transAxes, ha="center", va="top", fontsize=7, linespacing=1.1)
        figure.text(0.005, 0.93, "photos, and what people wrote beside them", weight="bold")
        axis = figure.add_axes((0.735, 0.17, 0.25, 0.7))
        figure.text(0.985, 0.93, "box AP of the same detector, started from", weight="bold", ha="right")
        for y, arm in enumerate(arms):
            color = ours if arm == "wsl" else ink
            values = comparison["runs"][arm]["bbox"]["values"]
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
            mean = float(np.mean(values))
            axis.plot([mean, mean], [y - 0.22, y + 0.22], color=color, linewidth=2.5)
            axis.text(mean, y + 0.27, f"{mean:.1f}", color=color, ha="center", weight="bold" if arm == "wsl" else None)
        axis.set_yticks(range(len(arms)), [NAMES.get(arm, arm) for arm in arms])
        axis.tick_params(left=False)
        axis.set(xlim=(0, None), ylim=(-0.5, len(arms) - 0.35))
        axis.set_xlabel(f"AP, points; {len(values)} trainings each, bar: mean")
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        buffer = io.StringIO()
        metadata = {"Date": None, "Description": f"records {sha256_of(RECORDS)}"}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args(arguments).check:
        for theme in COLORS:
            if sha256_of(RECORDS) not in path_of(theme).read_text():
                sys.exit(f"error: {path_of(theme)} shows other records; run tools/draw_front_page.py")
        return
    comparison = next(record for record in read_records(RECORDS) if record["kind"] == "comparison")
    samples = photos()
    for theme in COLORS:
        path_of(theme).write_text(draw(theme, samples, comparison))
        print(path_of(theme))


if __name__ == "__main__":
    main()
