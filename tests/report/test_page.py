import io
import re

import numpy as np
import pytest
from PIL import Image

from wsl_d2.report.page import Box, page, panels, paragraph, picture, pictures, table
from wsl_d2.report.plots import INK, panel

HOSTILE = "<script>alert(1)</script> & $x$"


def photo(seed, height=480, width=640):
    """Noise over all scales, as hard to compress as a photo with much detail."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for size in (4, 16, 60, 240):
        small = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        pixels += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float) / 4
    return pixels.astype(np.uint8)


def test_a_page_of_24_pictures_stays_below_3_mb_and_needs_nothing_else():
    found = page("t", pictures([picture(photo(i), f"photo {i}", "one\ntwo") for i in range(24)], 6))
    assert len(found) < 3_000_000 and found.count("data:image/jpeg;base64,") == 24
    assert not re.search(r"(src|href)=.(?!data:)|url\(|@import|<link|<script", found)


def test_what_strangers_write_is_text():
    box = Box(0.1, 0.2, 0.3, 0.4, "#123456", HOSTILE)
    plots = []
    with panel(plots, HOSTILE, title=HOSTILE, xlabel=HOSTILE) as axis:
        axis.plot([0, 1], [0, 1], label=HOSTILE)
    parts = [picture(photo(0, 20, 30), HOSTILE, HOSTILE, [box]), table([HOSTILE], [[HOSTILE]]), paragraph(HOSTILE)]
    found = page(HOSTILE, *parts, panels(plots, HOSTILE))
    assert "<script" not in found and found.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x$") >= 11


def test_objects_are_drawn_by_the_browser_over_the_picture():
    found = picture(photo(1, 100, 200), "alt", boxes=[Box(0.25, 0.5, 0.5, 0.125, "#123456", "dog 87%")])
    assert "left:25.00%;top:50.00%;width:50.00%;height:12.50%" in found and ">dog 87%</b>" in found
    assert "aspect-ratio:2.0000" in found and 'alt="alt"' in found


@pytest.mark.parametrize(("columns", "is_wide"), [(3, False), (9, True)])
def test_wide_tables_say_that_they_scroll(columns, is_wide):
    found = table(range(columns), [range(columns)], {1})
    assert ('class="scroll wide"' in found) == is_wide
    assert found.count('<td class="text">') == 1 and found.count("<td") == columns
    with pytest.raises(ValueError, match="zip"):
        table(range(columns), [range(columns + 1)])


def test_plots_have_titles_and_take_the_pages_colors():
    plots = []
    with panel(plots, "what it shows", xlabel="iterations") as axis:
        axis.axvline(0, color=INK)
    assert plots[0].startswith("<svg") and "<title>what it shows</title>" in plots[0]
    assert INK not in plots[0] and "currentColor" in plots[0] and ">iterations</text>" in plots[0]


def test_a_title_beside_long_names_stays_within_the_plot():
    with panel([], "shows", 1.5, title="scratch − imagenet_equal_views", xlabel="gain in box AP, points") as axis:
        axis.set_yticks([0], ["classes known from hashtags alone (279)"])
    shown = axis.figure.get_tightbbox()
    assert 0 <= shown.x0 and shown.x1 <= 5 and shown.y1 <= axis.figure.get_figheight()


def test_large_pictures_are_shrunk_and_small_ones_are_not():
    import base64

    for size, shown in ((1000, 560), (90, 90)):
        data = re.search(r"base64,([^\"]+)", picture(photo(2, size, size), "a"))[1]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (shown, shown)
