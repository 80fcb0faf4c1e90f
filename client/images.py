"""Encoded images as callers give them: bytes, or files by their paths."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequestError

# An encoded image: its bytes, the path of its file, or the file opened for reading bytes.
ImageLike = bytes | bytearray | memoryview | NDArray[np.uint8] | str | os.PathLike[str] | BinaryIO


def as_rows(images: ImageLike | Iterable[ImageLike]) -> NDArray[np.object_]:
    """Encoded images, shape (N, 1), of which files are not read yet; see `encoded`.

    Raises:
        InvalidRequestError: one of them is no such thing.
    """
    several = not _is_image(images) and isinstance(images, Iterable)
    given: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
    rows = np.empty((len(given), 1), dtype=np.object_)
    for index, image in enumerate(given):
        if not _is_image(image):
            is_array = isinstance(image, np.ndarray)
            kind = f"{image.dtype} array {image.shape}" if is_array else type(image).__name__
            raise InvalidRequestError(
                f"image {index + 1} of {len(given)} is of type {kind}; give the bytes of an image "
                "file, or its path"
            )
        rows[index, 0] = image
    return rows


def is_path(image: object) -> bool:
    """Whether it names a file."""
    return isinstance(image, str | os.PathLike)


def is_file(image: object) -> bool:
    """Whether it is read from somewhere, which may take a while."""
    return is_path(image) or _is_open(image)


def _is_image(image: object) -> bool:
    if isinstance(image, np.ndarray):  # of bytes, as numpy reads a file
        return image.dtype == np.uint8 and image.ndim == 1
    return is_file(image) or isinstance(image, bytes | bytearray | memoryview)


def _is_open(image: object) -> bool:
    """Whether it is an open file, which could also be taken for a list of its lines."""
    return hasattr(image, "read")


def encoded(image: Any) -> bytes:
    """The bytes of an `ImageLike`; InvalidRequestError where its file cannot be read."""
    try:
        if is_path(image):
            return Path(image).read_bytes()
        return bytes(image.read() if _is_open(image) else image)
    except TypeError:
        raise InvalidRequestError("its file is open as text; open it with mode 'rb'") from None
    except IsADirectoryError:
        raise InvalidRequestError("it is a folder; give the paths of files") from None
    except (OSError, ValueError) as error:  # a NUL in the name
        if isinstance(image, str) and (image.startswith("data:") or _is_too_long(error)):
            raise InvalidRequestError(
                "it is a text, no path; give the image's bytes, of base64 base64.b64decode(text)"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(f"cannot read it: {reason}") from None


def _is_too_long(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
