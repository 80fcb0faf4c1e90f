"""Images that a recipe learns from at export: the ranges of `int8=static`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.prints import encode, look_of
from export.errors import UsageError
from imaging import ImageError, Preprocessing, decode, pixels_sha256

MOST = 64  # ranges settle after some tens of images, and each costs a run of the model


@dataclass(frozen=True, eq=False)
class FitImages:
    """Some images of a folder.

    Attributes:
        tensors: FP32 (n, 3, H, W), n at most `MOST`.
        prints: of these images, `bundle.prints.encode`, so that calibration leaves them out.
    """

    tensors: NDArray[np.float32]
    prints: str

    @classmethod
    def read(cls, folder: Path, preprocessing: Preprocessing) -> FitImages:
        """Read images evenly spread over a folder and the folders in it.

        Raises:
            UsageError: no such folder, or none of its files is an image.
        """
        if not folder.is_dir():
            raise UsageError(f"--fit-images {folder}: no such directory")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        chosen = np.unique(np.linspace(0, max(len(files) - 1, 0), MOST).round().astype(int))
        found = cls.of((files[index].read_bytes() for index in chosen if files), preprocessing)
        if found is None:
            raise UsageError(f"--fit-images {folder}: no image there can be read")
        return found

    @classmethod
    def of(cls, images: Iterable[bytes], preprocessing: Preprocessing) -> FitImages | None:
        """Decode images, those that are none left out; None where not one is an image."""
        tensors, hashes, looks = [], [], []
        for data in images:
            try:
                image = decode(data)
                tensors.append(preprocessing(image))
            except ImageError:
                continue
            hashes.append(pixels_sha256(image))
            looks.append(look_of(image))
        return cls(np.stack(tensors), encode(hashes, np.stack(looks))) if tensors else None
