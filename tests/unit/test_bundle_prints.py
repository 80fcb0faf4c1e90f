"""The same picture is found again in another file, and another picture is not taken for it."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from bundle import prints
from bundle.prints import LOOK_BYTES, among, encode, find_copies, joined, look_of, no_looks, united
from calibration.images import SampleImages
from imaging import decode, pixels_sha256

PICTURES = 40


@pytest.fixture(scope="module")
def pictures():
    """Crops of the sample photographs, none smaller than a thumbnail."""
    source = SampleImages(3 * PICTURES, 7)
    crops = (decode(source[index].data) for index in range(len(source)))
    return [crop for crop in crops if 64 <= crop.width <= 300][:PICTURES]


def looks_of(pictures):
    return np.stack([look_of(picture) for picture in pictures])


def hashes_of(pictures):
    return [pixels_sha256(picture) for picture in pictures]


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode(buffer.getvalue())


def scaled(image, factor):
    width, height = (max(1, round(factor * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


OTHER_FORMS = {
    "JPEG 75": lambda image: encoded(image, "JPEG", quality=75),
    "JPEG 50": lambda image: encoded(image, "JPEG", quality=50),
    "WebP": lambda image: encoded(image, "WEBP", quality=80),
    "half": lambda image: scaled(image, 0.5),
    "quarter": lambda image: scaled(image, 0.25),
    "twice": lambda image: scaled(image, 2),
    "mirror": ImageOps.mirror,
    "half, mirror and JPEG": lambda image: encoded(ImageOps.mirror(scaled(image, 0.5)), "JPEG"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_picture_in_another_form_is_found_again(pictures, form):
    others = [OTHER_FORMS[form](picture) for picture in pictures]
    known = encode(hashes_of(pictures), looks_of(pictures))
    assert among(hashes_of(others), looks_of(others), known).sum() >= 0.95 * PICTURES
    both = [*pictures, *others]
    copies = find_copies(hashes_of(both), looks_of(both))
    again = copies.picture[:PICTURES] == copies.picture[PICTURES:]
    assert again.sum() >= 0.95 * PICTURES and copies.same_pixels == 0
    assert set(copies.picture) == set(range(2 * PICTURES - len(copies)))


def test_crops_of_one_photograph_are_pictures_of_their_own():
    source = SampleImages(300, 11)
    crops = [decode(source[index].data) for index in range(len(source))]
    copies = find_copies(hashes_of(crops), looks_of(crops))
    assert len(copies) <= 0.06 * len(crops)
    photographs = {}
    for number, name in zip(copies.picture, source.names, strict=True):
        photographs.setdefault(number, set()).add(name.split("/")[0])
    assert all(len(found) == 1 for found in photographs.values())


def test_plain_pictures_are_told_apart_by_their_colour():
    """pHash is the same for all of them."""
    grey, brown, same = (
        Image.new("RGB", (40, 30), c) for c in ((90, 90, 90), (90, 80, 70), (91, 90, 89))
    )
    images = [grey, brown, same, encoded(brown, "JPEG")]
    copies = find_copies(hashes_of(images), looks_of(images))
    assert copies.picture.tolist() == [0, 1, 0, 1]


def test_one_pattern_in_two_strengths_or_colours_is_two_pictures(pictures):
    picture = max(pictures, key=lambda image: np.asarray(image).std())
    pixels = np.asarray(picture).astype(float)
    others = [Image.fromarray(p.astype(np.uint8)) for p in (pixels / 2, pixels * [1, 0.8, 1])]
    images = [picture, *others]
    assert len(find_copies(hashes_of(images), looks_of(images))) == 0


def test_equal_pixels_are_one_picture_whatever_their_file_and_their_look(pictures):
    picture = pictures[0]
    again = encoded(picture, "PNG"), encoded(picture, "WEBP", lossless=True)
    hashes = hashes_of([picture, *again, pictures[1]])
    copies = find_copies(hashes, no_looks(4))
    assert copies.picture.tolist() == [0, 0, 0, 1]
    assert (copies.same_pixels, copies.look_alike, len(copies)) == (2, 0, 2)
    assert "4 images are 2 pictures: 2 have the pixels of another image" in copies.sentence


def test_images_without_a_look_are_like_no_other():
    copies = find_copies(["ab" * 32, "cd" * 32], no_looks(2))
    assert len(copies) == 0 and copies.sentence == ""


def test_whatever_is_like_a_copy_is_a_copy(monkeypatch):
    """Greys 3 levels apart, in any order and however few are compared at once."""
    levels = np.random.default_rng(0).permutation(np.r_[0:90:3, 150:240:3])
    images = [Image.new("RGB", (8, 8), (int(level),) * 3) for level in levels]
    hashes, looks = hashes_of(images), looks_of(images)
    for block in (1, 7, 1000):
        monkeypatch.setattr(prints, "_BLOCK", block)
        copies = find_copies(hashes, looks)
        assert sorted(Counter(copies.picture).values()) == [30, 30]
        assert len(set(copies.picture[levels < 100])) == 1


def test_blocks_find_what_comparing_each_with_each_finds():
    """Of looks drawn at random, many of them alike."""
    rng = np.random.default_rng(3)
    looks = np.repeat(rng.integers(0, 256, (40, LOOK_BYTES), dtype=np.uint8), 5, axis=0)
    looks[:, 16:28] = looks[:, 16:28] // 4 + rng.integers(0, 5, (200, 12), dtype=np.uint8)
    flips = rng.integers(0, 8, 200)
    for row, count in enumerate(flips):  # up to 7 bits, 6 are allowed
        for bit in rng.permutation(64)[:count]:
            looks[row, bit // 8] ^= np.uint8(1 << (bit % 8))
    looks[:, -1] = 2
    bits = np.unpackbits(looks[:, :8], axis=1)
    far = (bits[:, None] != bits[None]).sum(axis=2)
    colours = looks[:, 16:28].astype(int)
    close = np.abs(colours[:, None] - colours[None]).max(axis=2) <= prints.COLOUR_LIMIT
    alike = (far <= prints.BITS_LIMIT) & close
    order = rng.permutation(200)
    hashes = [f"{i:064x}" for i in range(200)]
    found = find_copies([hashes[i] for i in order], looks[order]).picture
    reach = np.linalg.matrix_power(alike.astype(float), 8) > 0
    expected = reach[order][:, order]
    np.testing.assert_array_equal(found[:, None] == found[None], expected)
    assert 40 < len(set(found)) < 200


def test_what_one_side_finds_the_other_finds(monkeypatch):
    """Pairs at the limit: one's mirrored hash is 6 bits from the other's, the reverse 8."""
    rng = np.random.default_rng(5)
    one = rng.integers(0, 256, LOOK_BYTES, dtype=np.uint8)
    one[16:28], one[-1] = 100, 2
    other = rng.integers(0, 256, LOOK_BYTES, dtype=np.uint8)
    other[16:] = one[16:]
    other[8:16] = one[:8]  # the mirror image of `other` is `one` but for 6 bits
    other[8] ^= 0b00111111
    other[:8] = one[8:16]  # of that of `one`, `other` is 8 bits away
    other[0] ^= 0b11111111
    hashes, looks = ["11" * 32, "22" * 32], np.array([one, other])
    for order in ([0, 1], [1, 0]):
        assert len(find_copies([hashes[i] for i in order], looks[order])) == 1
        first, second = order
        known = encode([hashes[second]], looks[[second]])
        assert among([hashes[first]], looks[[first]], known).all()


def test_other_code_or_another_imagehash_makes_other_looks(tmp_path, monkeypatch):
    here = prints.looks_sha256()
    assert here == prints.looks_sha256() and len(here) == 64
    monkeypatch.setattr(prints, "version", lambda name: "0.0")
    assert prints.looks_sha256() != here
    monkeypatch.undo()
    (tmp_path / "prints.py").write_text("# other code")
    monkeypatch.setattr(prints, "__file__", str(tmp_path / "prints.py"))
    assert prints.looks_sha256() != here


def test_prints_join(pictures):
    hashes, looks = hashes_of(pictures), looks_of(pictures)
    one, other = encode(hashes[:10], looks[:10]), encode(hashes[30:], no_looks(10))
    both = joined(one, other)
    known = among(hashes, no_looks(PICTURES), both)
    np.testing.assert_array_equal(np.flatnonzero(known), [*range(10), *range(30, 40)])
    assert not among(hashes, looks, "").any()


def test_groups_are_united_over_either_of_their_names():
    groups = united(("a", "a", "b", "c", "d"), np.array([0, 1, 2, 1, 3]))
    assert groups.tolist()[:2] == [groups[3], groups[3]]
    assert len({groups[0], groups[2], groups[4]}) == 3
