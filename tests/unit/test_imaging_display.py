"""What a viewer shows is what a model sees: orientation, transparency, depth, colours, oddities."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from imaging import ImageError, Limits, decode
from imaging.display import BACKGROUND, displayed
from tests.unit.image_files import chunk, encode, png_of, tiff_of

ROOT = Path(__file__).resolve().parents[2]
HEIC = ROOT / "tests/unit/data/turned.heic"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def seen(data):
    return np.asarray(decode(data)).astype(int)


# --- orientation -------------------------------------------------------------------------------

TURNED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: np.rot90(PIXELS, -1)[:, ::-1],
    8: np.rot90(PIXELS),
}
TURNED[7] = PIXELS[::-1, ::-1].transpose(1, 0, 2)


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_stands_upright_whatever_its_file_says_it_with(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {
        "PNG": encode(PHOTO, "PNG", exif=exif),
        "WebP": encode(PHOTO, "WEBP", exif=exif, lossless=True),
        "TIFF": encode(PHOTO, "TIFF", tiffinfo={0x0112: orientation}),
        "LZW": encode(PHOTO, "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw"),
    }
    for name, data in lossless.items():
        np.testing.assert_array_equal(seen(data), TURNED[orientation], err_msg=name)
    for form in ("JPEG", "AVIF"):
        upright = Image.fromarray(
            np.kron(PIXELS[:4, :6] // 128 * 255, np.ones((8, 8, 1), np.uint8))
        )
        turned = seen(encode(upright, form, exif=exif, quality=95))
        plain = seen(encode(upright, form, quality=95))
        expected = {1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1]}
        expected[5], expected[6] = plain.transpose(1, 0, 2), np.rot90(plain, -1)
        expected[7], expected[8] = plain[::-1, ::-1].transpose(1, 0, 2), np.rot90(plain)
        np.testing.assert_array_equal(turned, expected[orientation], err_msg=form)


@pytest.mark.parametrize("order", "<>")
def test_an_orientation_stored_as_a_long_number_counts(order):
    mark = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    block = b"Exif\0\0" + mark + struct.pack(f"{order}HHHIII", 1, 0x0112, 4, 1, 6, 0)
    assert decode(encode(PHOTO, "JPEG", exif=block)).size == (30, 40)


@pytest.mark.parametrize("block", [b"", b"MM\0*" + b"\xff" * 60, b"II*\0\x08\0\0\0\xff\xff"])
def test_a_damaged_exif_block_turns_nothing(block):
    plain = encode(PHOTO, "JPEG")
    body = b"Exif\0\0" + block
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    np.testing.assert_array_equal(seen(data), seen(plain))


def test_heic_is_read_upright_where_its_plug_in_is_and_else_the_way_out_is_named(monkeypatch):
    """Red, blue and green fields, stored lying on their side."""
    found = seen(HEIC.read_bytes())
    assert found.shape == (96, 64, 3)
    corners = [found[y, x].argmax() for y, x in ((5, 5), (5, -5), (-5, 5), (-5, -5))]
    assert corners == [1, 0, 1, 2]
    monkeypatch.delitem(sys.modules["imaging.decode"]._READERS, "HEIC")
    with pytest.raises(ImageError, match="HEIC cannot be read here; pip install pi-heif where im"):
        decode(HEIC.read_bytes())


def test_a_heic_file_with_a_damaged_exif_block_is_shown():
    """The plug-in's own reading of the block would end the process."""
    data = bytearray(HEIC.read_bytes())
    data[data.index(b"Exif") + 1] = 0xDD
    child = "import sys; from imaging import decode; print(decode(sys.stdin.buffer.read()).size)"
    found = subprocess.run(
        [sys.executable, "-c", child], input=bytes(data), cwd=ROOT, capture_output=True
    )
    assert (found.returncode, found.stdout) == (0, b"(64, 96)\n")


# --- transparency and depth --------------------------------------------------------------------


def test_what_is_transparent_shows_the_background():
    clear = PHOTO.convert("RGBA")
    clear.putalpha(0)
    half = PHOTO.convert("RGBA")
    half.putalpha(128)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert (seen(encode(clear, form, **options)) == BACKGROUND).all(), form
        blended = PIXELS * (128 / 255) + 255 * (127 / 255)
        np.testing.assert_allclose(seen(encode(half, form, **options)), blended, atol=1)
    assert (seen(encode(clear, "AVIF")) == BACKGROUND).all()
    grey = Image.fromarray(PIXELS[..., 0]).convert("LA")
    grey.putalpha(0)
    assert (seen(encode(grey, "PNG")) == BACKGROUND).all()
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    for form in ("PNG", "GIF"):
        found = seen(encode(indexed, form, transparency=0))
        assert found.tolist() == [[list(BACKGROUND), [40, 50, 60]]], form


WHITE = 255
TRANSPARENT = {
    "1 bit": (png_of([b"\x0f"], 8, 1, 0, (b"tRNS", b"\0\1")), [0] * 4 + [WHITE] * 4),
    "2 bits": (png_of([b"\x1b"], 4, 2, 0, (b"tRNS", b"\0\1")), [0, WHITE, 170, 255]),
    "4 bits": (png_of([b"\x50"], 2, 4, 0, (b"tRNS", b"\0\5")), [WHITE, 0]),
    "8 bits": (png_of([b"\x50\x30"], 2, 8, 0, (b"tRNS", b"\0\x50")), [WHITE, 48]),
    "16 bits": (png_of([b"\x50\x30\x50\x31"], 2, 16, 0, (b"tRNS", b"\x50\x30")), [WHITE, 80]),
    "RGB": (png_of([b"\1\1\1\2\2\2"], 2, 8, 2, (b"tRNS", b"\0\1\0\1\0\1")), [WHITE, 2]),
    "RGB of 16 bits": (
        png_of([b"\x41\2" * 3 + b"\x31\2" * 3], 2, 16, 2, (b"tRNS", b"\x41\2" * 3)),
        [WHITE, 49],
    ),
    "palette": (
        png_of([b"\0\1\2"], 3, 8, 3, (b"PLTE", bytes([9] * 9)), (b"tRNS", b"\xff\0")),
        [9, WHITE, 9],
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_one_transparent_colour_of_a_png_is_that_of_its_depth(name):
    data, expected = TRANSPARENT[name]
    assert seen(data)[0, :, 0].tolist() == expected


U2, U4, I2, I4, F4 = (np.dtype(name) for name in ("<u2", "<u4", "<i2", "<i4", "<f4"))
NOT_FINITE = [np.nan, np.inf, -5, 1]
GREYS = {
    "16 bits": (tiff_of(np.array([0, 257, 32896, 65535], U2), 16), [0, 1, 128, 255]),
    "16 bits, dark": (tiff_of(np.array([0, 100, 200, 300], U2), 16), [0, 0, 1, 1]),
    "0 is white": (tiff_of(np.array([0, 257, 32896, 65535], U2), 16, 0), [255, 254, 127, 0]),
    "signed": (tiff_of(np.array([-100, 0, 50, 100], I2), 16, 1, 2), [0, 128, 191, 255]),
    "32 bits": (tiff_of(np.array([0, 2**30, 2**31, 2**32 - 1], U4), 32), [0, 64, 128, 255]),
    "32 bits, signed": (tiff_of(np.array([0, 10, 20, 30], I4), 32, 1, 2), [0, 85, 170, 255]),
    "floating point": (tiff_of(np.array([0, 0.25, 0.5, 1], F4), 32, 1, 3), [0, 64, 128, 255]),
    "not finite": (tiff_of(np.array(NOT_FINITE, F4), 32, 1, 3), [0, 255, 0, 255]),
    "beyond 32 bits": (tiff_of(np.array([-3e38, 0, 3e38], F4), 32, 1, 3), [0, 128, 255]),
    "next to none": (tiff_of(np.array([0, 1e-44], F4), 32, 1, 3), [0, 255]),
    "one value": (tiff_of(np.full(4, 0.5, F4), 32, 1, 3), [128] * 4),
    "8 bits": (tiff_of(np.array([0, 10, 128, 255], np.uint8), 8), [0, 10, 128, 255]),
}


@pytest.mark.parametrize("name", GREYS)
def test_greys_of_more_bits_are_scaled_by_their_range(name):
    data, expected = GREYS[name]
    assert seen(data)[0, :, 0].tolist() == expected


# --- colours -----------------------------------------------------------------------------------


def profile(kind="sRGB"):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


def swapped():
    """A profile of a display whose red is sRGB's green, and the other way round."""
    data = bytearray(profile())
    count = int.from_bytes(data[128:132], "big")
    places = {bytes(data[132 + 12 * n :][:4]): 132 + 12 * n for n in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = (
        data[green + 4 : green + 12],
        data[red + 4 : red + 12],
    )
    return bytes(data)


def almost_srgb():
    """As many files have it: sRGB, rounded otherwise."""
    data = bytearray(profile())
    count = int.from_bytes(data[128:132], "big")
    places = {bytes(data[132 + 12 * n :][:4]): 132 + 12 * n for n in range(count)}
    place = int.from_bytes(data[places[b"rXYZ"] + 4 :][:4], "big") + 8  # of X, in 1/65536
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + 100).to_bytes(
        4, "big"
    )
    return bytes(data)


def test_colours_are_those_of_the_images_profile():
    expected = PIXELS[..., [1, 0, 2]]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        found = seen(encode(PHOTO, form, icc_profile=swapped(), **options))
        np.testing.assert_allclose(found, expected, atol=2, err_msg=form)
    for form in ("JPEG", "AVIF"):
        plain = seen(encode(PHOTO, form, quality=95))
        found = seen(encode(PHOTO, form, quality=95, icc_profile=swapped()))
        np.testing.assert_allclose(found, plain[..., [1, 0, 2]], atol=2, err_msg=form)


def test_a_profile_that_is_srgb_damaged_or_of_another_kind_changes_no_pixel():
    xyz, almost = profile("XYZ"), almost_srgb()
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(almost)), ImageCms.createProfile("sRGB"), "RGB", "RGB"
    )
    assert (np.asarray(transform.apply(PHOTO)) != PIXELS).any()
    for given in (profile(), almost, b"no profile at all", swapped()[:300], profile("LAB"), xyz):
        np.testing.assert_array_equal(seen(encode(PHOTO, "PNG", icc_profile=given)), PIXELS)
        cmyk = PHOTO.convert("CMYK")
        plain = seen(encode(cmyk, "TIFF"))
        np.testing.assert_array_equal(seen(encode(cmyk, "TIFF", icc_profile=given)), plain)


def test_what_needs_no_change_is_not_copied_nor_is_its_profile_looked_at_again(monkeypatch):
    image = PHOTO.copy()
    assert displayed(image) is image
    image.info["icc_profile"] = almost_srgb()
    assert displayed(image) is image
    build, built = ImageCms.buildTransform, []
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *given: built.append(1) or build(*given))
    assert displayed(image) is image and not built
    image.info["icc_profile"] = swapped()
    assert (np.asarray(displayed(image)) != PIXELS).any() and built


def test_cmyk_and_lab_become_the_colours_that_they_mean():
    cmyk = PHOTO.convert("CMYK")
    np.testing.assert_array_equal(seen(encode(cmyk, "TIFF")), PIXELS)
    jpeg = encode(cmyk, "JPEG", quality=100, subsampling=0)  # inverted, as Adobe has it
    np.testing.assert_allclose(seen(jpeg), PIXELS, atol=3)
    flat = Image.new("RGB", (8, 8), (200, 60, 40))
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = encode(ImageCms.applyTransform(flat, to_lab), "TIFF")
    np.testing.assert_allclose(seen(lab), np.asarray(flat), atol=3)


# --- what is sound though odd ------------------------------------------------------------------

PNG = encode(PHOTO, "PNG")
JPEG = encode(PHOTO, "JPEG")
MEGABYTES = zlib.compress(bytes(5_000_000))


def with_chunks(*chunks):
    return PNG[:33] + b"".join(chunk(*part) for part in chunks) + PNG[33:]


def with_segment(marker, body):
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
    return JPEG[:2] + segment + JPEG[2:]


def with_bad_sum():
    data = bytearray(with_chunks((b"tEXt", b"Comment\0sound")))
    data[33 + 8 + 8] ^= 1
    return bytes(data)


ODD_PNGS = {
    "compressed text": with_chunks((b"zTXt", b"c\0\0" + MEGABYTES)),
    "international text": with_chunks((b"iTXt", b"c\0\1\0\0\0" + MEGABYTES)),
    "much text": with_chunks(*[(b"zTXt", b"c\0\0" + zlib.compress(bytes(10**6)))] * 80),
    "long text": with_chunks((b"tEXt", b"c\0" + b"a" * 2_000_000)),
    "a large profile": with_chunks((b"iCCP", b"c\0\0" + zlib.compress(profile() + bytes(2**21)))),
    "no profile": with_chunks((b"iCCP", b"c\0\0" + b"nothing")),
    "a hostile profile": with_chunks((b"iCCP", b"c\0\0" + zlib.compress(bytes(40_000_000)))),
    "a wrong sum of a text": with_bad_sum(),
    "no end": PNG[:-12],
    "something behind it": PNG + b"x" * 1000,
    "an animation": encode(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]),
}
ODD_JPEGS = {
    "no end": JPEG[:-2],
    "half an end": JPEG[:-1],
    "something behind it": JPEG + b"x" * 1000,
    "a second picture": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)]),
    "megabytes of segments": JPEG[:2]
    + (b"\xff\xed\xff\xff" + b"8BIM" * 16383 + b"!") * 60
    + JPEG[2:],
    "a damaged preview": with_segment(0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 60),
    "a short profile": with_segment(0xE2, b"ICC_PROFILE\0"),
    "a damaged index": with_segment(0xE2, b"MPF\0MM\0*" + b"\xff" * 20),
    "a short mark of Adobe": with_segment(0xEE, b"Adobe"),
    "a short mark of JFIF": with_segment(0xE0, b"JFIF\0"),
    "filling": JPEG[:2] + b"\xff" * 5 + JPEG[2:],
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_a_png_that_every_viewer_shows_is_served(name):
    np.testing.assert_array_equal(seen(ODD_PNGS[name]), PIXELS)


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_a_jpeg_that_every_viewer_shows_is_served(name):
    np.testing.assert_array_equal(seen(ODD_JPEGS[name]), seen(JPEG))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_more_than_its_end_is_refused(progressive):
    data = encode(PHOTO, "JPEG", quality=90, progressive=progressive)
    whole, refused = seen(data), 0
    for missing in range(3, 120):
        try:
            np.testing.assert_array_equal(seen(data[:-missing]), whole)
        except ImageError as error:
            assert "truncated" in str(error)
            refused += 1
    assert refused > 110  # in the last byte there may be filling only


def test_the_first_page_of_several_is_seen():
    pages = {"save_all": True, "append_images": [PHOTO.rotate(90)]}
    for options in ({}, {"compression": "tiff_lzw"}):
        np.testing.assert_array_equal(seen(encode(PHOTO, "TIFF", **pages, **options)), PIXELS)
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    assert (seen(encode(red, "GIF", save_all=True, append_images=[blue])) == (255, 0, 0)).all()


# --- what is hostile ---------------------------------------------------------------------------


def gif_of_a_large_frame(side):
    data = bytearray(encode(PHOTO.convert("P"), "GIF"))
    place = data.index(b",", 13 + 768)
    data[place + 5 : place + 9] = struct.pack("<HH", side, side)
    return bytes(data)


def bmp_of(side):
    data = bytearray(encode(PHOTO, "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


TILED = {"t322": 30_000, "t323": 30_000, "t324": 8, "t325": 50, "t259": 8}
HOSTILE = {
    "tiles": (tiff_of(np.zeros(1, np.uint8), 8, **TILED), "tiles of 30000 x 30000 pixels"),
    "TIFF": (tiff_of(np.zeros(1, np.uint8), 8, t256=60_000, t257=60_000), "60000 x 60000 pixels"),
    "samples": (tiff_of(np.zeros(1, np.uint8), 8, t277=65_535), "TIFF header is damaged"),
    "GIF": (gif_of_a_large_frame(9_000), "9000 x 9000 pixels, the limit"),
    "large GIF": (gif_of_a_large_frame(60_000), "too many pixels"),
    "BMP": (bmp_of(20_000), "20000 x 20000 pixels"),
    "cut off BMP": (encode(PHOTO, "BMP")[:500], "truncated"),
    "cut off PNG": (PNG[: len(PNG) // 2], "truncated"),
    "cut off AVIF": (encode(PHOTO, "AVIF")[:-200], "damaged"),
    "cut off HEIC": (HEIC.read_bytes()[:-200], "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_cut_off_or_hostile_is_refused_in_one_line(name, capfd):
    data, message = HOSTILE[name]
    with pytest.raises(ImageError, match=message) as error:
        decode(data)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_eight_threads_share_no_filter_of_warnings_and_none_prints(capfd):
    """Pillow would warn of 100 megapixels, and of a damaged EXIF block."""
    large = encode(Image.new("1", (10_000, 10_000)), "PNG")
    exif = with_segment(
        0xE1, b"Exif\0\0II*\0\x08\0\0\0" + b"\1\0\x0e\1\2\0\xff\xff\0\0\xff\xff\0\0"
    )

    def one(number):
        data = exif if number % 8 else large
        try:
            return decode(data, Limits(max_pixels=90_000_000)).size
        except ImageError as error:
            return str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        # Every other thread would get what one of them sets, and keep it where they overlap.
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
            patch.delattr(warnings, "catch_warnings")
            found = set(pool.map(one, range(160)))
        assert warnings.filters == before
    refused = (
        "the image has 10000 x 10000 pixels, the limit is 90,000,000 in all; send a smaller image"
    )
    assert found == {(40, 30), refused}
    assert capfd.readouterr() == ("", "")
