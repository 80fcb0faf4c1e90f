"""Where calibration images come from: a folder, or crops of photographs that wheels ship.

A folder's labels follow its layout:

- a file in a sub-folder has the sub-folder's name as label (an ImageFolder tree); a folder called
  `images` in between does not count, as in tiny-imagenet-200's `train/<label>/images/*.JPEG`;
- `val_annotations.txt`, in the folder or in its `val/`, labels tiny-imagenet-200's validation
  images. Given the folder that holds `val/`, only those are taken: a model saw `train/`, so its
  two rungs agree there more often than on the images it will be served;
- every other file has no label.

Which files are images is said by `client.files.find_files`.

The sample stream is real pixels without a download. Crop `i` of seed `s` is drawn by a generator of
its own, numpy's default one seeded with `(s, i)`: it chooses a photograph, a side between 15 % and
100 % of its shorter edge and a position, all uniformly. So it depends on no other crop, and is the
same on every machine with the same Pillow; different seeds give independent draws. Its label is the
photograph's name: "which photograph is this a crop of" is a task with easy and hard images.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
from PIL import Image

from client.files import SUFFIXES, FilesError, find_files, shown
from imaging import ImageError

SAMPLE_COUNT = 600
ANNOTATIONS = "val_annotations.txt"
MIN_SIDE, MAX_SIDE = 0.15, 1.0  # of the shorter edge
JPEG_QUALITY = 95  # high enough that compression does not decide what is hard

# Photographs and micrographs; drawings, test charts and one half of the stereo pair are left out.
_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("microaneurysms.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg"),
    *("rocket.jpg", "text.png"),
)
_SKLEARN = ("china.jpg", "flower.jpg")


class ImagesError(ValueError):
    """There is nothing to calibrate on. One line that says what to do."""


@dataclass(frozen=True)
class SourceImage:
    """One encoded image.

    Attributes:
        name: unique within its source.
        group: images of one group stay in one split.
        label: the class name, or None.
        data: the bytes of an image file.
        independent: drawn at random from one stream, so that it looks like another image by
            chance and is no copy of it.
    """

    name: str
    group: str
    label: str | None
    data: bytes
    independent: bool = False


class ImageSource(Protocol):
    """N images in a fixed order, read or cut when they are asked for, from any thread.

    Attributes:
        spec: `images.open_images` makes the same source of it, or, of a folder that was opened
            with a limit, one that holds all its names.
        title: the source in words, without a path.
        names: the names of all N images, known without reading one. One that is no Unicode is
            fit to open a file with; `client.files.shown` makes it fit to be shown.
        note: one line about files that were skipped, and why; empty where none was.
    """

    spec: str
    title: str
    names: tuple[str, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[SourceImage]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SourceImage:
        """Image `index`.

        Raises:
            IndexError: there is no such image.
            imaging.ImageError: its file is gone or cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when an image may have changed; reads no image."""
        ...


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


class FolderImages(ImageSource):
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
            raise ImagesError(f"no such folder: {shown(folder)}")
        annotated = _annotated(self._folder)
        try:
            found = find_files(annotated or self._folder)
        except FilesError as error:
            raise ImagesError(str(error)) from None
        names, self.note = list(found.names), found.note
        if annotated is None:
            self.title = f"folder {shown(self._folder.name)}"
            labels = [_label_of_place(name) for name in names]
        else:
            self.title = f"validation images of {shown(annotated.parent.name)}"
            known = _read_annotations(annotated / ANNOTATIONS)
            labels = [known.get(name.rpartition("/")[2], _label_of_place(name)) for name in names]
            if annotated != self._folder:
                names = [f"{annotated.name}/{name}" for name in names]
        if not names:
            skipped = f"; {self.note}" if self.note else ""
            raise ImagesError(f"no {', '.join(SUFFIXES)} file below {shown(folder)}{skipped}")
        rows = _spread(len(names), limit)
        self.spec = str(self._folder)
        self.names = tuple(names[row] for row in rows)
        self._labels = tuple(labels[row] for row in rows)

    def __getitem__(self, index: int) -> SourceImage:
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
    return shown(folders[0]) if len(folders) == 1 else None


def _read_annotations(file: Path) -> dict[str, str]:
    """Labels by file name; a line is the name, the label and a box, parted by tabs."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
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


@cache
def _load(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


class SampleImages(ImageSource):
    """The first `count` crops of a seed's stream, cut when they are asked for.

    Each crop is a group of its own: the crops are independent draws of one stream, and that
    stream, not the set of photographs, is what the sample deployment serves.
    """

    def __init__(self, count: int, seed: int) -> None:
        """Find the photographs and name the crops.

        Raises:
            ImagesError: no photographs, or a count or a seed out of range.
        """
        if count < 1 or not 0 <= seed < 2**32:  # numpy reads a larger seed as (seed, index)
            raise ImagesError(
                f"no {count} sample crops of seed {seed}; give at least 1 crop and a seed from 0 "
                f"to {2**32 - 1}"
            )
        self._seed = seed
        self._files = photographs()
        self.spec = f"sample:{seed}:{count}"
        self.title = f"sample crops, seed {seed}"
        self.names = tuple(
            f"{self._draw(index)[1].stem}/{seed}-{index:05d}.jpg" for index in range(count)
        )

    def _draw(self, index: int) -> tuple[np.random.Generator, Path]:
        """Crop `index`'s generator after its first draw, and the photograph drawn."""
        rng = np.random.default_rng((self._seed, index))
        return rng, self._files[rng.integers(len(self._files))]

    def __getitem__(self, index: int) -> SourceImage:
        name = self.names[index]
        rng, file = self._draw(range(len(self))[index])
        image = _load(file)
        width, height = image.size
        side = max(1, round(min(width, height) * rng.uniform(MIN_SIDE, MAX_SIDE)))
        left = int(rng.integers(width - side + 1))
        top = int(rng.integers(height - side + 1))
        buffer = io.BytesIO()
        crop = image.crop((left, top, left + side, top + side))
        crop.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return SourceImage(name, name, file.stem, buffer.getvalue(), independent=True)

    def fingerprint(self) -> str:
        """SHA-256 over the spec, the photographs and the version of Pillow, which encodes."""
        digest = hashlib.sha256(f"{self.spec} {PIL.__version__}".encode())
        for file in self._files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def photographs() -> list[Path]:
    """The photographs' files, sorted by name.

    Raises:
        ImagesError: a wheel is not installed, or its release no longer ships a photograph.
    """
    files = []
    for package, folder, names in (
        ("skimage", "data", _SKIMAGE),
        ("sklearn", "datasets/images", _SKLEARN),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImagesError(f"{package} is not installed; run make, or pass --images DIR")
        root = Path(spec.origin).parent / folder
        files += [root / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ImagesError(f"the installed wheels lack {', '.join(missing)}; pass --images DIR")
    return sorted(files, key=lambda file: file.stem)


def write_sample(folder: Path, count: int, seed: int) -> None:
    """Write crops below `folder`, one sub-folder per photograph.

    Raises:
        ImagesError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ImagesError(f"{folder} is not empty; choose another folder or remove it")
    for crop in SampleImages(count, seed):
        path = folder / crop.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crop.data)
