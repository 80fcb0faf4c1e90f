import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imaging import ImageError, Limits, Preprocessing, decode

SPEC = Preprocessing(8, 8, 10, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(width=40, height=30, mode="RGB"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def bomb_png(width=60_000, height=60_000):
    """A PNG of some hundred bytes whose header announces 3.6 gigapixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_known_formats_decode(form):
    assert decode(encode(photo(), form)).size == (40, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("I;16", (40, 30), 300) if mode == "I;16" else photo(mode=mode)
    assert decode(encode(image, "PNG")).mode == "RGB"


def test_cmyk_jpeg_becomes_rgb():
    assert decode(encode(photo(mode="CMYK"), "JPEG")).mode == "RGB"


JPEG = encode(photo(), "JPEG")
BAD = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"hello, this is no image", "not a JPEG, PNG or WEBP image"),
    "other format": (encode(photo(), "BMP"), "not a JPEG, PNG or WEBP image"),
    "truncated": (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    "header only": (JPEG[:3], "not a JPEG"),
    "damaged": (JPEG[:200] + bytes(len(JPEG) - 200), "damaged|not a JPEG"),
    "bomb": (bomb_png(), "too many pixels|60000 x 60000 pixels"),
    "large header": (bomb_png(9000, 9000), "9000 x 9000 pixels, the limit is 50,000,000"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_bytes_are_one_clear_line(name):
    data, message = BAD[name]
    if name == "damaged":  # zeros after the header may still decode as grey; only no crash counts
        try:
            decode(data)
        except ImageError as error:
            assert "\n" not in str(error)
        return
    with pytest.raises(ImageError, match=message) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_limits_are_those_given():
    with pytest.raises(ImageError, match="the limit is 100"):
        decode(JPEG, Limits(max_bytes=100))
    with pytest.raises(ImageError, match="40 x 30 pixels, the limit is 1,199"):
        decode(JPEG, Limits(max_pixels=1199))
    assert decode(JPEG, Limits(max_bytes=len(JPEG), max_pixels=1200)).size == (40, 30)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_never_raise_anything_else(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encode(photo(), ["JPEG", "PNG", "WEBP"][seed % 3]))
    for position in rng.integers(0, len(data), 12):
        data[position] = rng.integers(256)
    try:
        decode(bytes(data))
    except ImageError as error:
        assert "\n" not in str(error)


def test_the_tensor_is_normalised_channels_first():
    colour = (255, 0, 128)
    tensor = SPEC(Image.new("RGB", (20, 20), colour))
    assert tensor.shape == (3, 8, 8) and tensor.dtype == np.float32
    expected = (np.array(colour) / 255 - SPEC.mean) / SPEC.std
    np.testing.assert_allclose(tensor[:, 4, 4], expected, rtol=1e-5)


def test_the_shortest_edge_is_scaled_and_the_centre_cropped():
    # A stripe in the exact centre of a wide image must stay in the centre of the crop.
    image = Image.new("RGB", (200, 50))
    image.paste((255, 255, 255), (95, 0, 105, 50))
    spec = Preprocessing(10, 10, 10, "bilinear", (0, 0, 0), (1, 1, 1))
    profile = spec(image)[0].mean(axis=0)
    np.testing.assert_allclose(profile, profile[::-1], atol=0.02)
    assert profile[:3].max() < 0.01 and profile[4:6].min() > 0.8
    tall = spec(image.transpose(Image.Transpose.TRANSPOSE))[0].mean(axis=1)
    np.testing.assert_allclose(tall, profile, atol=0.01)


def test_without_a_shortest_edge_the_whole_image_is_squeezed():
    image = Image.new("RGB", (200, 50))
    image.paste((255, 255, 255), (0, 0, 100, 50))
    spec = Preprocessing(10, 10, None, "bilinear", (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(spec(image)[0].mean(axis=0)[[0, 3, 6, 9]], [1, 1, 0, 0], atol=0.05)


def test_the_specification_round_trips():
    assert Preprocessing.from_dict(SPEC.to_dict()) == SPEC


@pytest.mark.parametrize(
    "change",
    [{"resample": "magic"}, {"resize_shortest_edge": 7}, {"height": 0}, {"std": (0.0, 1.0, 1.0)}],
)
def test_a_specification_that_cannot_be_carried_out_is_refused(change):
    with pytest.raises(ValueError):
        Preprocessing.from_dict({**SPEC.to_dict(), **change})
