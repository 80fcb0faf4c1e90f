"""What a viewer shows of a loaded image: upright, in sRGB, on white, in 8 bits."""

from __future__ import annotations

import hashlib
import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

BACKGROUND = (255, 255, 255)  # what lies under transparency, as in most viewers and on paper

_ORIENTATION = 0x0112  # EXIF's tag
_SIZES = {3: 2, 4: 4}  # bytes of its value, by the type that it is stored as
_PHOTOMETRIC, _SAMPLE_FORMAT, _UNSIGNED = 262, 339, 1  # of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of a profile's colour space: the modes of the images that it can be about, the first one asked of
# Pillow. Grey ones often carry the profile of the colours they were made from.
_MODES = {"GRAY": ("L",), "RGB": ("RGB", "L"), "CMYK": ("CMYK",), "Lab": ("LAB",)}
_CLASSES = ("scnr", "mntr", "prtr", "spac")  # kinds of profile that say what colours are
# A profile that changes no colour by more than this many of 255 levels is sRGB in all but its
# rounding: there are hundreds of files of it, and none may make another image of the same pixels.
_SRGB_LEVELS = 2
# To find that out takes longer than to decode a small image, so it is remembered, by the mode of
# the image and the profile's hash.
_known_srgb: set[tuple[str, bytes]] = set()
_MOST_KNOWN = 256
_GREYS = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 0..65535 to 0..255


def displayed(image: Image.Image) -> Image.Image:
    """What a viewer shows.

    The orientation in its EXIF block is applied (that of a TIFF by Pillow). Sixteen-bit greys are
    scaled by their type's range, 0 to 65,535, longer integers and floating-point numbers by their
    own.
    Colours are converted to sRGB by the image's ICC profile, perceptually; a profile that is
    damaged, or of another kind of image, is passed over. What is transparent lets white through.

    Args:
        image: loaded, of any mode.

    Returns:
        Mode RGB; the image itself where there is nothing to do.
    """
    alpha = _alpha(image)
    colours = _in_srgb(_in_eight_bits(image), image.info.get("icc_profile"))
    if alpha is not None and alpha.getextrema() != (255, 255):
        canvas = Image.new("RGB", image.size, BACKGROUND)
        canvas.paste(colours, mask=alpha)
        colours = canvas
    turn = _turn(image.info.get("exif") or b"")
    return colours if turn is None else colours.transpose(turn)


def _turn(exif: bytes) -> Image.Transpose | None:
    """What an EXIF block says; None where it says nothing, or is damaged.

    It is a TIFF file: a byte order, the place of a directory, and there a count and the entries.
    Pillow's own parser reads all of it, and warns of what is odd.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if block[:2] == b"II" else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(block[place : place + size], order)

    start = number(4, 4)
    for place in range(start + 2, min(start + 2 + 12 * number(start, 2), len(block)), 12):
        size = _SIZES.get(number(place + 2, 2))
        if number(place, 2) == _ORIENTATION and size is not None:
            return _TURNS.get(number(place + 8, size))
    return None


def _alpha(image: Image.Image) -> Image.Image | None:
    """Opacity, 0..255, mode L; None where nothing says any."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A")
    if image.mode in ("RGBa", "La"):
        return image.getchannel("a")
    transparent = image.info.get("transparency")
    if transparent is None:
        return None
    if image.mode.startswith("I"):  # one grey of 16 bits
        return Image.fromarray((np.asarray(image) != transparent).astype(np.uint8) * 255)
    return image.convert("RGBA").getchannel("A")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The same with greys of 8 bits where they have more."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,):
        values = values.view(np.uint32)
    if image.mode.startswith("I;16") or image.format == "PNG":  # once read as 32 bits
        greys = _GREYS[values]
    else:
        greys = _by_own_range(values)
    # Pillow turns greys of 8 bits over where 0 is white, but no others.
    return Image.fromarray(255 - greys if tags.get(_PHOTOMETRIC) == 0 else greys)


def _by_own_range(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The least becomes 0 and the largest 255; what is not finite is as the nearest that is."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low == high:
        low, high = min(low, 0.0), max(high, 1.0)
    # The difference of two finite numbers of 32 bits may be none.
    scaled = values.astype(np.float64)
    np.nan_to_num(scaled, copy=False, nan=low, posinf=high, neginf=low)
    scaled -= low
    scaled *= 255
    scaled /= high - low
    greys: NDArray[np.uint8] = scaled.round(out=scaled).astype(np.uint8)
    return greys


def _in_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Mode RGB, in sRGB's colours, without the alpha."""
    mode = {"1": "L", "LA": "L", "La": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode)
    mode = mode or ("L" if image.mode == "L" else "RGB")
    try:
        return _converted(image if image.mode == mode else image.convert(mode), icc)
    except Exception:  # lcms refuses a damaged profile, in many ways
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Not a copy where there is nothing to do: every image comes by here."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _converted(image: Image.Image, icc: bytes | None) -> Image.Image:
    kind = (image.mode, hashlib.sha256(icc or b"").digest())
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif icc and kind not in _known_srgb:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    else:
        return _rgb(image)
    about = profile.profile
    modes = _MODES.get(about.xcolor_space.strip(), ())
    if image.mode not in modes or (image.mode != "LAB" and about.device_class not in _CLASSES):
        return _rgb(image)
    image = image if image.mode == modes[0] else image.convert(modes[0])
    # Made for each image: none is shared between threads.
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        ImageCms.Intent.PERCEPTUAL,
    )
    if image.mode in _PROBES and _is_srgb(transform, _PROBES[image.mode]):
        if len(_known_srgb) < _MOST_KNOWN:
            _known_srgb.add(kind)
        return _rgb(image)
    return transform.apply(image)


_STEPS = np.linspace(0, 255, 9).round().astype(np.uint8)
_PROBES = {
    "L": Image.fromarray(np.arange(256, dtype=np.uint8)[np.newaxis]),
    "RGB": Image.fromarray(
        np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(27, 27, 3)
    ),
}


def _is_srgb(transform: Any, probe: Image.Image) -> bool:
    before, after = probe.convert("RGB"), transform.apply(probe)
    change = np.asarray(after).astype(np.int16) - np.asarray(before)
    return bool(np.abs(change).max() <= _SRGB_LEVELS)
