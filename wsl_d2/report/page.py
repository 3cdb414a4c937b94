"""Every HTML page: one file that holds all it shows, readable on a phone, in print and in the dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--line:#ddd;--soft:#f2f2f2;--quiet:#555}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#151719;--line:#3a3d40;--soft:#24272a;--quiet:#a8adb2}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;
padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
.headline{font-size:1.15rem;margin:.4rem 0}.verdict{font-weight:700}.quiet{color:var(--quiet)}
.scroll{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.baseline td{background:var(--soft)}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem}
.sheet figure{margin:0;min-width:0;overflow:visible}.sheet img{width:100%;display:block}
figure{margin:1rem 0;overflow-x:auto}figure>svg{background:#fff;max-width:100%;height:auto}
img{max-width:100%;height:auto}figcaption{color:var(--quiet);font-size:.9rem;overflow-wrap:anywhere}
p{overflow-wrap:anywhere}code,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:640px){figure>svg{max-width:none;width:640px}}
@media print{body{max-width:none}.scroll,figure{overflow:visible}h2{break-after:avoid}figure{break-inside:avoid}}
"""


def escape(value: object) -> str:
    """Returns text as HTML: hashtags, keys and file names are written by strangers."""
    return html.escape(str(value), quote=True)


def page(title: str, body: str) -> str:
    """Returns a whole page.

    Args:
        title: plain text; also its heading.
        body: HTML, after the heading.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Returns an HTML table that scrolls where it is too wide; every cell is escaped."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def image_url(pixels: np.ndarray, quality: int = 92) -> str:
    """Returns (H, W, 3) uint8 RGB as an image that the page holds itself."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
