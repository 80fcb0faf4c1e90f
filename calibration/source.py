"""What a source of images is: encoded images by index, each with a name, a group and a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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
        names: the names of all N images, known without reading one.
    """

    spec: str
    title: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of images N."""
        ...

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
