"""Where calibration images come from: a folder, or crops of photographs that wheels ship.

A folder's labels follow its layout:

- a file in a sub-folder has the sub-folder's name as label (an ImageFolder tree); a folder called
  `images` in between does not count, as in tiny-imagenet-200's `train/<label>/images/*.JPEG`;
- `val_annotations.txt`, in the folder or in its `val/`, labels tiny-imagenet-200's validation
  images. Given the folder that holds `val/`, only those are taken: a model saw `train/`, so its
  two rungs agree there more often than on the images it will be served;
- every other file has no label.

Sub-folders that are links are followed; hidden files and folders are passed over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imaging import ImageError

from .sample import SampleImages
from .source import ImagesError, ImageSource, SourceImage

__all__ = ["FolderImages", "ImageSource", "ImagesError", "SourceImage", "open_images"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # in any case
SAMPLE_COUNT = 600
ANNOTATIONS = "val_annotations.txt"


def open_images(spec: str, limit: int | None = None) -> ImageSource:
    """Open a source of images.

    Args:
        spec: a folder's path; or `sample:SEED` for random crops of shipped photographs, 600 unless
            `limit` says otherwise; or `sample:SEED:COUNT`, as such a source calls itself.
        limit: at most this many images; of a folder, spread evenly over its sorted files.

    Raises:
        ImagesError: no such folder, no image in it, or a malformed spec.
    """
    if limit is not None and limit < 1:
        raise ImagesError(f"--limit {limit} leaves no image; choose at least 1")
    kind, colon, rest = spec.partition(":")
    if kind != "sample" or not colon:
        return FolderImages(Path(spec), limit)
    try:
        seed, *counts = (int(field) for field in rest.split(":"))
        (count,) = counts or (limit or SAMPLE_COUNT,)
    except ValueError:
        raise ImagesError(f"{spec!r} is not sample:SEED; give a number, e.g. sample:1") from None
    return SampleImages(min(count, limit or count), seed)


class FolderImages:
    """The image files below a folder, sorted by path; each file is a group of its own.

    Of a folder with more than `limit` files, the sorted list is cut into `limit` runs of equal
    length and one file is drawn from each, by a fixed seed: every class and every day keeps its
    share, which the first `limit` files would not give, and no period in the names (every second
    file a mirror image) can hide half of the folder.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """List a folder.

        Raises:
            ImagesError: no such folder, no image in it, or a sub-folder or the annotations cannot
                be read.
        """
        self._folder = Path(os.path.abspath(folder))
        if not self._folder.is_dir():
            raise ImagesError(f"no such folder: {folder}")
        annotated = _annotated(self._folder)
        names = _list(annotated or self._folder)
        if annotated is None:
            self.title = f"folder {self._folder.name}"
            labels = [_label_of_place(name) for name in names]
        else:
            self.title = f"validation images of {annotated.parent.name}"
            known = _read_annotations(annotated / ANNOTATIONS)
            labels = [known.get(name.rpartition("/")[2], _label_of_place(name)) for name in names]
            if annotated != self._folder:
                names = [f"{annotated.name}/{name}" for name in names]
        if not names:
            raise ImagesError(f"no {', '.join(SUFFIXES)} file below {folder}")
        rows = _spread(len(names), limit)
        self.spec = str(self._folder)
        self.names = tuple(names[row] for row in rows)
        self._labels = tuple(labels[row] for row in rows)

    def __len__(self) -> int:
        """The number of images N."""
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        """Read file `index`.

        Raises:
            IndexError: there is no such image.
            ImageError: the file is gone or cannot be read.
        """
        name = self.names[index]
        try:
            data = (self._folder / name).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        return SourceImage(name, name, self._labels[index], data)

    def fingerprint(self) -> str:
        """SHA-256 over names, labels, sizes and times of last change (content or permissions)."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self._labels, strict=True):
            try:
                status = (self._folder / name).stat()
                seen = (status.st_size, status.st_ctime_ns)
            except OSError:
                seen = (-1, -1)
            digest.update(ascii((name, label, *seen)).encode())
        return digest.hexdigest()


def _list(folder: Path) -> list[str]:
    """Paths of the image files below a folder, relative to it, sorted."""

    def refuse(error: OSError) -> None:
        raise ImagesError(f"cannot list {error.filename}: {error.strerror}; change that or move it")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if place == str(folder) else os.path.relpath(place, folder) + "/"
        found += [
            prefix + name
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _annotated(folder: Path) -> Path | None:
    """The folder or its `val/`, whichever holds tiny-imagenet-200's annotations first."""
    for place in (folder, folder / "val"):
        if (place / ANNOTATIONS).is_file():
            return place
    return None


def _label_of_place(name: str) -> str | None:
    folders = name.split("/")[:-1]
    if folders[-1:] == ["images"]:
        folders.pop()
    return folders[0] if len(folders) == 1 else None


def _read_annotations(file: Path) -> dict[str, str]:
    """Labels by file name; a line is the name, the label and a box, parted by tabs."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {name: label for name, label, *_ in (line.split("\t") for line in lines if line)}
    except (OSError, ValueError) as error:
        raise ImagesError(
            f"{file} is not readable ({error}); each line is FILE, tab, LABEL: mend or remove it"
        ) from None


def _spread(total: int, limit: int | None) -> Sequence[int]:
    """Ascending rows: one drawn from each of `limit` equal runs of `total` rows."""
    if limit is None or limit >= total:
        return range(total)
    edges = np.arange(limit + 1) * total // limit
    rows: list[int] = np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()
    return rows
