"""Damaged image files of every format and mode: decoded to the right shape, or refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from imaging import ImageError, Limits, Preprocessing, decode

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = Image.Exif()
EXIF[0x0112] = 6
KINDS = {
    "JPEG": ("JPEG", "RGB", {}),
    "grey JPEG": ("JPEG", "L", {}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "PNG": ("PNG", "RGB", {}),
    "transparent PNG": ("PNG", "RGBA", {}),
    "palette PNG": ("PNG", "P", {}),
    "16-bit PNG": ("PNG", "I;16", {}),
    "WebP": ("WEBP", "RGB", {}),
    "lossless WebP": ("WEBP", "RGBA", {"lossless": True}),
    "GIF": ("GIF", "P", {"transparency": 3}),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {"tiffinfo": {274: 6}}),
    "TIFF by LZW": ("TIFF", "CMYK", {"compression": "tiff_lzw", "icc_profile": SRGB}),
    "TIFF by JPEG": ("TIFF", "YCbCr", {"compression": "jpeg"}),
    "16-bit TIFF": ("TIFF", "I;16", {"compression": "tiff_adobe_deflate"}),
    "AVIF": ("AVIF", "RGBA", {"speed": 10, "icc_profile": SRGB}),
    "HEIC": ("HEIC", "RGB", {}),
    "JPEG of a phone": ("JPEG", "RGB", {"exif": EXIF, "icc_profile": SRGB}),
    "PNG with a profile": ("PNG", "L", {"exif": EXIF, "icc_profile": SRGB}),
}
PREPROCESSING = Preprocessing(
    height=16,
    width=16,
    resize_shortest_edge=16,
    resample="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
LIMITS = Limits(max_pixels=100_000)
# pytest has forgotten the filter that importing `imaging` set.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def encoded(kind):
    file_format, mode, options = KINDS[kind]
    if file_format == "HEIC":  # which nothing here writes
        return (Path(__file__).parent / "data/turned.heic").read_bytes()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 17, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@st.composite
def damaged(draw, kind):
    data = bytearray(encoded(kind))
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.sampled_from([32, 200, len(data)]))  # headers matter most
        place = draw(st.integers(0, min(near, len(data)) - 1))
        data[place] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(1, len(data))) :]
    if draw(st.integers(0, 3)) == 0:
        data += draw(st.binary(max_size=64))
    return bytes(data)


def check(data):
    try:
        image = decode(data, LIMITS)
    except ImageError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert image.width * image.height <= LIMITS.max_pixels
    array = PREPROCESSING(image)
    assert array.shape == (3, 16, 16) and array.dtype == np.float32
    assert np.isfinite(array).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_decoded_or_refused(kind):
    check(encoded(kind))

    @settings(max_examples=200, deadline=None, database=None)
    @given(damaged(kind))
    def any_damage(data):
        check(data)

    any_damage()
