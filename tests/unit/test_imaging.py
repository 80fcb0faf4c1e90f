import dataclasses
import gc
import io
import json
import shutil
import struct
import sys
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imaging
from imaging import (
    ImageError,
    Limits,
    Preprocessing,
    PreprocessingError,
    code_sha256,
    decode,
    jpeg,
    pixels_sha256,
)
from tests.unit.image_files import chunk, encode

decode_module = sys.modules["imaging.decode"]  # the package has a function of that name
HEIC = (Path(__file__).parent / "data/turned.heic").read_bytes()
SPEC = Preprocessing(8, 8, 10, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photo(width=40, height=30, mode="RGB"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def bomb_png(width=60_000, height=60_000):
    """A PNG of some hundred bytes whose header announces 3.6 gigapixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_known_formats_decode(form):
    image = Image.new("RGB", (40, 30), (200, 40, 40))
    decoded = decode(encode(image, form))
    assert decoded.size == (40, 30)
    np.testing.assert_allclose(np.asarray(decoded), np.asarray(image), atol=8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("I;16", (40, 30), 300) if mode == "I;16" else photo(mode=mode)
    assert decode(encode(image, "PNG")).mode == "RGB"


def test_cmyk_jpeg_becomes_rgb():
    assert decode(encode(photo(mode="CMYK"), "JPEG")).mode == "RGB"


JPEG = encode(photo(), "JPEG")
BAD = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"hello, this is no image", "not a JPEG, PNG, WebP, .* or HEIC image"),
    "other format": (encode(photo(), "TGA"), "not a JPEG, PNG, WebP, .* or HEIC image"),
    "known format": (encode(photo(), "JPEG2000"), "JPEG 2000 cannot be read here; accepted are"),
    "video": (b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(50), "QuickTime video cannot be read"),
    "truncated": (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    "header only": (JPEG[:3], "JPEG header is damaged"),
    "damaged": (JPEG[:200] + bytes(len(JPEG) - 200), "damaged"),
    "bomb": (bomb_png(), "too many pixels|60000 x 60000 pixels"),
    "large header": (bomb_png(9000, 9000), "9000 x 9000 pixels, the limit is 50,000,000"),
    "long": (encode(Image.new("L", (1, 100_000)), "PNG"), "1 x 100000 pixels.* 65,535 a side"),
    "longest": (bomb_png(40_000_000, 1), "40000000 x 1 pixels.* 65,535 a side"),
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
    with pytest.raises(ImageError, match="40 x 30 pixels, the limit is 39 a side"):
        decode(JPEG, Limits(max_side=39))
    limits = Limits(max_bytes=len(JPEG), max_pixels=1200, max_side=40)
    assert decode(JPEG, limits).size == (40, 30)


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


def test_stretching_comes_before_the_crop():
    image = Image.new("RGB", (200, 50))
    image.paste((255, 255, 255), (0, 0, 50, 50))  # the left quarter; the crop drops a fifth of it
    spec = Preprocessing(12, 12, None, "bilinear", (0, 0, 0), (1, 1, 1), stretch_to=(20, 20))
    profile = spec(image)[0].mean(axis=0)
    np.testing.assert_allclose(profile, [1] + [0] * 11, atol=0.15)
    assert spec(image)[0].std(axis=0).max() < 0.01


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(97, 41), (41, 97), (33, 33), (9, 300), (300, 9)])
@pytest.mark.parametrize("stretch_to", [None, (23, 29)])
def test_the_crop_is_bit_for_bit_that_of_the_resized_image(resample, size, stretch_to):
    spec = Preprocessing(
        20, 18, None if stretch_to else 24, resample, (0, 0, 0), (1 / 255,) * 3, stretch_to
    )
    image = photo(*size)
    if stretch_to:
        resized = (29, 23)
    else:
        shorter = min(size)
        resized = tuple(24 * side // shorter for side in size)
    whole = np.asarray(image.resize(resized, getattr(Image.Resampling, resample.upper())))
    left, top = (resized[0] - 18) // 2, (resized[1] - 20) // 2
    expected = whole[top : top + 20, left : left + 18].transpose(2, 0, 1)
    np.testing.assert_array_equal(spec(image), expected.astype(np.float32))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 65_535)])
def test_an_image_whose_resized_self_would_fill_the_memory_is_refused(size):
    # 60,000 x 1 px at a shortest edge of 256 is 15,360,000 x 256: 16 GB as Pillow stores it.
    spec = Preprocessing(224, 224, 256, "bicubic", (0, 0, 0), (1, 1, 1))
    image = decode(encode(Image.new("RGB", size), "PNG"))
    with pytest.raises(ImageError, match="too long and narrow: .* limit of 50,000,000") as error:
        spec(image)
    assert "\n" not in str(error.value)
    stretched = Preprocessing(224, 224, None, "bicubic", (0, 0, 0), (1, 1, 1), (256, 256))
    assert stretched(image).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "spec", [SPEC, dataclasses.replace(SPEC, resize_shortest_edge=None, stretch_to=(9, 10))]
)
def test_the_specification_round_trips(spec):
    assert Preprocessing.from_dict(spec.to_dict()) == spec
    assert Preprocessing.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"resample": "magic"},
        {"resample": ["bicubic"]},
        {"resize_shortest_edge": 7},
        {"resize_shortest_edge": 10.5},
        {"resize_shortest_edge": None, "stretch_to": [8, 7]},
        {"resize_shortest_edge": None, "stretch_to": [8]},
        {"resize_shortest_edge": 10, "stretch_to": [10, 10]},
        {"height": 0},
        {"height": "8"},
        {"std": (0.0, 1.0, 1.0)},
        {"std": (1.0, 1.0)},
        {"mean": 0.5},
        {"mean": (0.0, float("nan"), 0.0)},
        {"contrast": 2},
    ],
)
def test_a_specification_that_cannot_be_carried_out_is_refused(change):
    with pytest.raises(PreprocessingError) as error:
        Preprocessing.from_dict({**SPEC.to_dict(), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{}, {"height": 8}, [1, 2], None, "bicubic"])
def test_what_is_no_specification_is_refused(fields):
    with pytest.raises(PreprocessingError, match="invalid preprocessing: "):
        Preprocessing.from_dict(fields)


def test_a_16_bit_greyscale_png_keeps_its_greys():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp[np.newaxis]).save(buffer, "PNG")
    decoded = np.asarray(decode(buffer.getvalue()))
    np.testing.assert_array_equal(decoded[0], np.repeat(np.arange(256)[:, np.newaxis], 3, axis=1))


def test_the_same_pixels_are_the_same_image_whatever_the_file():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    files = [encode(image, "PNG"), encode(image, "PNG", compress_level=0)]
    files += [encode(image, "WEBP", lossless=True), files[0] + b"appended"]
    assert len(set(files)) == 4
    assert {pixels_sha256(decode(data)) for data in files} == {pixels_sha256(image)}
    others = [image.transpose(Image.Transpose.ROTATE_90), image.crop((0, 0, 14, 8))]
    others.append(Image.frombytes("RGB", (9, 14), image.tobytes()))  # the same bytes, other rows
    assert len({pixels_sha256(other) for other in (image, *others)}) == 4


def test_the_code_has_a_hash_that_every_change_of_a_source_file_changes(tmp_path):
    copy = tmp_path / "imaging"
    shutil.copytree(Path(imaging.__file__).parent, copy)
    before = code_sha256()
    assert code_sha256(copy) == before
    (copy / "notes.txt").write_text("no source file")
    (copy / "__pycache__/decode.cpython-310.pyc").parent.mkdir(exist_ok=True)
    (copy / "__pycache__/decode.cpython-310.pyc").write_bytes(b"compiled")
    assert code_sha256(copy) == before
    changed = copy / "decode.py"
    changed.write_text(changed.read_text() + "# a comment\n")
    after = code_sha256(copy)
    changed.rename(copy / "decoding.py")
    assert len({before, after, code_sha256(copy)}) == 3


# Each takes Python, and Pillow, as long as one of many kilobytes.
SMALLEST_PARTS = {
    "JPEG segments": (JPEG, 2, b"\xff\xe1\0\2", 4096, "segments"),
    "JPEG segments without a length": (JPEG, 2, b"\xff\xe1\0\0", 4096, "segments"),
    "JPEG markers": (JPEG, 2, b"\xff\xd0", 4096, "segments"),
    "PNG chunks": (encode(photo(), "PNG"), 33, chunk(b"teXt", b""), 65_536, "chunks"),
    "PNG data": (encode(photo(), "PNG"), 33, chunk(b"IDAT", b""), 65_536, "chunks"),
    "HEIC boxes": (HEIC, len(HEIC), b"\0\0\0\x08free", 4096, "boxes"),
}


@pytest.mark.parametrize("name", SMALLEST_PARTS)
def test_a_file_of_countless_parts_is_refused_before_they_are_read(name):
    data, place, part, most, called = SMALLEST_PARTS[name]
    few = data[:place] + part * (most // 2) + data[place:]
    assert pixels_sha256(decode(few)) == pixels_sha256(decode(data))
    with pytest.raises(ImageError, match=rf"^the image has more than {most:,} {called}; save it"):
        decode(data[:place] + part * most + data[place:])


def test_filling_and_junk_before_a_segment_never_reach_pillows_own_loop():
    for junk in (b"\xff" * 1000, b"abcd" * 1000, b"\xff\0" * 1000):
        shown, _ = jpeg.shown_parts(JPEG[:2] + junk + JPEG[2:])
        assert shown == jpeg.shown_parts(JPEG)[0]
    assert jpeg.shown_parts(JPEG[:20] + bytes(1000))[0] == JPEG[:20]


def test_a_jpeg_cut_off_is_decoded_again_with_one_image_in_memory(monkeypatch):
    opened, together = [], []

    def watched(*arguments):
        gc.collect()
        together.append(sum(image() is not None for image in opened))
        image = original(*arguments)
        opened.append(weakref.ref(image))
        return image

    original = decode_module._opened
    monkeypatch.setattr(decode_module, "_opened", watched)
    assert decode(JPEG[:-2]).size == (40, 30)
    assert together == [0, 0, 0, 0]  # as it is, then with three ends
    opened, together = [], []
    with pytest.raises(ImageError, match="truncated"):
        decode(JPEG[: len(JPEG) // 2])
    assert together == [0, 0, 0]  # the second end shows it


def test_what_pillow_found_of_exif_is_kept_where_nothing_else_did(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "JPEG", exif=exif)
    monkeypatch.setattr(jpeg, "shown_parts", lambda data: (data, b""))
    assert decode(data).size == (30, 40)
