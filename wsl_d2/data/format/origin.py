"""Where an image comes from, as far as splits, caps and reports need it: a pseudonym of its poster, year and place.

Names, coordinates and days are not kept: of a poster 64 bits of a hash, of coordinates a cell of 10 degrees.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

CELL = 10  # degrees
_YEARS = range(1800, 2200)
_PSEUDONYM = re.compile(r"[0-9a-f]{16}")
_PLACE_LETTERS = 60


class Origin(NamedTuple):
    """Who posted an image, when and where.

    Attributes:
        user: 64 bits of a hash of the poster's name; 0 if unknown.
        year: 0 if unknown.
        place: such as a country, or a cell of coordinates, "50N 10E" by its south-west corner; empty if unknown.
    """

    user: int = 0
    year: int = 0
    place: str = ""

    def metadata(self) -> dict[str, Any]:
        """Returns what is known, for the JSON beside an image."""
        known = {"user": f"{self.user:016x}" if self.user else "", "year": self.year, "place": self.place}
        return {name: value for name, value in known.items() if value}


def read_origin(user: Any, time: Any, place: Any) -> Origin:
    """Returns an origin of whatever a table or a JSON holds; what cannot be understood is unknown.

    Args:
        user: name or number of the poster; 16 hexadecimal digits are taken for a hash already.
        time: a date, a text that begins with a year, a year, or seconds or milliseconds since 1970.
        place: a name, or (longitude, latitude) in degrees.
    """
    return Origin(_user(user), _year(time), _place(place))


def _user(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in ("", "null"):
        return 0
    if isinstance(value, float):
        if not math.isfinite(value):
            return 0
        value = int(value) if value.is_integer() else value
    text = str(value)
    if _PSEUDONYM.fullmatch(text):
        return int(text, 16)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"wsl_d2 poster").digest()
    return int.from_bytes(digest, "little")


def _year(value: Any) -> int:
    year = 0
    if hasattr(value, "year"):
        year = int(value.year)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        text = str(value)
        found = re.match(r"(\d{4})(?!\d)", text)
        if found:
            year = int(found.group(1))
        elif number := re.fullmatch(r"(\d{9,13})(\.\d*)?", text):
            seconds = int(number.group(1)) / (1000 if len(number.group(1)) > 11 else 1)
            year = datetime.fromtimestamp(seconds, timezone.utc).year
    return year if year in _YEARS else 0


def _place(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.split())[:_PLACE_LETTERS]
    try:
        longitude, latitude = (float(one) for one in value)
    except (TypeError, ValueError):
        return ""
    if not (-180 <= longitude <= 180 and -90 <= latitude <= 90):
        return ""
    south = min(90 - CELL, math.floor(latitude / CELL) * CELL)
    west = min(180 - CELL, math.floor(longitude / CELL) * CELL)
    return f"{abs(south)}{'S' if south < 0 else 'N'} {abs(west)}{'W' if west < 0 else 'E'}"


def limit_users(users: np.ndarray, priority: np.ndarray, limit: int, unknown: int) -> np.ndarray:
    """Returns (N,) bool: which images stay when so many of each poster are kept, those of the lowest priority first.

    Args:
        users: (N,) integers, one for each poster.
        priority: (N,) numbers.
        limit: images of a poster.
        unknown: the number of a poster who is not known; all of those images stay.
    """
    order = np.lexsort((priority, users))
    ordered = users[order]
    keep = np.empty(len(users), bool)
    keep[order] = (np.arange(len(users)) - np.searchsorted(ordered, ordered) < limit) | (ordered == unknown)
    return keep


def no_posters(folder: object) -> str:
    """Returns the error that a dataset does not know who posted its images."""
    return (
        f"{folder}: its indexes do not say who posted the images; make it with --user-column, or index tars whose "
        'JSON has a "user".'
    )


@dataclass
class Origins:
    """The origins of a shard's n images.

    Args:
        users: (n,) uint64, 0 if unknown.
        years: (n,) int16, 0 if unknown.
        places: (n,) int32 into ``place_names``.
        place_names: the different ones, sorted; "" is unknown.
    """

    users: np.ndarray
    years: np.ndarray
    places: np.ndarray
    place_names: list[str]

    @classmethod
    def of(cls, metadata: Sequence[dict | None]) -> Origins | None:
        """Gathers them from the JSONs of n images; None if nothing is known of any."""
        found = [read_origin(*(one.get(name) for name in Origin._fields)) if one else Origin() for one in metadata]
        if not any(map(any, found)):
            return None
        names = sorted({origin.place for origin in found})
        code = {name: i for i, name in enumerate(names)}
        return cls(
            np.array([origin.user for origin in found], np.uint64),
            np.array([origin.year for origin in found], np.int16),
            np.array([code[origin.place] for origin in found], np.int32),
            names,
        )
