"""Images that a recipe learns from are real ones, few, spread over the folder and remembered."""

from __future__ import annotations

import numpy as np
import pytest

from bundle.prints import decode as known
from bundle.prints import encode
from calibration.images import FolderImages
from calibration.running import decode_ahead
from export.errors import UsageError
from export.request import MOST, LearnedImages
from imaging import Preprocessing, decode, pixels_sha256
from tests.unit.image_files import write_images

PREPROCESSING = Preprocessing(8, 8, None, "bilinear", (0.5,) * 3, (0.25,) * 3)


def test_images_of_a_folder_and_those_in_it_are_remembered_as_calibration_knows_them(tmp_path):
    write_images(tmp_path, "a.png", "cats/b.png", "dogs/c.jpg")
    (tmp_path / "notes.txt").write_text("not an image")  # is passed over
    said = []
    found = LearnedImages.read(tmp_path, PREPROCESSING, said.append)
    assert said == ["skipped 1 file of other kinds (.txt 1): notes.txt"]
    (images,) = decode_ahead(FolderImages(tmp_path), [range(3)], PREPROCESSING)
    assert found.tensors.dtype == np.float32
    np.testing.assert_array_equal(found.tensors, [image.tensor for image in images])
    hashes, looks = [image.sha256 for image in images], np.stack([image.look for image in images])
    assert found.prints == encode(hashes, looks)


def test_a_large_folder_gives_some_from_its_first_to_its_last(tmp_path):
    names = [f"{index:03}.png" for index in range(3 * MOST)]
    write_images(tmp_path, *names)
    found = LearnedImages.read(tmp_path, PREPROCESSING)
    assert len(found.tensors) == MOST
    taken, _ = known(found.prints)
    hashes = [pixels_sha256(decode((tmp_path / name).read_bytes())) for name in names]
    indices = [index for index, digest in enumerate(hashes) if digest[:16] in taken]
    assert len(taken) == len(indices) == MOST
    assert (indices[0], indices[-1]) == (0, len(names) - 1)
    assert max(np.diff(indices)) <= 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such directory"),
        ((), "no image there can be read"),
        (("a.txt", "b.txt"), "no image there can be read"),
    ],
)
def test_a_folder_without_images_is_refused_in_one_line(tmp_path, files, message):
    folder = tmp_path / "images"
    if files is not None:
        folder.mkdir()
    for name in files or ():
        (folder / name).write_text("text")
    with pytest.raises(UsageError, match=f"--fit-images .*images: {message}") as caught:
        LearnedImages.read(folder, PREPROCESSING)
    assert "\n" not in str(caught.value)
