"""Every HTML page: one file that holds all it shows, readable on a phone, in print and in the dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

STYLE = """
:root{color-scheme:light;--ink:#1a1a1a;--paper:#fff;--line:#d5d5d5;--quiet:#595959;--shade:#0005}
@media screen and (prefers-color-scheme:dark){
:root{color-scheme:dark;--ink:#e6e6e6;--paper:#151719;--line:#3d4145;--quiet:#a8adb2;--shade:#fff5}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;
padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;
border-bottom:1px solid var(--line)}
.headline{font-size:1.25rem;line-height:1.4;margin:.6rem 0}.quiet,figcaption{color:var(--quiet);font-size:.9rem}
p,li,figcaption,h1,h2{overflow-wrap:anywhere}
code,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.8rem 0;background:linear-gradient(90deg,var(--paper) 40%,transparent) local 0 0,
linear-gradient(270deg,var(--paper) 40%,transparent) local 100% 0,
linear-gradient(90deg,var(--shade),transparent) scroll 0 0,
linear-gradient(270deg,var(--shade),transparent) scroll 100% 0;
background-repeat:no-repeat;background-size:3rem 100%,3rem 100%,.9rem 100%,.9rem 100%}
.scroll::before{display:none;content:"wide table: swipe sideways \\2192";position:sticky;left:0;color:var(--quiet);
font-size:.85rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{vertical-align:bottom;white-space:normal;min-width:5rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper);
min-width:min(8rem,35vw);max-width:45vw;white-space:normal;overflow-wrap:anywhere}
td.text,th.text{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1rem}
figure{margin:1rem 0}.panels svg{width:100%;max-width:560px;height:auto;font-family:inherit}
.pictures{display:grid;grid-template-columns:repeat(var(--columns),1fr);gap:.8rem;
align-items:start}.pictures figure{margin:0;min-width:0;break-inside:avoid}
.picture>summary{display:block;cursor:zoom-in;list-style:none}.picture>summary::-webkit-details-marker{display:none}
.frame{display:block;position:relative;overflow:hidden;width:100%}.frame img{display:block;width:100%;height:100%}
.picture[open]>summary{position:fixed;inset:0;z-index:9;background:#000d;cursor:zoom-out;display:grid;
place-content:center}.picture[open] .frame{width:min(100vw,100vh*var(--ratio))}
.box{position:absolute;border:2px solid;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.box b{position:absolute;left:-2px;bottom:100%;padding:0 3px;font:600 11px/14px system-ui,sans-serif;color:#fff;
white-space:nowrap}.box.low b{bottom:auto;top:0}.box.right b{left:auto;right:-2px}
.picture[open] .box{border-width:3px}.picture[open] .box b{font-size:15px;line-height:19px}
@media screen and (max-width:640px){.pictures{grid-template-columns:1fr 1fr}.wide::before{display:block}
th,td{padding:.3rem .45rem}table{font-size:.9rem}.scroll:not(.wide) td{white-space:normal}}
@media print{body{max-width:none;font-size:11pt}.scroll{overflow:visible;background:none}.scroll::before{display:none}
table{font-size:8pt}.wide table{font-size:6.5pt}.panels{grid-template-columns:1fr 1fr}
th,td,th:first-child,td:first-child{white-space:normal;padding:.1rem .2rem;min-width:0;overflow-wrap:break-word}
th:first-child,td:first-child{min-width:5em;position:static}
h2,h2+p{break-after:avoid}
figure,tr{break-inside:avoid}}
"""
_WIDE = 4  # columns that a phone shows side by side


class Box(NamedTuple):
    """An object in a picture: where it is, in shares of width and height (0 to 1), a CSS color and a text."""

    x: float
    y: float
    width: float
    height: float
    color: str
    text: str


def escape(value: object) -> str:
    """Returns text as HTML: hashtags, keys and file names are written by strangers."""
    return html.escape(str(value), quote=True)


def paragraph(text: object, kind: str = "") -> str:
    """Returns a paragraph of plain text; kinds are "headline" and "quiet"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def page(title: str, *parts: str) -> str:
    """Returns a whole page.

    Args:
        title: plain text; also its heading.
        parts: HTML, below the heading.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def table(header: Sequence[object], rows: Iterable[Iterable[object]], text: Collection[int] = ()) -> str:
    """Returns an HTML table that scrolls where it is too wide, and says so on a phone; every cell is escaped.

    Args:
        header: the names of the columns.
        rows: as many cells each.
        text: the columns beside the first that hold text, which wraps, and no numbers.
    """

    def line(cells: Iterable[object], tag: str) -> str:
        kinds = (f'{tag} class="text"' if number in text else tag for number, _ in enumerate(header))
        return "".join(f"<{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    wide = " wide" if len(header) > _WIDE else ""
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f'<div class="scroll{wide}" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def panels(plots: Iterable[str], caption: str = "") -> str:
    """Returns SVGs side by side, below each other on a phone, with one caption of plain text."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="panels">{"".join(plots)}</div>{below}</figure>'


def picture(
    pixels: np.ndarray,
    alt: str,
    caption: str = "",
    boxes: Iterable[Box] = (),
    side: int = 560,
    most_bytes: int = 80_000,
) -> str:
    """Returns a picture that the page holds itself; a click, or Enter, enlarges it.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        alt: what it shows, as plain text.
        caption: plain text below it; its first line counts most.
        boxes: drawn by the browser in the size shown, so that lines and texts are never scaled.
        side: of its pixels, at most; larger ones are shrunk.
        most_bytes: as JPEG; the quality is lowered down to 40 for it.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side))
    for quality in (88, 75, 60, 40):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= most_bytes:
            break
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    drawn = "".join(
        f'<span class="box{" low" if box.y < 0.12 else ""}{" right" if box.x + box.width / 2 > 0.5 else ""}" '
        f'style="left:{box.x:.2%};top:{box.y:.2%};width:{box.width:.2%};height:{box.height:.2%};border-color:{box.color}">'
        f'<b style="background:{box.color}">{escape(box.text)}</b></span>'
        for box in boxes
    )
    first, *others = caption.split("\n")
    below = escape(first) + "".join(f'<br><span class="quiet">{escape(line)}</span>' for line in others)
    ratio = image.width / image.height
    return (
        f'<figure><details class="picture"><summary><span class="frame" style="--ratio:{ratio:.4f};aspect-ratio:'
        f'{ratio:.4f}"><img alt="{escape(alt)}" src="{url}">{drawn}</span></summary></details>'
        + (f"<figcaption>{below}</figcaption>" if caption else "")
        + "</figure>"
    )


def pictures(members: Sequence[str], columns: int) -> str:
    """Returns pictures in so many columns, two on a phone."""
    return f'<div class="pictures" style="--columns:{columns}">{"".join(members)}</div>'
