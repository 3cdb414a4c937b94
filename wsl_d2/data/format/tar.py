"""WebDataset tars of images and their JSON: the one reader, the one writer, and the one rule for keys.

A member ``[folder/]name.extension`` belongs to the sample of key ``[folder/]name``: the name is split at the first dot
of its last part, as WebDataset does; a leading ``./`` is dropped. Every member is a sample's image, a sample's JSON, or
counted as ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec

from wsl_d2.errors import ShardError
from wsl_d2.files import HashingWriter, open_atomically

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 << 20
MAX_METADATA_BYTES = 1 << 20

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_ZERO_BLOCK = bytes(tarfile.BLOCKSIZE)


@dataclass
class TarImage:
    """One image of a tar.

    Args:
        key: of the sample.
        offset, size: where its encoded bytes lie in the tar.
        crc32: of these bytes.
        metadata: of the sample's JSON; None if there is none that can be used.
        problem: why there is none: "no .json", "invalid JSON" or "no JSON object".
    """

    key: str
    offset: int
    size: int
    crc32: int
    metadata: dict[str, Any] | None = None
    problem: str = "no .json"


@dataclass
class TarContent:
    """What lies in a tar.

    Args:
        images: in the tar's order.
        sha256: of the whole file, as hex digits.
        num_bytes: of the whole file.
        ignored: kind of member -> how many were ignored, and the first one's name.
    """

    images: list[TarImage]
    sha256: str
    num_bytes: int
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """Returns the key and the extension, in lower case, of a member's name; None for a name that has none of them."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    matched = _NAME.fullmatch(name)
    return (matched[1], matched[2].lower()) if matched else None


def check_key(key: str) -> None:
    """Raises ValueError, with the reason, for a key that cannot be a plain name of a member.

    A key has no dot behind its last slash, and folders before it that lead downwards, so that any reader of tars
    finds it again unchanged.
    """
    *folders, name = key.split("/")
    if not name or "." in name:
        raise ValueError("the key is empty or has a '.'")
    if any(folder in ("", ".", "..") for folder in folders):
        raise ValueError("the key is no path that leads downwards")
    if "\0" in key or len(key.encode("utf-8", "surrogateescape")) > 200:
        raise ValueError("the key is longer than 200 bytes or has a NUL")


class _CheckedTarInfo(tarfile.TarInfo):
    """Refuses the headers whose content tarfile would read into memory whatever their size."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        is_header = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) or member.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if is_header and member.size > MAX_METADATA_BYTES:
            raise tarfile.ReadError(f"an extended header of {member.size} bytes")
        return member


class _TarStream:
    """A file read from start to end, and its SHA-256; may go back a little, without hashing these bytes again."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.position = self.hashed = 0
        self.digest = hashlib.sha256()

    def go_back(self, position: int) -> None:
        self.file.seek(position)
        self.position = position

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        fresh = data[max(0, self.hashed - self.position) :]
        self.digest.update(fresh)
        self.position += len(data)
        self.hashed = max(self.hashed, self.position)
        return data


def read_tar(tar_path: str | Path) -> TarContent:
    """Reads a WebDataset tar once, to its end, without unpacking anything.

    Tars put one after another into one file are read as one. A sample whose JSON is missing or damaged keeps its image,
    with the reason.

    Args:
        tar_path: a file, or a URL that fsspec knows.

    Raises:
        ShardError: the tar is unreadable or truncated, no image has any usable JSON, a key is repeated, or a member is
            not a plain file with a safe relative name and a sane size.
    """
    images: dict[str, TarImage] = {}
    described: dict[str, bytes] = {}
    ignored: dict[str, tuple[int, str]] = {}
    try:
        with fsspec.open(str(tar_path), "rb") if "://" in str(tar_path) else open(tar_path, "rb") as file:
            stream = _TarStream(file)
            start: int | None = 0
            while start is not None:
                end = _read_archive(tar_path, stream, start, images, described, ignored)
                start = _next_archive(tar_path, stream, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{tar_path}: not a readable tar shard ({error}); write or download it again.") from error
    for key, image in images.items():
        if key in described:
            image.metadata, image.problem = _parse(described.pop(key))
    for key in described:
        count, first = ignored.get("json without an image", (0, key))
        ignored["json without an image"] = (count + 1, first)
    content = TarContent(list(images.values()), stream.digest.hexdigest(), stream.hashed, ignored)
    _check_samples(tar_path, content, len(described))
    return content


def _check_samples(tar_path: str | Path, content: TarContent, num_lone_json: int) -> None:
    if not content.images and num_lone_json:
        raise ShardError(f"{tar_path}: {num_lone_json} .json have no image, and there is no image at all.")
    if content.images and all(image.metadata is None for image in content.images):
        first = content.images[0]
        raise ShardError(
            f"{tar_path}: {len(content.images)} images have no .json that can be read, the first {first.key!r} "
            f"({first.problem})."
        )


def _read_archive(tar_path, stream: _TarStream, start: int, images: dict, described: dict, ignored: dict) -> int:
    """Reads the archive that begins at a byte of the file; returns where its last member ends."""
    end = start
    stream.go_back(start)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_CheckedTarInfo) as tar:  # type: ignore[call-overload]
        for member in tar:
            offset = start + member.offset_data
            end = offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not member.isdir():
                _read_member(tar_path, tar, member, offset, images, described, ignored)
            tar.members = []  # type: ignore[attr-defined]
    return end


def _next_archive(tar_path: str | Path, stream: _TarStream, end: int) -> int | None:
    """Reads the zeros behind an archive; returns where another one begins, or None at the end of the file."""
    stream.go_back(end)
    position = end
    while chunk := stream.read(1 << 20):
        if position == end and chunk[: tarfile.BLOCKSIZE] != _ZERO_BLOCK:
            break
        if chunk.strip(b"\0"):
            first = len(chunk) - len(chunk.lstrip(b"\0"))
            return position + first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(chunk)
    if position == end:
        raise ShardError(f"{tar_path}: the tar is truncated after {end} bytes; write or download it again.")
    return None


def _read_member(
    tar_path, tar, member: tarfile.TarInfo, offset: int, images: dict, described: dict, ignored: dict
) -> None:
    name = member.name
    if not member.isreg() or member.issparse() or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ShardError(f"{tar_path}: member {name!r} is a link, device or unsafe path; refused.")
    key, extension = split_name(name) or ("", "")
    if extension not in (*IMAGE_EXTENSIONS, "json"):
        kind = f".{extension}" if extension else "hidden file or no extension"
        if "." in extension:
            kind = f".{extension.rpartition('.')[2]} whose name has more than one dot"
        count, first = ignored.get(kind, (0, name))
        ignored[kind] = (count + 1, first)
        return
    limit = MAX_METADATA_BYTES if extension == "json" else MAX_IMAGE_BYTES
    if member.size > limit:
        raise ShardError(f"{tar_path}: member {name!r} has {member.size} bytes, more than {limit}; refused.")
    if key in (described if extension == "json" else images):
        raise ShardError(f"{tar_path}: there are two members of key {key!r}; keys must be unique.")
    data = tar.extractfile(member).read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"truncated in {name!r}")
    if extension == "json":
        described[key] = data
    else:
        images[key] = TarImage(key, offset, member.size, zlib.crc32(data))


def _parse(data: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return None, "invalid JSON"
    return (metadata, "") if isinstance(metadata, dict) else (None, "no JSON object")


def write_tar(path: str | Path, samples: Iterable[tuple[str, bytes, dict]]) -> TarContent:
    """Writes one shard as a WebDataset tar, atomically and byte for byte reproducibly.

    Args:
        path: the ``.tar`` to write; its folder must exist.
        samples: (key, encoded image, metadata); a key is a plain name, unique in the tar, see :func:`check_key`.

    Returns:
        What :func:`read_tar` would give.

    Raises:
        ValueError: for a key that cannot be used or is repeated.
    """
    images: dict[str, TarImage] = {}
    with open_atomically(path) as file:
        hashing = HashingWriter(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for key, image, metadata in samples:
                try:
                    check_key(key)
                except ValueError as error:
                    raise ValueError(f"{path}: sample key {key!r}: {error}; keys are unique plain names.") from error
                if key in images:
                    raise ValueError(f"{path}: sample key {key!r} is repeated; keys are unique plain names.")
                encoded = _encode(metadata)
                tar.addfile(_member(f"{key}.{_image_extension(image)}", len(image)), io.BytesIO(image))
                start = hashing.tell() - -(-len(image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                tar.addfile(_member(f"{key}.json", len(encoded)), io.BytesIO(encoded))
                images[key] = TarImage(key, start, len(image), zlib.crc32(image), metadata, "")
        num_bytes = hashing.tell()
    return TarContent(list(images.values()), hashing.hexdigest(), num_bytes)


def _encode(metadata: dict) -> bytes:
    try:
        return json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError:  # halves of surrogate pairs
        return json.dumps(metadata, sort_keys=True).encode()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member


def _image_extension(image: bytes) -> str:
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image.startswith(b"RIFF") and image[8:12] == b"WEBP" else "jpg"
