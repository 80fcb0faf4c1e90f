"""Decode untrusted image bytes within limits that are checked before any pixel is decoded."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from . import heic, jpeg, png
from .display import displayed
from .mistaken import mistaken

Reader = Callable[[io.BytesIO], Image.Image]

# Pillow's warnings about pixels or damaged EXIF blocks answer nobody, and Python keeps each text
# that it has printed. Once, here: a filter for the time of a call is every thread's.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Each plug-in by itself instead of Image.open, which has a limit of its own, for all of a process.
# A JPEG that holds several (MPO) is read as the first.
_READERS: dict[str, Reader] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
with suppress(ImportError):  # Pillow 11.3 and later has it, where it was built with it
    from PIL import AvifImagePlugin

    if AvifImagePlugin.SUPPORTED:
        _READERS["AVIF"] = AvifImagePlugin.AvifImageFile
with suppress(ImportError):  # an option where images are decoded
    from pi_heif.as_plugin import HeifImageFile

    _READERS["HEIC"] = HeifImageFile

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")

_BEGINNINGS = {
    jpeg.SIGNATURE: "JPEG",
    png.SIGNATURE: "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_WITHOUT_READER = {
    "AVIF": "install Pillow 11.3 or later where images are decoded, or convert it",
    "HEIC": "pip install pi-heif where images are decoded, or convert it to JPEG",
}
_BAND_PX = 64
_TILE_TAGS = (322, 323)  # of TIFF: width and height


class ImageError(ValueError):
    """The bytes are not an acceptable image. The message is one line, fit for a client."""


@dataclass(frozen=True)
class Limits:
    """What a single image may cost.

    Attributes:
        max_bytes: largest accepted encoded size.
        max_pixels: largest accepted width x height, read from the header before decoding. The
            default holds any phone photograph and about 150 MB of RGB.
        max_side: largest accepted width or height. The default is the most a JPEG can have; a PNG
            one pixel wide may have millions, and resizing it takes a gigabyte of filter weights.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_side: int = 65_535


def decode(data: bytes, limits: Limits | None = None) -> Image.Image:
    """Decode the bytes of an image file to RGB, as a viewer shows it; see `displayed`.

    Of an animation, or of several pages, the first is taken.

    Args:
        data: a file in one of `FORMATS`. AVIF takes Pillow 11.3, HEIC the package `pi-heif`.
        limits: of bytes, pixels and sides; `Limits()` if not given.

    Returns:
        A loaded RGB image.

    Raises:
        ImageError: empty, too many bytes, unknown format, too large, or damaged.
    """
    limits = limits or Limits()
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}; "
            "send a smaller file"
        )
    kind = _kind(data)
    if kind not in _READERS:
        way_out = _WITHOUT_READER.get(kind or "", f"accepted are {_listed(FORMATS, 'and')}")
        said = f"a file in format {kind} cannot be read here; {way_out}"
        unknown = f"not a {_listed(FORMATS, 'or')} image"
        raise ImageError(said if kind else mistaken(data) or unknown)
    about: dict[str, bytes] = {}  # what Pillow is not shown, as it would have told it
    try:
        if kind == "PNG":
            data, about["icc_profile"] = png.shown_parts(data)
        elif kind == "JPEG":
            data, about["exif"] = jpeg.shown_parts(data)
        elif kind == "HEIC":
            data = heic.shown_parts(data)
    except ValueError as error:
        raise ImageError(str(error)) from None
    try:
        with _loaded(kind, data, limits) as image:
            _check_size(image, limits)  # HEIC may have told another before
            image.info.update({name: part for name, part in about.items() if part})
            return displayed(image)
    except ImageError:
        raise
    except Exception as error:  # struct.error, SyntaxError, OSError, ValueError ...
        raise ImageError(f"the image is damaged or truncated: {_one_line(error)}") from None


def _kind(data: bytes) -> str | None:
    """The format by its first bytes; None where they are of none that is known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[place : place + 4] for place in range(8, size, 4) if place != 12}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIC" if brands & _HEIC_BRANDS else "MP4 or QuickTime video"
    return next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), None)


def _opened(kind: str, data: bytes, limits: Limits) -> Image.Image:
    """The image as its header tells it, within the limits; not one pixel is decoded."""
    try:
        image = _READERS[kind](io.BytesIO(data))
    except Image.DecompressionBombError as error:  # of a frame, or before memory is asked for
        raise ImageError(f"the image has too many pixels: {error}") from None
    except Exception as error:  # Pillow's parsers raise many types on hostile headers
        raise ImageError(f"the {kind} header is damaged: {_one_line(error)}") from None
    _check_size(image, limits)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # One tile is decoded whole, however small the image is.
        tile = [image.tag_v2.get(tag, 1) for tag in _TILE_TAGS]
        if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > limits.max_pixels:
            raise ImageError(
                f"the image has tiles of {tile[0]} x {tile[1]} pixels, the limit is "
                f"{limits.max_pixels:,} in all; save it with smaller ones"
            )
    return image


def _loaded(kind: str, data: bytes, limits: Limits) -> Image.Image:
    """The image with its pixels."""
    image = _opened(kind, data, limits)
    try:
        image.load()
        return image
    except OSError as error:
        if kind != "JPEG":
            raise
        said = str(error)  # not the error, whose frames hold the pixels
    del image
    whole = _without_end(data, limits)
    if whole is None:
        raise OSError(said)
    return whole


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image has {width} x {height} pixels, the limit is {limits.max_pixels:,} "
            "in all; send a smaller image"
        )
    if max(width, height) > limits.max_side:
        raise ImageError(
            f"the image has {width} x {height} pixels, the limit is {limits.max_side:,} "
            "a side; send a smaller image"
        )


def _without_end(data: bytes, limits: Limits) -> Image.Image | None:
    """A JPEG that lacks nothing but the two bytes of its end, as some cameras write it.

    Whatever is put in the place of what is missing, the pixels are the same; where the file is cut
    off earlier, they are not.
    """
    image, first = None, ""
    for filling in (b"", b"\x5a" * 64, b"\xa5" * 64):
        image = None  # one at a time: each may fill a good part of the memory
        image = _opened("JPEG", data.rstrip(b"\xff") + filling + jpeg.END, limits)
        try:
            image.load()
        except Exception:
            return None
        seen = _fingerprint(image)
        first = first or seen
        if seen != first:
            return None
    return image


def _fingerprint(image: Image.Image) -> str:
    """Of its pixels, which are never copied all at once."""
    digest = hashlib.sha256()
    for top in range(0, image.height, _BAND_PX):
        bottom = min(top + _BAND_PX, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.hexdigest()


def _listed(names: tuple[str, ...], last: str) -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
