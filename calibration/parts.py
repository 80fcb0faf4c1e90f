"""What an unfinished `collect` leaves behind, so that a rerun continues where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .npz import NpzError, join_npz, load_npz, save_npz

IDENTITY, UNREADABLE = "identity", "unreadable"


class Parts:
    """Numbered `.npz` files in a folder of their own, each with the rows of a run of images.

    Every part carries the identity of the run that made it; a part that is torn or of another run
    counts as missing and is made again in its place.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Name the parts of a run; nothing is read or written.

        Args:
            folder: holds parts and nothing else.
            identity: equal for two runs exactly if they would write the same parts.
        """
        self.folder = folder
        self._identity = identity
        self._with_rows: set[int] = set()

    def find(self, index: int) -> list[str] | None:
        """The unreadable images' lines of a whole part of this run, or None where there is none."""
        try:
            arrays = load_npz(self._file(index))
        except (FileNotFoundError, NpzError):
            return None
        if str(arrays.get(IDENTITY)) != self._identity or UNREADABLE not in arrays:
            return None
        if len(arrays) > 2:
            self._with_rows.add(index)
        return [str(line) for line in arrays[UNREADABLE]]

    def write(self, index: int, rows: Mapping[str, NDArray[Any]], unreadable: list[str]) -> None:
        """Write a part, whole or not at all.

        Args:
            index: its number.
            rows: arrays of equal length, the same in every part; none where every image of the
                part is unreadable.
            unreadable: a line for each image that could not be read.
        """
        lines = np.array(unreadable, dtype=np.str_)
        save_npz(self._file(index), {**rows, UNREADABLE: lines, IDENTITY: np.array(self._identity)})
        if rows:
            self._with_rows.add(index)

    def join(self, path: Path, scalars: Mapping[str, NDArray[Any]]) -> None:
        """Write the rows of all parts found or written, and `scalars`, into one `.npz`.

        At least one part has rows.
        """
        files = [self._file(index) for index in sorted(self._with_rows)]
        with np.load(files[0], allow_pickle=False) as first:
            rows = [name for name in first.files if name not in (IDENTITY, UNREADABLE)]
        join_npz(path, files, rows, scalars)

    def remove(self) -> None:
        """Delete every part, also those of other runs."""
        for file in self.folder.glob("*.npz"):
            file.unlink()
        with suppress(OSError):  # somebody keeps something else in it
            self.folder.rmdir()

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npz"
