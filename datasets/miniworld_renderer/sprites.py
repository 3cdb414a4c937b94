"""Artwork: pinned npm packages of emoji SVGs -> one ``sprites.npz``, all that rendering needs.

Shapes: K sprites of S x S pixels, S = 96.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .concepts import load_concepts

SPRITE_SIZE = 96


class SpriteError(RuntimeError):
    """The artwork cannot be obtained or is not what was expected."""


@dataclass(frozen=True)
class ArtStyle:
    """One emoji collection, as packaged for npm by Iconify (``@iconify-json/<name>``).

    Args:
        version, sha256: of the package's tarball.
        license, author, url: of the artwork.
    """

    version: str
    sha256: str
    license: str
    author: str
    url: str


ART_STYLES = {
    "emojione": ArtStyle(
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One (EmojiTwo)",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "emojione-v1": ArtStyle(
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "Emoji One v1",
        "https://github.com/joypixels/emojione-legacy",
    ),
    "fluent-emoji": ArtStyle(
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-flat": ArtStyle(
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fxemoji": ArtStyle(
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
    "noto": ArtStyle(
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "openmoji": ArtStyle(
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "https://github.com/hfg-gmuend/openmoji",
    ),
    "twemoji": ArtStyle(
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter (continued by jdecked)",
        "https://github.com/jdecked/twemoji",
    ),
}


def cache_folder() -> Path:
    """Returns ``$WSL_D2_CACHE``, by default ~/.cache/wsl_d2."""
    return Path(os.environ.get("WSL_D2_CACHE") or "~/.cache/wsl_d2").expanduser()


def fetch_package(style: str) -> Path:
    """Downloads a style's tarball with ``npm pack`` into the cache unless it is there; checks its SHA-256.

    Returns:
        The tarball's path.

    Raises:
        SpriteError: npm is absent or fails, or the tarball is another one than the pinned.
    """
    art = ART_STYLES[style]
    package = f"@iconify-json/{style}@{art.version}"
    folder = cache_folder() / "npm"
    tarball = folder / f"iconify-json-{style}-{art.version}.tgz"
    if not tarball.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise SpriteError(
                f"the mini-world's artwork comes from the npm package {package}, and no npm is on PATH. "
                "Either install Node.js (it brings npm; Debian, Ubuntu: apt install npm), or copy the file "
                f"{sprites_path().name} from the cache of a machine that has prepared a mini-world to "
                f"{sprites_path()}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            command = [npm, "pack", package, "--pack-destination", partial, "--silent"]
            result = subprocess.run(command, capture_output=True, text=True)
            packed = Path(partial) / tarball.name
            if result.returncode != 0 or not packed.is_file():
                raise SpriteError(
                    f"`npm pack {package}` failed with exit code {result.returncode}; check the network and "
                    f"npm's registry setting. It said:\n{(result.stderr or result.stdout).strip()[-1000:]}"
                )
            os.replace(packed, tarball)
    sha256 = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if sha256 != art.sha256:
        raise SpriteError(
            f"{tarball}: SHA-256 is {sha256}, expected {art.sha256} for {package}. The file is damaged or "
            "was altered; delete it and run again to download it once more."
        )
    return tarball


def icon_svg(collection: dict, icon: str) -> str:
    """Returns an SVG document for an icon of an Iconify collection (the parsed ``icons.json``).

    Aliases are followed; none of the icons in use is a mirrored or rotated alias, which is refused.
    """
    name = icon
    while name not in collection["icons"]:
        alias = collection.get("aliases", {}).get(name)
        if alias is None or alias.keys() - {"parent"}:
            raise SpriteError(f"icon {icon!r} is not in collection {collection.get('prefix')!r} as a plain icon.")
        name = alias["parent"]
    data = collection["icons"][name]
    left, top, width, height = (
        data.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SPRITE_SIZE}" height="{SPRITE_SIZE}" viewBox="{left} {top} {width} {height}">'
        f"{data['body']}</svg>"
    )


def rasterize(svg: str) -> np.ndarray:
    """Renders an SVG document; returns (S, S, 4) uint8 RGBA, not premultiplied."""
    import resvg_py  # here, so that machines with a ready sprites.npz need no rasteriser

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@dataclass(frozen=True)
class Sprites:
    """The artwork of all concepts.

    Args:
        concepts: (K,) str, concept names.
        styles: (K,) str, keys of :data:`ART_STYLES`.
        rgba: (K, S, S, 4) uint8, not premultiplied.
    """

    concepts: np.ndarray
    styles: np.ndarray
    rgba: np.ndarray

    def digest(self) -> str:
        """Returns the SHA-256 over names, styles and pixels, as hex digits."""
        digest = hashlib.sha256("\n".join([*self.concepts, *self.styles]).encode())
        digest.update(np.ascontiguousarray(self.rgba).tobytes())
        return digest.hexdigest()


def sprites_path() -> Path:
    """Returns where the cache keeps the sprites; the name changes with the packages and icons asked for."""
    pins = [f"{style} {art.sha256}" for style, art in ART_STYLES.items()]
    icons = [f"{c.name} {style} {icon}" for c in load_concepts() for style, icon in c.icons.items()]
    digest = hashlib.sha256("\n".join([str(SPRITE_SIZE), *pins, *icons]).encode()).hexdigest()
    return cache_folder() / f"sprites-{digest[:12]}.npz"


def load_sprites() -> Sprites:
    """Returns the sprites from the cache; on the first call downloads and rasterises them (seconds).

    Raises:
        SpriteError: see :func:`fetch_package`, or the cached file is damaged.
    """
    path = sprites_path()
    if not path.is_file():
        _build_sprites(path)
    return read_sprites(path)


def read_sprites(path: str | Path) -> Sprites:
    """Reads a ``sprites.npz``.

    Raises:
        SpriteError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Sprites(arrays["concepts"], arrays["styles"], arrays["rgba"])
    except (OSError, KeyError, ValueError) as error:
        raise SpriteError(f"{path}: missing or damaged sprites ({error}); delete it and prepare again.") from error


def _build_sprites(path: Path) -> None:
    concepts, styles, rgba = [], [], []
    for style in ART_STYLES:
        wanted = [(c.name, c.icons[style]) for c in load_concepts() if style in c.icons]
        with tarfile.open(fetch_package(style)) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None  # the tarball's digest was checked
            collection = json.load(member)
        for concept, icon in wanted:
            pixels = rasterize(icon_svg(collection, icon))
            if (pixels[..., 3] >= 128).mean() < 0.05:
                raise SpriteError(f"icon {icon!r} of {style!r} renders (almost) empty; check the resvg-py version.")
            concepts.append(concept)
            styles.append(style)
            rgba.append(pixels)
    write_sprites(path, Sprites(np.array(concepts), np.array(styles), np.stack(rgba)))


def write_sprites(path: Path, sprites: Sprites) -> None:
    """Writes a ``sprites.npz``, atomically; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, concepts=sprites.concepts, styles=sprites.styles, rgba=sprites.rgba)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def attribution() -> str:
    """Returns the credits that the artwork's licenses ask to keep with the pictures."""
    lines = [
        "The pictures of this folder are made of emoji artwork of these collections: cropped, scaled,",
        "rotated, tinted and placed on generated backgrounds. Pictures with CC-BY-SA artwork, and so the",
        "folder as a whole, may be shared under CC-BY-SA-4.0.",
        "",
    ]
    lines += [f"{style}: {art.author}, {art.url}, {art.license}" for style, art in ART_STYLES.items()]
    return "\n".join(lines) + "\n"
