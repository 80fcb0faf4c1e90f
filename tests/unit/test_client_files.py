"""One way to find the images of a folder, and to show a name, for every command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.images import open_images
from client.__main__ import find_images
from client.files import SUFFIXES, FilesError, find_files, read_labels, shown
from tests.unit.image_files import forbid_listing, write_images

ROOT = Path(__file__).resolve().parents[2]


def test_every_image_is_found_whatever_its_case_and_place_and_the_rest_is_listed(tmp_path):
    names = [f"{n}{suffix}" for n, suffix in enumerate(SUFFIXES)]
    names += ["A.JPG", "b/c/d.HeIc", "Zeta/e.png"]
    other = ["film.MOV", "b/notes.txt", "b/more.txt", "none", "jpg", "a.png.part"]
    hidden = [".DS_Store", "b/._1.png", ".thumbnails/1.png"]
    write_images(tmp_path, *names, *other, *hidden)
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_files(tmp_path)
    assert found.names == tuple(sorted(names))
    assert found.others == tuple(sorted([*other, "lost.png", "pipe.png"]))
    assert found.hidden == (".DS_Store", ".thumbnails", "b/._1.png")
    assert found.note.startswith(
        "skipped 8 files of other kinds (.txt 2, no suffix 2, .png 2, .part 1, .mov 1): a.png.part,"
        " b/more.txt, b/notes.txt, …; 3 hidden: .DS_Store, "
    )
    assert "\n" not in found.note


def test_links_are_followed_once_under_the_folders_own_name_and_never_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", "1.png", "deep/2.png")
    write_images(tmp_path / "images", "real/3.png")
    images = tmp_path / "images"
    for name in ("a", "z"):  # before and after what they lead to
        (images / name).symlink_to(images / "real")
    (images / "b").symlink_to(tmp_path / "elsewhere")
    (images / "circle").symlink_to(images)
    (images / "self").symlink_to(images / "self")
    (images / "file.png").symlink_to(tmp_path / "elsewhere/1.png")
    found = find_files(images)
    assert found.names == ("b/1.png", "b/deep/2.png", "file.png", "real/3.png")
    assert found.repeated == ("a", "circle", "z") and found.others == ("self",)
    assert "3 links to folders already listed: a, circle, z" in found.note


def test_a_hidden_folder_that_is_asked_for_is_searched(tmp_path):
    write_images(tmp_path / ".photos", "1.png")
    assert find_files(tmp_path / ".photos").names == ("1.png",)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path, "a/1.png", "b/2.png")
    forbid_listing(tmp_path / "b", monkeypatch)
    with pytest.raises(FilesError, match=r"cannot list .*/b: Permission denied; change that or"):
        find_files(tmp_path)


def test_client_calibration_and_head_training_find_the_same_files(tmp_path):
    """Of a folder with everything that they once took differently."""
    from export.probe import _found, _labelled

    write_images(tmp_path, "cat/1.heic", "cat/.2.png", "dog/3.TIF", "dog/deep/4.gif", "cat/5.txt")
    write_images(tmp_path / "cat/.hidden", "6.png")
    write_images(tmp_path.parent / "elsewhere", "7.png")
    (tmp_path / "owl").symlink_to(tmp_path.parent / "elsewhere")
    names = ("cat/1.heic", "dog/3.TIF", "dog/deep/4.gif", "owl/7.png")
    assert open_images(str(tmp_path)).names == names
    found, notes = find_images([tmp_path])
    assert found == [tmp_path / name for name in names]
    labels, files = _labelled(tmp_path, _found(tmp_path))
    assert labels == ("cat", "dog", "owl")
    assert files == [(name, number) for name, number in zip(names, (0, 1, 1, 2), strict=True)]
    note = find_files(tmp_path).note
    assert "cat/5.txt" in note and "2 hidden: cat/.2.png, cat/.hidden" in note
    assert open_images(str(tmp_path)).note == note and notes == [f"{tmp_path}: {note}"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("café 日本.jpg", "café 日本.jpg"),
        ("two\nlines\t.jpg", r"two\nlines\t.jpg"),
        ("\x1b[31mred\x9b.jpg", r"\x1b[31mred\x9b.jpg"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
        ("family \U0001f468\u200d\U0001f469.png", "family \U0001f468\u200d\U0001f469.png"),
        (Path("a b/'quoted' [red].png"), "a b/'quoted' [red].png"),
    ],
)
def test_a_name_is_shown_in_one_line_of_unicode(name, expected):
    assert shown(name) == expected
    expected.encode()


def test_finding_files_needs_nothing_but_the_standard_library():
    child = "import sys, client.files; print({'imaging', 'PIL', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "set()\n"


def test_labels_that_cannot_be_read_are_one_line(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.touch()
    binary.write_bytes(b"\xff\xfe")
    for path, said in ((empty, "no labels"), (binary, "not UTF-8"), (tmp_path, "Is a directory")):
        with pytest.raises(FilesError, match=said):
            read_labels(path)
