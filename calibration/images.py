"""Where calibration images come from: a folder, or crops of photographs that wheels ship.

Every image is one `SourceImage`: encoded bytes, a name, a group and, where it is known, a label.
Splits never separate images of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImagesError(ValueError):
    """There is nothing to calibrate on. One line that says what to do."""


@dataclass(frozen=True)
class SourceImage:
    """One encoded image.

    Attributes:
        name: unique within its source.
        group: images of one group stay in one split.
        label: the class name, or None.
        data: JPEG, PNG or WebP bytes.
    """

    name: str
    group: str
    label: str | None
    data: bytes


def list_folder(folder: Path) -> list[Path]:
    """All image files below a folder, sorted.

    Raises:
        ImagesError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ImagesError(f"no such folder: {folder}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ImagesError(f"no {', '.join(SUFFIXES)} file below {folder}")
    return files


def read_folder(folder: Path, files: list[Path]) -> Iterator[SourceImage]:
    """Read files of a folder; a file directly inside a sub-folder is labelled by its name."""
    for file in files:
        relative = file.relative_to(folder)
        label = relative.parts[0] if len(relative.parts) == 2 else None
        yield SourceImage(relative.as_posix(), relative.as_posix(), label, file.read_bytes())
