import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from calibration.images import (
    FolderImages,
    ImagesError,
    SampleImages,
    open_images,
    photographs,
    write_sample,
)
from imaging import ImageError
from tests.unit.image_files import forbid_listing, write_images


def labels(source):
    return {source[i].name: source[i].label for i in range(len(source))}


def test_a_folder_is_listed_recursively_in_sorted_order(tmp_path):
    names = ["b/c/deep.webp", "a/2.PNG", "a/1.png", "b/1.jpeg", "top.JPG", "a/3.JPEG"]
    write_images(tmp_path, *names, "a/notes.txt", ".hidden/1.png", "a/._1.png")
    source = open_images(str(tmp_path))
    assert source.names == tuple(sorted(names)) and len(source) == len(names)
    assert source[0].data == (tmp_path / "a/1.png").read_bytes()
    assert [source[i].group for i in range(len(source))] == list(source.names)


def test_sub_folders_are_labels_of_the_files_directly_in_them(tmp_path):
    write_images(tmp_path, "cat/1.png", "dog/2.png", "dog/deeper/3.png", "4.png")
    assert labels(open_images(str(tmp_path))) == {
        "4.png": None,
        "cat/1.png": "cat",
        "dog/2.png": "dog",
        "dog/deeper/3.png": None,
    }


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The layout of the published archive."""
    root = tmp_path / "tiny-imagenet-200"
    write_images(root, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG")
    write_images(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    write_images(root, "test/images/test_0.JPEG")
    (root / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t10\t63\t58\n")
    (root / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n"
    )
    return root


def test_of_tiny_imagenet_the_labelled_validation_images_are_taken(tiny_imagenet):
    source = open_images(str(tiny_imagenet))
    assert labels(source) == {
        "val/images/val_0.JPEG": "n02",
        "val/images/val_1.JPEG": "n01",
        "val/images/val_2.JPEG": None,
    }
    assert source.title == "validation images of tiny-imagenet-200"


def test_a_part_of_tiny_imagenet_can_be_given_itself(tiny_imagenet):
    assert labels(open_images(str(tiny_imagenet / "val"))) == {
        "images/val_0.JPEG": "n02",
        "images/val_1.JPEG": "n01",
        "images/val_2.JPEG": None,
    }
    assert labels(open_images(str(tiny_imagenet / "train"))) == {
        "n01/images/n01_0.JPEG": "n01",
        "n02/images/n02_0.JPEG": "n02",
    }
    assert labels(open_images(str(tiny_imagenet / "test"))) == {"images/test_0.JPEG": None}


def test_annotations_may_begin_with_a_byte_order_mark(tiny_imagenet):
    file = tiny_imagenet / "val/val_annotations.txt"
    before = labels(open_images(str(tiny_imagenet)))
    file.write_text(file.read_text(), "utf-8-sig")
    assert labels(open_images(str(tiny_imagenet))) == before


def test_validation_images_sorted_into_classes_keep_their_annotations(tiny_imagenet):
    val = tiny_imagenet / "val"
    (val / "images").rename(val / "n02")
    assert labels(open_images(str(val))) == {
        "n02/val_0.JPEG": "n02",
        "n02/val_1.JPEG": "n01",
        "n02/val_2.JPEG": "n02",
    }


def test_malformed_annotations_are_an_error(tiny_imagenet):
    (tiny_imagenet / "val/val_annotations.txt").write_text("val_0.JPEG n02\n")
    with pytest.raises(
        ImagesError, match=r"val_annotations.txt is not readable .*FILE, tab, LABEL"
    ):
        open_images(str(tiny_imagenet))


@pytest.mark.parametrize(
    ("spec", "limit", "message"),
    [
        ("nowhere", None, "no such folder: nowhere"),
        ("nowhere.jpg", None, "no such folder"),
        ("sample:", None, "is not sample:SEED"),
        ("sample:one", None, "is not sample:SEED"),
        ("sample:1:2:3", None, "is not sample:SEED"),
        ("sample:-1", None, "seed from 0"),
        (f"sample:{2**32}", None, "seed from 0"),
        ("sample:1:0", None, "at least 1 crop"),
        ("sample:1", 0, "--limit 0"),
        (".", 0, "--limit 0"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, monkeypatch, spec, limit, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImagesError, match=message) as caught:
        open_images(spec, limit)
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(
        ImagesError, match="no .jpg, .jpeg, .* file below .*; skipped 1 file of other"
    ):
        open_images(str(tmp_path))


def test_a_sub_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    write_images(tmp_path, "a/1.png", "b/2.png")
    forbid_listing(tmp_path / "b", monkeypatch)
    with pytest.raises(ImagesError, match=r"cannot list .*/b: Permission denied"):
        open_images(str(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    write_images(tmp_path / "elsewhere", "1.png")
    write_images(tmp_path / "images", "a/2.png")
    (tmp_path / "images/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/circle").symlink_to(tmp_path / "images")
    assert labels(open_images(str(tmp_path / "images"))) == {"a/2.png": "a", "b/1.png": "b"}


def test_a_relative_path_opens_the_same_images_from_anywhere(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", "1.png")
    monkeypatch.chdir(tmp_path)
    source = open_images("./photos/")
    assert source.spec == str(tmp_path / "photos") and source.title == "folder photos"
    monkeypatch.chdir("/")
    assert open_images(source.spec).names == source.names


def test_a_file_that_disappears_is_an_image_error(tmp_path):
    source = open_images(str(write_images(tmp_path, "1.png", "2.png")))
    (tmp_path / "1.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        source[0]
    assert source[1].name == "2.png"
    with pytest.raises(IndexError):
        source[2]


def test_names_that_are_not_unicode_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    source = open_images(str(write_images(tmp_path, name)))
    assert source[0].data and source.names == (name,) and len(source.fingerprint()) == 64


def test_a_fingerprint_changes_with_the_files_and_their_labels(tiny_imagenet):
    seen = {open_images(str(tiny_imagenet)).fingerprint()}
    assert open_images(str(tiny_imagenet)).fingerprint() in seen
    annotations = tiny_imagenet / "val/val_annotations.txt"
    changes = (
        lambda: (tiny_imagenet / "val/images/val_0.JPEG").write_bytes(b"other content"),
        lambda: (tiny_imagenet / "val/images/val_1.JPEG").unlink(),
        lambda: annotations.write_text(annotations.read_text().replace("n02", "n03")),
        lambda: write_images(tiny_imagenet, "val/images/val_9.JPEG"),
    )
    for count, change in enumerate(changes, start=2):
        change()
        seen.add(open_images(str(tiny_imagenet)).fingerprint())
        assert len(seen) == count


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return write_images(folder, *(f"class {c}/{i:02d}.png" for c in range(10) for i in range(30)))


@given(limit=st.integers(1, 320))
def test_a_limit_is_spread_evenly_sorted_and_deterministic(many, limit):
    names, every = FolderImages(many, limit).names, FolderImages(many).names
    assert names == FolderImages(many, limit).names
    assert len(names) == len(set(names)) == min(limit, 300)
    rows = [every.index(name) for name in names]
    assert rows == sorted(rows)
    # The n-th file is from the n-th of `limit` equal runs.
    for position, row in enumerate(rows):
        assert abs(row - (position + 0.5) * 300 / len(rows)) <= 300 / len(rows) / 2 + 1


def test_a_limit_hides_no_period_in_the_names(many):
    names = FolderImages(many, 150).names
    even = sum(int(name[-6:-4]) % 2 == 0 for name in names)
    assert 50 < even < 100  # every second file would give 0 or 150


def test_a_limited_folder_keeps_the_labels_of_its_files(many):
    found = labels(FolderImages(many, 20))
    assert len(found) == 20
    assert all(name.startswith(f"{label}/") for name, label in found.items())


def test_crops_are_the_same_in_any_order_and_number():
    first = list(SampleImages(30, seed=5))
    source = open_images("sample:5", 40)
    assert [source[i] for i in reversed(range(30))] == first[::-1]
    assert source.names[:30] == tuple(crop.name for crop in first)
    assert source[-1].name == source.names[-1]
    with pytest.raises(IndexError):
        source[40]


def test_crops_of_different_seeds_share_nothing():
    assert {c.data for c in SampleImages(30, seed=5)}.isdisjoint(
        c.data for c in SampleImages(30, seed=6)
    )
    first, second = open_images("sample:5", 9), open_images("sample:6", 9)
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == open_images("sample:5", 9).fingerprint()


def test_crops_are_of_the_documented_size_and_their_photographs_label():
    shortest = {file.stem: min(Image.open(file).size) for file in photographs()}
    for crop in SampleImages(30, seed=5):
        image = Image.open(io.BytesIO(crop.data))
        side = image.size[0]
        assert image.size == (side, side) and image.format == "JPEG"
        assert 0.15 * shortest[crop.label] - 1 <= side <= shortest[crop.label]
        assert crop.group == crop.name and crop.name.startswith(f"{crop.label}/")


def test_a_sample_calls_itself_what_opens_it_again():
    source = open_images("sample:5", 700)
    assert len(source) == 700 and open_images(source.spec).names == source.names
    assert len(open_images(source.spec, 3)) == 3 and len(open_images("sample:5")) == 600


def test_sample_writes_one_folder_per_photograph_and_overwrites_nothing(tmp_path):
    write_sample(tmp_path / "out", 12, seed=0)
    source = open_images(str(tmp_path / "out"))
    written = {source[i].name: (source[i].label, source[i].data) for i in range(len(source))}
    assert written == {crop.name: (crop.label, crop.data) for crop in SampleImages(12, seed=0)}
    with pytest.raises(ImagesError, match="not empty"):
        write_sample(tmp_path / "out", 12, seed=0)
