"""Decode untrusted image bytes within limits that are checked before any pixel is decoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from .mistaken import mistaken

FORMATS = ("JPEG", "PNG", "WEBP")


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
    """Decode JPEG, PNG or WebP bytes to an RGB image.

    Of an animation the first frame is taken; EXIF rotation is not applied, as in the usual
    training pipelines.

    Args:
        data: the encoded image.
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
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning; our limit below decides instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        unknown = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        raise ImageError(mistaken(data) or unknown) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has too many pixels: {error}") from None
    except Exception as error:  # Pillow's parsers raise many types on hostile headers
        raise ImageError(f"the image header is damaged: {error}") from None
    with image:
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
        try:
            image.load()
            if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:  # as above: struct.error, SyntaxError, OSError, ValueError ...
            raise ImageError(f"the image is damaged or truncated: {error}") from None
