"""Prints of images: what tells whether two are the same picture, in 37 bytes.

A print holds the first 8 bytes of the SHA-256 of the image's pixels, which finds the same picture
in another file, and its look, which finds it re-encoded, resized or mirrored. A look is a
perceptual hash of the image and of its mirror image (ImageHash's pHash: the signs of 8 x 8 low
frequencies of its brightness), and the mean colours of its four quarters. The hash does not see
how bright, coloured or strong a pattern is, so that all pictures of one edge have the same; the
colours do.

The limits are measured, on crops of the sample photographs. Of 250 crops as JPEG of quality 50 to
95, as WebP, at half, a quarter or twice their size, mirrored, or both, 0 to 2.4 % are not found
again in each way (11 % of a quarter's size, mirrored and JPEG 50 at once). Of the 4.5 million pairs
among 3,000 crops of 21 photographs 601 look alike, all of one photograph, and all but 14 share more
than 85 % of their area.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Looks = NDArray[np.uint8]

HASH_SIDE = 8
HASH_BITS = HASH_SIDE**2
HASH_PX = 4 * HASH_SIDE  # what pHash looks at
BITS_LIMIT = 6  # of 64
COLOUR_LIMIT = 4  # of 255, in each quarter and channel
FAINT = 3.0  # standard deviation of brightness below which the hash is mostly noise

PREFIX_BYTES = 8
_STRAIGHT = slice(0, HASH_BITS // 8)
_MIRRORED = slice(HASH_BITS // 8, 2 * HASH_BITS // 8)
_COLOURS = slice(2 * HASH_BITS // 8, 2 * HASH_BITS // 8 + 12)
LOOK_BYTES = _COLOURS.stop + 1  # the last: whether there is a look, and a hash to be trusted
_NONE, _IS_FAINT, _IS_CLEAR = 0, 1, 2
_BLOCK = 64  # images compared at once with all others: 50,000 of them take 13 MB a hash


def looks_sha256() -> str:
    """Hex SHA-256 over what makes a look: this file, and ImageHash's release.

    Whoever keeps looks keeps this beside them: others of the same picture are not like them.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"\0ImageHash {version('ImageHash')}".encode())
    return digest.hexdigest()


def look_of(image: Image.Image) -> Looks:
    """What an image looks like, UINT8 (29,).

    Args:
        image: as `imaging.decode` gives it, mode RGB.
    """
    quarters = np.asarray(image.resize((2, 2), Image.Resampling.BOX))  # (2, 2, 3)
    small = image.convert("L").resize((HASH_PX, HASH_PX), Image.Resampling.LANCZOS)
    hashes = [
        imagehash.phash(view, hash_size=HASH_SIDE).hash for view in (small, ImageOps.mirror(small))
    ]
    state = _IS_FAINT if np.asarray(small).std() < FAINT else _IS_CLEAR
    return np.concatenate(
        [*(np.packbits(found) for found in hashes), quarters.ravel(), np.uint8([state])]
    )


def no_looks(count: int) -> Looks:
    """Looks of images that are like no other, UINT8 (count, 29)."""
    return np.zeros((count, LOOK_BYTES), np.uint8)


def encode(hashes: Sequence[str], looks: Looks) -> str:
    """Prints of N images as base64.

    Args:
        hashes: `imaging.pixels_sha256` of each.
        looks: `look_of` each, (N, 29).
    """
    prefixes = [np.frombuffer(bytes.fromhex(text), np.uint8)[:PREFIX_BYTES] for text in hashes]
    rows = np.concatenate([np.array(prefixes).reshape(len(looks), PREFIX_BYTES), looks], axis=1)
    return base64.b64encode(rows.tobytes()).decode()


def decode(prints: str) -> tuple[set[str], Looks]:
    """What `encode` wrote: the first 16 hex digits of each hash, and the looks (N, 29).

    Raises:
        ValueError: it is something else.
    """
    data = np.frombuffer(base64.b64decode(prints, validate=True), np.uint8)
    rows = data.reshape(-1, PREFIX_BYTES + LOOK_BYTES)
    return {row.tobytes().hex() for row in rows[:, :PREFIX_BYTES]}, rows[:, PREFIX_BYTES:]


def joined(first: str, second: str) -> str:
    """The prints of both."""
    return base64.b64encode(base64.b64decode(first) + base64.b64decode(second)).decode()


def without(prints: str, others: str) -> str:
    """The prints that are not, byte by byte, among the others."""
    size = PREFIX_BYTES + LOOK_BYTES

    def rows(text: str) -> list[bytes]:
        data = base64.b64decode(text)
        return [data[i : i + size] for i in range(0, len(data), size)]

    known = set(rows(others))
    return base64.b64encode(b"".join(row for row in rows(prints) if row not in known)).decode()


def among(hashes: Sequence[str], looks: Looks, prints: str) -> NDArray[np.bool_]:
    """Which of N images have the pixels or the look of one in `prints`, BOOL (N,)."""
    known, known_looks = decode(prints)
    found = np.array([text[: 2 * PREFIX_BYTES] in known for text in hashes], dtype=bool)
    for rows, _ in _alike(looks, known_looks):
        found[rows] = True
    return found


@dataclass(frozen=True, eq=False)
class Copies:
    """Which of N images are the same picture.

    Attributes:
        picture: of each image the number of its picture, from 0, INT (N,).
        same_pixels: images that have the pixels of another one before them.
        look_alike: further images that are a re-encoding, a resize or a mirror image of another.
    """

    picture: NDArray[np.intp]
    same_pixels: int
    look_alike: int

    def __len__(self) -> int:
        """How many images are no picture of their own."""
        return self.same_pixels + self.look_alike

    @property
    def sentence(self) -> str:
        """How many there are, for people; empty where there are none."""
        if not len(self):
            return ""
        pictures = len(self.picture) - len(self)
        return (
            f"{len(self.picture):,} images are {pictures:,} pictures: {self.same_pixels:,} have "
            f"the pixels of another image, {self.look_alike:,} are another image re-encoded, "
            "resized or mirrored; each picture counts once"
        )


def find_copies(hashes: Sequence[str], looks: Looks) -> Copies:
    """Which of N images are the same picture; whoever is like a copy is one, too.

    Args:
        hashes: `imaging.pixels_sha256` of each.
        looks: `look_of` each, (N, 29).
    """
    first: dict[str, int] = {}
    of_pixels = np.array([first.setdefault(text, row) for row, text in enumerate(hashes)], np.intp)
    rows, where = np.unique(of_pixels, return_inverse=True)
    picture = np.arange(len(rows))
    for one, other in _alike(looks[rows], looks[rows], picture):
        if len(one):
            picture[:] = _components(len(rows), picture[one], picture[other])[picture]
    count = int(picture.max(initial=-1)) + 1
    return Copies(picture[where], len(hashes) - len(rows), len(rows) - count)


def united(first: Sequence[str], second: NDArray[np.intp]) -> NDArray[np.intp]:
    """Groups of images that share a value of either, as numbers from 0.

    Args:
        first: of each of N images a name.
        second: of each a number.
    """
    names = np.unique(np.array(first, dtype=np.str_), return_inverse=True)[1]
    other = second + len(first)
    size = len(first) + int(second.max(initial=-1)) + 1
    return _components(size, names, other)[names]


def _components(size: int, one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.intp]:
    """Of each of `size` nodes the number of its component, in the order of their first nodes."""
    edges = coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(size, size))
    labels = connected_components(edges, directed=False)[1]
    return np.asarray(labels, np.intp)


def _alike(
    one: Looks, other: Looks, picture: NDArray[np.intp] | None = None
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows of `one` and rows of `other` that look alike.

    Quarters whose colours are within the limit have a mean within it: only images of about the
    same brightness are compared, and 50,000 photographs take a second.

    Args:
        one: looks.
        other: looks.
        picture: where both are the same, each one's picture as known so far; each pair comes once,
            and none that has one picture already.
    """
    first, second = _Side(one), _Side(other)
    least = HASH_BITS - 2 * BITS_LIMIT  # of the product of two hashes of +1 and -1
    for start in range(0, len(first.rows), _BLOCK):
        block = first.part(start, start + _BLOCK)
        nearest = (block.brightness[0] - COLOUR_LIMIT, block.brightness[-1] + COLOUR_LIMIT)
        begin = int(np.searchsorted(second.brightness, nearest[0], "left"))
        end = int(np.searchsorted(second.brightness, nearest[1], "right"))
        window = second.part(begin if picture is None else start, end)
        both_faint = block.faint[:, None] & window.faint
        views = (
            (block.straight, window.straight, window.colours),
            (block.straight, window.mirrored, window.turned),
            # The hash of a mirror image is not quite the mirrored hash of the image.
            (block.mirrored, window.straight, window.turned),
        )
        for own, bits, colours in views:
            alike = (own @ bits.T >= least) | both_faint  # (64, window)
            if picture is not None:
                alike &= picture[block.rows][:, None] != picture[window.rows]
            i, j = np.nonzero(alike)
            close = np.abs(block.colours[i] - colours[j]).max(axis=1, initial=0) <= COLOUR_LIMIT
            yield block.rows[i[close]], window.rows[j[close]]


class _Side:
    """Looks in the order of their brightness, as they are compared; images without are left out."""

    def __init__(self, looks: Looks) -> None:
        rows = np.flatnonzero(looks[:, -1] != _NONE)
        mean = looks[rows, _COLOURS].mean(axis=1)
        order = np.argsort(mean, kind="stable")
        self.rows, self.brightness = rows[order], mean[order]
        looks = looks[self.rows]
        self.faint = looks[:, -1] == _IS_FAINT
        self.straight, self.mirrored = (
            2 * np.unpackbits(looks[:, part], axis=1).astype(np.float32) - 1
            for part in (_STRAIGHT, _MIRRORED)
        )  # (N, 64)
        quarters = looks[:, _COLOURS].astype(np.int16).reshape(-1, 2, 2, 3)
        self.colours = quarters.reshape(-1, 12)
        self.turned = quarters[:, :, ::-1].reshape(-1, 12)

    def part(self, start: int, stop: int) -> _Side:
        """Some of them, in this order."""
        found = object.__new__(_Side)
        for name, values in vars(self).items():
            setattr(found, name, values[start:stop])
        return found
