"""A corpus of odd image files, each with what it must become: upright RGB pixels, or a reason of refusal.

The expected pixels are computed from the numbers the file was made of, not by decoding it.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

W, H = 48, 32


@dataclass
class OddImage:
    """``pixels`` (H, W, 3) that decoding must give to within ``tolerance``, or the ``reason`` of its refusal."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    reason: str | None = None
    tolerance: int = 0


def picture(width: int = W, height: int = H) -> np.ndarray:
    """Smooth, without symmetry, of four distinct corners."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 30 + 190 * x / max(1, width - 1), 30 + 190 * y / max(1, height - 1)
    return np.stack([red, green, 120 + 0.4 * (red - green)], axis=2).round().astype(np.uint8)


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return save(Image.fromarray(pixels), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(color_type: int, bits: int, rows: list[bytes], width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Writes a PNG by hand: Pillow cannot write 16-bit color."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    body = b"".join(chunk(*part) for part in chunks)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + body + data + chunk(b"IEND", b"")


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return np.round(pixels * weight + 255 * (1 - weight)).astype(np.uint8)


def exif_bytes(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def stored_for(orientation: int, upright: np.ndarray) -> np.ndarray:
    """Lays the upright pixels down so that EXIF's definition of row 0 and column 0 holds for the orientation."""
    axes = {  # the upright side that the stored rows start from, and the one that the stored columns start from
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }
    row, column = axes[orientation]
    height, width = upright.shape[:2]
    index = {
        "top": np.arange(height),
        "bottom": np.arange(height)[::-1],
        "left": np.arange(width),
        "right": np.arange(width)[::-1],
    }
    if row in ("top", "bottom"):
        return upright[index[row][:, None], index[column][None, :]]
    return upright[index[column][None, :], index[row][:, None]]


def bomb(format: str) -> bytes:
    """A few bytes that announce 30,000 x 30,000 pixels."""
    if format == "PNG":
        return png(2, 8, [b""], 30_000, 30_000)
    if format == "JPEG":
        data = jpeg(picture())
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", 30_000, 30_000) + data[at + 4 :]
    size = (16_383).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def corpus() -> list[OddImage]:
    """All odd files."""
    rgb = picture()
    gray = rgb[:, :, 0]
    gray_rgb = np.repeat(gray[:, :, None], 3, axis=2)
    alpha = np.tile(np.linspace(0, 255, W).round().astype(np.uint8), (H, 1))
    plain = jpeg(rgb)
    tall = picture(100, 90)
    progressive = jpeg(tall, progressive=True)
    found = [
        OddImage("zero bytes", b"", reason="empty"),
        OddImage("html named .jpg", b"<!DOCTYPE html><html><body>404</body></html>", reason="unknown format"),
        OddImage("text", b"not found\n", reason="unknown format"),
        OddImage("gif", save(Image.fromarray(gray), "GIF"), reason="unknown format"),
        OddImage("tiff", save(Image.fromarray(rgb), "TIFF"), reason="unknown format"),
        OddImage("bmp", save(Image.fromarray(rgb), "BMP"), reason="unknown format"),
        OddImage("jpeg magic alone", b"\xff\xd8\xff", reason="unknown format"),
        OddImage("jpeg cut in half", jpeg(tall)[: len(jpeg(tall)) // 2], reason="truncated"),
        OddImage("jpeg without its last two bytes", plain[:-2], reason="truncated"),
        OddImage("progressive jpeg cut", progressive[: len(progressive) * 3 // 4], reason="truncated"),
        OddImage("jpeg with a marker inside", plain[:-60] + b"\xff\xd9" + plain[-58:], reason="corrupt"),
        OddImage("jpeg cut in its header", plain[:40], reason="truncated"),
        OddImage("png with a wrong checksum", _wrong_checksum(rgb), reason="corrupt"),
        OddImage("png cut", save(Image.fromarray(rgb), "PNG")[:-40], reason="truncated"),
        OddImage("webp cut", save(Image.fromarray(rgb), "WEBP", lossless=True)[:-30], reason="truncated"),
        OddImage("png bomb", bomb("PNG"), reason="too large"),
        OddImage("jpeg bomb", bomb("JPEG"), reason="too large"),
        OddImage("webp bomb", bomb("WEBP"), reason="too large"),
        OddImage("plain jpeg", plain, rgb, tolerance=3),
        OddImage("progressive jpeg", jpeg(rgb, progressive=True), rgb, tolerance=3),
        OddImage("jpeg with bytes after its end", plain + b"trailer", rgb, tolerance=3),
        OddImage("jpeg with stray bytes before its end", plain[:-2] + b"abc" + plain[-2:], rgb, tolerance=3),
        OddImage("4:2:0 jpeg", jpeg(rgb, subsampling=2), rgb, tolerance=8),
        OddImage("gray jpeg", jpeg(gray), gray_rgb, tolerance=3),
        OddImage("rgb-coded jpeg", jpeg(rgb, keep_rgb=True), rgb, tolerance=3),
        OddImage("jpeg with color profile", jpeg(rgb, icc_profile=_profile()), rgb, tolerance=3),
        OddImage("jpeg with broken exif", jpeg(rgb, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), rgb, tolerance=3),
        OddImage("jpeg with orientation 99", jpeg(rgb, exif=exif_bytes(99)), rgb, tolerance=3),
        OddImage("1 x 1 png", save(Image.fromarray(rgb[:1, :1]), "PNG"), rgb[:1, :1]),
        OddImage("1 x 1 jpeg", jpeg(rgb[:1, :1]), rgb[:1, :1], tolerance=3),
        OddImage("1 x 20000 jpeg", jpeg(picture(1, 20_000)), picture(1, 20_000), tolerance=3),
        OddImage("20000 x 1 png", save(Image.fromarray(picture(20_000, 1)), "PNG"), picture(20_000, 1)),
        OddImage("webp", save(Image.fromarray(rgb), "WEBP", lossless=True), rgb),
        OddImage("bilevel png", save(Image.fromarray(gray > 128), "PNG"), np.where(gray_rgb > 128, 255, 0)),
    ]
    for orientation in range(1, 9):
        data = jpeg(stored_for(orientation, rgb), exif=exif_bytes(orientation))
        found.append(OddImage(f"jpeg with orientation {orientation}", data, rgb, tolerance=3))
    stored = Image.fromarray(stored_for(6, rgb))
    found += [OddImage("png with orientation 6", save(stored, "PNG", exif=exif_bytes(6)), rgb)]
    return found + _ink_and_alpha(rgb, gray, alpha) + _sixteen_bits(rgb, gray) + _animations(rgb)


def _wrong_checksum(rgb: np.ndarray) -> bytes:
    data = bytearray(save(Image.fromarray(rgb), "PNG"))
    data[data.index(b"IDAT") + 30] ^= 0xFF
    return bytes(data)


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _ink_and_alpha(rgb: np.ndarray, gray: np.ndarray, alpha: np.ndarray) -> list[OddImage]:
    ink = np.dstack([255 - rgb, gray // 4])
    printed = np.round((255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255).astype(np.uint8)
    cmyk = save(Image.fromarray(ink, "CMYK"), "JPEG", quality=95, subsampling=0)
    # Pillow writes Adobe's inverted CMYK; without Adobe's marker the same numbers mean the opposite ink.
    adobe = cmyk.index(b"Adobe") - 4
    bare = cmyk[:adobe] + cmyk[adobe + 2 + int.from_bytes(cmyk[adobe + 2 : adobe + 4], "big") :]
    inverse = np.round(ink[..., :3].astype(float) * ink[..., 3:] / 255).astype(np.uint8)
    palette = Image.fromarray(rgb).quantize(64)
    entries = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    half = bytes([128] * 64)
    seen = np.full((H, W), 128)
    gray_rgb = np.repeat(gray[:, :, None], 3, axis=2)
    keyed = gray_rgb.copy()
    keyed[gray == gray[0, 5]] = 255
    la = save(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]), "PNG")
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    return [
        OddImage("adobe cmyk jpeg", cmyk, printed, tolerance=5),
        OddImage("cmyk jpeg without adobe's marker", bare, inverse, tolerance=5),
        OddImage("la png", la, over_white(gray_rgb, alpha), tolerance=1),
        OddImage("rgba png", save(rgba, "PNG"), over_white(rgb, alpha), tolerance=1),
        OddImage("rgba webp", save(rgba, "WEBP", lossless=True, exact=True), over_white(rgb, alpha), tolerance=1),
        OddImage("palette png", save(palette, "PNG"), entries),
        OddImage(
            "palette png with alpha", save(palette, "PNG", transparency=half), over_white(entries, seen), tolerance=1
        ),
        OddImage("gray png, one transparent", save(Image.fromarray(gray), "PNG", transparency=int(gray[0, 5])), keyed),
    ]


def _sixteen_bits(rgb: np.ndarray, gray: np.ndarray) -> list[OddImage]:
    def rows(values: np.ndarray) -> list[bytes]:
        return [row.astype(">u2").tobytes() for row in values.reshape(H, -1)]

    wide_rgb, wide_gray = rgb.astype(np.uint16) * 257, gray.astype(np.uint16) * 257
    gray_rgb = np.repeat(gray[:, :, None], 3, axis=2)
    return [
        OddImage("16-bit gray png", png(0, 16, rows(wide_gray), W, H), gray_rgb),
        OddImage("16-bit rgb png", png(2, 16, rows(wide_rgb), W, H), rgb),
        OddImage(
            "16-bit la png",
            png(4, 16, rows(np.dstack([wide_gray, np.full_like(wide_gray, 65535)])), W, H),
            gray_rgb,
        ),
    ]


def _animations(rgb: np.ndarray) -> list[OddImage]:
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    gif = save(frames[0], "GIF", **options)
    return [
        OddImage("animated png", save(frames[0], "PNG", **options), rgb),
        OddImage("animated webp", save(frames[0], "WEBP", lossless=True, **options), rgb),
        OddImage("animated gif", gif, reason="unknown format"),
    ]
